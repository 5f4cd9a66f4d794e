"""Vector quantization with a product codebook, learned by EMA or by the codebook loss.

Sources: van den Oord et al., "Neural Discrete Representation Learning" (2017), equation 3 and appendix A.1;
Razavi et al., "Generating Diverse High-Fidelity Images with VQ-VAE-2" (2019), equation 2; the rate-constrained choice
is entropy-constrained vector quantization (Chou, Lookabaugh and Gray, 1989) with the prior's conditional code length.
"""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vqcodec.models import dyadic

Learning = Literal["ema", "loss"]

DECAY = 0.99  # of the EMA codebook
COMMITMENT = 0.25  # beta of equation 2
DEAD = 0.002  # a code used less than this fraction of the average is re-seeded from data
REBIRTH = 0.1  # and then counts as used this fraction of the average
TINY = 1e-9  # keeps what is drawn from possible where all distances are 0
# Code vectors as the prior's input: an eighth of their value on the activation grid, so +-31.75 in steps of 1/4.
CODE_SCALE = 0.125


class Codebook(nn.Module):
    """M groups of K code vectors with d channels: a latent vector (M * d) becomes M indices.

    One codebook serves all quality levels (the latents carry the level's gain), so an index means the same to the
    prior at every level. Distances are in bits: the choice minimises |z - e|^2 + rate.
    """

    vectors: Tensor
    count: Tensor
    total: Tensor
    usage: Tensor

    def __init__(self, groups: int, codes: int, dim: int, levels: int, learning: Learning = "ema") -> None:
        super().__init__()
        self.groups, self.codes, self.dim, self.learning = groups, codes, dim, learning
        self.vectors = nn.Parameter(torch.zeros(groups, codes, dim), requires_grad=learning == "loss")
        # State of learning: EMA of the number and the sum of the latents of each code, and the use of codes by level.
        self.register_buffer("count", torch.zeros(groups, codes))
        self.register_buffer("total", torch.zeros(groups, codes, dim))
        self.register_buffer("usage", torch.ones(levels, groups, codes))

    @property
    def initialised(self) -> bool:
        return bool(self.count.any())

    def activations(self) -> Tensor:
        """Code vectors as the prior sees them, (M, K, d) on the activation grid."""
        return dyadic.activation(self.vectors.detach() * CODE_SCALE)

    def split(self, z: Tensor) -> Tensor:
        """(B, M * d, h, w) -> (M, B, h * w, d)."""
        b, _, h, w = z.shape
        return z.float().reshape(b, self.groups, self.dim, h * w).permute(1, 0, 3, 2)

    def lookup(self, indices: Tensor, table: Tensor) -> Tensor:
        """Indices (B, M, h, w) and a table (M, K, d) -> (B, h, w, M * d)."""
        return torch.cat([table[g][indices[:, g].long()] for g in range(self.groups)], -1)

    def closeness(self, z: Tensor, group: int) -> Tensor:
        """|z|^2 - |z - e|^2 for z (..., d) of a group: (..., K)."""
        e = self.vectors[group].detach()
        # With the constant as one more input: a bias would be copied into every row before the product.
        weight = torch.cat([2 * e, -e.pow(2).sum(-1, keepdim=True)], 1)
        return F.pad(z, (0, 1), value=1.0) @ weight.t()

    def log2_usage(self) -> Tensor:
        """log2 of the frequency of use, (levels, M, K)."""
        p = self.usage + 0.1 * self.usage.mean(-1, keepdim=True)
        return torch.log2(p / p.sum(-1, keepdim=True))

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Codes from latents z (M, B, n, d), spread out as by k-means++: the next code is a latent drawn by its squared
        distance from the codes there are (Arthur and Vassilvitskii, 2007)."""
        z, groups = z.flatten(1, 2), torch.arange(self.groups, device=z.device)
        pick = torch.randint(z.shape[1], (self.groups,), device=z.device)
        distance = torch.full(z.shape[:2], torch.inf, device=z.device)
        for k in range(self.codes):
            self.vectors[:, k] = z[groups, pick]
            distance = torch.minimum(distance, (z - self.vectors[:, k, None]).pow(2).sum(-1))
            pick = torch.multinomial(distance + TINY, 1)[:, 0]
        self._broadcast(self.vectors.data)
        self.count.fill_(1.0)
        self.total.copy_(self.vectors)

    @torch.no_grad()
    def update(self, z: Tensor, indices: Tensor, level: Tensor) -> None:
        """One step of learning from latents z (M, B, n, d) with their indices (M, B, n) and levels (B,).

        EMA with Laplace smoothing as in Sonnet: n_k <- (n_k + eps) / (n + K eps) * n. Dead codes are re-seeded from the
        latents that the codes fit worst, because the others need none: they are drawn by the square of their distance.
        """
        groups = torch.arange(self.groups, device=z.device)
        flat = indices + (level[:, None] * self.groups + groups[:, None, None]) * self.codes
        use = torch.bincount(flat.flatten(), minlength=self.usage.numel()).view_as(self.usage).float()
        sums = torch.zeros_like(self.total)
        for g in range(self.groups):
            sums[g].index_add_(0, indices[g].flatten(), z[g].flatten(0, 1))
        self._reduce(use)
        self._reduce(sums)
        seen = use.sum((1, 2)) > 0
        self.usage[seen] = DECAY * self.usage[seen] + (1 - DECAY) * use[seen]
        self.count.mul_(DECAY).add_(use.sum(0), alpha=1 - DECAY)
        self.total.mul_(DECAY).add_(sums, alpha=1 - DECAY)
        n = self.count.sum(-1, keepdim=True)
        if self.learning == "ema":
            smooth = (self.count + 1e-5) / (n + self.codes * 1e-5) * n
            self.vectors.copy_(self.total / smooth[..., None])
        dead = self.count < DEAD * n / self.codes
        if dead.any():
            latents = z.flatten(1, 2)
            chosen = self.vectors[groups[:, None], indices.flatten(1)]
            distance = (latents - chosen).pow(2).sum(-1)
            pick = torch.multinomial(distance.square() + TINY, self.codes, replacement=True)
            fresh = latents[groups[:, None], pick]
            self._broadcast(fresh)
            reborn = (REBIRTH * n / self.codes).expand_as(self.count)
            self.vectors[dead], self.count[dead] = fresh[dead], reborn[dead]
            self.total[dead] = (fresh * reborn[..., None])[dead]

    @staticmethod
    def _reduce(x: Tensor) -> None:
        if dist.is_initialized():
            dist.all_reduce(x)

    @staticmethod
    def _broadcast(x: Tensor) -> None:
        if dist.is_initialized():
            dist.broadcast(x, 0)


class _CodeLength(torch.autograd.Function):
    """-log2 of 2**logits[index] / sum(2**logits) per row; the gradient takes no more than three passes over K."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits * math.log(2), -1)
        ctx.save_for_backward(log_p, index)
        return log_p.gather(-1, index[..., None]).squeeze(-1).float() / -math.log(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        log_p, index = ctx.saved_tensors
        g = gradient[..., None].to(log_p.dtype)
        return log_p.exp().mul_(g).scatter_add_(-1, index[..., None], -g), None


def code_length(logits: Tensor, index: Tensor) -> Tensor:
    """Bits of indices (...) under the prior's logits (..., K)."""
    return _CodeLength.apply(logits, index)


def choose(closeness: Tensor, log2_p: Tensor, rate_weight: float) -> Tensor:
    """Rate-constrained choice in one group: indices (...) of the least distance + rate_weight * bits.

    closeness: (..., K), minus the distance, is overwritten by minus the cost; log2_p: minus the bits, up to a constant.
    """
    cost = closeness.add_(log2_p, alpha=rate_weight)
    # NumPy's argmax is several times faster than torch's on a CPU.
    return torch.from_numpy(cost.numpy().argmax(-1)) if cost.device.type == "cpu" else cost.argmax(-1)


def rate_gradient(cost: Tensor, log2_p: Tensor, vectors: Tensor) -> Tensor:
    """Gradient (..., d) of the expected rate with respect to z, for indices drawn from q = softmax(-cost).

    d/dz sum_k q_k r_k = 2 sum_k q_k (r_k - mean r) e_k, r = -log2 p, which needs no autograd through the K axis.
    cost: (..., K), given as minus the cost; log2_p: up to a constant.
    """
    q = torch.softmax(cost, -1)
    one = torch.cat([vectors, torch.ones_like(vectors[:, :1])], -1)
    mean = q @ vectors
    weighted = q.mul_(log2_p) @ one
    return 2 * (mean * weighted[..., -1:] - weighted[..., :-1])
