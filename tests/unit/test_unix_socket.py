"""Sockets in a node's folder: who may reach them, and what making one costs others."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from phalanx import unix_socket


def test_socket_is_for_this_user_alone(tmp_path: Path) -> None:
    """Whatever the umask."""
    before = os.umask(0)
    try:
        unix_socket.bind(tmp_path / "a.sock").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.sock").stat().st_mode) == 0o600


def test_folders_that_other_threads_make_meanwhile_can_be_entered(tmp_path: Path) -> None:
    """The umask is the whole process's: it is not touched, or their files and folders would get its mode."""
    over, modes = threading.Event(), set[int]()

    def make() -> None:
        number = 0
        while not over.is_set():
            folder = tmp_path / f"folder{number % 100}-{number}"
            folder.mkdir()
            modes.add(stat.S_IMODE(folder.stat().st_mode))
            folder.rmdir()
            number += 1

    maker = threading.Thread(target=make)
    maker.start()
    try:
        for _ in range(5000):
            unix_socket.bind(tmp_path / "a.sock").close()
    finally:
        over.set()
        maker.join()
    assert len(modes) == 1
