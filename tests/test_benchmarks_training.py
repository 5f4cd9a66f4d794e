"""The curve of a training log."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import training


def row(step: int, hours: float, level_psnr: list[float]) -> dict[str, Any]:
    rest = {"loss": 5 / step, "psnr": 20 + step / 100, "bpp": 100 / step, "perplexity": "1,2", "level_bpp": [0.1]}
    return {"step": step, "hours": hours, "level_psnr": level_psnr, **rest}


def written(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_runs_follow_each_other(tmp_path: Path) -> None:
    steps = [(50, 0.5), (100, 1.0), (150, 1.5), (50, 0.25), (100, 0.75), (50, 0.5)]
    log = written([row(step, hours, [30.0, 40.0]) for step, hours in steps], tmp_path / "log.jsonl")
    found = training.runs(log)
    assert [x for run in found for x in run.along("step")] == [50, 100, 150, 200, 250, 300]
    assert [x for run in found for x in run.along("hours")] == [0.5, 1.0, 1.5, 1.75, 2.25, 2.75]
    result = training.run(log, tmp_path / "out" / "curve", levels=2)
    assert [run["step"] for run in result["runs"]] == [150, 100, 50]
    assert "150    1.50  21.50" in training.table(result)
    with Image.open(tmp_path / "out" / "curve.png") as image:
        assert image.width == 1500
    drawn = (tmp_path / "out" / "curve.svg").read_text()
    training.run(log, tmp_path / "out" / "curve", levels=2)
    assert (tmp_path / "out" / "curve.svg").read_text() == drawn  # the same file for the same numbers


def test_levels_are_told_apart_where_every_one_is_equally_often_in_a_batch() -> None:
    rows = [row(step, step / 100, [1.0 * step, 3.0 * step, 10.0, 20.0]) for step in (1, 2, 9)]
    assert training.by_level(rows, 2) == [[2, 3, 4], [15, 15, 15]]  # medians of 2, 4 and 18, and of 15
    assert training.by_level(rows, 3) == []
    assert training.by_level([*rows, row(10, 0.1, [1.0, 2.0])], 2) == []


@pytest.mark.parametrize("text", ["", "nonsense\n", '{"step": 1}\n', "[1]\n"])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    with pytest.raises(ValueError, match="log.jsonl"):
        training.run(log, tmp_path / "x")


def test_the_shipped_log_can_be_drawn(tmp_path: Path) -> None:
    log = Path(__file__).parents[1] / "vqcodec" / "weights" / "training-log.jsonl"
    assert training.run(log, tmp_path / "curve")["runs"]
