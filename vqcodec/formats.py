"""Pictures that Pillow does not read by itself: plugins for some, and what to say of the others."""

import contextlib
import functools
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

_ADVICE = (
    (RAW, "develop raw files first"),
    (HEIF, "HEIC needs pip install 'vqcodec[heif]'"),
    (JPEG_XL, "JPEG XL needs pip install pillow-jxl-plugin"),
)

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


@functools.cache
def register_plugins() -> None:
    """Pillow reads HEIC and JPEG XL from now on, where the packages for them are installed."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401


def look_closer(folder: str, names: Sequence[str], endings: Collection[str]) -> tuple[list[str], list[str]]:
    """Of files whose endings are not among those that can be read: pictures without an ending that can be read all the
    same, and pictures that cannot."""
    readable, others = [], []
    for name in names:
        ending = os.path.splitext(name)[1].lower()
        if not ending:
            ending = _ending_by_content(storage.join(folder, name))
            if ending in endings:
                readable.append(name)
                continue
        if ending in RAW | HEIF | JPEG_XL | OTHERS:
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
