"""The figures of the README that test_readme.py does not compare with the committed results: comparisons and speed."""

import csv
import json
import re
from pathlib import Path

from benchmarks.metrics import Curve, bd_rate, relative_size

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8").replace("\N{MINUS SIGN}", "-")
RESULTS = ROOT / "benchmarks" / "results"
RIVALS = {"JPEG": "jpeg", "WebP": "webp", "AVIF": "avif-420", "JPEG XL": "jxl", "JPEG 2000": "jpeg2000"}


def curves(metric: str) -> dict[str, Curve]:
    with (RESULTS / "kodak-mean.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for codec in {row["codec"] for row in rows}:
        points = sorted((float(row["bpp"]), float(row[metric])) for row in rows if row["codec"] == codec)
        found[codec] = Curve(*zip(*points, strict=True))
    return found


def rising(curve: Curve) -> Curve:
    """The qualities before the first that costs more and gives less: nobody would use that one."""
    ends = [k for k, (a, b) in enumerate(zip(curve.score, curve.score[1:], strict=False), 1) if b <= a]
    end = ends[0] if ends else len(curve.score)
    return Curve(curve.bpp[:end], curve.score[:end])


def test_the_bd_rates_of_the_readme_are_those_of_the_committed_results() -> None:
    measured = curves("psnr")
    claims = re.findall(r"([+-]?\d+\.\d) % against (JPEG XL|JPEG 2000|JPEG|WebP|AVIF)", README)
    assert {name for _, name in claims} >= {"JPEG", "WebP"}
    for claim, name in claims:
        percent = bd_rate(measured[RIVALS[name]], rising(measured["vq2"])).percent
        assert percent is not None
        assert f"{percent:+.1f}" == claim, name


def test_the_ms_ssim_and_sizes_of_the_readme_are_those_of_the_committed_results() -> None:
    measured = curves("psnr")
    table = re.findall(r"^\| \d \| [\d.]+ \| [\d.]+ \| ([\d.]+) \| (\d+) % \| (\d+) % \|", README, re.MULTILINE)
    assert len(table) == 8
    for k, claims in enumerate(table):
        point = measured["vq2"].bpp[k], measured["vq2"].score[k]
        sizes = [relative_size(*point, measured[name]) for name in ("jpeg", "webp")]
        assert (f"{curves('ms_ssim')['vq2'].score[k]:.4f}", *(f"{size:.0f}" for size in sizes)) == claims


def test_the_speed_of_the_readme_is_that_of_the_committed_results() -> None:
    rows = json.loads((RESULTS / "speed.json").read_text("utf-8"))["rows"]
    threads = max(row["threads"] for row in rows)
    ours = [row for row in rows if row.get("codec", "vq2") == "vq2" and row["threads"] == threads]
    table = re.findall(r"^\| (\d+) x (\d+) \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+) GB \|", README, re.MULTILINE)
    assert table
    for width, height, encode, decode, memory in table:
        here = {row["direction"]: row for row in ours if (row["width"], row["height"]) == (int(width), int(height))}
        for claim, direction in ((encode, "encode"), (decode, "decode")):
            digits = len(claim.partition(".")[2])
            assert f"{here[direction]['seconds']['total']:.{digits}f}" == claim
        assert f"{max(row['peak_memory_bytes'] for row in here.values()) / 1e9:.1f}" == memory
