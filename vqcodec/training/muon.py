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
    scaled = [x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7) for x in matrices]
    g = torch.cat([x.mT @ x if x.shape[1] > x.shape[2] else x @ x.mT for x in scaled])
    identity = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    factor = identity.expand_as(g)
    for _ in range(steps):
        p = torch.baddbmm(a * identity + b * g, g, g, alpha=c)
        factor, g = p @ factor, p @ g @ p
    factors = factor.split([len(x) for x in scaled])
    return [x @ f if x.shape[1] > x.shape[2] else f @ x for x, f in zip(scaled, factors, strict=True)]


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
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(average, alpha=group["momentum"]).flatten(1).unflatten(0, (group["parts"], -1))
                alike.setdefault(min(update.shape[1:]), []).append((p, update))
            for pairs in alike.values():
                updates = orthogonalise([update for _, update in pairs])
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update.view(p.shape), alpha=-group["lr"] * 0.2 * max(update.shape[1:]) ** 0.5)
