"""Read image files into global sharded arrays."""
