"""The stream of micro-batches: the same samples in the same order for any number of ranks and workers, from any step.

    plan -> places of this worker -> range reads ahead -> decode, crop, masks -> micro-batch

Worker w of W makes the rank's micro-batches w, w + W, ...; torch's DataLoader takes them in turn. No worker ever ends,
so none can run dry before another, and a resume is nothing but another first number.
"""

import contextlib
import functools
import gc
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

import torch
import webdataset
from torch.utils.data import DataLoader, get_worker_info

from pretrain.data.cache import ShardCache
from pretrain.data.crashes import CRASHES, CrashNotes
from pretrain.data.fetch import RawSample, SampleReader, read_ahead
from pretrain.data.handover import Handover, hand_over
from pretrain.data.samples import Batch, Place, Sample, SampleMaker, Samples, SourceInfo
from pretrain.data.stream_plan import StreamPlan
from pretrain.data.workers import data_workers
from pretrain.errors import DataError, TubeletError
from pretrain.runtime import stacks
from pretrain.runtime.cores import usable_cores

logger = logging.getLogger(__name__)

#: Seconds between two looks of a worker at whether its rank still lives.
WATCH_S = 5.0


class WorkerPipeline:
    """Stages that run in a data worker; sent to it by pickle, so all that opens files is made there."""

    def __init__(
        self, plan: StreamPlan, samples: Samples, rank: int, world_size: int, first: int, crashes: CrashNotes
    ) -> None:
        self._plan, self._samples = plan, samples
        self._rank, self._world_size, self._first, self._crashes = rank, world_size, first, crashes

    def dataset(self) -> webdataset.DataPipeline:
        """Join the stages to a webdataset pipeline."""
        return webdataset.DataPipeline(self.places, self.samples, self.batches)

    def places(self) -> Iterator[Place]:
        """Locate this worker's samples, micro-batch by micro-batch, for ever."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for number in itertools.count(self._first + worker, workers):
            yield from self._plan.places(number, self._rank, self._world_size, self._samples.in_blocks)

    def samples(self, places: Iterable[Place]) -> Iterator[Sample | TubeletError]:
        """Read ahead, decode, cut; an error that ends the run travels as an item, free of this process's traceback."""
        reader = self._reader()
        infos = [SourceInfo(source.name, source.index.shards, source.options) for source in self._plan.sources]
        worker = get_worker_info()
        decoding = self._crashes.decoder(worker.id if worker else None)
        maker = SampleMaker(self._plan.data, infos, reader, self._samples, decoding)

        def read(place: Place) -> RawSample:
            return reader.read(place.source, place.shard, place.row)

        place: Place
        future: Future[RawSample]
        for place, future in read_ahead(places, read, self._plan.data.readahead):
            try:
                yield maker.make(place, self._plan.composition.order_of(place), future.result)
            except TubeletError as error:
                yield error
                return

    def batches(self, samples: Iterable[Sample | TubeletError]) -> Iterator[Batch | Handover]:
        """Collate samples to micro-batches, as they travel to the rank."""
        waiting: list[Sample] = []
        for sample in samples:
            if isinstance(sample, TubeletError):
                yield {"error": str(sample)}
                return
            waiting.append(sample)
            if len(waiting) == self._plan.samples_per_micro:
                yield hand_over(self._samples.collate(waiting))
                waiting = []

    def _reader(self) -> SampleReader:
        data = self._plan.data
        cache = None if data.cache_dir is None else ShardCache(data.cache_dir, int(data.cache_gb * 1e9))
        # Two tables a lane: a window of the order may lie across the border of two shards.
        tables = max(2 * data.lanes, 64)
        indexes = [source.index for source in self._plan.sources]
        return SampleReader(indexes, cache, data.deadline_s, tables, self._samples.motion_sources)


