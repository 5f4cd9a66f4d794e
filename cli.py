"""The command line, `vqcodec`. The only file that prints messages or exits.

What is slow to import (torch, numpy, Pillow, rich) is imported by the command that needs it.
"""

import contextlib
import functools
import gc
import json
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from bitstream.container import DEFAULT_MAX_PIXELS
from bitstream.errors import UsageError, VqcodecError
from vqcodec import __version__, storage
from vqcodec.config import (
    BEST_QUALITY,
    CONFIGS,
    DEFAULT_EFFORT,
    DEFAULT_QUALITY,
    DEFAULT_TUNE,
    EFFORTS,
    PRODUCT,
    SHIPPED,
    STAGES,
    TUNES,
    Stage,
    Tune,
)
from vqcodec.formats import advice
from vqcodec.jobs import Job, Plan, blame, finish, plan_jobs, read_file, reason, refuse_clashes, title, write_file

if TYPE_CHECKING:
    from rich.progress import Progress

    from vqcodec.batch import Pool, Result, Tally, Work
    from vqcodec.codec import Codec
    from vqcodec.image import Strip
    from vqcodec.targets import Target

# --- errors: one line each ---


class Failure(click.ClickException):
    """An error as the user gets to see it: one line, and exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        _complain(self.message)


def _complain(text: str) -> None:
    _echo("vqcodec: " + _printable(" ".join(text.split())), err=True)


def _printable(text: str) -> str:
    """The text without what file names may hold besides letters, such as commands to the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


_INTERRUPTED = 130  # exit code


class _Stop(KeyboardInterrupt):
    """Ctrl-C, or a signal like it. code: to exit with; progress: how far it got."""

    def __init__(self, code: int, progress: str = "") -> None:
        super().__init__()
        self.code, self.progress = code, progress


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes the signals that end a program clean up like Ctrl-C."""

    def stop(number: int, _: object) -> None:
        raise _Stop(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _occupy_closed_streams() -> None:
    """Standard streams may be closed, in daemons for example; a file opened next would take the number of one, and get
    what libraries write to it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


class _Program(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        _occupy_closed_streams()
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # names of files may have what its encoding has not
        # Before torch is loaded: threads that spin while they wait take the processor from those that they wait for,
        # as soon as other programs are busy.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            with _terminable():
                return super().invoke(ctx)
        except UsageError as error:
            raise click.UsageError(str(error)) from error
        except VqcodecError as error:
            raise Failure(str(error)) from error
        except KeyboardInterrupt as stop:
            code, progress = getattr(stop, "code", _INTERRUPTED), getattr(stop, "progress", "")
            _complain(("interrupted" if code == _INTERRUPTED else "terminated") + progress)
            raise click.exceptions.Exit(code) from None
        except OSError as error:  # standard output's: every other file has been blamed by name
            if error.errno is None:
                raise
            with contextlib.suppress(OSError):  # Python would flush it on exit, and complain again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # the reader has seen enough
                raise click.exceptions.Exit(1) from None
            raise Failure(f"standard output: {reason(error)}") from error


# --- the terminal: lines, and a bar below them ---

_PATIENCE = 1.0  # seconds; what takes less needs no bar

_terminal = threading.RLock()  # held by who writes to it
_bar_there: "Progress | None" = None


def _echo(text: str, err: bool = False) -> None:
    """A line; a bar makes way for it."""
    with _terminal:
        if _bar_there:
            _bar_there.stop()
        click.echo(text, err=err)
        if _bar_there:
            _bar_there.start()


@contextlib.contextmanager
def _show(bar: "Progress") -> Iterator[None]:
    """Shows a bar after a while; a thread of its own keeps it moving."""
    global _bar_there
    over = False

    def start() -> None:
        global _bar_there
        with _terminal:
            if not over:
                _bar_there = bar
                bar.start()

    timer = threading.Timer(_PATIENCE, start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with _terminal:
            over = True
            if _bar_there is bar:
                bar.stop()
                _bar_there = None


def _progress(*columns: Any) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TimeElapsedColumn, TimeRemainingColumn

    # The time moves even where the work tells nothing, such as in the networks and in a compiler.
    columns = SpinnerColumn(), *columns, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)


Watch = Callable[[str], contextlib.AbstractContextManager[Callable[[float], None] | None]]


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # it is None if it is closed


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[float], None] | None]:
    """A progress function that moves a bar, on a terminal."""
    if not _on_terminal():
        yield None
        return
    from rich.progress import TextColumn

    bar = _progress(TextColumn("{task.description}", markup=False))
    task = bar.add_task(_printable(name), total=None)
    with _show(bar):
        yield lambda done: bar.update(task, total=1.0, completed=done)


