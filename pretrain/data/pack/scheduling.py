"""Scheduling of a process, put right after what encoders do to it."""

import contextlib
import os


def leave_real_time() -> None:
    """Give all threads of this process ordinary scheduling again.

    SVT-AV1, started by root (in a container, say), puts its own threads and the one that opens it at real-time priority
    99. All that starts later inherits it, processes as well, and one that polls then keeps its core from all others.
    To be called when the first frame is encoded: by then the encoder has started all its threads.
    """
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended since it was listed
            if os.sched_getscheduler(int(thread)) == os.SCHED_FIFO:
                os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))
