"""Latents of the finest grid fitted to one image: gradient steps improve the first guess that the encoder makes.

The encoder measures an error by the distance of a code from its latents, |z - e|^2 in bits, as if the decoder were a
rotation. Around chosen codes e the true distortion has the gradient g; it is that of the distance from z = e - g / 2.
So the latents take a step towards there, codes are chosen anew, and so on: what the decoder sees are real codes in
every step. Decoders do not notice. Steps become shorter and shorter: each choice of codes changes the gradients of its
neighbours, and long last steps would leave that noise in the latents. A step costs a forward and a backward pass of the
decoder's finest part. What codes cost the prior says in the second step, and anew in every third after it: for the
first, codes chosen by their frequencies alone are good enough.

For the eye a half of the squared error gives way to the distance by SSIMULACRA 2. That is steep where errors show most,
steeper than the distance of the choice knows of: what it has in a step is limited, because without that it overshoots
by far. What squared error has is not: that would cost 6 to 8 % by every measure.

Fitted to single images in this spirit: Campos et al., "Content Adaptive Optimization for Neural Image Compression"
(2019). The coarser grids stay as they are: each of their codes moves so many pixels that such a step is far too long.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vqcodec.models.precision import full_precision
from vqcodec.models.vqvae import VQVAE, Base
from vqcodec.ssimulacra2 import MIN_SIDE, WORTH, Ssimulacra2

STEP_SIZE = 0.5  # of the way to e - g / 2 in the first step, from where it falls to nothing; see the model card
RATES_LAST = 3  # steps until the prior is asked anew, from the second on
VISUAL_SHARE = 0.5  # of the distance by SSIMULACRA 2; 0.7 does as well by it and costs more PSNR
VISUAL_LIMIT = 1.0  # of what that distance has in g / 2, in each channel; 0.5 and 2 do less


@torch.inference_mode(False)
@torch.no_grad()
def refined_latents(
    model: VQVAE,
    x: Tensor,
    z: Tensor,
    context: Tensor | None,
    level: Tensor,
    bits: Tensor,
    rate_weights: Tensor,
    steps: int,
    known: Sequence[Tensor],
    visual: bool,
) -> Tensor:
    """Latents (B, M * d, h, w) of the finest grid, better ones than z.

    x: (B, 3, H, W) uint8, sides multiples of the stride; level: (B,); bits: (B,), what a squared error of 1 in one
    sample of 0..1 costs; rate_weights: (B, 1, h, w), factors on the rates; known: indices (B, M, h, w) of the coarser
    grids as the walk chose them, and context what ``decode_grid`` makes of them; visual: for the eye, not for squared
    error alone.
    """
    # What was made in inference mode cannot take part in a backward pass.
    x, z, level, bits, rate_weights = (given.clone() for given in (x, z, level, bits, rate_weights))
    known = [indices.clone() for indices in known]
    context = None if context is None else context.clone()
    finest = len(known)
    eye = None
    if visual and min(x.shape[2:]) >= MIN_SIDE:
        judge = Ssimulacra2().to(x.device)
        eye = functools.partial(judge, judge.planes(x.float() / 255))
    with full_precision(x.device):
        condition = model.condition(finest, known[-1], level) if known and steps > 1 else None
    base = None if context is None else model.base(finest, context)
    for step in range(steps):
        if step % RATES_LAST == 1:
            rates = model.rates(finest, z, condition, level, rate_weights)
        indices = model.choose(finest, z, rates, rate_weights) if step else model.guess(finest, z, level, rate_weights)
        codes = model.codes(finest, [*known, indices]).requires_grad_()
        half, seen = _gradients(model, x, codes, base, level, eye)
        weight = bits[:, None, None, None] / 2
        half.mul_(weight)
        if seen is not None:
            seen.mul_(VISUAL_SHARE * weight).clamp_(-VISUAL_LIMIT, VISUAL_LIMIT)
            half.mul_(1 - VISUAL_SHARE).add_(seen)
        z = torch.lerp(z, codes.detach() - half, STEP_SIZE * (1 - step / steps))
    return z


def _gradients(
    model: VQVAE, x: Tensor, codes: Tensor, base: Base | None, level: Tensor, eye: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """Of the squared error of the picture that is drawn of the codes, and of what the eye has instead, in the same
    units, with respect to them."""
    # A function of its own, so that nothing of the picture is kept in memory while the prior works.
    with torch.enable_grad():
        drawn = model.draw(codes, base, level)
        pairs = zip(drawn, drawn.error_gradient(x), strict=True)
        outputs, towards = zip(*(pair for pair in pairs if pair[0] is not None), strict=True)
        (gradient,) = torch.autograd.grad(outputs, codes, towards, retain_graph=eye is not None)
        if eye is None:
            return gradient, None
        distance = WORTH * x[0].numel() * eye(drawn.image).sum()
        (seen,) = torch.autograd.grad(distance, codes)
    return gradient, seen
