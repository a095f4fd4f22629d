"""On a worker's PYTHONPATH: its wall clock is wrong by ``WRONG_CLOCK_S`` seconds."""

import os
import time

_off_s = float(os.environ.get("WRONG_CLOCK_S", "0"))
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _off_s
time.time_ns = lambda: _time_ns() + int(_off_s * 1e9)
