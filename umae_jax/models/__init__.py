"""Encoders, and what is trained around them."""
