"""Implementations for particular machines; `models/attention.py` says what they compute."""
