"""Object detection and instance segmentation: components of two-stage detectors, and COCO's metrics."""
