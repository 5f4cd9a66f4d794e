"""Pillow reads and writes .vq2 files once this module is imported.

>>> import vqcodec.pillow
>>> image = Image.open("photo.vq2")          # size, mode and metadata; the model is not loaded yet
>>> image.load()                             # now it is
>>> image.save("small.vq2", quality=3)

Opening checks structure and metadata, loading the pixels. Both raise OSError for a bad file, as Pillow's own plugins
do. With ``ImageFile.LOAD_TRUNCATED_IMAGES`` a truncated file opens as its preview, without alpha, metadata and
areas of one colour.

``image.draft(None, size)``, which ``Image.thumbnail`` calls, makes the image a quarter as large, from the preview
alone, if that is not smaller than the size.

Options of ``save``: quality, tune, effort and strip, as in ``vqcodec.encode``; icc_profile, exif and xmp, as in
Pillow's other formats, instead of the image's own, None for none. What the format cannot hold is a warning.
"""

import warnings
from collections.abc import Sequence
from typing import IO, Any

from PIL import Image, ImageFile

import vqcodec
from bitstream import container
from bitstream.container import ColourMode
from bitstream.errors import BitstreamError, DamagedError
from vqcodec.config import DEFAULT_EFFORT, DEFAULT_QUALITY, DEFAULT_TUNE
from vqcodec.image import EXIF_PREFIX, bounded_icc, checked_exif, from_pil, to_pil, with_metadata

MODES = {ColourMode.GREY: "L", ColourMode.RGB: "RGB", ColourMode.GREY_ALPHA: "LA", ColourMode.RGBA: "RGBA"}
DRAFT = 4  # a preview holds about this fraction of the detail


class Vq2ImageFile(ImageFile.ImageFile):
    format = "VQ2"
    format_description = "vqcodec image"
    _drafted = False
    _told: Sequence[str] = ()

    def _open(self) -> None:
        assert self.fp is not None
        data, preview = self.fp.read(), False
        notes: list[str] = []
        try:
            try:
                parts = container.unpack(data, max_pixels=container.NO_LIMIT)
                header = parts.header
            except DamagedError:
                if not ImageFile.LOAD_TRUNCATED_IMAGES:
                    raise
                header, _ = container.unpack_coarsest(data, max_pixels=container.NO_LIMIT)
                preview = True
        except BitstreamError as error:
            raise OSError(str(error)) from error
        self._mode = MODES[(header.colour.opaque if preview else header.colour).shown]
        self._size = header.width, header.height
        if not preview:
            icc, exif = bounded_icc(parts.icc, notes), checked_exif(parts.exif, notes)
            for note in notes:
                warnings.warn(note, stacklevel=5)  # the caller of Image.open
            exif = exif and EXIF_PREFIX + exif
            found = {"icc_profile": icc, "exif": exif, "xmp": parts.xmp}
            self.info.update({name: value for name, value in found.items() if value})
        self._told = notes
        self._use(preview, 1)

    def _use(self, preview: bool, scale: int) -> None:
        self.tile = [ImageFile._Tile("vq2", (0, 0, *self.size), 0, (preview, scale, self._told))]

    def load_read(self, size: int) -> bytes:
        """That it is there tells Pillow's parser to wait for the whole file."""
        assert self.fp is not None
        return self.fp.read(size)

    def draft(self, mode: str | None, size: tuple[int, int] | None) -> tuple[str, tuple[int, int, float, float]] | None:
        """See the module. The mode stays as it is."""
        width, height = self.size
        late = self._drafted or not self.tile  # or loaded
        if late or size is None or width < DRAFT * size[0] or height < DRAFT * size[1]:
            return None
        self._size = -(-width // DRAFT), -(-height // DRAFT)
        self._drafted = True
        self._use(True, DRAFT)
        return self.mode, (0, 0, width / DRAFT, height / DRAFT)


class _Decoder(ImageFile.PyDecoder):
    _pulls_fd = True

    def decode(self, buffer: Any) -> tuple[int, int]:
        assert self.fd is not None
        preview, scale, told = self.args
        try:
            picture = vqcodec._codec("auto").decode_picture(self.fd.read(), container.NO_LIMIT, preview=preview)
        except BitstreamError as error:
            raise OSError(str(error)) from error
        for note in picture.notes:
            if note not in told:
                warnings.warn(note, stacklevel=3)  # the caller of Image.load
        image = to_pil(picture)
        self.set_as_raw(image.reduce(scale).tobytes() if scale > 1 else image.tobytes())
        return -1, 0


def _save(image: Image.Image, file: IO[bytes], name: str | bytes) -> None:
    options = image.encoderinfo
    given = {key: options[key] for key in ("icc_profile", "exif", "xmp") if key in options}
    if isinstance(given.get("exif"), Image.Exif):
        given["exif"] = given["exif"].tobytes()
    if image.mode == "CMYK" and given.get("icc_profile"):  # it says what the inks look like, and is used up by that
        image = image.copy()  # the caller keeps its own
        image.info = {**image.info, "icc_profile": given.pop("icc_profile")}
    picture = with_metadata(from_pil(image), given)
    for note in picture.notes:
        warnings.warn(note, stacklevel=4)  # the caller of Image.save
    quality, strip = options.get("quality", DEFAULT_QUALITY), options.get("strip", False)
    effort, tune = options.get("effort", DEFAULT_EFFORT), options.get("tune", DEFAULT_TUNE)
    file.write(vqcodec.encode(picture, quality, tune=tune, strip=strip, effort=effort))


Image.register_open(Vq2ImageFile.format, Vq2ImageFile, lambda prefix: prefix.startswith(container.MAGIC))
Image.register_save(Vq2ImageFile.format, _save)
Image.register_decoder("vq2", _Decoder)
Image.register_extension(Vq2ImageFile.format, ".vq2")
Image.register_mime(Vq2ImageFile.format, "image/x-vq2")
