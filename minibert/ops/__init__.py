"""The formulas of the step: attention and the loss terms."""
