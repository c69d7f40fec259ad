"""A systemd unit as the backend under test. Runs where a real systemd is process 1 (tests/in_systemd.py)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from phalanx import config, units
from phalanx.testing.fake_backend import Behaviour

from .stages import HostStage


class SystemdStage(HostStage):
    """``phalanx.Systemd``. Its programs belong to systemd: they outlive their node."""

    name = "systemd"
    kind = "unit"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.unit = f"phalanx-test-{folder.name}.service"

    def declare(self, behaviour: Behaviour, **options: object) -> config.Systemd:
        """See ``RealStage.declare``: with a unit of its own, which is told to systemd here."""
        if behaviour.missing:
            return config.Systemd("no-such", **options)  # pyright: ignore
        # What left the program's session has no time of its own here: SIGKILL once the program has ended.
        write_unit(self.unit, f"ExecStart={command_line(self.command(behaviour))}", "KillMode=mixed")
        return config.Systemd(self.unit, **options)  # pyright: ignore

    async def close(self) -> None:
        """See ``Stage.close``."""
        await super().close()
        remove_unit(self.unit)


def command_line(words: list[str]) -> str:
    """*words* as systemd.service(5) wants them."""
    return " ".join('"' + word.translate(_QUOTED) + '"' for word in words)


_QUOTED = str.maketrans({"\\": "\\\\", '"': '\\"', "%": "%%", "$": "$$"})


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


def systemctl(*arguments: str, check: bool = True) -> str:
    """What it prints."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False, timeout=30)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()
