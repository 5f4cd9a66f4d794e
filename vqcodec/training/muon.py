"""Muon: momentum whose update is orthogonalised, for weights seen as (out, in * k * k) matrices.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale of the
update, 0.2 * sqrt(max(out, in)), from Liu et al., "Muon is Scalable for LLM Training" (2025). ``torch.optim.Muon``
takes two-dimensional parameters only; ours are mostly convolutions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the closest matrices with orthonormal rows or columns, (..., m, n): singular values go to about 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        y = x @ x.mT
        x = a * x + (b * y + c * y @ y) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Parameters of two or more dimensions; the first is the output."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(average, alpha=group["momentum"]).flatten(1)
                alike.setdefault((update.shape[0], update.shape[1]), []).append((p, update))
            for shape, pairs in alike.items():
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update.view(p.shape), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
