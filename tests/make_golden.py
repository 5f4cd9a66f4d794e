"""Writes the conformance set: `python tests/make_golden.py`.

decode/: files that every later version decodes to the same indices, whose CRC-32 is in decode.txt. refuse/: files that
every later version refuses, one for each way to be wrong; refuse.txt says with which error. An existing file is never
replaced; a new case is added by adding it here.
"""

import dataclasses
import struct
import zlib
from pathlib import Path

import numpy as np
from tiny_model import GOLDEN, WEIGHTS

from bitstream import container, rans
from bitstream.container import ColourMode, Container, Header
from bitstream.exact import lanes
from vqcodec.codec import Codec
from vqcodec.image import Picture, pack_alpha, read

IMAGES = Path(__file__).parent / "images"


def pictures() -> dict[str, tuple[Picture, float]]:
    """Name -> picture and quality."""
    photo = read(IMAGES / "photo.png")
    pixels = photo.pixels
    grey = np.repeat(pixels[..., 1:2], 3, axis=2)
    alpha = np.tile(np.arange(48, dtype=np.uint8) * 5, (40, 1))
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    margin = pixels[:40, :48].copy()
    margin[8:] = 255
    down = np.linspace(0, 60, 40)[:, None, None]
    faint = np.random.default_rng(0).normal((157, 102, 70) + down, 1.5, (40, 48, 3)).astype(np.uint8)
    beside = np.repeat(faint[..., 1:2], 3, axis=2)
    beside[:24] = 160
    metadata = b"an ICC profile", b"MM\0*\0\0\0\x08\0\0", b"<x:xmpmeta/>"
    return {
        "one-pixel": (Picture(pixels[:1, :1], ColourMode.RGB), 2),
        "one-row": (Picture(pixels[:1], ColourMode.RGB), 3),
        "one-column": (Picture(pixels[:, :1], ColourMode.RGB), 1),
        "odd-17x33": (Picture(pixels[20:53, 10:27], ColourMode.RGB), 2),
        "photo-level-1": (Picture(pixels, ColourMode.RGB), 1),
        "photo-level-2": (Picture(pixels, ColourMode.RGB), 2),
        "photo-level-3": (Picture(pixels, ColourMode.RGB), 3),
        "photo-between-levels": (Picture(pixels, ColourMode.RGB), 1.7),
        "grey": (Picture(grey[:48, :48], ColourMode.GREY), 2),
        "grey-alpha": (Picture(grey[:40, :48], ColourMode.GREY_ALPHA, alpha), 2),
        "rgba": (Picture(pixels[:40, :48], ColourMode.RGBA, alpha), 3),
        "metadata": (Picture(pixels[:32, :32], ColourMode.RGB, None, *metadata), 2),
        "noise": (Picture(noise, ColourMode.RGB), 3),
        "long-700x20": (Picture(np.tile(pixels[:20], (1, 8, 1))[:, :700], ColourMode.RGB), 2),
        "lanes-40x530": (Picture(np.tile(pixels[:, :40], (9, 1, 1))[:530], ColourMode.RGB), 3),
        "thin-5x600": (Picture(np.tile(pixels[:, :5], (9, 1, 1))[:600], ColourMode.RGB), 2),
        "equal-planes": (Picture(grey[:48, :48], ColourMode.RGB), 2),
        "equal-planes-alpha": (Picture(grey[:40, :48], ColourMode.RGBA, alpha), 2),
        "flat-margin": (Picture(margin[:37, :45], ColourMode.RGB), 3),
        "flat-grey": (Picture(np.repeat(margin[..., 1:2], 3, axis=2), ColourMode.GREY), 2),
        "offset": (Picture(faint, ColourMode.RGB), 1),
        "offset-grey-flat": (Picture(beside, ColourMode.GREY), 1),
        "every-chunk": (Picture(margin, ColourMode.RGBA, alpha, *metadata), 1),
    }


