"""What is seen of a picture with transparency, and what is not."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitstream.container import ColourMode
from vqcodec.image import Bytes, Picture, Rgb, in_srgb


def prepared(picture: Picture) -> Picture:
    """The picture as it is coded: without an alpha that is opaque everywhere, and with smooth colours where nothing is
    visible. What was there costs bytes, and its owner may think that it is erased. May share memory."""
    picture = without_opaque_alpha(picture)
    if picture.alpha is None or picture.alpha.all():
        return picture
    return replace(picture, pixels=_filled(picture.pixels, picture.alpha > 0))


def without_opaque_alpha(picture: Picture) -> Picture:
    if picture.alpha is None or not np.all(picture.alpha == 255):
        return picture
    return replace(picture, colour=picture.colour.opaque, alpha=None)


def _filled(pixels: Bytes, visible: NDArray[np.bool_]) -> Bytes:
    """Pixels (H, W, 3) that go on smoothly where they are not visible (H, W): each takes the mean of what is visible
    around it, of the smallest square of a power of two that has any (pull-push, Gortler and others 1996)."""
    bands = [slice(at, at + 256) for at in range(0, len(pixels), 256)]  # floats take four times the memory
    sums = [np.concatenate([_halved(_weighted(pixels[band], visible[band])) for band in bands])]
    while max(sums[-1].shape[:2]) > 1:
        sums.append(_halved(sums[-1]))
    means = np.zeros((1, 1, 3), np.float32)
    for total in reversed(sums):
        weight = total[..., 3:]
        finer = np.stack([_doubled(means[..., k], weight.shape) for k in range(3)], axis=2)
        means = np.where(weight > 0, total[..., :3] / np.maximum(weight, 1), finer)
    return np.where(visible[..., None], pixels, _doubled(np.rint(means).astype(np.uint8), visible.shape))


def _weighted(pixels: Bytes, visible: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(H, W, 4): colours where they are visible, else 0, and whether they are."""
    weight = visible[..., None].astype(np.float32)
    return np.concatenate([pixels * weight, weight], axis=2)


def _doubled(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Twice as many rows and columns, smoothly, cut to (H, W)."""
    size = 2 * array.shape[1], 2 * array.shape[0]
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BILINEAR))[: shape[0], : shape[1]]


def _halved(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W, C) -> (ceil(H / 2), ceil(W / 2), C): of squares of 2 x 2."""
    padded = np.pad(sums, ((0, sums.shape[0] % 2), (0, sums.shape[1] % 2), (0, 0)))
    return padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]


def flattened(picture: Picture, background: Rgb) -> Picture:
    """The picture on a background, without alpha; the same picture if it has none."""
    if picture.alpha is None:
        return picture
    alpha, colour = picture.alpha[..., None].astype(np.uint16), picture.colour.opaque
    if colour == ColourMode.GREY and len(set(background)) > 1:
        picture, colour = in_srgb(picture), ColourMode.RGB
    behind = (255 - alpha) * np.array(background, np.uint16)
    pixels = ((picture.pixels * alpha + behind + 127) // 255).astype(np.uint8)
    return replace(picture, pixels=pixels, colour=colour, alpha=None)
