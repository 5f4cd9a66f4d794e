"""The curve of a training log, as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks import corpus

PANELS = {"psnr": "PSNR of crops (dB)", "bpp": "bits per pixel", "loss": "loss"}
BY_LEVEL = {"psnr": "level_psnr", "bpp": "level_bpp"}
AXES = {"step": "step", "hours": "hours"}
SMOOTH = 20  # rows: what a row says of a level is of few crops


class Run(NamedTuple):
    """A run in a log: its rows, and the step and the hours at which the runs before it ended."""

    rows: list[dict[str, Any]]
    before: dict[str, float]

    def along(self, axis: str) -> list[float]:
        return [self.before[axis] + row[axis] for row in self.rows]

    def by_level(self, panel: str) -> NDArray[np.float64]:
        """(levels, rows) of a panel, medians of the last SMOOTH rows; NaN where none of these has a value."""
        levels = len(self.rows[0]["level_psnr"])
        values = [row[BY_LEVEL[panel]] for row in self.rows]
        found = np.ma.masked_invalid([row if len(row) == levels else [np.nan] * levels for row in values])
        ends = range(1, len(found) + 1)
        return np.stack([np.ma.median(found[max(0, end - SMOOTH) : end], 0).filled(np.nan) for end in ends], 1)


def run(log: Path, output: Path) -> dict[str, Any]:
    """Draw OUTPUT.png and OUTPUT.svg: PSNR, bits per pixel and loss against steps and hours.

    log: the rows that `vqcodec train` writes; where the steps start again, another run begins. Older versions listed
    the last batch instead of levels: the PSNR of one crop of each level, so read alike, and the bits per pixel of half
    of them, which are not drawn. Raises ValueError for anything else than such a log.
    """
    found = runs(log)
    draw(output, found)
    return {
        "path": str(corpus.beside(output, ".png")),
        "runs": [{key: one.rows[-1][key] for key in (*AXES, *PANELS)} for one in found],
    }


def runs(log: Path) -> list[Run]:
    """The runs of a log, one behind the other."""
    found: list[Run] = []
    for number, line in enumerate(log.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            step = [float(row[key]) for key in (*AXES, *PANELS)][0]
            for key in BY_LEVEL.values():
                row[key] = [np.nan if value is None else float(value) for value in row[key]]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{log}, line {number} is not a row of a training log") from None
        if not found:
            found.append(Run([], dict.fromkeys(AXES, 0.0)))
        elif step <= found[-1].rows[-1]["step"]:
            found.append(Run([], {axis: found[-1].along(axis)[-1] for axis in AXES}))
        found[-1].rows.append(row)
    if not found:
        raise ValueError(f"{log} is empty")
    return found


def draw(output: Path, found: Sequence[Run]) -> None:
    pyplot = corpus.pyplot()
    figure, grid = pyplot.subplots(
        len(PANELS), len(AXES), figsize=(10, 9), layout="constrained", sharex="col", sharey="row"
    )
    colour = pyplot.get_cmap("viridis")
    for (panel, title), row in zip(PANELS.items(), grid, strict=True):
        for axis, axes in zip(AXES, row, strict=True):
            for one in found:
                x, levels = one.along(axis), one.by_level(panel) if panel in BY_LEVEL else ()
                for level, curve in enumerate(levels):
                    label = f"level {level + 1}" if one is found[0] else None
                    axes.plot(x, curve, color=colour(0.9 * level / len(levels)), linewidth=1, label=label)
                label = "mean" if one is found[0] else None
                axes.plot(x, [r[panel] for r in one.rows], color="black", linewidth=1.5, label=label)
                if one is not found[0]:
                    axes.axvline(one.before[axis], color="grey", linestyle=":")
            axes.grid(alpha=0.3)
        row[0].set_ylabel(title)
    for axes, title in zip(grid[-1], AXES.values(), strict=True):
        axes.set_xlabel(title)
    grid[0][1].legend(ncols=3, fontsize="small", loc="upper right")  # "best" is slow
    corpus.save_figure(output, figure)


def table(result: dict[str, Any]) -> str:
    lines = [result["path"], f"{'run':>3} {'steps':>7} {'hours':>7} {'PSNR':>6} {'bpp':>7} {'loss':>8}   at its end"]
    for number, row in enumerate(result["runs"], 1):
        numbers = f"{row['step']:>7} {row['hours']:7.2f} {row['psnr']:6.2f} {row['bpp']:7.4f} {row['loss']:8.4f}"
        lines.append(f"{number:>3} {numbers}")
    return "\n".join(lines)
