"""``python die_with_parent.py FD COMMAND…``: become COMMAND; a forked watcher kills its group at FD's end of file.

The watcher lives in a session of its own, so that a test that kills the worker's whole group leaves it alone."""

import contextlib
import os
import signal
import sys

reader = int(sys.argv[1])
group = os.getpid()
if os.fork() == 0:
    os.setsid()
    for fd in (0, 1, 2):
        os.close(fd)
    while os.read(reader, 1):
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    os._exit(0)
os.close(reader)
os.execvp(sys.argv[2], sys.argv[2:])
