"""EXIF blocks and TIFF files, directory by directory.

An EXIF block is a small TIFF file. What is here moves its fields as raw bytes and leaves all others where they are:
maker notes point into the block by offsets that nobody else knows, and an odd value, which a library would stumble
over, costs nothing.

Every function raises ValueError for a block whose directories cannot be followed.
"""

import contextlib
import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

MAGIC = (b"II*\0", b"MM\0*")
BIG_MAGIC = (b"II+\0", b"MM\0+")  # BigTIFF: the same with 64-bit offsets; no EXIF block is one

EXIF, GPS, INTEROP, SUB_IFDS = 0x8769, 0x8825, 0xA005, 0x014A
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 0x011A, 0x011B, 0x0128

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_NUMBERS = {1: "B", 3: "H", 4: "I", 5: "II", 6: "b", 8: "h", 9: "i", 10: "ii", 13: "I", 16: "Q", 18: "Q"}
_SHORT, _LONG, _RATIONAL = 3, 4, 5
_MOST_DIRECTORIES = 1000  # more would be a loop, or an attack

# Fields that say how the pixels of this very file are stored, or that the file has elsewhere (XMP, ICC, IPTC): a file
# made of these pixels has its own. From the tables of TIFF 6.0, its supplements and DNG.
_OF_THE_FILE = {
    *range(0x00FE, 0x010B),  # from the type of the page over size, bits and compression to the order of bits
    *(0x0111, *range(0x0115, 0x011A), 0x011C, *range(0x0120, 0x0126)),  # strips, samples, planes
    *(0x012D, 0x013D, *range(0x0140, 0x0147), SUB_IFDS, *range(0x014C, 0x015C)),  # curves, palette, tiles, inks
    *range(0x0200, 0x0215),  # JPEG and YCbCr
    *(0x02BC, 0x83BB, 0x8649, 0x8773, 0x935C),  # XMP, IPTC, Photoshop's resources, ICC, Photoshop's layers
    *(0x828D, 0x828E),  # colour filter array
}
# Of a TIFF file that is read: what describes the picture, to be made an EXIF block.
_OF_THE_PICTURE = {
    *(0x010D, 0x010E, 0x010F, 0x0110, X_RESOLUTION, Y_RESOLUTION, 0x011D, RESOLUTION_UNIT, 0x0131, 0x0132, 0x013B),
    *(0x013C, 0x4746, 0x4749, 0x8298, EXIF, GPS, *range(0x9C9B, 0x9CA0)),  # ratings, copyright, what Windows writes
}


class Field(NamedTuple):
    """length: number of values. place: of its 12 bytes (20 in BigTIFF) in the directory. start: of its value. data: the
    value as it stands."""

    tag: int
    kind: int
    length: int
    data: bytes
    place: int = 0
    start: int = 0


Directory = dict[int, Field]


def order(block: bytes) -> str:
    """The byte order, as struct writes it."""
    if block[:4] not in (*MAGIC, *BIG_MAGIC):
        raise ValueError("not a TIFF structure")
    return "<" if block[:2] == b"II" else ">"


def first(block: bytes) -> int:
    """Where the first directory is."""
    form, at = (order(block) + "Q", 8) if _is_big(block) else (order(block) + "I", 4)
    return int(_unpack(form, block, at)[0])


def directory(block: bytes, at: int) -> tuple[Directory, int]:
    """The fields of the directory at an offset, of a tag that is there twice the last, and where the next directory is,
    or 0. Fields of unknown types and of values outside the block are left out."""
    found, following = entries(block, at)
    return {field.tag: field for field in found}, following


def entries(block: bytes, at: int) -> tuple[list[Field], int]:
    """As ``directory``, but all fields in their order."""
    e, big = order(block), _is_big(block)
    count_form, form, inline, next_form = ("Q", "HHQ", 8, "Q") if big else ("H", "HHI", 4, "I")
    (count,) = _unpack(e + count_form, block, at)
    place = at + struct.calcsize(e + count_form)
    head = struct.calcsize(e + form)
    if not at or place + count * (head + inline) > len(block):
        raise ValueError(f"no directory at byte {at}")
    fields: list[Field] = []
    total = 0
    for _ in range(count):
        tag, kind, number = _unpack(e + form, block, place)
        size = _SIZES.get(kind, 0) * number
        start = place + head if size <= inline else int(_unpack(e + next_form, block, place + head)[0])
        if size and start + size <= len(block):
            total += size
            if total > len(block):  # before they are copied: a small file could ask for terabytes
                raise ValueError(f"the values of the directory at byte {at} overlap")
            fields.append(Field(tag, kind, number, block[start : start + size], place, start))
        place += head + inline
    following = block[place : place + struct.calcsize(e + next_form)]
    return fields, int.from_bytes(following, "little" if e == "<" else "big")


