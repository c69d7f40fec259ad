"""The file systems of test images, made without a registry: by ``docker import`` of these tarballs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import IO

# The libraries are for a Python of the host that is mounted into it, which may be built against all of them.
SYSTEMD_PACKAGES = (
    "systemd,systemd-sysv,dbus,procps,libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8,"
    "libsqlite3-0,libssl3,libuuid1,zlib1g"
)

_RELEASE = "bookworm"
_MIRROR = "http://deb.debian.org/debian"


class DockerError(Exception):
    """A docker command failed, or something that it needs is missing."""


def require(program: str, package: str) -> str:
    """The path of *program*. Raises DockerError, which names Debian's *package*."""
    found = shutil.which(program)
    if found is None:
        raise DockerError(f"no program {program!r}: apt-get install {package}")
    return found


def cache() -> Path:
    """Where what takes long to make is kept: $PHALANX_TEST_CACHE, else ``~/.cache/phalanx-tests``."""
    path = Path(os.environ.get("PHALANX_TEST_CACHE") or Path.home() / ".cache" / "phalanx-tests")
    path.mkdir(parents=True, exist_ok=True)
    return path


def empty() -> IO[bytes]:
    """A tar of nothing but a folder for temporary files."""
    data = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    with tarfile.open(fileobj=data, mode="w") as tar:
        entry = tarfile.TarInfo("tmp")
        entry.type, entry.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(entry)
    data.seek(0)
    return data


def busybox() -> IO[bytes]:
    """A tar of the static busybox with a link for each of its applets."""
    busybox = require("busybox", "busybox-static")
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True, timeout=10)
    data = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.add(os.path.realpath(busybox), "bin/busybox")
        for applet in sorted(set(listed.stdout.split()) - {"busybox"}):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for folder in ("tmp", "etc", "root", "var"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            tar.addfile(entry)
    data.seek(0)
    return data


def systemd() -> Path:
    """The file system of the systemd image; made by debootstrap if the cache has none (about a minute)."""
    path = cache() / f"systemd-{_RELEASE}-2.tar.gz"
    with _exclusive(path.with_suffix(".lock")):
        if not path.exists():
            _debootstrap(path)
    return path


@contextlib.contextmanager
def _exclusive(path: Path) -> Generator[None]:
    """Several test runs at once make it once."""
    with open(path, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _debootstrap(path: Path) -> None:
    debootstrap = require("debootstrap", "debootstrap")
    with tempfile.TemporaryDirectory(prefix="phalanx-debootstrap-") as folder:
        root, began = Path(folder) / "root", time.monotonic()
        command = [
            debootstrap, "--variant=minbase", f"--include={SYSTEMD_PACKAGES}", _RELEASE, str(root),
            os.environ.get("PHALANX_TEST_MIRROR", _MIRROR),
        ]  # fmt: skip
        _say(f"making the systemd image's file system (once, about a minute): {' '.join(command)}")
        lines: list[str] = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if line.startswith("I: ") and len(lines) % 40 == 0:
                    _say(f"  {time.monotonic() - began:3.0f} s  {line.strip()}")
        if process.returncode != 0:
            raise DockerError(f"debootstrap exited with {process.returncode}:\n{''.join(lines[-20:])}")
        shutil.rmtree(root / "var" / "cache" / "apt", ignore_errors=True)
        temporary = path.with_suffix(".part")
        # The numbers of users and groups are those inside, and devices belong to Docker.
        subprocess.run(
            [
                "tar",
                "--numeric-owner",
                "--exclude=./dev/*",
                "-C",
                str(root),
                "-I",
                "gzip -1",
                "-cf",
                str(temporary),
                ".",
            ],
            check=True,
            timeout=300,
        )
        temporary.replace(path)
        _say(f"  {time.monotonic() - began:3.0f} s  {path}: {path.stat().st_size >> 20} MiB")


def _say(line: str) -> None:
    """Progress, past pytest's capture: a minute of silence looks like a hang."""
    sys.__stderr__.write(f"{line}\n") if sys.__stderr__ is not None else None
