"""The command line: vqcodec encode, decode, info and train. The only file that prints or exits.

What is slow to import (torch, numpy, Pillow, rich) is imported by the command that needs it.
"""

import contextlib
import errno
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import click

from bitstream.errors import VqcodecError
from vqcodec import DEFAULT_QUALITY, __version__
from vqcodec.files import write_atomically

if TYPE_CHECKING:
    from vqcodec.codec import Codec
    from vqcodec.training.trainer import Stage

# --- errors: one line each ---


class Failure(click.ClickException):
    """An error as the user gets to see it: one line, and exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        _complain(self.message)


def _complain(text: str) -> None:
    click.echo("vqcodec: " + _printable(" ".join(text.split())), err=True)


def _printable(text: str) -> str:
    """The text without what file names may hold besides letters, such as commands to the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


_REASONS = {
    errno.EACCES: "permission denied: choose another place, or change the permissions",
    errno.EEXIST: "exists already: use -f to replace it",
    errno.EISDIR: "is a folder: name a file",
    errno.ENOENT: "no such file or folder: check the name",
    errno.ENOSPC: "the disk is full: make room, or choose another place",
}


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


@contextlib.contextmanager
def _blame(name: str = "") -> Iterator[None]:
    """Turns what can go wrong with the file `name` into a Failure; a bug passes, and keeps its traceback."""
    prefix = f"{name}: " if name else ""
    try:
        yield
    except (VqcodecError, FloatingPointError) as error:  # the latter: a training run has diverged
        raise Failure(f"{prefix}{error}") from error
    except OSError as error:
        if error.errno is None:  # not the system's, but a library's that says it all
            raise Failure(str(error)) from error
        prefix = f"{os.fsdecode(error.filename)}: " if error.filename else prefix
        raise Failure(prefix + _reason(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "tried to allocate" not in str(error).lower():
            raise  # those are torch's words
        raise Failure(f"{prefix}out of memory: free some, or give it less to do at once") from error


class _Program(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _complain("interrupted")
            raise click.exceptions.Exit(130) from None
        except OSError as error:  # standard output's: every other file has been blamed by name
            if error.errno is None:
                raise
            with contextlib.suppress(OSError):  # Python would flush it on exit, and complain again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # the reader has seen enough
                raise click.exceptions.Exit(1) from None
            raise Failure(f"standard output: {_reason(error)}") from error


# --- from inputs to outputs, "-" being the standard streams ---


def _plan(sources: Sequence[str], out: str | None, suffix: str, force: bool) -> list[tuple[str, str]]:
    """(source, target) of all jobs, if nothing speaks against any. Makes the folder `out` if it has to."""
    folder = out is not None and (out.endswith(("/", os.sep)) or os.path.isdir(out))
    if out is not None and not folder and len(sources) > 1:
        raise click.UsageError(f"several inputs need a folder: end OUT in a slash to have it made ({out}/)")
    if "-" in sources and (folder or len(sources) > 1):
        raise click.UsageError("- (standard input) has no name: give it alone, with -o FILE or -o -")
    if out is None:
        targets = [s if s == "-" else _renamed(s, suffix) for s in sources]
    elif folder:
        targets = [os.path.join(out, _renamed(os.path.basename(s), suffix)) for s in sources]
    else:
        targets = ["-" if out == "/dev/stdout" else out]
    jobs = list(zip(sources, targets, strict=True))
    _refuse_clashes(jobs, force)
    if out is not None:
        parent = os.path.dirname(os.path.abspath(out))
        if not os.path.isdir(parent):
            raise Failure(f"{out}: there is no folder {parent}: create it first")
        if folder and not os.path.isdir(out):
            if os.path.isfile(os.path.abspath(out)):
                raise Failure(f"{out}: is a file, not a folder: choose another name")
            with _blame(out):
                os.mkdir(out)
    return jobs


def _renamed(path: str, suffix: str) -> str:
    return os.path.splitext(path)[0] + suffix


def _refuse_clashes(jobs: Sequence[tuple[str, str]], force: bool) -> None:
    """Failure if an output would take the place of a file, unless that is what `force` is for."""
    inputs = {_identity(source) for source, _ in jobs}
    source_of: dict[Any, str] = {}
    for source, target in jobs:
        if target == "-":
            if sys.stdout.isatty():
                raise Failure("standard output: is a terminal: redirect it, or name a file with -o")
            continue
        key = _identity(target)
        if key in inputs:
            raise Failure(f"{target}: is an input: choose another name with -o")
        if key in source_of:
            raise Failure(f"{target}: would hold {source_of[key]} and {source}: do one at a time, with -o")
        if os.path.isfile(target) and not force:
            raise Failure(f"{target}: {_REASONS[errno.EEXIST]}")
        source_of[key] = source


def _identity(path: str) -> Any:
    """Equal for two names of one file."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.normcase(os.path.realpath(path))
    return found.st_dev, found.st_ino


def _each(work: Callable[..., None], jobs: Iterable[Sequence[str]]) -> None:
    """Does all jobs, even if some of them fail."""
    failed = False
    for job in jobs:
        try:
            work(*job)
        except Failure as failure:
            failure.show()
            failed = True
    if failed:
        raise click.exceptions.Exit(1)


def _title(source: str) -> str:
    return "standard input" if source == "-" else source


def _open(source: str) -> BinaryIO:
    return cast(BinaryIO, click.open_file(source, "rb"))


def _write(target: str, data: bytes | memoryview, force: bool) -> None:
    if target == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        with _blame(target), write_atomically(target, force) as file:
            file.write(data)


def _load(weights: str | None, device: str) -> "Codec":
    from vqcodec.codec import Codec

    with _blame():
        return Codec.load(weights, device)


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[float], None] | None]:
    """A progress function that shows a bar: on a terminal, if the job takes more than a second."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, started = bar.add_task(_printable(name), total=1.0), time.monotonic()
    with contextlib.ExitStack() as shown:

        def update(done: float) -> None:
            if not bar.live.is_started and time.monotonic() - started > 1:
                shown.enter_context(bar)
            bar.update(task, completed=done)

        yield update


def _warn(name: str, notes: Iterable[str]) -> None:
    for note in notes:
        _complain(f"{name}: warning: {note}")


def _summary(target: str, shape: Sequence[int], size: int, started: float) -> None:
    (height, width), seconds = shape[:2], time.monotonic() - started
    facts = f"{width} x {height}  {size:,} bytes  {8 * size / (width * height):.3f} bpp  {seconds:.1f} s"
    click.echo(f"{_printable(target)}  {facts}", err=target == "-")


# --- commands ---

_FILES = """\
OUT is a file, or a folder if it is one already or ends in a slash: then it is created if need be, but not
its parents. Several inputs need a folder, or no -o at all: each output is then written beside its input. "-"
stands for standard input and output. An output that exists, that is an input, or that two inputs would share
is refused before any work."""

_EXIT_CODES = """\b
Exit codes:
  0    everything was done
  1    something failed: a line on standard error says what, all else was done
  2    bad usage
  130  interrupted by Ctrl-C
No output is ever left half-written."""

_inputs = click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=click.Path())
_out = click.option("-o", "--output", "out", metavar="OUT", type=click.Path(), help="Where to, see below.")
_force = click.option("-f", "--force", is_flag=True, help="Replace outputs that exist.")
_device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where the networks run; auto is a GPU if there is one.",
)
_weights = click.option(
    "--weights", metavar="FILE", type=click.Path(), help="A model to use instead of the installed one."
)
_count = click.IntRange(min=1)
_max_pixels = click.option(
    "--max-pixels",
    metavar="N",
    type=_count,
    default=2**28,
    help="Refuse larger pictures, before they take any memory.",
)


@click.group(
    cls=_Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog=_EXIT_CODES,
)
@click.version_option(__version__, prog_name="vqcodec")
def main() -> None:
    """Compress pictures into small .vq2 files that any machine decodes.

    \b
    Examples:
      vqcodec encode photo.png      writes photo.vq2
      vqcodec decode photo.vq2      writes photo.png
      vqcodec info photo.vq2        shows what is in the file
      vqcodec encode --help         explains one command

    The model is part of the installation: nothing is downloaded.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # Pillow's, of what becomes an error or a warning of ours


@main.command(epilog=f"{_FILES}\n\n{_EXIT_CODES}")
@_inputs
@_out
@click.option(
    "-q",
    "--quality",
    metavar="Q",
    type=click.FloatRange(1, 8),
    default=DEFAULT_QUALITY,
    help="From 1, the smallest file, to 8, the best picture; fractions are fine.",
)
@click.option("--strip", is_flag=True, help="Leave ICC profile, EXIF and XMP out; looks stay the same.")
@_force
@_device
@_weights
@_max_pixels
def encode(
    inputs: tuple[str, ...],
    out: str | None,
    quality: float,
    strip: bool,
    force: bool,
    device: str,
    weights: str | None,
    max_pixels: int,
) -> None:
    """Compress pictures to .vq2 files.

    \b
    Examples:
      vqcodec encode photo.png                  writes photo.vq2 beside it
      vqcodec encode -q 3.5 photo.png -o small.vq2
      vqcodec encode *.jpg -o compressed/       a file for each, in a folder
      vqcodec encode - -o - < photo.png > photo.vq2

    INPUT may have any format that Pillow reads. Size, grey or colour, transparency, ICC profile, EXIF and XMP
    are kept. A warning tells what is changed or dropped, such as 16-bit samples, CMYK and further frames.
    """
    jobs = _plan(inputs, out, ".vq2", force)
    codec = _load(weights, device)
    try:
        codec.level_for(quality)
    except ValueError as error:  # other weights may have fewer levels
        raise click.BadParameter(str(error), param_hint="--quality") from None
    from vqcodec.image import read, stripped

    def work(source: str, target: str) -> None:
        started = time.monotonic()
        with _blame(_title(source)), _bar(source) as progress:
            with _open(source) as file:
                picture = read(file, max_pixels)
            if strip:
                picture = stripped(picture)
            data = codec.encode(picture, quality, progress=progress)
        _write(target, data, force)
        _warn(_title(source), picture.notes)
        _summary(target, picture.pixels.shape, len(data), started)

    _each(work, jobs)


@main.command(epilog=f"{_FILES}\n\n{_EXIT_CODES}")
@_inputs
@_out
@_force
@_device
@_weights
@_max_pixels
def decode(
    inputs: tuple[str, ...], out: str | None, force: bool, device: str, weights: str | None, max_pixels: int
) -> None:
    """Turn .vq2 files back into pictures.

    \b
    Examples:
      vqcodec decode photo.vq2                  writes photo.png beside it
      vqcodec decode photo.vq2 -o photo.jpg     or .webp, .avif, .tiff, .bmp, .ppm
      vqcodec decode *.vq2 -o pictures/         a PNG file for each, in a folder
      vqcodec decode - -o - < photo.vq2 > photo.png

    The format is the one that the name of OUT ends in, or else PNG. A warning tells what it cannot hold. A
    damaged file is refused: it never becomes a wrong picture.
    """
    jobs = _plan(inputs, out, ".png", force)
    format = os.path.splitext(jobs[0][1])[1][1:]  # several targets are all .png
    from PIL import Image

    from vqcodec.image import from_pil, save

    with _blame(jobs[0][1]):  # a format that cannot be written is better refused before the work
        save(from_pil(Image.new("RGB", (1, 1))), BytesIO(), format)
    codec = _load(weights, device)
    from vqcodec.codec import decode_picture

    def work(source: str, target: str) -> None:
        started = time.monotonic()
        with _blame(_title(source)), _bar(source) as progress:
            with _open(source) as file:
                data = file.read()
            picture = decode_picture(codec, data, max_pixels, progress)
        encoded = BytesIO()
        with _blame(target):
            notes = save(picture, encoded, format)
        _write(target, encoded.getbuffer(), force)
        _warn(target, notes)
        _summary(target, picture.pixels.shape, encoded.tell(), started)

    _each(work, jobs)


@main.command(epilog=_EXIT_CODES)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="One JSON object per file, on a line of its own.")
def info(files: tuple[str, ...], as_json: bool) -> None:
    """Show what is in .vq2 files, without decoding them.

    \b
    Examples:
      vqcodec info photo.vq2
      vqcodec info --json *.vq2

    \b
    Fields of the JSON object:
      file            name as given, "-" for standard input
      bytes           size of the file
      version         of the file format
      width, height   in pixels
      mode            GREY, RGB, GREY_ALPHA or RGBA
      level           quality level, from 1
      bpp             bits per pixel: 8 x bytes / (width x height)
      fingerprint     of the model that wrote the file, hexadecimal
      chunks          bytes of each one present: grid1 (the coarsest), grid2, ...,
                      alpha, icc, exif, xmp

    Damage to structure and metadata is noticed, damage to the picture itself only by decode.
    """

    def work(source: str) -> None:
        with _blame(_title(source)), _open(source) as file:
            facts = {"file": source, **_facts(file.read())}
        if as_json:
            click.echo(json.dumps(facts))
        else:
            _show(facts)

    _each(work, [(file,) for file in files])


def _facts(data: bytes) -> dict[str, Any]:
    from bitstream import container

    parts = container.unpack(data, max_pixels=container.MAX_SIDE**2)
    header = parts.header
    contents = {f"grid{k}": grid for k, grid in enumerate(parts.grids, start=1)}
    contents |= {name: getattr(parts, name) for name in container.OPTIONAL_CHUNKS}
    return {
        "bytes": len(data),
        "version": container.VERSION,
        "width": header.width,
        "height": header.height,
        "mode": header.colour.name,
        "level": header.level,
        "bpp": round(8 * len(data) / (header.width * header.height), 4),
        "fingerprint": header.fingerprint.hex(),
        "chunks": {name: len(content) for name, content in contents.items() if content is not None},
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_row("size", "{width} x {height} pixels, {mode}".format(**facts))
    table.add_row("quality", "level {level}".format(**facts))
    table.add_row("file", "{bytes:,} bytes, {bpp:.3f} bpp, format version {version}".format(**facts))
    table.add_row("model", facts["fingerprint"])
    for name, size in facts["chunks"].items():
        table.add_row(name, f"{size:,} bytes")
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(_printable(_title(facts["file"])), "bold"))
    console.print(table)


_path = click.Path(path_type=Path)


@main.command(epilog=_EXIT_CODES)
@click.argument("images", metavar="IMAGES", type=_path)
@click.option("-o", "--output", metavar="RUN", type=_path, required=True, help="Folder to write.")
@click.option(
    "--stage",
    type=click.Choice(["vqvae", "prior", "joint"]),
    default="vqvae",
    help="Everything from scratch, only the priors, or everything from trained weights.",
)
@click.option(
    "--config",
    type=click.Choice(["vqcodec", "vqvae2-paper", "vqvae2-paper-large"]),
    help="Layout of the model.  [default: vqcodec, or that of --start]",
)
@click.option("--start", metavar="FILE", type=_path, help="Weights to start from.")
@click.option("--steps", metavar="N", type=_count, help="Length of the run in steps...")
@click.option("--hours", metavar="H", type=click.FloatRange(0, min_open=True), help="... or in hours.")
@click.option("--batch", metavar="N", type=_count, default=8, help="Crops per step and process.")
@click.option("--crop", metavar="N", type=_count, default=256, help="Side of a crop in pixels.")
@click.option("--seed", metavar="N", type=int, default=0, help="Of weights and crops.")
def train(
    images: Path,
    output: Path,
    stage: "Stage",
    config: str | None,
    start: Path | None,
    steps: int | None,
    hours: float | None,
    batch: int,
    crop: int,
    seed: int,
) -> None:
    """Train a model on a folder of pictures.

    \b
    Examples:
      vqcodec train pictures/ -o runs/first --hours 10
      vqcodec train pictures/ -o runs/second --steps 20000 --stage joint \\
          --start runs/first/model.safetensors
      torchrun --nproc-per-node 4 -m vqcodec -- train ...

    RUN gets log.jsonl, a checkpoint every few minutes, and at the end model.safetensors, which encode and
    decode take as --weights. To resume a run, give the same command again. The pictures are kept uncompressed
    in a folder "cache" beside RUN.
    """
    if (steps is None) == (hours is None):
        raise click.UsageError("say how long: either --steps or --hours")
    if start and config:
        raise click.UsageError("--start brings its own layout: leave --config out")
    if stage != "vqvae" and not start:
        raise click.UsageError(f"stage {stage} needs trained weights: give them with --start")
    from vqcodec.quality import CONFIGS
    from vqcodec.training import trainer
    from vqcodec.training.data import find_images
    from vqcodec.weights import load_weights

    first = os.environ.get("RANK", "0") == "0"  # under torchrun one of many
    with _blame(str(images)):
        find_images(images)  # before RUN is made
    with _blame():
        layout = load_weights(start).config if start else CONFIGS[config or "vqcodec"]
    with _blame(str(output)):
        run = trainer.Run(layout, images, output, stage, steps, hours, batch, crop, seed, start)
        trainer.train(run, click.echo if first else lambda _: None)
    if first:
        click.echo(output / "model.safetensors")
