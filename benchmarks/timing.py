"""Time and memory of a call, and of the rivals. Without torch: it is no part of what a rival takes."""

import functools
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks import codecs

ROOT = Path(__file__).parents[1]
LONG = 20.0  # seconds: a call that takes longer is measured once, without a call before it to warm up

COMPRESSAI = ("bmshj2018-hyperprior", "mbt2018", "cheng2020-anchor")
COMPRESSAI_PIXELS = 2_000_000  # it computes a picture as a whole, in gigabytes per megapixel


class Cost(NamedTuple):
    seconds: float
    peak_bytes: int
    file_bytes: int


def medians(lap: Callable[[], dict[str, float]], repeat: int) -> dict[str, float]:
    """Median of each time that `lap` returns, over `repeat` laps after one to warm up."""
    first = lap()
    laps = [first] if first["total"] > LONG else [lap() for _ in range(repeat)]
    return {name: median(lap.get(name, 0.0) for lap in laps) for name in first}


def seconds(function: Callable[[], Any], repeat: int) -> float:
    def lap() -> dict[str, float]:
        start = time.perf_counter()
        function()
        return {"total": time.perf_counter() - start}

    return medians(lap, repeat)["total"]


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    # ru_maxrss starts at what the process that started this one has used, on Linux; VmHWM does not.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def rival_costs(name: str, image: Path, setting: float, repeat: int) -> dict[str, Cost]:
    """A codec of Pillow, on one thread: each direction in a process of its own."""
    file = image.with_suffix("." + name)
    found = {"encode": in_new_process(_encode_cost, name, image, file, setting, repeat)}
    found["decode"] = in_new_process(_decode_cost, name, file, repeat)
    return found


def _encode_cost(name: str, image: Path, file: Path, setting: float, repeat: int) -> Cost:
    rival, pixels = codecs.RIVALS[name](), np.array(Image.open(image))
    coded: list[bytes] = []
    spent = seconds(lambda: coded.append(rival.encode(pixels, setting)), repeat)
    file.write_bytes(coded[0])
    return Cost(spent, peak_bytes(), len(coded[0]))


def _decode_cost(name: str, file: Path, repeat: int) -> Cost:
    rival, data = codecs.RIVALS[name](), file.read_bytes()
    return Cost(seconds(functools.partial(rival.decode, data), repeat), peak_bytes(), len(data))


def compressai_costs(python: Path, model: str, image: Path, threads: int, repeat: int) -> dict[str, Cost]:
    """A model of CompressAI, in the environment that `python` is of. Raises CompressAIError."""
    arguments = [model, str(image), str(threads), str(repeat)]
    command = [str(python.absolute()), "-m", "benchmarks.compressai_worker", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise CompressAIError((ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1])
    return {direction: Cost(*cost) for direction, cost in json.loads(ran.stdout.splitlines()[-1]).items()}


def compressai_version(python: Path) -> str:
    """Raises CompressAIError if there is none."""
    code = "import compressai, torch; print(f'compressai {compressai.__version__}, torch {torch.__version__}')"
    try:
        ran = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except OSError as error:
        raise CompressAIError(str(error)) from None
    except subprocess.CalledProcessError as error:
        raise CompressAIError((error.stderr.strip().splitlines() or ["it cannot be imported"])[-1]) from None
    return ran.stdout.splitlines()[-1]


class CompressAIError(Exception):
    """CompressAI does not run."""
