"""Image files <-> `Picture`: 8-bit pixels, alpha, metadata, and a note on whatever was lost.

Kept: size, grey or colour, alpha, ICC profile, XMP, EXIF (orientation included, which is not applied), resolution (in
EXIF), and colours that the file declares otherwise (as an ICC profile).
Lost with a note: what 8 bits of grey or RGB cannot hold, such as deeper samples, CMYK and further frames, and other
metadata, such as comments, text chunks, IPTC and what follows the picture in its file.
"""

import contextlib
import errno
import os
import struct
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from bitstream.container import DEFAULT_MAX_PIXELS, NO_LIMIT, ColourMode, over_limit
from bitstream.errors import DamagedError, ImageError, TruncatedError
from vqcodec import colour as colours
from vqcodec import exif as exif_block
from vqcodec import source
from vqcodec import xmp as xmp_packet
from vqcodec.formats import PLUGINS, plugged

Bytes = NDArray[np.uint8]
Rgb = tuple[int, int, int]
Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO  # of a file: where it is, or what is in it


@dataclass
class Picture:
    """An image in memory.

    pixels: (H, W, 3) RGB; three equal channels if `colour` is grey.
    colour: one of the first four modes, whether or not RGB planes are equal.
    alpha: (H, W), or None if `colour` has no alpha.
    exif: from its TIFF header ("II*" or "MM") on, without the "Exif" prefix of JPEG.
    notes: a sentence for each thing that the source had and this picture has not.
    """

    pixels: Bytes
    colour: ColourMode
    alpha: Bytes | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    notes: list[str] = field(default_factory=list)


# --- in ---


def read(file: Source, max_pixels: int = DEFAULT_MAX_PIXELS, *, lenient: bool = False) -> Picture:
    """The picture in a file of any format that Pillow reads: a path, the file's bytes, or an open file.

    lenient: read what is there of a truncated JPEG or PNG file, with a note.
    Errors: ImageError if it is not an image, empty, truncated, damaged, a raw photograph, or larger than `max_pixels`
    allow, for a .vq2 file and for this (bitstream/container.py, section 1; checked before anything is decoded, except
    in icons: Pillow decodes them on opening, within a limit of its own).
    OSError, as it comes, if the file cannot be read.
    """
    data = contents(file)
    if not data:
        raise ImageError("the file is empty: it has no image in it")
    try:
        return _read(data, max_pixels)
    except TruncatedError as error:
        if not lenient:
            hint = ": --lenient takes what is there" if data.startswith(source.COMPLETABLE) else ""
            raise ImageError(f"{error}{hint}") from error
        try:
            completed = source.completed(data)
        except zlib.error:  # not only truncated
            completed = None
        if completed is None:
            raise
        picture = _read(completed, max_pixels)
        picture.notes.append("the file is truncated or damaged: what is missing of the picture is grey, black or clear")
        return picture


def contents(file: Source) -> bytes:
    """All bytes of a path, an open file, from its beginning if it can go there, or what is bytes already."""
    if isinstance(file, (bytes, bytearray, memoryview)):
        return bytes(file)
    if isinstance(file, (str, os.PathLike)):
        return Path(file).read_bytes()
    if file.seekable():
        file.seek(0)
    return file.read()


def _read(data: bytes, max_pixels: int) -> Picture:
    notes: list[str] = []
    source.refuse_other_kinds(data)
    light, info = source.lightened(data, notes)
    with _decoding():
        image = open_image(BytesIO(light))
        image.info.update(info)
    _check_size(image, max_pixels)
    picture = _from_file(image, data, max_pixels)
    picture.notes[:0] = notes
    return picture


def _check_size(image: Image.Image, max_pixels: int) -> None:
    excess = over_limit(*image.size, max_pixels)
    if excess:
        raise ImageError(f"{excess}: raise it (--max-pixels, or max_pixels of vqcodec.image.read)")


# Pillow says what these are, and has no decoder for them.
_WITHOUT_DECODER = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


