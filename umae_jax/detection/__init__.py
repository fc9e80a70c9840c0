"""Parts of object detectors as pure functions of one image, all of static shape (DET 1).

Boxes are float32 (x1, y1, x2, y2) in pixels of the resized image, without "+1". Maps have channels last. Image sizes
are (height, width).
"""
