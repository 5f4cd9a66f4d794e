"""The command line of the benchmarks, and the only file of them that prints."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

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
qualities_option = click.option("--qualities", callback=numbers(float), help="Such as 1,2.5,4; all levels by default.")


@click.group()
def main() -> None:
    """Measure vqcodec on real files. Results are saved as JSON with machine, versions and commit."""


@main.command()
@folder_argument
@output_option
@weights_option
@qualities_option
@click.option("--rivals", callback=names, help="Such as jpeg,webp; all by default.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Images at a time.")
@click.option("--fresh", is_flag=True, help="Measure the rivals again, too.")
@click.option("--published", is_flag=True, help="Add published curves; the images must be the Kodak set.")
def rd(folder: Path, output: Path | None, **options: Any) -> None:
    """Rate-distortion of vq2 and its rivals on the images of a folder."""
    from benchmarks import rd

    if options["rivals"] is None:
        del options["rivals"]
    _finish(rd.table, lambda: rd.run(folder, output or _default("rd", folder), tell=_tell, **options))


@main.command()
@output_option
@weights_option
@click.option("--size", "sizes", multiple=True, callback=sizes, help="WxH; 768x512 and 4000x3000 by default.")
@click.option("--threads", default="1", show_default=True, callback=numbers(int), help="Such as 1,2.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1))
@click.option("--quality", type=float, help="5, or the model's best, by default.")
@click.option("--image", type=file_type, help="Instead of 1/f noise.")
def speed(output: Path | None, **options: Any) -> None:
    """Time by stage and peak memory of encoding and decoding."""
    from benchmarks import speed

    _finish(speed.table, lambda: speed.run(output or Path("results", "speed"), tell=_tell, **options))


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
    return Path("results", f"{name}-{folder.resolve().name}")


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
