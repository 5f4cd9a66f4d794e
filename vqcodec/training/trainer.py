"""Training: one loop for three stages, on one process or many.

=========  ====================================  =================================
stage      learns                                rate weight of the choice
=========  ====================================  =================================
vqvae      everything                            0 to 1 over the first steps
prior      the priors, on the codes of a fixed   1
           encoder
joint      everything, from trained weights      1
=========  ====================================  =================================

Loss of a sample at level q: w_q (lambda_q 255^2 MSE + bits per pixel), w_q = (lambda_middle / lambda_q)^0.5, which
gives every level a like share: the optimal loss grows about as the square root of lambda. A few samples are decoded
from the coarsest grid alone, so that the decoder can show a preview.
"""

import copy
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from bitstream.errors import WeightsError
from vqcodec.models.vqvae import VQVAE, ModelConfig
from vqcodec.training.data import Cache, Crops
from vqcodec.training.muon import Muon
from vqcodec.weights import load_weights, save_weights

Stage = Literal["vqvae", "prior", "joint"]

MUON_RATE, ADAM_RATE = 1.5e-3, 1e-3
WARM_UP = 300  # steps
DECAY = 0.4  # the last part of the run, in which the learning rate falls to FLOOR of its value
FLOOR = 0.02
RAMP = (100, 700)  # steps between which the rate weight rises from 0 to 1
DROPPED = 0.04  # share of samples without the finer grids
DROPPED_WEIGHT = 0.1  # of their distortion, which is several times larger
AVERAGE = 0.999  # EMA of the weights
CLIP = 1.0


@dataclass(frozen=True)
class Run:
    """A training run. Exactly one of steps and hours says how long; ``batch`` is per process."""

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
    checkpoint_minutes: float = 5.0
    log_steps: int = 50


def learning_rate(progress: float, step: int) -> float:
    """Factor of the learning rate: warm up, hold, fall as a cosine."""
    fall = max(0.0, (progress - 1 + DECAY) / DECAY)
    return min(1.0, (step + 1) / WARM_UP) * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, fall))))


def rate_weight(stage: Stage, step: int, config: ModelConfig) -> float:
    if not config.rate_constrained:
        return 0.0
    low, high = RAMP
    return min(1.0, max(0.0, (step - low) / (high - low))) if stage == "vqvae" else 1.0


