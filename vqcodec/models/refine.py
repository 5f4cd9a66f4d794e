"""Latents fitted to one image: the encoder's answer is a first guess, some steps of gradient descent improve it.

Sources: Campos et al., "Content Adaptive Optimization for Neural Image Compression" (2019); Yang et al., "Improving
Inference for Neural Image Compression" (2020), for the annealing. What is minimised is what the model was trained for,
lambda 255^2 MSE + bits, over a soft choice q = softmax(-(|z - e|^2 + bits) / temperature) that hardens step by step.
Decoders do not notice. A step costs about three passes of the decoder and one of the priors, and there are so many for
every grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqcodec.models.vqvae import VQVAE

STEPS = (0, 10, 30, 100)  # by effort
RATE = 0.3  # of Adam, in units of the latents: the root of a bit
TEMPERATURE = 0.5, 0.1  # at the first and the last step
TILE = 512  # pixels: a tile takes as much memory as in training


@torch.inference_mode(False)
@torch.no_grad()
def refined_latents(
    model: VQVAE, x: Tensor, level: Tensor, rate_weight: float, steps: int, known: Sequence[Tensor]
) -> Tensor:
    """Latents (1, M * d, h, w) of the grid after the known ones, fitted together with those of the grids after it.

    x: (1, 3, H, W) in 0..1, sides multiples of the stride; level: (1,); rate_weight: factor on the rates; known:
    indices (1, M, h, w) of the coarser grids as the walk chose them, because what is fitted to another choice is worse
    than the encoder's own answer. The model's parameters must not require gradients.
    """
    # What was made in inference mode cannot take part in a backward pass.
    x, level, known = x.clone(), level.clone(), [indices.clone() for indices in known]
    weight = model.config.lambdas[int(level)] * 255**2 * x[0, 0].numel()
    given: Tensor | None = None
    for k in range(len(known)):
        given = model.decode_grid(k, model.codes(k, known), given, level)
    latents = _first_guess(model, x, level, rate_weight, known, given)
    adam = torch.optim.Adam(latents, RATE, betas=(0.9, 0.99))
    for step in range(steps):
        left = 1 - step / steps
        for group in adam.param_groups:
            group["lr"] = RATE * left
        temperature = TEMPERATURE[1] + (TEMPERATURE[0] - TEMPERATURE[1]) * left
        choices: list[_Soft] = []
        for k, z in enumerate(latents, len(known)):
            coarser = choices[-1].index if choices else known[-1] if known else None
            choices.append(_Soft(model, k, z, coarser, level, rate_weight, temperature))
        softs = [choice.codes.requires_grad_() for choice in choices]
        with torch.enable_grad():
            context = given
            for k, codes in enumerate(softs, len(known)):
                context = model.decode_grid(k, codes, context, level)
            assert context is not None
            distortion = weight * (context - x).pow(2).mean()
            gradients = torch.autograd.grad(distortion, softs)
        for z, choice, gradient in zip(latents, choices, gradients, strict=True):
            z.grad = choice.gradient(gradient)
        adam.step()
    return latents[0]


def _first_guess(
    model: VQVAE, x: Tensor, level: Tensor, rate_weight: float, known: Sequence[Tensor], context: Tensor | None
) -> list[Tensor]:
    """The encoder's latents of the grids that are not known, each after a quick choice in the ones before."""
    coarser = known[-1] if known else None
    found = []
    for k, features in list(enumerate(model.analyse(x, level)))[len(known) :]:
        z = model.latent(k, features, context, level)
        condition = None if coarser is None else model.condition(k, coarser, level)
        coarser, codes, _ = model.quantize(k, z, condition, level, rate_weight)
        context = model.decode_grid(k, codes, context, level)
        found.append(z.clone())
    return found


class _Soft:
    """The soft choice in one grid. codes: mean code vectors (1, M * d, h, w); index: the likeliest (1, M, h, w)."""

    def __init__(
        self,
        model: VQVAE,
        k: int,
        z: Tensor,
        coarser: Tensor | None,
        level: Tensor,
        rate_weight: float,
        temperature: float,
    ) -> None:
        self.book = book = model.codebooks[k]
        h, w = z.shape[2:]
        self.temperature, self.shape = temperature, (h, w)
        values = book.split(z)[:, 0]
        usage = book.log2_usage()[int(level)]
        distance = [-book.closeness(v, g) for g, v in enumerate(values)]
        guess = torch.stack([(d - rate_weight * usage[g]).argmin(-1) for g, d in enumerate(distance)])
        condition = None if coarser is None else model.condition(k, coarser, level)
        logits = model.priors[k](book.lookup(guess.view(1, -1, h, w), book.activations()), level, condition)
        self.bits = [-rate_weight * row.flatten(0, 2) for row in logits]
        cost = [(d + r) for d, r in zip(distance, self.bits, strict=True)]
        self.q = [torch.softmax(c / -temperature, -1) for c in cost]
        self.index = torch.stack([c.argmin(-1) for c in cost]).view(1, -1, h, w)
        self.means = [q @ book.vectors[g] for g, q in enumerate(self.q)]
        self.codes = self._grid(self.means)

    def _grid(self, rows: list[Tensor]) -> Tensor:
        """M times (h w, d) -> (1, M * d, h, w)."""
        return torch.cat(rows, 1).t().reshape(1, -1, *self.shape)

    def gradient(self, of_codes: Tensor) -> Tensor:
        """With respect to z, of the distortion, given its gradient with respect to the codes, plus the rate.

        dE[f]/dz = 2 / temperature Cov_q(f, e), for f the codes along the gradient, plus the bits.
        """
        found = []
        for g, (q, mean) in enumerate(zip(self.q, self.means, strict=True)):
            vectors = self.book.vectors[g]
            value = self.book.split(of_codes)[g, 0] @ vectors.t() + self.bits[g]
            weighted = q * value
            found.append(2 / self.temperature * (weighted @ vectors - weighted.sum(-1, keepdim=True) * mean))
        return self._grid(found)
