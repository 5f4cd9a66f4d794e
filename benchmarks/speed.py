"""Time and memory: encode and decode by stage, and the whole command line."""

import functools
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

import vqcodec.codec
from benchmarks import corpus, machine
from benchmarks.corpus import Bytes
from bitstream import container, rans
from bitstream.errors import ImageError
from vqcodec import Codec

DEFAULT_SIZES = ((768, 512), (4000, 3000))

# The functions that vqcodec/codec.py calls for each stage, as (owner, name).
STAGES: dict[str, list[tuple[Any, str]]] = {
    "networks": [(vqcodec.codec, "run_tiled")],
    "wavefront": [(vqcodec.codec, "fill_grid")],
    "rANS": [
        *((rans.Encoder, name) for name in ("push", "finish")),
        *((rans.Decoder, name) for name in ("__init__", "pop", "finish")),
    ],
    "container": [
        *((container, name) for name in ("pack", "unpack", "checksum", "verify")),
        *((vqcodec.codec, name) for name in ("_picture", "to_pil", "pack_alpha", "unpack_alpha")),
    ],
}
Timed = Callable[..., Any]


class Stopwatch:
    """Seconds by stage. Time in a stage that another one calls counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []  # for each running stage, the seconds of those it has called

    def wrap(self, stage: str, function: Timed) -> Timed:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[stage] += spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        return timed

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as patches:
            for stage, places in STAGES.items():
                for owner, name in places:
                    timed = self.wrap(stage, getattr(owner, name))
                    patches.enter_context(mock.patch.object(owner, name, timed))
            yield


def by_stage(function: Callable[[], Any], repeat: int) -> dict[str, float]:
    """Median seconds of each stage, of the rest and of all, over `repeat` calls after one to warm up."""
    laps = []
    for _ in range(1 + repeat):
        watch = Stopwatch()
        with watch.installed():
            watch.wrap("other", function)()
        laps.append({**watch.seconds, "total": sum(watch.seconds.values())})
    return {stage: median(lap.get(stage, 0.0) for lap in laps[1:]) for stage in (*STAGES, "other", "total")}


def run(
    output: Path,
    *,
    weights: Path | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    threads: Sequence[int] = (1,),
    repeat: int = 3,
    quality: float | None = None,
    image: Path | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure, and save OUTPUT.json. sizes: (width, height); the image's own, or DEFAULT_SIZES, if empty."""
    codec = Codec.load(weights, device="cpu")
    if quality is None:
        quality = min(vqcodec.DEFAULT_QUALITY, codec.model.config.levels)
    source = None if image is None else _source(image)
    if source is not None:
        sizes = sizes or [(source.shape[1], source.shape[0])]
    result: dict[str, Any] = {
        "benchmark": "speed",
        "machine": machine.describe(codec, weights),
        "image": "synthetic, 1/f noise" if image is None else f"{image.name}, mirrored or cropped to size",
        "quality": quality,
        "repeat": repeat,
        "model_load_seconds": _seconds(functools.partial(Codec.load, weights, device="cpu"), repeat),
        "rows": [],
    }
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        for width, height in sizes or DEFAULT_SIZES:
            tell(f"{width}x{height}")
            pixels = pink_noise(width, height) if source is None else fitted(source, width, height)
            data = codec.encode(pixels, quality)
            files = Path(folder, "image.png"), Path(folder, "image.vq2")
            Image.fromarray(pixels).save(files[0], compress_level=1)
            files[1].write_bytes(data)
            for count in threads:
                peaks = [_in_new_process(peak_memory, file, weights, quality, count) for file in files]
                torch.set_num_threads(count)
                seconds = (
                    by_stage(functools.partial(codec.encode, pixels, quality), repeat),
                    by_stage(functools.partial(codec.decode, data), repeat),
                )
                for direction, stages, peak in zip(("encode", "decode"), seconds, peaks, strict=True):
                    result["rows"].append(
                        {
                            "direction": direction,
                            "width": width,
                            "height": height,
                            "threads": count,
                            "file_bytes": len(data),
                            "seconds": stages,
                            "megapixels_per_second": width * height / 1e6 / stages["total"],
                            "peak_memory_bytes": peak,
                        }
                    )
        torch.set_num_threads(before)
        commands = (["info", str(files[1])], ["--help"])
        result["process_seconds"] = {command[0]: _command_seconds(command, repeat) for command in commands}
    corpus.save_json(output, result)
    return result


