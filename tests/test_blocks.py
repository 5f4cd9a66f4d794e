"""Compiled on a CPU, pixels become blocks and blocks pixels as in torch."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitstream.exact import ESCAPE_SIDE, ESCAPE_STEP
from vqcodec.models.blocks import Drawn, to_blocks
from vqcodec.models.quantizer import Codebook

SIZES = [(4, 8), (4, 4), (2, 4)]


def picture(seed: int = 0) -> Tensor:
    """Rows lie apart in memory, as those of a tile do."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 24, 40, 3), dtype=torch.uint8, generator=rng)[:, :, 8:].permute(0, 3, 1, 2)


def drawn(fine: int, size: int, seed: int = 0) -> Drawn:
    rng = torch.Generator().manual_seed(seed)
    linear = 0.3 * torch.randn(2, 3 * size**2, 24 // size, 32 // size, generator=rng)
    return Drawn(0.3 * torch.randn(2, 3 * fine**2, 24 // fine, 32 // fine, generator=rng), linear)


def clipped(found: Drawn) -> Tensor:
    """The image in 0..1, with the gradient that it has unclipped."""
    return found.image + (found.image.clamp(0, 1) - found.image).detach()


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_pixels_are_those_of_torch(size: int, dtype: torch.dtype) -> None:
    pixels = picture()
    expected = F.pixel_unshuffle(pixels.float() / 255 - 0.5, size).to(dtype)
    assert torch.equal(to_blocks(pixels, size, dtype), expected)
    assert torch.equal(to_blocks(pixels.float() / 255, size).to(dtype), expected)


@pytest.mark.parametrize(("fine", "size"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_the_image_rounded(fine: int, size: int, dtype: torch.dtype) -> None:
    details, linear = drawn(fine, size)
    found = Drawn(details.to(dtype), linear)
    error = found.pixels.float() - (255 * found.image).clamp(0, 255)
    assert error.abs().max() <= 0.5 + 1e-3  # of the order of the sums
    assert found.pixels.min() == 0 and found.pixels.max() == 255


@pytest.mark.parametrize(("fine", "size"), SIZES)
def test_the_gradient_of_the_error_is_that_of_autograd(fine: int, size: int) -> None:
    pixels, found = picture(), Drawn(*(part.requires_grad_() for part in drawn(fine, size)))
    expected = torch.autograd.grad((clipped(found) - pixels.float() / 255).pow(2).sum(), list(found))
    for gradient, wanted in zip(found.error_gradient(pixels), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_beyond_white_and_black_is_no_error() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).repeat(24, 16)[None, None].expand(1, 3, 24, 32)
    details, linear = Drawn(*(torch.zeros(1, 3 * size**2, 24 // size, 32 // size) for size in (4, 8)))
    linear = F.pixel_unshuffle(3 * (pixels.float() / 255 - 0.5), 8)
    for found in (Drawn(details, linear), Drawn(F.pixel_unshuffle(F.pixel_shuffle(linear, 8), 4), None)):
        gradients = [part for part in found.error_gradient(pixels) if part is not None]
        assert all(gradient.abs().max() < 1e-6 for gradient in gradients)
    wrong = Drawn(details, linear).error_gradient(255 - pixels).details
    torch.testing.assert_close(wrong, F.pixel_unshuffle(4 * pixels.float() / 255 - 2, 4))


def test_networks_alone_draw_a_picture_too() -> None:
    pixels, details = picture(), drawn(4, 8).details.requires_grad_()
    found = Drawn(details, None)
    (expected,) = torch.autograd.grad((clipped(found) - pixels.float() / 255).pow(2).sum(), details)
    torch.testing.assert_close(found.error_gradient(pixels).details, expected)
    assert found.error_gradient(pixels).linear is None
    assert torch.equal(found.pixels, (255 * found.image).round().clamp(0, 255).byte())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_vectors_are_looked_up_as_they_are_defined(dtype: torch.dtype) -> None:
    book = Codebook(groups=3, codes=5, dim=2, levels=1, escape=True)
    book.vectors.data.normal_()
    index = torch.randint(0, book.codes + 1 + ESCAPE_SIDE**2, (3, 200)).to(dtype)
    index[:, :7] = torch.tensor([0, 1, 5, 6, 7, 6 + ESCAPE_SIDE, 5 + ESCAPE_SIDE**2])
    expected = torch.zeros(3, 200, 2)
    for g, cell in product(range(3), range(200)):
        k = int(index[g, cell])
        if k > book.codes:
            entries = torch.tensor(divmod(k - book.codes - 1, ESCAPE_SIDE))
            expected[g, cell] = ESCAPE_STEP * (entries - ESCAPE_SIDE // 2)
        elif k:
            expected[g, cell] = book.vectors[g, k - 1]
    assert torch.equal(book.lookup(index), expected)
    assert book.join(book.lookup(index), 2, 10, 10).is_contiguous(memory_format=torch.channels_last)
