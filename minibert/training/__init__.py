"""What stands around the loop: optimiser, checkpoints, the run log."""