@contextlib.contextmanager
def _no_bar(_: str) -> Iterator[None]:
    yield None


@contextlib.contextmanager
def _whole_bar(jobs: Sequence[Job]) -> Iterator[tuple[Watch, Callable[[Job, "Tally"], None]]]:
    """A bar over all files, by the bytes of each, on a terminal: what watches the work on one of them, and a function
    that tells that one is over."""
    if not _on_terminal():
        yield _no_bar, lambda *_: None
        return
    from rich.progress import TextColumn

    sizes, past = {job.source: storage.size(job.source) for job in jobs}, 0
    count = TextColumn("{task.fields[done]} of {task.fields[files]} files")
    bar = _progress(count, TextColumn("{task.fields[speed]:.2f} MP/s"))
    task = bar.add_task("", total=sum(sizes.values()), done=0, files=len(jobs), speed=0.0)

    @contextlib.contextmanager
    def watch(name: str) -> Iterator[Callable[[float], None]]:
        yield lambda done: bar.update(task, completed=past + done * sizes.get(name, 0))

    def advance(job: Job, tally: "Tally") -> None:
        nonlocal past
        past += sizes.get(job.source, 0)
        done, speed = tally.done + len(tally.failed), tally.facts()["megapixels_per_second"]
        bar.update(task, completed=past, done=done, speed=speed)

    with _show(bar):
        yield watch, advance


# --- doing it ---


