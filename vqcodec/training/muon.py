"""Muon: momentum whose update is orthogonalised, for weights seen as (out, in * k * k) matrices.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale of the
update, 0.2 * sqrt(max(out, in)), from Liu et al., "Muon is Scalable for LLM Training" (2025). ``torch.optim.Muon``
takes two-dimensional parameters only; ours are mostly convolutions, with many more inputs than outputs.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration


def orthogonalise(matrices: list[Tensor], steps: int = 5) -> list[Tensor]:
    """Nearly the closest matrices with orthonormal rows or columns: singular values go to about 1.

    matrices: (parts, m, n) each, with the same min(m, n). The iteration x <- (a + b g + c g^2) x, g = x x^T, changes x
    by a factor from the left alone: it runs on the small g for all matrices at once, and meets x only at its two ends.
    In bfloat16 rounding makes eigenvalues of g negative, and they diverge.
    """
    a, b, c = NEWTON_SCHULZ
    g = torch.cat([x.mT @ x if x.shape[1] > x.shape[2] else x @ x.mT for x in matrices])
    norm = g.diagonal(dim1=1, dim2=2).sum(1).sqrt().add(1e-7)[:, None, None]
    g = g / norm.square()
    identity = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    factor = identity / norm
    for k in range(steps):
        p = torch.baddbmm(a * identity + b * g, g, g, alpha=c)
        factor = p @ factor if k else p / norm
        if k + 1 < steps:
            g = p @ g @ p
    factors = factor.split([len(x) for x in matrices])
    return [x @ f if x.shape[1] > x.shape[2] else f @ x for x, f in zip(matrices, factors, strict=True)]


def as_matrices(x: Tensor, parts: int, channels_last: bool) -> Tensor:
    """A weight or its gradient, (parts * m, ...), as matrices (parts, m, n). The order of inputs makes no difference to
    them: channels come last where they lie so, because nothing needs to be copied then."""
    return (x.movedim(1, -1) if channels_last else x).flatten(1).unflatten(0, (parts, -1))


class Muon(torch.optim.Optimizer):
    """Parameters of two or more dimensions; the first is the output.

    parts, an option of a parameter group: so many matrices lie one below the other in each parameter.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[int, list[tuple[Tensor, Tensor]]] = {}
            params = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            averages = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(averages, group["momentum"])
            torch._foreach_add_(averages, gradients)
            for p, average, g in zip(params, averages, gradients, strict=True):
                layout = group["parts"], p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
                update = as_matrices(torch.add(g, average, alpha=group["momentum"]), *layout)
                alike.setdefault(min(update.shape[1:]), []).append((as_matrices(p, *layout), update))
            for pairs in alike.values():
                updates = orthogonalise([update for _, update in pairs])
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(update.shape[1:]) ** 0.5)
