"""The pool of ``vqcodec.batch.spread`` on a Ray cluster. Needs the extra: pip install 'vqcodec[ray]'.

Ray does all the scheduling. A file is a task of one CPU (and one GPU, where the codec is on one), which Ray gives to
another process if its own dies. Files are read and written by the process that submits the tasks, and the model is sent
along: the machines of a cluster need no files, no keys and no weights, only the same vqcodec.
"""

import importlib.metadata
import logging
import os
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from bitstream.errors import ClusterError, WorkerError
from vqcodec import __version__
from vqcodec.batch import Result, Work
from vqcodec.codec import Codec

RETRIES = 3  # of a file whose worker has died


class RayPool:
    """Workers on the cluster that RAY_ADDRESS names, or else on a new one of this machine alone, with a codec in each.

    workers: how many files to work on at once; 0: as many as the cluster has CPUs, counted now. What a worker makes
    is what ``codec`` makes on a machine of the same kind with one thread. A file whose worker dies is tried RETRIES
    times more before its future raises WorkerError. Raises ClusterError; Ray takes minutes to give an address up, and
    says meanwhile on standard error what it waits for.
    """

    def __init__(self, codec: Codec, workers: int = 0) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a codec reports to nobody
        self._owns = not ray.is_initialized()
        try:
            if self._owns:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            # A standard-library function, because a cluster without vqcodec could not unpickle ours.
            version = ray.get(ray.remote(importlib.metadata.version).remote("vqcodec"))
            if version != __version__:
                raise ClusterError(f"the cluster has vqcodec {version}, this is {__version__}: make them the same")
            self.room = workers or int(ray.cluster_resources().get("CPU", 1)) + 1  # nobody waits for a file to be read
            gpus = 1 if codec.device.type == "cuda" else 0
            # max_calls: or else a process that has a GPU would end after every file.
            self._task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES, max_calls=0)(_work)
            self._model = _Model(ray.put(codec.model), codec.device.type)
        except (RayError, OSError, RuntimeError, ValueError, ImportError) as error:
            self.close()
            if isinstance(error, importlib.metadata.PackageNotFoundError):
                raise ClusterError(f"the cluster has no vqcodec: install vqcodec {__version__} there") from error
            raise ClusterError(f"no Ray cluster to work on (RAY_ADDRESS names one): {error}") from error
        except BaseException:
            self.close()
            raise

    def submit(self, work: Work, data: bytes) -> Future[Result]:
        made: Future[Result] = Future()
        self._task.remote(self._model, work, data).future().add_done_callback(lambda done: _hand_on(done, made))
        return made

    def restart(self) -> None:
        raise AssertionError("Ray starts new processes itself")

    def close(self, now: bool = True) -> None:
        if self._owns:
            ray.shutdown()


def _hand_on(done: "Future[Result]", made: "Future[Result]") -> None:
    """The result, or the worker's own error instead of Ray's, whose text is a traceback."""
    error = done.exception()
    if error is None:
        made.set_result(done.result())
    elif isinstance(error, RayTaskError):
        error.cause.__cause__ = error
        made.set_exception(error.cause)
    else:
        died = isinstance(error, (WorkerCrashedError, OutOfMemoryError))
        failed = WorkerError("every process that worked on it died: give it more memory" if died else f"Ray: {error}")
        failed.__cause__ = error
        made.set_exception(failed)


class _Model(NamedTuple):
    """What a worker needs for a codec. ref: of the model; inside of this tuple it is not fetched for every task."""

    ref: Any
    device: str


@lru_cache(maxsize=1)
def _codec(model: _Model) -> Codec:
    """Of this process, a worker, for all its files."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # the walk's, too
    return Codec(ray.get(model.ref), model.device)


def _work(model: _Model, work: Work, data: bytes) -> Result:
    return work(_codec(model), data)
