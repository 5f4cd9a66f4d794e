"""The figures of the README and the model card are those of the committed results, which are of the shipped weights."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.metrics import SCALES
from vqcodec.config import SHIPPED
from vqcodec.weights import fingerprint, load_weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CARD = (ROOT / "vqcodec" / "weights" / "README.md").read_text("utf-8")
RESULTS = ROOT / "benchmarks" / "results"
RIVALS = {
    "JPEG": "jpeg",
    "WebP": "webp",
    "JPEG XL": "jxl",
    "JPEG 2000": "jpeg2000",
    "AVIF 4:2:0": "avif-420-psnr",
    "AVIF 4:4:4": "avif-444-psnr",
    "AVIF 4:4:4 tune=iq": "avif-444-iq",
}
PRIORS = ("ideal order 0", "no attention, no conditioning", "no attention", "no conditioning", "full")


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def table_rows(heading: str, text: str = README) -> list[list[str]]:
    """The rows of the table whose heading begins so."""
    lines = text[text.index(f"\n| {heading}") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_model_card_is_of_the_shipped_weights() -> None:
    model = load_weights()
    parameters = sum(p.numel() for p in model.parameters())
    assert f"| fingerprint | {fingerprint(model).hex()} |" in CARD
    assert f"| size | {parameters:,} parameters, {SHIPPED.stat().st_size:,} bytes " in CARD


def test_the_kodak_table_is_that_of_the_committed_results() -> None:
    kodak = results("kodak")
    means = [row for row in kodak["means"] if row["codec"] == "vq2"]
    expected = [
        [
            f"{row['quality']:g}",
            f"{row['bpp']:.3f}",
            f"{row['psnr']:.2f}",
            f"{row['ms_ssim']:.4f}",
            *(f"{size[rival]:.0f} %" for rival in ("jpeg", "webp")),
        ]
        for row, size in zip(means, kodak["percent_of_size_at_equal_psnr"], strict=True)
    ]
    assert table_rows("quality for PSNR") == expected


def test_the_table_of_levels_is_that_of_the_committed_results() -> None:
    scores = ("ssimulacra2", "butteraugli", "cvvdp", "psnr")
    expected = [
        [f"{row['quality']:g}", f"{row['bpp']:.3f}", *(format(row[name], SCALES[name].format) for name in scores)]
        for row in results("kodak-visual")["means"]
        if row["codec"] == "vq2"
    ]
    assert table_rows("quality | bpp") == expected


def test_the_bd_rates_are_those_of_the_committed_results() -> None:
    rates = [results(name)["bd_rate"][metric] for name in ("kodak", "valid") for metric in ("psnr", "ssimulacra2")]
    expected = [
        [name, *(f"{found[rival]['percent']:+.1f} %" if rival in found else "not measured" for found in rates)]
        for name, rival in RIVALS.items()
    ]
    assert [[row[0].split(" (")[0], *row[1:]] for row in table_rows("BD-rate against")] == expected


def test_the_table_for_the_eye_is_that_of_the_committed_results() -> None:
    metrics = ("ssimulacra2", "butteraugli", "cvvdp", "psnr")
    rates = [results(name)["bd_rate"][metric] for name in ("kodak-visual", "valid-visual") for metric in metrics]
    for name, *row in table_rows("against"):
        rival = RIVALS[name]
        expected = [f"{found[rival]['percent']:+.1f} %" if rival in found else "not measured" for found in rates]
        assert row == expected


def test_prose_rounds_the_committed_results() -> None:
    kodak = results("kodak")
    rates = {name: kodak["bd_rate"]["psnr"][name]["percent"] for name in ("jpeg", "webp")}
    ours = [row for row in kodak["means"] if row["codec"] == "vq2"]
    low, high = ours[0], ours[-1]
    readme, card = " ".join(README.split()), " ".join(CARD.split())
    seen = {name: bd["percent"] for name, bd in results("kodak-visual")["bd_rate"]["ssimulacra2"].items()}
    lead = f"{-seen['webp']:.0f} % smaller than WebP's, {-seen['jxl']:.0f} % smaller than JPEG XL's and "
    assert f"{lead}{-seen['avif-444-iq']:.0f} % smaller than those of AVIF" in readme
    assert f"{-rates['jpeg']:.0f} % smaller than JPEG's and {-rates['webp']:.0f} % smaller than WebP's" in readme
    assert f"({low['psnr']:.1f} to {high['psnr']:.1f} dB on Kodak)" in readme
    assert f"level 8 ends at {high['psnr']:.1f} dB on Kodak, at {high['bpp']:.1f} bits per pixel" in readme
    assert f"{rates['jpeg']:.1f} % against JPEG and {rates['webp']:.1f} % against WebP" in card
    assert f"from {low['psnr']:.1f} to {high['psnr']:.1f} dB" in card
    psnr, seen = (
        [results("screens")["bd_rate"][metric][name]["percent"] for name in ("webp", "avif-444-psnr")]
        for metric in ("psnr", "ssimulacra2")
    )
    assert f"is {psnr[0]:+.1f} % against WebP and {psnr[1]:+.0f} % against AVIF by PSNR" in readme
    assert f"{seen[0]:+.1f} % and {seen[1]:+.0f} % by SSIMULACRA 2" in readme


@pytest.mark.parametrize("name, images", [("kodak", 24), ("kodak-visual", 24), ("valid", 32), ("valid-visual", 32)])
def test_size_and_psnr_rise_with_quality_for_every_committed_image(name: str, images: int) -> None:
    curves: dict[str, list[tuple[float, int, float]]] = {}
    for row in results(name)["rows"]:
        if row["codec"] == "vq2":
            curves.setdefault(row["image"], []).append((row["quality"], row["bytes"], row["psnr"]))
    assert len(curves) == images
    for image, curve in curves.items():
        assert len(curve) == 8
        assert all(a < b for pair in pairwise(sorted(curve)) for a, b in zip(*pair, strict=True)), image


def test_the_tables_of_the_card_are_those_of_the_committed_results() -> None:
    found = results("ablate")
    choices = {"the nearest code": "nearest", "least distance + rate": "rate-constrained"}
    expected = [
        [text, *(f"{row['bpp']:.3f} bpp, {row['psnr']:.1f} dB" for row in found["choice"][name]["rows"])]
        for text, name in choices.items()
    ]
    assert table_rows("choice of indices", CARD) == expected
    rows = [row["bits_per_pixel"] for row in found["priors"] if row["grid"] == "all"]
    assert table_rows("prior", CARD) == [[name, *(f"{row[name]:.3f}" for row in rows)] for name in PRIORS]


def test_the_speed_table_is_that_of_the_committed_results() -> None:
    eye, psnr = (
        [row for row in results(name)["rows"] if row["codec"] == "vq2" and row["threads"] == 2]
        for name in ("speed", "speed-psnr")
    )
    expected = []
    for pair, other in zip(zip(eye[::2], eye[1::2], strict=True), psnr[::2], strict=True):
        assert [row["direction"] for row in (*pair, other)] == ["encode", "decode", "encode"]
        seconds = [row["seconds"]["total"] for row in (pair[0], other, pair[1])]
        memory = max(row["peak_memory_bytes"] for row in pair)
        expected.append(
            [
                f"{pair[0]['width']} x {pair[0]['height']}",
                *(f"{value:.1f} s" if value < 10 else f"{value:.0f} s" for value in seconds),
                f"{memory / 1e9:.1f} GB",
            ]
        )
    assert table_rows("image | encode") == expected


def test_the_effort_table_is_that_of_the_committed_results() -> None:
    choices = results("ablate")["choice"]
    seconds = {name: sum(row["seconds_per_megapixel"] for row in found["rows"]) for name, found in choices.items()}
    fastest = seconds["rate-constrained"]
    expected = []
    for name, found in choices.items():
        if name.startswith("effort"):
            ratio = f"{seconds[name] / fastest:.1f} times as long"
            expected.append([name.split()[1], f"{found['bd_rate']['percent']:+.1f} %", ratio])
    assert table_rows("effort | BD-rate") == expected


def test_all_committed_results_are_of_the_shipped_weights() -> None:
    shipped = fingerprint(load_weights()).hex()
    for name in (
        *("kodak", "kodak-visual", "valid", "valid-visual", "screens"),
        *("speed", "speed-psnr", "ablate", "entropy"),
    ):
        assert results(name)["machine"]["fingerprint"] == shipped, name