@contextlib.contextmanager
def _loading_for_good() -> Iterator[None]:
    """To look for garbage among all that torch is takes 0.2 seconds on the way and 0.4 at the end of the program."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def _load(weights: str | None, device: str, jobs: int | None = None) -> "Codec":
    """jobs: processes that there will be."""
    with blame(), _bar("loading the model"), _loading_for_good():
        from vqcodec.codec import Codec

        if (jobs or 1) > 1:
            import torch

            torch.set_num_threads(1)  # threads would not survive a fork, and every core has a job anyway
        return Codec.load(weights, device)


def _warn(name: str, notes: Iterable[str]) -> None:
    for note in notes:
        _complain(f"{name}: warning: {note}")


def _do(work: "Work", plan: Plan, codec: "Codec", options: "_FileOptions", strict: bool = False) -> None:
    """Does all jobs, even if some of them fail; Exit(1) if any has, or, if it is strict, has missed its target."""
    from vqcodec.batch import Encode, Tally, outcomes

    tally = Tally(skipped=len(plan.skipped), left_out=len(plan.left_out))
    shrinks = isinstance(work, Encode)
    alone = len(plan.jobs) == 1 and not (plan.skipped or plan.folders)
    lines = not (options.as_json or options.quiet) and (options.verbose or not plan.folders)
    _tell_plan(plan, tally, options)
    try:
        with contextlib.ExitStack() as stack:
            watch: Watch = _no_bar if options.quiet else _bar
            advance: Callable[[Job, Tally], None] = lambda *_: None  # noqa: E731
            if not (alone or options.quiet):
                watch, advance = stack.enter_context(_whole_bar(plan.jobs))
            each = outcomes(work, plan.jobs, codec, _pool(codec, plan, options), watch)
            stack.enter_context(contextlib.closing(each))  # whatever happens, no worker stays
            for job, outcome in each:
                try:
                    with blame(title(job.source)):
                        size, made = outcome()
                    finish(job, made.data, options.force)
                except VqcodecError as error:
                    _complain(str(error))
                    tally.failed.append(str(error))
                    facts: dict[str, Any] = {"status": "failed", "error": str(error)}
                else:
                    tally.add(size, made)
                    if not options.quiet or made.miss and strict:
                        _warn(title(job.source), [*made.notes, *filter(None, [made.miss])])
                        _warn(job.target, made.warnings)
                    facts = _facts_of(size, made)
                    if lines:
                        _summary(job.target, facts, shrinks)
                if options.as_json:
                    _echo(json.dumps({"file": job.source, "output": job.target, **facts}))
                advance(job, tally)
    except KeyboardInterrupt as stop:
        if alone:
            raise
        how = "with --resume instead of -f" if options.force else "with --resume"
        progress = f" after {tally.done} of {len(plan.jobs)} files: give the same command {how} to go on"
        raise _Stop(getattr(stop, "code", _INTERRUPTED), progress) from stop
    if options.as_json and not alone:
        _echo(json.dumps({"summary": tally.facts()}))
    elif not (alone or options.quiet):
        _table(tally, shrinks)
    if tally.failed or tally.missed and strict:
        raise click.exceptions.Exit(1)


def _tell_plan(plan: Plan, tally: "Tally", options: "_FileOptions") -> None:
    """What in folders cannot be read, and, if one wants to know, what need not be done."""
    for message in plan.closed:
        _complain(message)
        tally.failed.append(message)
    if plan.left_out and not options.quiet:
        named = plan.left_out if options.verbose else plan.left_out[:5]
        names, more, hint = ", ".join(named), len(plan.left_out) - len(named), advice(plan.left_out)
        names += f" and {more} more (-v names them)" if more else ""
        count = "1 file is" if len(plan.left_out) == 1 else f"{len(plan.left_out)} files are"
        _complain(f"warning: {count} left out that cannot be read: {names}" + (f": {hint}" if hint else ""))
    if options.verbose and not options.as_json:
        for job in plan.skipped:
            _echo(f"{_printable(job.target)}  is up to date")


def _pool(codec: "Codec", plan: Plan, options: "_FileOptions") -> "Pool | None":
    """The processes that the user wants, if there is work for several."""
    workers = options.jobs or 1
    if options.engine == "ray" and plan.jobs:
        from vqcodec.cluster import RayPool

        return RayPool(codec, options.jobs or 0)
    if options.engine == "local" and workers > 1 and len(plan.jobs) > 1:
        from vqcodec.batch import LocalPool

        return LocalPool(codec, options.weights, workers)
    return None


def _facts_of(size: int, made: "Result") -> dict[str, Any]:
    facts = {
        "status": "done",
        "width": made.width,
        "height": made.height,
        "bytes_before": size,
        "bytes_after": len(made.data),
        "bpp": round(8 * len(made.data) / (made.width * made.height), 4),
        "seconds": round(made.seconds, 3),
    }
    if made.quality is not None:
        facts |= {"quality": round(made.quality, 3), "target_met": not made.miss}
    if made.lossless is not None:
        facts["bytes_lossless"] = made.lossless
    return facts


def _summary(target: str, facts: dict[str, Any], shrinks: bool) -> None:
    """shrinks: the output is meant to be smaller than the input."""
    line = "{width} x {height}  {bytes_after:,} bytes  {bpp:.3f} bpp  {seconds:.1f} s".format(**facts)
    if "quality" in facts:
        line += "  quality {quality:.2f}".format(**facts)
    if shrinks and facts["bytes_after"] > facts["bytes_before"]:
        line += "  larger than the original's {bytes_before:,} bytes".format(**facts)
    elif "bytes_lossless" in facts:
        line += "  larger than a lossless WebP file's {bytes_lossless:,} bytes".format(**facts)
    _echo(f"{_printable(target)}  {line}", err=target == "-")


def _table(tally: "Tally", shrinks: bool) -> None:
    facts = tally.facts()
    files = "files   {done} done, {skipped} skipped, {failed} failed"
    _echo((files + ", {left_out} left out" if tally.left_out else files).format(**facts))
    _echo("bytes   {bytes_before:,} before, {bytes_after:,} after".format(**facts))
    if tally.before and tally.after:
        small, large = sorted((tally.before, tally.after))
        _echo(f"ratio   {large / small:.1f} : 1" if tally.after == small else f"ratio   1 : {large / small:.1f}")
    if shrinks and tally.larger:
        _echo(f"larger  {tally.larger} than their originals (-v names them)")
    if tally.missed:
        _echo(f"missed  {tally.missed} their target")
    _echo("time    {seconds:.1f} s, {megapixels_per_second:.2f} MP/s".format(**facts))
    for message in tally.failed:
        _echo("failed  " + _printable(" ".join(message.split())))


# --- commands ---

_FILES = """\
OUT is a file, or a folder if it is one already, ends in a slash, or an INPUT is a folder: then it is created if
need be, but not its parents. Several inputs need a folder, or no -o at all: each output is then written beside
its input. "-" stands for standard input and output. An output that exists, that is an input, or that two inputs
would share is refused before any work.

