"""The work on one file after another, from bytes to bytes, in this process or in several, and the tally of it.

Why processes and not threads: what surrounds networks and walk, Pillow and NumPy, keeps no more than one core busy,
and a process that dies takes no other file with it. Forked processes share the memory of the model that they find when
they start.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from bitstream.container import NO_LIMIT, unpack
from bitstream.errors import WorkerError
from vqcodec.codec import Codec
from vqcodec.config import DEFAULT_TUNE, Tune
from vqcodec.image import MOST_WEBP, Picture, Strip, info_of, read, stripped, to_pil
from vqcodec.jobs import Job, begin
from vqcodec.output import Options, save
from vqcodec.progress import Progress
from vqcodec.targets import Target

Item = TypeVar("Item")


class Result(NamedTuple):
    """A finished file. notes: features of the source that were dropped; warnings: features the output format lacks;
    quality: set if a target was searched; miss: how the target was missed; lossless: bytes of a lossless WebP file if
    it is smaller."""

    data: bytes
    width: int
    height: int
    seconds: float
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    quality: float | None = None
    miss: str = ""
    lossless: int | None = None


class Work(Protocol):
    """Bytes of a file to bytes of another. Raises VqcodecError for a bad file."""

    def __call__(self, codec: Codec, data: bytes, progress: Progress | None = None) -> Result: ...


@dataclass(frozen=True)
class Encode:
    """A picture file to a .vq2 file. tune: None for what suits the target."""

    quality: float
    target: Target | None
    tune: Tune | None
    strip: Strip
    effort: int
    max_pixels: int
    lenient: bool = False

    def __call__(self, codec: Codec, data: bytes, progress: Progress | None = None) -> Result:
        started = time.monotonic()
        picture = stripped(read(data, self.max_pixels, lenient=self.lenient), self.strip)
        height, width = picture.pixels.shape[:2]
        quality, miss = None, ""
        if self.target is None:
            tune = self.tune or DEFAULT_TUNE
            encoded = codec.encode(picture, self.quality, tune=tune, effort=self.effort, progress=progress)
        else:
            reached = codec.encode_to(picture, self.target, tune=self.tune, effort=self.effort, progress=progress)
            encoded, quality = reached.data, reached.quality
            if not reached.met:
                wanted, found = map(self.target.describe, (self.target.value, reached.value))
                miss = f"{wanted} cannot be reached: the nearest is {found}, at quality {quality:.2f}"
        lossless = _smaller_lossless(picture, encoded)
        return Result(encoded, width, height, time.monotonic() - started, picture.notes, (), quality, miss, lossless)


def _smaller_lossless(picture: Picture, encoded: bytes) -> int | None:
    """Bytes of a lossless WebP file of a picture with its metadata, if that is smaller than its .vq2 file.

    It is tried where the .vq2 file has flat blocks, as of pages, screens and drawings: of a photograph it never is.
    """
    if unpack(encoded, max_pixels=NO_LIMIT).flat is None or max(picture.pixels.shape) > MOST_WEBP:
        return None
    lossless = BytesIO()
    to_pil(picture).save(lossless, "WEBP", lossless=True, method=0, **info_of(picture))
    size = len(lossless.getbuffer())
    return size if size < len(encoded) else None


@dataclass(frozen=True)
class Decode:
    """A .vq2 file to a picture file. format and options: as in ``vqcodec.output.save``; preview: as in
    ``Codec.decode``; strip: as in ``vqcodec.image.stripped``."""

    format: str
    preview: bool
    max_pixels: int
    strip: Strip = False
    options: Options = Options()

    def __call__(self, codec: Codec, data: bytes, progress: Progress | None = None) -> Result:
        started = time.monotonic()
        picture = stripped(codec.decode_picture(data, self.max_pixels, progress, self.preview), self.strip)
        height, width = picture.pixels.shape[:2]
        notes, encoded = list(picture.notes), BytesIO()
        warnings = save(picture, encoded, self.format, self.options)
        return Result(encoded.getvalue(), width, height, time.monotonic() - started, notes, warnings)


# --- all jobs ---


@dataclass
class Tally:
    """What has become of the files so far."""

    done: int = 0
    skipped: int = 0
    left_out: int = 0
    larger: int = 0  # than the input
    missed: int = 0  # a target
    before: int = 0
    after: int = 0
    pixels: int = 0
    failed: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, size: int, made: Result) -> None:
        """A file is done; size: bytes of the input."""
        self.done += 1
        self.larger += len(made.data) > size
        self.missed += bool(made.miss)
        self.before += size
        self.after += len(made.data)
        self.pixels += made.width * made.height

    def facts(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.started
        return {
            "done": self.done,
            "skipped": self.skipped,
            "failed": len(self.failed),
            "left_out": self.left_out,
            "targets_missed": self.missed,
            "bytes_before": self.before,
            "bytes_after": self.after,
            "seconds": round(seconds, 3),
            "megapixels_per_second": round(self.pixels / 1e6 / max(seconds, 1e-9), 3),
        }


Outcome = Callable[[], tuple[int, Result]]  # the size of an input and what was made of it, or raises


def outcomes(
    work: Work,
    jobs: Iterable[Job],
    codec: Codec,
    pool: "Pool | None",
    watch: Callable[[str], AbstractContextManager[Progress | None]],
) -> Generator[tuple[Job, Outcome], None, None]:
    """Every job with its outcome: in the processes of a pool, as they get done, or else here, in their order.

    watch: from the name of a file to a context in which the work on it, here, tells its progress.
    """
    if pool:
        yield from spread(work, jobs, begin, pool)
        return
    for job in jobs:

        def outcome(job: Job = job) -> tuple[int, Result]:
            data = begin(job)
            with watch(job.source) as progress:
                return len(data), work(codec, data, progress)

        yield job, outcome


# --- in several processes ---


class Pool(Protocol):
    """Processes that work, each with a codec. room: how many files they are to have at once, also those that wait."""

    room: int

    def submit(self, work: Work, data: bytes) -> Future[Result]:
        """Starts the work on a file. Raises BrokenProcessPool, here or from the future, if a worker died: all pending
        work is lost; call ``restart`` before submitting again."""

    def restart(self) -> None: ...

    def close(self, now: bool) -> None:
        """Ends the processes; now: whatever they are at."""


def spread(
    work: Work, jobs: Iterable[Item], read: Callable[[Item], bytes], pool: Pool
) -> Generator[tuple[Item, Outcome], None, None]:
    """Does all jobs in the processes of a pool, which it closes in the end; yields them as they get done, each with its
    outcome.

    read: gives the bytes of a job, in this process, a little ahead. A worker that dies takes one job with it
    (WorkerError), no more.
    """
    waiting, suspects = iter(jobs), deque[tuple[Item, bytes]]()
    running: dict[Future[Result], tuple[Item, bytes]] = {}
    more = True
    try:
        while True:
            # After a death, those that may have been the cause go one at a time: the next one to die is guilty.
            room = 1 if suspects else pool.room
            while len(running) < room and (suspects or more):
                if suspects:
                    job, data = suspects.popleft()
                else:
                    try:
                        job = next(waiting)
                    except StopIteration:
                        more = False
                        break
                    try:
                        data = read(job)
                    except Exception as error:
                        yield job, partial(_raise, error)
                        continue
                try:
                    running[pool.submit(work, data)] = job, data
                except BrokenProcessPool:  # a death that nobody has been told of yet
                    suspects.append((job, data))
                    pool.restart()
                    break
            if not running:
                if suspects or more:
                    continue
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            dead = [future for future in done if isinstance(future.exception(), BrokenProcessPool)]
            for future in done.difference(dead):
                job, data = running.pop(future)
                yield job, partial(_result, future, len(data))
            if dead:
                pool.restart()
                if len(running) == 1:
                    ((job, _),) = running.values()
                    yield job, partial(_raise, WorkerError("the process that worked on it died: give it more memory"))
                else:
                    suspects.extend(running.values())
                running.clear()
    except BaseException:  # an interrupt, for instance: nobody waits for what the workers are at
        pool.close(now=True)
        raise
    pool.close(now=False)


def _result(future: Future[Result], size: int) -> tuple[int, Result]:
    return size, future.result()


def _raise(error: Exception) -> tuple[int, Result]:
    raise error


class LocalPool:
    """Processes of one thread each on this machine, with a codec in each.

    weights: what ``codec`` was loaded from, for systems where a new process does not inherit it.
    """

    def __init__(self, codec: Codec, weights: str | None, workers: int) -> None:
        self._codec, self._weights, self._workers = codec, weights, workers
        self.room = workers + 1  # nobody waits for a file to be read
        self._start()

    def _start(self) -> None:
        global _codec
        # Threads and GPUs do not survive a fork: Linux on the CPU does it, with a single thread in this process.
        forks = sys.platform == "linux" and self._codec.device.type == "cpu"
        context = multiprocessing.get_context("fork" if forks else "spawn")
        if forks:
            # The kernels are compiled here once, and not in every worker.
            self._codec.encode(np.zeros((1, 1), np.uint8), 1)
        _codec = self._codec if forks else None
        initial = self._weights, self._codec.device.type
        self._processes = ProcessPoolExecutor(self._workers, context, _begin, initial)
        try:
            with _undisturbed():
                started = self._processes.submit(int)
            started.result()  # all are started
        except BaseException:
            self.close(now=True)  # nobody else knows of them yet
            raise

    def submit(self, work: Work, data: bytes) -> Future[Result]:
        with _undisturbed():  # some versions of Python start workers one by one
            return self._processes.submit(_work, work, data)

    def restart(self) -> None:
        self._processes.shutdown()
        self._start()

    def close(self, now: bool) -> None:
        # One that is only starting may miss a gentler signal, or answer it with a traceback. None has anything to save.
        for process in multiprocessing.active_children() if now else []:
            process.kill()
        self._processes.shutdown(cancel_futures=True)


_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that end a program wait, where they can: Python drops the exception of a handler that runs while it
    forks, and the program would go on."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_codec: Codec | None = None  # of this process, if it is a worker


def _begin(weights: str | None, device: str) -> None:
    """A worker's first act."""
    global _codec
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.SIG_DFL)  # ends it at once, without a word
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)  # a fork takes the mask along
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # the walk's, too
    _codec = _codec or Codec.load(weights, device)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, killed perhaps: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(work: Work, data: bytes) -> Result:
    assert _codec is not None
    return work(_codec, data)
