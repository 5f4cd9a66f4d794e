"""Pictures that Pillow does not read by itself: plugins for some, and what to say of the others."""

import contextlib
import os
from collections.abc import Collection, Sequence

from bitstream.errors import StorageError
from vqcodec import storage

RAW = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".mrw",
    ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
}  # fmt: skip
HEIF = {".heic", ".heics", ".heif", ".heifs", ".hif"}
JPEG_XL = {".jxl"}
OTHERS = {".exr", ".hdp", ".hdr", ".jxr", ".kra", ".svg", ".svgz", ".wdp", ".xcf"}
_PICTURES = RAW | HEIF | JPEG_XL | OTHERS

# Formats that Pillow reads with a plugin, by its name for them, and how to get that.
PLUGINS = {"HEIF": "HEIC needs pip install 'vqcodec[heif]'", "JXL": "JPEG XL needs pip install 'vqcodec[jxl]'"}
_ADVICE = ((RAW, "develop raw files first"), (HEIF, PLUGINS["HEIF"]), (JPEG_XL, PLUGINS["JXL"]))

# The first bytes of formats -> their ending; dots stand for any byte.
_SIGNATURES = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"GIF8", ".gif"),
    (b"RIFF....WEBP", ".webp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"8BPS", ".psd"),
    (b"BM....\0\0\0\0", ".bmp"),
    (b"\0\0\0\x0cjP  ", ".jp2"),
    (b"\0\0\0\x0cJXL ", ".jxl"),
    (b"....ftypavi", ".avif"),
    (b"....ftyphe", ".heic"),
    (b"....ftypmif1", ".heic"),
)


def plugged(format: str) -> bool:
    """Makes Pillow know one of `PLUGINS` if the package for it is installed."""
    from PIL import Image

    if format not in Image.OPEN:
        with contextlib.suppress(ImportError):
            if format == "HEIF":
                import pillow_heif

                pillow_heif.register_heif_opener()
            else:
                import pillow_jxl  # noqa: F401
    return format in Image.OPEN


def look_closer(folder: str, names: Sequence[str], endings: Collection[str]) -> tuple[list[str], list[str]]:
    """Of files whose endings are not among those that can be read: pictures without an ending that can be read all the
    same, and pictures that cannot. What follows the last dot of "2026.11.26" is no ending either."""
    readable, others = [], []
    for name in names:
        ending = os.path.splitext(name)[1].lower()
        if ending not in _PICTURES and not ending[1:].isalpha():
            ending = _ending_by_content(storage.join(folder, name))
        if ending in endings:
            readable.append(name)
        elif ending in _PICTURES:
            others.append(name)
    return readable, others


def _ending_by_content(name: str) -> str:
    start = b""
    with contextlib.suppress(OSError, StorageError):  # nobody can tell what it is
        start = storage.read(name, 64)
    for signature, ending in _SIGNATURES:
        if len(start) >= len(signature) and all(a in (b, 0x2E) for a, b in zip(signature, start, strict=False)):
            return ".avif" if ending == ".heic" and b"avif" in start else ending
    return ""


def advice(names: Sequence[str]) -> str:
    """What to do about pictures that cannot be read; empty where nobody knows."""
    found = {os.path.splitext(name)[1].lower() for name in names}
    return ", ".join(text for endings, text in _ADVICE if found & endings)
