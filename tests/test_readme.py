"""The READMEs cannot lie: their commands run; test_benchmarks_results.py compares their figures."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from vqcodec.config import SHIPPED
from vqcodec.weights import load_weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
TRAINING = (ROOT / "vqcodec" / "training" / "README.md").read_text("utf-8")
OTTERS = ROOT / "tests" / "images" / "otters.png"


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


def test_the_target_sizes_of_the_readme_can_be_reached_with_its_photo() -> None:
    from PIL import Image

    import vqcodec
    from vqcodec.targets import parse_size

    smallest, largest = (len(vqcodec.encode(Image.open(OTTERS), quality, effort=0)) for quality in (1, 8))
    sizes = [parse_size(size) for size in re.findall(r"--target-size (\S+)", README)]
    sizes += [int(size) for size in re.findall(r'Target\("size", ([\d_]+)\)', README)]
    assert len(sizes) == 2 and all(1.1 * smallest < size < 0.9 * largest for size in sizes)


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
    for folder in (here / "pictures", here / "shared" / "pictures", here / "photos", here / "screenshots"):
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


def test_the_shipped_weights_are_small_and_complete() -> None:
    assert SHIPPED.stat().st_size <= 24_000_000
    model = load_weights()
    assert model.config.levels == 8
    assert all(book.initialised for book in model.codebooks)
