"""What a picture file says beyond what Pillow tells: which kind it really is, its depth, its colours, what gets lost.

data: the whole file, or nothing if there is none (any more); then these functions know nothing, and say so.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image, PngImagePlugin

from bitstream.container import MAGIC as VQ2_MAGIC
from bitstream.errors import ImageError
from vqcodec import exif as exif_block
from vqcodec.colour import ADOBE_GAMMA, ADOBE_RGB, BT709, SRGB_CURVE, UNSPECIFIED, Space, coded
from vqcodec.formats import PLUGINS, plugged

TIFF_MAGIC = (*exif_block.MAGIC, *exif_block.BIG_MAGIC)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
DEVELOP = "of a raw photograph only a small preview can be read: develop it first, as TIFF, PNG or JPEG"

# --- what it is ---

_RAW_STARTS = (b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM", b"IIRO", b"IIRS", b"MMOR", b"IIU\0")  # Fuji ... Panasonic
_RAW_BRANDS = (b"crx ",)  # Canon's CR3
_CFA, _LINEAR_RAW = 32803, 34892
_DNG_VERSION = 50706
_RAW_COMPRESSIONS = {32767, 32770, 34713, 65000, 65535}  # Sony, Samsung, Nikon, Kodak, Pentax


def refuse_other_kinds(data: bytes) -> None:
    """ImageError for a raw photograph and for what no decoder is installed for, by name."""
    brands = data[8:12] + data[16 : int.from_bytes(data[:4], "big")] if data[4:8] == b"ftyp" else b""
    if data.startswith(_RAW_STARTS) or brands.startswith(_RAW_BRANDS) or _is_raw_tiff(data):
        raise ImageError(DEVELOP)
    if data.startswith(VQ2_MAGIC) and "VQ2" not in Image.OPEN:
        raise ImageError("it is a .vq2 file already: decode it first")
    for format, starts in (
        ("HEIF", b"heic" in brands or b"heix" in brands),
        ("JXL", data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL "))),
    ):
        if starts and not plugged(format):
            raise ImageError(f"{PLUGINS[format]}, or convert the file first")


def _is_raw_tiff(data: bytes) -> bool:
    if not data.startswith(TIFF_MAGIC):
        return False
    if data[8:10] == b"CR":  # Canon's CR2
        return True
    try:
        for page, _ in exif_block.pages(data):
            kinds = {exif_block.number(data, page, tag) for tag in (0x0106, 0x0103)}
            if _DNG_VERSION in page or kinds & {_CFA, _LINEAR_RAW, *_RAW_COMPRESSIONS}:
                return True
    except ValueError:  # Pillow says what is wrong with it
        pass
    return False


def full_page(data: bytes) -> tuple[int, int]:
    """The first page of a TIFF file that is not a reduced copy of another one, and how many such pages there are, 0 if
    nobody can tell.

    Errors: ImageError if it stands where Pillow cannot read it.
    """
    try:
        pages = list(exif_block.pages(data))
    except ValueError:
        return 0, 0
    chain = [number for number, page in enumerate(p for p, chained in pages if chained) if not _is_reduced(data, page)]
    if chain:
        return chain[0], len(chain)
    sizes = [tuple(exif_block.number(data, page, tag) for tag in (0x0100, 0x0101)) for page, _ in pages]
    largest = max(sizes)
    if largest > sizes[0]:
        raise ImageError(
            f"its first picture of {sizes[0][0]} x {sizes[0][1]} is a thumbnail, and the one of "
            f"{largest[0]} x {largest[1]} cannot be read: save it again as an ordinary TIFF or PNG file"
        )
    return 0, 1


def _is_reduced(data: bytes, page: exif_block.Directory) -> bool:
    return bool(exif_block.number(data, page, 0x00FE) & 1) or exif_block.number(data, page, 0x00FF) == 2


# --- samples ---


def depth(image: Image.Image, data: bytes) -> int:
    """Bits per sample in the file, where Pillow makes 8 of them on loading without a word; else 8."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return 8
    if isinstance(bits := image.info.get("bit_depth"), int):  # HEIF's
        return bits
    if image.format in ("AVIF", "JPEG2000"):
        return _boxed_depth(data, image.format, len(image.getbands()))
    for decoder, _, _, args in getattr(image, "tile", []):
        args = args if isinstance(args, tuple) else (args,)
        over_255 = decoder.startswith("ppm") and any(isinstance(arg, int) and arg > 255 for arg in args)
        if over_255 or decoder == "SGI16" or (decoder == "sgi_rle" and args[2:] == (2,)) or ";16" in str(args):
            return 16  # the last is a raw mode such as "RGB;16B"
    return 8


