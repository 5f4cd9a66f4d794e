"""vqcodec: a learned image codec whose files decode to the same indices on every machine.

>>> data = vqcodec.encode(image, quality=5)   # PIL image, uint8 array or picture file -> bytes of a .vq2 file
>>> image = vqcodec.decode(data)              # -> PIL image
>>> import vqcodec.pillow                     # Image.open and Image.save know .vq2 files

What an image has that its file cannot hold is a warning (`warnings.warn`), and so is what a preview lacks. All errors
are VqcodecErrors, but for files that the system cannot open (OSError).
"""

from typing import TYPE_CHECKING, Any

from bitstream.container import DEFAULT_MAX_PIXELS
from bitstream.errors import (
    BitstreamError,
    ClusterError,
    DamagedError,
    DeviceError,
    FileError,
    ImageError,
    LimitError,
    ModelMismatchError,
    NotVq2Error,
    StorageError,
    TruncatedError,
    UnsupportedVersionError,
    UsageError,
    VqcodecError,
    WeightsError,
    WorkerError,
)
from vqcodec.config import DEFAULT_EFFORT, DEFAULT_QUALITY, DEFAULT_TUNE, Tune

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from PIL import Image

    from vqcodec.codec import Codec
    from vqcodec.image import Picture, Source, Strip
    from vqcodec.targets import SearchResult, Target

__version__ = "0.1.0"
__all__ = [
    "BitstreamError",
    "ClusterError",
    "Codec",
    "DamagedError",
    "DeviceError",
    "FileError",
    "ImageError",
    "LimitError",
    "ModelMismatchError",
    "NotVq2Error",
    "StorageError",
    "Target",
    "TruncatedError",
    "UnsupportedVersionError",
    "UsageError",
    "VqcodecError",
    "WeightsError",
    "WorkerError",
    "decode",
    "encode",
    "encode_to",
]

_default: "dict[str, Codec]" = {}


def __getattr__(name: str) -> Any:
    # torch takes a second to import; `vqcodec info` and `--help` do without.
    if name == "Codec":
        from vqcodec.codec import Codec

        return Codec
    if name == "Target":
        from vqcodec.targets import Target

        return Target
    raise AttributeError(f"module 'vqcodec' has no attribute {name!r}")


def _codec(device: str) -> "Codec":
    from vqcodec.codec import Codec

    if device not in _default:
        _default[device] = Codec.load(device=device)
    return _default[device]


def encode(
    image: "Image.Image | ArrayLike | Picture | Source",
    quality: float = DEFAULT_QUALITY,
    *,
    tune: Tune = DEFAULT_TUNE,
    strip: "Strip" = False,
    effort: int = DEFAULT_EFFORT,
    device: str = "auto",
) -> bytes:
    """Compress an image with the shipped model: see ``Codec.encode``. The model is loaded once per device."""
    from vqcodec.image import told

    return _codec(device).encode(told(image, strip), quality, tune=tune, effort=effort)


def encode_to(
    image: "Image.Image | ArrayLike | Picture | Source",
    target: "Target",
    *,
    tune: Tune | None = None,
    strip: "Strip" = False,
    effort: int = DEFAULT_EFFORT,
    device: str = "auto",
) -> "SearchResult":
    """Compress an image to a size, a rate or a PSNR with the shipped model: see ``Codec.encode_to``.

    >>> reached = vqcodec.encode_to(image, vqcodec.Target("size", 50_000))
    """
    from vqcodec.image import told

    return _codec(device).encode_to(told(image, strip), target, tune=tune, effort=effort)


def decode(
    data: "Source", *, preview: bool = False, max_pixels: int = DEFAULT_MAX_PIXELS, device: str = "auto"
) -> "Image.Image":
    """Decompress a .vq2 file with the shipped model: see ``Codec.decode``. The model is loaded once per device."""
    from vqcodec.image import contents, to_pil, warn

    picture = _codec(device).decode_picture(contents(data), max_pixels, preview=preview)
    warn(picture.notes, stacklevel=3)
    return to_pil(picture)
