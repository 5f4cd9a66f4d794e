import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make_golden import IMAGES
from PIL import Image
from tiny_model import TINY, WEIGHTS

from bitstream.errors import UsageError, WeightsError
from vqcodec.codec import Codec
from vqcodec.config import CONFIGS, PRODUCT, Stage
from vqcodec.models import vqvae
from vqcodec.models.pixelsnail import rows_of
from vqcodec.models.quantizer import REBIRTHS, Choice
from vqcodec.models.vqvae import VQVAE
from vqcodec.training import trainer
from vqcodec.training.data import Cache, Crops
from vqcodec.training.muon import Muon, orthogonalise
from vqcodec.training.trainer import (
    BLOCK_RATE,
    FINISH_RATE,
    MUON_RATE,
    PRIORS_RATE,
    REUSE,
    SETTLED,
    VISUAL_RATE,
    Average,
    Measured,
    Objective,
    Run,
    Sums,
    crops_at,
    encoder_fit,
    fits,
    in_banks,
    in_encoder,
    learning_rate,
    levels_for,
    optimizers,
    rate_weight,
    train,
    with_two_banks,
    without_denormals,
)
from vqcodec.weights import load_weights, save_weights, to_file

ACTIVE = 0.6, 0.13  # share of a grid's indices that are not null, at quality 5


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
    assert [row["step"] for row in rows(tmp_path / "r")] == [1, 2, 4, 6, 8]


def test_a_run_that_starts_anew_forgets_its_log(images: Path, tmp_path: Path) -> None:
    for _ in range(2):
        train(run(images, tmp_path / "r", steps=4), quiet)
        assert [row["step"] for row in rows(tmp_path / "r")] == [1, 2, 4]
        (tmp_path / "r" / "checkpoint.pt").unlink()


