import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vqcodec.files import check_writable, write_atomically

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX file systems only")


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[int]:
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


def test_a_new_file_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "a.vq2"
    with write_atomically(target) as file:
        file.write(b"new")
        file.flush()
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.vq2"]


def test_force_replaces_an_existing_file(tmp_path: Path) -> None:
    target = tmp_path / "a.vq2"
    target.write_bytes(b"something older and longer")
    with write_atomically(target, force=True) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"something older and longer"
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.vq2"]


def test_without_force_an_existing_file_is_refused_before_the_block_runs(tmp_path: Path) -> None:
    target = tmp_path / "a.vq2"
    target.write_bytes(b"old")
    with pytest.raises(FileExistsError) as caught, write_atomically(target):
        pytest.fail("the block ran")
    assert caught.value.filename == str(target)
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_folder_as_it_was(tmp_path: Path, error: type, force: bool) -> None:
    target = tmp_path / "a.vq2"
    if force:
        target.write_bytes(b"old")
    before = os.listdir(tmp_path)
    with pytest.raises(error), write_atomically(target, force) as file:
        file.write(b"half")
        raise error
    assert os.listdir(tmp_path) == before
    assert not force or target.read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "a.vq2"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught, write_atomically(target, force=True) as file:
        file.write(b"new")
    assert caught.value.errno == errno.ENOSPC
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.vq2"]


@pytest.fixture(params=["hard links", "no hard links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to give a file a name that must be free."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", refuse)


def test_without_force_a_file_that_appears_meanwhile_is_not_touched(tmp_path: Path, links: None) -> None:
    target = tmp_path / "a.vq2"
    with pytest.raises(FileExistsError) as caught, write_atomically(target) as file:
        file.write(b"mine")
        target.write_bytes(b"theirs")
    assert caught.value.filename == str(target)
    assert target.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a.vq2"]


def test_of_several_writers_without_force_exactly_one_succeeds(tmp_path: Path, links: None) -> None:
    target = tmp_path / "a.vq2"
    together = threading.Barrier(8)
    succeeded = []

    def write(number: int) -> None:
        try:
            with write_atomically(target) as file:
                file.write(bytes([number]) * 1000)
                together.wait()
            succeeded.append(number)
        except FileExistsError:
            pass

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(succeeded) == 1
    assert target.read_bytes() == bytes(succeeded) * 1000
    assert os.listdir(tmp_path) == ["a.vq2"]


@posix
@pytest.mark.parametrize("force", [False, True])
def test_where_files_without_a_name_cannot_get_one_they_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    link = os.link

    def refuse(source: os.PathLike[str] | str, *rest: object, **options: object) -> None:
        if str(source).startswith("/proc/"):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        link(source, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", refuse)
    with write_atomically(tmp_path / "a.vq2", force) as file:
        file.write(b"new" * 10000)
    assert (tmp_path / "a.vq2").read_bytes() == b"new" * 10000
    assert os.listdir(tmp_path) == ["a.vq2"]


@posix
@pytest.mark.parametrize("force", [False, True])
def test_where_there_are_no_files_without_a_name_they_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    with write_atomically(tmp_path / "a.vq2", force) as file:
        file.write(b"new")
        (temporary,) = os.listdir(tmp_path)
        assert temporary.startswith(".vqcodec-") and temporary.endswith(".part")
    assert (tmp_path / "a.vq2").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.vq2"]


def test_a_replacement_that_fails_gives_the_claimed_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError), write_atomically(tmp_path / "a.vq2"):
        pass
    assert os.listdir(tmp_path) == []


@posix
@pytest.mark.parametrize("force", [False, True])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path: Path, umask: int, force: bool) -> None:
    target = tmp_path / "a.vq2"
    with write_atomically(target, force):
        pass
    assert permissions(target) == 0o666 & ~umask


@posix
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "a.vq2"
    target.write_bytes(b"secret")
    target.chmod(0o600)
    with write_atomically(target, force=True):
        pass
    assert permissions(target) == 0o600


@posix
def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    real, link = tmp_path / "folder" / "real.vq2", tmp_path / "link.vq2"
    link.symlink_to(real)
    real.write_bytes(b"first")
    with pytest.raises(FileExistsError), write_atomically(link):
        pass
    with write_atomically(link, force=True) as file:
        file.write(b"second")
    assert link.is_symlink() and real.read_bytes() == b"second"
    assert sorted(os.listdir(tmp_path)) == ["folder", "link.vq2"]


@posix
def test_a_link_to_nothing_is_not_followed(tmp_path: Path) -> None:
    link = tmp_path / "link.vq2"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError), write_atomically(link):
        pass
    assert link.is_symlink()
    with write_atomically(link, force=True) as file:
        file.write(b"new")
    assert not link.is_symlink() and link.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["link.vq2"]


