"""Loaded by Python when it starts with this folder on its path, as a process with libfaketime does (elsewhere.py).

Under libfaketime 0.9.10 that leaves the monotonic clock alone, `time.sleep` fails with EINVAL: Python sleeps until a
moment of that clock, and libfaketime takes the moment for one of the clock that it moves.
"""

import select
import time

time.sleep = lambda seconds: select.select([], [], [], seconds) and None