def endings() -> set[str]:
    """Endings of the formats that are read here, lower case, with their dots; .vq2 is none, it is encoded already."""
    Image.init()  # knows all formats; before, only those that somebody has used
    for format in PLUGINS:
        plugged(format)
    readable = Image.OPEN.keys() - _WITHOUT_DECODER - {"VQ2"}
    return {ending for ending, format in Image.registered_extensions().items() if format in readable}


# What training and benchmarks take from a folder: pictures, not the documents and films that Pillow reads, too.
_IMAGES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_images(folder: Path) -> list[Path]:
    """The pictures directly in a folder, by name. Raises FileNotFoundError if there are none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)
    if not found:
        raise FileNotFoundError(f"{folder}: no images directly in this folder ({' '.join(_IMAGES)})")
    return found


def from_pil(image: Image.Image) -> Picture:
    """A Pillow image of any mode, loaded here if it is not yet. `image` keeps its pixels and mode.

    Errors: ImageError if its data is damaged, its mode unknown, or it is but the thumbnail of a raw photograph.
    """
    if 0 in image.size:
        raise ImageError(f"the image has {image.width} x {image.height} pixels: there is nothing to encode")
    return _from_file(image, _file_of(image), NO_LIMIT)


def _from_file(image: Image.Image, data: bytes, max_pixels: int) -> Picture:
    """`from_pil` of an image from a file of which these are the bytes, or nothing if there is none."""
    notes: list[str] = []
    with _decoding(TruncatedError):
        frames = getattr(image, "n_frames", 1) if image.format != "PSD" else 1  # PSD: layers of one picture
        if image.format == "TIFF" and data.startswith(source.TIFF_MAGIC):
            source.refuse_other_kinds(data)
            page, chained = source.full_page(data)
            frames = chained or frames
            if image.tell() == 0 and page:
                image.seek(page)
                _check_size(image, max_pixels)
        depth, key = source.depth(image, data), source.transparent_grey(image)  # loading hides them
        image.load()
        if frames > 1:
            notes.append(f"only frame {image.tell() + 1} of {frames} was read")
        if depth > 8:
            notes.append(f"{depth}-bit samples were reduced to 8 bits")
        icc = _bytes(image.info.get("icc_profile")) or source.icc(image, data)
        if icc is None and "icc_profile" in image.info:
            notes.append("the ICC profile is damaged and was dropped")
        exif = _exif(image, data, notes)
        xmp = source.joined_xmp(image, _bytes(image.info.get("xmp")), notes)
        notes += source.losses(image, data)
        if icc is None and image.mode != "CMYK":
            icc = _declared_icc(image, data, exif, notes)
        if image.mode == "CMYK":
            image, icc = _from_cmyk(image, icc, notes), None
        if key is not None:
            image = image.copy()
            image.info["transparency"] = key
        picture = _from_bands(np.array(_plain(image, depth == 16, notes)))
    if depth == 16:
        notes += _faint(int(picture.pixels.max()) * 257, 65535)
    icc = _matching(icc, picture.colour, notes)
    return replace(picture, icc=icc, exif=exif, xmp=xmp, notes=notes)


def _file_of(image: Image.Image) -> bytes:
    """The file behind an image that is not loaded yet; nothing behind others."""
    file = getattr(image, "fp", None)
    if not getattr(image, "tile", None) or file is None or file.closed:
        return b""
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    return bytes(data)


def from_array(array: NDArray[Any]) -> Picture:
    """(H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA, all uint8. May share memory with `array`.

    Errors: ImageError for any other shape or type.
    """
    array = np.asarray(array)
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shape_fits or 0 in array.shape:
        raise ImageError(
            f"an array of shape {array.shape} and type {array.dtype} is not an image: "
            "it must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4)"
        )
    return _from_bands(array)


def picture_of(image: "Image.Image | ArrayLike | Picture | Source") -> Picture:
    """Whatever may be meant by an image: one of Pillow, an array, a picture file, or a Picture, which stays the same.

    Errors: as in `from_pil`, `from_array` and `read`.
    """
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        return from_pil(image)
    if isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(image, "read"):
        return read(image)  # type: ignore[arg-type]
    return from_array(np.asarray(image))


def _from_bands(bands: Bytes) -> Picture:
    """(H, W) or (H, W, C): grey, grey and alpha, RGB, or RGB and alpha."""
    bands = bands.reshape(*bands.shape[:2], -1)
    channels = bands.shape[2]
    colour = (ColourMode.GREY, ColourMode.GREY_ALPHA, ColourMode.RGB, ColourMode.RGBA)[channels - 1]
    pixels = bands[..., :3] if colour.has_hue else np.repeat(bands[..., :1], 3, axis=2)
    alpha = np.ascontiguousarray(bands[..., -1]) if colour.has_alpha else None
    return Picture(np.ascontiguousarray(pixels), colour, alpha)


def open_image(file: BinaryIO, formats: Collection[str] | None = None) -> Image.Image:
    """`Image.open` without its limit of pixels, which is lower than ours and a global, other threads' as well: check
    the size next. Some formats keep it: TIFF on loading, WebP and icons on opening.

    formats: names of those that it may have; by default all.
    """
    prefix, reason = file.read(16), "not an image, or not in a format that Pillow reads"
    for load in (Image.preinit, Image.init):  # the most frequent formats, then all
        load()
        for format in formats or Image.ID:
            factory, accept = Image.OPEN.get(format, (None, None))
            accepted = False
            try:
                accepted = accept is not None and accept(prefix) is True
                if factory and (accepted or accept is None):
                    file.seek(0)
                    return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error) as error:  # not this format: Pillow's convention
                if accepted:
                    reason = f"it begins like {format} and is damaged, or of a kind that cannot be read ({error})"
    raise UnidentifiedImageError(reason)


@contextlib.contextmanager
def _decoding(kind: type[ImageError] = ImageError) -> Iterator[None]:
    """Turns what Pillow's decoders raise into ImageError, or a kind of it.

    Broken data makes them raise nearly anything (SyntaxError, struct.error, IndexError...), so only what is
    surely something else passes: a full memory, and what the file system reports.
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(str(error)) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large for Pillow in this format, save it as PNG ({error})") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a bad seek
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"the image cannot be decoded, it is truncated or damaged ({reason})") from error


