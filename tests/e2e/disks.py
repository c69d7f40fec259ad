"""A disk that is soon full. It takes root, as the rest of these tests does."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk_at(folder: Path) -> Iterator[Path]:
    """*folder*, made and empty, on a disk of 8 MiB of its own."""
    folder.mkdir()
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=8m", "none", folder), check=True)
    try:
        yield folder
    finally:
        # Lazily: nothing stays mounted because a failed test has left a file open there.
        subprocess.run(("umount", "--lazy", folder), check=True)
