"""Estimates of memory, speed and cost, from the compiler and without the hardware."""
