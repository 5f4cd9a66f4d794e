"""The command line of the benchmarks, and the only file of them that prints."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from vqcodec.config import DEFAULT_TUNE, TUNES

Parse = Callable[[click.Context, click.Parameter, Any], Any]


def numbers(kind: Callable[[str], float]) -> Parse:
    """1,2.5,4"""

    def parse(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
        try:
            return None if value is None else tuple(kind(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list of numbers such as 1,2,4") from None

    return parse


def names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """jpeg,webp"""
    from benchmarks.codecs import RIVALS

    chosen = None if value is None else tuple(value.split(","))
    for name in chosen or ():
        if name not in RIVALS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(RIVALS)}")
    return chosen


def sizes(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, int]]:
    """768x512"""
    pairs = [value.split("x") for value in values]
    for value, pair in zip(values, pairs, strict=True):
        if len(pair) != 2 or not all(side.isdecimal() and int(side) for side in pair):
            raise click.BadParameter(f"{value!r} is not a size such as 768x512")
    return [(int(width), int(height)) for width, height in pairs]


file_type = click.Path(exists=True, dir_okay=False, path_type=Path)
folder_argument = click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
output_option = click.option("-o", "--output", type=click.Path(path_type=Path), help="results/NAME, without an ending.")
weights_option = click.option("--weights", type=file_type, help="Instead of the shipped ones.")
tune_option = click.option(
    "--tune", type=click.Choice(TUNES), default=DEFAULT_TUNE, show_default=True, help="Of the .vq2 files."
)
qualities_option = click.option("--qualities", callback=numbers(float), help="Such as 1,2.5,4; all levels by default.")


@click.group()
def main() -> None:
    """Measure vqcodec on real files. Results are saved as JSON with machine, versions and commit."""


@main.command()
@folder_argument
@output_option
@weights_option
@qualities_option
@tune_option
@click.option("--rivals", callback=names, help="Such as jpeg,webp; all by default.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option("--fresh", is_flag=True, help="Measure the rivals again, too.")
@click.option("--published", is_flag=True, help="Add published curves; the images must be the Kodak set.")
@click.option("--html/--no-html", default=True, help="Write NAME.html, too; default: do.")
def rd(folder: Path, output: Path | None, html: bool, **options: Any) -> None:
    """Rate-distortion of vq2 and its rivals on the images of a folder."""
    from benchmarks import rd, report

    if options["rivals"] is None:
        del options["rivals"]
    output = output or _default("rd", folder)

    def run() -> dict[str, Any]:
        with _bar() as (tell, step):
            result = rd.run(folder, output, tell=tell, step=step, **options)
            if html:
                report.run(folder, output, weights=options["weights"], tell=tell)
        return result

    _finish(rd.table, run)


@main.command()
@folder_argument
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="results/NAME of rd.")
@weights_option
@click.option(
    "--qualities",
    default="3",
    show_default=True,
    callback=numbers(float),
    help="Of the .vq2 files, such as 2,4,6; the rivals get as many bytes.",
)
@click.option("--crops", default=3, show_default=True, type=click.IntRange(0), help="Images to show the middle of.")
@click.option("--crop", "chosen", multiple=True, metavar="NAME+X+Y", help="Where to crop, instead of --crops.")
def report(folder: Path, output: Path, chosen: tuple[str, ...], **options: Any) -> None:
    """Write NAME.html again, from NAME.json of rd, and speed.json if that is beside it."""
    from benchmarks import report

    def run() -> dict[str, Any]:
        return report.run(folder, output, chosen=[*map(report.parse_place, chosen)], tell=_tell, **options)

    _finish(report.table, run)


@main.command()
@output_option
@weights_option
@click.option("--size", "sizes", multiple=True, callback=sizes, help="WxH; by default 768x512, 4000x3000, 8688x5792.")
@click.option("--threads", default="1", show_default=True, callback=numbers(int), help="Such as 1,2.")
@click.option("--device", "devices", multiple=True, type=click.Choice(("cpu", "cuda")), help="All by default.")
@click.option("--rivals", callback=names, help="Such as jpeg,webp; all but the 4:4:4 ones by default.")
@click.option("--compressai", type=file_type, help="The Python of an environment with CompressAI.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1))
@click.option("--quality", type=float, help="5, or the model's best, by default.")
@tune_option
@click.option("--image", type=file_type, help="Instead of 1/f noise.")
def speed(output: Path | None, **options: Any) -> None:
    """Time by stage and peak memory of encoding and decoding."""
    from benchmarks import speed

    if options["rivals"] is None:
        del options["rivals"]
    _finish(speed.table, lambda: speed.run(output or Path("results", "speed"), tell=_tell, **options))


@main.command()
@folder_argument
@output_option
@weights_option
@qualities_option
@click.option(
    "--prior", "priors", multiple=True, type=file_type, help="Weights with the same codebooks and another prior."
)
@click.option("--efforts", default="1", show_default=True, callback=numbers(int), help="To compare with 0: 1,2,3.")
def ablate(folder: Path, output: Path | None, **options: Any) -> None:
    """What the rate-constrained choice, the encoder's effort and each part of the prior buy."""
    from benchmarks import ablate

    _finish(
        ablate.table,
        lambda: ablate.run(folder, output or _default("ablate", folder), tell=_tell, **options),
    )


@main.command()
@folder_argument
@output_option
@weights_option
@qualities_option
def entropy(folder: Path, output: Path | None, **options: Any) -> None:
    """Where the bits of .vq2 files go."""
    from benchmarks import entropy

    _finish(
        entropy.table,
        lambda: entropy.run(folder, output or _default("entropy", folder), tell=_tell, **options),
    )


@main.command()
@click.argument("log", type=file_type)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="results/NAME, without an ending.")
def training(log: Path, output: Path) -> None:
    """Draw the curve of a log of `vqcodec train`."""
    from benchmarks import training

    _finish(training.table, lambda: training.run(log, output))


@main.command()
@click.argument("image", type=file_type)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="A PNG file.")
@weights_option
@click.option("--quality", default=3.0, show_default=True, help="Of the .vq2 file; JPEG and WebP get as many bytes.")
@click.option("--crop", default="288x256+240+120", show_default=True, help="WxH+X+Y, the part that is shown.")
def picture(image: Path, output: Path, weights: Path | None, quality: float, crop: str) -> None:
    """The original, JPEG, WebP and vq2 side by side, at the same number of bytes."""
    from benchmarks import picture

    def run() -> dict[str, Any]:
        return picture.run(image, output, weights=weights, quality=quality, crop=picture.parse_crop(crop))

    _finish(picture.table, run)


def _default(name: str, folder: Path) -> Path:
    from benchmarks import corpus

    return Path("results", f"{name}-{corpus.name_of(folder)}")


@contextmanager
def _bar() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """A progress bar on a terminal: a function to tell a line, and one to tell how many are done of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), "images, left", TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def step(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield (partial(console.print, markup=False) if console.is_terminal else _tell), step


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _finish(table: Callable[[dict[str, Any]], str], run: Callable[[], dict[str, Any]]) -> None:
    """Print the table; what the user can mend is one line, not a traceback."""
    from bitstream.errors import VqcodecError

    try:
        click.echo(table(run()))
    except (VqcodecError, OSError, ValueError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        click.echo(f"error: {error}: pip install 'vqcodec[bench]'", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
