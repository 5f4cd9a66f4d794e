"""The benchmarks: metrics against values known from elsewhere, and tiny runs from end to end."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_model import WEIGHTS

from benchmarks import codecs, machine, metrics, rd, speed, timing
from benchmarks.__main__ import main
from benchmarks.metrics import Curve, bd_rate, psnr, relative_size
from vqcodec import Codec
from vqcodec.metrics import butteraugli, ssimulacra2


def grey(level: int, height: int = 8, width: int = 8) -> metrics.Bytes:
    return np.full((height, width, 3), level, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of odd sides, one that is damaged, and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(speed.pink_noise(96, 64)).save(folder / "b.png")
    Image.fromarray(speed.pink_noise(51, 71, seed=1)).save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "b.png").read_bytes()[:2000])
    (folder / "README.md").write_text("not an image")
    return folder


# --- metrics ---


def test_psnr_is_one_mean_over_pixels_and_channels() -> None:
    image, other = grey(100), grey(100)
    other[..., 0] += 3  # a squared error of 9 in one channel of three
    assert psnr(image, other) == pytest.approx(10 * math.log10(255**2 / 3))
    assert psnr(grey(0), grey(255)) == 0
    assert psnr(grey(7), grey(8)) == pytest.approx(48.1308, abs=1e-4)  # the known value of an error of 1


def test_psnr_of_equal_images_is_finite() -> None:
    assert psnr(grey(1), grey(1)) == metrics.MAX_PSNR


def test_psnr_refuses_images_of_different_shapes() -> None:
    with pytest.raises(ValueError, match="shapes"):
        psnr(grey(1, 8, 9), grey(1, 9, 8))


def test_ms_ssim_of_flat_images_is_the_luminance_term_of_the_coarsest_scale() -> None:
    pytest.importorskip("pytorch_msssim")
    c1 = (0.01 * 255) ** 2
    luminance = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
    assert metrics.ms_ssim(grey(100, 176, 192), grey(120, 176, 192)) == pytest.approx(luminance**0.1333, abs=2e-4)
    assert metrics.ms_ssim(grey(100, 176, 161), grey(100, 176, 161)) == pytest.approx(1)


def test_ms_ssim_of_a_small_image_is_none() -> None:
    assert metrics.ms_ssim(grey(100, 176, 160), grey(100, 176, 160)) is None


@pytest.mark.skipif(not shutil.which("ssimulacra2"), reason="libjxl's program ssimulacra2 is not installed")
@pytest.mark.parametrize(("shift", "published"), [(0, 100.0), (5, 89.732), (10, 80.291), (20, 59.779)])
def test_ssimulacra2_equals_published_values(shift: int, published: float) -> None:
    # From the reference data of the Rust implementation, captured from libjxl; versions differ by less than a point.
    assert ssimulacra2(grey(128, 256, 256), grey(128 + shift, 256, 256)) == pytest.approx(published, abs=1)


@pytest.mark.skipif(os.name == "nt", reason="a shell script takes the place of the program")
@pytest.mark.parametrize(("program", "metric"), [("ssimulacra2", ssimulacra2), ("butteraugli_main", butteraugli)])
def test_libjxls_programs_get_the_original_first(
    program: str, metric: metrics.Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / program
    printed = "echo 3.25; echo 3-norm: -12.5"
    script.write_text(f'#!/bin/sh\ncp "$1" "{tmp_path}/first.png"; cp "$2" "{tmp_path}/second.png"; {printed}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert metric(grey(1), grey(2)) == -12.5
    found = [np.array(Image.open(tmp_path / name))[0, 0, 0] for name in ("first.png", "second.png")]
    assert found == [1, 2]


@pytest.mark.skipif(not shutil.which("butteraugli_main"), reason="libjxl's program is not installed")
@pytest.mark.parametrize(("shift", "recorded"), [(0, 0), (5, 10.698), (20, 42.075)])
def test_butteraugli_equals_recorded_values(shift: int, recorded: float) -> None:
    assert butteraugli(grey(128, 64, 64), grey(128 + shift, 64, 64)) == pytest.approx(recorded, rel=0.01)  # libjxl 0.11


def test_cvvdp_of_equal_images_is_10_and_falls_with_the_error() -> None:
    pytest.importorskip("pycvvdp")
    image = speed.pink_noise(96, 64)
    darker = [np.maximum(image, step) - step for step in (0, 8, 32)]
    scores = [metrics.cvvdp(image, other) for other in darker]
    assert scores[0] == 10
    assert scores[0] > scores[1] > scores[2] > 0


@pytest.mark.parametrize("metric", metrics.METRICS.values())
@pytest.mark.parametrize("sides", [(1, 1), (7, 300), (8, 9), (163, 35)])
def test_every_metric_has_a_value_or_none_for_small_and_odd_sides(
    metric: metrics.Metric, sides: tuple[int, int]
) -> None:
    image = np.random.RandomState(0).randint(0, 200, (*sides, 3)).astype(np.uint8)
    equal, other = metric(image, image), metric(image, image[::-1, ::-1] + 50)
    assert (equal is None) == (other is None)
    assert other is None or (math.isfinite(other) and other != equal)


def test_bits_per_pixel_counts_the_whole_file() -> None:
    assert metrics.bits_per_pixel(49152, 768 * 512) == 1


# --- curves ---


@pytest.mark.parametrize(
    ("anchor", "test", "published"),
    [
        # JCTVC-E137, with the results of the spreadsheet's interpolation as in the tests of Netflix's vmaf.
        (
            Curve((18883.6928, 33905.6656, 61279.976, 108048.8736), (34.2911, 37.247, 40.3953, 43.6471)),
            Curve((18910.912, 33928.7472, 61299.9936, 108061.2784), (34.3147, 37.2761, 40.4232, 43.6768)),
            -0.465215420752807,
        ),
        (
            Curve((1017.6184, 2394.488, 7622.7456, 40433.8848), (32.0603, 33.8977, 35.3756, 37.5761)),
            Curve((1017.0984, 2390.0944, 7587.0024, 40370.12), (32.0822, 33.9194, 35.4025, 37.5982)),
            -1.8779823450567612,
        ),
    ],
)
def test_bd_rate_equals_published_values(anchor: Curve, test: Curve, published: float) -> None:
    assert bd_rate(anchor, test).percent == pytest.approx(published, abs=1e-6)


CURVE = Curve((0.1, 0.2, 0.4, 0.8, 1.6), (28.0, 30.5, 33.0, 36.0, 39.0))


def test_bd_rate_of_half_the_bits_is_minus_50_percent() -> None:
    half = bd_rate(CURVE, Curve(tuple(x / 2 for x in CURVE.bpp), CURVE.score))
    assert half.percent == pytest.approx(-50)
    assert (half.low, half.high) == (28.0, 39.0)
    assert half.ranges == pytest.approx(
        {f"{a} to {a + 2}": -50 for a in range(28, 40, 2)}
    )  # half of the last is enough


def test_bd_rates_of_ranges_are_those_of_the_curves_there() -> None:
    bent = Curve(tuple(bpp * (0.5 if score <= 33 else 1) for bpp, score in zip(*CURVE, strict=True)), CURVE.score)
    found = bd_rate(CURVE, bent)
    assert found.ranges["28 to 30"] == pytest.approx(-50)
    logs = [math.log1p(percent / 100) for percent in found.ranges.values()]
    whole = (2 * sum(logs[:-1]) + 1 * logs[-1]) / 11  # of the last range, 38 to 40, the curves have a half
    assert found.percent == pytest.approx(100 * math.expm1(whole))
    short = bd_rate(CURVE, Curve(CURVE.bpp, (29.2, 31.0, 33.0, 35.0, 37.2)))
    assert list(short.ranges) == ["30 to 32", "32 to 34", "34 to 36", "36 to 38"]  # of 28 to 30, less than half


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        (Curve(CURVE.bpp, tuple(x + 10 for x in CURVE.score)), "share 1.00 dB, 5.50 are needed"),
        (Curve(CURVE.bpp, tuple(x + 20 for x in CURVE.score)), "share 0.00 dB"),
        (Curve(CURVE.bpp[:3], CURVE.score[:3]), "3 points, 4 are needed"),
        (Curve(CURVE.bpp, (28.0, 30.5, 30.4, 36.0, 39.0)), "does not rise"),
        (Curve((0.1, 0.2, 0.3, 0.4), (30.0, 30.3, 30.6, 30.9)), "share 0.90 dB, 2.00 are needed"),
    ],
)
def test_bd_rate_gives_a_reason_instead_of_a_doubtful_number(test: Curve, reason: str) -> None:
    found = bd_rate(CURVE, test)
    assert found.percent is None
    assert reason in found.reason


@pytest.mark.parametrize(
    ("metric", "scores", "low", "high"),
    [
        ("ms_ssim", (0.9, 0.95, 0.97, 0.98, 0.99), 10, 20),
        ("ssimulacra2", (-5.0, 20.0, 40.0, 60.0, 75.0), -5, 75),
        ("butteraugli", (5.0, 4.0, 3.0, 2.0, 1.0), -5, -1),
        ("cvvdp", (7.5, 8.5, 9.2, 9.6, 9.8), 7.5, 9.8),
    ],
)
def test_bd_rate_of_other_metrics(metric: str, scores: tuple[float, ...], low: float, high: float) -> None:
    anchor, half = Curve(CURVE.bpp, scores), Curve(tuple(x / 2 for x in CURVE.bpp), scores)
    found = bd_rate(anchor, half, metric)
    assert found.percent == pytest.approx(-50)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.ranges and all(percent == pytest.approx(-50) for percent in found.ranges.values())


def test_size_at_equal_psnr_is_interpolated_in_log_bpp() -> None:
    anchor = Curve((0.1, 0.4), (30.0, 34.0))
    assert relative_size(0.1, 32.0, anchor) == pytest.approx(50)  # half way between 0.1 and 0.4 is 0.2
    assert relative_size(0.1, 29.9, anchor) is None
    assert relative_size(0.1, 34.1, anchor) is None


def test_published_curves_have_sources_and_rise() -> None:
    entries = json.loads(rd.PUBLISHED.read_text("utf-8"))["curves"]
    assert len(entries) >= 4
    for entry in entries:
        assert entry["source"]
        assert all(np.diff(entry["points"], axis=0).min(axis=0) > 0)


# --- codecs ---


@pytest.mark.parametrize("name", codecs.RIVALS)
def test_every_rival_decodes_what_it_encodes_and_spends_bytes_on_quality(name: str) -> None:
    found, missing = codecs.available([name])
    if missing:
        pytest.skip(missing[name])
    (rival,) = found
    pixels = speed.pink_noise(71, 51)
    files = [rival.encode(pixels, quality) for quality in (rival.qualities[1], rival.qualities[-1])]
    scores = [psnr(pixels, rival.decode(file)) for file in files]
    assert len(files[0]) < len(files[1])
    assert scores[0] + 3 < scores[1]


def test_a_rival_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.features.check", lambda feature: feature not in ("avif", "jpg_2000"))
    monkeypatch.setitem(sys.modules, "pillow_jxl.JpegXLImagePlugin", None)
    found, missing = codecs.available()
    assert [rival.name for rival in found] == ["jpeg", "jpeg-444", "webp"]
    assert set(missing) == {"avif-420-psnr", "avif-444-psnr", "avif-444-iq", "jxl", "jpeg2000"}


def test_a_tuning_that_the_encoder_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codecs.RIVALS, "avif-444-iq", lambda: codecs._avif("4:4:4", "taste"))
    found, missing = codecs.available(["avif-444-iq"])
    assert found == []
    assert missing["avif-444-iq"].endswith("has no tune=taste")


def test_largest_within_finds_the_setting_below_a_size() -> None:
    tried = list[float]()

    def encode(pixels: metrics.Bytes, setting: float) -> bytes:
        tried.append(setting)
        return bytes(int(10 * setting))

    rival = codecs.Rival("fake", "", range(1, 101), (), encode, lambda data: grey(0))
    setting, data = codecs.largest_within(rival, grey(0), 375)
    assert (setting, len(data)) == (37, 370)
    assert len(tried) <= 8
    assert codecs.largest_within(rival, grey(0), 5) == (1, bytes(10))  # nothing fits: the smallest


# --- runs ---


def test_rd_measures_compares_saves_and_resumes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, told, steps = tmp_path / "results" / "small", list[str](), list[tuple[int, int]]()
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    options: dict[str, Any] = {"weights": WEIGHTS, "qualities": (1.0, 3.0), "rivals": ("jpeg",), "tell": told.append}
    result = rd.run(folder, output, published=True, step=lambda *counts: steps.append(counts), **options)
    assert steps == [(1, 3), (2, 3), (3, 3)]

    assert json.loads(output.with_suffix(".json").read_text()) == result
    assert result["corpus"]["images"] == 2
    assert "truncated" in result["corpus"]["skipped"]["broken.png"]
    assert told[2].startswith("broken.png: skipped")
    jpeg_qualities = codecs.RIVALS["jpeg"]().qualities
    assert len(result["rows"]) == 2 * (2 + len(jpeg_qualities))
    assert [name for name, _ in itertools.groupby(row["image"] for row in result["rows"])] == ["a.png", "b.png"]

    codec = Codec.load(WEIGHTS, device="cpu")
    pixels = np.array(Image.open(folder / "a.png"))
    data = codec.encode(pixels, 3)
    row = next(row for row in result["rows"] if (row["codec"], row["quality"]) == ("vq2", 3))
    assert (row["bytes"], row["bpp"]) == (len(data), 8 * len(data) / (51 * 71))
    assert row["psnr"] == psnr(pixels, np.array(codec.decode(data)))
    mean = next(row for row in result["means"] if (row["codec"], row["quality"]) == ("jpeg", 50))
    both = [row["psnr"] for row in result["rows"] if (row["codec"], row["quality"]) == ("jpeg", 50)]
    assert mean["psnr"] == pytest.approx(sum(both) / 2)

    with output.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["psnr"]) for row in rows] == [row["psnr"] for row in result["rows"]]
    assert output.with_name("small-mean.csv").exists()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in output.with_suffix(".svg").read_text()

    text = rd.table(result)
    assert "skipped broken.png" in text
    assert text.index("same mean PSNR") < text.index("BD-rate") < text.index("against VTM 18.0 *")

    assert set(result["bd_rate"]["psnr"]) == {"jpeg", *(f"{e['name']} *" for e in result["published"]["curves"])}
    assert result["bd_rate"]["psnr"]["jpeg"]["percent"] is None  # vq2 has two points here
    assert "points, 4 are needed" in result["bd_rate"]["psnr"]["jpeg"]["reason"]

    measured = list[str]()
    measure = rd.measure
    monkeypatch.setattr(rd, "plot", lambda *args: None)

    def noted(rival: codecs.Rival, *arguments: Any) -> rd.Row:
        measured.append(rival.name)
        return measure(rival, *arguments)

    monkeypatch.setattr(rd, "measure", noted)
    again = rd.run(folder, output, **options)
    assert again["rows"] == result["rows"]
    assert measured == []
    monkeypatch.setattr(machine, "commit", lambda: "abc+")  # other code, perhaps
    assert rd.run(folder, output, **options)["rows"] == result["rows"]
    assert set(measured) == {"vq2"}
    other = rd.run(folder, output, tune="psnr", **options)
    assert other["tune"] == "psnr" and "tune psnr" in other["codecs"]["vq2"] and "tune psnr" in rd.table(other)
    sizes = [{row["bytes"] for row in r["rows"] if row["codec"] == "vq2"} for r in (result, other)]
    assert sizes[0] != sizes[1]
    Image.fromarray(pixels[:, ::-1]).save(folder / "a.png")  # another picture of the same name
    rd.run(folder, output, **options)
    assert measured.count("jpeg") == len(jpeg_qualities)


def test_the_table_has_a_column_for_each_range_of_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rd, "METRICS", {"psnr": psnr})
    means = [
        {"codec": "vq2", "quality": k, "bpp": b / 2, "psnr": s} for k, (b, s) in enumerate(zip(*CURVE, strict=True))
    ]
    means += [{"codec": "jpeg", "quality": k, "bpp": b, "psnr": s} for k, (b, s) in enumerate(zip(*CURVE, strict=True))]
    result = {"codecs": {"vq2": "", "jpeg": ""}, "means": means}
    result |= rd.compare(rd.all_curves(result), means)
    corpus = {"folder": "photos", "images": 1, "skipped": {}}
    about = {"date": "", "cpu": "", "cores": 2, "packages": {"torch": ""}, "commit": "", "model": "", "fingerprint": ""}
    lines = rd.table({**result, "corpus": corpus, "machine": about, "skipped": {}}).splitlines()
    (head,) = (line for line in lines if "by PSNR-RGB" in line)
    (row,) = (line for line in lines if "against jpeg" in line)
    assert head.split()[2:5] == ["28", "to", "30"]
    assert row.split() == ["against", "jpeg", "-50.00", "%", "28.00", "to", "39.00", "dB", *["-50.0"] * 6]
    ends = [
        [match.end() for match in re.finditer(pattern, line)]
        for pattern, line in ((r"to \d+", head), ("-50.0(?!0)", row))
    ]
    assert ends[0] == ends[1]


def test_an_image_that_a_rival_cannot_hold_is_named_and_skipped(tmp_path: Path) -> None:
    Image.new("RGB", (16_384, 1)).save(tmp_path / "wide.png")
    Image.fromarray(speed.pink_noise(32, 32)).save(tmp_path / "small.png")
    options: dict[str, Any] = {"weights": WEIGHTS, "qualities": (1.0,), "rivals": ("webp",), "tell": lambda line: None}
    result = rd.run(tmp_path, tmp_path / "out", **options)
    assert {row["image"] for row in result["rows"]} == {"small.png"}
    assert "webp at quality 0: " in result["corpus"]["skipped"]["wide.png"]


def test_rd_does_not_overwrite_another_result(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text('{"benchmark": "speed"}')
    with pytest.raises(ValueError, match="not a result of rd"):
        rd.run(folder, tmp_path / "speed", weights=WEIGHTS, rivals=())


def test_stages_add_up_to_the_whole() -> None:
    codec = Codec.load(WEIGHTS, device="cpu")
    seconds = speed.by_stage(lambda: codec.decode(codec.encode(speed.pink_noise(64, 48), 2)), repeat=1)
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
    assert all(seconds[stage] > 0 for stage in speed.STAGES)


def test_a_stage_within_a_stage_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 1.0, 3.0, 10.0))  # the outer one starts, the inner one starts, ends, the outer one ends
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = speed.Stopwatch()
    watch.wrap("outer", watch.wrap("inner", lambda: None))()
    assert watch.seconds == {"outer": 8.0, "inner": 2.0}


def whole_process(arguments: list[str], repeat: int) -> float:
    if arguments[0] == "encode":
        assert Image.open(arguments[1]).size == (48, 32)  # the first size: the largest would take minutes
    return 0.5


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes of their own for the memory, and without whole commands."""
    monkeypatch.setattr(timing, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(speed, "_command_seconds", whole_process)


def test_whole_commands_start_from_bytecode_as_installed_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, str]] = []
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setattr(speed.subprocess, "run", lambda *_, env, **__: found.append(env))
    speed._command_seconds(["info"], 1)
    assert len(found) == 2 and all(env["KEPT"] and "PYTHONDONTWRITEBYTECODE" not in env for env in found)


