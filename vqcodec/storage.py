"""Files by their names: paths of this machine, and fsspec's URLs such as s3://bucket/photo.png.

A file:// URL means the path in it. Other URLs need the extra, pip install 'vqcodec[urls]', and for many protocols one
more package, which the error names. In a chain such as zip://trip/a.png::s3://bucket/b.zip the path stands in the
first URL. Errors of all functions: OSError with the name, or StorageError.
"""

import contextlib
import errno
import os
import posixpath
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from bitstream.errors import StorageError
from vqcodec import files

_ARCHIVES = ("libarchive", "tar", "zip")


def local(name: str) -> str | None:
    """The path of this machine that a name means; None for what lies elsewhere."""
    scheme, separator, path = name.partition("://")
    if scheme in ("file", "local") and separator:
        return path
    return None if separator and scheme and "/" not in scheme else name


def _path_end(url: str) -> tuple[str, str]:
    """A URL up to the end of its path, and the rest of a chain."""
    end = url.find("::", url.index("://"))
    return (url, "") if end < 0 else (url[:end], url[end:])


def split(name: str) -> tuple[str, str]:
    """Folder and name in it."""
    if local(name) == name:
        return os.path.split(name)
    url, chain = _path_end(name)
    scheme, _, path = url.partition("://")
    folder, base = posixpath.split(path)
    return f"{scheme}://{folder}{chain}", base


def join(folder: str, name: str) -> str:
    if local(folder) == folder:
        return os.path.join(folder, name)
    url, chain = (folder, "") if local(folder) is not None else _path_end(folder)
    return posixpath.join(url, name.replace(os.sep, "/")) + chain


def is_folder(name: str) -> bool:
    path = local(name)
    if path is not None:
        return os.path.isdir(path)
    with _remote(name) as (system, path):
        return bool(system.isdir(path))


def existing(names: Iterable[str]) -> set[str]:
    """Those that are there, as files or as links to nothing. Asks once for every remote folder, not for every file."""
    found: set[str] = set()
    elsewhere = defaultdict[str, dict[str, str]](dict)
    for name in names:
        path = local(name)
        if path is None:
            folder, base = split(name)
            elsewhere[folder][base] = name
        elif os.path.isfile(path) or os.path.islink(path) and not os.path.exists(path):
            found.add(name)
    for folder, wanted in elsewhere.items():
        with _remote(folder) as (system, path):
            try:
                listed = {posixpath.basename(entry["name"]) for entry in system.ls(path) if entry["type"] == "file"}
            except FileNotFoundError:
                listed = set()
        found.update(name for base, name in wanted.items() if base in listed)
    return found


def find(folder: str, endings: Collection[str]) -> files.Found:
    """As ``vqcodec.files.find``."""
    path = local(folder)
    if path is not None:
        return files.find(path, endings)
    with _remote(folder) as (system, path):
        below = [found.removeprefix(path).lstrip("/") for found in system.find(path)]
    visible = sorted(name for name in below if not any(part.startswith(".") for part in name.split("/")))
    wanted = [name for name in visible if os.path.splitext(name)[1].lower() in endings]
    return files.Found(wanted, sorted({*visible} - {*wanted}), [], [])


def modified(name: str) -> int | None:
    """When it was last changed, in nanoseconds; None where nobody knows. Of a file in an archive: the archive."""
    with contextlib.suppress(OSError, StorageError):
        path = local(name)
        if path is not None:
            return os.stat(path).st_mtime_ns
        with _remote(name) as (system, path):
            return int(system.modified(path).timestamp() * 10**9)
    archive = "" if local(name) is not None else _path_end(name)[1]
    return modified(archive[2:]) if archive else None


def size(name: str) -> int:
    """In bytes; 0 where nobody knows."""
    with contextlib.suppress(OSError, StorageError):
        path = local(name)
        if path is not None:
            return os.path.getsize(path)
        with _remote(name) as (system, path):
            return int(system.size(path) or 0)
    return 0


def read(name: str, size: int | None = None) -> bytes:
    """The content, or its first bytes."""
    path = local(name)
    if path is not None:
        with open(path, "rb") as file:
            return file.read(size)
    with _remote(name) as (system, path):
        return bytes(system.cat_file(path, end=size))


def check_writable(name: str) -> None:
    """As ``vqcodec.files.check_writable``; of what lies elsewhere, only that it is no archive."""
    path = local(name)
    if path is not None:
        files.check_writable(path)
    elif name.partition("://")[0] in _ARCHIVES:
        raise StorageError("an archive is only read: choose another place with -o")


def write(name: str, data: bytes | memoryview, force: bool, modified: int | None = None) -> None:
    """Makes the folder if need be. A file of this machine is written as by ``vqcodec.files.write_atomically``; another
    one is put in one request: whether half of it can be seen meanwhile is up to who stores it, and so is its time."""
    path = local(name)
    if path is not None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with files.write_atomically(path, force, modified) as file:
            file.write(data)
        return
    with _remote(name) as (system, path):
        if not force and system.exists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        system.makedirs(posixpath.dirname(path), exist_ok=True)
        system.pipe_file(path, bytes(data))


@contextlib.contextmanager
def _remote(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and the path there."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise StorageError("URLs need the package fsspec: pip install 'vqcodec[urls]'") from None
    try:
        yield url_to_fs(url)
    except FileNotFoundError as error:  # mostly without a number and with half of the name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
    except Exception as error:  # every protocol has its own, hardly ever an OSError
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, (ImportError, ValueError)):  # fsspec's own, about the protocol
            raise StorageError(str(error)) from error
        raise StorageError(f"{type(error).__name__}: {error}") from error
