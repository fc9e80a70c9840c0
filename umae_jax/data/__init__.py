"""From files to sharded arrays."""
