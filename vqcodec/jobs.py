"""From the names that a user gives to jobs, and their files in and out. "-" is a standard stream.

Every function raises FileError, whose message starts with the name of the file, or UsageError.
"""

import contextlib
import errno
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bitstream.errors import FileError, UsageError, VqcodecError
from vqcodec import storage
from vqcodec.formats import advice, look_closer

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
        if isinstance(error, BrokenPipeError) and not name:  # who reads standard output has seen enough
            raise
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
    """An input and its output. modified: time for the output in nanoseconds, None for now; replace: an output that is
    there is out of date."""

    source: str
    target: str
    modified: int | None = None
    replace: bool = False


class Plan(NamedTuple):
    """What there is to do. folders: a folder is among the inputs; skipped: jobs whose outputs are up to date; closed:
    what is wrong with folders that cannot be read; left_out: pictures in folders that cannot be read."""

    jobs: list[Job]
    folders: bool
    skipped: list[Job]
    closed: list[str]
    left_out: list[str]


def plan_jobs(
    sources: Sequence[str],
    out: str | None,
    suffix: str,
    force: bool,
    resume: bool = False,
    endings: Callable[[], Collection[str]] | None = None,
    pictures: bool = False,
) -> Plan:
    """The jobs, if nothing speaks against any.

    endings: gives those of the files to be found in folders, because it is slow to know them; None if inputs are files
    alone. pictures: these are
    pictures, and so may be files without an ending.
    """
    inside = {source for source in sources if _is_folder(source)}
    to_folder = out is not None and (bool(inside) or out.endswith(("/", os.sep)) or _is_folder(out))
    if force and resume:
        raise UsageError("--force replaces all outputs that exist and --resume those out of date: choose one")
    if out == "-" and (inside or len(sources) > 1):
        raise UsageError("- (standard output) holds one file: name a folder with -o")
    if out is not None and not to_folder and len(sources) > 1:
        raise UsageError(f"several inputs need a folder: end OUT in a slash to have it made ({out}/)")
    if resume and "-" in sources:
        raise UsageError("--resume goes by the times of files, and - (standard input) has none: leave it out")
    if "-" in sources and (to_folder or len(sources) > 1):
        raise UsageError("- (standard input) has no name: give it alone, with -o FILE or -o -")
    plan = Plan([], bool(inside), [], [], [])
    for source in sources:
        if source in inside:
            if endings is None:
                raise FileError(f"{source}: {_REASONS[errno.EISDIR]}")
            _add_folder(plan, source, out or source, suffix, endings(), pictures)
        elif out is None:
            target = source if source == "-" else _renamed(source, suffix)
            if target == source != "-":
                other = "decode" if suffix == ".vq2" else "encode"
                raise FileError(f"{source}: ends in {suffix} already: name an output with -o, or did you mean {other}?")
            plan.jobs.append(Job(source, target))
        elif to_folder:
            plan.jobs.append(Job(source, storage.join(out, _renamed(storage.split(source)[1], suffix))))
        else:
            plan.jobs.append(Job(source, "-" if out == "/dev/stdout" else out))
    if resume:
        plan = _left_to_do(plan)
    refuse_clashes(plan.jobs, force)
    path = storage.local(out) if out is not None else None  # folders elsewhere come with the files in them
    if path is not None:
        parent = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(parent):
            raise FileError(f"{out}: there is no folder {parent}: create it first")
        if to_folder and os.path.isfile(os.path.abspath(path)):
            raise FileError(f"{out}: is a file, not a folder: choose another name")
    _refuse_places(plan.jobs)
    return plan


def _add_folder(plan: Plan, folder: str, out: str, suffix: str, endings: Collection[str], pictures: bool) -> None:
    """Adds what is in a folder to the plan."""
    with blame(folder):
        paths, others, special, closed = storage.find(folder, endings)
    left_out: list[str] = []
    if pictures:
        more, left_out = look_closer(folder, others, endings)
        paths = sorted(paths + more)
    if not paths and not closed:
        known = "they are known by their endings"
        if left_out or special:
            known = f"{len(left_out) + len(special)} in it cannot be read"
            known = ": ".join(filter(None, [known, advice(left_out)]))
        raise FileError(f"{folder}: no files to work on in this folder: {known}")
    plan.closed.extend(f"{os.fsdecode(error.filename)}: {reason(error)}" for error in closed)
    plan.left_out.extend(storage.join(folder, path) for path in left_out)
    plan.left_out.extend(f"{storage.join(folder, path)} (a pipe or the like)" for path in special)
    times = {path: storage.modified(storage.join(folder, path)) for path in paths}
    for path, name in new_names(times, suffix, out).items():
        plan.jobs.append(Job(storage.join(folder, path), storage.join(out, name), times[path]))