def test_a_log_whose_last_row_was_cut_off_does_not_stop_a_run(images: Path, tmp_path: Path) -> None:
    train(run(images, tmp_path / "r", steps=4), quiet)
    log = tmp_path / "r" / "log.jsonl"
    log.write_text(log.read_text()[:-20])
    train(run(images, tmp_path / "r", steps=8), quiet)
    assert [row["step"] for row in rows(tmp_path / "r")] == [1, 2, 6, 8]


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run(images, tmp_path / "r"), quiet)
    files = {path: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    monkeypatch.setattr(trainer, "DROPPED_WEIGHT", float("nan"))
    monkeypatch.setattr(trainer, "DROPPED", 1.0)
    with pytest.raises(FloatingPointError, match="no longer finite: .* give the same command with another --seed"):
        train(run(images, tmp_path / "r", steps=6, log_steps=100), quiet)
    assert {path: path.read_bytes() for path in (tmp_path / "r").iterdir()} == files


def test_the_same_seed_gives_the_same_weights(images: Path, tmp_path: Path) -> None:
    first, second = (to_file(train(run(images, tmp_path / name), quiet)) for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_joint_stage_starts_from_weights_with_the_full_rate(images: Path, tmp_path: Path) -> None:
    train(run(images, tmp_path / "r", stage="joint", start=WEIGHTS), quiet)
    assert rows(tmp_path / "r")[0]["psnr"] > 18  # type: ignore[operator]


def test_the_visual_stage_changes_nothing_but_the_rows_of_its_bank(images: Path, tmp_path: Path) -> None:
    before, after = load_weights(WEIGHTS), train(run(images, tmp_path / "r", stage="visual", start=WEIGHTS), quiet)
    assert after.config == replace(before.config, banks=2)
    for name, value in before.state_dict().items():
        new = after.state_dict()[name]
        assert torch.equal(new[: len(value)], value)
        learned = not torch.equal(new[-len(value) :], value)
        grown = len(new) == 2 * len(value)
        assert grown == (in_banks(name) or name.endswith(".usage"))
        assert grown >= learned
        assert learned or not name.endswith(("log_gain", "log_inverse", ".usage"))
    with torch.no_grad():
        after.latents[-1].log_inverse[-1] += 0.1
    save_weights(after, tmp_path / "trained.safetensors")
    before = load_weights(tmp_path / "trained.safetensors").state_dict()
    again = train(run(images, tmp_path / "s", stage="visual", start=tmp_path / "trained.safetensors", steps=60), quiet)
    changed = {name for name, value in again.state_dict().items() if not torch.equal(before[name], value)}
    assert {"latents.0.log_inverse", "latents.1.log_inverse"} <= changed
    strangers = {name for name in changed if not in_banks(name) or in_encoder(name)}
    assert strangers == {"codebooks.0.usage", "codebooks.1.usage"}  # which have a row for each level as well


@pytest.mark.parametrize("stage", ["vqvae", "recorded", "joint", "visual"])
def test_the_rate_ramps_up_in_the_first_stage_only(stage: Stage) -> None:
    start, end = rate_weight(stage, 0, TINY), rate_weight(stage, 10_000, TINY)
    assert (start, end) == (0.0 if stage == "vqvae" else 1.0, 1.0)
    assert rate_weight(stage, 10_000, CONFIGS["vqvae2-paper"]) == 0.0


def test_the_learning_rate_warms_up_holds_and_falls() -> None:
    assert learning_rate(0.0, 0, "joint", False) < 0.01
    assert learning_rate(0.5, 10_000, "joint", False) == learning_rate(0.5, 100, "visual", False) == 1.0
    assert learning_rate(1.0, 10_000, "joint", False) < 0.05
    assert 0.05 < learning_rate(0.7, 10_000, "finish", True) < 0.5  # it falls for most of the run


def test_a_batch_holds_every_level_as_often_as_it_can() -> None:
    assert sorted(levels_for(8, 0, 8).tolist()) == list(range(8))
    assert torch.bincount(levels_for(12, 0, 8), minlength=8).tolist().count(0) == 0
    assert sorted(levels_for(4, 6, 8).tolist()) == [6, 6, 7, 7]


def test_the_last_crops_are_larger_and_have_as_many_pixels(images: Path, tmp_path: Path) -> None:
    one = run(images, tmp_path, batch=64, crop=256)
    assert crops_at(one, 0.0) == (64, 256) and crops_at(one, 0.9) == (28, 384)
    assert crops_at(run(images, tmp_path, batch=1, crop=80), 0.9) == (1, 112)


def test_the_last_mile_leaves_the_encoder_as_it_is(images: Path, tmp_path: Path) -> None:
    before = load_weights(WEIGHTS).state_dict()
    after = train(run(images, tmp_path / "r", stage="finish", start=WEIGHTS), quiet)
    changed = {name for name, value in after.state_dict().items() if not torch.equal(before[name], value)}
    parts = {name.split(".")[0] for name in changed}
    decoder = {"codebooks", "expect", "join", "latents", "pixels", "synthesis", "tail", "up"}
    assert {"priors", "codebooks", "tail", "pixels"} <= parts <= {"priors", *decoder}
    # What autocast has cast for the fit, which has no gradients, it must not take again.
    assert {name for name in before if name.startswith(("join.", "tail.", "expect."))} <= changed
    assert not [name for name in changed if ".project." in name or name.endswith(".log_gain")]


def test_decoder_and_priors_learn_alone_from_what_files_have(images: Path, tmp_path: Path) -> None:
    before = with_two_banks(load_weights(WEIGHTS))
    save_weights(before, tmp_path / "start.safetensors")
    settings = {"stage": "recorded", "start": tmp_path / "start.safetensors", "steps": 60}
    after = train(run(images, tmp_path / "r", **settings), quiet)
    changed = {name for name, x in after.state_dict().items() if not torch.equal(before.state_dict()[name], x)}
    decoder = ("join.", "synthesis.", "up.", "tail.", "pixels.", "latents.0.log_inverse", "latents.1.log_inverse")
    learning = {name for name in after.state_dict() if name.startswith((*decoder, "priors."))}
    assert changed <= learning and {name for name in learning if name.startswith(decoder)} <= changed
    crops = Crops([(Cache(images, tmp_path / "cache"), 1.0)], 64, torch.device("cpu")).draw(8, 64)
    objective = Objective(before, "recorded", True, crops.device)
    for step in (0, REUSE):
        batch = objective.batch(lambda: crops, step, 0.5)
        assert batch.visual == (step > 0)
        measured = []
        for model in (before, after):
            torch.manual_seed(0)  # the same samples without the finer grid
            measured.append(objective(model, batch, step))
        old, new = measured
        assert len(new.bpp) == len(crops)
        assert new.bpp.mean() < old.bpp.mean() and new.loss < old.loss


def test_recorded_batches_are_what_the_whole_journey_gives_and_are_used_again(images: Path, tmp_path: Path) -> None:
    model = load_weights(WEIGHTS)
    crops = Crops([(Cache(images, tmp_path / "cache"), 1.0)], 64, torch.device("cpu")).draw(4, 64)
    objective = Objective(model, "recorded", True, crops.device)
    drawn: list[int] = []

    def draw() -> torch.Tensor:
        drawn.append(1)
        return crops

    batches = [objective.batch(draw, step, 0.5) for step in range(2 * REUSE)]
    assert len(drawn) == 2 and {id(batch) for batch in batches} == {id(batches[0]), id(batches[REUSE])}
    first = batches[0]
    torch.testing.assert_close(first.x.float() / 255, crops, rtol=0, atol=0.51 / 255)
    with torch.no_grad():
        given = model(crops, first.level, 1.0, None, None, first.indices)
        context = model.decode_grid(0, model.codes(0, first.indices), None, first.level)
        x_hat = model.decode_grid(1, model.codes(1, first.indices), context, first.level)
        seen = [model.seen(k, index) for k, index in enumerate(first.indices)]
        condition = model.condition(1, first.indices[0], first.level)
        bits = [model.code_lengths(k, first.indices[k], seen[k], (None, condition)[k], first.level) for k in (0, 1)]
    assert torch.equal(given.x_hat, x_hat) and torch.equal(given.bits, torch.stack(bits))
    for p in model.parameters():
        p.data.zero_()  # the model learns, what records does not
    assert objective.batch(draw, 2 * REUSE, 0.5).indices[1].any()


def test_a_resumed_run_records_what_was_lost_before_it_uses_anything_again() -> None:
    drawn: list[int] = []

    def draw() -> torch.Tensor:
        drawn.append(1)
        return torch.rand(1, 3, 32, 32)

    objective = Objective(load_weights(WEIGHTS), "recorded", True, torch.device("cpu"))
    batches = {id(objective.batch(draw, 2 * REUSE, 0.5)) for _ in range(3)}
    assert len(batches) == len(drawn) == 3
    assert id(objective.batch(draw, 2 * REUSE, 0.5)) in batches and len(drawn) == 3


def test_the_rates_of_all_grids_count_for_as_much_as_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(with_two_banks(load_weights(WEIGHTS)), "cpu")
    model, found = codec.model, []
    photo = Image.open(IMAGES / "otters.png").convert("RGB").crop((200, 100, 264, 164))
    encode = codec.indices.encode
    monkeypatch.setattr(codec.indices, "encode", lambda *args: found.append(args[4]) or encode(*args))
    for visual in (False, True):
        found.clear()
        codec.encode(photo, 2, tune="visual" if visual else "psnr")
        x, level = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255, torch.tensor([1])
        level = level + TINY.levels * visual
        fit = encoder_fit(model, x, level, torch.tensor([model.config.lambda_at(1)]), visual)
        with torch.no_grad():
            features = model.analyse(x, level)
            _, weights = fit(model.latent(0, x, features[0], None, level), features[1:], None, [])
        np.testing.assert_allclose(weights[0, 0].numpy(), found[0], rtol=1e-5)
        assert (np.ptp(found[0]) > 0) == visual


def test_the_encoder_comes_to_say_what_the_fit_makes_of_its_latents(images: Path, tmp_path: Path) -> None:
    before = load_weights(WEIGHTS)
    after = train(run(images, tmp_path / "r", stage="distill", start=WEIGHTS, steps=60), quiet)
    changed = {name for name, x in after.state_dict().items() if not torch.equal(before.state_dict()[name], x)}
    encoder = ("merge.1.", "coefficients.1.", "latents.1.project.", "latents.1.log_gain")
    assert changed == {name for name in after.state_dict() if name.startswith(encoder)}
    crops = Crops([(Cache(images, tmp_path / "cache"), 1.0)], 64, torch.device("cpu")).draw(8, 64)

    def loss(model: VQVAE, step: int) -> float:
        torch.manual_seed(0)  # the same levels
        objective = Objective(model.eval(), "distill", True, crops.device)
        return objective(model, objective.batch(lambda: crops, step, 0.5), step).loss.item()

    for tune in range(2):
        assert loss(after, tune) < loss(before, tune)


def test_learning_from_latents_goes_on_from_vectors_that_learned_from_the_loss() -> None:
    book = load_weights(WEIGHTS).codebooks[0]
    book.vectors.data += 1.0
    before = book.vectors.clone()
    book.settle()
    book.train()
    index = torch.arange(1, book.codes + 1).repeat(book.groups, 1)
    vectors = book.lookup(index)
    book.update(
        vectors, Choice(index, vectors, torch.zeros_like(vectors)), torch.zeros(index.shape[1], dtype=torch.long)
    )
    used = book.count > book.count.mean()
    torch.testing.assert_close(book.vectors[used], before[used])


@pytest.mark.parametrize("settings", ["", ", stage='finish', start=WEIGHTS", ", stage='recorded', start=WEIGHTS"])
def test_two_processes_train_one_model(images: Path, tmp_path: Path, settings: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch
from test_training import WEIGHTS, run, quiet, train
model = train(run(Path({str(images)!r}), Path({str(tmp_path / "r")!r}), batch=2{settings}), quiet)
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
    assert [row["step"] for row in rows(tmp_path / "r")] == [1, 2, 4]


def pixels_of(cache: Cache, k: int) -> torch.Tensor:
    offset, h, w = cache.shapes[k].tolist()
    return cache.pixels[offset // 3 :][: h * w].view(h, w, 3)


def test_the_cache_serves_the_images_and_is_made_once(images: Path, tmp_path: Path) -> None:
    first = Cache(images, tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = Cache(images, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made
    assert len(first.shapes) == len(second.shapes) == 3
    pixels = Image.open(images / "1.png").convert("RGB")
    assert bytes(pixels_of(second, 1).numpy()) == pixels.tobytes()


def test_folders_without_usable_images_are_named(tmp_path: Path, images: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        Cache(tmp_path / "empty", tmp_path / "cache")
    with pytest.raises(ValueError, match=f"no image of {images} is as large .* 512 x 512"):
        Crops([(Cache(images, tmp_path / "cache"), 1.0)], 512, torch.device("cpu"))


def test_images_that_are_too_small_are_counted(tmp_path: Path, images: Path) -> None:
    folder, said = tmp_path / "both", list[str]()
    folder.mkdir()
    (folder / "large.png").symlink_to(images / "0.png")
    (folder / "none.png").symlink_to(images / "nothing.png")
    for name in "abc":
        Image.new("RGB", (70, 63)).save(folder / f"{name}.png")
    Crops([(Cache(folder, tmp_path / "cache"), 1.0)], 64, torch.device("cpu"), said.append)
    assert said == [f"{folder}: 3 of 4 images are smaller than the largest crops, 64 x 64 pixels, and left out"]


def test_an_interrupted_cache_leaves_nothing(tmp_path: Path, images: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "0.png").symlink_to(images / "0.png")
    (folder / "1.png").write_bytes(b"")
    with pytest.raises(KeyboardInterrupt):
        Cache(folder, tmp_path / "cache", interrupt)
    assert not list((tmp_path / "cache").iterdir())


def test_a_broken_training_image_is_named_and_left_out(tmp_path: Path, images: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "half.png").write_bytes((images / "0.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match="broken: no image"):
        Cache(broken, tmp_path / "cache", quiet)
    (broken / "whole.png").write_bytes((images / "1.png").read_bytes())
    said: list[str] = []
    assert len(Cache(broken, tmp_path / "cache", said.append).shapes) == 1
    assert len(said) == 1 and "half.png is left out" in said[0]


def test_a_damaged_cache_is_made_again(tmp_path: Path, images: Path) -> None:
    whole = Cache(images, tmp_path).pixels.clone()
    data, index = next(tmp_path.glob("*.bin")), next(tmp_path.glob("*.npy"))
    for path, content in ((data, data.read_bytes()[:-1]), (index, b""), (index, b"not an array")):
        path.write_bytes(content)
        assert torch.equal(Cache(images, tmp_path).pixels, whole)


def test_crops_are_parts_of_the_images_in_their_shares(tmp_path: Path, images: Path) -> None:
    torch.manual_seed(0)
    colours = tmp_path / "colours"
    colours.mkdir()
    Image.new("RGB", (130, 70), (9, 90, 200)).save(colours / "blue.png")
    mixed = Crops([(Cache(images, tmp_path), 0.7), (Cache(colours, tmp_path), 0.3)], 64, torch.device("cpu"))
    x = mixed.draw(400, 32)
    assert x.shape == (400, 3, 32, 32) and x.min() >= 0 and x.max() <= 1
    blue = (x - torch.tensor([9, 90, 200])[:, None, None] / 255).abs().amax((1, 2, 3)) < 1e-5
    assert 0.2 < blue.float().mean() < 0.4


def test_a_crop_of_full_scale_is_exact_and_half_of_them_are(tmp_path: Path, images: Path) -> None:
    torch.manual_seed(0)
    cache = Cache(images, tmp_path)
    patches = torch.cat([pixels_of(cache, k).unfold(0, 48, 1).unfold(1, 48, 1).flatten(0, 1) for k in range(3)])
    sums = {bytes(p.numpy().tobytes()) for p in patches}
    sums |= {bytes(p.flip(2).numpy().tobytes()) for p in patches}
    x = Crops([(cache, 1.0)], 48, torch.device("cpu")).draw(100, 48)
    exact = [bytes((p * 255).round().byte().contiguous().numpy().tobytes()) in sums for p in x]
    assert 35 < sum(exact) < 65


def test_crops_are_the_same_in_shapes_that_depend_on_no_data(tmp_path: Path, images: Path) -> None:
    crops = Crops([(Cache(images, tmp_path), 1.0)], 48, torch.device("cpu"))
    found = []
    for cut in (crops._cut, crops._cut_alike):
        torch.manual_seed(0)
        crops._cut = cut  # type: ignore[method-assign]
        found.append(crops.draw(40, 48))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_damaged_checkpoint_is_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    for content in (b"", b"no checkpoint", (images / "0.png").read_bytes()):
        (tmp_path / "r" / "checkpoint.pt").write_bytes(content)
        with pytest.raises(WeightsError, match="damaged or no checkpoint"):
            train(run(images, tmp_path / "r"), quiet)
    (tmp_path / "r" / "checkpoint.pt").unlink()
    (tmp_path / "r" / "checkpoint.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        train(run(images, tmp_path / "r"), quiet)


def test_a_step_waits_for_nothing_that_a_gpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where nothing has a value: who asks for one fails, as does who needs a shape from it."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it does not know the device
    monkeypatch.setattr(vqvae, "full_precision", lambda device: contextlib.nullcontext())  # nor does this
    meta = torch.device("meta")
    model = VQVAE(TINY).to(meta).train()
    for book in model.codebooks:
        book.vectors.requires_grad_(False)
        book.started = True
    crops = Crops.__new__(Crops)
    crops.pixels = [torch.zeros(10**5, 3, dtype=torch.uint8, device=meta)]
    crops.shapes = torch.zeros(3, 4, dtype=torch.long, device=meta)
    crops.chances = torch.zeros(3, dtype=torch.double, device=meta)
    optims, average, sums = optimizers(model, "joint"), Average(model), Sums(TINY.levels, meta)
    for step in range(REBIRTHS + 1):
        x, level = crops.draw(4, 64), levels_for(4, 0, TINY.levels, meta)
        dropped = torch.rand(4, device=meta) < 0.1
        out = model(x, level, 1.0, dropped)
        (out.x_hat.sum() + out.bits.sum() + out.penalty.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
        average.update(model, step)
        sums.add(Measured(out.x_hat.sum(), level, (~dropped).float(), out.penalty, out.bits.sum(0)))


def test_a_crop_of_half_cells_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        train(run(images, tmp_path / "r", crop=40), quiet)


def rates(model: VQVAE, stage: Stage) -> dict[int, float]:
    """Learning rates of the parameters that learn, by their id."""
    return {id(p): group["lr"] for o in optimizers(model, stage) for group in o.param_groups for p in group["params"]}


def test_residual_blocks_learn_more_slowly() -> None:
    """At the full rate most of their units come to rest, and then get no gradients any more."""
    model = VQVAE(TINY)
    rate = rates(model, "joint")
    block, down = model.analysis[0].blocks[0], model.down[0]
    assert rate[id(block.a.weight)] == rate[id(block.b.weight)] == BLOCK_RATE * rate[id(down.weight)]


def test_priors_learn_faster_from_recorded_codes_than_the_decoder() -> None:
    model = VQVAE(TINY)
    rate, prior = rates(model, "recorded"), model.priors[0]
    up, tail = model.up[0][0], model.tail[0]
    assert rate[id(up.weight)] == pytest.approx(FINISH_RATE * MUON_RATE)
    assert rate[id(prior.hidden.weight)] == pytest.approx(PRIORS_RATE * rate[id(up.weight)])
    assert rate[id(prior.hidden.bias)] == pytest.approx(PRIORS_RATE * rate[id(tail.weight)])


def test_a_bank_that_goes_on_learns_more_slowly_from_fitted_latents_and_leaves_the_encoder() -> None:
    model = with_two_banks(VQVAE(TINY))

    def learned() -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    (adam,) = optimizers(model, "visual")
    assert {group["lr"] for group in adam.param_groups} == {VISUAL_RATE}
    assert not fits(model, "visual")
    assert {name for name in learned() if in_encoder(name)} == {
        *("analysis.0.gain", "analysis.1.gain", "analysis.2.gain", "latents.0.log_gain", "latents.1.log_gain")
    }
    with torch.no_grad():
        model.latents[-1].log_inverse[-1] += 0.01
    (adam,) = optimizers(model, "visual")
    assert {group["lr"] for group in adam.param_groups} == {SETTLED * VISUAL_RATE}
    assert fits(model, "visual")
    assert not fits(model, "joint")
    assert {"synthesis.0.gain", "latents.1.log_inverse"} <= learned()
    assert not [name for name in learned() if in_encoder(name)]


def test_a_new_bank_stays_new_when_its_run_is_resumed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[bool] = []
    monkeypatch.setattr(trainer, "encoder_fit", lambda *_: fitted.append(True))
    for steps in (2, 4):
        train(run(images, tmp_path / "r", stage="visual", start=WEIGHTS, steps=steps), quiet)
    assert not fitted
    model = with_two_banks(load_weights(WEIGHTS))
    with torch.no_grad():
        model.latents[-1].log_inverse[-1] += 0.1
    save_weights(model, tmp_path / "trained.safetensors")
    train(run(images, tmp_path / "s", stage="visual", start=tmp_path / "trained.safetensors", steps=1), quiet)
    assert fitted


def test_training_flushes_denormals_and_the_caller_does_not() -> None:
    tiny = torch.full((1,), 1e-38)
    with without_denormals():
        assert (tiny * 0.5).item() == 0
    assert (tiny * 0.5).item() > 0


def test_muon_makes_updates_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for updates in orthogonalise([torch.randn(1, 30, 90), torch.randn(4, 90, 30), torch.randn(2, 30, 30)]):
        for update in updates:
            values = torch.linalg.svdvals(update)
            assert values.quantile(0.1) > 0.5 and values.max() < 1.3


def test_muon_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    for shape in ((8, 20), (20, 8)):
        matrix = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        (update,) = orthogonalise([matrix[None]])
        inner = u.T @ update[0] @ v.T
        assert torch.allclose(inner, inner.diagonal().diag(), atol=1e-4)


def test_muon_takes_the_matrices_of_a_parameter_one_by_one() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(3, 8, 20) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    together, alone = torch.zeros(24, 20), [torch.zeros(8, 20) for _ in range(3)]
    together.grad = gradient.flatten(0, 1)
    for p, g in zip(alone, gradient, strict=True):
        p.grad = g.clone()
    for optim in (Muon([{"params": [together], "parts": 3}], 0.1), Muon(alone, 0.1)):
        optim.step()
    assert together.any()
    torch.testing.assert_close(together, torch.cat(alone))


def test_muon_moves_a_convolution_alike_in_either_memory_layout() -> None:
    torch.manual_seed(0)
    gradient, found = torch.randn(6, 4, 3, 3), []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = torch.zeros(6, 4, 3, 3).contiguous(memory_format=layout)
        p.grad = gradient.clone()  # in either case the order of its own
        Muon([p], 0.1).step()
        found.append(p.contiguous())
    assert found[0].any()
    torch.testing.assert_close(*found)


def test_the_product_stays_within_its_budget() -> None:
    """Multiply-accumulates per pixel, counted by the layers that run: the limits are 120, 15 and 60 thousand."""
    from torch.utils.flop_counter import FlopCounterMode

    model, level = VQVAE(PRODUCT).eval(), torch.zeros(1, dtype=torch.long)
    x = torch.rand(1, 3, 256, 256)
    counts = {}
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            features = model.analyse(x, level)
            z = model.latent(0, x, features[0], None, level)
            context = model.decode_grid(0, z, None, level)
            model.latent(1, x, features[1], context, level)
        counts["encoder"] = counter.get_total_flops() / 2 / 256**2
        indices = [torch.zeros(1, g.groups, 256 // g.stride, 256 // g.stride, dtype=torch.long) for g in PRODUCT.grids]
        with FlopCounterMode(display=False) as counter:
            context = None
            for k in range(len(indices)):
                context = model.decode_grid(k, model.codes(k, indices), context, level)
        counts["decoder"] = counter.get_total_flops() / 2 / 256**2
        dense = 0.0
        with FlopCounterMode(display=False) as counter:
            for k, (grid, share) in enumerate(zip(PRODUCT.grids, ACTIVE, strict=True)):
                shape = 1, 256 // grid.stride, 256 // grid.stride
                condition = None
                if k:
                    stack, coarser = model.priors[k].condition, PRODUCT.grids[k - 1]
                    assert stack is not None
                    condition = stack(torch.zeros(1, shape[1] // 2, shape[2] // 2, coarser.groups * coarser.dim), level)
                flags, units = model.priors[k](torch.zeros(*shape, grid.groups * grid.dim), level, condition)
                model.priors[k].logits(units, rows_of(torch.rand(flags.shape) < share))
                # Here all hidden units are computed at once; the walk computes those of the rows.
                dense += (1 - share) * model.priors[k].hidden.weight.numel() / grid.stride**2
        counts["prior"] = counter.get_total_flops() / 2 / 256**2 - dense
    assert counts["encoder"] <= 120e3 and counts["decoder"] <= 60e3 and counts["prior"] <= 15e3, counts


def test_a_run_of_another_configuration_is_not_resumed(images: Path, tmp_path: Path) -> None:
    train(run(images, tmp_path / "r"), quiet)
    with pytest.raises(WeightsError, match="another folder"):
        train(run(images, tmp_path / "r", config=CONFIGS["vqvae2-paper"]), quiet)


def test_a_run_from_other_weights_is_not_taken_for_one_that_is_done(images: Path, tmp_path: Path) -> None:
    one = run(images, tmp_path / "r", stage="joint", start=WEIGHTS)
    train(one, quiet)
    with pytest.raises(WeightsError, match="another layout, stage or start: choose another folder"):
        train(replace(one, start=tmp_path / "r" / "model.safetensors"), quiet)


def test_a_model_without_rate_has_nothing_to_distil(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave distill out"):
        train(run(images, tmp_path / "r", stage="distill", config=CONFIGS["vqvae2-paper"]), quiet)
