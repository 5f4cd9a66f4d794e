"""Writing a file so that it is either complete or not there at all."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Streams that are open already. Behind one may be a regular file (`> out.png`), but that file's name is the
# shell's business: it is written through the stream, not replaced.
_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str], force: bool = False) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the `with` block ends without an exception.

    The bytes go to a hidden temporary file in the same folder, are synced to the disk, and get their name in
    one step. After an exception of any kind, KeyboardInterrupt and a full disk included, the temporary file
    is gone and `path` is as it was. A symbolic link is followed: the file it points to is written. A new file
    gets the permissions of any new file (umask), a replaced one keeps its own. What is not a regular file (a
    pipe, /dev/stdout, /dev/null) is written directly.

    force: replace an existing file. Without it an existing file is never touched, not even one that appears
    while the block runs.

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
    if old and not force:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    target = Path(os.path.realpath(path))
    # A short name whatever the target's: file names have a limit.
    temporary = target.with_name(f".vqcodec-{secrets.token_hex(8)}.part")
    try:
        with _create(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if old:
            os.chmod(temporary, stat.S_IMODE(old.st_mode))
        if force:
            os.replace(temporary, target)
        else:
            _publish(temporary, target)
    finally:
        with contextlib.suppress(OSError):  # mostly because it has its final name by now
            os.unlink(temporary)


def _create(temporary: Path) -> BinaryIO:
    """A new file. An OSError names the folder, because nobody knows the temporary file."""
    try:
        return open(temporary, "xb")
    except OSError as error:
        error.filename = str(temporary.parent)
        raise


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
