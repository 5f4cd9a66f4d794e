"""Training: one loop for six stages, on one process or many, on CPUs or GPUs.

=========  ====================================  =================================
stage      learns                                rate weight of the choice
=========  ====================================  =================================
vqvae      everything                            0 to 1 over the first steps
joint      everything, from trained weights      1
finish     the decoder, its code vectors and     1, less where smooth
           the priors, on what the fit makes
           of latents: the last mile
recorded   the decoder and the priors, on        none: they stay as they are
           indices as files have them, for
           both tunes in turn
distill    the encoder's last layers for the     1, less where smooth;
           finest grid, to say at once what      for the eye by what it
           the fit makes of their latents        overlooks
visual     the gains and biases for the eye;     1; once they have been
           once trained, all but the             trained, by what the eye
           encoder's                             overlooks
=========  ====================================  =================================

Loss of a sample at level q: w_q (lambda_q 255^2 MSE + bits per pixel), w_q = (lambda_middle / lambda_q)^0.5, which
gives every level a like share: the optimal loss grows about as the square root of lambda. A few samples are decoded
from the coarsest grid alone, so that the decoder can show a preview. In the stage ``visual`` most of the squared error
gives way to the distance by SSIMULACRA 2, in the proportion that its module explains. In the stages ``finish``,
``recorded`` and ``distill``, and in ``visual`` with a bank that has been trained before, the latents are fitted as the
encoder does it at the default effort; all else learns from its first guess. In ``recorded`` the weights that the run
starts with fit them, once, and many steps learn from what is recorded of that: a step takes a fraction of the time, and
nothing drifts, for the codes do not follow the decoder. The loss of ``distill`` is the squared distance of the guess
from what the fit makes of it, weighted as above. With a bank for the eye every second batch of these two is for the
eye. The last part of a run has larger crops, fewer in proportion; the first steps of a model from scratch see the two
finest levels alone.

A step waits for nothing that a GPU computes: what the log needs is added up there and read with each row.
"""

import copy
import functools
import hashlib
import io
import json
import math
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitstream.errors import UsageError, WeightsError
from vqcodec.config import DEFAULT_EFFORT, EFFORTS, ModelConfig, Stage
from vqcodec.files import write_atomically
from vqcodec.masking import variance, visibility
from vqcodec.models.refine import refined_latents
from vqcodec.models.vqvae import VQVAE, Fit, Output, ResBlock
from vqcodec.smooth import rate_share
from vqcodec.ssimulacra2 import WORTH, Ssimulacra2
from vqcodec.training.data import Cache, Crops
from vqcodec.training.muon import Muon
from vqcodec.weights import load_weights, save_weights

MUON_RATE, ADAM_RATE = 1.5e-3, 1e-3
BLOCK_RATE = 0.2  # factor on Muon's in residual blocks: at the full rate most of their units are soon at rest for ever
VISUAL_RATE = 4e-3  # of Adam in the stage ``visual``, for a new bank
SETTLED = 0.025  # factor on it for a bank that goes on, with fitted latents
FINISH_RATE = 0.05  # factor on both in ``finish`` and ``recorded``, whose decoders lose by more of it
BOOKS_RATE = 3.0  # and another one for code vectors in the former
PRIORS_RATE = 3.0  # and for the priors in the latter
DISTILL_RATE = 0.3  # factor on both in the stage ``distill``
WARM_UP, SHORT_WARM_UP = 300, 50  # steps; the latter of stages that begin with weights that are nearly final
COOLDOWN, LONG_COOLDOWN = 0.3, 0.8  # the last part of the run, in which the learning rate falls to FLOOR of its value
FLOOR = 0.001
RAMP = (100, 700)  # steps between which the rate weight rises from 0 to 1
FINEST = 0.06  # the first part of a run from scratch, which sees the two finest levels alone
LATE = 0.75  # from here on crops are LARGER times as large
LARGER = 1.5
DROPPED = 0.04  # share of samples without the finer grids
DROPPED_WEIGHT = 0.1  # of their distortion, which is several times larger
VISUAL_SHARE = 0.6  # of the distance by SSIMULACRA 2, the rest is squared error
REUSE = 3  # steps of the stage ``recorded`` for each new batch, until there are; with 8 it learns crops by heart
RECORDED = 2**29  # pixels of them: some 3 GB
EMA_DECAY, EMA_INTERVAL = 0.999, 8  # EMA of the weights: decay of a step, and steps that one update stands for
CLIP = 1.0
CHECKPOINT_SECONDS = 300
PATIENCE = timedelta(hours=3)  # of processes that wait for another one, which may have thousands of images to decode
AGAIN = "to go on from the last checkpoint with other crops, give the same command with another --seed"


