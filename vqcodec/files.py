"""Files: which there are, and writing one so that it is either complete or not there at all."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

# Streams that are open already. Behind one may be a regular file (`> out.png`), but that file's name is the
# shell's business: it is written through the stream, not replaced.
_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")


@contextlib.contextmanager
def write_atomically(
    path: str | os.PathLike[str], force: bool = False, modified: int | None = None
) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the `with` block ends without an exception.

    The bytes go to a hidden temporary file in the same folder, are synced to the disk, and get their name in
    one step. After an exception of any kind, KeyboardInterrupt and a full disk included, the temporary file
    is gone and `path` is as it was. If the process is killed, it may stay: on Linux, whose file systems have files
    without a name, only in the instant between its two names. Where there are no hard links (FAT), a new `path` is
    empty for such an instant. A symbolic link is followed: the file it points to is written; a link to nothing is
    itself what exists, and what is replaced. A new file gets the permissions of any new file (umask), a replaced
    one keeps its own. What is not a regular file (a pipe, /dev/stdout, /dev/null) is written directly.

    force: replace an existing file. Without it an existing file is never touched, not even one that appears
    while the block runs. modified: the file's time in nanoseconds, instead of now; never earlier, on a file system
    that rounds times.

    Errors: FileExistsError, IsADirectoryError; FileNotFoundError, NotADirectoryError or PermissionError with
    the folder as their `filename`; any other OSError of the file system.
    """
    path = os.fspath(path)
    try:
        old: os.stat_result | None = os.stat(path)
    except FileNotFoundError:
        old = None
    if old and stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if old and (path.startswith(_STREAMS) or not stat.S_ISREG(old.st_mode)):
        with open(path, "ab") as stream:  # append, so that `>> file` keeps what is there
            yield stream
        return
    if os.path.lexists(path) and not force:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    target = Path(os.path.realpath(path)) if old else Path(path)
    # A short name whatever the target's: file names have a limit.
    temporary = target.with_name(f".vqcodec-{os.urandom(8).hex()}.part")
    try:
        with _create(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            _name(file, temporary)
        if old:
            os.chmod(temporary, stat.S_IMODE(old.st_mode))
        if modified is not None:
            _set_modified(temporary, modified)
        if force:
            os.replace(temporary, target)
        else:
            _publish(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # mostly because it has its final name by now
            os.unlink(temporary)


def _create(temporary: Path) -> BinaryIO:
    """A new file, without a name if possible. An OSError names the folder, because nobody knows the temporary file."""
    with contextlib.suppress(AttributeError, OSError):  # not on Linux, or not on this file system
        return os.fdopen(os.open(temporary.parent, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
    try:
        return open(temporary, "xb")
    except OSError as error:
        error.filename = str(temporary.parent)
        raise


def _name(file: BinaryIO, temporary: Path) -> None:
    """Give the file its temporary name, unless it has that already."""
    if os.fstat(file.fileno()).st_nlink:
        return
    try:
        link = f"/proc/self/fd/{file.fileno()}"
        os.link(link, temporary, src_dir_fd=file.fileno(), follow_symlinks=True)  # the folder makes it follow
    except OSError:  # no /proc here, or it cannot be linked from
        file.seek(0)
        with open(temporary, "xb") as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            os.fsync(copy.fileno())


def _set_modified(path: Path, modified: int) -> None:
    """FAT counts time in steps of two seconds: what is rounded down would be older than what it was made from."""
    for time in (modified, modified + 2 * 10**9):
        os.utime(path, ns=(time, time))
        if os.stat(path).st_mtime_ns >= modified:
            break


def _publish(temporary: Path, target: Path) -> None:
    """Give the finished file its name; FileExistsError when somebody else has taken it meanwhile."""
    try:
        os.link(temporary, target)
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
    except OSError:  # no hard links here (FAT, some network drives): claim the name, then replace the claim
        with open(target, "xb"):
            pass
        try:
            os.replace(temporary, target)
        except BaseException:
            os.unlink(target)
            raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """OSError, with the folder as its filename, if a file `path` could not be written, and if it is a folder itself.
    Leaves nothing behind.

    The folder need not exist yet: then it is about the nearest one above that does.
    """
    path = os.path.realpath(path) if os.path.exists(path) else os.path.abspath(path)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or /dev/null: written directly
        return
    folder = os.path.dirname(path)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    temporary = Path(folder, f".vqcodec-{os.urandom(8).hex()}.part")
    _create(temporary).close()
    with contextlib.suppress(FileNotFoundError):  # it never had a name
        os.unlink(temporary)


class Found(NamedTuple):
    """What is below a folder, as relative paths, sorted. paths: files that were looked for; others: other files;
    special: what has the ending of such a file and is a pipe or the like; closed: folders that cannot be read."""

    paths: list[str]
    others: list[str]
    special: list[str]
    closed: list[OSError]


def find(folder: str, endings: Collection[str]) -> Found:
    """All files below a folder, those that have one of the endings (lower case, with the dot) apart.

    Hidden files and folders are left out, and folders behind symbolic links. Errors: OSError if `folder` itself
    cannot be read.
    """
    found = Found([], [], [], [])

    def fail(error: OSError) -> None:
        if error.filename == folder:
            raise error
        found.closed.append(error)

    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            path = os.path.join(root, name)
            wanted = os.path.splitext(name)[1].lower() in endings
            regular = os.path.isfile(path) or not os.path.exists(path)  # a link to nothing is not left out silently
            if regular or wanted:
                kind = found.special if not regular else found.paths if wanted else found.others
                kind.append(os.path.relpath(path, folder))
    for kind in (found.paths, found.others, found.special):
        kind.sort()
    return found
