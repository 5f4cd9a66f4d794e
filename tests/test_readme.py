"""The READMEs cannot lie: their commands run, the figures are those of the committed results."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cli
from vqcodec.weights import SHIPPED, fingerprint, load_weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
TRAINING = (ROOT / "vqcodec" / "training" / "README.md").read_text("utf-8")
OTTERS = ROOT / "tests" / "images" / "otters.png"
RESULTS = ROOT / "benchmarks" / "results"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples name, all of it small."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for folder in ("tests/images", "photos/trip", "runs/mine"):
        (tmp_path / folder).mkdir(parents=True)
    photo = Image.open(OTTERS).crop((200, 100, 360, 228))
    for name in ("photo.png", "photo.jpg", "tests/images/otters.png", "photos/a.jpg", "photos/trip/b.png"):
        photo.save(tmp_path / name)
    return tmp_path


def commands() -> list[list[str]]:
    """The vqcodec commands of the README's shell blocks, but for training and pipes."""
    lines = [part.strip() for block in blocks("sh") for line in block.splitlines() for part in line.split("&&")]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("vqcodec") and "|" not in line]
    return [words for words in found if words[1] != "train" and "--weights" not in words]


def test_the_commands_of_the_readme_run(here: Path) -> None:
    ran = commands()
    assert {words[1] for words in ran} == {"encode", "decode", "info", "compare", "sample"}
    for words in ran:
        arguments = [str(p) for w in words[1:] for p in (sorted(here.glob(w)) if "*" in w else [w])]
        if words[1] != "info" and "--resume" not in words:
            arguments.append("-f")  # one example makes again what another has made
        result = CliRunner().invoke(cli.main, arguments)
        assert result.exit_code == 0, (words, result.output)


def test_the_python_examples_of_the_readme_run(here: Path, pillow_plugin: None) -> None:
    names: dict[str, object] = {}
    for example in blocks("python"):
        exec(compile(example, "README.md", "exec"), names)


def test_the_line_for_every_program_installs_the_pillow_plugin(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = (line for block in blocks("sh") for line in block.splitlines() if line.startswith("python -c"))
    monkeypatch.setattr("site.getsitepackages", lambda: [str(here)])
    exec(shlex.split(line)[2])
    check = f"import site; site.addsitedir({str(here)!r}); from PIL import Image; assert '.vq2' in Image.EXTENSION"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


def test_the_commands_for_training_reach_a_run_and_what_it_gives_can_be_used(
    here: Path, monkeypatch: pytest.MonkeyPatch, tiny_weights: Path
) -> None:
    runs = []
    monkeypatch.setattr("vqcodec.training.trainer.train", lambda run, report: runs.append(run))
    for folder in (here / "pictures", here / "shared" / "pictures", here / "photos"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "x.png").write_bytes((here / "photo.png").read_bytes())
    (here / "runs" / "mine" / "model.safetensors").write_bytes(tiny_weights.read_bytes())
    lines = [line for text in (README, TRAINING) for block in blocks("sh", text) for line in block.splitlines()]
    trained = 0
    for line in lines:
        words = shlex.split(line.replace("/shared/", f"{here}/shared/"), comments=True)
        if words and words[0] == "torchrun":
            words = words[words.index("--") :]
        if "train" not in words[1:2] and "--weights" not in words:
            continue
        trained += words[1] == "train"
        quality = {"encode": ["-q", "2"], "compare": ["-q", "2"]}.get(words[1], [])  # the small model has three levels
        result = CliRunner().invoke(cli.main, words[1:] + quality + (["-f"] if "--weights" in words else []))
        assert result.exit_code == 0, (words, result.output)
    assert len(runs) == trained >= 6
    (example,) = blocks("python", TRAINING)
    exec(compile(example, "training/README.md", "exec"), {})


def test_the_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def table_rows(heading: str) -> list[list[str]]:
    """The rows of the table whose heading begins so."""
    lines = README[README.index(f"\n| {heading}") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


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
    assert table_rows("quality | bpp") == expected


def test_the_bd_rates_are_those_of_the_committed_results() -> None:
    found = [results(name)["bd_rate"] for name in ("kodak", "valid")]
    rivals = {"JPEG": "jpeg", "WebP": "webp", "JPEG XL": "jxl", "JPEG 2000": "jpeg2000", "AVIF": "avif-420"}
    expected = [
        [name, *(f"{rates[metric][rival]['percent']:+.1f} %" for rates in found for metric in ("psnr", "ssimulacra2"))]
        for name, rival in rivals.items()
    ]
    assert [[row[0].split(" (")[0], *row[1:]] for row in table_rows("BD-rate against")] == expected


def test_the_speed_table_is_that_of_the_committed_results() -> None:
    rows = [row for row in results("speed")["rows"] if row["codec"] == "vq2" and row["threads"] == 2]
    expected = []
    for pair in zip(rows[::2], rows[1::2], strict=True):
        assert [row["direction"] for row in pair] == ["encode", "decode"]
        seconds = [row["seconds"]["total"] for row in pair]
        memory = max(row["peak_memory_bytes"] for row in pair)
        expected.append(
            [
                f"{pair[0]['width']} x {pair[0]['height']}",
                *(f"{value:.1f} s" if value < 10 else f"{value:.0f} s" for value in seconds),
                f"{memory / 1e9:.1f} GB",
            ]
        )
    assert table_rows("image | encode") == expected


def test_all_committed_results_are_of_the_shipped_weights() -> None:
    shipped = fingerprint(load_weights()).hex()
    for name in ("kodak", "valid", "speed"):
        assert results(name)["machine"]["fingerprint"] == shipped, name


def test_the_shipped_weights_are_small_and_complete() -> None:
    assert SHIPPED.stat().st_size <= 16_000_000
    model = load_weights()
    assert model.config.levels == 8
    assert all(book.initialised for book in model.codebooks)
