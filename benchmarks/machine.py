"""What the numbers were measured with: without it, a result is an anecdote."""

import hashlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from vqcodec import Codec, __version__
from vqcodec.config import SHIPPED

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "bjontegaard",
    "constriction",
    "cvvdp",
    "numpy",
    "pillow",
    "pillow-jxl-plugin",
    "pytorch-msssim",
    "safetensors",
    "torch",
)


def describe(codec: Codec, weights: Path | None) -> dict[str, Any]:
    """Machine, versions, commit and model, for a JSON file. Nothing in it names a person or a host."""
    import torch

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory(),
        "device": str(codec.device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "vqcodec": __version__,
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "model": codec.model.config.name,
        "fingerprint": codec.fingerprint.hex(),
        "weights_sha256": hashlib.sha256((weights or SHIPPED).read_bytes()).hexdigest(),
    }


def title(machine: dict[str, Any]) -> str:
    """The two lines above a table."""
    torch = machine["packages"]["torch"]
    return (
        f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, torch {torch}\n"
        f"commit {machine['commit']}, model {machine['model']} {machine['fingerprint']}"
    )


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of this checkout, with a "+" if files differ from it."""
    try:
        return _git("rev-parse", "--short=12", "HEAD") + ("+" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
