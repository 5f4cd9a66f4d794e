"""The curve of a training log, as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import corpus

PANELS = {"psnr": "PSNR of crops (dB)", "bpp": "bits per pixel", "loss": "loss"}
AXES = {"step": "step", "hours": "hours"}
SMOOTH = 20  # rows: what a row says of a level is of a single crop


class Run(NamedTuple):
    """A run in a log: its rows, and the step and the hours at which the runs before it ended."""

    rows: list[dict[str, Any]]
    before: dict[str, float]

    def along(self, axis: str) -> list[float]:
        return [self.before[axis] + row[axis] for row in self.rows]


def run(log: Path, output: Path, *, levels: int = 8) -> dict[str, Any]:
    """Draw OUTPUT.png and OUTPUT.svg: PSNR, bits per pixel and loss against steps and hours.

    log: the rows that `vqcodec train` writes; where the steps start again, another run begins. levels: of the model,
    for the curves of the levels, which need batches with every level equally often. Raises ValueError for anything
    else than such a log.
    """
    found = runs(log)
    draw(output, found, levels)
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
            row["level_psnr"] = list(map(float, row["level_psnr"]))
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


def by_level(rows: Sequence[dict[str, Any]], levels: int) -> list[list[float]]:
    """PSNR of each level over the rows, the median of the last SMOOTH of them; none if the crops of a row, in the order
    of their levels, are not equally many of each."""
    counts = {len(row["level_psnr"]) for row in rows}
    if len(counts) > 1 or counts == {0} or min(counts) % levels:
        return []
    psnr = np.array([row["level_psnr"] for row in rows]).reshape(len(rows), levels, -1).mean(2)
    ends = range(1, len(rows) + 1)
    return np.stack([np.median(psnr[max(0, end - SMOOTH) : end], 0) for end in ends], 1).tolist()


def draw(output: Path, found: Sequence[Run], levels: int) -> None:
    pyplot = corpus.pyplot()
    figure, grid = pyplot.subplots(
        len(PANELS), len(AXES), figsize=(10, 9), layout="constrained", sharex="col", sharey="row"
    )
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.9, levels))
    for (key, title), row in zip(PANELS.items(), grid, strict=True):
        for axis, axes in zip(AXES, row, strict=True):
            for one in found:
                x = one.along(axis)
                for level, curve in enumerate(by_level(one.rows, levels) if key == "psnr" else []):
                    label = f"level {level + 1}" if one is found[0] else None
                    axes.plot(x, curve, color=colours[level], linewidth=1, label=label)
                label = "mean" if one is found[0] else None
                axes.plot(x, [r[key] for r in one.rows], color="black", linewidth=1.5, label=label)
                if one is not found[0]:
                    axes.axvline(one.before[axis], color="grey", linestyle=":")
            axes.grid(alpha=0.3)
        row[0].set_ylabel(title)
    for axes, title in zip(grid[-1], AXES.values(), strict=True):
        axes.set_xlabel(title)
    grid[0][1].legend(ncols=3, fontsize="small")
    corpus.save_figure(output, figure)


def table(result: dict[str, Any]) -> str:
    lines = [result["path"], f"{'run':>3} {'steps':>7} {'hours':>7} {'PSNR':>6} {'bpp':>7} {'loss':>8}   at its end"]
    for number, row in enumerate(result["runs"], 1):
        numbers = f"{row['step']:>7} {row['hours']:7.2f} {row['psnr']:6.2f} {row['bpp']:7.4f} {row['loss']:8.4f}"
        lines.append(f"{number:>3} {numbers}")
    return "\n".join(lines)
