"""Encoders, and the models around them."""