# --- modes ---


def _plain(image: Image.Image, deep: bool, notes: list[str]) -> Image.Image:
    """The image in mode L, LA, RGB or RGBA. deep: its RGB samples had 16 bits before Pillow cut them."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _reduced(image, notes)
    if image.mode in ("YCbCr", "LAB", "HSV"):
        notes.append(f"{image.mode} was converted to RGB")
        image = image.convert("RGB")
    elif image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"):
        raise ImageError(f"colour mode {image.mode} is not supported: convert the image to RGB first")
    elif deep and image.mode == "RGB" and "transparency" in image.info:
        image = image.copy()  # the transparent colour has 16 bits still, and would match no pixel
        image.info["transparency"] = tuple(sample >> 8 for sample in image.info["transparency"])
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        mode += "A"
    return image if image.mode == mode else image.convert(mode)


def _reduced(image: Image.Image, notes: list[str]) -> Image.Image:
    """Grey of more than 8 bits as L, or as LA if one of its values means transparent."""
    samples = np.asarray(image)
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else np.where(samples == transparent, 0, 255).astype(np.uint8)
    declared, inverted = source.grey_range(image)
    top = float(np.max(samples, initial=0, where=np.isfinite(samples)))
    white = declared or 65535
    if samples.dtype.itemsize == 2 or declared:
        bits = 16 if white == 32767 else white.bit_length()
        notes += [f"{bits}-bit samples were reduced to 8 bits", *_faint(int(top), white)]
    else:
        if image.mode == "F":  # floats have no customary white, so the samples decide
            white = next((limit for limit in (1, 255) if top <= limit), white)
        note = f"32-bit samples were reduced to 8 bits: 0 or less is black, {white} or more is white"
        notes.append(f"{note}, and the brightest is {top:g}" if white == 65535 and _faint(int(top), white) else note)
    if white != 65535 or samples.dtype.itemsize != 2:
        samples = np.rint(np.nan_to_num(samples) * (65535 / white))
        samples = np.clip(samples, 0, 65535).astype(np.uint16)
    rounded = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # x * 255 / 65535
    grey = Image.fromarray(rounded[::-1][samples] if inverted else rounded[samples])
    if alpha is not None:
        grey.putalpha(Image.fromarray(alpha))
    return grey


def _faint(top: int, white: int) -> list[str]:
    """A note if the brightest sample is so dark that the samples may have fewer bits than is said."""
    if not 0 < top <= white / 4:
        return []
    return [f"the brightest sample is {top} of {white}: if that is white, multiply the samples first"]


def _from_cmyk(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    if icc:
        try:
            rgb = _to_srgb(image, icc)
            notes.append("CMYK was converted to sRGB through its ICC profile, which was then dropped")
            return rgb
        except ImageCms.PyCMSError:
            notes.append("the ICC profile cannot be used and was dropped")
    notes.append("CMYK was converted to RGB without an ICC profile: colours are approximate")
    return image.convert("RGB")


# --- metadata ---


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what undoes it


Strip = bool | Literal["gps", "keep-icc"]


def stripped(picture: Picture, what: Strip = True) -> Picture:
    """The picture without metadata, looking as before. May share memory with `picture`.

    what: True for ICC, EXIF and XMP; "keep-icc" for EXIF and XMP; "gps" for the location in EXIF and XMP alone; False
    for nothing.
    What the metadata said about looks is carried out first: the orientation turns the pixels, and colours of
    another space than sRGB are converted to sRGB (with a note), unless the profile stays.
    """
    if what is False:
        return picture
    if what == "gps":
        return _without_location(picture)
    if what is True:
        picture = in_srgb(picture)
    turn = _UPRIGHT.get(orientation(picture))

    def upright(array: Bytes) -> Bytes:
        return array if turn is None else np.array(Image.fromarray(array).transpose(turn))

    alpha = None if picture.alpha is None else upright(picture.alpha)
    return Picture(upright(picture.pixels), picture.colour, alpha, picture.icc, notes=list(picture.notes))


def _without_location(picture: Picture) -> Picture:
    exif, notes = picture.exif, list(picture.notes)
    try:
        exif = exif and exif_block.without_gps(exif)
    except ValueError:
        picture = stripped(picture, "keep-icc")
        return replace(picture, notes=[*notes, "the EXIF data is damaged: nothing but the ICC profile was kept"])
    return replace(picture, exif=exif, xmp=picture.xmp and xmp_packet.without_gps(picture.xmp), notes=notes)


def orientation(picture: Picture) -> int:
    """As EXIF says, or else XMP, or else 1: upright."""
    carrier = Image.new("1", (1, 1))
    carrier.info.update(info_of(picture))
    try:
        return carrier.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF raises nearly anything, and says nothing about orientation
        return 1


def in_srgb(picture: Picture) -> Picture:
    """The picture with its ICC profile applied and dropped; the same pixels if the profile is sRGB anyway."""
    if picture.icc is None:
        return picture
    grey = not picture.colour.has_hue
    image = Image.fromarray(picture.pixels[..., 0] if grey else picture.pixels)
    try:
        pixels = np.array(_to_srgb(image, picture.icc))
    except ImageCms.PyCMSError:
        notes = [*picture.notes, "the ICC profile cannot be used and was dropped"]
        return replace(picture, icc=None, notes=notes)
    if grey:
        pixels = np.repeat(pixels[..., 1:2], 3, axis=2)
    if np.max(np.maximum(pixels, picture.pixels) - np.minimum(pixels, picture.pixels)) <= 1:
        return replace(picture, icc=None)
    notes = [*picture.notes, "colours were converted from the ICC profile to sRGB"]
    return replace(picture, pixels=pixels, icc=None, notes=notes)


def _to_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """Mode L, RGB or CMYK -> RGB. Raises PyCMSError for a broken profile or one of another colour space."""
    converted = ImageCms.profileToProfile(
        image,
        BytesIO(icc),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None  # it is None only when converting in place
    return converted


MOST_WEBP = 16_383  # pixels a side of a WebP file
MOST_ICC = 255 * 65_519  # bytes: what a JPEG file can hold, and more than any device's


def _matching(icc: bytes | None, colour: ColourMode, notes: list[str]) -> bytes | None:
    """The ICC profile, if it is one for these pixels."""
    wanted = b"RGB " if colour.has_hue else b"GRAY"
    icc = bounded_icc(icc, notes)
    if icc is None or (icc[16:20] == wanted and icc[36:40] == b"acsp"):  # colour space, signature
        return icc
    notes.append(f"the ICC profile is not one for {'RGB' if colour.has_hue else 'grey'} and was dropped")
    return None


def bounded_icc(icc: bytes | None, notes: list[str]) -> bytes | None:
    """The ICC profile, unless it is so large that it keeps other programs busy for minutes."""
    if icc is None or len(icc) <= MOST_ICC:
        return icc
    notes.append(f"the ICC profile has {len(icc):,} bytes, the limit is {MOST_ICC:,}: it was dropped")
    return None


def _declared_icc(image: Image.Image, data: bytes, exif: bytes | None, notes: list[str]) -> bytes | None:
    """An ICC profile of what a file without one says of its colours; None for sRGB."""
    space, note = source.space(image, data, exif)
    grey = image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
    notes += filter(None, [note])
    if space is None or (grey and space._replace(chromaticities=colours.BT709).is_srgb()):
        return None
    try:
        return colours.profile(space, grey)
    except ValueError as error:
        notes.append(f"the colours that the file declares are impossible ({error}): taken as sRGB")
        return None


def _bytes(metadata: Any) -> bytes | None:
    """None for nothing, and for what a TIFF tag of a wrong type gives."""
    if isinstance(metadata, str):
        metadata = metadata.encode()
    return metadata if metadata and isinstance(metadata, bytes) else None


EXIF_PREFIX = b"Exif\0\0"


def _exif(image: Image.Image, data: bytes, notes: list[str]) -> bytes | None:
    """The EXIF block of a loaded image, with the resolution that the file says elsewhere.

    A TIFF file has none: its descriptive tags are made into one.
    """
    exif = image.info.get("exif")
    try:
        if exif is None and data.startswith(source.TIFF_MAGIC) and hasattr(image, "tag_v2"):
            return exif_block.from_tiff(data, image.tag_v2.offset)
        if exif is None and (hasattr(image, "tag_v2") or "Raw profile type exif" in image.info):
            exif = image.getexif().tobytes().removeprefix(EXIF_PREFIX)
            if hasattr(image, "tag_v2"):
                exif = exif_block.from_tiff(exif, exif_block.first(exif))
    except Exception:
        exif = b"broken"
    return with_resolution(checked_exif(exif, notes), image.info)


def checked_exif(exif: bytes | None, notes: list[str]) -> bytes | None:
    """An EXIF block from its TIFF header on, or None, with a note if it is none."""
    while exif and exif.startswith(EXIF_PREFIX):  # some writers put it twice
        exif = exif[len(EXIF_PREFIX) :]
    if not exif:
        return None
    if exif.startswith(exif_block.MAGIC):
        return exif
    notes.append("the EXIF data is damaged and was dropped")
    return None


def with_resolution(exif: bytes | None, info: dict[Any, Any]) -> bytes | None:
    """EXIF with the resolution, or the shape of pixels, that Pillow found in a file, unless it is one that says
    nothing."""
    unit = 2 if "dpi" in info else 1
    found = info.get("dpi") or info.get("aspect") or (info.get("jfif_unit") == 0 and info.get("jfif_density"))
    try:
        x, y = map(float, found or (1, 1))
        if exif_block.customary(x, y) or (unit == 1 and x == y) or not (0 < x < 1e5 and 0 < y < 1e5):
            return exif
        return exif_block.with_resolution(exif, round(x, 3), round(y, 3), unit)
    except (TypeError, ValueError):  # no numbers, or EXIF that is broken: what it is worth otherwise stays
        return exif


def with_metadata(picture: Picture, given: Mapping[str, Any]) -> Picture:
    """With metadata instead of its own: ``icc_profile``, ``exif`` and ``xmp``, each None for none. What is no such
    thing is dropped with a note."""
    notes = list(picture.notes)
    icc, exif, xmp = (_bytes(given.get(name)) for name in ("icc_profile", "exif", "xmp"))
    return replace(
        picture,
        icc=_matching(icc, picture.colour, notes) if "icc_profile" in given else picture.icc,
        exif=checked_exif(exif, notes) if "exif" in given else picture.exif,
        xmp=xmp if "xmp" in given else picture.xmp,
        notes=notes,
    )


def told(image: "Image.Image | ArrayLike | Picture | Source", strip: "Strip") -> Picture:
    """The image as a picture without what `strip` names, and what it has lost as warnings to who calls the caller: a
    Picture's own notes are known already."""
    picture = picture_of(image)
    known = len(picture.notes) if picture is image else 0
    picture = stripped(picture, strip)
    warn(picture.notes[known:], stacklevel=4)
    return picture


