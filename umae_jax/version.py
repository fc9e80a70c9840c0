"""The version, and the time at which the package was imported."""

import time

__version__ = "0.2.0"
START_TIME = time.monotonic()  # start of the first phase that `startup` reports