def padded(codec: Codec, width: int, height: int) -> bytes:
    """The smallest file of a size, so small that it is padded: every index is 0, which costs no words."""
    header = Header(1, width, height, ColourMode.RGB, codec.fingerprint)
    weights = codec.indices.weights
    shapes = [weights.shape(k, height, width) for k in range(len(weights.grids))]
    grids = [np.zeros((grid.groups, *shape), np.uint16) for grid, shape in zip(weights.grids, shapes, strict=True)]
    payloads = tuple(rans.join([b""] * lanes(rows)) for rows, _ in shapes)
    return container.pack(Container(header, container.checksum(header, grids), payloads))


def chunk(kind: int, payload: bytes) -> bytes:
    """A chunk of up to 127 bytes."""
    return bytes([kind, len(payload)]) + payload


def sealed(kind: int, content: bytes) -> bytes:
    return chunk(kind, content + zlib.crc32(bytes([kind]) + content).to_bytes(4, "little"))


def png_chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int = 48, height: int = 40, *, depth: int = 8, colour: int = 0, interlace: int = 0) -> bytes:
    return png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def wrong_alphas() -> dict[str, bytes]:
    """Contents of an alpha chunk for 48 x 40 pixels, each wrong in the way of its name."""
    signature, header, end = b"\x89PNG\r\n\x1a\n", png_header(), png_chunk(b"IEND")
    rows = bytes(40 * 49)
    stream = zlib.compress(rows)
    data = png_chunk(b"IDAT", stream)
    good = signature + header + data + end
    frames, frame = struct.pack(">II", 1, 0), struct.pack(">IIIIIHHBB", 0, 48, 40, 0, 0, 1, 1, 0, 0)
    animation = png_chunk(b"acTL", frames) + png_chunk(b"fcTL", frame)

    def with_data(content: bytes) -> bytes:
        return signature + header + png_chunk(b"IDAT", content) + end

    return {
        "not-a-png-file": b"P5 48 40 255 " + bytes(48 * 40),
        "of-another-size": pack_alpha(np.zeros((39, 48), np.uint8)),
        "in-16-bit": signature + png_header(depth=16) + png_chunk(b"IDAT", zlib.compress(bytes(40 * 97))) + end,
        "in-4-bit": signature + png_header(depth=4) + png_chunk(b"IDAT", zlib.compress(bytes(40 * 25))) + end,
        "in-colour": signature + png_header(colour=2) + png_chunk(b"IDAT", zlib.compress(bytes(40 * 145))) + end,
        "interlaced": signature + png_header(interlace=1) + png_chunk(b"IDAT", zlib.compress(bytes(1995))) + end,
        "animated": signature + header + animation + data + end,
        "with-text": signature + header + png_chunk(b"tEXt", b"Comment\0none") + data + end,
        "with-transparency": signature + header + png_chunk(b"tRNS", b"\0\0") + data + end,
        "of-two-headers": signature + header + png_header(2**14, 2**14, colour=2) + data + end,
        "of-two-equal-headers": signature + header + header + data + end,
        "without-a-header": signature + data + end,
        "without-data": signature + header + end,
        "without-an-end": signature + header + data,
        "with-data-behind-its-end": good + data,
        "with-bytes-behind-its-end": good + b"\0",
        "end-not-empty": signature + header + data + png_chunk(b"IEND", b"\0"),
        "cut": good[: len(good) // 2],
        "chunk-longer-than-the-file": signature + header + b"\x7f" + data[1:] + end,
        "chunk-crc-wrong": good[:-1] + b"!",
        "one-row-short": with_data(zlib.compress(rows[49:])),
        "one-byte-long": with_data(zlib.compress(rows + b"\0")),
        "stream-cut": with_data(stream[:-1]),
        "stream-followed-by-a-byte": with_data(stream + b"\0"),
        "not-a-stream": with_data(rows),
        "filter-5": with_data(zlib.compress(rows[:-49] + b"\5" + rows[-48:])),
    }


def wrong_flats() -> dict[str, bytes]:
    """Contents of a flat chunk for 48 x 40 pixels in RGB, 6 x 5 blocks, each wrong in the way of its name."""

    def content(count: int, colours: bytes, numbers: bytes) -> bytes:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        return bytes([count]) + colours + deflate.compress(numbers) + deflate.flush()

    good = content(1, b"red", bytes(29) + b"\1")
    return {
        "empty": b"",
        "without-colours": content(0, b"", bytes(30)),
        "colour-cut": content(1, b"re", bytes(29) + b"\1"),
        "one-block-short": content(1, b"red", bytes(28) + b"\1"),
        "one-block-long": content(1, b"red", bytes(30) + b"\1"),
        "number-above-the-colours": content(1, b"red", bytes(29) + b"\2"),
        "stream-cut": good[:-1],
        "stream-followed-by-a-byte": good + b"\0",
        "with-a-zlib-header": b"\1red" + zlib.compress(bytes(29) + b"\1"),
    }


def mistakes(codec: Codec) -> dict[str, tuple[str, bytes]]:
    """Name -> the error of a file that is wrong in this way alone, and the file."""
    golden = {path.stem: path.read_bytes() for path in (GOLDEN / "decode").glob("*.vq2")}
    good, padding, rich, long = (golden[name] for name in ("grey", "padded", "every-chunk", "lanes-40x530"))
    parts, full, laned = container.unpack(good), container.unpack(rich), container.unpack(long)
    moved, both = golden["offset"], golden["offset-grey-flat"]
    moved_parts, both_parts = container.unpack(moved), container.unpack(both)
    assert moved_parts.offset and both_parts.offset and both_parts.flat
    offset = sealed(0x3F, moved_parts.offset)
    last = sealed(0x3F, both_parts.offset), sealed(0x40, both_parts.flat)
    assert moved.endswith(offset + b"\x7f") and both.endswith(b"".join(last) + b"\x7f")
    assert full.flat and full.alpha and full.icc and full.exif and full.xmp
    full_grids = codec.indices.decode(full)
    head, (top, bottom), end = good[:25], parts.grids, b"\x7f"
    grid1, grid2 = chunk(1, top), chunk(2, bottom)
    assert head + grid1 + grid2 + end == good
    rich_head, rich_grids = rich[:25], chunk(1, full.grids[0]) + chunk(2, full.grids[1])
    blocks, plane = sealed(0x40, full.flat), sealed(0x41, full.alpha)
    assert rich.startswith(rich_head + rich_grids + blocks + plane)
    icc, exif, xmp = sealed(0x42, full.icc), sealed(0x43, full.exif), sealed(0x44, full.xmp)

    def patched(data: bytes, at: int, new: bytes) -> bytes:
        return data[:at] + new + data[at + len(new) :]

    def flipped(data: bytes, at: int) -> bytes:
        return patched(data, at, bytes([data[at] ^ 1]))

    def with_alpha(content: bytes) -> bytes:
        return container.pack(dataclasses.replace(full, alpha=content, icc=None, exif=None, xmp=None))

    def with_flat(content: bytes) -> bytes:
        checksum = container.checksum(full.header, full_grids, content)
        return container.pack(dataclasses.replace(full, checksum=checksum, flat=content))

    def with_offset(of: Container, content: bytes) -> bytes:
        assert of.offset
        checksum = container.checksum(of.header, codec.indices.decode(of), content, of.flat).to_bytes(4, "little")
        return patched(container.pack(of).replace(sealed(0x3F, of.offset), sealed(0x3F, content)), 21, checksum)

    def with_grids(*payloads: bytes) -> bytes:
        return container.pack(dataclasses.replace(parts, grids=payloads))

    def with_lanes(*streams: bytes) -> bytes:
        return container.pack(dataclasses.replace(laned, grids=(laned.grids[0], rans.join(streams))))

    def with_bottom(payload: bytes) -> bytes:
        return container.pack(dataclasses.replace(laned, grids=(laned.grids[0], payload)))

    words, bounds = rans.split(laned.grids[1], 2)
    length, body = int(bounds[1]), words.astype("<u4").tobytes()
    lane1, lane2 = (words[a:b].astype("<u4").tobytes() for a, b in zip(bounds, bounds[1:], strict=False))
    damaged = {
        "header-cut": good[:24],
        "header-level-0": patched(good, 5, b"\0"),
        "header-level-the-model-has-not": patched(good, 5, b"\4"),
        "header-level-changed": patched(good, 5, b"\1"),
        "header-level-0-visual": patched(good, 5, b"\x80"),
        "header-tune-changed": patched(good, 5, b"\x82"),
        "header-colour-4": patched(good, 6, b"\4"),
        "header-colour-6": patched(good, 6, b"\6"),
        "header-colour-8": patched(good, 6, b"\x08"),
        "header-colour-changed": patched(good, 6, b"\1"),
        "header-width-changed": patched(good, 7, b"\x2e"),
        "header-height-changed": patched(good, 10, b"\x2e"),
        "header-checksum-changed": flipped(good, 21),
        "size-too-small-for-the-picture": patched(good, 7, b"\xff\x03\0\xff\x03\0"),
        "chunks-none": head + end,
        "chunk-type-0": head + chunk(0, b"") + grid1 + grid2 + end,
        "chunk-type-unknown": head + grid1 + grid2 + sealed(0x45, b"unknown") + end,
        "chunk-longer-than-the-file": head + grid1 + bytes([2, 127]) + bottom + end,
        "chunk-of-32-gigabytes": head + grid1 + b"\2\xff\xff\xff\xff\x7f" + bottom + end,
        "length-not-minimal": head + grid1 + bytes([2, len(bottom) | 0x80, 0]) + bottom + end,
        "length-of-6-bytes": head + grid1 + b"\2\x80\x80\x80\x80\x80\1" + bottom + end,
        "length-cut": head + grid1 + b"\2\x80",
        "end-missing": good[:-1],
        "end-repeated": good + end,
        "end-followed-by-zero": good + b"\0",
        "padding-missing": padding.rstrip(b"\0"),
        "padding-too-short": padding[:-1],
        "padding-too-long": padding + b"\0",
        "padding-not-zero": padding[:-1] + b"\1",
        "grid-1-missing": head + grid2 + end,
        "grid-2-missing": head + grid1 + end,
        "grid-gap": head + grid1 + chunk(3, bottom) + end,
        "grid-repeated": head + grid1 + grid2 + grid2 + end,
        "grids-in-wrong-order": head + grid2 + grid1 + end,
        "grids-exchanged": with_grids(bottom, top),
        "grid-the-model-has-not": with_grids(top, bottom, b""),
        "payload-not-whole-words": with_grids(top, bottom[:-1]),
        "payload-ends-in-a-zero-word": with_grids(top, bottom + bytes(4)),
        "payload-empty": with_grids(top, b""),
        "payload-one-word-short": with_grids(top, bottom[4:]),
        "payload-one-word-long": with_grids(top, b"\1\2\3\4" + bottom),
        "payload-bit-flipped": with_grids(top, flipped(bottom, len(bottom) // 2)),
        "lanes-exchanged": with_lanes(lane2, lane1),
        "lane-one-word-short": with_lanes(lane1[4:], lane2),
        "lane-one-word-long": with_lanes(b"\1\2\3\4" + lane1, lane2),
        "lane-ends-in-a-zero-word": with_lanes(lane1 + bytes(4), lane2),
        "lane-longer-than-the-payload": with_bottom(b"\xff\x7f" + body),
        "lane-length-not-minimal": with_bottom(bytes([length & 127 | 128, length >> 7 | 128, 0]) + body),
        "lane-lengths-missing": with_bottom(b""),
        "lanes-not-whole-words": with_bottom(laned.grids[1][:-1]),
        "offset-missing": moved.replace(offset, b""),
        "offset-exchanged": moved.replace(offset, sealed(0x3F, moved_parts.offset[::-1])),
        "offset-crc-wrong": moved.replace(offset, offset[:-1] + b"!"),
        "offset-shorter-than-a-crc": moved.replace(offset, chunk(0x3F, b"off")),
        "offset-before-the-grids": moved[:25] + offset + moved[25:].replace(offset, b""),
        "offset-behind-the-flat-blocks": both.replace(b"".join(last), b"".join(reversed(last))),
        "offset-repeated": moved.replace(offset, 2 * offset),
        "offset-empty": with_offset(moved_parts, b""),
        "offset-of-zeros": with_offset(moved_parts, bytes(3)),
        "offset-of-one-byte-for-three-planes": with_offset(moved_parts, b"\1"),
        "offset-of-four-bytes": with_offset(moved_parts, b"\1\1\1\1"),
        "offset-of-zero-for-one-plane": with_offset(both_parts, b"\0"),
        "offset-of-three-bytes-for-one-plane": with_offset(both_parts, b"\1\1\1"),
        "flat-missing": rich_head + rich_grids + plane + end,
        "flat-exchanged": container.pack(dataclasses.replace(full, flat=b"\2" + full.flat[1:])),
        "flat-crc-wrong": rich_head + rich_grids + blocks[:-1] + b"!" + plane + end,
        "flat-before-the-grids": rich_head + blocks + rich_grids + plane + end,
        "flat-behind-the-alpha": rich_head + rich_grids + plane + blocks + end,
        "flat-repeated": rich_head + rich_grids + blocks + blocks + plane + end,
        **{f"flat-content-{name}": with_flat(content) for name, content in wrong_flats().items()},
        "alpha-missing": rich_head + rich_grids + blocks + end,
        "alpha-without-a-mode-for-it": head + grid1 + grid2 + sealed(0x41, b"alpha") + end,
        "alpha-crc-wrong": rich_head + rich_grids + blocks + plane[:-1] + b"!" + end,
        **{f"alpha-png-{name}": with_alpha(content) for name, content in wrong_alphas().items()},
        "icc-crc-wrong": head + grid1 + grid2 + icc[:-1] + b"!" + end,
        "icc-shorter-than-a-crc": head + grid1 + grid2 + chunk(0x42, b"icc") + end,
        "icc-repeated": head + grid1 + grid2 + icc + icc + end,
        "icc-before-the-grids": head + icc + grid1 + grid2 + end,
        "exif-crc-wrong": head + grid1 + grid2 + exif[:-1] + b"!" + end,
        "exif-before-icc": head + grid1 + grid2 + exif + icc + end,
        "xmp-crc-wrong": head + grid1 + grid2 + xmp[:-1] + b"!" + end,
    }
    other = {
        "NotVq2Error": {
            "nothing": b"",
            "magic-of-png": b"\x89PNG\r\n\x1a\n" + good[8:],
            "magic-bit-flipped": flipped(good, 3),
            "magic-cut": good[:3],
        },
        "UnsupportedVersionError": {f"version-{n}": patched(good, 4, bytes([n])) for n in (0, 1, 3)},
        "ModelMismatchError": {"model-of-another-name": flipped(good, 13)},
        "LimitError": {
            "pixels-more-than-the-limit": patched(good, 7, b"\xff" * 6),
            "side-longer-than-the-limit-allows": patched(good, 7, b"\xff" * 3 + b"\0" * 3),
        },
    }
    by_error = {"DamagedError": damaged, **other}
    return {name: (error, data) for error, files in by_error.items() for name, data in files.items()}


def main() -> None:
    codec = Codec.load(WEIGHTS, "cpu")

    def keep(folder: str, name: str, data: bytes) -> Path:
        path = GOLDEN / folder / f"{name}.vq2"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_bytes(data)
        return path

    files = {name: codec.encode(picture, quality) for name, (picture, quality) in pictures().items()}
    files["photo-visual"] = codec.encode(*pictures()["photo-level-2"], tune="visual")
    lines = []
    for name, data in {**files, "padded": padded(codec, 4096, 32)}.items():
        path = keep("decode", name, data)
        parts = container.unpack(path.read_bytes())
        grids = codec.indices.decode(parts)
        lines.append(f"{container.checksum(parts.header, grids):08x} {path.name}\n")
    (GOLDEN / "decode.txt").write_text("".join(lines))
    table = [f"{error} {keep('refuse', name, data).name}\n" for name, (error, data) in mistakes(codec).items()]
    (GOLDEN / "refuse.txt").write_text("".join(table))


if __name__ == "__main__":
    main()
