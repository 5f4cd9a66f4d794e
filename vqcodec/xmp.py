"""XMP packets, as bytes: all but a few properties stays as it was."""

import re
from bisect import bisect_right
from collections import defaultdict

_NAME = rb"[\w.-]+:[\w.-]+"
# An attribute, the beginning of an element, the end of one.
_PARTS = re.compile(rb"""\s(%b)\s*=\s*(?:"[^"]*"|'[^']*')|<(%b)|</(%b)\s*>""" % (_NAME, _NAME, _NAME))
_PLACE = re.compile(rb":.*(?:GPS|Gps|Latitude|Longitude)")


def without_gps(xmp: bytes) -> bytes:
    """Without the properties that say where, such as exif:GPSLatitude and drone-dji:GpsLongitude, be they attributes or
    elements. Takes time in proportion to the size, whatever is in it."""
    parts = [part for part in _PARTS.finditer(xmp) if _PLACE.search(part[1] or part[2] or part[3])]
    ends = defaultdict[bytes, list[int]](list)  # of elements, by name
    for part in parts:
        if part[3]:
            ends[part[3]].append(part.end())
    kept: list[bytes] = []
    at = 0
    for part in parts:
        end = _end(xmp, part, ends) if part.start() >= at else 0
        if end:
            kept.append(xmp[at : part.start()])
            at = end
    return b"".join([*kept, xmp[at:]])


def _end(xmp: bytes, part: re.Match[bytes], ends: dict[bytes, list[int]]) -> int:
    """Where an attribute, or an element with all that is in it, is over; 0 if nowhere."""
    if part[1]:
        return part.end()
    tag = xmp.find(b">", part.end()) + 1 if part[2] else 0
    if not tag or xmp[tag - 2 : tag] == b"/>":
        return tag
    of_name = ends[part[2]]
    number = bisect_right(of_name, tag)
    return of_name[number] if number < len(of_name) else 0
