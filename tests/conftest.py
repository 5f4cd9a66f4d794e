import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the networks here are tiny

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tiny_weights() -> Path:
    """A small model that never changes, see tiny_model.py: 3 quality levels, trained."""
    return Path(__file__).parent / "golden" / "tiny.safetensors"


@pytest.fixture(scope="module")
def pillow_plugin() -> Iterator[None]:
    """vqcodec.pillow may be imported, and is forgotten afterwards: other tests want a Pillow without it."""
    from PIL import Image

    Image.init()  # all of Pillow's own
    tables = (Image.OPEN, Image.SAVE, Image.MIME, Image.EXTENSION, Image.DECODERS)
    before, order = [dict(table) for table in tables], list(Image.ID)
    yield
    sys.modules.pop("vqcodec.pillow", None)
    Image.ID[:] = order
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
