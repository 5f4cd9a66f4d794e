"""Latents fitted to one image: gradient steps improve the first guess that the encoder makes.

The encoder measures an error by the distance of a code from its latents, |z - e|^2 in bits, as if the decoder were a
rotation. Around chosen codes e the true distortion has the gradient g; it is that of the distance from z = e - g / 2.
So the latents take a step towards there, codes are chosen anew, and so on: what the decoder sees are real codes in
every step. Decoders do not notice. Steps become shorter and shorter: each choice of codes changes the gradients of its
neighbours, and long last steps would leave that noise in the latents. Only the first is shorter than the second: from
the guess a long step overshoots where the decoder is steep. So would single cells: what they move is limited. A step
costs a forward and a backward pass of the decoder's finest part. What codes cost the prior says in the second step, and
anew in every third after it: for the first, codes chosen by their frequencies alone are good enough.

A code costs more than its own bits, or less: the prior predicts flags and codes after it from what it is. From then on
the gradient of all bits with respect to the codes as the prior sees them joins that of the distortion.

The walk chooses once more, cell by cell and with rates that differ a little. What it changes was fitted to neighbours
that stay. So in the end the latents go a part of the way to the codes of a last choice, less so where the picture is
flat: there the walk passes on what codes leave of the colour, and must be free to choose.

For the eye a half of the squared error gives way to the distance by SSIMULACRA 2. That is steep where errors show most,
steeper than the distance of the choice knows of: what it has in a step is limited, because without that it overshoots
by far. It is limited in the coefficients of the linear path, before the networks, so that the two gradients go through
them as one; of the sum only what single cells would overshoot by is cut off. A model without that path is fitted by
squared error alone.

Each code of a coarser grid moves so many pixels that such steps are far too long: there they are a fraction as long,
and two will do. What is drawn then has finer codes that are guessed around the coarse ones, at the full rate; the
gradient takes them as fixed. That of the bits was of no use there.

Fitted to single images in this spirit: Campos et al., "Content Adaptive Optimization for Neural Image Compression"
(2019).
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vqcodec.masking import smoothness, variance
from vqcodec.models.blocks import Drawn
from vqcodec.models.precision import full_precision
from vqcodec.models.vqvae import VQVAE, pointwise
from vqcodec.ssimulacra2 import MIN_SIDE, WORTH, Ssimulacra2

LONGEST_STEP = 0.5  # of the way to e - g / 2, see ``_step_size`` and the model card
STEP_LIMIT = 6.0  # of g / 2, in each channel: single cells overshoot
RATE_LIMIT = 3.0  # of what the bits have in it
LONGEST_COARSE_STEP, COARSE_STEP_LIMIT = 0.14, 3.0  # of grids that are not the finest
KEPT = 0.4  # of the way to the codes of the last choice; 0.3 and 0.5 do as well
RATES_LAST = 3  # steps until the prior is asked anew, from the second on
VISUAL_SHARE = 0.5  # of the distance by SSIMULACRA 2; 0.7 does as well by it and costs more PSNR
VISUAL_LIMIT = 1.25  # of what that distance has in g / 2, in each channel by the linear path
VISUAL_RANK = 0.2  # directions of that path with less than this share of the largest singular value are left out


@torch.inference_mode(False)
@torch.no_grad()
def refined_latents(
    model: VQVAE,
    x: Tensor,
    z: Tensor,
    finer: Sequence[Tensor],
    context: Tensor | None,
    level: Tensor,
    bits: Tensor,
    rate_weights: Tensor,
    steps: int,
    known: Sequence[Tensor],
    visual: bool,
) -> Tensor:
    """Latents (B, M * d, h, w) of the grid after those that are known, better ones than z.

    x: (B, 3, H, W) uint8, sides multiples of the stride; finer: features of the grids after this one, as ``analyse``
    gives them; level: (B,); bits: (B,), what a squared error of 1 in one sample of 0..1 costs; rate_weights: of the
    finest grid's cells, (B, 1, h', w'), factors on the rates; known: indices (B, M, h, w) of the coarser grids as the
    walk chose them, and context what ``decode_grid`` makes of them; visual: for the eye, not for squared error alone.
    """
    # What was made in inference mode cannot take part in a backward pass.
    x, z, level, bits, rate_weights = (given.clone() for given in (x, z, level, bits, rate_weights))
    known, finer = [indices.clone() for indices in known], [features.clone() for features in finer]
    context = None if context is None else context.clone()
    k, longest, limit = len(known), LONGEST_STEP, STEP_LIMIT
    if finer:
        longest, limit = LONGEST_COARSE_STEP, COARSE_STEP_LIMIT
    weights = F.avg_pool2d(rate_weights, rate_weights.shape[2] // z.shape[2])
    weight = bits[:, None, None, None] / 2
    eye = None
    if visual and model.config.linear_path and min(x.shape[2:]) >= MIN_SIDE:
        eye = _Eye(model, x, level, weight)
    with full_precision(x.device):
        condition = model.condition(k, known[-1], level) if known and steps > 1 else None
    base = None if context is None else model.base(k, context)

    def draw(indices: Tensor, codes: Tensor) -> Drawn:
        """The picture of codes and of those that are guessed for the finer grids."""
        above, found = base, [*known, indices]
        for features in finer:
            n = len(found)
            below = model.context(n - 1, codes, above, level)
            with torch.no_grad():
                latents = model.latent(n, x, features, below, level)
                own = F.avg_pool2d(rate_weights, rate_weights.shape[2] // latents.shape[2])
                found.append(model.guess(n, latents, level, own))
                codes = model.codes(n, found)
            above = model.base(n, below)
        return model.draw(codes, above, level)

    def gradient(indices: Tensor, codes: Tensor) -> Tensor:
        # A function of its own, so that nothing of the picture is kept in memory while the prior works.
        with torch.enable_grad():
            drawn = draw(indices, codes)
            error = drawn.error_gradient(x)
            pairs = zip(drawn, error if eye is None else eye.mixed(drawn, error), strict=True)
            outputs, towards = zip(*(pair for pair in pairs if pair[0] is not None), strict=True)
            return torch.autograd.grad(outputs, codes, towards)[0]

    dear = torch.zeros_like(z)
    for step in range(steps):
        asked = step % RATES_LAST == 1
        if asked:
            rates = model.rates(k, z, condition, level, weights)
        indices = model.choose(k, z, rates, weights) if step else model.guess(k, z, level, weights)
        if asked and not finer:
            dear = model.rate_gradient(k, indices, condition, level, weights) / 2
            dear.clamp_(-RATE_LIMIT, RATE_LIMIT)
        codes = model.codes(k, [*known, indices]).requires_grad_()
        half = weight * gradient(indices, codes)
        half.clamp_(-limit, limit)
        z = torch.lerp(z, codes.detach() - half - dear, longest * _step_size(step, steps))
    if steps > 1:
        last = model.codes(k, [*known, model.choose(k, z, rates, weights)])
        flat = smoothness(variance(x, model.config.grids[k].stride))
        z = torch.lerp(z, last, KEPT * (1 - flat))
    return z


def _step_size(step: int, steps: int) -> float:
    """Share of the longest step: falls linearly from 1 to nothing, but that the first two take turns."""
    place = 1 - step if step < 2 <= steps else step
    return 1 - place / steps


class _Eye:
    """What the eye makes of the error of pictures x, (B, 3, H, W) uint8. weight: (B, 1, 1, 1), half of what a squared
    error costs in bits."""

    def __init__(self, model: VQVAE, x: Tensor, level: Tensor, weight: Tensor) -> None:
        judge = Ssimulacra2().to(x.device)
        self.distance = functools.partial(judge, judge.planes(x.float() / 255))
        self.size = model.config.grids[-1].stride
        self.to_latents = model.pixels.weight.flatten(1)
        with full_precision(x.device):
            # Its last bits depend on the number of threads, and files must not.
            self.to_blocks = torch.linalg.pinv(self.to_latents.double(), rtol=VISUAL_RANK).round(decimals=6).float()
        inverse = model.latents[-1].log_inverse[level].exp()[:, :, None, None]
        self.limit = VISUAL_LIMIT / (VISUAL_SHARE * weight * inverse)

    def mixed(self, drawn: Drawn, error: Drawn) -> Drawn:
        """The gradient of the squared error and that of the distance."""
        assert error.linear is not None
        image = drawn.image.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(WORTH * image[0].numel() * self.distance(image).sum(), image)
        with full_precision(gradient.device):
            latents = pointwise(F.pixel_unshuffle(gradient, self.size), self.to_latents)
            limited = pointwise(latents.clamp_(-self.limit, self.limit), self.to_blocks)
        mixed = torch.lerp(error.linear, limited, VISUAL_SHARE)
        return drawn.parts(F.pixel_shuffle(mixed, self.size))
