"""The ledger of a training step: each operation, what asked for it, what it costs."""
