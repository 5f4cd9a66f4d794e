"""The curve of a training log."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import training


def row(
    step: int, hours: float, level_psnr: list[float | None], level_bpp: list[float | None] | None = None
) -> dict[str, Any]:
    rest = {"loss": 5 / step, "psnr": 20 + step / 100, "bpp": 100 / step, "perplexity": "1,2"}
    levels = {"level_psnr": level_psnr, "level_bpp": [0.1] * len(level_psnr) if level_bpp is None else level_bpp}
    return {"step": step, "hours": hours, **rest, **levels}


def written(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_runs_follow_each_other(tmp_path: Path) -> None:
    steps = [(50, 0.5), (100, 1.0), (150, 1.5), (50, 0.25), (100, 0.75), (50, 0.5)]
    log = written([row(step, hours, [30.0, 40.0]) for step, hours in steps], tmp_path / "log.jsonl")
    found = training.runs(log)
    assert [x for run in found for x in run.along("step")] == [50, 100, 150, 200, 250, 300]
    assert [x for run in found for x in run.along("hours")] == [0.5, 1.0, 1.5, 1.75, 2.25, 2.75]
    result = training.run(log, tmp_path / "out" / "curve")
    assert [run["step"] for run in result["runs"]] == [150, 100, 50]
    assert "150    1.50  21.50" in training.table(result)
    with Image.open(tmp_path / "out" / "curve.png") as image:
        assert image.width == 1500
    drawn = (tmp_path / "out" / "curve.svg").read_text()
    training.run(log, tmp_path / "out" / "curve")
    assert (tmp_path / "out" / "curve.svg").read_text() == drawn  # the same file for the same numbers


def test_levels_are_medians_of_the_rows_that_have_them(tmp_path: Path) -> None:
    levels = [([1.0, None], [0.5, None]), ([3.0, None], [1.5, 7.0]), ([9.0, 6.0], [2.5, None])]
    rows = [row(step, step / 100, *both) for step, both in enumerate(levels, 1)]
    (found,) = training.runs(written(rows, tmp_path / "log.jsonl"))
    np.testing.assert_array_equal(found.by_level("psnr"), [[1, 2, 3], [np.nan, np.nan, 6]])
    np.testing.assert_array_equal(found.by_level("bpp"), [[0.5, 1, 1.5], [np.nan, 7, 7]])
    training.run(tmp_path / "log.jsonl", tmp_path / "curve")


def test_bits_of_half_a_batch_are_not_of_levels(tmp_path: Path) -> None:
    """As older logs have them, in front of rows of today."""
    rows = [row(1, 0.1, [20.0, 30.0], [0.7]), row(2, 0.2, [22.0, 32.0], [0.1, 0.2])]
    (found,) = training.runs(written(rows, tmp_path / "log.jsonl"))
    np.testing.assert_array_equal(found.by_level("psnr"), [[20, 21], [30, 31]])
    np.testing.assert_array_equal(found.by_level("bpp"), [[np.nan, 0.1], [np.nan, 0.2]])


@pytest.mark.parametrize("text", ["", "nonsense\n", '{"step": 1}\n', "[1]\n"])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    with pytest.raises(ValueError, match="log.jsonl"):
        training.run(log, tmp_path / "x")


def test_the_shipped_log_can_be_drawn(tmp_path: Path) -> None:
    log = Path(__file__).parents[1] / "vqcodec" / "weights" / "training-log.jsonl"
    assert training.run(log, tmp_path / "curve")["runs"]