class TrainStream:
    """Micro-batches of one rank, in the exact order of the plan, for ever.

    Args:
        plan: The order of all sources' samples.
        samples: What to make of a sample; picklable, because workers are spawned.
        rank: This rank.
        world_size: Number of ranks.
        start_step: Optimiser step (over all epochs) that the stream starts at.
        workers: Data workers; None: as many as the plan's data section says, or this process has cores.

    Raises:
        RecipeError: batch.samples does not divide into micro-batches of the ranks.
        DataError: not enough data for the order, or `samples` can't travel to a worker.
    """

    def __init__(
        self,
        plan: StreamPlan,
        samples: Samples,
        rank: int,
        world_size: int,
        start_step: int = 0,
        workers: int | None = None,
    ) -> None:
        self.plan = plan
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.accumulation = self.plan.accumulation(world_size)
        self._workers = data_workers(plan.data, usable_cores()) if workers is None else workers
        if self._workers:
            _check_picklable(samples)
        _warn_of_small_cache(plan)
        self._crashes = CrashNotes(self._workers, plan.data.deadline_s)
        self._pipeline = functools.partial(WorkerPipeline, plan, samples, rank, world_size)
        self._next = start_step * self.accumulation
        self._processes: list[BaseProcess] = []
        self._batches: Iterator[Batch | Handover] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next micro-batch.

        Raises:
            DataError: a worker met an error that ends the run, or died.
        """
        while True:
            if self._batches is None:
                self._start()
            assert self._batches is not None
            try:
                received = next(self._batches)
                break
            # torch's own check of its workers raises RuntimeError; the other two come up when the file descriptor of a
            # tensor is to be fetched from a worker that is gone.
            except (RuntimeError, OSError, EOFError) as error:
                if not self._tells_of_a_death(error):
                    raise
                self._take_out(error)
        batch = received.batch() if isinstance(received, Handover) else received
        if "error" in batch:
            raise DataError(batch["error"])
        self._next += 1
        return batch

    def source_of(self, step: int) -> str:
        """Name the one source that optimiser step `step` is made of; empty where it has all."""
        source = self.plan.composition.source_of(step)
        return "" if source is None else self.plan.sources[source].name

    def close(self) -> None:
        """End the workers."""
        # Dropping the iterator is how a DataLoader ends its workers; it has no close.
        self._batches = None

    def _start(self) -> None:
        """Start the workers at the next micro-batch."""
        loader: DataLoader[Batch | Handover] = DataLoader(
            self._pipeline(self._next, self._crashes).dataset(),
            # The pipeline yields whole micro-batches; with a batch size torch would collate them once more.
            batch_size=None,
            num_workers=self._workers,
            # Without workers torch refuses any factor.
            prefetch_factor=self.plan.data.prefetch if self._workers else None,
            pin_memory=torch.cuda.is_available(),
            # A forked worker would inherit locks of file system, CUDA and process group threads in any state.
            multiprocessing_context="spawn" if self._workers else None,
            worker_init_fn=prepare_worker,
        )
        # The DataLoader keeps its processes under a private name; those that are new among our children are theirs.
        others = set(multiprocessing.active_children())
        on_death = signal.getsignal(signal.SIGCHLD)
        with _stop_signals_held():
            self._batches = iter(loader)
        if self._workers and threading.current_thread() is threading.main_thread():
            # The DataLoader's own handler raises wherever the main thread happens to be, in the middle of a step; that
            # a worker has died is found in time when its micro-batch does not come.
            signal.signal(signal.SIGCHLD, on_death)
        self._processes = [process for process in multiprocessing.active_children() if process not in others]

    def _tells_of_a_death(self, error: Exception) -> bool:
        """Tell whether the DataLoader failed since a worker is gone: it says so, or could not take over its tensors."""
        if isinstance(error, RuntimeError):
            return "exited unexpectedly" in str(error) or "killed by signal" in str(error)
        for process in self._processes:
            process.join(1.0)  # its connection ends a moment before it does
        return any(process.exitcode not in (None, 0) for process in self._processes)

    def _take_out(self, error: Exception) -> None:
        """Leave out the sample that caused a worker's death, so that the workers can start again.

        Raises:
            DataError: it was no sample.
        """
        dead = [process for process in self._processes if process.exitcode not in (None, 0)]
        crashed = [process for process in dead if process.exitcode in CRASHES]
        locations = [location for process in crashed if (location := self._crashes.of(process.pid or 0))]
        # A death by SIGKILL means that memory is short: starting again without some sample would hide it.
        if not locations or len(crashed) < len(dead):
            raise DataError(
                f"a data worker died ({error}). Killed for memory? Then lower data.workers, data.prefetch or "
                "data.readahead; the kernel log (dmesg) names the process"
            ) from error
        for source, shard, row in locations:
            self._crashes.remember((source, shard, row))
            opened = self.plan.sources[source]
            logger.warning(
                "source %s: sample %d of shard %s killed the data worker that decoded it, or kept it busy for %g s "
                "(data.deadline_s); the workers start again without it",
                *(opened.name, row, opened.index.shards[shard].name, self.plan.data.deadline_s),
            )
        self._batches = None


@contextlib.contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Start workers with their stop signals blocked: a process inherits that, and a signal would otherwise end a worker
    in the seconds before `prepare_worker` runs in it."""
    resource_tracker.ensure_running()  # multiprocessing starts it on demand, and then unblocks these signals itself
    held = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, stacks.SIGNAL}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare_worker(worker: int) -> None:
    """Make a data worker safe: stop signals are the rank's business, and an orphan does not live on.

    The `deepspeed` launcher and Slurm signal whole process trees; a worker that obeyed would end the run before the
    rank has saved. Only a SIGTERM of the rank itself, with which the DataLoader ends its workers, is obeyed.
    """
    torch.set_num_threads(1)
    # What is imported by now stays; looking through it for garbage again and again takes 5 % of a worker's time.
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Blocked, since `_watch` takes them by sigtimedwait; unblocked, either would end the worker by default.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM, stacks.SIGNAL})
    # Not os.getppid(): a rank that was killed while this process started has been replaced by init there.
    rank = multiprocessing.parent_process()
    assert rank is not None
    threading.Thread(target=_watch, args=(rank.pid, worker), daemon=True, name="watch").start()


def _watch(rank: int, worker: int) -> None:
    while True:
        awaited = {signal.SIGTERM, stacks.SIGNAL}
        received = None if os.getppid() != rank else signal.sigtimedwait(awaited, WATCH_S)
        if received is not None and received.si_signo == stacks.SIGNAL:
            stacks.dump_worker(worker)
        elif os.getppid() != rank or (received is not None and received.si_pid == rank):
            # At once and without cleaning up: the main thread may be waiting for a read that never returns.
            os._exit(0)


def _check_picklable(samples: Samples) -> None:
    try:
        pickle.dumps(samples)
    except Exception as error:
        raise DataError(
            f"the method's samples can't be sent to a data worker ({error}): build them of a module's classes and "
            "functions, or set data.workers=0"
        ) from error


def _warn_of_small_cache(plan: StreamPlan) -> None:
    data, sources = plan.data, plan.sources
    if data.cache_dir is None:
        return
    largest = max(shard.bytes for source in sources for shard in source.index.shards)
    needed = largest * min(data.lanes, sum(len(source.index.shards) for source in sources))
    if needed > data.cache_gb * 1e9:
        logger.warning(
            "data.cache_gb=%g is less than the %.1f GB of shards that the lanes read at once: shards will be fetched "
            "again and again; raise it, lower data.lanes, or set data.cache_dir=null",
            *(data.cache_gb, needed / 1e9),
        )