def warn(notes: Sequence[str], stacklevel: int) -> None:
    """stacklevel: 2 is who calls this function; it should be who calls this package."""
    for note in notes:
        warnings.warn(note, stacklevel=stacklevel)


# --- out ---


def to_pil(picture: Picture) -> Image.Image:
    """A Pillow image of mode L, LA, RGB or RGBA, with icc_profile, exif and xmp in its `info`."""
    image = Image.fromarray(picture.pixels if picture.colour.has_hue else picture.pixels[..., 0])
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    image.info.update(info_of(picture))
    return image


def info_of(picture: Picture) -> dict[str, bytes]:
    """The metadata under Pillow's names; only what is there."""
    exif = picture.exif and EXIF_PREFIX + picture.exif
    info = {"icc_profile": picture.icc, "exif": exif, "xmp": picture.xmp}
    return {key: value for key, value in info.items() if value}


# --- alpha ---


def pack_alpha(alpha: Bytes) -> bytes:
    """(H, W) as a PNG file of 8-bit grey, losslessly."""
    packed = BytesIO()
    Image.fromarray(alpha).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def unpack_alpha(data: bytes, width: int, height: int) -> Bytes:
    """The inverse of `pack_alpha`: (height, width).

    Errors: DamagedError unless `data` is a PNG file as bitstream/container.py, section 3, has it, which is checked
    before Pillow sees it: Pillow takes more for a PNG file, and with `LOAD_TRUNCATED_IMAGES` half of one.
    """
    wanted = f"a PNG file of {width} x {height} pixels in 8-bit grey"
    problem = _alpha_problem(data, width, height)
    if problem:
        raise DamagedError(f"the alpha plane is not {wanted} ({problem}): the file is damaged")
    try:
        image = open_image(BytesIO(data), ["PNG"])
        if (image.size, image.mode) != ((width, height), "L"):
            raise ValueError(f"{image.width} x {image.height} pixels of mode {image.mode}, not {wanted}")
        return np.array(image)
    except MemoryError:
        raise
    except Exception as error:
        raise DamagedError(f"the alpha plane cannot be decoded ({error}): the file is damaged") from error


