"""A systemd unit as the backend under test. Runs where a real systemd is process 1 (tests/in_systemd.py)."""

from __future__ import annotations

from pathlib import Path

from tests.systemd_units import command_line, remove_unit, write_unit

from phalanx import config
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
