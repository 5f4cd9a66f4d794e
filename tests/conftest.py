import os
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
