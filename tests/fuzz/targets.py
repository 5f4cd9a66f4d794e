"""What must hold for any bytes: the fuzz targets, and the mutation that gets past the checks an attacker can satisfy.

A target returns if all is well; any exception is a finding.
"""

import contextlib
import io
import itertools
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from click.testing import CliRunner
from PIL import Image, ImageFile, UnidentifiedImageError

import cli
from bitstream import container
from bitstream.errors import BitstreamError
from vqcodec.codec import Codec

GOLDEN = Path(__file__).parents[1] / "golden"
CODEC = Codec.load(GOLDEN / "tiny.safetensors", "cpu")
MAX_PIXELS = 2**14
MODES = list(container.ColourMode)


def unpack(data: bytes) -> None:
    """It parses, to what packs to the same bytes, or raises a BitstreamError."""
    with contextlib.suppress(BitstreamError):
        assert container.pack(container.unpack(data, max_pixels=container.NO_LIMIT)) == data


def decode(data: bytes) -> None:
    """It decodes to a picture of the header's size and mode, or raises a BitstreamError.

    The checksum does not count here: whoever forges a file can compute it.
    """
    with contextlib.suppress(BitstreamError), mock.patch.object(container, "verify"):
        image = CODEC.decode(data, max_pixels=MAX_PIXELS)
        header = container.unpack(data).header
        modes = {"GREY": "L", "RGB": "RGB", "GREY_ALPHA": "LA", "RGBA": "RGBA"}
        assert (image.size, image.mode) == ((header.width, header.height), modes[header.colour.shown.name])


def preview(data: bytes) -> None:
    """A picture of the header's size, or a BitstreamError."""
    with contextlib.suppress(BitstreamError):
        image = CODEC.decode(data, preview=True, max_pixels=MAX_PIXELS)
        header, _ = container.unpack_coarsest(data)
        assert image.size == (header.width, header.height)


def info(data: bytes) -> None:
    """The command prints one JSON line and exits with 0, or one line of error and exits with 1."""
    result = CliRunner().invoke(cli.main, ["info", "--json", "-"], input=data)
    lines = len(result.stdout.splitlines()), len(result.stderr.splitlines())
    assert (result.exit_code, *lines) in ((0, 1, 0), (1, 0, 1)), (result.output, result.exception)