@dataclass(frozen=True)
class Run:
    """A training run. Exactly one of steps and hours says how long.

    batch: crops per step and process. mix: further folders, each with its share of the crops.
    """

    config: ModelConfig
    images: Path
    output: Path
    stage: Stage = "vqvae"
    steps: int | None = None
    hours: float | None = None
    batch: int = 8
    crop: int = 256
    seed: int = 0
    start: Path | None = None
    mix: tuple[tuple[Path, float], ...] = ()
    log_steps: int = 50


def learning_rate(progress: float, step: int, stage: Stage, fitted: bool) -> float:
    """Factor of the learning rate: warm up, hold, fall as a cosine; fitted: as in ``fits``."""
    cooldown = LONG_COOLDOWN if fitted else COOLDOWN
    fall = max(0.0, (progress - 1 + cooldown) / cooldown)
    return min(1.0, (step + 1) / (SHORT_WARM_UP if fitted or stage == "visual" else WARM_UP)) * (
        FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))
    )


def rate_weight(stage: Stage, step: int, config: ModelConfig) -> float:
    """Factor on the rate term, 0..1: a run from scratch learns to reconstruct first."""
    if not config.rate_constrained:
        return 0.0
    low, high = RAMP
    return min(1.0, max(0.0, (step - low) / (high - low))) if stage == "vqvae" else 1.0


def crops_at(run: Run, progress: float) -> tuple[int, int]:
    """Number and side of the crops: about the same pixels in all steps."""
    if progress < LATE:
        return run.batch, run.crop
    side = late_side(run)
    return max(1, round(run.batch * run.crop**2 / side**2)), side


def late_side(run: Run) -> int:
    return int(LARGER * run.crop) // run.config.stride * run.config.stride


def learns(name: str, model: VQVAE, stage: Stage) -> bool:
    """Whether a parameter learns in a stage."""
    if stage in ("vqvae", "joint"):
        return True
    if stage == "visual":
        # Fitted latents have no gradients for the encoder.
        return in_banks(name) and not (settled(model) and in_encoder(name))
    if stage == "finish":
        return not in_encoder(name)
    if stage == "recorded":
        decoder = ("join.", "synthesis.", "up.", "tail.", "pixels.")
        return name.startswith((*decoder, "priors.")) or name.endswith(".log_inverse")
    parts = ("merge.{}.", "coefficients.{}.", "latents.{}.project.", "latents.{}.log_gain")
    return name.startswith(tuple(part.format(len(model.codebooks) - 1) for part in parts))


def in_encoder(name: str) -> bool:
    """Whether a parameter is of the encoder."""
    parts = name.startswith(("stem.", "down.", "analysis.", "merge.", "coefficients."))
    return parts or ".project." in name or name.endswith(".log_gain")


def in_banks(name: str) -> bool:
    """Whether a parameter has a row for each level of each tune."""
    biases = name.startswith("priors.") and name.endswith(".bias") and not name.endswith(".out.bias")
    return biases or name.endswith((".gain", ".log_gain", ".log_inverse", ".null"))


def with_two_banks(model: VQVAE) -> VQVAE:
    """The model with a bank for the eye, which begins as a copy of the other one."""
    if model.config.banks == 2:
        return model
    grown, state = VQVAE(replace(model.config, banks=2)), model.state_dict()
    shapes = {name: value.shape for name, value in grown.state_dict().items()}
    grown.load_state_dict({name: x if x.shape == shapes[name] else torch.cat([x, x]) for name, x in state.items()})
    return grown


