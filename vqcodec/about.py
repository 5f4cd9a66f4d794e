"""What the metadata of a file says about a picture, for people."""

import contextlib
from io import BytesIO

from PIL import ExifTags, Image, ImageCms


def metadata_facts(exif: bytes | None, icc: bytes | None) -> dict[str, str]:
    """camera, date and profile, as far as there is something to say.

    exif: from its TIFF header on. Metadata is kept as it came, broken or not: what cannot be read is not there.
    """
    facts: dict[str, str] = {}
    if exif:
        with contextlib.suppress(Exception):  # broken EXIF raises nearly anything
            tags = Image.Exif()
            tags.load(exif)
            make, model = (str(tags.get(tag, "")).strip(" \0") for tag in (ExifTags.Base.Make, ExifTags.Base.Model))
            facts["camera"] = model if model.startswith(make) else f"{make} {model}".strip()
            times = tags.get_ifd(ExifTags.IFD.Exif)
            taken = str(times.get(ExifTags.Base.DateTimeOriginal) or tags.get(ExifTags.Base.DateTime) or "")
            date, _, time = taken.strip(" \0").partition(" ")
            facts["date"] = f"{date.replace(':', '-')} {time}".strip()
    if icc:
        with contextlib.suppress(Exception):  # the same
            facts["profile"] = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(icc))).strip()
    return {name: fact for name, fact in facts.items() if fact}