def new_names(times: Mapping[str, int | None], suffix: str, out: str) -> dict[str, str]:
    """The outputs' names in the folder `out`: a.vq2 for a.jpg, or a.jpg.vq2 where there is an a.png as well.

    times: of the inputs. An output that is there keeps its name when such a sibling comes or goes.
    """
    groups = defaultdict[str, list[str]](list)
    for path in times:
        groups[_renamed(path, suffix)].append(path)
    full = {path: path + suffix for path in times}
    there = _existing([storage.join(out, name) for name in (*groups, *full.values())])
    names: dict[str, str] = {}
    for short, paths in groups.items():
        new = [path for path in paths if storage.join(out, full[path]) not in there]
        place = storage.join(out, short)
        if len(paths) == 1:
            owner = new
        elif place in there:
            owner = _makers(new, times, storage.modified(place))
        else:
            owner = []
        names |= {path: short if owner == [path] else full[path] for path in paths}
    return {path: names[path] for path in times}


def _makers(paths: list[str], times: Mapping[str, int | None], made: int | None) -> list[str]:
    """Which of these inputs an output of the time `made` may have come from."""
    if len(paths) == 1:  # the others have outputs of their own
        return paths
    same = [path for path in paths if times[path] == made]
    return same or [path for path in paths if (times[path] or 0) <= (made or 0)]


def _left_to_do(plan: Plan) -> Plan:
    """As make does it: what has no output, or one that is older than its input or a link to nothing."""
    there = _existing([job.target for job in plan.jobs])
    left: list[Job] = []
    for job in plan.jobs:
        made, changed = storage.modified(job.target), storage.modified(job.source)
        link_to_nothing = made is None and storage.local(job.target) is not None
        older = made is not None and changed is not None and made < changed
        if job.target not in there:
            left.append(job)
        elif link_to_nothing or older:
            left.append(job._replace(replace=True))
        else:
            plan.skipped.append(job)
    return plan._replace(jobs=left)


def _renamed(path: str, suffix: str) -> str:
    folder, name = storage.split(path)
    return storage.join(folder, os.path.splitext(name)[0] + suffix) if folder else os.path.splitext(name)[0] + suffix


def _refuse_places(jobs: Sequence[Job]) -> None:
    """FileError if there is no place where an output can be written. One among others fails on its own."""
    first: FileError | None = None
    for job in jobs:
        try:
            _check_place(job)
        except FileError as error:
            first = first or error
        else:
            return
    if first:
        raise first


def _check_place(job: Job) -> None:
    if job.target != "-":
        with blame(job.target):
            storage.check_writable(job.target)


def refuse_clashes(jobs: Sequence[Job], force: bool) -> None:
    """FileError if an output would take the place of a file, unless that is what `force` is for."""
    inputs = {_identity(job.source) for job in jobs}
    source_of: dict[Any, str] = {}
    there = _existing([job.target for job in jobs])
    for source, target, _, replace in jobs:
        if target == "-":
            if sys.stdout is None:
                raise FileError("standard output: is closed: redirect it, or name a file with -o")
            if sys.stdout.isatty():
                raise FileError("standard output: is a terminal: redirect it, or name a file with -o")
            continue
        key = _identity(target)
        if key in inputs:
            raise FileError(f"{target}: is an input: choose another name with -o")
        if key in source_of:
            raise FileError(f"{target}: would hold {source_of[key]} and {source}: do one at a time, with -o")
        if target in there and not (force or replace):
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
    if source == "-" and sys.stdin is None:
        raise FileError(f"{title(source)}: is closed: redirect it, or name a file")
    with blame(title(source)):
        return sys.stdin.buffer.read() if source == "-" else storage.read(source)


def write_file(target: str, data: bytes | memoryview, force: bool, modified: int | None = None) -> None:
    """Errors of standard output are OSErrors: there may be nobody who listens."""
    if target == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        with blame(target):
            storage.write(target, data, force, modified)


def begin(job: Job) -> bytes:
    """The input's bytes, if the output can be written: nobody works for nothing."""
    with _naming(job):
        _check_place(job)
    return read_file(job.source)


def finish(job: Job, data: bytes, force: bool) -> None:
    """Writes the output."""
    with _naming(job):
        write_file(job.target, data, force or job.replace, job.modified)


@contextlib.contextmanager
def _naming(job: Job) -> Iterator[None]:
    """Puts the input's name in front of what is wrong with the output."""
    try:
        yield
    except FileError as error:
        raise FileError(f"{title(job.source)}: {error}") from error
