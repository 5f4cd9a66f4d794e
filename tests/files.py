"""Picture files of kinds that Pillow cannot write, byte by byte."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 10: 8}
Tags = dict[int, tuple[int, Sequence[float] | bytes]]  # number -> type, values; of fractions twice as many


def tiff(
    tags: Tags, data: bytes, e: str = "<", children: Sequence[tuple[Tags, bytes]] = (), chain: bool = False
) -> bytes:
    """A TIFF file of one strip a page. children: other pages, behind SubIFDs, or in the chain of pages."""
    pages = [(tags, data), *children]
    out = b"II*\0" if e == "<" else b"MM\0*"
    out += struct.pack(e + "I", 8)
    places: list[int] = []
    for number in reversed(range(len(pages))):  # from the back, so that the first can point to the others
        tags, data = pages[number]
        fields = dict(tags)
        fields |= {273: (4, [len(out) + 8]), 279: (4, [len(data)])} if data else {}
        strip_at = len(out)
        out += data + b"\0" * (len(data) % 2)
        if 273 in fields:
            fields[273] = (4, [strip_at])
        if not number and places and not chain:
            fields[330] = (4, places)
        at = len(out)
        following = places[0] if chain and places else 0
        out += directory(fields, at, e, following)
        places.insert(0, at)
    return out[:4] + struct.pack(e + "I", places[0]) + out[8:]


def directory(fields: Tags, at: int, e: str = "<", following: int = 0) -> bytes:
    """A directory at an offset, the values that do not fit behind it."""
    entries, extra = b"", b""
    behind = at + 2 + 12 * len(fields) + 4
    for tag, (kind, values) in sorted(fields.items()):
        form = {3: "H", 4: "I", 5: "I", 10: "i"}.get(kind)
        content = struct.pack(e + form * len(values), *values) if form else bytes(values)  # type: ignore[arg-type]
        count = len(content) // _SIZES[kind]
        entries += struct.pack(e + "HHI", tag, kind, count)
        if len(content) <= 4:
            entries += content.ljust(4, b"\0")
        else:
            entries += struct.pack(e + "I", behind + len(extra))
            extra += content + b"\0" * (len(content) % 2)
    return struct.pack(e + "H", len(fields)) + entries + struct.pack(e + "I", following) + extra


def grey_tags(
    width: int, height: int, bits: int = 8, photometric: int = 1, **others: tuple[int, Sequence[float]]
) -> Tags:
    tags: Tags = {256: (3, [width]), 257: (3, [height]), 258: (3, [bits]), 259: (3, [1]), 262: (3, [photometric])}
    return tags | {277: (3, [1]), 278: (3, [height])} | {int(tag[1:]): value for tag, value in others.items()}


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(pixels: np.ndarray, before: bytes = b"", after: bytes = b"", bits: int = 8, interlace: int = 0) -> bytes:
    """(H, W) or (H, W, 3 or 4), samples of so many bits; with other chunks before and behind the pixels."""
    height, width = pixels.shape[:2]
    kind = {1: 0, 3: 2, 4: 6}[pixels[0, 0].size]
    flat = pixels.reshape(height, -1).astype(np.uint8)
    if bits < 8:
        shifts = np.arange(bits)[::-1]
        flat = np.packbits((flat[..., None] >> shifts & 1).reshape(height, -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in flat)
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlace)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            before,
            chunk(b"IDAT", zlib.compress(raw)),
            after,
            chunk(b"IEND", b""),
        ]
    )


def segment(marker: int, content: bytes) -> bytes:
    """Of a JPEG file."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content
