"""Time and memory: encode and decode by stage, the rivals beside it, and the whole command line."""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

import vqcodec.codec
from benchmarks import codecs, corpus, machine, timing
from benchmarks.corpus import Bytes
from bitstream import container, rans, walk
from bitstream.errors import ImageError
from vqcodec import Codec
from vqcodec.config import DEFAULT_QUALITY, DEFAULT_TUNE, Tune
from vqcodec.image import read

DEFAULT_SIZES = ((768, 512), (4000, 3000), (8688, 5792))
DEFAULT_RIVALS = ("jpeg", "webp", "avif-420-psnr", "jxl", "jpeg2000")

# The functions of each stage, as (owner, name).
STAGES: dict[str, list[tuple[Any, str]]] = {
    "networks": [(vqcodec.Codec, "tiled"), (vqcodec.codec, "_decode_pixels")],
    "fit": [(vqcodec.codec.PictureEncoder, "_fitted")],
    "walk": [(walk, "_fill")],  # with reading words
    "rANS": [*((rans.Encoder, name) for name in ("push", "finish")), (rans, "split")],
    "container": [
        *((container, name) for name in ("pack", "unpack", "checksum", "verify")),
        *((vqcodec.codec, name) for name in ("told", "to_pil", "pack_alpha", "unpack_alpha")),
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
    """Median seconds of each stage, of the rest and of all."""

    def lap() -> dict[str, float]:
        watch = Stopwatch()
        with watch.installed():
            watch.wrap("other", function)()
        spent = {stage: watch.seconds[stage] for stage in (*STAGES, "other")}
        return {**spent, "total": sum(spent.values())}

    return timing.medians(lap, repeat)


def run(
    output: Path,
    *,
    weights: Path | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    threads: Sequence[int] = (1,),
    devices: Sequence[str] = (),
    rivals: Sequence[str] = DEFAULT_RIVALS,
    compressai: Path | None = None,
    repeat: int = 3,
    quality: float | None = None,
    tune: Tune = DEFAULT_TUNE,
    image: Path | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure and save OUTPUT.json, OUTPUT.png and OUTPUT.svg.

    quality: vqcodec's default, or the model's best, if None. image: instead of synthetic ones. sizes: the image's own,
    or DEFAULT_SIZES, if empty. devices: all there are, if empty. compressai: the Python of an environment with it.
    """
    devices = devices or ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    loaded = {device: Codec.load(weights, device=device) for device in devices}
    codec = loaded[devices[0]]
    if quality is None:
        quality = min(DEFAULT_QUALITY, codec.model.config.levels)
    source = None if image is None else _source(image)
    if source is not None:
        sizes = sizes or [(source.shape[1], source.shape[0])]
    found, skipped = codecs.available(rivals)
    what = {rival.name: rival.what for rival in found}
    models = _compressai(compressai, what, skipped)
    result: dict[str, Any] = {
        "benchmark": "speed",
        "machine": machine.describe(codec, weights),
        "image": "synthetic, 1/f noise" if image is None else f"{image.name}, mirrored or cropped to size",
        "quality": quality,
        "tune": tune,
        "repeat": repeat,
        "long_seconds": timing.LONG,
        "codecs": what,
        "skipped": skipped,
        "model_load_seconds": timing.seconds(functools.partial(Codec.load, weights, device="cpu"), repeat),
        "rows": [],
    }
    settings: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for width, height in sizes or DEFAULT_SIZES:
            pixels = pink_noise(width, height) if source is None else fitted(source, width, height)
            files = Path(folder, "image.png"), Path(folder, "image.vq2")
            Image.fromarray(pixels).save(files[0], compress_level=1)
            files[1].write_bytes(data := codec.encode(pixels, quality, tune=tune))
            rows = []
            for device, count in ((device, count) for device in devices for count in threads):
                tell(f"{width}x{height}: vq2, {device}, threads {count}")
                rows += _rows(loaded[device], files, weights, quality, tune, count, repeat)
            for rival in found:
                tell(f"{width}x{height}: {rival.name}")
                if rival.name not in settings:
                    settings[rival.name], _ = codecs.largest_within(rival, pixels, len(data))
                costs = timing.rival_costs(rival.name, files[0], settings[rival.name], repeat)
                rows += _rival_rows(rival.name, 1, costs)
            for model, count in ((model, count) for model in models for count in threads):
                if compressai is None or width * height > timing.COMPRESSAI_PIXELS:
                    skipped[f"compressai {width}x{height}"] = f"over {timing.COMPRESSAI_PIXELS / 1e6:g} megapixels"
                    continue
                tell(f"{width}x{height}: CompressAI, {model}, threads {count}")
                try:
                    costs = timing.compressai_costs(compressai, model, files[0], count, repeat)
                except timing.CompressAIError as error:
                    skipped[f"compressai {model} {width}x{height}"] = str(error)
                else:
                    rows += _rival_rows(f"compressai {model}", count, costs)
            for row in rows:
                megapixels = width * height / 1e6
                speed = {"megapixels_per_second": megapixels / row["seconds"]["total"]}
                result["rows"].append({"width": width, "height": height, **row, **speed})
            if "process_seconds" not in result:
                tell(f"{width}x{height}: whole processes")
                result["process_seconds"] = _process_seconds(files, weights, tune, repeat)
            corpus.save_json(output, result)
    result["settings"] = settings
    corpus.save_json(output, result)
    plot(output, result)
    return result


def _compressai(python: Path | None, what: dict[str, str], skipped: dict[str, str]) -> tuple[str, ...]:
    """The models to measure; notes their version, or why there are none."""
    if python is None:
        skipped["compressai"] = "no environment with it was given (--compressai PYTHON)"
        return ()
    try:
        version = timing.compressai_version(python)
    except timing.CompressAIError as error:
        skipped["compressai"] = str(error)
        return ()
    what |= {f"compressai {model}": f"{version}, random weights" for model in timing.COMPRESSAI}
    return timing.COMPRESSAI


def _rows(
    codec: Codec, files: tuple[Path, Path], weights: Path | None, quality: float, tune: Tune, threads: int, repeat: int
) -> list[dict[str, Any]]:
    """Encoding and decoding with vq2; files: the image as PNG and as .vq2."""
    device = codec.device.type
    peaks = [timing.in_new_process(peak_memory, file, weights, device, quality, tune, threads) for file in files]
    pixels, data = np.array(Image.open(files[0])), files[1].read_bytes()
    with _threads(threads):
        stages = (
            by_stage(functools.partial(codec.encode, pixels, quality, tune=tune), repeat),
            by_stage(functools.partial(codec.decode, data), repeat),
        )
    decoded, copy = codec.decode(data), files[1].with_suffix(".copy")
    file_seconds = (
        {
            "load": timing.seconds(functools.partial(read, files[0]), repeat),
            "save": timing.seconds(functools.partial(copy.write_bytes, data), repeat),
        },
        {
            "load": timing.seconds(files[1].read_bytes, repeat),
            "save": timing.seconds(functools.partial(decoded.save, copy, "PNG"), repeat),
        },
    )
    return [
        {
            "codec": "vq2",
            "direction": direction,
            "device": device,
            "threads": threads,
            "file_bytes": len(data),
            "seconds": stages[k],
            "file_seconds": file_seconds[k],
            "peak_memory_bytes": peaks[k],
        }
        for k, direction in enumerate(("encode", "decode"))
    ]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """At most so many for networks and walk."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with mock.patch.dict(os.environ, OMP_NUM_THREADS=str(count)):
            yield
    finally:
        torch.set_num_threads(before)


def _rival_rows(name: str, threads: int, costs: dict[str, timing.Cost]) -> list[dict[str, Any]]:
    return [
        {
            "codec": name,
            "direction": direction,
            "device": "cpu",
            "threads": threads,
            "file_bytes": cost.file_bytes,
            "seconds": {"total": cost.seconds},
            "peak_memory_bytes": cost.peak_bytes,
        }
        for direction, cost in costs.items()
    ]


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


def peak_memory(file: Path, weights: Path | None, device: str, quality: float, tune: Tune, threads: int) -> int:
    """Peak resident bytes of this process, after encoding an image file or decoding a .vq2 file."""
    codec = Codec.load(weights, device=device)
    with _threads(threads):
        if file.suffix == ".vq2":
            codec.decode(file.read_bytes())
        else:
            codec.encode(Image.open(file), quality, tune=tune)
    return timing.peak_bytes()


def _process_seconds(files: tuple[Path, Path], weights: Path | None, tune: Tune, repeat: int) -> dict[str, float | str]:
    """Of each command; files: the image as PNG and as .vq2."""
    given = ["--weights", str(weights)] if weights else []
    image, coded = files
    commands = (
        ["encode", str(image), "--tune", tune, "-f", "-o", str(coded.with_suffix(".copy.vq2")), *given],
        ["decode", str(coded), "-f", "-o", str(image.with_suffix(".copy.png")), *given],
        ["info", str(coded)],
        ["--help"],
    )
    return {command[0]: _command_seconds(command, repeat) for command in commands}


def _command_seconds(arguments: list[str], repeat: int) -> float | str:
    """Median seconds of `python -m vqcodec ...`, start of Python included; or what it says when it fails."""
    command = [sys.executable, "-m", "vqcodec", *arguments]
    # As where it is installed: with its bytecode, which the first run writes.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    call = functools.partial(
        subprocess.run, command, cwd=machine.ROOT, env=kept, capture_output=True, text=True, check=True
    )
    try:
        return timing.seconds(call, repeat)
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]


# --- telling ---


def table(result: dict[str, Any]) -> str:
    stages = (*STAGES, "other", "total")
    lines = [
        machine.title(result["machine"]),
        about(result),
        *(f"skipped {name}: {reason}" for name, reason in result["skipped"].items()),
        "",
        f"vq2 {'threads':>15}          {' '.join(f'{stage:>9}' for stage in (*stages, 'load', 'save'))}",
    ]
    for row in result["rows"]:
        if row["codec"] == "vq2":
            spent = {**row["seconds"], **row["file_seconds"]}
            numbers = " ".join(f"{spent[stage]:9.3f}" for stage in (*stages, "load", "save"))
            where = f"{_size(row):>11} {row['device']:>4} {row['threads']} {row['direction']:>6}"
            lines.append(f"{where:<28} {numbers}")
    head, *rows = cells(result)
    lines += ["", f"{head[0]:<46}" + " ".join(f"{cell:>10}" for cell in head[1:])]
    lines += [f"{row[0]:<46}" + " ".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    lines += ["", f"loading the model {result['model_load_seconds']:.3f} s"]
    for name, seconds in result["process_seconds"].items():
        text = f"{seconds:.3f} s" if isinstance(seconds, float) else seconds
        lines.append(f"python -m vqcodec {name}: {text}")
    return "\n".join(lines)


def about(result: dict[str, Any]) -> str:
    """What is measured, for a reader of the tables."""
    return (
        f"Image: {result['image']}; quality {result['quality']:g}, tune {result['tune']}; median of "
        f"{result['repeat']} calls, or one call if it takes more than {result['long_seconds']:g} s"
    )


def _size(row: dict[str, Any]) -> str:
    return f"{row['width']}x{row['height']}"


def _label(row: dict[str, Any]) -> str:
    device = "" if row["device"] == "cpu" else f", {row['device']}"
    return f"{row['codec']}{device}, {row['threads']} thread{'s' * (row['threads'] > 1)}"


def cells(result: dict[str, Any]) -> list[list[str]]:
    """A table with a line for both directions of a codec: seconds, megapixels per second, peak megabytes."""
    pairs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        pairs.setdefault((_size(row), _label(row)), {})[row["direction"]] = row
    lines = [["", "size", "encode s", "decode s", "enc Mpx/s", "dec Mpx/s", "enc MB", "dec MB"]]
    for (size, label), pair in pairs.items():
        both = [pair["encode"], pair["decode"]]
        lines.append(
            [
                label,
                size,
                *(f"{row['seconds']['total']:.3f}" for row in both),
                *(f"{row['megapixels_per_second']:.3g}" for row in both),
                *(f"{row['peak_memory_bytes'] / 1e6:.0f}" for row in both),
            ]
        )
    return lines


def plot(output: Path, result: dict[str, Any]) -> None:
    """Time and peak memory of decoding and encoding over megapixels, as PNG and SVG."""
    pyplot = corpus.pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained", sharex=True)
    labels = list(dict.fromkeys(_label(row) for row in result["rows"]))
    for column, direction in enumerate(("encode", "decode")):
        for label in labels:
            rows = [r for r in result["rows"] if _label(r) == label and r["direction"] == direction]
            rows.sort(key=lambda row: row["width"] * row["height"])
            x = [row["width"] * row["height"] / 1e6 for row in rows]
            style = {"marker": "o", "linewidth": 2.5 if label.startswith("vq2") else 1.2, "label": label}
            axes[0, column].loglog(x, [row["seconds"]["total"] for row in rows], **style)
            axes[1, column].loglog(x, [row["peak_memory_bytes"] / 1e6 for row in rows], **style)
        axes[0, column].set(title=direction, ylabel="seconds")
        axes[1, column].set(xlabel="megapixels", ylabel="peak memory, MB")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    corpus.save_figure(output, figure)
