"""From the names that a user gives to jobs, and their files in and out. "-" is a standard stream.

Every function raises FileError, whose message starts with the name of the file, or UsageError.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from bitstream.errors import FileError, UsageError, VqcodecError
from vqcodec import files, storage

_REASONS = {
    errno.EACCES: "permission denied: choose another place, or change the permissions",
    errno.EEXIST: "exists already: use -f to replace it",
    errno.EISDIR: "is a folder: name a file",
    errno.ENOENT: "no such file or folder: check the name",
    errno.ENOSPC: "the disk is full: make room, or choose another place",
}


def reason(error: OSError) -> str:
    """What is wrong and what to do, in the words of this program where it has some."""
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


@contextlib.contextmanager
def blame(name: str = "") -> Iterator[None]:
    """Turns what can go wrong with the file `name` into a FileError; a bug passes, and keeps its traceback."""
    prefix = f"{name}: " if name else ""
    try:
        yield
    except (FileError, UsageError):  # says what it is about
        raise
    except (VqcodecError, FloatingPointError) as error:  # the latter: a training run has diverged
        raise FileError(f"{prefix}{error}") from error
    except OSError as error:
        if error.errno is None:  # not the system's, but a library's that says it all
            raise FileError(str(error)) from error
        prefix = f"{os.fsdecode(error.filename)}: " if error.filename else prefix
        raise FileError(prefix + reason(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "tried to allocate" not in str(error).lower():
            raise  # those are torch's words
        raise FileError(f"{prefix}out of memory: free some, or give it less to do at once") from error


# --- from inputs to outputs ---


class Job(NamedTuple):
    """An input and its output."""

    source: str
    target: str


class Plan(NamedTuple):
    """What there is to do. folders: a folder is among the inputs; skipped: outputs that are there already."""

    jobs: list[Job]
    folders: bool
    skipped: int = 0


def plan_jobs(
    sources: Sequence[str],
    out: str | None,
    suffix: str,
    force: bool,
    resume: bool = False,
    endings: Callable[[], Collection[str]] = frozenset,
) -> Plan:
    """The jobs, if nothing speaks against any. Makes the folder `out` if it has to.

    endings: gives those of the files to be found in folders, because it is slow to know them.
    """
    inside = {source for source in sources if _is_folder(source)}
    to_folder = out is not None and (bool(inside) or out.endswith(("/", os.sep)) or _is_folder(out))
    if force and resume:
        raise UsageError("--force replaces outputs that exist and --resume skips them: choose one")
    if out is not None and not to_folder and len(sources) > 1:
        raise UsageError(f"several inputs need a folder: end OUT in a slash to have it made ({out}/)")
    if "-" in sources and (to_folder or len(sources) > 1):
        raise UsageError("- (standard input) has no name: give it alone, with -o FILE or -o -")
    jobs: list[Job] = []
    for source in sources:
        if source in inside:
            jobs += _jobs_in(source, out or source, suffix, endings())
        elif out is None:
            jobs.append(Job(source, source if source == "-" else _renamed(source, suffix)))
        elif to_folder:
            jobs.append(Job(source, storage.join(out, _renamed(os.path.basename(source), suffix))))
        else:
            jobs.append(Job(source, "-" if out == "/dev/stdout" else out))
    there = _existing([job.target for job in jobs]) if resume else set()
    left = [job for job in jobs if job.target not in there]
    refuse_clashes(left, force)
    path = storage.local(out) if out is not None else None  # folders elsewhere come with the files in them
    if path is not None:
        parent = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(parent):
            raise FileError(f"{out}: there is no folder {parent}: create it first")
        if to_folder and not os.path.isdir(path):
            if os.path.isfile(os.path.abspath(path)):
                raise FileError(f"{out}: is a file, not a folder: choose another name")
            with blame(path):
                os.mkdir(path)
    return Plan(left, bool(inside), len(jobs) - len(left))


def _jobs_in(folder: str, out: str, suffix: str, endings: Collection[str]) -> list[Job]:
    with blame(folder):
        paths = storage.find(folder, endings)
    if not paths:
        raise FileError(f"{folder}: no files to work on in this folder: they are known by their endings")
    names = files.renamed(paths, suffix)
    return [Job(storage.join(folder, path), storage.join(out, n)) for path, n in zip(paths, names, strict=True)]


def _renamed(path: str, suffix: str) -> str:
    return os.path.splitext(path)[0] + suffix


def refuse_clashes(jobs: Sequence[Job], force: bool) -> None:
    """FileError if an output would take the place of a file, unless that is what `force` is for."""
    inputs = {_identity(source) for source, _ in jobs}
    source_of: dict[Any, str] = {}
    there = _existing([job.target for job in jobs])
    for source, target in jobs:
        if target == "-":
            if sys.stdout.isatty():
                raise FileError("standard output: is a terminal: redirect it, or name a file with -o")
            continue
        key = _identity(target)
        if key in inputs:
            raise FileError(f"{target}: is an input: choose another name with -o")
        if key in source_of:
            raise FileError(f"{target}: would hold {source_of[key]} and {source}: do one at a time, with -o")
        if target in there and not force:
            raise FileError(f"{target}: {_REASONS[errno.EEXIST]}")
        source_of[key] = source


def _is_folder(name: str) -> bool:
    with blame(name):
        return storage.is_folder(name)


def _existing(names: Sequence[str]) -> set[str]:
    with blame(names[0] if names else ""):
        return storage.existing(names)


def _identity(name: str) -> Any:
    """Equal for two names of one file."""
    path = storage.local(name)
    if path is None:
        return name
    try:
        found = os.stat(path)
    except OSError:
        return os.path.normcase(os.path.realpath(path))
    return found.st_dev, found.st_ino


# --- bytes in and out ---


def title(source: str) -> str:
    """What to call an input in a message."""
    return "standard input" if source == "-" else source


def read_file(source: str) -> bytes:
    with blame(title(source)):
        return sys.stdin.buffer.read() if source == "-" else storage.read(source)


def write_file(target: str, data: bytes | memoryview, force: bool) -> None:
    """Errors of standard output are OSErrors: there may be nobody who listens."""
    if target == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        with blame(target):
            storage.write(target, data, force)
