"""Weights in files: names, layouts, formats, and the models they belong to."""
