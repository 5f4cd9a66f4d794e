"""Muon: momentum whose update is orthogonalised, for weights seen as (out, in * k * k) matrices.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale of the
update, 0.2 * sqrt(max(out, in)), from Liu et al., "Muon is Scalable for LLM Training" (2025). ``torch.optim.Muon``
takes two-dimensional parameters only; ours are mostly convolutions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly the closest matrix with orthonormal rows or columns, (m, n) -> (m, n): singular values go to about 1."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    x = x.t() if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        y = x @ x.t()
        x = a * x + (b * y + c * y @ y) @ x
    return (x.t() if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Parameters of two or more dimensions; the first is the output."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = orthogonalise(p.grad.add(average, alpha=group["momentum"]).flatten(1))
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)
