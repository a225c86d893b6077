"""Map over processes with results in order; a file that kills its decoder costs one sample instead of the run."""

import logging
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)
A = TypeVar("A")
R = TypeVar("R")

#: Results that may wait for a slow one in front of them, per worker.
AHEAD = 4


class OrderedPool(Generic[A, R]):
    """Processes that map tasks in order, with a bounded number of them under way.

    Args:
        call: what to do with a task; picklable.
        on_crash: result of a task whose process died (twice, the second time alone).
        workers: processes; 0 runs in this process.
    """

    def __init__(self, call: Callable[[A], R], on_crash: Callable[[A], R], workers: int) -> None:
        self.call, self.on_crash, self.workers = call, on_crash, workers
        self._pool: ProcessPoolExecutor | None = None

    def map(self, tasks: Iterable[A]) -> Iterator[R]:
        """Yield results in the order of `tasks`; a crash of a worker costs the task that caused it, nothing else."""
        if self.workers == 0:
            yield from map(self.call, tasks)
            return
        waiting: deque[tuple[A, Future[R]]] = deque()
        try:
            for task in tasks:
                waiting.append((task, self._submit(task)))
                # Bounded, since results wait in order: behind one long video all others would pile up on the disk.
                if len(waiting) >= self.workers * AHEAD:
                    yield self._first(waiting)
            while waiting:
                yield self._first(waiting)
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, task: A) -> Future[R]:
        if self._pool is None:
            self._pool = _new_pool(self.workers)
        try:
            return self._pool.submit(self.call, task)
        except BrokenProcessPool as error:  # _first will meet it and try the task again
            failed: Future[R] = Future()
            failed.set_exception(error)
            return failed

    def _first(self, waiting: deque[tuple[A, Future[R]]]) -> R:
        task, future = waiting.popleft()
        try:
            return future.result()
        except BrokenProcessPool:
            self._pool = None
            result = self._alone(task)
            # A broken pool fails all that it holds, and does not say which task broke it.
            again = [(task, self._submit(task)) for task, _ in waiting]
            waiting.clear()
            waiting.extend(again)
            return result

    def _alone(self, task: A) -> R:
        """Run a task by itself: the one that broke the pool breaks it again here, the others pass."""
        with _new_pool(1) as single:
            try:
                return single.submit(self.call, task).result()
            except BrokenProcessPool:
                logger.warning("a worker process died twice on %s", task)
                return self.on_crash(task)


def _new_pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of the progress bar
    return ProcessPoolExecutor(workers, context, _end_with_parent, (os.getpid(),))


def _end_with_parent(parent: int) -> None:
    """Leave when the packing process is gone: after kill -9 its workers would wait for tasks for ever."""
    from signal import SIG_IGN, SIGINT, signal

    signal(SIGINT, SIG_IGN)  # Ctrl-C is the parent's to handle

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        # Not sys.exit, which in a thread ends that thread alone.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