A folder among the inputs stands for all files below it that have one of the right endings, or none and the
content of a picture; hidden ones are left out, pictures that cannot be read are counted and named. OUT gets the same
tree, and outputs the times of their inputs. Files of one folder that differ in nothing but their ending keep it:
a.jpg.vq2, a.png.vq2. An output that is there keeps its name.

--resume skips an input if its output exists and is not older than it, and does again what is out of date: an
interrupted command goes on with it.

With --jobs N, N processes of one thread each work on N files at once and share one model where the system allows
(Linux, without a GPU).

With --engine ray, the work is done by the Ray cluster that the variable RAY_ADDRESS names, or by a new one on this
machine alone. The files go through this machine: the others need the same vqcodec and nothing else. If a worker
dies, its file is retried up to three times.

INPUT and OUT may be URLs that fsspec knows, such as s3://bucket/photos; a file is sent there in one piece. URLs
need pip install 'vqcodec[urls]', and --engine ray needs pip install 'vqcodec[ray]'. Chains work as well, such as
zip://trip::s3://bucket/photos.zip, a folder in an archive.

A file that fails is named at once, and again in the table at the end; the others are done. --json prints an object
per file instead, with file, output, status (done or failed), error or width, height, bytes_before, bytes_after, bpp,
seconds, quality and target_met where a target was given, and bytes_lossless where a lossless WebP file of a page,
screen or drawing is smaller; last, if there is more than one file or a folder, {"summary": {...}}."""

_EXIT_CODES = """\b
Exit codes:
  0    everything was done
  1    something failed: a line on standard error says what, all else was done
  2    bad usage
  130  interrupted by Ctrl-C (143: terminated)
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


class _Quality(click.FloatRange):
    def __init__(self) -> None:
        super().__init__(1, BEST_QUALITY)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        with contextlib.suppress(ValueError):
            if BEST_QUALITY < float(value) <= 100:
                known = f"1 is the smallest file, {DEFAULT_QUALITY:g} the default, {BEST_QUALITY} the best picture"
                self.fail(
                    f"{value} is not in the range from 1 to {BEST_QUALITY}: it is not a JPEG's: {known}", param, ctx
                )
        return float(super().convert(value, param, ctx))


_quality = click.option(
    "-q",
    "--quality",
    metavar="Q",
    type=_Quality(),
    default=DEFAULT_QUALITY,
    help=f"From 1, the smallest file, to {BEST_QUALITY}, the best picture; fractions are fine.",
)
_tune = functools.partial(
    click.option,
    "--tune",
    type=click.Choice(TUNES),
    help="What to spend the bytes on: least squared error, or what the eye sees.",
)
_count = click.IntRange(min=1)
_resume = click.option("--resume", is_flag=True, help="Skip inputs whose output exists and is not older.")
_verbose = click.option("-v", "--verbose", is_flag=True, help="A line for every file, also in folders.")
_quiet = click.option("--quiet", is_flag=True, help="Errors alone: no bar, no warnings, no summary.")
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
    default=DEFAULT_MAX_PIXELS,
    help="Refuse larger pictures, and sides longer than 8 times its root, before they take any memory.",
)


@dataclass(frozen=True)
class _FileOptions:
    """What `encode` and `decode` are given alike."""

    inputs: tuple[str, ...]
    out: str | None
    force: bool
    resume: bool
    jobs: int | None
    engine: str
    as_json: bool
    device: str
    weights: str | None
    max_pixels: int
    verbose: bool
    quiet: bool
    strip: bool
    keep_icc: bool
    strip_gps: bool

    def plan(self, suffix: str, endings: Callable[[], Collection[str]], pictures: bool = False) -> Plan:
        """As ``plan_jobs``."""
        if self.verbose and self.quiet:
            raise UsageError("--verbose and --quiet contradict each other: choose one")
        plan = plan_jobs(self.inputs, self.out, suffix, self.force, self.resume, endings, pictures)
        if self.as_json and any(job.target == "-" for job in plan.jobs):
            raise UsageError("--json and the file cannot both go to standard output: name a file with -o")
        return plan

    def refuse_output_as_input(self, endings: Callable[[], Collection[str]]) -> None:
        """UsageError for `encode a.png a.vq2`, which other programs understand. endings: those of outputs."""
        *others, last = self.inputs
        if self.out is not None or not others or os.path.splitext(last)[1].lower() not in endings():
            return
        if len(others) == 1:
            raise UsageError(f"{last} is no input: to name the output, write -o {last}")
        if not storage.existing([last]):
            raise UsageError(f"{last} is no input: to name a folder for the outputs, write -o FOLDER/")

    def what_to_strip(self) -> "Strip":
        if self.keep_icc and not self.strip:
            raise UsageError("--keep-icc goes with --strip: without that, the ICC profile is kept anyway")
        return "keep-icc" if self.keep_icc else self.strip or ("gps" if self.strip_gps else False)

    def load(self) -> "Codec":
        return _load(self.weights, self.device, self.jobs)