def optimizers(model: VQVAE, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the weights of hidden layers, Adam for biases, gains, codebooks and the first and last layers."""
    hidden: dict[int, list[Tensor]] = {}
    rest: list[Tensor] = []
    edges = {id(p) for part in (model.stem, model.tail) for p in part.parameters()}
    # A prior's heads are matrices of their own, one for each group.
    parts = {
        id(layer.weight): prior.groups for prior in model.priors for layer in (prior.flag_hidden, prior.hidden, prior.out)
    }
    for name, p in model.named_parameters():
        if stage == "prior":
            p.requires_grad_(name.startswith("priors."))
        if not p.requires_grad:
            continue
        matrix = p.ndim >= 2 and name.endswith("weight") and id(p) not in edges
        (hidden.setdefault(parts.get(id(p), 1), []) if matrix else rest).append(p)
    matrices = [{"params": params, "parts": n} for n, params in hidden.items()]
    return [Muon(matrices, MUON_RATE), torch.optim.Adam(rest, ADAM_RATE, betas=(0.9, 0.99))]


def sample_weights(config: ModelConfig) -> Tensor:
    lambdas = torch.tensor(config.lambdas)
    return (lambdas[config.levels // 2] / lambdas).sqrt() if config.rate_constrained else torch.ones(config.levels)


class Average:
    """EMA of a model's parameters and buffers, in a model of its own."""

    def __init__(self, model: VQVAE) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: VQVAE, step: int) -> None:
        decay = min(AVERAGE, (1 + step) / (10 + step))
        means, values = self.model.state_dict(), model.state_dict()
        # Codebooks are averages already, and a re-seeded code must not crawl to its place.
        books = [name for name in means if name.startswith("codebooks.")]
        for name in books:
            means.pop(name).copy_(values.pop(name))
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
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def levels_for(batch: int, levels: int) -> Tensor:
    """A level for each sample, every level as often as the batch allows: (batch,)."""
    return torch.cat([torch.randperm(levels) for _ in range(-(-batch // levels))])[:batch]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    scratch = path.with_suffix(".partial")
    torch.save(state, scratch)
    os.replace(scratch, path)


def train(run: Run, report: Callable[[str], None] = print) -> VQVAE:
    """Train and return the averaged model.

    Writes to ``run.output``: ``checkpoint.pt`` (to resume from: same command), ``log.jsonl`` (loss, PSNR, bits per
    pixel, codebook use) and, at the end, ``model.safetensors``; beside it, in ``cache``, the decoded images.
    Raises FileNotFoundError without images, ImageError if one is damaged or none is as large as a crop, WeightsError
    for weights or a checkpoint that do not fit.
    """
    if (run.steps is None) == (run.hours is None):
        raise ValueError("a run needs either steps or hours")
    with processes() as (rank, size, device):
        seed_everything(run.seed)
        model = (load_weights(run.start) if run.start else VQVAE(run.config)).to(device)
        config = model.config
        model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        model.requires_grad_(True)
        for book in model.codebooks:
            book.vectors.requires_grad_(book.learning == "loss")
        if run.stage == "prior":
            model.eval().priors.train()  # the codebooks stay as they are
        optims = optimizers(model, run.stage)
        base = [group["lr"] for optim in optims for group in optim.param_groups]
        average, step, elapsed = Average(model), 0, 0.0
        run.output.mkdir(parents=True, exist_ok=True)
        checkpoint, log = run.output / "checkpoint.pt", run.output / "log.jsonl"
        identity = json.dumps({"stage": run.stage, **asdict(model.config)})
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location=device, weights_only=True)
            if state["run"] != identity:
                raise WeightsError(
                    f"{checkpoint} belongs to a run of another configuration or stage: choose another folder"
                )
            model.load_state_dict(state["model"])
            average.model.load_state_dict(state["average"])
            for optim, saved in zip(optims, state["optimizers"], strict=True):
                optim.load_state_dict(saved)
            step, elapsed = state["step"], state["elapsed"]
            forget_rows(log, step)
            report(f"resuming at step {step}, {elapsed / 3600:.2f} h")
        seed_everything(run.seed + size * step + rank)  # a resumed run sees new crops, each process its own
        if rank == 0:
            Cache(run.images, run.output.parent / "cache")
        if size > 1:
            dist.barrier()
        cache = Cache(run.images, run.output.parent / "cache")
        loader = DataLoader(
            Crops(cache, run.crop, run.seed + size * step + rank), run.batch, num_workers=1, prefetch_factor=4
        )
        network: nn.Module = model
        if size > 1:
            network = DistributedDataParallel(model, broadcast_buffers=False)
        lambdas, weights = torch.tensor(config.lambdas, device=device), sample_weights(config).to(device)
        started = saved_at = time.monotonic()
        sums: list[tuple[float, float, float]] = []
        for x in loader:
            spent = elapsed + time.monotonic() - started
            progress = step / run.steps if run.steps is not None else spent / 3600 / (run.hours or 1.0)
            if size > 1:  # processes agree on when to stop
                shared = torch.tensor(progress, device=device)
                dist.broadcast(shared, 0)
                progress = shared.item()
            if progress >= 1:
                break
            factor = learning_rate(progress, step)
            for group, lr in zip((g for o in optims for g in o.param_groups), base, strict=True):
                group["lr"] = lr * factor
            x = x.to(device).contiguous(memory_format=torch.channels_last)
            level = levels_for(len(x), config.levels).to(device)
            dropped = torch.rand(len(x), device=device) < DROPPED
            with torch.autocast(device.type, torch.bfloat16):
                out = network(x, level, rate_weight(run.stage, step, config), dropped)
            mse = (out.x_hat - x).pow(2).mean((1, 2, 3))
            bpp = out.bits.sum(0) / x[0, 0].numel()
            # Without rate the distortion has weight 1 per pixel value in 0..1, as in the VQ-VAE papers.
            scale = lambdas[level] * 255**2 if config.rate_constrained else 1.0
            distortion = scale * mse * torch.where(dropped, DROPPED_WEIGHT, 1.0)
            loss = (weights[level] * (distortion + out.penalty / x[0, 0].numel())).mean()
            loss = loss + (weights[level[: len(bpp)]] * bpp).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower the learning rate")
            for optim in optims:
                optim.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optim in optims:
                optim.step()
            average.update(model, step)
            step += 1
            whole = mse[~dropped] if not dropped.all() else mse
            sums.append((loss.item(), whole.mean().item(), bpp.mean().item()))
            if step % run.log_steps == 0:
                if rank == 0:
                    row = summary(model, step, spent, sums, mse, bpp, level)
                    with open(log, "a") as file:
                        file.write(json.dumps(row) + "\n")
                    report(" ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, list)))
                sums = []
            if rank == 0 and time.monotonic() - saved_at > 60 * run.checkpoint_minutes:
                saved_at = time.monotonic()
                save_checkpoint(checkpoint, state_of(identity, model, average, optims, step, spent))
        if rank == 0:
            spent = elapsed + time.monotonic() - started
            save_checkpoint(checkpoint, state_of(identity, model, average, optims, step, spent))
            save_weights(average.model, run.output / "model.safetensors")
    return average.model


def state_of(
    identity: str, model: VQVAE, average: Average, optims: list[torch.optim.Optimizer], step: int, elapsed: float
) -> dict[str, Any]:
    return {
        "run": identity,
        "model": model.state_dict(),
        "average": average.model.state_dict(),
        "optimizers": [o.state_dict() for o in optims],
        "step": step,
        "elapsed": elapsed,
    }


def forget_rows(log: Path, step: int) -> None:
    """Drop the rows after a step, which a resumed run writes again."""
    if log.exists():
        rows = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
        log.write_text("".join(rows))


def summary(
    model: VQVAE,
    step: int,
    spent: float,
    sums: list[tuple[float, float, float]],
    mse: Tensor,
    bpp: Tensor,
    level: Tensor,
) -> dict[str, Any]:
    """A row of the log: means since the last row, the last batch by level (the first half of it for the bits), codes in
    use per grid."""
    used = [round(2 ** float(perplexity_bits(book.count)), 1) for book in model.codebooks]
    order = level.argsort()
    loss, mean_mse, mean_bpp = (sum(column) / len(column) for column in zip(*sums, strict=True))
    return {
        "step": step,
        "hours": round(spent / 3600, 3),
        "loss": round(loss, 4),
        "psnr": round(-10 * math.log10(mean_mse), 2),
        "bpp": round(mean_bpp, 4),
        "perplexity": ",".join(map(str, used)),
        "level_psnr": [round(v, 2) for v in (-10 * mse[order].log10()).tolist()],
        "level_bpp": [round(v, 3) for v in bpp[level[: len(bpp)].argsort()].tolist()],
    }


def perplexity_bits(count: Tensor) -> Tensor:
    """Entropy of the use of codes, mean over groups, bits."""
    p = count / count.sum(-1, keepdim=True).clamp(min=1e-9)
    return -(p * p.clamp(min=1e-12).log2()).sum(-1).mean()
