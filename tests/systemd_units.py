"""Units for tests that run where a systemd is process 1 (tests/in_systemd.py)."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from phalanx import units

_QUOTED = str.maketrans({"\\": "\\\\", '"': '\\"', "%": "%%", "$": "$$", "\n": "\\n"})


def command_line(words: Sequence[str]) -> str:
    """*words* as systemd.service(5) wants them."""
    return " ".join('"' + word.translate(_QUOTED) + '"' for word in words)


def write_unit(name: str, *service: str, unit: tuple[str, ...] = ()) -> None:
    """Make a unit of these lines, and tell systemd."""
    lines = ["[Unit]", "StartLimitIntervalSec=60", "StartLimitBurst=3", *unit, "[Service]", *service]
    (units.DROP_INS / name).write_text("\n".join(lines) + "\n")
    systemctl("daemon-reload")


def remove_unit(name: str) -> None:
    """Kill it and forget it."""
    units.take_permit_back(name)
    systemctl("kill", "--signal=KILL", name, check=False)
    systemctl("stop", name, check=False)
    (units.DROP_INS / name).unlink(missing_ok=True)
    units.guard_path(name).unlink(missing_ok=True)
    systemctl("daemon-reload")
    systemctl("reset-failed", name, check=False)


def try_systemctl(*arguments: str) -> str:
    """What it complains of; empty if it succeeds."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False, timeout=30)
    return done.stderr.strip() or f"exited with {done.returncode}" if done.returncode else ""


def systemctl(*arguments: str, check: bool = True) -> str:
    """What it prints."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False, timeout=30)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()