def _boxed_depth(data: bytes, format: str, bands: int) -> int:
    if format == "AVIF":
        at = data.find(b"pixi", 0, 1 << 16) + 8  # ISO 23008-12, 6.5.6: version, flags, channels, then bits of each
        depths = data[at + 1 : at + 1 + data[at]] if 8 <= at < len(data) else b""
    else:
        at = data.find(b"\xff\x4f\xff\x51") + 42  # ISO 15444-1, A.5.1: Ssiz is bits - 1 and a sign, 3 bytes for each
        depths = bytes((size & 0x7F) + 1 for size in data[at : at + 3 * bands : 3]) if at >= 42 else b""
    return max(depths, default=8)


def transparent_grey(image: Image.Image) -> int | None:
    """Which of 0..255 means transparent in a PNG file of 2 or 4 bits, where Pillow gives the number in the file."""
    key, raw = image.info.get("transparency"), [str(tile.args) for tile in getattr(image, "tile", [])[:1]]
    steps = {"L;2": 3, "L;4": 15}.get(raw[0] if raw else "")
    return (key & steps) * (255 // steps) if image.format == "PNG" and steps and isinstance(key, int) else None


def grey_range(image: Image.Image) -> tuple[int | None, bool]:
    """Of grey that has more than 8 bits: which sample is white, None if the mode says it; and whether it is the other
    way round, 0 being white."""
    tags = getattr(image, "tag_v2", {})
    bits, kind = tags.get(0x0102, (0,))[0], tags.get(0x0153, (1,))[0]
    white = (1 << bits) - 1 if 8 < bits < 16 else 32767 if (bits, kind) == (16, 2) else None
    return white, tags.get(0x0106) == 0


# --- colours ---


def icc(image: Image.Image, data: bytes) -> bytes | None:
    """The ICC profile of a file whose reader in Pillow passes it over."""
    if image.format == "JPEG2000":
        at = data.find(b"colr\2", 0, 1 << 16)  # ISO 15444-1, I.5.3.3: a profile in full
        end = at - 4 + int.from_bytes(data[max(at - 4, 0) : at], "big")
        return data[at + 7 : end] if at > 0 else None
    if image.format == "BMP" and data[70:74] == b"DEBM" and len(data) > 138:  # BITMAPV5HEADER: embedded
        start, size = struct.unpack_from("<II", data, 126)
        return data[14 + start : 14 + start + size]
    return None


def space(image: Image.Image, data: bytes, exif: bytes | None) -> tuple[Space | None, str]:
    """The colour space that a file without an ICC profile declares, None for sRGB; and a note if it declares one that
    cannot be kept."""
    found: Space | None = None
    if image.format == "PNG":
        found, codes = _png_space(data)
    else:
        codes = _box_codes(image, data)
    if codes and not found:
        found = coded(*codes)
        if not found:
            return (
                None,
                f"colours are for HDR or another space (primaries {codes[0]}, transfer {codes[1]}) and stay as is",
            )
    if not found:
        try:
            tiff = data if image.format == "TIFF" else b""
            found, note = _exif_space(exif, tiff, getattr(getattr(image, "tag_v2", None), "offset", 0))
        except ValueError:
            return None, ""
        if note:
            return None, note
    return (found, "") if found and not found.is_srgb() else (None, "")


def _png_space(data: bytes) -> tuple[Space | None, tuple[int, int] | None]:
    """By cHRM and gAMA, and the codes of cICP, which go before sRGB, and that before the others; None without any."""
    known = {kind: content for kind, content, _ in png_chunks(data) if kind in (b"cICP", b"sRGB", b"gAMA", b"cHRM")}
    if len(known.get(b"cICP", b"")) >= 2:
        return None, (known[b"cICP"][0], known[b"cICP"][1])
    if b"sRGB" in known:
        return Space(), None
    if not known:
        return None, None
    curve: float | str = SRGB_CURVE
    chromaticities: tuple[float, ...] = BT709
    if len(known.get(b"gAMA", b"")) == 4 and any(known[b"gAMA"]):
        curve = 100_000 / int.from_bytes(known[b"gAMA"], "big")
    if len(known.get(b"cHRM", b"")) == 32:
        chromaticities = tuple(value / 100_000 for value in struct.unpack(">8I", known[b"cHRM"]))
    return Space(chromaticities, curve), None


def _box_codes(image: Image.Image, data: bytes) -> tuple[int, int] | None:
    """Primaries and transfer of an AVIF or HEIF file (ISO 14496-12, 12.1.5), unless it leaves them open."""
    at = data.find(b"colrnclx", 0, 1 << 16) + 8
    if image.format not in ("AVIF", "HEIF") or at < 8 or at + 4 > len(data):
        return None
    codes = struct.unpack_from(">HH", data, at)
    return None if codes == (UNSPECIFIED, UNSPECIFIED) else codes


def _exif_space(exif: bytes | None, tiff: bytes, page: int) -> tuple[Space | None, str]:
    """By EXIF's colour space, or by the primaries of EXIF or a TIFF page."""
    note = ""
    for block, at in (exif or b"", 0), (tiff, page):
        if not block:
            continue
        fields, _ = exif_block.directory(block, at or exif_block.first(block))
        white, primaries = (exif_block.numbers(block, fields.get(tag)) for tag in (0x013E, 0x013F))
        if block is exif:
            details = exif_block.sub_directory(block, fields, exif_block.EXIF)
            kind = exif_block.number(block, details, 0xA001)
            interop = exif_block.sub_directory(block, details, exif_block.INTEROP).get(1)
            if kind == 2 or (kind == 0xFFFF and interop and interop.data.startswith(b"R03")):
                return Space(ADOBE_RGB, ADOBE_GAMMA), ""
            if kind == 0xFFFF:
                note = "EXIF says that its colours are not sRGB and nothing says what they are: taken as sRGB"
            elif kind == 1:
                return None, ""
        if len(white) == 2 and len(primaries) == 6:
            return Space((*white, *primaries), _transfer(block, fields)), ""
    return None, note


def _transfer(block: bytes, fields: exif_block.Directory) -> float | list[list[int]]:
    """TIFF's TransferFunction, or what it is by default."""
    table = [int(value) for value in exif_block.numbers(block, fields.get(0x012D))]
    if len(table) in (256, 768):
        return [table[len(table) // 3 * k :][:256] if len(table) == 768 else table for k in range(3)]
    return 2.2


# --- what is lost ---


def losses(image: Image.Image, data: bytes) -> list[str]:
    """Notes on what a file holds and a picture does not; after loading."""
    notes = []
    if image.format in ("ICO", "ICNS", "CUR") and len(image.info.get("sizes", ())) > 1:
        notes.append(f"only the largest of {len(image.info['sizes'])} icons was read")
    if image.format == "PCD":
        notes.append("of a Photo CD file only the picture of 768 x 512 was read: it may hold larger ones")
    if image.format == "TIFF" and 0 in (extra := _extra_samples(image)):
        notes.append(f"{len(extra)} channels of no stated meaning were left out" if extra[1:] else _EXTRA)
    if comment := image.info.get("comment"):
        text = comment.decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)
        if not text.startswith("Created by OpenJPEG"):  # in all of its files
            notes.append(f"a comment was left out: {text if len(text) <= 60 else text[:57] + '...'!r}")
    if keys := _png_text(data):
        notes.append(f"text was left out: {', '.join(keys)}")
    if _has_iptc(image):
        notes.append("IPTC data was left out")
    rest = data[_end(image, data) :]
    if rest.strip(b"\0\r\n "):
        notes.append(f"{len(rest):,} bytes behind the picture's end were left out, such as the video of a motion photo")
    return notes


_EXTRA = "a channel of no stated meaning was left out"


def _extra_samples(image: Image.Image) -> tuple[int, ...]:
    extra = getattr(image, "tag_v2", {}).get(0x0152, ())
    return extra if isinstance(extra, tuple) else (extra,)


def _png_text(data: bytes) -> list[str]:
    known = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type xmp")
    texts = (content for kind, content, _ in png_chunks(data) if kind in (b"tEXt", b"zTXt", b"iTXt"))
    keys = (content.partition(b"\0")[0] for content in texts)
    return list(dict.fromkeys(key.decode("latin-1") for key in keys if key not in known))


def _has_iptc(image: Image.Image) -> bool:
    resources = image.info.get("photoshop")
    if isinstance(resources, dict) and resources.get(0x0404):
        return True
    if image.format == "PSD":
        return any(code == 0x0404 and data for code, _, data in getattr(image, "resources", ()))
    tags = getattr(image, "tag_v2", {})
    return 0x83BB in tags or b"8BIM\x04\x04" in _raw(tags.get(0x8649))


def _raw(value: Any) -> bytes:
    """Of a TIFF tag that Pillow gives as bytes, or as bytes in a tuple."""
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, bytes) else b""


def _end(image: Image.Image, data: bytes) -> int:
    """Where the picture ends, in formats of which more may follow unnoticed."""
    if image.format == "JPEG":
        return _jpeg_end(data)[0]
    if image.format == "MPO":
        entries = (getattr(image, "mpinfo", None) or {}).get(0xB002, ())
        base = data.find(b"MPF\0") + 4  # offsets count from here, but for the first picture's
        return max((e["Size"] + (base + e["DataOffset"] if e["DataOffset"] else 0) for e in entries), default=len(data))
    if image.format == "WEBP":
        return 8 + int.from_bytes(data[4:8], "little")
    if image.format == "PNG":
        return max((end for kind, _, (_, end) in png_chunks(data) if kind == b"IEND"), default=len(data))
    return len(data)


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # neither filling nor within the data of a scan


def _jpeg_end(data: bytes) -> tuple[int, bool]:
    """Behind the first end mark that is one, those of thumbnails being inside segments, or else behind the last thing
    that is complete; and whether there is an end mark."""
    at = 2
    while found := _MARKER.search(data, at):
        at = found.end()
        if data[at - 1] == 0xD9:
            return at, True
        at += max(int.from_bytes(data[at : at + 2], "big"), 2)
        if at > len(data):
            return found.start(), False
    return len(data), False


# --- extended XMP ---

_EXTENSION = b"http://ns.adobe.com/xmp/extension/\0"


def joined_xmp(image: Image.Image, xmp: bytes | None, notes: list[str]) -> bytes | None:
    """XMP of a JPEG file with its extension (XMP specification part 3, 1.1.3.1), which takes what is over 64 kB."""
    parts: dict[bytes, dict[int, bytes]] = {}
    for _, segment in getattr(image, "applist", ()):
        if segment.startswith(_EXTENSION) and len(segment) > len(_EXTENSION) + 40:
            guid, (_, at) = segment[len(_EXTENSION) :][:32], struct.unpack_from(">II", segment, len(_EXTENSION) + 32)
            parts.setdefault(guid, {})[at] = segment[len(_EXTENSION) + 40 :]
    wanted = re.search(rb"HasExtendedXMP\s*(?:=\s*[\"']|>)\s*([0-9A-Fa-f]{32})", xmp or b"")
    found = parts.get(wanted[1]) if wanted else None
    if not parts:
        return xmp
    extension = b"".join(found[at] for at in sorted(found)) if found else b""
    joined = _merged(xmp or b"", extension)
    if joined is None:
        size = sum(len(part) for guid in parts.values() for part in guid.values())
        notes.append(f"extended XMP of {size:,} bytes does not fit the other XMP and was left out")
    return joined or xmp


def _merged(xmp: bytes, extension: bytes) -> bytes | None:
    """The descriptions of one packet put behind those of another; None if that gives no XML. As text: a parser would
    write it with other prefixes, by which simple readers know what they look for."""
    from xml.parsers.expat import ExpatError, ParserCreate

    inner = re.search(rb"<rdf:RDF(\s[^>]*)?>(.*)</rdf:RDF>", extension, re.DOTALL)
    head, close, tail = xmp.rpartition(b"</rdf:RDF>")
    if not inner or not close:
        return None
    head = re.sub(rb"""\s[\w.-]+:HasExtendedXMP\s*=\s*(["']).*?\1""", b"", head)
    head = re.sub(rb"<([\w.-]+:HasExtendedXMP)>.*?</\1>", b"", head, flags=re.DOTALL)
    joined = head + inner[2] + close + tail
    try:
        ParserCreate(namespace_separator=" ").Parse(joined.strip(b"\0"), True)
    except ExpatError:
        return None
    return joined


MOST_XMP = 65_504  # bytes of a packet in a JPEG file
_MOST_EXTENSION = 65_400  # bytes of a part
_HOLDER = b"""<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>\
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\
<rdf:Description rdf:about="" xmlns:xmpNote="http://ns.adobe.com/xmp/note/" xmpNote:HasExtendedXMP="%b"%b/>\
</rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""


def extended_xmp(xmp: bytes) -> tuple[bytes, bytes]:
    """The inverse of `joined_xmp` for XMP above `MOST_XMP`: a packet that names the extension, and says what programs
    without an idea of that need, the orientation; and the segments with the extension.

    Errors: ValueError if the XMP would not come back.
    """
    extension = re.sub(rb"<\?xpacket.*?\?>", b"", xmp, flags=re.DOTALL).strip(b"\0 \r\n\t")
    guid = hashlib.md5(extension, usedforsecurity=False).hexdigest().upper().encode()
    turn = re.search(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])", xmp)
    upright = b' xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%b"' % turn[1] if turn else b""
    packet = _HOLDER % (guid, upright)
    if _merged(packet, extension) is None:
        raise ValueError("it is no RDF in XML")
    segments = []
    for at in range(0, len(extension), _MOST_EXTENSION):
        content = _EXTENSION + guid + struct.pack(">II", len(extension), at) + extension[at : at + _MOST_EXTENSION]
        segments.append(b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content)
    return packet, b"".join(segments)


# --- PNG ---

MOST_TEXT = 1 << 26  # bytes of all compressed chunks of a file together


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, tuple[int, int]]]:
    """Name, content and place of each chunk but those with pixels, whose content is left out; ends where they end."""
    at = len(PNG_MAGIC)
    while data.startswith(PNG_MAGIC) and at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        yield kind, b"" if kind in (b"IDAT", b"fdAT") else data[at + 8 : end - 4], (at, end)
        at = end if kind != b"IEND" else len(data)


def lightened(data: bytes, notes: list[str]) -> tuple[bytes, dict[str, Any]]:
    """A PNG file without the compressed chunks that are too large for Pillow, which refuses them as an attack, and
    what they hold, as it stands in an image's `info`."""
    info: dict[str, Any] = {}
    without: list[tuple[int, int]] = []
    left = MOST_TEXT
    for kind, content, (start, end) in png_chunks(data):
        packed = _packed(kind, content)
        if packed is None or zlib.crc32(data[start + 4 : end - 4]).to_bytes(4, "big") != data[end - 4 : end]:
            continue
        key, text = packed[0].decode("latin-1"), b""
        unpacker = zlib.decompressobj()
        try:
            text = unpacker.decompress(packed[1], left)
        except zlib.error:
            continue  # Pillow's matter
        left -= len(text)
        if unpacker.unconsumed_tail:
            notes.append(f"{kind.decode()} of more than {MOST_TEXT >> 20} MB was left out: {key}")
        elif len(text) <= PngImagePlugin.MAX_TEXT_CHUNK:
            continue
        elif kind == b"iCCP":
            info["icc_profile"] = text
        elif key == "XML:com.adobe.xmp":
            info["xmp"] = text
        elif key == "Raw profile type exif":
            info[key] = text.decode("latin-1")
        without.append((start, end))
    kept, at = [], 0
    for start, end in without:
        kept.append(data[at:start])
        at = end
    return (b"".join([*kept, data[at:]]) if without else data), info


def _packed(kind: bytes, content: bytes) -> tuple[bytes, bytes] | None:
    """Keyword and compressed content."""
    key, _, rest = content.partition(b"\0")
    if kind in (b"iCCP", b"zTXt"):
        return key, rest[1:]
    if kind == b"iTXt" and rest[:1] == b"\1":
        return key, rest[2:].split(b"\0", 2)[-1]
    return None


# --- truncated ---

COMPLETABLE = (b"\xff\xd8", PNG_MAGIC)


def completed(data: bytes) -> bytes | None:
    """A JPEG or PNG file whose end is missing, with an end, so that what is there can be seen; None for others.

    What is missing of a JPEG is grey, of a PNG black, or transparent if it can be.
    """
    if data.startswith(b"\xff\xd8"):
        end, complete = _jpeg_end(data)
        return None if complete else data[:end] + b"\xff\xd9"
    chunks = list(png_chunks(data))
    first = next((start for kind, _, (start, _) in chunks if kind == b"IDAT"), 0)
    if not first or chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        return None
    packed = b"".join(data[start + 8 : min(end - 4, len(data))] for kind, _, (start, end) in chunks if kind == b"IDAT")
    width, height, bits, colour = struct.unpack(">IIBB", chunks[0][1][:10])
    row = 1 + (width * bits * (1, 1, 3, 1, 2, 1, 4)[min(colour, 6)] + 7) // 8
    size = row * height + (8 * row + 8 * height if chunks[0][1][12] else 0)  # interlaced: seven small pictures
    raw = zlib.decompressobj().decompress(packed, size).ljust(size, b"\0")
    body = b"IDAT" + zlib.compress(raw, 1)
    pixels = struct.pack(">I", len(body) - 4) + body + zlib.crc32(body).to_bytes(4, "big")
    return data[:first] + pixels + b"\0\0\0\0IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")
