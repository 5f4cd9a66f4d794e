"""The .vq2 file format, version 2. This docstring is the specification, the code below implements it.

A file is a header of 25 bytes, then chunks, then an end mark. Numbers are unsigned and little-endian. To
*refuse* is to raise the named error of `bitstream.errors`, and to do so before memory is allocated in
proportion to a number that was read from the file. How a model turns indices into the next index's logits, and
what of it lies where in a weights file, is in FORMAT.md.


1. Header

======  ====  ===========  ========================================================  =======================
offset  size  field        meaning and allowed range                                 otherwise refuse with
======  ====  ===========  ========================================================  =======================
0       4     magic        F6 56 51 32: a byte that UTF-8 does not use, then "VQ2"   NotVq2Error
4       1     version      2                                                         UnsupportedVersionError
5       1     level        quality level, 1..127 and one that the model has, + tune  DamagedError
6       1     colour       colour mode, section 2                                    DamagedError
7       3     width        width in pixels minus 1, so 1..2^24 pixels                LimitError
10      3     height       height in pixels minus 1, so 1..2^24 pixels               LimitError
13      8     fingerprint  identifies the model, section 4                           ModelMismatchError
21      4     checksum     of header and decoded indices, section 4                  DamagedError
======  ====  ===========  ========================================================  =======================

The magic is checked first, then the version; a file that ends within the header is refused with DamagedError.
Every size that can be written is valid, but a caller of the decoder sets a limit, 2^27 pixels unless told
otherwise: width times height may not exceed it, nor may the square of width or height exceed 64 times the limit,
because the time that a thin picture takes goes with its length (LimitError). And the file has a least size
(DamagedError), with which decoding takes time and memory in proportion to what the decoder was given. With W and
H the width and height in blocks of 16 x 16 pixels, rounded up::

    least size in bytes = ceil(max(W, H) * max(8, min(W, H)) / 4)

that is a byte for every 4 blocks, of which thin pictures count 8 side by side. Smaller files are padded, see
section 3. All this is checked in this order before the chunks are looked at. Fingerprint, level and checksum are
checked by whoever holds the model, and whether there is memory enough by whoever decodes. The tune is 128 in a
file for the eye and 0 in one for least squared error; FORMAT.md, section 8, says which of a model's rows it uses.


2. Colour modes

The mode's bits: 1 is set if three planes come out, 2 if there is an alpha chunk, 4 if the three planes are equal.

=====  ==========  ================  =====================  =========
value  name        planes coded      planes that come out   alpha
=====  ==========  ================  =====================  =========
0      GREY        1                 grey                   none
1      RGB         3                 red, green, blue       none
2      GREY_ALPHA  1                 grey                   chunk
3      RGBA        3                 red, green, blue       chunk
5      EQUAL_RGB   1                 red = green = blue     none
7      EQUAL_RGBA  1                 red = green = blue     chunk
=====  ==========  ================  =====================  =========

A model's decoder network gives three planes; one coded plane is their mean, rounded. Then
the offset is added and the flat blocks are set, in this order (section 3).


3. Chunks

A chunk is its type (1 byte), the length of its payload in bytes (a varint), and the payload. A varint is a
LEB128 number: 7 bits in each byte, least significant first, the high bit set in every byte but the last. It
has at most 5 bytes and no more than its value needs: the last byte is 0 only if it is the only one.

==========  ======  =========================================================================
type        name    payload
==========  ======  =========================================================================
0x01..0x08  grid    the indices of one grid, sections 5 to 7; 0x01 is the coarsest grid
0x3F        offset  what is added to all pixels of a plane, see below
0x40        flat    blocks of one colour, which come out exactly, see below
0x41        alpha   the alpha plane, a PNG file, see below
0x42        icc     the image's ICC profile
0x43        exif    the image's EXIF block
0x44        xmp     the image's XMP packet
0x7F        end     none, and no length: the file ends here, or with the padding behind
==========  ======  =========================================================================

A decoder refuses the file with DamagedError unless all of these hold:

- every type is in the table, and every payload is within the file;
- behind the end mark are as many zero bytes as the least size of section 1 asks for, mostly none, and nothing
  else;
- types ascend strictly, so that no chunk comes twice;
- grids are numbered from 1 without a gap, at least one, and as many as the model has (in a model of two
  grids, 1 is "top" and 2 is "bottom"); the other chunks are optional;
- there is an alpha chunk exactly if the colour mode has alpha;
- the payload of an optional chunk ends with 4 bytes, counted in its length, that are the CRC-32 of its type
  byte and of the content before them.

**Offset.** Where a picture takes hardly any bits, all of it may come out too bright or too dark by some grey levels.
The content of the offset chunk is one byte for each plane that is coded (section 2), a number from -128 to 127 in two's
complement. They are not all 0. Anything else is refused with DamagedError. A decoder adds the number to all pixels of
its plane, which are whole numbers by then, and clips to 0..255.

**Flat blocks.** Where the picture has one exact colour, its decoder network gives that colour only about. The flat
chunk names such blocks: 8 x 8 pixels each, those at the right and at the bottom cut off by the picture's edge,
ceil(width / 8) * ceil(height / 8) of them. Its content is

- n, the number of colours, 1..255 (1 byte);
- n colours: red, green, blue (3 bytes), or one byte each if one plane is coded (section 2);
- a stream in deflate format (RFC 1951, without a zlib header) that ends with the content and inflates to exactly
  one byte for each block, in rows from the top left: 0, or a number 1..n.

Anything else is refused with DamagedError. A decoder sets all pixels of a block with a number k > 0 to colour k, in the
planes that are coded, as the last thing it does to them. What it does about the pixels around, where the error of the
network would now end at an edge, is as free as the network is.

**Alpha.** The content of an alpha chunk is a PNG file (ISO/IEC 15948) of the image's width and height: its
signature, one IHDR chunk with bit depth 8, colour type 0 (grey) and neither compression, filter nor interlace
methods but 0, one or more IDAT chunks, one IEND chunk without data, and nothing else, neither between nor behind.
Every chunk's CRC is right. The data of all IDAT chunks is one zlib stream that ends with them and inflates to exactly
height * (width + 1) bytes, filter types 0..4. Anything else is refused with DamagedError.

A program may show the coarsest grid alone as a preview, of a damaged or truncated file too, if the header, the
limits of section 1, the first chunk and the end of its payload (section 7) are in order; it must not pass for
the image, because the checksum covers all grids. If the whole file is in order so far (this section), a preview has
its flat blocks: the coarsest grid need not say anything about them. A preview does without the offset, which makes up
for what all grids together are off by.

The version byte is the only extension mechanism: a new chunk type needs a new version.


4. Fingerprint and checksum

The fingerprint is the first 8 bytes of the SHA-256 of the strides, the priors' weights and the codebooks, of all that
must be equal to read the indices; FORMAT.md says in which form.

The checksum is the CRC-32 (as in zlib and PNG) of the 21 header bytes before it, followed by the content of the offset
chunk, then that of the flat chunk, if there are any, and by the decoded index grids, coarsest first, each index as
2 bytes, in C order of (M, h, w). It covers what was decoded, not what was stored, so that it detects wrong tables as
well as damage; and all that pixels are made of but alpha, so that no chunk of these can get lost.


5. Order of the symbols, and lanes

A grid has h x w cells with M groups each, and each group of a cell has one index, 0 for null. The number of grids, and
M, h and w of each, follow from the model and the image's width and height. Each grid is a payload of its own, and
is coded when all coarser grids are known.

The index of a group is one or more symbols, each with a table of probabilities (FORMAT.md, section 11): its flag, 0 for
null and 1 otherwise; if it is not null its outcome; after the outcome that escapes, the coordinates of a point.

The rows of a grid are dealt to lanes. Their number is the largest power of two that is at most h / 32 and at most 8,
but at least 1: so 1 up to 63 rows, 2 up to 127, 4 up to 255, then 8. Row i belongs to lane i mod lanes. Cell (i, j),
row i and column j, belongs to wave t = j + 2i. A lane has its cells by ascending wave, within a wave by ascending row;
of each cell all symbols, group after group, before those of the next cell.

A payload begins with the number of words of each lane but the last, a varint as in section 3. Then come the words of
all lanes, lane 0 first; the last lane has all words that are left. A payload is refused with DamagedError if one of
these numbers is no varint or larger than what is left, or if what follows them is no multiple of 4 bytes.


6. Tables

For each symbol of K >= 2 possible values the model gives K logits, whole numbers in units of 1/32 in log2. With d_k the
largest logit minus logit k::

    w_k = floor(2^(20 - (d_k mod 32) / 32) + 1/2) >> floor(d_k / 32)
    u_k = 1 + floor((2^20 - K) * w_k / sum(w))

and what the sum of all u_k then lacks of 2^20, less than K, is added to u_0. So every u_k >= 1, and
u_k / 2^20 is the probability that the symbol is k. From d_k = 672 on w_k is 0. The coordinates of an escape have no
logits: each has K = 128 and u_k = 2^13.


7. rANS

A lane is a sequence of 32-bit words, little-endian. It may have none: then all of its symbols are 0, those with the
interval that begins at 0. Its last word is not 0, otherwise the file is refused with DamagedError. A decoder of a lane
has a state x, at first 0, and takes words from the end of the lane: before each symbol, while x < 2^32 and a word is
left, x = 2^32 x + word. Then, with c_k = u_0 + ... + u_(k-1)::

    s = x mod 2^24
    k = the symbol, such that 16 c_k <= s < 16 (c_k + u_k)
    x = 16 u_k floor(x / 2^24) + s - 16 c_k

After the last symbol of each lane x must be 0 and no word be left, otherwise DamagedError. An encoder goes this way
backwards, from the last symbol to the first: if x >= 2^40 * 16 u_k, it moves the low word of x to the end of
the lane; then x = 2^24 floor(x / 16 u_k) + (x mod 16 u_k) + 16 c_k. At last x itself goes to the end, low
word first, as many words as it needs. (This is the `AnsCoder` of the library constriction with default
parameters: 64-bit state, 32-bit words, 24-bit precision, hence the factor 16.)
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import isqrt
from typing import TYPE_CHECKING, Any

from bitstream.errors import DamagedError, LimitError, NotVq2Error, UnsupportedVersionError, UsageError

if TYPE_CHECKING:  # `vqcodec info` does without numpy
    from numpy.typing import NDArray

MAGIC = b"\xf6VQ2"
VERSION = 2
HEADER_BYTES = 25  # the last 4 are the checksum
FINGERPRINT_BYTES = 8
MAX_LEVEL = 127
VISUAL = 128  # in the byte of the level
MAX_SIDE = 2**24
NO_LIMIT = MAX_SIDE**2  # of pixels, for those who have checked them
MAX_VARINT_BYTES = 5
MAX_GRIDS = 8
OPTIONAL_CHUNKS = {"offset": 0x3F, "flat": 0x40, "alpha": 0x41, "icc": 0x42, "exif": 0x43, "xmp": 0x44}  # in file order
END = 0x7F

DEFAULT_MAX_PIXELS = 2**27  # as many as cameras have
LONGEST = 64  # a side's square may exceed the limit so many times
BLOCK, BLOCKS_PER_BYTE, LEAST_SIDE = 16, 4, 8  # a byte for every 4 blocks of 16 x 16 pixels, 8 side by side at least


class ColourMode(IntEnum):
    GREY = 0
    RGB = 1
    GREY_ALPHA = 2
    RGBA = 3
    EQUAL_RGB = 5
    EQUAL_RGBA = 7

    @property
    def has_hue(self) -> bool:
        """Three planes come out."""
        return bool(self & 1)

    @property
    def has_alpha(self) -> bool:
        return bool(self & 2)

    @property
    def one_plane(self) -> bool:
        """One plane is coded."""
        return self not in (ColourMode.RGB, ColourMode.RGBA)

    @property
    def opaque(self) -> "ColourMode":
        """The mode without its alpha."""
        return ColourMode(self & ~2)

    @property
    def shown(self) -> "ColourMode":
        """The mode of the picture that comes out, whatever was coded: one of the first four."""
        return ColourMode(self & ~4)

    @property
    def equal(self) -> "ColourMode":
        """The mode for a picture of this mode whose planes are equal."""
        return ColourMode(self | 4) if self.has_hue else self


@dataclass(frozen=True)
class Header:
    """What a decoder must know before it reads an index.

    level: 1..127.  width, height: 1..2**24 pixels.  fingerprint: 8 bytes.  visual: tuned for the eye, not for squared
    error.  ValueError for anything else.
    """

    level: int
    width: int
    height: int
    colour: ColourMode
    fingerprint: bytes
    visual: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.level <= MAX_LEVEL:
            raise ValueError(f"quality level {self.level} is not in 1..{MAX_LEVEL}")
        if not (1 <= self.width <= MAX_SIDE and 1 <= self.height <= MAX_SIDE):
            raise UsageError(f"image size {self.width} x {self.height} is not in 1..{MAX_SIDE}")
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"fingerprint has {len(self.fingerprint)} bytes, not {FINGERPRINT_BYTES}")


@dataclass(frozen=True)
class Container:
    """A .vq2 file, taken apart.

    grids: 1..8 rANS payloads, coarsest grid first.  offset .. xmp: contents without their CRC, None where
    there is no chunk; alpha is None exactly if the colour mode has no alpha.  offset: a byte for each plane that is
    coded, not all 0.  ValueError for anything else.
    """

    header: Header
    checksum: int
    grids: tuple[bytes, ...]
    offset: bytes | None = None
    flat: bytes | None = None
    alpha: bytes | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.checksum < 2**32:
            raise ValueError(f"checksum {self.checksum} is not in 0..2^32 - 1")
        if not 1 <= len(self.grids) <= MAX_GRIDS:
            raise ValueError(f"{len(self.grids)} index grids, not 1..{MAX_GRIDS}")
        if self.header.colour.has_alpha != (self.alpha is not None):
            found = "no alpha plane" if self.alpha is None else "an alpha plane"
            raise ValueError(f"colour mode is {self.header.colour.name}, but there is {found}")
        planes = 1 if self.header.colour.one_plane else 3
        if self.offset is not None and len(self.offset) != planes:
            raise ValueError(f"the offset has {len(self.offset)} bytes, the picture {planes} coded planes")
        if self.offset is not None and not any(self.offset):
            raise ValueError("the offset is 0 in every plane, which needs no chunk")


def pack(container: Container) -> bytes:
    """The bytes of a .vq2 file.  Raises ValueError if a payload has 2**35 bytes or more."""
    parts = [_header_bytes(container.header), container.checksum.to_bytes(4, "little")]
    for kind, payload in enumerate(container.grids, start=1):
        parts += [bytes([kind]), varint(len(payload)), payload]
    for name, kind in OPTIONAL_CHUNKS.items():
        content: bytes | None = getattr(container, name)
        if content is not None:
            parts += [bytes([kind]), varint(len(content) + 4), content, _crc(kind, content)]
    return b"".join([*parts, bytes([END])]).ljust(_least_size(container.header), b"\0")


def unpack(data: bytes | bytearray | memoryview, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Container:
    """The inverse of `pack`.

    Guarantees: whatever the bytes, it returns or raises a BitstreamError.  The header is checked before the
    limits, the limits before the chunks, and nothing is copied before all lengths and chunk CRCs are in order.
    Requirement: the indices decoded from the grids are passed to `verify`.
    """
    data = memoryview(data).cast("B")
    header, stored, least = _checked_header(data, max_pixels)
    chunks: dict[int, memoryview] = {}
    for kind, payload in _parse_chunks(data, least):
        known = kind <= MAX_GRIDS or kind in OPTIONAL_CHUNKS.values()
        if not known or kind <= max(chunks, default=0):
            raise DamagedError(f"chunk 0x{kind:02X} is unknown, repeated or out of order: damaged file")
        chunks[kind] = payload
    grids = [payload for kind, payload in chunks.items() if kind <= MAX_GRIDS]
    if list(chunks)[: len(grids)] != list(range(1, len(grids) + 1)):
        raise DamagedError("an index grid is missing: the file is damaged")
    present = [(name, kind) for name, kind in OPTIONAL_CHUNKS.items() if kind in chunks]
    contents = {name: _content(kind, chunks[kind]) for name, kind in present}
    copies = {name: bytes(content) for name, content in contents.items()}
    try:
        return Container(header, stored, tuple(map(bytes, grids)), **copies)
    except ValueError as error:
        raise DamagedError(f"{error}: the file is damaged") from None


def unpack_coarsest(
    data: bytes | bytearray | memoryview, *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[Header, bytes]:
    """Header and payload of the coarsest grid, of a file that may be cut off anywhere behind it: for a preview.

    Guarantees: those of `unpack`.  What comes behind is not looked at, and without it the checksum cannot be
    verified: wrong indices are noticed only by a coder that is not empty after the last one.
    """
    data = memoryview(data).cast("B")
    header, _, least = _checked_header(data, max_pixels)
    kind, payload = next(_parse_chunks(data, least), (END, data[:0]))
    if kind != 1:
        raise DamagedError("the coarsest index grid is missing: the file is damaged")
    return header, bytes(payload)


def checksum(header: Header, grids: "Sequence[NDArray[Any]]", *contents: bytes | None) -> int:
    """CRC-32 of the header, the contents of the offset and flat chunks, in this order, and the decoded index grids.

    grids: coarsest first, each (M, h, w), of any integer dtype.  ValueError if an index is not in 0..65535.
    """
    crc = zlib.crc32(b"".join([_header_bytes(header), *(content or b"" for content in contents)]))
    for grid in grids:
        if grid.dtype.kind not in "iu" or (grid.size and not (grid.min() >= 0 and grid.max() < 2**16)):
            raise ValueError(f"indices must be integers in 0..65535 (dtype {grid.dtype})")
        crc = zlib.crc32(grid.astype("<u2").tobytes(), crc)
    return crc


def verify(container: Container, grids: "Sequence[NDArray[Any]]") -> None:
    """Raise DamagedError unless `grids`, as in `checksum`, are the indices that the file was made from."""
    computed = checksum(container.header, grids, container.offset, container.flat)
    if computed != container.checksum:
        raise DamagedError(
            "decoded indices do not match the file's checksum "
            f"(stored {container.checksum:08x}, computed {computed:08x}): the file is damaged"
        )


def over_limit(width: int, height: int, max_pixels: int) -> str:
    """What is too large about a picture, with the limit; nothing if it is within it."""
    found = f"the image has {width} x {height} pixels"
    if width * height > max_pixels:
        return f"{found}, the limit is {max_pixels}"
    if max(width, height) ** 2 > LONGEST * max_pixels:
        return f"{found}, the limit of {max_pixels} pixels allows {isqrt(LONGEST * max_pixels)} a side"
    return ""


def _checked_header(data: memoryview, max_pixels: int) -> tuple[Header, int, int]:
    """Header, checksum and least size of a file that is within the limits."""
    header, stored = _parse_header(data)
    excess = over_limit(header.width, header.height, max_pixels)
    if excess:
        raise LimitError(f"{excess}: raise it (--max-pixels) if you trust the file")
    least = _least_size(header)
    if len(data) < least:
        raise DamagedError(
            f"the file has {len(data)} bytes, one of {header.width} x {header.height} pixels at least {least}: "
            "it is damaged or truncated"
        )
    return header, stored, least


def _least_size(header: Header) -> int:
    """Bytes that a file of this size has at least; it is padded to that."""
    short, long = sorted(-(-side // BLOCK) for side in (header.width, header.height))
    return -(-long * max(LEAST_SIDE, short) // BLOCKS_PER_BYTE)


def _header_bytes(header: Header) -> bytes:
    """The header up to the checksum."""
    return b"".join(
        [
            MAGIC,
            bytes([VERSION, header.level | header.visual * VISUAL, header.colour]),
            (header.width - 1).to_bytes(3, "little"),
            (header.height - 1).to_bytes(3, "little"),
            header.fingerprint,
        ]
    )


def _parse_header(data: memoryview) -> tuple[Header, int]:
    """The header and the checksum stored behind it."""
    if data[:4] != MAGIC:
        raise NotVq2Error(f"not a .vq2 file (starts with {data[:4].hex() or 'nothing'}, not {MAGIC.hex()})")
    if len(data) > 4 and data[4] != VERSION:
        raise UnsupportedVersionError(
            f"the file has format version {data[4]}, this release reads version {VERSION}: "
            "install the vqcodec version that wrote it"
        )
    if len(data) < HEADER_BYTES:
        raise DamagedError(f"the file ends after {len(data)} of {HEADER_BYTES} header bytes: it is truncated")
    width, height = (int.from_bytes(data[start : start + 3], "little") + 1 for start in (7, 10))
    try:
        visual, level = divmod(data[5], VISUAL)
        header = Header(level, width, height, ColourMode(data[6]), bytes(data[13:21]), bool(visual))
    except ValueError as error:
        raise DamagedError(f"{error}: the file is damaged") from None
    return header, int.from_bytes(data[21:25], "little")


def _parse_chunks(data: memoryview, least: int) -> Iterator[tuple[int, memoryview]]:
    """Type and payload of each chunk up to the end mark, which must end `data` but for zeros up to `least` bytes."""
    position = HEADER_BYTES
    while position < len(data):
        kind = data[position]
        position += 1
        if kind == END:
            rest = data[position:]
            if rest and (len(data) > least or any(rest)):
                raise DamagedError(f"{len(rest)} wrong bytes follow the end mark: the file is damaged")
            return
        length, position = parse_varint(data, position)
        left = len(data) - position
        if length > left:
            raise DamagedError(f"chunk 0x{kind:02X} has {length} bytes, but {left} are left: truncated file")
        yield kind, data[position : position + length]
        position += length
    raise DamagedError("there is no end mark: the file is truncated")


def varint(value: int) -> bytes:
    if value >= 1 << 7 * MAX_VARINT_BYTES:
        raise ValueError(f"a chunk of {value} bytes is too long for the format")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def parse_varint(data: memoryview, position: int) -> tuple[int, int]:
    """The number at `position`, and the position behind it."""
    value = 0
    for count, byte in enumerate(data[position : position + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            if byte == 0 and count > 0:
                break
            return value, position + count + 1
    raise DamagedError(f"no chunk length at byte {position}: the file is damaged or truncated")


def _crc(kind: int, content: bytes | memoryview) -> bytes:
    return zlib.crc32(content, zlib.crc32(bytes([kind]))).to_bytes(4, "little")


def _content(kind: int, payload: memoryview) -> memoryview:
    """The content of an optional chunk, after a check of the CRC-32 at its end."""
    content = payload[:-4]
    if payload[-4:] != _crc(kind, content):
        raise DamagedError(f"chunk 0x{kind:02X} does not match its CRC-32: the file is damaged")
    return content