def test_a_file_gets_the_time_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time, odd = 10**18 + 123456789, 10**18 + 10**9
    with write_atomically(tmp_path / "a", modified=time):
        pass
    assert (tmp_path / "a").stat().st_mtime_ns // 10**6 == time // 10**6

    def even_seconds(path: Path, ns: tuple[int, int]) -> None:
        utime(path, ns=(ns[0] // (2 * 10**9) * 2 * 10**9,) * 2)

    utime = os.utime
    monkeypatch.setattr(os, "utime", even_seconds)  # as on a memory card
    with write_atomically(tmp_path / "b", modified=odd):
        pass
    assert odd <= (tmp_path / "b").stat().st_mtime_ns <= odd + 2 * 10**9


def test_whether_a_file_can_be_written_is_known_without_writing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    for name in ("file", "new", "not/yet/there/new"):
        check_writable(tmp_path / name)
    with pytest.raises(NotADirectoryError) as caught:
        check_writable(tmp_path / "file" / "new")
    assert caught.value.filename == str(tmp_path / "file")
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)
    if os.name == "posix":
        check_writable("/dev/null")
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    check_writable(tmp_path / "new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("force", [False, True])
def test_a_missing_folder_is_named(tmp_path: Path, force: bool) -> None:
    folder = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as caught, write_atomically(folder / "a.vq2", force):
        pass
    assert caught.value.filename == str(folder)
    assert "part" not in str(caught.value)


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError) as caught, write_atomically(tmp_path / "a.vq2"):
            pass
    finally:
        tmp_path.chmod(0o700)
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_not_a_target(tmp_path: Path, force: bool) -> None:
    with pytest.raises(IsADirectoryError), write_atomically(tmp_path, force):
        pass


@posix
@pytest.mark.parametrize("force", [False, True])
def test_a_target_in_a_file_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError), write_atomically(tmp_path / "file" / "a.vq2", force):
        pass


@posix
def test_a_name_of_255_bytes_is_fine(tmp_path: Path) -> None:
    with write_atomically(tmp_path / ("a" * 255)):
        pass
    assert os.listdir(tmp_path) == ["a" * 255]


@posix
def test_a_pipe_and_dev_null_are_written_directly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    with write_atomically(pipe) as file:
        file.write(b"through")
    reader.join()
    assert received == [b"through"]
    assert os.listdir(tmp_path) == ["pipe"]
    with write_atomically("/dev/null") as file:
        file.write(b"away")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@posix
@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_standard_output_is_written_also_when_it_is_a_file(tmp_path: Path, mode: str) -> None:
    script = "from vqcodec.files import *\nwith write_atomically('/dev/stdout') as file: file.write(b'new')"
    redirected = tmp_path / "redirected"
    redirected.write_bytes(b"old ")
    with open(redirected, mode) as output:
        subprocess.run([sys.executable, "-c", script], stdout=output, check=True)
    assert redirected.read_bytes() == (b"new" if mode == "wb" else b"old new")
