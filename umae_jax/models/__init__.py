"""Encoders, and the models that contain them."""
