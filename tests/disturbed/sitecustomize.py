"""A process that a test disturbs: Python runs this first, with this folder on its path.

Its clock is FOT_SKEW seconds ahead. SIGUSR1 has its main thread stay where it is; the other threads go on.
"""

import os
import signal
import time

_AHEAD, _time, _time_ns = float(os.environ.get("FOT_SKEW", "0")), time.time, time.time_ns
time.time = lambda: _time() + _AHEAD
time.time_ns = lambda: _time_ns() + int(_AHEAD * 1e9)

signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))
