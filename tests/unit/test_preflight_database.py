"""What keeps an app's database from being used on a host is known before a node starts; nothing is made."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from phalanx import ConfigError, Platform, SQLite, StartError, preflight
from phalanx.config import ActivePassive, build_app


def problem(path: Path, **options: Any) -> Any:
    """What the preflight says of an app's database at *path*."""
    database = build_app("wiki", ActivePassive(), database=SQLite(path, **options)).database
    assert database is not None
    return preflight.database_problem("wiki", database)


def refused(path: Path, word: str, field: str = "path", **options: Any) -> ConfigError:
    """The one line that refuses it, which holds *word*; nothing is made by finding it."""
    before = sorted(path.parent.rglob("*")) if path.parent.is_dir() else []
    error = problem(path, **options)
    assert isinstance(error, ConfigError)
    assert (error.key, word in error.problem) == (f"apps.wiki.database.{field}", True), str(error)
    assert str(error).isprintable()
    assert error.remedy
    assert (sorted(path.parent.rglob("*")) if path.parent.is_dir() else []) == before
    return error


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A real database."""
    path = tmp_path / "wiki.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    return path


def test_database_that_is_there_or_not_yet_is_fine(file: Path, tmp_path: Path) -> None:
    """A database in any journal mode, an empty file, and none at all."""
    assert problem(file) is None
    assert problem(tmp_path / "new.db") is None
    (tmp_path / "empty.db").touch()
    assert problem(tmp_path / "empty.db", copy_to=tmp_path / "copies" / "wiki") is None
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("INSERT INTO t VALUES (1)")
        connection.commit()
        assert problem(file) is None
    connection.close()


def test_folder_that_is_none(tmp_path: Path) -> None:
    """Missing, a file, or in a folder that cannot even be looked into."""
    refused(tmp_path / "no" / "wiki.db", "does not exist")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "wiki.db", "is no folder")


def test_folder_or_file_without_rights(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both must be writable, and the folder beside the database, if it is there."""
    for forbidden in (file.parent, file, file.parent / ".wiki.db-phalanx"):
        (file.parent / ".wiki.db-phalanx").mkdir(exist_ok=True)
        monkeypatch.setattr(os, "access", lambda path, mode, forbidden=forbidden: Path(path) != forbidden)
        refused(file, "cannot be written")


def test_file_that_is_no_database(tmp_path: Path) -> None:
    """Some other file, one that is too short, an encrypted one (which looks like noise), a folder, a pipe."""
    for name, content in (("a.txt", b"SQLite format 4\0" * 9), ("b", b"S"), ("c", os.urandom(4096))):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "encrypted")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "is a folder")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no file")


def test_symbolic_link_names_the_file_it_means(file: Path) -> None:
    """A promotion would replace the link: the remedy names the real path. Links above are fine."""
    link = file.with_name("link.db")
    link.symlink_to(file)
    assert str(file) in refused(link, "symbolic link").problem
    (file.parent / "folder").symlink_to(file.parent)
    assert problem(file.parent / "folder" / "wiki.db") is None


def test_disk_too_small_for_a_second_copy(file: Path) -> None:
    """A database larger than what is free beside it (a sparse one) cannot be followed."""
    free = os.statvfs(file).f_bavail * os.statvfs(file).f_frsize
    os.truncate(file, free)
    refused(file, "second copy")


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "fuse.sshfs", "9p", "ceph", "fuse.glusterfs"])
def test_network_file_system(file: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """WAL mode needs shared memory: no network file system is taken."""
    monkeypatch.setattr(preflight, "file_system_of", lambda folder: kind)
    refused(file, f"network file system ({kind})")


def test_file_system_without_locks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite needs POSIX locks; a lock that somebody holds is one."""
    lockf: Any = fcntl.lockf

    def fails(number: int) -> Any:
        def lock(handle: int, flags: int) -> None:
            raise OSError(number, os.strerror(number))

        return lock

    monkeypatch.setattr(fcntl, "lockf", fails(errno.ENOLCK))
    refused(file, "no locks")
    monkeypatch.setattr(fcntl, "lockf", fails(errno.EAGAIN))
    assert problem(file) is None
    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert problem(file) is None


def test_file_system_of_the_deepest_mount(tmp_path: Path) -> None:
    """The table of mounts: the deepest wins, of two at one place the later; names with spaces are escaped."""
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 1 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:5 / /srv rw,relatime shared:1 master:2 - xfs /dev/sdb rw\n"
        "3 2 0:6 / /srv/a\\040b rw shared:3 - nfs4 host:/x rw\n"
        "4 2 0:7 / /srv/over rw - nfs host:/y rw\n"
        "5 4 0:8 / /srv/over rw - tmpfs tmpfs rw\n"
    )
    for folder, kind in (
        ("/", "ext4"),
        ("/srvx", "ext4"),
        ("/srv/x/y", "xfs"),
        ("/srv/a b/c", "nfs4"),
        ("/srv/over", "tmpfs"),
    ):
        assert preflight.file_system_of(Path(folder), table) == kind
    assert preflight.file_system_of(Path("/"), tmp_path / "none") == ""
    assert preflight.file_system_of(Path("/proc")) == "proc"


def test_database_of_another_app(file: Path) -> None:
    """What another app has kept beside it says whose it is; nothing, or nonsense, says nothing."""
    folder = file.parent / ".wiki.db-phalanx"
    folder.mkdir()
    assert problem(file) is None
    for state, fine in (('{"app": "wiki"}', True), ("{", True), ("[]", True), ('{"app": "mail"}', False)):
        (folder / "owner.json").write_text(state)
        assert (problem(file) is None) is fine
    refused(file, "'mail'")


def test_folder_for_copies_that_cannot_be(file: Path, tmp_path: Path) -> None:
    """It may not exist yet, but it must be possible."""
    (tmp_path / "plain").touch()
    refused(file, "is no folder", "copy_to", copy_to=tmp_path / "plain" / "x")


def test_litestream_is_missing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the program that captures nothing starts."""
    monkeypatch.setattr("shutil.which", lambda *arguments, **options: None)
    error = problem(file)
    assert isinstance(error, StartError)
    assert "litestream" in str(error)


async def test_platform_with_a_wrong_database_starts_nothing(tmp_path: Path) -> None:
    """The check of a platform looks at its apps' databases, before it reaches for NATS."""
    platform = Platform("prod", node="n1", data_dir=str(tmp_path / "data"), nats="nats://127.0.0.1:1")
    platform.app("wiki", database=SQLite(tmp_path / "no" / "wiki.db"))
    with pytest.raises(ConfigError, match="does not exist"):
        await platform.start()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("sign", "?#%")
def test_path_that_litestream_takes_for_something_else(tmp_path: Path, sign: str) -> None:
    """In the name of the file or of a folder: it would fail at each activation only."""
    folder = tmp_path / f"a{sign}b"
    folder.mkdir()
    for path in (folder / "wiki.db", tmp_path / f"wi{sign}ki.db"):
        assert sign in refused(path, "which Litestream takes for something else").problem


def test_database_that_sqlite_cannot_have(file: Path) -> None:
    """Noise behind the first bytes of a database would show at each activation only."""
    file.write_bytes(preflight.SQLITE_MAGIC + os.urandom(8192))
    refused(file, "no sound SQLite database")
