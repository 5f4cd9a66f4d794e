"""The command line, `vqcodec`. The only file that prints or exits.

What is slow to import (torch, numpy, Pillow, rich) is imported by the command that needs it.
"""

import contextlib
import errno
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import click

from bitstream.errors import VqcodecError
from vqcodec import DEFAULT_EFFORT, DEFAULT_QUALITY, __version__, storage

if TYPE_CHECKING:
    from vqcodec.batch import Made, Pool, Work
    from vqcodec.codec import Codec
    from vqcodec.image import Strip
    from vqcodec.targets import Target
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


class _Job(NamedTuple):
    source: str
    target: str


class _Plan(NamedTuple):
    """What there is to do. folders: a folder is among the inputs; skipped: outputs that are there already."""

    jobs: list[_Job]
    folders: bool
    skipped: int = 0


def _plan(
    sources: Sequence[str],
    out: str | None,
    suffix: str,
    force: bool,
    resume: bool = False,
    endings: Callable[[], Collection[str]] = frozenset,
) -> _Plan:
    """The jobs, if nothing speaks against any. Makes the folder `out` if it has to.

    endings: gives those of the files to be found in folders, because it is slow to know them.
    """
    inside = {source for source in sources if _is_folder(source)}
    to_folder = out is not None and (bool(inside) or out.endswith(("/", os.sep)) or _is_folder(out))
    if force and resume:
        raise click.UsageError("--force replaces outputs that exist and --resume skips them: choose one")
    if out is not None and not to_folder and len(sources) > 1:
        raise click.UsageError(f"several inputs need a folder: end OUT in a slash to have it made ({out}/)")
    if "-" in sources and (to_folder or len(sources) > 1):
        raise click.UsageError("- (standard input) has no name: give it alone, with -o FILE or -o -")
    jobs: list[_Job] = []
    for source in sources:
        if source in inside:
            jobs += _jobs_in(source, out or source, suffix, endings())
        elif out is None:
            jobs.append(_Job(source, source if source == "-" else _renamed(source, suffix)))
        elif to_folder:
            jobs.append(_Job(source, storage.join(out, _renamed(os.path.basename(source), suffix))))
        else:
            jobs.append(_Job(source, "-" if out == "/dev/stdout" else out))
    there = _existing([job.target for job in jobs]) if resume else set()
    left = [job for job in jobs if job.target not in there]
    _refuse_clashes(left, force)
    path = storage.local(out) if out is not None else None  # folders elsewhere come with the files in them
    if path is not None:
        parent = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(parent):
            raise Failure(f"{out}: there is no folder {parent}: create it first")
        if to_folder and not os.path.isdir(path):
            if os.path.isfile(os.path.abspath(path)):
                raise Failure(f"{out}: is a file, not a folder: choose another name")
            with _blame(path):
                os.mkdir(path)
    return _Plan(left, bool(inside), len(jobs) - len(left))


def _jobs_in(folder: str, out: str, suffix: str, endings: Collection[str]) -> list[_Job]:
    from vqcodec.files import renamed

    with _blame(folder):
        paths = storage.find(folder, endings)
    if not paths:
        raise Failure(f"{folder}: no files to work on in this folder: they are known by their endings")
    names = renamed(paths, suffix)
    return [_Job(storage.join(folder, path), storage.join(out, n)) for path, n in zip(paths, names, strict=True)]


def _renamed(path: str, suffix: str) -> str:
    return os.path.splitext(path)[0] + suffix


def _refuse_clashes(jobs: Sequence[_Job], force: bool) -> None:
    """Failure if an output would take the place of a file, unless that is what `force` is for."""
    inputs = {_identity(source) for source, _ in jobs}
    source_of: dict[Any, str] = {}
    there = _existing([job.target for job in jobs])
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
        if target in there and not force:
            raise Failure(f"{target}: {_REASONS[errno.EEXIST]}")
        source_of[key] = source


def _is_folder(name: str) -> bool:
    with _blame(name):
        return storage.is_folder(name)


def _existing(names: Sequence[str]) -> set[str]:
    with _blame(names[0] if names else ""):
        return storage.existing(names)


