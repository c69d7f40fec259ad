"""The same crash with real keepalived: two hosts, VRRP, the same program on both all the time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.vip_client import Client, claimants
from phalanx.testing import vips
from phalanx.testing.netlab import Host, NetLab

_CONFIGURATION = """
global_defs {{
    router_id {name}
    vrrp_version 3
    vrrp_garp_master_repeat 5
}}
vrrp_instance wiki {{
    state BACKUP
    nopreempt
    interface eth0
    virtual_router_id 51
    priority {priority}
    advert_int {advert}
    virtual_ipaddress {{
        {address}/24 dev eth0
    }}
}}
"""


class Keepalived:
    """Two hosts and a client. *advert*: seconds between advertisements."""

    def __init__(self, advert: float) -> None:
        self._advert = advert
        self._lab = NetLab(3)
        self._directory = Path(tempfile.mkdtemp(prefix="phalanx-keepalived-"))
        self._address = self._lab.address(100)
        self._started: dict[int, list[subprocess.Popen[Any]]] = {}

    def __enter__(self) -> Self:
        if shutil.which("keepalived") is None:
            raise RuntimeError("keepalived is not installed (Debian: keepalived)")
        self._lab.start()
        try:
            for number in (0, 1):
                self._start(number)
        except BaseException:
            self._lab.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lab.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def crash(self) -> tuple[float, bool]:
        """Kill keepalived and the program of the master: the outage in seconds, and whether its host still
        answers for the address after it."""
        old = self._settled()
        host, other = self._lab[old], self._lab[1 - old]
        own = _mac(host)
        with Client(self._lab[2], self._address) as client:
            time.sleep(0.3)
            # All stopped first: a daemon whose parent dies would say goodbye.
            victims = host.pids()
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in victims:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            outage = client.outage(host.name, 10 + 10 * self._advert)
        answers = own in claimants(self._lab[2], self._address)
        assert self._address in other.addresses()
        if self._address in host.addresses():
            host.ip("addr", "del", f"{self._address}/24", "dev", "eth0")
        for process in self._started.pop(old):
            process.wait(10)
        self._start(old)
        return outage, answers

    def _settled(self) -> int:
        """One is master and both run for long enough to know of each other: which one."""
        deadline = time.monotonic() + 20 + 10 * self._advert
        while True:
            holders = [i for i in (0, 1) if self._address in self._lab[i].addresses()]
            if len(holders) == 1:
                time.sleep(5 * self._advert + 0.5)
                if [i for i in (0, 1) if self._address in self._lab[i].addresses()] == holders:
                    return holders[0]
            if time.monotonic() > deadline:
                raise TimeoutError("keepalived does not settle on a master")
            time.sleep(0.05)

    def _start(self, number: int) -> None:
        host = self._lab[number]
        path = self._directory / f"{host.name}.conf"
        path.write_text(
            _CONFIGURATION.format(
                name=host.name, priority=100 - number, advert=self._advert, address=self._address
            )
        )
        env = {**os.environ, "PHALANX_NODE": host.name}
        program = [sys.executable, "-I", str(vips.WEB), str(vips.PORT)]
        pids = [f"--{kind}={self._directory / host.name}.{kind}" for kind in ("pid", "vrrp_pid")]
        for kind in ("pid", "vrrp_pid"):  # one that was killed leaves them behind, and then would not start
            (self._directory / f"{host.name}.{kind}").unlink(missing_ok=True)
        daemon = ["keepalived", "--dont-fork", "--vrrp", f"--use-file={path}", *pids]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._started[number] = [host.popen(program, env=env), host.popen(daemon, **quiet)]


def _mac(host: Host) -> str:
    return host.run(["ip", "-br", "link", "show", "eth0"]).stdout.split()[2]
