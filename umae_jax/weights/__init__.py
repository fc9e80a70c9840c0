"""Weights that come in and go out: names, layouts, files."""
