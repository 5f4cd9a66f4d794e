"""vqcodec: a learned image codec whose files decode to the same indices on every machine.

>>> data = vqcodec.encode(image, quality=5)   # PIL image or uint8 array -> bytes of a .vq2 file
>>> image = vqcodec.decode(data)              # -> PIL image
"""

from typing import TYPE_CHECKING, Any

from bitstream.container import DEFAULT_MAX_PIXELS

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from PIL import Image

    from vqcodec.codec import Codec

__version__ = "0.1.0"
__all__ = ["Codec", "decode", "encode"]

DEFAULT_QUALITY = 5.0

_default: "dict[str, Codec]" = {}


def __getattr__(name: str) -> Any:
    # torch takes a second to import; `vqcodec info` and `--help` do without.
    if name == "Codec":
        from vqcodec.codec import Codec

        return Codec
    raise AttributeError(f"module 'vqcodec' has no attribute {name!r}")


def _codec(device: str) -> "Codec":
    from vqcodec.codec import Codec

    if device not in _default:
        _default[device] = Codec.load(device=device)
    return _default[device]


def encode(
    image: "Image.Image | ArrayLike", quality: float = DEFAULT_QUALITY, *, strip: bool = False, device: str = "auto"
) -> bytes:
    """Compress an image with the shipped model: see ``Codec.encode``. The model is loaded once per device."""
    return _codec(device).encode(image, quality, strip=strip)


def decode(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, device: str = "auto") -> "Image.Image":
    """Decompress a .vq2 file with the shipped model: see ``Codec.decode``. The model is loaded once per device."""
    return _codec(device).decode(data, max_pixels=max_pixels)