# --- images ---


def pink_noise(width: int, height: int, seed: int = 0) -> Bytes:
    """Noise with the 1/f spectrum of photographs, mostly grey: octaves of random grids, enlarged."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    step = 2 ** max(0, max(width, height).bit_length() - 2)
    while step:
        grid = rng.standard_normal((-(-height // step), -(-width // step), 4), np.float32)
        grid = step**0.9 * (grid[..., :1] + 0.3 * grid[..., 1:])  # luma, and a little colour
        for channel in range(3):
            octave = Image.fromarray(grid[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(octave)
        step //= 2
    return np.clip(128 + 50 * (total - total.mean()) / total.std(), 0, 255).astype(np.uint8)


def _source(image: Path) -> Bytes:
    pixels = corpus.load(image)
    if isinstance(pixels, str):
        raise ImageError(f"{image}: {pixels}")
    return pixels


def fitted(pixels: Bytes, width: int, height: int) -> Bytes:
    """Cropped, or continued by mirror images."""
    pixels = pixels[:height, :width]
    missing = (0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0)
    return np.pad(pixels, missing, "symmetric")


# --- processes ---


def peak_memory(file: Path, weights: Path | None, quality: float, threads: int) -> int:
    """Peak resident bytes of this process, after encoding an image file or decoding a .vq2 file."""
    torch.set_num_threads(threads)
    codec = Codec.load(weights, device="cpu")
    if file.suffix == ".vq2":
        codec.decode(file.read_bytes())
    else:
        codec.encode(Image.open(file), quality)
    # ru_maxrss starts at what the process that started this one has used, on Linux; VmHWM does not.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _in_new_process(function: Callable[..., int], *arguments: Any) -> int:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _seconds(function: Callable[[], Any], repeat: int) -> float:
    """Median over `repeat` calls after one to warm up."""
    laps = []
    for _ in range(1 + repeat):
        start = time.perf_counter()
        function()
        laps.append(time.perf_counter() - start)
    return median(laps[1:])


def _command_seconds(arguments: list[str], repeat: int) -> float | str:
    """Median seconds of `python -m vqcodec ...`, start of Python included; or what it says when it fails."""
    command = [sys.executable, "-m", "vqcodec", *arguments]
    call = functools.partial(subprocess.run, command, cwd=machine.ROOT, capture_output=True, text=True, check=True)
    try:
        return _seconds(call, repeat)
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]


# --- telling ---


def table(result: dict[str, Any]) -> str:
    stages = (*STAGES, "other", "total")
    lines = [
        machine.title(result["machine"]),
        f"{result['image']}; quality {result['quality']:g}; seconds, median of {result['repeat']}",
        "",
        f"{'threads':>19}        {' '.join(f'{stage:>9}' for stage in stages)}   Mpx/s   peak MB",
    ]
    for row in result["rows"]:
        size = f"{row['width']}x{row['height']}"
        seconds = " ".join(f"{row['seconds'][stage]:9.3f}" for stage in stages)
        rates = f"{row['megapixels_per_second']:7.3f} {row['peak_memory_bytes'] / 1e6:9.0f}"
        lines.append(f"{size:>11} {row['threads']:>7} {row['direction']:>6} {seconds} {rates}")
    lines += ["", f"loading the model {result['model_load_seconds']:.3f} s"]
    for name, seconds in result["process_seconds"].items():
        text = f"{seconds:.3f} s" if isinstance(seconds, float) else seconds
        lines.append(f"python -m vqcodec {name}: {text}")
    return "\n".join(lines)