def _alpha_problem(data: bytes, width: int, height: int) -> str:
    """What is wrong with an alpha plane, nothing if it is as specified. Inflates no more than such a plane has."""
    if not data.startswith(source.PNG_MAGIC):
        return "it starts differently"
    kinds, contents, at = [], [], len(source.PNG_MAGIC)
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if data[end : end + 4] != zlib.crc32(data[at + 4 : end]).to_bytes(4, "big"):
            return f"the CRC of its chunk at byte {at} is wrong, or cut off"
        kinds.append(data[at + 4 : at + 8])
        contents.append(data[at + 8 : end])
        at = end + 4
    if len(kinds) < 3 or kinds != [b"IHDR", *[b"IDAT"] * (len(kinds) - 2), b"IEND"] or contents[-1]:
        return f"its {len(kinds)} chunks are not IHDR, IDAT and IEND alone"
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    if contents[0] != header:
        return f"its header is {contents[0][:13].hex()}, not {header.hex()}"
    size, inflate = height * (width + 1), zlib.decompressobj()
    try:
        rows = inflate.decompress(b"".join(contents[1:-1]), size + 1)
    except zlib.error as error:
        return str(error)
    if len(rows) != size or not inflate.eof or inflate.unused_data:
        return f"its data is not {size} bytes and nothing else"
    return "it has a filter type above 4" if max(rows[:: width + 1]) > 4 else ""