def pillow(data: bytes) -> None:
    """With vqcodec.pillow, a picture opens, reduces and loads in one size and mode, or raises an OSError.

    Pillow takes other errors of ``_open`` for another format: a file with the magic must not be unidentified.
    """
    import vqcodec.pillow  # not before: it changes Pillow for the whole process

    for truncated, reduced in itertools.product((False, True), repeat=2):
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # from half of what is an error on
            stack.enter_context(mock.patch.dict(vqcodec._default, auto=CODEC))
            stack.enter_context(mock.patch.object(container, "verify"))
            stack.enter_context(mock.patch.object(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS // 2))
            stack.enter_context(mock.patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", truncated))
            try:
                with Image.open(io.BytesIO(data), formats=["VQ2"]) as image:
                    if reduced:
                        image.draft(None, (1, 1))
                    expected = image.size, image.mode
                    image.load()
                    assert (image.size, image.mode) == (image.im.size, image.im.mode) == expected
            except UnidentifiedImageError:
                assert not data.startswith(container.MAGIC)
            except (OSError, Image.DecompressionBombError):
                pass


TARGETS: dict[str, Callable[[bytes], None]] = {
    "unpack": unpack,
    "decode": decode,
    "preview": preview,
    "info": info,
    "pillow": pillow,
}


def repaired(data: bytes) -> bytes:
    """The bytes with the model's header, a small picture, and the chunks' CRCs right, as far as they have chunks."""
    head = container.MAGIC + bytes([container.VERSION])
    out = bytearray(head + data[len(head) :].ljust(container.HEADER_BYTES, b"\0"))
    tune, level = out[5] & container.VISUAL, out[5] % container.VISUAL % CODEC.model.config.levels + 1
    out[5], out[6] = tune | level, MODES[out[6] % len(MODES)]
    for at in (7, 10):
        out[at : at + 3] = bytes([out[at] % 128, 0, 0])
    out[13:21] = CODEC.fingerprint
    with contextlib.suppress(BitstreamError):
        for kind, payload in container._parse_chunks(memoryview(bytes(out)), 0):
            if kind in container.OPTIONAL_CHUNKS.values() and len(payload) >= 4:
                crc = zlib.crc32(bytes([kind]) + payload[:-4]).to_bytes(4, "little")
                at = out.find(bytes(payload))
                out[at + len(payload) - 4 : at + len(payload)] = crc
    return bytes(out)


def restructured(data: bytes, seed: int) -> bytes:
    """The bytes with one of their chunks, or of those within the alpha plane, removed, repeated, moved or changed.

    Streams are changed as what they inflate to, and checksums are right again, as far as the bytes have chunks.
    """
    chance = random.Random(seed)
    try:
        chunks = [(kind, bytes(payload)) for kind, payload in container._parse_chunks(memoryview(data), len(data))]
    except BitstreamError:
        return data
    place = chance.choice([None, *(i for i, (kind, _) in enumerate(chunks) if kind in (FLAT, ALPHA))])
    if place is None:
        chunks = _edited(chunks, chance)
    else:
        kind, payload = chunks[place]
        change = _other_png if kind == ALPHA else _other_blocks
        chunks[place] = kind, change(payload[:-4], chance) + payload[-4:]
    packed = [bytes([kind]) + container.varint(len(payload)) + payload for kind, payload in chunks]
    return repaired(b"".join([data[: container.HEADER_BYTES], *packed, bytes([container.END])]))


FLAT, ALPHA = container.OPTIONAL_CHUNKS["flat"], container.OPTIONAL_CHUNKS["alpha"]
Chunks = list[tuple[Any, bytes]]


def _edited(chunks: Chunks, chance: random.Random) -> Chunks:
    """One of the chunks removed, repeated, moved or changed."""
    if not chunks:
        return chunks
    chunks, at, to = list(chunks), chance.randrange(len(chunks)), chance.randrange(len(chunks) + 1)
    kind, content = chunks[at]
    action = chance.choice(["remove", "repeat", "move", "change"])
    if action in ("remove", "move"):
        del chunks[at]
    if action in ("repeat", "move"):
        chunks.insert(to, (kind, content))
    if action == "change":
        chunks[at] = kind, _changed(content, chance)
    return chunks


def _changed(content: bytes, chance: random.Random) -> bytes:
    """A few bytes replaced by others, of any number."""
    start = chance.randrange(len(content) + 1)
    return content[:start] + chance.randbytes(chance.randrange(4)) + content[start + chance.randrange(4) :]


def _other_stream(stream: bytes, window: int, chance: random.Random) -> bytes:
    """What a stream of this window inflates to, changed, and deflated again."""
    try:
        content = zlib.decompressobj(window).decompress(stream, MAX_PIXELS)
    except zlib.error:
        return stream
    deflate = zlib.compressobj(9, zlib.DEFLATED, window)
    return deflate.compress(_changed(content, chance)) + deflate.flush()


def _other_png(data: bytes, chance: random.Random) -> bytes:
    chunks, at = [], 8
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : end]))
        at = end + 4
    streams = [i for i, (kind, _) in enumerate(chunks) if kind == b"IDAT"]
    if streams and chance.randrange(2):
        at = chance.choice(streams)
        chunks[at] = b"IDAT", _other_stream(chunks[at][1], zlib.MAX_WBITS, chance)
    else:
        chunks = _edited([*chunks, *([(b"acTL", bytes(8))] if chance.randrange(4) == 0 else [])], chance)
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"".join([data[:8], *packed])


def _other_blocks(content: bytes, chance: random.Random) -> bytes:
    start = 1 + 3 * content[0] if content else 0
    if chance.randrange(2):
        return content[:start] + _other_stream(content[start:], -zlib.MAX_WBITS, chance)
    return _changed(content[:start], chance) + content[start:]
