"""A virtual address: how long a client on another host gets no answer, whatever happens to the active one."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.figures import Peer, Run
from benchmarks.vip_client import Client, claimants, program_start_seconds
from benchmarks.vip_keepalived import Keepalived
from phalanx.testing.netlab import Host
from phalanx.testing.vips import APP, VipStage

CABLE_TTL = 2.0
ASIDE_SECONDS = 2.5
"""A node that was asked to hand over leaves the app to others for 2 s."""

_ADVERTS = (1.0, 0.1)
_CLI = "from phalanx.cli.main import main; main()"


async def crash(run: Run) -> None:
    """SIGKILL of the active node: the outage less the program's own start, in ms."""
    _measure(run, lambda stage, active: stage.nodes[active].kill(), ttl=5.0)


async def planned(run: Run) -> None:
    """``phalanx switchover``: the outage less the program's own start, in ms."""
    _measure(run, _switch_over, ttl=5.0, pause=ASIDE_SECONDS)


async def cable(run: Run) -> None:
    """The active host's cable is pulled: the outage in s, the program's start included."""
    with VipStage(ttl=CABLE_TTL) as stage:
        for _ in range(run.runs):
            active = stage.settled()
            index = stage.names.index(active)
            await asyncio.sleep(1.0)
            with Client(stage.client, stage.vip) as client:
                await asyncio.sleep(0.3)
                stage.lab.cut_link(index)
                outage = client.outage(active, 20)
            run.add(outage, f"{outage:.3f} s, {active} to {stage.other(active)}")
            stage.lab.restore_link(index)


async def keepalived(run: Run) -> None:
    """A crash of daemon and program, in ms; and with real keepalived just so, advertising slowly and fast."""
    stale = _measure(run, lambda stage, active: stage.nodes[active].kill(), ttl=5.0)
    if stale:
        run.problems.append(f"the address of a dead node answered in {stale} of {run.runs}")
    for advert in _ADVERTS:
        outages: list[float] = []
        answered = 0
        with Keepalived(advert) as pair:
            for _ in range(run.runs):
                outage, answers = pair.crash()
                outages.append(1000 * outage)
                answered += answers
        median = statistics.median(outages)
        name = f"keepalived, advert {advert:g} s"
        run.say(f"{name}: {median:.1f} ms; the dead host still answers in {answered} of {run.runs}")
        if run.values and statistics.median(run.values) >= median:
            run.problems.append(f"{name} is not slower: {median:.1f} ms")
        run.peer = Peer(f"{name}; old address answers {answered} of {run.runs}", median, given=False)


def _measure(run: Run, harm: Callable[[VipStage, str], object], *, ttl: float, pause: float = 1.0) -> int:
    """Do *harm* to the active node again and again. In how many runs its address still answered then."""
    stale = 0
    with VipStage(ttl=ttl) as stage:
        start = program_start_seconds(stage.host("n1"))
        run.say(f"the program's own start: {1000 * start:.1f} ms")
        for _ in range(run.runs):
            active = stage.settled()
            time.sleep(pause)
            old = _mac(stage.host(active))
            with Client(stage.client, stage.vip) as client:
                time.sleep(0.3)
                harm(stage, active)
                outage = client.outage(active, 20)
            answers = old in claimants(stage.client, stage.vip)
            stale += answers
            took = 1000 * (outage - start)
            run.add(took, f"{took:.1f} ms, {active} to {stage.other(active)}{', and it answers!' * answers}")
            if not stage.nodes[active].is_running:
                stage.nodes[active].start()
    return stale


def _switch_over(stage: VipStage, active: str) -> None:
    nats = stage.config(active)["nats"]["urls"][0]
    command = [sys.executable, "-c", _CLI, "switchover", APP, "--platform", "test", "--nats", nats]
    done = stage.client.run(command, check=False)
    if done.returncode:
        raise subprocess.SubprocessError(done.stderr or done.stdout)


def _mac(host: Host) -> str:
    return host.run(["ip", "-br", "link", "show", "eth0"]).stdout.split()[2]