def _identity(name: str) -> Any:
    """Equal for two names of one file."""
    path = storage.local(name)
    if path is None:
        return name
    try:
        found = os.stat(path)
    except OSError:
        return os.path.normcase(os.path.realpath(path))
    return found.st_dev, found.st_ino


def _title(source: str) -> str:
    return "standard input" if source == "-" else source


def _read(source: str) -> bytes:
    with _blame(_title(source)):
        return sys.stdin.buffer.read() if source == "-" else storage.read(source)


def _write(target: str, data: bytes | memoryview, force: bool) -> None:
    if target == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        with _blame(target):
            storage.write(target, data, force)


def _load(weights: str | None, device: str, jobs: int | None = None) -> "Codec":
    """jobs: processes that there will be."""
    from vqcodec.codec import Codec

    if (jobs or 1) > 1:
        import torch

        torch.set_num_threads(1)  # threads would not survive a fork, and every core has a job anyway
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


# --- doing it ---


@dataclass
class _Tally:
    """What has become of the files so far."""

    done: int = 0
    skipped: int = 0
    before: int = 0
    after: int = 0
    pixels: int = 0
    failed: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def facts(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.started
        return {
            "done": self.done,
            "skipped": self.skipped,
            "failed": len(self.failed),
            "bytes_before": self.before,
            "bytes_after": self.after,
            "seconds": round(seconds, 3),
            "megapixels_per_second": round(self.pixels / 1e6 / max(seconds, 1e-9), 3),
        }


def _do(
    work: "Work",
    plan: _Plan,
    codec: "Codec",
    weights: str | None,
    engine: str,
    workers: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Does all jobs, even if some of them fail; Exit(1) if any has."""
    tally = _Tally(skipped=plan.skipped)
    alone = len(plan.jobs) == 1 and not plan.skipped and not plan.folders
    # Whatever happens, no worker stays.
    outcomes = contextlib.closing(_outcomes(work, plan, codec, weights, engine, workers))
    with _whole_bar(plan.jobs) if plan.folders else contextlib.nullcontext() as advance, outcomes as each:
        for job, outcome in each:
            try:
                with _blame(_title(job.source)):
                    size, made = outcome()
                _write(job.target, made.data, force)
            except Failure as failure:
                failure.show()
                tally.failed.append(failure.message)
                facts: dict[str, Any] = {"status": "failed", "error": failure.message}
            else:
                tally.done += 1
                tally.before += size
                tally.after += len(made.data)
                tally.pixels += made.width * made.height
                _warn(_title(job.source), [*made.notes, *filter(None, [made.miss])])
                _warn(job.target, made.losses)
                facts = _facts_of(size, made)
                if not as_json and not plan.folders:
                    _summary(job.target, facts)
            if as_json:
                click.echo(json.dumps({"file": job.source, "output": job.target, **facts}))
            if advance:
                advance(job, tally)
    if as_json and not alone:
        click.echo(json.dumps({"summary": tally.facts()}))
    elif not alone:
        _table(tally)
    if tally.failed:
        raise click.exceptions.Exit(1)


def _outcomes(
    work: "Work", plan: _Plan, codec: "Codec", weights: str | None, engine: str, workers: int | None
) -> Generator[tuple[_Job, Callable[[], tuple[int, "Made"]]], None, None]:
    """Every job, with a function that returns the size of the input and what was made of it, or raises."""
    pool: Pool | None = None
    if engine == "ray" and plan.jobs:
        from vqcodec.cluster import RayPool

        with _blame():
            pool = RayPool(codec, workers or 0)
    elif engine == "local" and (workers or 1) > 1 and len(plan.jobs) > 1:
        from vqcodec.batch import LocalPool

        pool = LocalPool(codec, weights, workers or 1)
    if pool:
        from vqcodec.batch import spread

        yield from spread(work, plan.jobs, lambda job: _read(job.source), pool)
        return
    for job in plan.jobs:

        def outcome(job: _Job = job) -> tuple[int, "Made"]:
            data = _read(job.source)
            with contextlib.nullcontext() if plan.folders else _bar(job.source) as progress:
                return len(data), work(codec, data, progress)

        yield job, outcome


@contextlib.contextmanager
def _whole_bar(jobs: Sequence[_Job]) -> Iterator[Callable[[_Job, _Tally], None] | None]:
    """A function that advances a bar over all files, by the bytes of each; shown on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    sizes = {job.source: storage.size(job.source) for job in jobs}
    count = TextColumn("{task.fields[done]} of {task.fields[files]} files")
    columns = count, BarColumn(), TextColumn("{task.fields[speed]:.2f} MP/s"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(sizes.values()), done=0, files=len(jobs), speed=0.0)

        def advance(job: _Job, tally: _Tally) -> None:
            done, speed = tally.done + len(tally.failed), tally.facts()["megapixels_per_second"]
            bar.update(task, advance=sizes.get(job.source, 0), done=done, speed=speed)

        yield advance


def _facts_of(size: int, made: "Made") -> dict[str, Any]:
    facts = {
        "status": "done",
        "width": made.width,
        "height": made.height,
        "bytes_before": size,
        "bytes_after": len(made.data),
        "bpp": round(8 * len(made.data) / (made.width * made.height), 4),
        "seconds": round(made.seconds, 3),
    }
    return facts if made.quality is None else {**facts, "quality": round(made.quality, 3)}


def _summary(target: str, facts: dict[str, Any]) -> None:
    line = "{width} x {height}  {bytes_after:,} bytes  {bpp:.3f} bpp  {seconds:.1f} s".format(**facts)
    if "quality" in facts:
        line += "  quality {quality:.2f}".format(**facts)
    click.echo(f"{_printable(target)}  {line}", err=target == "-")


def _table(tally: _Tally) -> None:
    facts = tally.facts()
    click.echo("files   {done} done, {skipped} skipped, {failed} failed".format(**facts))
    click.echo("bytes   {bytes_before:,} before, {bytes_after:,} after".format(**facts))
    if tally.before and tally.after:
        small, large = sorted((tally.before, tally.after))
        click.echo(f"ratio   {large / small:.1f} : 1" if tally.after == small else f"ratio   1 : {large / small:.1f}")
    click.echo("time    {seconds:.1f} s, {megapixels_per_second:.2f} MP/s".format(**facts))
    for message in tally.failed:
        click.echo("failed  " + _printable(" ".join(message.split())))


# --- commands ---

_FILES = """\
OUT is a file, or a folder if it is one already, ends in a slash, or an INPUT is a folder: then it is created if
need be, but not its parents. Several inputs need a folder, or no -o at all: each output is then written beside
its input. "-" stands for standard input and output. An output that exists, that is an input, or that two inputs
would share is refused before any work.

A folder among the inputs stands for all files below it that have one of the right endings, hidden ones left out;
OUT gets the same tree. Files of one folder that differ in nothing but their ending keep it: a.jpg.vq2, a.png.vq2.

With --jobs N, N processes of one thread each work on N files at once and share one model where the system allows
(Linux, without a GPU).

With --engine ray, the work is done by the Ray cluster that the variable RAY_ADDRESS names, or by a new one on this
machine alone. The files go through this machine: the others need the same vqcodec and nothing else. The file of a
process that dies is done by another: it has failed when the fourth dies of it.

INPUT and OUT may be URLs that fsspec knows, such as s3://bucket/photos; a file is sent there in one piece. URLs
and --engine ray need more packages: pip install 'vqcodec[ray]'.

A file that fails is named at once, and again in the table at the end; the others are done. --json prints an object
per file instead, with file, output, status (done or failed), error or width, height, bytes_before, bytes_after, bpp,
seconds, and quality where one was searched for; last, if there is more than one file or a folder,
{"summary": {...}}."""

_EXIT_CODES = """\b
Exit codes:
  0    everything was done
  1    something failed: a line on standard error says what, all else was done
  2    bad usage
  130  interrupted by Ctrl-C
No output is ever left half-written."""

_inputs = click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=click.Path())
_out = click.option(
    "-o", "--output", "out", metavar="OUT", type=click.Path(), help="Where to, see below.  [default: beside INPUT]"
)
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
_quality = click.option(
    "-q",
    "--quality",
    metavar="Q",
    type=click.FloatRange(1, 8),
    default=DEFAULT_QUALITY,
    help="From 1, the smallest file, to 8, the best picture; fractions are fine.",
)
_count = click.IntRange(min=1)
_resume = click.option("--resume", is_flag=True, help="Skip inputs whose output exists.")
_jobs = click.option(
    "-j",
    "--jobs",
    metavar="N",
    type=_count,
    show_default="1, with ray one per CPU",
    help="Files to work on at once.",
)


def _installed(ctx: click.Context, param: click.Parameter, engine: str) -> str:
    if engine == "ray" and find_spec("ray") is None:
        raise Failure("--engine ray needs the package ray: pip install 'vqcodec[ray]'")
    return engine


_engine = click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    callback=_installed,
    help="Where the jobs run: here, or on a Ray cluster.",
)
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object per file, on a line of its own.")
_strip = click.option("--strip", is_flag=True, help="Leave ICC profile, EXIF and XMP out; looks stay the same.")
_keep_icc = click.option("--keep-icc", is_flag=True, help="With --strip: keep the ICC profile, and the colours in it.")
_strip_gps = click.option("--strip-gps", is_flag=True, help="Leave out where it was taken (GPS in EXIF and XMP) alone.")
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
      vqcodec encode photos/        every picture in a folder
      vqcodec info photo.vq2        shows what is in the file
      vqcodec compare photo.png     shows it beside JPEG, WebP and AVIF
      vqcodec encode --help         explains one command

    The model is part of the installation: nothing is downloaded.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # Pillow's, of what becomes an error or a warning of ours


