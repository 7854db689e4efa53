"""What the server that loader processes are forked from imports: all that they need, once, without threads.

It is a process of its own (multiprocessing's `forkserver`), since one with threads or a GPU must not be forked. A
signal to the whole group is for the process that trains; the server ends with it, and its children likewise.
"""

import signal

import mmkd.student.data.loader_processes
import mmkd.student.data.rgb_views  # noqa: F401  # imported for what they import
from mmkd.cache_tools.process.pool_worker import PARENTS_SIGNALS

for number in PARENTS_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
