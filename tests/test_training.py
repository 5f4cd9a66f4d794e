import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make_golden import IMAGES
from PIL import Image
from tiny_model import TINY, WEIGHTS

from bitstream.errors import WeightsError
from vqcodec.models.vqvae import VQVAE
from vqcodec.quality import CONFIGS, PRODUCT
from vqcodec.training import trainer
from vqcodec.training.data import Cache, Crops
from vqcodec.training.muon import orthogonalise
from vqcodec.training.trainer import Run, Stage, learning_rate, levels_for, rate_weight, train
from vqcodec.weights import load_weights, to_file


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    photo = Image.open(IMAGES / "otters.png")
    for k in range(3):
        photo.crop((100 * k, 50 * k, 100 * k + 160, 50 * k + 120)).save(folder / f"{k}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(images: Path, output: Path, **settings: object) -> Run:
    defaults = {"config": TINY, "steps": 4, "batch": 3, "crop": 64, "log_steps": 2}
    return Run(images=images, output=output, **{**defaults, **settings})  # type: ignore[arg-type]


def quiet(line: str) -> None:
    pass


def rows(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_writes_weights_and_log(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "WARM_UP", 5)
    train(run(images, tmp_path / "r", steps=40, log_steps=10), quiet)
    log = rows(tmp_path / "r")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]  # type: ignore[operator]
    assert set(log[0]) >= {"step", "hours", "loss", "psnr", "bpp", "perplexity", "level_psnr", "level_bpp"}
    assert load_weights(tmp_path / "r" / "model.safetensors").config == TINY


@pytest.mark.parametrize("name", ["vqvae2-paper", "vqvae2-paper-large"])
@pytest.mark.parametrize("learning", ["ema", "loss"])
def test_the_configuration_of_the_paper_trains(name: str, learning: str, images: Path, tmp_path: Path) -> None:
    config = replace(CONFIGS[name], codebook=learning)  # type: ignore[arg-type]
    assert [(g.groups, g.codes, g.dim) for g in config.grids] == [(1, 512, 64)] * len(config.grids)
    model = train(run(images, tmp_path / "r", config=config, steps=2, batch=2), quiet)
    log = rows(tmp_path / "r")
    assert log[-1]["bpp"] > 0  # type: ignore[operator]
    assert load_weights(tmp_path / "r" / "model.safetensors").config == model.config


def test_a_resumed_run_goes_on_where_it_stopped(images: Path, tmp_path: Path) -> None:
    train(run(images, tmp_path / "r", steps=4), quiet)
    said: list[str] = []
    train(run(images, tmp_path / "r", steps=8), said.append)
    assert "resuming at step 4" in said[0]
    assert [row["step"] for row in rows(tmp_path / "r")] == [2, 4, 6, 8]


def test_the_same_seed_gives_the_same_weights(images: Path, tmp_path: Path) -> None:
    first, second = (to_file(train(run(images, tmp_path / name), quiet)) for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_prior_stage_changes_nothing_but_the_priors(images: Path, tmp_path: Path) -> None:
    before = load_weights(WEIGHTS).state_dict()
    after = train(run(images, tmp_path / "r", stage="prior", start=WEIGHTS), quiet).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("priors.") for name in changed)


def test_the_joint_stage_starts_from_weights_with_the_full_rate(images: Path, tmp_path: Path) -> None:
    train(run(images, tmp_path / "r", stage="joint", start=WEIGHTS), quiet)
    assert rows(tmp_path / "r")[0]["psnr"] > 18  # type: ignore[operator]


@pytest.mark.parametrize("stage", ["vqvae", "prior", "joint"])
def test_the_rate_ramps_up_in_the_first_stage_only(stage: Stage) -> None:
    start, end = rate_weight(stage, 0, TINY), rate_weight(stage, 10_000, TINY)
    assert (start, end) == (0.0 if stage == "vqvae" else 1.0, 1.0)
    assert rate_weight(stage, 10_000, CONFIGS["vqvae2-paper"]) == 0.0


def test_the_learning_rate_warms_up_holds_and_falls() -> None:
    assert learning_rate(0.0, 0) < 0.01
    assert learning_rate(0.5, 10_000) == 1.0
    assert learning_rate(1.0, 10_000) < 0.05


def test_a_batch_holds_every_level_as_often_as_it_can() -> None:
    assert sorted(levels_for(8, 8).tolist()) == list(range(8))
    assert torch.bincount(levels_for(12, 8), minlength=8).tolist().count(0) == 0


def test_two_processes_train_one_model(images: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch
from test_training import run, quiet, train
model = train(run(Path({str(images)!r}), Path({str(tmp_path / "r")!r}), batch=2), quiet)
flat = torch.cat([value.flatten().double() for value in model.state_dict().values()])
import os
torch.save(flat, {str(tmp_path)!r} + "/" + os.environ["RANK"] + ".pt")
"""
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(subprocess.Popen([sys.executable, "-c", script], env=environment))
    assert [process.wait() for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert [row["step"] for row in rows(tmp_path / "r")] == [2, 4]


def test_the_cache_serves_the_images_and_is_made_once(images: Path, tmp_path: Path) -> None:
    first = Cache(images, tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = Cache(images, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made
    assert len(first) == len(second) == 3
    pixels = Image.open(images / "1.png").convert("RGB")
    assert second[1].tobytes() == pixels.tobytes()


def test_folders_without_usable_images_are_named(tmp_path: Path, images: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        Cache(tmp_path / "empty", tmp_path / "cache")
    with pytest.raises(ValueError, match="512 x 512"):
        Crops(Cache(images, tmp_path / "cache"), 512, seed=0)


def test_a_truncated_training_image_is_named(tmp_path: Path, images: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "half.png").write_bytes((images / "0.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.png"):
        Cache(tmp_path / "broken", tmp_path / "cache")


def test_muon_makes_updates_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for update in orthogonalise([torch.randn(30, 90), torch.randn(90, 30), torch.randn(30, 30)]):
        values = torch.linalg.svdvals(update)
        assert values.quantile(0.1) > 0.5 and values.max() < 1.3


def test_muon_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    for shape in ((8, 20), (20, 8)):
        matrix = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        (update,) = orthogonalise([matrix])
        inner = u.T @ update @ v.T
        assert torch.allclose(inner, inner.diagonal().diag(), atol=1e-4)


def test_the_product_stays_within_its_budget() -> None:
    """Multiply-accumulates per pixel, counted by the layers that run: DESIGN's limits are 100, 25 and 60 thousand."""
    from torch.utils.flop_counter import FlopCounterMode

    model, level = VQVAE(PRODUCT).eval(), torch.zeros(1, dtype=torch.long)
    x = torch.rand(1, 3, 256, 256)
    counts = {}
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            features = model.analyse(x, level)
            z = model.latent(0, features[0], None, level)
            context = model.decode_grid(0, z, None, level)
            model.latent(1, features[1], context, level)
        counts["encoder"] = counter.get_total_flops() / 2 / 256**2
        indices = [torch.zeros(1, g.groups, 256 // g.stride, 256 // g.stride, dtype=torch.long) for g in PRODUCT.grids]
        with FlopCounterMode(display=False) as counter:
            model.decode(indices, level)
        counts["decoder"] = counter.get_total_flops() / 2 / 256**2
        with FlopCounterMode(display=False) as counter:
            for k, index in enumerate(indices):
                condition = model.condition(k, indices[k - 1], level) if k else None
                model.code_lengths(k, index, condition, level)
        counts["prior"] = counter.get_total_flops() / 2 / 256**2
    assert counts["encoder"] <= 100e3 and counts["decoder"] <= 60e3 and counts["prior"] <= 25e3, counts


def test_a_run_of_another_configuration_is_not_resumed(images: Path, tmp_path: Path) -> None:
    train(run(images, tmp_path / "r"), quiet)
    with pytest.raises(WeightsError, match="another folder"):
        train(run(images, tmp_path / "r", config=CONFIGS["vqvae2-paper"]), quiet)