def fake_python(path: Path, costs: str) -> Path:
    """Takes the place of a Python with CompressAI."""
    path.write_text(f"#!/bin/sh\n[ $1 = -c ] && echo compressai 1, torch 2 || {costs}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name == "nt", reason="a shell script takes the place of a Python")
def test_speed_measures_saves_and_draws(quick: None, tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python", """echo '{"encode": [2, 3000000, 40], "decode": [4, 5000000, 40]}'""")
    options: dict[str, Any] = {"weights": WEIGHTS, "repeat": 1, "tell": lambda line: None, "devices": ("cpu",)}
    sizes = [(48, 32), (64, 48)]
    result = speed.run(tmp_path / "speed", sizes=sizes, rivals=("jpeg",), compressai=python, **options)
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    codecs_measured = ["vq2", "jpeg", *(f"compressai {model}" for model in timing.COMPRESSAI)]
    assert [row["codec"] for row in result["rows"]] == 2 * [name for name in codecs_measured for _ in range(2)]
    for row in result["rows"]:
        assert row["seconds"]["total"] > 0
        expected = row["width"] * row["height"] / 1e6 / row["seconds"]["total"]
        assert row["megapixels_per_second"] == pytest.approx(expected)
        assert row["peak_memory_bytes"] > 1e6
    lines = speed.cells(result)
    assert ["compressai mbt2018, 1 thread", "48x32", "2.000", "4.000"] in [line[:4] for line in lines]
    assert "0.000384" in next(line for line in lines if line[0].startswith("compressai") and line[1] == "48x32")[5]
    assert "python -m vqcodec info: 0.500 s" in speed.table(result)
    assert "<svg" in (tmp_path / "speed.svg").read_text()


@pytest.mark.skipif(os.name == "nt", reason="a shell script takes the place of a Python")
def test_speed_names_and_skips_what_does_not_run(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.features.check", lambda feature: feature != "avif")
    monkeypatch.setattr(speed, "plot", lambda *args: None)
    options: dict[str, Any] = {"weights": WEIGHTS, "repeat": 1, "tell": lambda line: None, "sizes": [(48, 32)]}
    without = speed.run(tmp_path / "speed", rivals=("avif-420-psnr",), **options)
    assert set(without["skipped"]) == {"avif-420-psnr", "compressai"}
    assert {row["codec"] for row in without["rows"]} == {"vq2"}
    missing = speed.run(tmp_path / "speed", rivals=(), compressai=tmp_path / "none", **options)
    assert "none" in missing["skipped"]["compressai"]
    broken = fake_python(tmp_path / "python", "{ echo out of memory >&2; exit 1; }")
    found = speed.run(tmp_path / "speed", rivals=(), compressai=broken, **options)
    assert found["skipped"]["compressai mbt2018 48x32"] == "out of memory"
    assert "skipped compressai mbt2018 48x32: out of memory" in speed.table(found)


def test_the_memory_of_rivals_is_measured_without_torch() -> None:
    code = "import sys, benchmarks.timing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=timing.ROOT).returncode == 0


def test_costs_of_a_rival_are_measured_in_both_directions(quick: None, tmp_path: Path) -> None:
    Image.fromarray(speed.pink_noise(64, 48)).save(tmp_path / "image.png")
    costs = timing.rival_costs("jpeg", tmp_path / "image.png", 50, repeat=1)
    size = len(codecs.RIVALS["jpeg"]().encode(speed.pink_noise(64, 48), 50))
    assert [cost.file_bytes for cost in (costs["encode"], costs["decode"])] == [size, size]
    assert all(cost.seconds > 0 and cost.peak_bytes > 1e6 for cost in costs.values())


def test_a_long_call_is_measured_once() -> None:
    calls = iter([{"total": 21.0}, {"total": 1.0}])
    assert timing.medians(lambda: next(calls), 3) == {"total": 21.0}
    calls = iter([{"total": 9.0}, {"total": 1.0}, {"total": 3.0}, {"total": 2.0}])
    assert timing.medians(lambda: next(calls), 3) == {"total": 2.0}


def test_a_wrong_argument_is_one_line() -> None:
    golden = Path(__file__).parent / "golden"  # has no images
    ran = CliRunner().invoke(main, ["entropy", str(golden), "--weights", str(WEIGHTS)])
    assert ran.exit_code == 1
    assert ran.output.startswith("error: ")
    assert ran.output.count("\n") == 1
