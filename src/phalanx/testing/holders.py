"""Finding the holder of a node's programs, for tests that kill it, or see it end."""

from __future__ import annotations

import os
from pathlib import Path

from phalanx import system


def holder_of(state_dir: Path) -> int:
    """The pid of the one whose socket is in *state_dir*; 0 if none runs."""
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        line = system.command_line(pid)
        is_holder = any(part.endswith("holder_process.py") for part in line)
        if is_holder and str(state_dir) in line and system.is_running(pid):
            return pid
    return 0