class _Colour(click.ParamType):
    name = "colour"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        from PIL import ImageColor

        try:
            red, green, blue, *_ = ImageColor.getrgb(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a colour: write it like white, #f0f0f0 or 'rgb(240, 240, 240)'", param, ctx)
        return red, green, blue


class _Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from vqcodec.targets import parse_size

        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


_positive = click.FloatRange(0, min_open=True)


@main.command(epilog=f"{_FILES}\n\n{_EXIT_CODES}")
@_inputs
@_out
@_quality
@click.option("--target-size", metavar="SIZE", type=_Size(), help="Bytes instead of a quality: 50kB, 1.5MB, 64KiB.")
@click.option("--target-bpp", metavar="BPP", type=_positive, help="Bits per pixel instead of a quality.")
@click.option("--target-psnr", metavar="DB", type=_positive, help="PSNR over R, G and B instead of a quality.")
@click.option(
    "--effort",
    metavar="N",
    type=click.IntRange(0, 3),
    default=DEFAULT_EFFORT,
    help="From 0, the fastest, to 3, the most quality for the bytes.",
)
@_strip
@_keep_icc
@_strip_gps
@click.option("--lenient", is_flag=True, help="Take what is there of truncated JPEG and PNG files, with a warning.")
@_force
@_resume
@_jobs
@_engine
@_json
@_device
@_weights
@_max_pixels
@click.pass_context
def encode(
    ctx: click.Context,
    inputs: tuple[str, ...],
    out: str | None,
    quality: float,
    target_size: float | None,
    target_bpp: float | None,
    target_psnr: float | None,
    effort: int,
    strip: bool,
    keep_icc: bool,
    strip_gps: bool,
    lenient: bool,
    force: bool,
    resume: bool,
    jobs: int | None,
    engine: str,
    as_json: bool,
    device: str,
    weights: str | None,
    max_pixels: int,
) -> None:
    """Compress pictures to .vq2 files.

    \b
    Examples:
      vqcodec encode photo.png                  writes photo.vq2 beside it
      vqcodec encode -q 3.5 photo.png -o small.vq2
      vqcodec encode --target-size 50kB photo.png
      vqcodec encode --effort 3 photo.png       more quality for the bytes, slow
      vqcodec encode *.jpg -o compressed/       a file for each, in a folder
      vqcodec encode photos/ -o small/ --jobs 4 --resume
      vqcodec encode --engine ray s3://mine/photos -o s3://mine/small
      vqcodec encode - -o - < photo.png > photo.vq2

    INPUT may have any format that Pillow reads, HEIC with the package pillow-heif, and JPEG XL with
    pillow-jxl-plugin. Size, grey or colour, transparency, ICC profile, EXIF, XMP and resolution are kept. A warning
    tells what is changed or dropped, such as 16-bit samples, CMYK and further frames. Colours under full
    transparency are not kept, and they do not count in --target-psnr. Raw photographs are refused.

    A target is met within 2 % of bytes or bits, metadata included, or within 0.1 dB, by some 3 to 10 encodings of
    the file at different qualities. If no quality meets it, the nearest is written, with a warning.
    """
    target = _target(ctx, {"size": target_size, "bpp": target_bpp, "psnr": target_psnr})
    what = _stripping(strip, keep_icc, strip_gps)
    plan = _plan_for(inputs, out, ".vq2", force, resume, as_json, _picture_endings)
    codec = _load(weights, device, jobs)
    _check_qualities(codec, [quality] if target is None else [])
    from vqcodec.batch import Encode

    _do(Encode(quality, target, what, effort, max_pixels, lenient), plan, codec, weights, engine, jobs, force, as_json)


def _stripping(strip: bool, keep_icc: bool, strip_gps: bool) -> "Strip":
    if keep_icc and not strip:
        raise click.UsageError("--keep-icc goes with --strip: without that, the ICC profile is kept anyway")
    return "keep-icc" if keep_icc else strip or ("gps" if strip_gps else False)


def _check_qualities(codec: "Codec", qualities: Iterable[float]) -> None:
    try:
        for quality in qualities:
            codec.level_for(quality)
    except ValueError as error:  # other weights may have fewer levels
        raise click.BadParameter(str(error), param_hint="--quality") from None


def _target(ctx: click.Context, targets: dict[Any, float | None]) -> "Target | None":
    given = {kind: value for kind, value in targets.items() if value is not None}
    if not given:
        return None
    by_user = ctx.get_parameter_source("quality") is not click.core.ParameterSource.DEFAULT
    if len(given) + by_user > 1:
        raise click.UsageError("give one of --quality, --target-size, --target-bpp and --target-psnr")
    from vqcodec.targets import Target

    try:
        return Target(*next(iter(given.items())))
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _picture_endings() -> Collection[str]:
    from vqcodec.image import endings

    return endings()


def _plan_for(
    inputs: Sequence[str],
    out: str | None,
    suffix: str,
    force: bool,
    resume: bool,
    as_json: bool,
    endings: Callable[[], Collection[str]],
) -> _Plan:
    plan = _plan(inputs, out, suffix, force, resume, endings)
    if as_json and any(job.target == "-" for job in plan.jobs):
        raise click.UsageError("--json and the file cannot both go to standard output: name a file with -o")
    return plan


@main.command(epilog=f"{_FILES}\n\n{_EXIT_CODES}")
@_inputs
@_out
@click.option(
    "--format", metavar="FORMAT", help="png, jpeg, webp, avif, tiff, bmp or ppm.  [default: as OUT ends, or png]"
)
@click.option(
    "-q",
    "--quality",
    metavar="Q",
    type=click.IntRange(1, 100),
    help="Of JPEG, WebP and AVIF, from 1 to 100.  [default: 95; WebP: lossless]",
)
@click.option(
    "--subsampling",
    type=click.Choice(["4:4:4", "4:2:2", "4:2:0"]),
    help="Of colour in JPEG and AVIF.  [default: 4:4:4]",
)
@click.option(
    "--background", metavar="COLOUR", type=_Colour(), help="Put transparent pictures on it: white, #f0f0f0, ..."
)
@_strip
@_keep_icc
@_strip_gps
@click.option("--preview", is_flag=True, help="Only the coarse grid: quick, blurred, unverified.")
@_force
@_resume
@_jobs
@_engine
@_json
@_device
@_weights
@_max_pixels
def decode(
    inputs: tuple[str, ...],
    out: str | None,
    format: str | None,
    quality: int | None,
    subsampling: str | None,
    background: tuple[int, int, int] | None,
    strip: bool,
    keep_icc: bool,
    strip_gps: bool,
    preview: bool,
    force: bool,
    resume: bool,
    jobs: int | None,
    engine: str,
    as_json: bool,
    device: str,
    weights: str | None,
    max_pixels: int,
) -> None:
    """Turn .vq2 files back into pictures.

    \b
    Examples:
      vqcodec decode photo.vq2                  writes photo.png beside it
      vqcodec decode photo.vq2 -o photo.jpg     or .webp, .avif, .tiff, .bmp, .ppm
      vqcodec decode --preview half.vq2         what a truncated file still shows
      vqcodec decode small/ -o pictures/        a PNG file for each, the same tree
      vqcodec decode --format jpg -q 85 small/ -o pictures/
      vqcodec decode --background white logo.vq2 -o logo.jpg
      vqcodec decode - -o - < photo.vq2 > photo.png

    The format is --format, or the one that the name of OUT ends in, or else PNG. A warning tells what it cannot hold;
    only a transparent picture is refused where there is no transparency, unless there is a --background. A damaged
    file is refused: it never becomes a wrong picture.

    --preview needs the beginning of the file only, as far as the end of its first grid; of a truncated file it shows
    no alpha and no metadata. The file's checksum covers all grids, so that a preview is not verified: damage to the
    first grid is mostly noticed, but not always.
    """
    what = _stripping(strip, keep_icc, strip_gps)
    suffix = f".{format.lower()}" if format else ".png"
    plan = _plan_for(inputs, out, suffix, force, resume, as_json, lambda: {".vq2"})
    if format is None:  # several targets end alike
        format = os.path.splitext(plan.jobs[0].target)[1][1:] if plan.jobs else ""
    from PIL import Image

    from vqcodec.image import from_pil
    from vqcodec.output import Options, save

    options = Options(quality, subsampling, background)
    with _blame(plan.jobs[0].target if plan.jobs else ""):  # a format that cannot be written is refused before the work
        save(from_pil(Image.new("RGB", (1, 1))), BytesIO(), format, options)
    codec = _load(weights, device, jobs)
    from vqcodec.batch import Decode

    _do(Decode(format, preview, max_pixels, what, options), plan, codec, weights, engine, jobs, force, as_json)


@main.command(epilog=_EXIT_CODES)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@_json
@click.option("--grids", metavar="PNG", type=click.Path(), help="Decode the one FILE and draw where its bits went.")
@_force
@_device
@_weights
@_max_pixels
def info(
    files: tuple[str, ...],
    as_json: bool,
    grids: str | None,
    force: bool,
    device: str,
    weights: str | None,
    max_pixels: int,
) -> None:
    """Show what is in .vq2 files, without decoding them.

    \b
    Examples:
      vqcodec info photo.vq2
      vqcodec info --json *.vq2
      vqcodec info --grids grids.png photo.vq2

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

    --grids decodes the indices and writes a PNG file: for every grid a map of the bits that each cell took, black for
    none to white for most, then the indices of each group as shades of grey. The last four options are for it.
    """
    if grids is not None:
        if len(files) > 1:
            raise click.UsageError("--grids draws one file: give it one")
        _refuse_clashes([_Job(files[0], grids)], force)
    failed = False
    for source in files:
        try:
            data = _read(source)
            with _blame(_title(source)):
                facts = {"file": source, **_facts(data)}
            if as_json:
                click.echo(json.dumps(facts))
            else:
                _show(facts)
            if grids is not None:
                _draw_grids(source, data, grids, force, _load(weights, device), max_pixels)
        except Failure as failure:
            failure.show()
            failed = True
    if failed:
        raise click.exceptions.Exit(1)


def _draw_grids(source: str, data: bytes, target: str, force: bool, codec: "Codec", max_pixels: int) -> None:
    from vqcodec.look import draw_grids

    drawn = BytesIO()
    with _blame(_title(source)):
        draw_grids(codec, data, max_pixels).save(drawn, "PNG")
    _write(target, drawn.getbuffer(), force)


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


@main.command(epilog=_EXIT_CODES)
@click.argument("picture", metavar="PICTURE", type=click.Path())
@click.option("-o", "--output", "out", metavar="HTML", type=click.Path(), help="Where to.  [default: beside PICTURE]")
@click.option(
    "-q",
    "--quality",
    "qualities",
    metavar="Q",
    type=click.FloatRange(1, 8),
    multiple=True,
    default=(1, 3, 5, 7),
    help="As in encode; give it again for another row.",
)
@_force
@_device
@_weights
@_max_pixels
def compare(
    picture: str,
    out: str | None,
    qualities: tuple[float, ...],
    force: bool,
    device: str,
    weights: str | None,
    max_pixels: int,
) -> None:
    """Show a picture beside its JPEG, WebP and AVIF of equal size.

    \b
    Examples:
      vqcodec compare photo.png                 writes photo.html
      vqcodec compare photo.png -q 2 -q 4.5 -o page.html

    The page holds everything: the original, then for every quality the .vq2 file's picture and what the others
    make of at most as many bytes, each with its size, its PSNR and, where libjxl's program ssimulacra2 is
    installed, its SSIMULACRA2. Colours are in sRGB, transparency and metadata are left out.
    """
    plan = _plan([picture], out, ".html", force)
    ((source, target),) = plan.jobs
    data = _read(source)
    codec = _load(weights, device)
    _check_qualities(codec, qualities)
    from vqcodec.image import read
    from vqcodec.look import compare as rows_of
    from vqcodec.look import page

    with _blame(_title(source)), _bar(source) as progress:
        original, rows = read(data, max_pixels), []
        for row in rows_of(codec, original, qualities):
            rows.append(row)
            if progress:
                progress(len(rows) / len(qualities))
    _write(target, page(os.path.basename(source), original, rows), force)
    _warn(_title(source), original.notes)


class _Dimensions(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        width, cross, height = str(value).lower().partition("x")
        if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            self.fail(f"{value!r} is not a size in pixels: write it like 256x192", param, ctx)
        return int(width), int(height)


@main.command(epilog=_EXIT_CODES)
@click.option("-o", "--output", "out", metavar="OUT", type=click.Path(), required=True, help="Folder to write.")
@click.option("-n", "--number", metavar="N", type=_count, default=1, help="Pictures to draw.")
@click.option("--size", metavar="WxH", type=_Dimensions(), default="256x256", help="In pixels.")
@_quality
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, help="Of the first; others count on.")
@click.option("--temperature", metavar="T", type=_positive, default=1.0, help="Below 1 for what is more likely.")
@click.option("--top-from", metavar="VQ2", type=click.Path(), help="Keep this file's coarse grid, size and level.")
@_force
@_device
@_weights
@_max_pixels
def sample(
    out: str,
    number: int,
    size: tuple[int, int],
    quality: float,
    seed: int,
    temperature: float,
    top_from: str | None,
    force: bool,
    device: str,
    weights: str | None,
    max_pixels: int,
) -> None:
    """Draw pictures that the model's priors think likely.

    \b
    Examples:
      vqcodec sample -n 4 --size 256x192 -o drawn/
      vqcodec sample -n 4 --seed 1 --temperature 0.9 -o drawn/
      vqcodec sample --top-from photo.vq2 -o drawn/   other details

    Writes sample-0.png, sample-1.png, ... into the folder OUT, which is made if need be: the number is the seed, and
    the same seed and options draw the same picture.
    """
    if size[0] * size[1] > max_pixels:
        raise Failure(f"{size[0]} x {size[1]} pixels, the limit is {max_pixels}: raise it (--max-pixels)")
    targets = {n: os.path.join(out, f"sample-{n}.png") for n in range(seed, seed + number)}
    _refuse_clashes([_Job(top_from or "", target) for target in targets.values()], force)
    top = None if top_from is None else _read(top_from)
    codec = _load(weights, device)
    _check_qualities(codec, [quality] if top is None else [])
    for n, target in targets.items():
        with _blame(_title(top_from or target)):
            if top is None:
                drawn = codec.sample(*size, quality, seed=n, temperature=temperature)
            else:
                drawn = codec.sample_from(top, seed=n, temperature=temperature, max_pixels=max_pixels)
        encoded = BytesIO()
        drawn.save(encoded, "PNG")
        _write(target, encoded.getbuffer(), force)
        click.echo(_printable(target))


@main.command(epilog=_EXIT_CODES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes commands and options in a shell.

    \b
    Examples:
      vqcodec completion bash >> ~/.bashrc
      vqcodec completion zsh >> ~/.zshrc
      vqcodec completion fish > ~/.config/fish/completions/vqcodec.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "vqcodec", "_VQCODEC_COMPLETE").source())


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