_SHARED = (
    _inputs, _strip, _keep_icc, _strip_gps, _out, _force, _resume, _jobs, _engine, _json, _verbose, _quiet, _device,
    _weights, _max_pixels,
)  # fmt: skip


def _file_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that `encode` and `decode` share, and hands them over as the argument `options`."""

    @functools.wraps(command)
    def gather(**given: Any) -> None:
        shared = {field.name: given.pop(field.name) for field in fields(_FileOptions)}
        command(options=_FileOptions(**shared), **given)

    for option in reversed(_SHARED):
        gather = option(gather)
    return gather


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


class _Positive(click.FloatRange):
    def __init__(self) -> None:
        super().__init__(0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a number greater than 0", param, ctx)
        return number


_positive = _Positive()


@main.command(epilog=f"{_FILES}\n\n{_EXIT_CODES}")
@_quality
@_tune(show_default=f"{DEFAULT_TUNE}, with --target-psnr psnr")
@click.option("--target-size", metavar="SIZE", type=_Size(), help="Bytes instead of a quality: 50kB, 1.5MB, 64KiB.")
@click.option("--target-bpp", metavar="BPP", type=_positive, help="Bits per pixel instead of a quality.")
@click.option("--target-psnr", metavar="DB", type=_positive, help="PSNR over R, G and B instead of a quality.")
@click.option(
    "--effort",
    metavar="N",
    type=click.IntRange(0, len(EFFORTS) - 1),
    default=DEFAULT_EFFORT,
    help=f"From 0, the fastest, to {len(EFFORTS) - 1}, the most quality for the bytes.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 if a target is missed; the file is written all the same.")
@click.option("--lenient", is_flag=True, help="Take what is there of truncated JPEG and PNG files, with a warning.")
@_file_options
def encode(
    options: _FileOptions,
    quality: float,
    tune: Tune | None,
    target_size: float | None,
    target_bpp: float | None,
    target_psnr: float | None,
    effort: int,
    strict: bool,
    lenient: bool,
) -> None:
    """Compress pictures to .vq2 files.

    \b
    Examples:
      vqcodec encode photo.png                  writes photo.vq2 beside it
      vqcodec encode -q 3.5 photo.png -o small.vq2
      vqcodec encode --target-size 50kB photo.png
      vqcodec encode --effort 3 photo.png       more quality for the bytes, slow
      vqcodec encode --tune psnr photo.png      for PSNR, not for the eye
      vqcodec encode *.jpg -o compressed/       a file for each, in a folder
      vqcodec encode photos/ -o small/ --jobs 4 --resume
      vqcodec encode --engine ray s3://mine/photos -o s3://mine/small
      vqcodec encode - -o - < photo.png > photo.vq2

    INPUT may have any format that Pillow reads, HEIC with the package pillow-heif, and JPEG XL with
    pillow-jxl-plugin. Size, grey or colour, transparency, ICC profile, EXIF, XMP and resolution are kept. A warning
    tells what is changed or dropped, such as 16-bit samples, CMYK and further frames. Colours under full
    transparency are not kept, and they do not count in --target-psnr. Raw photographs are refused.

    A target is met within 2 % of bytes or bits, metadata included, or within 0.1 dB, by some 3 to 10 encodings of
    the file at different qualities. If no quality meets it, the nearest is written, with a warning; --strict makes
    it an error in the exit code.
    """
    target = _target({"size": target_size, "bpp": target_bpp, "psnr": target_psnr})
    options.refuse_output_as_input(lambda: {".vq2"})
    strip = options.what_to_strip()
    plan = options.plan(".vq2", _picture_endings, pictures=True)
    codec = options.load()
    _check_qualities(codec, [quality] if target is None else [])
    from vqcodec.batch import Encode

    _do(Encode(quality, target, tune, strip, effort, options.max_pixels, lenient), plan, codec, options, strict)


def _check_qualities(codec: "Codec", qualities: Iterable[float]) -> None:
    try:
        for quality in qualities:
            codec.level_for(quality)
    except ValueError as error:  # other weights may have fewer levels
        raise click.BadParameter(str(error), param_hint="--quality") from None


def _target(targets: dict[Any, float | None]) -> "Target | None":
    given = {kind: value for kind, value in targets.items() if value is not None}
    if not given:
        return None
    by_user = click.get_current_context().get_parameter_source("quality") is not click.core.ParameterSource.DEFAULT
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


@main.command(epilog=f"{_FILES}\n\n{_EXIT_CODES}")
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
@click.option("--preview", is_flag=True, help="Only the coarse grid: quick, blurred, unverified.")
@_file_options
def decode(
    options: _FileOptions,
    format: str | None,
    quality: int | None,
    subsampling: str | None,
    background: tuple[int, int, int] | None,
    preview: bool,
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
    no alpha, no metadata and no areas of one colour. The file's checksum covers all grids, so that a preview is not
    verified: damage to the first grid is mostly noticed, but not always.
    """
    options.refuse_output_as_input(_picture_endings)
    strip = options.what_to_strip()
    plan = options.plan(f".{format.lower()}" if format else ".png", lambda: {".vq2"})
    if format is None:  # several targets end alike
        format = os.path.splitext(plan.jobs[0].target)[1][1:] if plan.jobs else ""
    from PIL import Image

    from vqcodec.image import from_pil
    from vqcodec.output import Options, save

    how = Options(quality, subsampling, background)
    with blame(plan.jobs[0].target if plan.jobs else ""):  # a format that cannot be written is refused before the work
        save(from_pil(Image.new("RGB", (1, 1))), BytesIO(), format, how)
    codec = options.load()
    from vqcodec.batch import Decode

    _do(Decode(format, preview, options.max_pixels, strip, how), plan, codec, options)