def numbers(block: bytes, field: Field | None) -> tuple[float, ...]:
    """The values of a field of numbers, fractions divided; empty for what is none."""
    form = "" if field is None else _NUMBERS.get(field.kind, "")
    if field is None or not form:
        return ()
    found = struct.unpack(order(block) + form * field.length, field.data)
    if len(form) == 1:
        return found
    return tuple(a / b if b else 0.0 for a, b in zip(found[::2], found[1::2], strict=True))


def number(block: bytes, fields: Directory, tag: int, default: int = 0) -> int:
    """The first value of a field, or a default."""
    return int(next(iter(numbers(block, fields.get(tag))), default))


def sub_directory(block: bytes, fields: Directory, pointer: int) -> Directory:
    """The directory that a field of another one points to; empty if there is none."""
    at = number(block, fields, pointer)
    return directory(block, at)[0] if at else {}


def pages(tiff: bytes) -> Iterator[tuple[Directory, bool]]:
    """All directories of a file and whether each is in the chain: others are children of one that is."""
    at, seen = first(tiff), set[int]()

    def fresh(place: int) -> bool:
        known = place in seen or len(seen) == _MOST_DIRECTORIES
        seen.add(place)
        return bool(place) and not known

    while fresh(at):
        fields, at = directory(tiff, at)
        yield fields, True
        for child in map(int, numbers(tiff, fields.get(SUB_IFDS))):
            if fresh(child):
                yield directory(tiff, child)[0], False


def resolution(exif: bytes) -> tuple[float, float] | None:
    """Pixels per inch across and down, if it says so."""
    fields, _ = directory(exif, first(exif))
    x, y = numbers(exif, fields.get(X_RESOLUTION)), numbers(exif, fields.get(Y_RESOLUTION))
    unit = {2: 1.0, 3: 2.54}.get(number(exif, fields, RESOLUTION_UNIT, 2))
    return (x[0] * unit, y[0] * unit) if x and y and x[0] > 0 and y[0] > 0 and unit else None


# --- changed ---


def with_resolution(exif: bytes | None, x: float, y: float, unit: int) -> bytes:
    """With a resolution, if there is none yet. unit: 1 for the shape of a pixel alone, 2 for inches."""
    exif = exif or b"II*\0\x08\0\0\0" + bytes(6)
    fields, following = directory(exif, first(exif))
    if X_RESOLUTION in fields:
        return exif
    e = order(exif)
    for tag, value in (X_RESOLUTION, x), (Y_RESOLUTION, y):
        fields[tag] = Field(tag, _RATIONAL, 1, struct.pack(e + "II", round(value * 10_000), 10_000))
    fields[RESOLUTION_UNIT] = Field(RESOLUTION_UNIT, _SHORT, 1, struct.pack(e + "H", unit))
    if len(exif) == 14:  # the empty one
        exif = exif[:8]
    return _with_first(exif, fields, following)


def without_gps(exif: bytes) -> bytes:
    """Without the location: its directory and all its values are overwritten, everything else stays where it is."""
    out = bytearray(exif)
    fields, _ = directory(exif, first(exif))
    if GPS not in fields:
        return exif
    place, e = fields[GPS].place, order(exif)
    if at := number(exif, fields, GPS):
        for field in entries(exif, at)[0]:  # a tag may be there twice
            out[field.start : field.start + len(field.data)] = bytes(len(field.data))
        (count,) = _unpack(e + "H", exif, at)
        out[at + 2 : at + 2 + 12 * count] = bytes(12 * count)
    (count,) = _unpack(e + "H", exif, first(exif))
    end = min(first(exif) + 2 + 12 * count + 4, len(exif))  # with the offset of the next directory
    out[place:end] = exif[place + 12 : end] + bytes(12)
    struct.pack_into(e + "H", out, first(exif), count - 1)
    return bytes(out)


