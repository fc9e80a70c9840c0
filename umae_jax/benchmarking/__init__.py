"""Measuring steps and reading, what each is measured beside, and the parts of a model that cycles go to."""
