"""What our training step is measured beside."""
