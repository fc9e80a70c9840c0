"""The cost of a training step, by compilers, without the hardware."""