def from_tiff(tiff: bytes, at: int) -> bytes | None:
    """An EXIF block of what the directory at an offset says of the picture, the capture and the place. None if that is
    nothing."""
    found, _ = directory(tiff, at)
    fields = {tag: field for tag, field in found.items() if tag in _OF_THE_PICTURE}
    if not fields.keys() - {X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT} and customary(
        *(number(tiff, fields, tag, 1) for tag in (X_RESOLUTION, Y_RESOLUTION))
    ):
        return None
    magic = MAGIC[0] if order(tiff) == "<" else MAGIC[1]
    return magic + struct.pack(order(tiff) + "I", 8) + _tree(tiff, fields, 8, (EXIF, GPS, INTEROP))


def into_tiff(exif: bytes, tiff: bytes) -> bytes:
    """A little-endian TIFF file of one page with the fields of an EXIF block, none of which describes the file.

    The block is the beginning of the result, so whatever points into it is right. A thumbnail becomes a child of the
    page, as in the files of cameras: next to it, it would be a second page.
    """
    e, base = order(exif), len(exif) + len(exif) % 2
    own, _ = directory(tiff, first(tiff))
    described, thumbnail = directory(exif, first(exif))
    fields = {tag: field for tag, field in described.items() if tag not in _OF_THE_FILE}
    for tag, field in own.items():
        if form := _NUMBERS.get(field.kind):
            values = struct.unpack("<" + form * field.length, field.data)
            if tag == 0x0111:  # where the strips are
                values, form, field = tuple(value + base for value in values), "I", field._replace(kind=_LONG)
            field = field._replace(data=struct.pack(e + form * field.length, *values))
        fields[tag] = field
    if thumbnail:
        fields[SUB_IFDS] = Field(SUB_IFDS, _LONG, 1, struct.pack(e + "I", thumbnail))
    return _with_first(exif.ljust(base, b"\0") + tiff, fields, 0)


def _with_first(block: bytes, fields: Directory, following: int) -> bytes:
    """A block with another first directory, at its end."""
    block += bytes(len(block) % 2)
    e = order(block)
    return block[:4] + struct.pack(e + "I", len(block)) + block[8:] + _written(e, fields, len(block), following)


def _written(e: str, fields: Directory, at: int, following: int = 0) -> bytes:
    """A directory to be put at an offset, with the values that do not fit into it behind it."""
    fields = {tag: field for tag, field in fields.items() if field.kind < 16}  # those of BigTIFF alone
    entries, values = [], b""
    behind = at + 2 + 12 * len(fields) + 4
    for tag in sorted(fields):
        data = fields[tag].data
        if len(data) > 4:
            values += bytes(len(values) % 2)
            place = struct.pack(e + "I", behind + len(values))
            values += data
        else:
            place = data.ljust(4, b"\0")
        entries.append(struct.pack(e + "HHI", tag, fields[tag].kind, fields[tag].length) + place)
    return b"".join([struct.pack(e + "H", len(fields)), *entries, struct.pack(e + "I", following), values])


def _tree(block: bytes, fields: Directory, at: int, pointers: Collection[int]) -> bytes:
    """Fields as a directory at an offset, copied with the directories that they point to."""
    e, children, kept = order(block), dict[int, Directory](), dict(fields)
    for pointer in pointers:
        kept.pop(pointer, None)
        with contextlib.suppress(ValueError):
            if child := sub_directory(block, fields, pointer):
                children[pointer] = child
                kept[pointer] = Field(pointer, _LONG, 1, bytes(4))
    behind, end = b"", at + len(_written(e, kept, at))
    for pointer, child in children.items():
        behind += bytes((end + len(behind)) % 2)
        kept[pointer] = kept[pointer]._replace(data=struct.pack(e + "I", end + len(behind)))
        behind += _tree(block, child, end + len(behind), (INTEROP,) if pointer == EXIF else ())
    return _written(e, kept, at) + behind


def customary(x: float, y: float) -> bool:
    """True for resolutions that programs write when they know none: 1, and those of screens."""
    return round(x) == round(y) and round(x) in (0, 1, 72, 96)


def _is_big(block: bytes) -> bool:
    return block[:4] in BIG_MAGIC


def _unpack(form: str, block: bytes, at: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(form, block, at)
    except struct.error as error:
        raise ValueError(f"nothing at byte {at}") from error
