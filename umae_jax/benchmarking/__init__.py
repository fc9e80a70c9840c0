"""Measurements of training steps, of comparable steps in PyTorch, and of the data loader."""
