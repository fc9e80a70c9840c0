"""Everything that differs between pre-training, classification, probing and other tasks."""