@main.command(epilog=_EXIT_CODES)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@_json
@click.option("--grids", metavar="PNG", type=click.Path(), help="Decode the one FILE and draw where its bits went.")
@_force
@_weights
@_max_pixels
def info(
    files: tuple[str, ...],
    as_json: bool,
    grids: str | None,
    force: bool,
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
      tune            psnr or visual: what its bytes were spent on
      bpp             bits per pixel: 8 x bytes / (width x height)
      fingerprint     of the model that wrote the file, hexadecimal
      chunks          bytes of each one present: grid1 (the coarsest, top),
                      grid2 (bottom), ..., offset, flat, alpha, icc, exif,
                      xmp
      camera, date    from EXIF, where it has them
      profile         name of the ICC profile, where it has one

    Damage to structure and metadata is noticed, damage to the picture itself only by decode.

    --grids decodes the indices and writes a PNG file: for every grid a map of the bits that each cell took, black for
    none to white for most, then the indices of each group as shades of grey. The last three options are for it.
    """
    if grids is not None:
        if len(files) > 1:
            raise click.UsageError("--grids draws one file: give it one")
        if grids in ("-", "/dev/stdout"):
            raise click.UsageError("--grids and the facts cannot both go to standard output: name a file")
        refuse_clashes([Job(files[0], grids)], force)
    failed = False
    for source in files:
        try:
            data = read_file(source)
            with blame(title(source)):
                facts = {"file": source, **_facts(data)}
            if as_json:
                click.echo(json.dumps(facts))
            else:
                _show_facts(facts)
            if grids is not None:
                _draw_grids(source, data, grids, force, weights, max_pixels)
        except VqcodecError as error:
            _complain(str(error))
            failed = True
    if failed:
        raise click.exceptions.Exit(1)


def _draw_grids(source: str, data: bytes, target: str, force: bool, weights: str | None, max_pixels: int) -> None:
    from bitstream.indices import IndexCoder
    from bitstream.weights import Weights
    from vqcodec.grids import draw_grids

    with blame():
        coder = IndexCoder(Weights.load(weights or SHIPPED))
    drawn = BytesIO()
    with blame(title(source)), _bar(source):
        draw_grids(coder, data, max_pixels).save(drawn, "PNG")
    write_file(target, drawn.getbuffer(), force)


def _facts(data: bytes) -> dict[str, Any]:
    from bitstream import container

    parts = container.unpack(data, max_pixels=container.NO_LIMIT)
    header = parts.header
    contents = {f"grid{k}": grid for k, grid in enumerate(parts.grids, start=1)}
    contents |= {name: getattr(parts, name) for name in container.OPTIONAL_CHUNKS}
    facts = {
        "bytes": len(data),
        "version": container.VERSION,
        "width": header.width,
        "height": header.height,
        "mode": header.colour.shown.name,
        "level": header.level,
        "tune": TUNES[header.visual],
        "bpp": round(8 * len(data) / (header.width * header.height), 4),
        "fingerprint": header.fingerprint.hex(),
        "chunks": {name: len(content) for name, content in contents.items() if content is not None},
    }
    if parts.exif or parts.icc:
        from vqcodec.about import metadata_facts  # needs Pillow

        facts |= metadata_facts(parts.exif, parts.icc)
    return facts


def _show_facts(facts: dict[str, Any]) -> None:
    rows = {
        "size": "{width} x {height} pixels, {mode}".format(**facts),
        "quality": "level {level}, tune {tune}".format(**facts),
        "file": "{bytes:,} bytes, {bpp:.3f} bpp, format version {version}".format(**facts),
        "model": facts["fingerprint"],
    }
    rows |= {name: _printable(facts[name]) for name in ("camera", "date", "profile") if name in facts}
    for name, size in facts["chunks"].items():
        rows[name] = f"{size:,} bytes{_GRIDS.get(name, '') if 'grid3' not in facts['chunks'] else ''}"
    click.secho(_printable(title(facts["file"])), bold=True)
    for name, fact in rows.items():
        click.echo(f"  {name:{max(map(len, rows))}}    {fact}")


_GRIDS = {"grid1": ", top: what is where", "grid2": ", bottom: the details"}


@main.command(epilog=_EXIT_CODES)
@click.argument("picture", metavar="PICTURE", type=click.Path())
@click.option("-o", "--output", "out", metavar="HTML", type=click.Path(), help="Where to.  [default: beside PICTURE]")
@click.option(
    "-q",
    "--quality",
    "qualities",
    metavar="Q",
    type=_Quality(),
    multiple=True,
    default=(1, 3, 5, 7),
    help="As in encode; give it again for another row.",
)
@_tune(default=DEFAULT_TUNE)
@_force
@_device
@_weights
@_max_pixels
def compare(
    picture: str,
    out: str | None,
    qualities: tuple[float, ...],
    tune: Tune,
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
      vqcodec compare photo.png --tune psnr

    The page holds everything: a slider between any two pictures, the original, then for every quality the .vq2
    file's picture and what the others make of at most as many bytes, each with its quality, size, PSNR and, where
    libjxl's program ssimulacra2 is installed, SSIMULACRA2. Colours are in sRGB, transparency and metadata are left out.
    """
    plan = plan_jobs([picture], out, ".html", force)
    source, target = plan.jobs[0].source, plan.jobs[0].target
    data = read_file(source)
    codec = _load(weights, device)
    _check_qualities(codec, qualities)
    from vqcodec.image import read
    from vqcodec.look import compare as rows_of
    from vqcodec.look import page, source_facts

    with blame(title(source)), _bar(source) as progress:
        original, rows = read(data, max_pixels), []
        for row in rows_of(codec, original, qualities, tune):
            rows.append(row)
            if progress:
                progress(len(rows) / len(qualities))
    facts = source_facts(data, original)
    write_file(target, page(storage.split(source)[1], original, rows, facts), force)
    _warn(title(source), original.notes)
    if target != "-":
        _echo(_printable(target))


class _Dimensions(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        from bitstream.container import MAX_SIDE

        sides = re.fullmatch(r"(\d{1,9})x(\d{1,9})", str(value).lower(), re.ASCII)
        width, height = map(int, sides.groups()) if sides else (0, 0)
        if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
            self.fail(f"{value!r} is not a size of 1 to {MAX_SIDE} pixels a side: write it like 256x192", param, ctx)
        return width, height


@main.command(epilog=_EXIT_CODES)
@click.option("-o", "--output", "out", metavar="OUT", type=click.Path(), required=True, help="Folder to write.")
@click.option("-n", "--number", metavar="N", type=_count, default=1, help="Pictures to draw.")
@click.option("--size", metavar="WxH", type=_Dimensions(), default="256x256", help="In pixels.")
@_quality
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, help="Of the first; others count on.")
@click.option(
    "--temperature",
    metavar="T",
    type=_positive,
    default=0.8,
    help="1 for the model's own odds, less for what is more likely: calmer, to a point more like a photo.",
)
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
    targets = {n: os.path.join(out, f"sample-{n}.png") for n in range(seed, seed + number)}
    refuse_clashes([Job(top_from or "", target) for target in targets.values()], force)
    top = None if top_from is None else read_file(top_from)
    codec = _load(weights, device)
    _check_qualities(codec, [quality] if top is None else [])
    for n, target in targets.items():
        with blame(title(top_from or target)), _bar(target):
            if top is None:
                drawn = codec.sample(*size, quality, seed=n, temperature=temperature, max_pixels=max_pixels)
            else:
                drawn = codec.sample_from(top, seed=n, temperature=temperature, max_pixels=max_pixels)
        encoded = BytesIO()
        drawn.save(encoded, "PNG")
        write_file(target, encoded.getbuffer(), force)
        _echo(_printable(target))


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


_path, _folder = click.Path(path_type=Path), click.Path(path_type=Path, file_okay=False)


@main.command(epilog=_EXIT_CODES)
@click.argument("images", metavar="IMAGES", type=_path)
@click.option("-o", "--output", metavar="RUN", type=_folder, required=True, help="Folder to write.")
@click.option(
    "--stage",
    type=click.Choice(STAGES),
    default="vqvae",
    help="Everything from scratch, everything from trained weights, all that reads codes, decoder and "
    "priors on recorded codes, the encoder's last layers, or the gains and biases of --tune visual.",
)
@click.option(
    "--config",
    type=click.Choice(list(CONFIGS)),
    help=f"Layout of the model.  [default: {PRODUCT.name}, or that of --start]",
)
@click.option("--start", metavar="FILE", type=_path, help="Weights to start from.")
@click.option(
    "--mix",
    metavar="FOLDER SHARE",
    type=(_path, click.FloatRange(0, 1, min_open=True, max_open=True)),
    multiple=True,
    help="Another folder, and its share of the crops: 0.08, for example.",
)
@click.option("--steps", metavar="N", type=_count, help="Length of the run in steps...")
@click.option("--hours", metavar="H", type=_positive, help="... or in hours.")
@click.option("--batch", metavar="N", type=_count, default=8, help="Crops per step and process.")
@click.option("--crop", metavar="N", type=_count, default=256, help="Side of a crop in pixels.")
@click.option("--seed", metavar="N", type=int, default=0, help="Of weights and crops.")
def train(
    images: Path,
    output: Path,
    stage: Stage,
    config: str | None,
    start: Path | None,
    mix: tuple[tuple[Path, float], ...],
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
      vqcodec train pictures/ --mix screenshots/ 0.08 -o runs/both --hours 10
      torchrun --nproc-per-node 4 -m vqcodec -- train ...

    RUN gets log.jsonl and, every few minutes, a checkpoint and model.safetensors, the weights so far, which
    encode and decode take as --weights. To resume a run, give the same command again. The pictures are kept
    uncompressed in a folder "cache" beside RUN.
    """
    if (steps is None) == (hours is None):
        raise click.UsageError("say how long: either --steps or --hours")
    if start and config:
        raise click.UsageError("--start brings its own layout: leave --config out")
    if stage != "vqvae" and not start:
        raise click.UsageError(f"stage {stage} needs trained weights: give them with --start")
    if (shares := sum(share for _, share in mix)) >= 1:
        raise click.UsageError(f"the shares of --mix add up to {shares:g}: leave some for {images}")
    from vqcodec.image import find_images
    from vqcodec.training import trainer
    from vqcodec.weights import load_weights

    first = os.environ.get("RANK", "0") == "0"  # under torchrun one of many
    for folder in (images, *(folder for folder, _ in mix)):
        with blame(str(folder)):
            find_images(folder)  # before RUN is made
    with blame():
        layout = load_weights(start).config if start else CONFIGS[config or PRODUCT.name]
    with blame():
        run = trainer.Run(layout, images, output, stage, steps, hours, batch, crop, seed, start, mix)
        trainer.train(run, click.echo if first else lambda _: None)
    if first:
        click.echo(output / "model.safetensors")


if __name__ == "__main__":
    main()
