"""Vector quantization with a product codebook, learned by EMA or by the codebook loss.

Sources: van den Oord et al., "Neural Discrete Representation Learning" (2017), equation 3 and appendix A.1;
Razavi et al., "Generating Diverse High-Fidelity Images with VQ-VAE-2" (2019), equation 2; the rate-constrained choice
is entropy-constrained vector quantization (Chou, Lookabaugh and Gray, 1989) with the prior's conditional code length.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bitstream.exact import CODE_SCALE_BITS, ESCAPE_BITS, ESCAPE_SIDE, ESCAPE_STEP, INDICES
from vqcodec import compiled
from vqcodec.config import Learning
from vqcodec.models import dyadic
from vqcodec.models.pixelsnail import Rows, grouped, per_row, rows_of, take

DECAY = 0.99  # of the EMA codebook
COMMITMENT = 0.25  # beta of equation 2
DEAD = 0.002  # a code used less than this fraction of the average is re-seeded from data
REBIRTH = 0.1  # and then counts as used this fraction of the average
REBIRTHS = 8  # updates from one look for dead codes to the next
EPSILON = 1e-5  # of Laplace smoothing
TINY = 1e-9  # keeps multinomial valid when all distances are 0
LN2 = math.log(2)

# log2 probabilities of the outcomes, (m, N), up to a constant per row, and which of them some rows have, (n,).
Logits = Callable[[Rows], tuple[Tensor, Tensor]]


class Choice(NamedTuple):
    """What a grid was quantized to. indices: (M, cells) int64; vectors: (M, cells, d) of these indices; rate_gradient:
    (M, cells, d), of the expected bits with respect to the latents."""

    indices: Tensor
    vectors: Tensor
    rate_gradient: Tensor


class Codebook(nn.Module):
    """M groups, each of the null code, which is the zero vector with index 0, and K code vectors with d channels.

    With escape, latents far from all codes go to a point of a square lattice: index K + 1 + 128 a + b stands for
    (4 (a - 64), 4 (b - 64)), for d = 2. One codebook serves all quality levels (the latents carry the level's gain), so
    an index means the same to the prior at every level. Distances are in bits: the choice minimises |z - e|^2 + rate.
    """

    vectors: Tensor
    count: Tensor
    total: Tensor
    usage: Tensor

    def __init__(
        self, groups: int, codes: int, dim: int, levels: int, escape: bool = False, learning: Learning = "ema"
    ) -> None:
        super().__init__()
        if codes + 1 + escape * ESCAPE_SIDE**dim > INDICES:
            raise ValueError(f"{codes} codes of {dim} channels, escape {escape}: an index is below {INDICES}")
        self.groups, self.codes, self.dim, self.escape, self.learning = groups, codes, dim, escape, learning
        self.outcomes = codes + escape  # of an index that is not null
        self.updates, self.started = 0, False
        self.fixed = False  # in training the vectors stay as they are, and the use of codes alone is learned
        self.vectors = nn.Parameter(torch.zeros(groups, codes, dim), requires_grad=learning == "loss")
        # State of learning: EMA of the number and the sum of the latents of each code, and the use of null and the
        # outcomes by level.
        self.register_buffer("count", torch.zeros(groups, codes))
        self.register_buffer("total", torch.zeros(groups, codes, dim))
        self.register_buffer("usage", torch.ones(levels, groups, 1 + self.outcomes))

    @property
    def initialised(self) -> bool:
        self.started = self.started or bool(self.count.any())  # looked at once: a GPU would have to be waited for
        return self.started

    @torch.no_grad()
    def settle(self) -> None:
        """Let the EMA go on from the vectors, which may have learned from a loss."""
        if self.learning == "ema" and self.initialised:
            self.total.copy_(self.vectors * self._smooth_count()[..., None])

    def _smooth_count(self) -> Tensor:
        """Laplace smoothing as in Sonnet: (n_k + eps) / (n + K eps) * n."""
        n = self.count.sum(-1, keepdim=True)
        return (self.count + EPSILON) / (n + self.codes * EPSILON) * n

    def split(self, z: Tensor) -> Tensor:
        """(B, M * d, h, w) -> (M, B h w, d)."""
        b, _, h, w = z.shape
        return z.float().reshape(b, self.groups, self.dim, h * w).permute(1, 0, 3, 2).flatten(1, 2)

    def join(self, x: Tensor, b: int, h: int, w: int) -> Tensor:
        """The inverse of ``split``: (B, M * d, h, w), channels last in memory."""
        return x.transpose(0, 1).reshape(b, h, w, self.groups * self.dim).permute(0, 3, 1, 2)

    def activations(self, x: Tensor, b: int, h: int, w: int) -> Tensor:
        """Vectors (M, B h w, d) as the prior sees them: (B, h, w, M * d) on the activation grid."""
        seen = dyadic.activation(x.detach() * 2.0**-CODE_SCALE_BITS)
        return seen.transpose(0, 1).reshape(b, h, w, -1)

    def lookup(self, index: Tensor) -> Tensor:
        """Vectors (M, cells, d) of indices (M, cells); on a CPU, all vectors of a cell side by side in memory."""
        if index.device.type == "cpu" and not (torch.is_grad_enabled() and self.vectors.requires_grad):
            found = self.vectors.new_empty(index.shape[1], self.groups, self.dim)
            compiled.lookup(index.int().contiguous().numpy(), self.vectors.detach().numpy(), found.numpy())
            return found.transpose(0, 1)
        index = index.long()
        table = F.pad(self.vectors, (0, 0, 1, 0)).flatten(0, 1)
        first = torch.arange(self.groups, device=index.device)[:, None] * (self.codes + 1)
        out = table[index.clamp(max=self.codes) + first]
        if not self.escape:
            return out
        point = (index - self.codes - 1)[..., None] // self._powers(index.device) % ESCAPE_SIDE
        return torch.where((index > self.codes)[..., None], ESCAPE_STEP * (point - ESCAPE_SIDE // 2), out)

    def outcome(self, index: Tensor) -> Tensor:
        """0 for null, 1..K for the codes, K + 1 for an escape."""
        return index.clamp(max=self.outcomes)

    def _powers(self, device: torch.device) -> Tensor:
        """What a step along each axis of the lattice adds to an index."""
        return ESCAPE_SIDE ** torch.arange(self.dim - 1, -1, -1, device=device)

    def log2_usage(self) -> Tensor:
        """log2 of the frequency of use, (levels, M, 1 + N)."""
        p = self.usage + 0.1 * self.usage.mean(-1, keepdim=True)
        return torch.log2(p / p.sum(-1, keepdim=True))

    @torch.no_grad()
    def guess(self, z: Tensor, level: Tensor, weight: Tensor) -> Tensor:
        """Indices (M, cells) of latents z (M, cells, d) by distance and the frequencies of the codes at the levels,
        (cells,), without the prior; weight: as in ``choose``."""
        usage = self.log2_usage()
        null = -usage[..., 0].t()[:, level]
        active = -usage[..., 1:].exp2().sum(-1).log2().t()[:, level]
        table = usage[..., 1:].transpose(0, 1).flatten(0, 1)

        def logits(rows: Rows) -> tuple[Tensor, Tensor]:
            cells = z.shape[1]
            group = (rows.place // cells).clamp(max=self.groups - 1)
            return table, group * len(usage) + level[rows.place % cells]

        return self.choose(z, null, active, logits, weight).indices

    @torch.no_grad()
    def choose(
        self, z: Tensor, null: Tensor, active: Tensor, logits: Logits, weight: Tensor, gradient: bool = False
    ) -> Choice:
        """The indices of least |z - e|^2 + weight * bits.

        z: (M, cells, d); null, active: (M, cells), the bits of a null flag and of its opposite; logits: asked for the
        rows where null is not sure to win; weight: (cells,).
        gradient: with the rate's gradient, that of the expected bits of indices drawn from q = softmax(-cost):
        d/dz sum_k q_k r_k = 2 sum_k q_k (r_k - mean r) e_k. It is 0 where null is sure to win.
        """
        if z.device.type != "cpu":
            rows = rows_of(z.pow(2).sum(-1) + weight * null > weight * active)
            return self._choose(z, null, active, rows, *logits(rows), weight, gradient)
        z, null, active = (x.float().contiguous() for x in (z, null, active))
        place = torch.empty(null.numel(), dtype=torch.long, device="cpu")
        ends = torch.empty(self.groups, dtype=torch.int32, device="cpu")
        compiled.likely(*(x.numpy() for x in (z, null, active, weight, place, ends)))
        rows = Rows(place[: int(ends[-1])], ends)
        return self._choose_compiled(z, null, active, rows, *logits(rows), weight, gradient)

    def _choose_compiled(
        self,
        z: Tensor,
        null: Tensor,
        active: Tensor,
        rows: Rows,
        table: Tensor,
        at: Tensor,
        weight: Tensor,
        gradient: bool,
    ) -> Choice:
        nothing = z.new_zeros(z.shape, dtype=torch.float32)
        choice = Choice(z.new_zeros(z.shape[:2], dtype=torch.long), nothing, nothing.clone())
        given = (x.flatten(0, 1).numpy() for x in (z, null, active))
        vectors = self.vectors.detach().mT.contiguous()
        norm, scratch = vectors.square().sum(1), np.zeros((3, max(self.outcomes, self.dim)), np.float32)
        compiled.choose(
            *given, rows.place.numpy(), table.float().numpy(), at.numpy(), vectors.numpy(), norm.numpy(),
            weight.numpy(), self.escape, gradient, scratch, *(x.flatten(0, 1).numpy() for x in choice),
        )  # fmt: skip
        return choice

    def _choose(
        self,
        z: Tensor,
        null: Tensor,
        active: Tensor,
        rows: Rows,
        table: Tensor,
        at: Tensor,
        weight: Tensor,
        gradient: bool,
    ) -> Choice:
        x, e, cells = take(z.flatten(0, 1), rows.place), self.vectors.detach(), z.shape[1]
        log_p = torch.log_softmax(table.index_select(0, at).float().mul_(LN2), 1)
        null, active = take(null.flatten(), rows.place), take(active.flatten(), rows.place)
        weight = weight[rows.place % cells]
        # Minus the costs, because a softmax follows, up to a constant of each row: |z|^2 and the bits of the flag.
        merit_null = weight * (active - null)
        merit = nearness(x, e, rows, cells)
        if self.escape:
            half = ESCAPE_SIDE // 2
            point = (x / ESCAPE_STEP).round_().clamp_(-half, half - 1)
            far = (x - ESCAPE_STEP * point).pow(2).sum(-1) - x.pow(2).sum(-1)
            merit = torch.cat([merit, -far[:, None]], 1)
            log_p[:, -1] -= self.dim * ESCAPE_BITS * LN2
        merit.addcmul_(log_p, weight[:, None], value=1 / LN2)
        best = merit.argmax(1)
        most = merit.gather(1, best[:, None])[:, 0]
        index = torch.where(most > merit_null, best + 1, 0)
        if self.escape:
            number = ((point.long() + half) * self._powers(z.device)).sum(-1)
            index = torch.where(index > self.codes, self.codes + 1 + number, index)
        chosen = put(index, rows, self.groups, cells)
        rate = torch.zeros_like(z)
        if gradient:
            q = torch.softmax(merit, 1)  # of the outcomes, if not null
            p = torch.sigmoid(most - q.gather(1, best[:, None])[:, 0].log() - merit_null)  # of not null
            # Means over q of e, of log_p and of both: e has a last column of ones.
            both = F.pad(F.pad(e, (0, 1), value=1.0), (0, 0, 0, self.outcomes - self.codes)).mT
            mean_e = grouped(q, both, rows, cells=cells)[:, :-1]
            weighted = grouped(log_p.mul_(q), both, rows, cells=cells)
            mean_e_log_p, mean_log_p = weighted[:, :-1], weighted[:, -1]
            if self.escape:
                mean_e = mean_e + q[:, -1:] * point * ESCAPE_STEP
                mean_e_log_p = mean_e_log_p + log_p[:, -1:] * point * ESCAPE_STEP
                mean_log_p = mean_log_p + log_p[:, -1]
            bits = (1 - p) * null + p * (active - mean_log_p / LN2)
            g = p[:, None] * ((active - bits)[:, None] * mean_e - mean_e_log_p / LN2)
            rate = put(2 * g, rows, self.groups, cells)
        return Choice(chosen, self.lookup(chosen), rate)

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Codes from latents z (M, cells, d), spread out as by k-means++ (Arthur and Vassilvitskii, 2007): the next
        code is a latent drawn by its squared distance from null and the codes there are."""
        groups = torch.arange(self.groups, device=z.device)
        distance = z.pow(2).sum(-1)
        for k in range(self.codes):
            pick = torch.multinomial(distance + TINY, 1)[:, 0]
            self.vectors[:, k] = z[groups, pick]
            distance = torch.minimum(distance, (z - self.vectors[:, k, None]).pow(2).sum(-1))
        self._broadcast(self.vectors.data)
        self.count.fill_(1.0)
        self.total.copy_(self.vectors)

    @torch.no_grad()
    def update(self, z: Tensor, choice: Choice, level: Tensor) -> None:
        """One step of learning from latents z (M, cells, d), what they were quantized to and their levels (cells,).

        EMA of the latents of each code. Dead codes are re-seeded from the
        latents that the codes fit worst, because the others need none: they are drawn by the square of their distance.
        """
        groups, size = torch.arange(self.groups, device=z.device)[:, None], 1 + self.outcomes
        place = self.outcome(choice.indices) + groups * size
        use, sums = torch.zeros_like(self.usage), z.new_zeros(self.groups, size, self.dim)
        by_level = (place + level * self.groups * size).flatten()
        use.view(-1).index_add_(0, by_level, torch.ones_like(by_level, dtype=use.dtype))
        sums.view(-1, self.dim).index_add_(0, place.flatten(), z.flatten(0, 1))
        self._reduce(use)
        self._reduce(sums)
        seen = use.sum((1, 2), keepdim=True) > 0
        self.usage.lerp_(torch.where(seen, use, self.usage), 1 - DECAY)
        if self.fixed:
            return
        self.count.lerp_(use[..., 1 : self.codes + 1].sum(0), 1 - DECAY)
        self.total.lerp_(sums[:, 1 : self.codes + 1], 1 - DECAY)
        n = self.count.sum(-1, keepdim=True)
        if self.learning == "ema":
            self.vectors.copy_(self.total / self._smooth_count()[..., None])
        self.updates += 1
        if self.updates % REBIRTHS:
            return
        dead = self.count < DEAD * n / self.codes
        distance = (z - choice.vectors).pow(2).sum(-1)
        pick = torch.multinomial(distance.square() + TINY, self.codes, replacement=True)
        fresh = z[groups, pick]
        self._broadcast(fresh)
        reborn = (REBIRTH * n / self.codes).expand_as(self.count)
        self.vectors.copy_(torch.where(dead[..., None], fresh, self.vectors))
        self.total.copy_(torch.where(dead[..., None], fresh * reborn[..., None], self.total))
        self.count.copy_(torch.where(dead, reborn, self.count))

    @staticmethod
    def _reduce(x: Tensor) -> None:
        if dist.is_initialized():
            dist.all_reduce(x)

    @staticmethod
    def _broadcast(x: Tensor) -> None:
        if dist.is_initialized():
            dist.broadcast(x, 0)


def nearness(x: Tensor, vectors: Tensor, rows: Rows, cells: int) -> Tensor:
    """|x|^2 - |x - e|^2 of rows x (n, d) and their groups' codes, vectors (M, K, d): (n, K), float32. Not as a product,
    which is too coarse on a GPU."""
    e = per_row(vectors, rows, cells)
    return (x[:, None] * e).mul_(2).sum(-1) - e.pow(2).sum(-1)


def put(values: Tensor, rows: Rows, groups: int, cells: int) -> Tensor:
    """Values (n, ...) of rows in their places, 0 elsewhere: (M, cells, ...)."""
    out = values.new_zeros(groups * cells + 1, *values.shape[1:])  # the last place is for padding
    return out.index_copy_(0, rows.place, values)[:-1].unflatten(0, (groups, cells))


def flag_bits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of null and of not null from the flags' logits."""
    null = F.softplus(logits.float() * LN2) / LN2
    return null, null - logits.float()


class _CodeLength(torch.autograd.Function):
    """-log2 of 2**logits[index] / sum(2**logits) per row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> Tensor:
        logits = logits.float().contiguous()
        if logits.device.type == "cpu":
            bits, slope = logits.new_empty(index.shape, dtype=torch.float32), torch.empty_like(logits)
            compiled.code_length(
                logits.flatten(0, -2).numpy(),
                index.flatten().numpy(),
                bits.view(-1).numpy(),
                slope.flatten(0, -2).numpy(),
            )
        else:
            log_p = torch.log_softmax(logits * LN2, -1)
            bits = log_p.gather(-1, index[..., None]).squeeze(-1) / -LN2
            slope = log_p.exp_().scatter_add_(-1, index[..., None], -torch.ones_like(bits)[..., None])
        ctx.save_for_backward(slope)
        return bits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * gradient[..., None], None


def code_length(logits: Tensor, index: Tensor) -> Tensor:
    """Bits of indices (...) under the prior's logits (..., K)."""
    return _CodeLength.apply(logits, index)