def settled(model: VQVAE) -> bool:
    """Whether the second bank of a model is no longer a copy of the first one."""
    return not all(torch.equal(*latent.log_inverse.chunk(2)) for latent in model.latents)


def fits(model: VQVAE, stage: Stage) -> bool:
    """Whether a run that starts with a model learns from latents that are fitted as in files."""
    return stage in ("finish", "recorded", "distill") or (stage == "visual" and settled(model))


def optimizers(model: VQVAE, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the weights of hidden layers, Adam for biases, gains, codebooks and the first and last layers."""
    hidden: dict[tuple[int, float], list[Tensor]] = {}
    rest: dict[float, list[Tensor]] = {}
    edges = {id(p) for part in (model.stem, model.tail) for p in part.parameters()}
    # A prior's heads are matrices of their own, one for each group.
    parts = {
        id(layer.weight): prior.groups
        for prior in model.priors
        for layer in (prior.flag_hidden, prior.hidden, prior.out)
    }
    blocks = {id(p) for part in model.modules() if isinstance(part, ResBlock) for p in part.parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and learns(name, model, stage))
        if not p.requires_grad:
            continue
        rate = 1.0
        if stage == "finish" and name.startswith("codebooks."):
            rate = BOOKS_RATE
        elif stage == "recorded" and name.startswith("priors."):
            rate = PRIORS_RATE
        if p.ndim >= 2 and name.endswith("weight") and id(p) not in edges:
            rate *= BLOCK_RATE if id(p) in blocks else 1.0
            hidden.setdefault((parts.get(id(p), 1), rate), []).append(p)
        else:
            rest.setdefault(rate, []).append(p)
    factor = {"finish": FINISH_RATE, "recorded": FINISH_RATE, "distill": DISTILL_RATE}.get(stage, 1.0)
    matrices = [{"params": ps, "parts": n, "lr": factor * rate * MUON_RATE} for (n, rate), ps in hidden.items()]
    adam_rate = factor * ADAM_RATE
    if stage == "visual":
        adam_rate = SETTLED * VISUAL_RATE if settled(model) else VISUAL_RATE
    groups = [{"params": ps, "lr": rate * adam_rate} for rate, ps in rest.items()]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
    return [Muon(matrices, factor * MUON_RATE), adam] if matrices else [adam]


def sample_weights(config: ModelConfig) -> Tensor:
    """Weight of a sample's loss by its level, (levels,): without it the finest levels would drown the others."""
    lambdas = torch.tensor(config.lambdas)
    return (lambdas[config.levels // 2] / lambdas).sqrt() if config.rate_constrained else torch.ones(config.levels)


def encoder_fit(model: VQVAE, x: Tensor, level: Tensor, lambdas: Tensor, visual: bool) -> Fit:
    """What the encoder does to latents of crops x (B, 3, H, W) in 0..1 at the default effort. lambdas: (B,); visual: as
    in ``refined_latents``."""
    pixels = (x * 255).round().to(torch.uint8)
    cells = variance(pixels, model.config.grids[-1].stride)
    common = 1 / visibility(cells, lambdas[:, None, None, None]) if visual else torch.ones_like(cells)

    def fit(
        z: Tensor, finer: Sequence[Tensor], context: Tensor | None, known: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        z, context = z.detach(), None if context is None else context.detach()
        if not model.config.rate_constrained:
            return z, torch.zeros_like(z[:, :1])
        weights = common if visual or finer else common * rate_share(z)
        bits, effort = lambdas * 255**2 / 3, EFFORTS[DEFAULT_EFFORT]
        if steps := effort.coarser if finer else effort.finest:
            finer = [features.detach() for features in finer]
            z = refined_latents(model, pixels, z, finer, context, level, bits, weights, steps, known, visual)
        return z, F.avg_pool2d(weights, weights.shape[2] // z.shape[2])

    return fit


class Average:
    """EMA of a model's parameters and buffers, in a model of its own."""

    def __init__(self, model: VQVAE) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: VQVAE, step: int) -> None:
        if step % EMA_INTERVAL:
            return
        decay = min(EMA_DECAY, (1 + step) / (10 + step)) ** EMA_INTERVAL
        means, values = self.model.state_dict(), model.state_dict()
        # Codebooks that learn from latents are averages already, and a re-seeded code must not crawl to its place.
        if model.codebooks.training:
            books = [name for name in means if name.startswith("codebooks.")]
            torch._foreach_copy_([means.pop(name) for name in books], [values.pop(name) for name in books])
        torch._foreach_lerp_(list(means.values()), list(values.values()), 1 - decay)


@contextmanager
def processes() -> Iterator[tuple[int, int, torch.device]]:
    """(rank, number of processes, device); under torchrun a process group, nccl on GPUs and gloo on CPUs."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "RANK" not in os.environ:
        yield 0, 1, device
        return
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()


@contextmanager
def without_denormals() -> Iterator[None]:
    """Momenta of weights that get no gradients any more decay to denormals, which make Muon five times as slow."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def levels_for(batch: int, low: int, high: int, device: torch.device | None = None) -> Tensor:
    """A level of low .. high - 1 for each sample, every level as often as the batch allows: (batch,)."""
    rounds = -(-batch // (high - low))
    order = torch.rand(rounds, high - low, device=device).argsort(1)
    return low + order.flatten()[:batch]


class State:
    """What a run has come to: all that its checkpoint holds."""

    def __init__(self, run: Run, model: VQVAE) -> None:
        self.folder, self.model, self.average = run.output, model, Average(model)
        self.optimizers = optimizers(model, run.stage)
        self.step, self.elapsed = 0, 0.0  # seconds
        start = hashlib.sha256(run.start.read_bytes()).hexdigest() if run.start else None
        self.identity = json.dumps({"stage": run.stage, "start": start, **asdict(model.config)})

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self, elapsed: float) -> None:
        """The checkpoint, and the averaged weights. elapsed: seconds. Raises FloatingPointError if the weights are not
        finite: then the last ones that were stay where they are."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise FloatingPointError(f"the weights are no longer finite: {AGAIN}")
        state = {
            "run": self.identity,
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizers": [optim.state_dict() for optim in self.optimizers],
            "step": self.step,
            "elapsed": elapsed,
        }
        saved = io.BytesIO()
        torch.save(state, saved)  # given a file, it turns a full disk into an error of its own
        with write_atomically(self.checkpoint, force=True) as file:
            file.write(saved.getbuffer())
        save_weights(self.average.model, self.folder / "model.safetensors")

    def resume(self) -> bool:
        """Go on from the checkpoint, if there is one. Raises WeightsError for a damaged file or another run's."""
        path = self.checkpoint
        if not path.exists():
            return False
        try:
            # To the CPU, where Adam's numbers of steps must stay: they are asked for in every step.
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            same = state["run"] == self.identity
        except (EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError):
            raise WeightsError(f"{path} is damaged or no checkpoint: remove it to start anew") from None
        if not same:
            raise WeightsError(f"{path} belongs to a run of another layout, stage or start: choose another folder")
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        for optim, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
        self.step, self.elapsed = state["step"], state["elapsed"]
        return True


class Batch(NamedTuple):
    """Crops x (B, 3, H, W), uint8 or in 0..1, and their level (B,), all of one tune. Of recorded ones also the indices
    of each grid as files have them."""

    x: Tensor
    level: Tensor
    visual: bool
    indices: Sequence[Tensor] = ()


class Measured(NamedTuple):
    """A batch: loss (); level (B,), of either tune; whole (B,), 1 for samples with all grids and 0 for others; squared
    error mse (B,); bits per pixel bpp, of the first samples."""

    loss: Tensor
    level: Tensor
    whole: Tensor
    mse: Tensor
    bpp: Tensor


class Objective:
    """The loss that the head of this file tells of, of one batch after the other."""

    def __init__(self, model: VQVAE, stage: Stage, fitted: bool, device: torch.device) -> None:
        config = model.config
        self.model, self.config, self.stage, self.fitted, self.device = model, config, stage, fitted, device
        self.lambdas = torch.tensor(config.lambdas, device=device).repeat(config.banks)
        # Without rate the distortion has weight 1 per pixel value in 0..1, as in the VQ-VAE papers.
        self.scales = self.lambdas * 255**2 if config.rate_constrained else torch.ones_like(self.lambdas)
        self.weights = sample_weights(config).to(device).repeat(config.banks)
        self.eye = Ssimulacra2().to(device) if stage in ("visual", "recorded") else None
        self.recorder = copy.deepcopy(model).requires_grad_(False) if stage == "recorded" else None
        self.recorded: list[Batch] = []

    def batch(self, draw: Callable[[], Tensor], step: int, progress: float) -> Batch:
        """What a step learns from. draw: new crops (B, 3, H, W) in 0..1; not called where recorded ones serve again."""
        if self.recorder is None:
            return self._new(draw(), step, progress)
        pixels = sum(batch.x[:, 0].numel() for batch in self.recorded)
        # A run that is resumed records in every step until it has as many again.
        if len(self.recorded) > step // REUSE or pixels >= RECORDED:
            return random.choice(self.recorded)
        x, level, visual, *_ = self._new(draw(), len(self.recorded), progress)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            fit = encoder_fit(self.recorder, x, level, self.lambdas[level], visual)
            out = self.recorder(x, level, rate_weight(self.stage, step, self.config), None, fit)
        indices = [index.int() for index in out.indices]
        self.recorded.append(Batch((x * 255).round().to(torch.uint8), level, visual, indices))
        return self.recorded[-1]

    def _new(self, x: Tensor, turn: int, progress: float) -> Batch:
        config = self.config
        first = config.levels - 2 if self.stage == "vqvae" and progress < FINEST and config.levels > 2 else 0
        in_turn = self.stage in ("recorded", "distill") and config.banks == 2
        visual = self.stage == "visual" or (in_turn and turn % 2 == 1)
        return Batch(x, levels_for(len(x), first, config.levels, self.device) + config.levels * visual, visual)

    def __call__(self, network: Callable[..., Output], batch: Batch, step: int) -> Measured:
        """network: the model as it is called, see ``wrapped``."""
        level, visual, given = batch.level, batch.visual, [index.long() for index in batch.indices]
        x = batch.x if batch.x.is_floating_point() else batch.x.float() / 255
        pixels = x[0, 0].numel()
        dropped = torch.rand(len(x), device=self.device) < DROPPED
        fitted = self.fitted and not given
        # What a fit does without gradients must not leave weights without gradients in the cache.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=not fitted):
            fit = None
            if fitted:
                fit = encoder_fit(self.model, x, level, self.lambdas[level], visual)
            out = network(x, level, rate_weight(self.stage, step, self.config), dropped, fit, given)
        # What lies beyond black or white is clipped in the end; the gradient is taken as if it were not.
        x_hat = out.x_hat + (out.x_hat.detach().clamp(0, 1) - out.x_hat.detach())
        error = mse = (x_hat - x).pow(2).mean((1, 2, 3))
        if self.eye and visual:
            error = (1 - VISUAL_SHARE) * mse + VISUAL_SHARE * WORTH * self.eye(x, x_hat)
        distortion = self.scales[level] * error * torch.where(dropped, DROPPED_WEIGHT, 1.0)
        bpp = out.bits.sum(0) / pixels
        loss = (self.weights[level] * (distortion + out.penalty / pixels)).mean()
        loss = loss + (self.weights[level[: len(bpp)]] * bpp).mean()
        if self.stage == "distill":
            loss = (self.weights[level] * out.distance / pixels).mean()
        return Measured(loss, level, (~dropped).float(), mse, bpp)


class Sums:
    """What the rows of the log are made of, on the device, by level: weighted loss, squared error, bits per pixel, and
    the numbers of samples that they are of."""

    def __init__(self, levels: int, device: torch.device) -> None:
        self.loss, self.steps = torch.zeros((), device=device), 0
        self.table = torch.zeros(4, levels, device=device)

    def add(self, measured: Measured) -> None:
        self.loss += measured.loss.detach()
        self.steps += 1
        level = measured.level % self.table.shape[1]
        coded = level[: len(measured.bpp)]
        rows = (
            (level, measured.mse * measured.whole),
            (level, measured.whole),
            (coded, measured.bpp),
            (coded, torch.ones_like(measured.bpp)),
        )
        for row, (at, values) in zip(self.table, rows, strict=True):
            row.index_add_(0, at, values.detach().float())

    def row(self) -> dict[str, Any]:
        """Means since the last row, of all and by level. Raises FloatingPointError if the loss is not finite."""
        loss = self.loss.item() / self.steps
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}: {AGAIN}")
        mse, samples, bpp, coded = self.table.tolist()

        def ratio(a: list[float], b: list[float]) -> list[float | None]:
            return [x / n if n else None for x, n in zip(a, b, strict=True)]

        def decibel(value: float | None) -> float | None:
            return None if value is None else round(-10 * math.log10(max(value, 1e-10)), 2)

        return {
            "loss": round(loss, 4),
            "psnr": decibel(sum(mse) / max(sum(samples), 1)),
            "bpp": round(sum(bpp) / sum(coded), 4),
            "level_psnr": [decibel(value) for value in ratio(mse, samples)],
            "level_bpp": [None if value is None else round(value, 4) for value in ratio(bpp, coded)],
        }


def train(run: Run, report: Callable[[str], None] = print) -> VQVAE:
    """Train and return the averaged model.

    Writes to ``run.output``: ``log.jsonl`` (loss, PSNR, bits per pixel, codebook use) and, every few minutes and at the
    end, ``checkpoint.pt`` (to resume from: same command) and ``model.safetensors``; beside it, in ``cache``, the
    decoded images. Raises FileNotFoundError without images, ImageError if none can be read or is as large as a crop,
    WeightsError for weights or a checkpoint that do not fit, UsageError for a crop that is not whole cells and for the
    stage ``distill`` of a model without rate, FloatingPointError if the run diverges.
    """
    if (run.steps is None) == (run.hours is None):
        raise ValueError("a run needs either steps or hours")
    if run.crop % run.config.stride:
        raise UsageError(f"crops of {run.crop} pixels are not whole cells: choose a multiple of {run.config.stride}")
    if run.stage == "distill" and not run.config.rate_constrained:
        raise UsageError(f"{run.config.name} is a model without rate, whose latents are not fitted: leave distill out")
    with without_denormals(), processes() as (rank, size, device):
        seed_everything(run.seed)
        model = prepared(run, device)
        fitted = fits(model, run.stage)  # by the start, also of a run that is resumed
        objective = Objective(model, run.stage, fitted, device)
        state = State(run, model)
        base = [group["lr"] for optim in state.optimizers for group in optim.param_groups]
        run.output.mkdir(parents=True, exist_ok=True)
        log = run.output / "log.jsonl"
        resumed = state.resume()
        if rank == 0:
            forget_rows(log, state.step)
        if resumed:
            report(f"resuming at step {state.step}, {state.elapsed / 3600:.2f} h")
        seed_everything(run.seed + size * state.step + rank)  # a resumed run sees new crops, each process its own
        crops = Crops(folders(run, rank, size, report), max(run.crop, late_side(run)), device, report)
        network = wrapped(model, size, device)
        started = saved_at = time.monotonic()
        sums = Sums(model.config.levels, device)
        while True:
            spent = state.elapsed + time.monotonic() - started
            progress = state.step / run.steps if run.steps is not None else spent / 3600 / (run.hours or 1.0)
            if size > 1:  # processes agree on when to stop
                shared = torch.tensor(progress, device=device)
                dist.broadcast(shared, 0)
                progress = shared.item()
            if progress >= 1:
                break
            factor = learning_rate(progress, state.step, run.stage, fitted)
            for group, lr in zip((g for o in state.optimizers for g in o.param_groups), base, strict=True):
                group["lr"] = lr * factor
            draw = functools.partial(crops.draw, *crops_at(run, progress))
            measured = objective(network, objective.batch(draw, state.step, progress), state.step)
            for optim in state.optimizers:
                optim.zero_grad()
            measured.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optim in state.optimizers:
                optim.step()
            state.average.update(model, state.step)
            state.step += 1
            sums.add(measured)
            if state.step % run.log_steps == 0 or state.step == 1:
                place = {"step": state.step, "hours": round(spent / 3600, 3)}
                row = {**place, **sums.row(), "perplexity": perplexity(model)}
                sums = Sums(model.config.levels, device)
                if rank == 0:
                    with open(log, "a") as file:
                        file.write(json.dumps(row) + "\n")
                    report(" ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, list)))
            if rank == 0 and time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                saved_at = time.monotonic()
                state.save(spent)
        if rank == 0:
            state.save(state.elapsed + time.monotonic() - started)
    return state.average.model


def prepared(run: Run, device: torch.device) -> VQVAE:
    """The model of a run on its device, with what its stage lets learn."""
    model = load_weights(run.start) if run.start else VQVAE(run.config)
    if run.stage == "visual":
        model = with_two_banks(model)
    model = model.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    model.requires_grad_(True)
    for book in model.codebooks:
        book.vectors.requires_grad_(book.learning == "loss" or run.stage == "finish")
    if run.stage in ("finish", "recorded", "distill"):
        model.codebooks.eval()  # they have nothing to learn from latents
    for book in model.codebooks:
        book.fixed = run.stage == "visual"
        if book.training and not book.fixed:
            book.settle()
    return model


def folders(run: Run, rank: int, size: int, report: Callable[[str], None]) -> list[tuple[Cache, float]]:
    """The images of a run with their shares of the crops; the first process decodes them, the others wait."""
    shares = [(run.images, 1 - sum(share for _, share in run.mix)), *run.mix]
    place = run.output.parent / "cache"
    if rank == 0:
        for folder, _ in shares:
            Cache(folder, place, report)
    if size > 1:
        dist.barrier()
    return [(Cache(folder, place), share) for folder, share in shares]


def wrapped(model: VQVAE, size: int, device: torch.device) -> Callable[..., Any]:
    """The model as the loop calls it: compiled on a GPU, or shared among processes."""
    if size > 1:
        return DistributedDataParallel(model, broadcast_buffers=False)
    if device.type != "cuda":
        return model
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
    torch._dynamo.config.allow_unspec_int_on_nn_module = (
        True  # codebooks count their updates: no reason to compile anew
    )
    compiled = torch.compile(model)

    def call(x: Tensor, level: Tensor, rate: float, dropped: Tensor, fit: Fit | None, given: Sequence[Tensor]) -> Any:
        # A rate that still rises would be compiled anew with every step, and a fit is another one in each.
        return (compiled if rate in (0.0, 1.0) and fit is None else model)(x, level, rate, dropped, fit, given)

    return call


def forget_rows(log: Path, step: int) -> None:
    """Drop the rows after a step, which a resumed run writes again, and a last one that was cut off."""
    if log.exists():
        rows = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        with write_atomically(log, force=True) as file:
            file.write("".join(line for line in rows if json.loads(line)["step"] <= step).encode())


def perplexity(model: VQVAE) -> str:
    """Codes in use, mean over the groups of each grid: 2 to the entropy of their use."""
    return ",".join(f"{2 ** float(perplexity_bits(book.count)):.1f}" for book in model.codebooks)


def perplexity_bits(count: Tensor) -> Tensor:
    """Entropy of the use of codes, mean over groups, bits."""
    p = count / count.sum(-1, keepdim=True).clamp(min=1e-9)
    return -(p * p.clamp(min=1e-12).log2()).sum(-1).mean()
