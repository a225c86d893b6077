"""Reports of storage that does not answer: a line when it begins, one a minute meanwhile, one when it is over.

Many threads read at once; each for itself would fill the log within a minute.
"""

import logging
import threading
import time

logger = logging.getLogger(__name__)

#: Seconds between two lines.
EVERY_S = 60.0


class OutageLog:
    """Log of one process's outages, over all its threads and stores."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._lock = threading.Lock()
        self._told = -every_s
        self._failures = 0
        self._announced = False

    def failed(self, what: str, error: BaseException, left_s: float) -> None:
        """Note that an attempt failed; it is tried again for `left_s` more seconds."""
        with self._lock:
            self._failures += 1
            if time.monotonic() - self._told < self._every_s:
                return
            attempts, self._failures, self._announced = self._failures, 0, True
            self._told = time.monotonic()
        logger.warning(
            "storage: %s fails (%s: %s); trying again for %.0f s%s",
            *(what, type(error).__name__, error, left_s, f"; {attempts} attempts failed" if attempts > 1 else ""),
        )

    def recovered(self, what: str, seconds: float) -> None:
        """Note that an attempt succeeded after others had failed for `seconds`."""
        with self._lock:
            announced, self._announced = self._announced, False
        if announced:
            logger.warning("storage: %s works again after %.1f s", what, seconds)


OUTAGES = OutageLog()
