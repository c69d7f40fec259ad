"""What Phalanx adds to the start of a systemd unit: against ``systemctl start``, where a systemd runs.

``python -m benchmarks.backend_unit N``, inside of it, measures N times: one JSON object a line.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figures import Run
from phalanx import config, system, units
from phalanx.backends import make_backend
from phalanx.keeper.fencing import Registry
from phalanx.ports import SectionContext
from phalanx.testing import docker_images
from phalanx.testing.dockerd import DockerDaemon, DockerError
from phalanx.testing.systemd_host import SystemdHost
from phalanx.types import Resource

READY_TIMEOUT = 30.0

_ROOT = Path(__file__).parents[1]
_BY_HAND, _BY_PHALANX = ("bench-by-hand.service", 8001), ("bench.service", 8002)
_POLL_SECONDS = 0.002


async def unit(run: Run) -> None:
    """A unit: the time added to start and ready, in ms."""
    busybox = docker_images.require("busybox", "busybox-static")
    with DockerDaemon() as dockerd:
        host = SystemdHost(dockerd, "bench", _ROOT, f"--volume={busybox}:{busybox}:ro")
        arguments = ("-m", "benchmarks.backend_unit", str(run.runs), busybox)
        done = await asyncio.to_thread(host.python, *arguments, timeout=60.0 + 5 * run.runs)
    if done.returncode != 0:
        raise DockerError(done.stderr.decode(errors="replace")[-3000:])
    for line in done.stdout.splitlines():
        took, by_hand, first = (1000 * seconds for seconds in json.loads(line))
        details = f"{took:.1f} ms, by hand {by_hand:.1f} ms; the first since boot {first:.1f} ms"
        run.add(took - by_hand, details)


async def _inside(runs: int, busybox: str) -> None:
    _write_units(busybox)
    with tempfile.TemporaryDirectory(prefix="phalanx-overhead-") as folder:
        registry = Registry(Path(folder))
        first = await _by_phalanx(registry, 1)  # with the guard, and the D-Bus library still to be imported
        for epoch in range(2, runs + 2):
            by_hand = await _by_hand()
            took = await _by_phalanx(registry, epoch)
            sys.stdout.write(json.dumps([took, by_hand, first]) + "\n")


def _write_units(busybox: str) -> None:
    for name, port in (_BY_HAND, _BY_PHALANX):
        line = f"ExecStart={busybox} httpd -f -p 127.0.0.1:{port}"
        (units.DROP_INS / name).write_text(f"[Service]\n{line}\n")
    subprocess.run(["systemctl", "daemon-reload"], check=True)


async def _by_hand() -> float:
    name, port = _BY_HAND
    began = system.now()
    start = await asyncio.create_subprocess_exec("systemctl", "start", name)
    await start.wait()
    await _answers(port)
    took = system.now() - began
    stop = await asyncio.create_subprocess_exec("systemctl", "stop", name)
    await stop.wait()
    return took


async def _by_phalanx(registry: Registry, epoch: int) -> float:
    async def register(resource: Resource) -> None:
        await asyncio.to_thread(registry.add, resource)

    name, port = _BY_PHALANX
    check = config.TcpCheck(f"127.0.0.1:{port}", interval=0.1, timeout=1.0)
    backend = make_backend(config.Systemd(name, ready=check, ready_timeout=READY_TIMEOUT))
    section = SectionContext("bench", "n1", "wiki", epoch, register, registry.remove)
    began = system.now()
    running = await backend.start(section)
    await running.wait_ready()
    took = system.now() - began
    await running.kill()
    return took


async def _answers(port: int) -> None:
    async with asyncio.timeout(READY_TIMEOUT):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(_POLL_SECONDS)
            else:
                writer.close()
                return


if __name__ == "__main__":
    asyncio.run(_inside(int(sys.argv[1]), sys.argv[2]))
