"""A process whose clock is wrong, FOT_SKEW seconds ahead: Python runs this first, with this folder on its path."""

import os
import time

_AHEAD, _time, _time_ns = float(os.environ.get("FOT_SKEW", "0")), time.time, time.time_ns
time.time = lambda: _time() + _AHEAD
time.time_ns = lambda: _time_ns() + int(_AHEAD * 1e9)
