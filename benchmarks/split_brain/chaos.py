"""Faults of the network, freezes and kills, drawn from a seed; each is undone after a while."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from benchmarks.split_brain.stage import HOSTS, SERVERS, Stage, send
from phalanx import system

Fault = Callable[["Chaos", int], Coroutine[Any, Any, None]]
Say = Callable[[str], None]

RESTART_SECONDS = 0.5
"""A node that has ended is started again after this long, as systemd would."""

LOOK_SECONDS = 0.05
PAUSE_SECONDS = (3.0, 9.0)
"""Between the end of a fault and the next one."""


class Chaos:
    """Inflicts faults on *stage* until the time is up. What it does is in the history, too:
    ``fault``, ``majority`` (the hosts that must be served from then on), ``waking`` (see :mod:`.checker`)."""

    def __init__(self, stage: Stage, rng: random.Random, say: Say) -> None:
        self.stage, self.rng, self.say = stage, rng, say
        self.active = 0
        """The host of the program that answered last."""
        self.problems: list[str] = []
        self._epoch = 0
        self._bags: dict[int, list[str]] = {}
        self._held: set[int] = set()
        """Hosts whose node is not to be started again yet."""

    async def run(self, seconds: float) -> None:
        """Faults for that long; then everything is brought back."""
        end = system.now() + seconds
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(self._revive(), name="revive nodes"),
                tasks.create_task(self._follow(), name="follow"),
                tasks.create_task(self._majority(), name="majority"),
            ]
            while system.now() < end:
                await asyncio.sleep(self.rng.uniform(*PAUSE_SECONDS))
                async with asyncio.TaskGroup() as faults:
                    faults.create_task(self._inflict(NETWORK, 0.0), name="network fault")
                    # Each second fault alone, and some together.
                    if self.rng.random() < 0.3:
                        faults.create_task(self._inflict(PROCESSES, self.some(0, 1)), name="process fault")
                await asyncio.sleep(self.rng.uniform(*PAUSE_SECONDS))
                await self._inflict(PROCESSES, 0.0)
            self.say("no more faults; everything is brought back")
            for task in beside:
                task.cancel()
        await asyncio.to_thread(self._restore)

    def _restore(self) -> None:
        self.stage.lab.heal()
        self.stage.nats.start()
        self.stage.nodes.start()
        self._note_majority()

    async def _inflict(self, kinds: dict[str, Fault], delay: float) -> None:
        kind, host = self._drawn(kinds), self._target()
        await asyncio.sleep(delay)
        began = system.now()
        try:
            await kinds[kind](self, host)
        except (RuntimeError, ProcessLookupError, FileNotFoundError) as error:
            self.say(f"  {kind} n{host + 1}: came too late ({error})")
            return
        finally:
            if kinds is NETWORK:
                await asyncio.to_thread(self.stage.lab.heal)
        self.stage.history.record("fault", f"n{host + 1}", fault=kind, began=began)

    def _drawn(self, kinds: dict[str, Fault]) -> str:
        """Each kind comes as often as the others."""
        bag = self._bags.setdefault(id(kinds), [])
        if not bag:
            bag += kinds
            self.rng.shuffle(bag)
        return bag.pop()

    def _target(self) -> int:
        """Half of the time where it matters most. The draws do not depend on what has happened."""
        at_active, other = self.rng.random() < 0.5, self.rng.randrange(HOSTS)
        return self.active if at_active else other

    def some(self, least: float, most: float) -> float:
        """A random duration, given in TTLs, in seconds."""
        return self.rng.uniform(least, most) * self.stage.ttl

    def name_of(self, host: int) -> str:
        """The node there, and whether it was the last that answered."""
        return f"n{host + 1} (active)" if host == self.active else f"n{host + 1}"

    async def lasts(self, text: str, seconds: float) -> None:
        """Say what is done now, and let it last."""
        self.say(f"{text}, for {seconds:.1f} s")
        await asyncio.sleep(seconds)

    # --- what goes on meanwhile

    async def _revive(self) -> None:
        while True:
            await asyncio.sleep(RESTART_SECONDS)
            for host in range(HOSTS):
                node = self.stage.node(host)
                if not node.is_running and host not in self._held:
                    self.say(f"  {node.node} is started again")
                    node.start()

    async def _follow(self) -> None:
        while True:
            for event in self.stage.read():
                if event.kind == "answer" and event.epoch > self._epoch:
                    self.say(f"    {event.node} answers, epoch {event.epoch}")
                    self._epoch, self.active = event.epoch, int(event.node.removeprefix("n")) - 1
            await asyncio.sleep(LOOK_SECONDS)

    async def _majority(self) -> None:
        before: list[int] | None = None
        while True:
            before = self._note_majority(before)
            await asyncio.sleep(LOOK_SECONDS)

    def _note_majority(self, before: list[int] | None = None) -> list[int]:
        hosts = self.stage.majority()
        if hosts != before:
            self.stage.history.record("majority", clients=[f"c{host + 1}" for host in hosts])
        return hosts

    @contextlib.contextmanager
    def held(self, host: int) -> Generator[None]:
        """The node there is not started again meanwhile."""
        self._held.add(host)
        try:
            yield
        finally:
            self._held.discard(host)

    def woken(self, host: int, frozen_at: float, *, program: bool) -> None:
        """Node and keeper were stopped since *frozen_at*, the *program* too, and go on now."""
        self.stage.history.record("waking", f"n{host + 1}", frozen_at=frozen_at, program=program)


# --- the network


async def _one_way(chaos: Chaos, host: int) -> None:
    other = _another(chaos, host)
    sender, receiver = chaos.rng.choice([(host, other), (other, host)])
    await asyncio.to_thread(chaos.stage.lab.drop, sender, receiver)
    await chaos.lasts(f"nothing from n{sender + 1} arrives at n{receiver + 1}", chaos.some(0.5, 4))


async def _one_way_all(chaos: Chaos, host: int) -> None:
    sends = chaos.rng.random() < 0.5
    for other in range(HOSTS):
        if other != host:
            await asyncio.to_thread(chaos.stage.lab.drop, *((host, other) if sends else (other, host)))
    how = "is not heard by anybody" if sends else "hears nobody"
    await chaos.lasts(f"{chaos.name_of(host)} {how}", chaos.some(0.5, 4))


async def _both_ways(chaos: Chaos, host: int) -> None:
    other = _another(chaos, host)
    await asyncio.to_thread(chaos.stage.lab.cut, host, other)
    await chaos.lasts(
        f"{chaos.name_of(host)} and n{other + 1} are cut off from each other", chaos.some(0.5, 4)
    )


async def _isolated(chaos: Chaos, host: int) -> None:
    await asyncio.to_thread(chaos.stage.lab.isolate, host)
    await chaos.lasts(f"{chaos.name_of(host)} is cut off from everybody", chaos.some(0.5, 4))


async def _cable(chaos: Chaos, host: int) -> None:
    await asyncio.to_thread(chaos.stage.lab.cut_link, host)
    await chaos.lasts(f"the cable of {chaos.name_of(host)} is pulled", chaos.some(0.5, 4))


async def _minority(chaos: Chaos, host: int) -> None:
    await _parted(chaos, [host, _another(chaos, host)])


async def _majority(chaos: Chaos, host: int) -> None:
    others = [other for other in range(HOSTS) if other != host]
    chaos.rng.shuffle(others)
    await _parted(chaos, [host, *others[:2]])


async def _parted(chaos: Chaos, group: list[int]) -> None:
    rest = [other for other in range(HOSTS) if other not in group]
    await asyncio.to_thread(chaos.stage.lab.partition, group, rest)
    one, other = (" ".join(chaos.name_of(host) for host in sorted(hosts)) for hosts in (group, rest))
    await chaos.lasts(f"partition: {one} | {other}", chaos.some(0.5, 4))


async def _from_nats(chaos: Chaos, host: int) -> None:
    # One beside a NATS server still has that one, which is alone then for it: so mostly those without.
    host = host if chaos.rng.random() < 0.3 else chaos.rng.randrange(SERVERS, HOSTS)
    for server in range(SERVERS):
        if server != host:
            port = chaos.stage.nats.port(server)
            await asyncio.to_thread(chaos.stage.lab.cut_port, host, server, port)
    await chaos.lasts(f"{chaos.name_of(host)} is cut off from the NATS servers alone", chaos.some(0.5, 4))


async def _servers_apart(chaos: Chaos, host: int) -> None:
    nats, lab = chaos.stage.nats, chaos.stage.lab
    alone = chaos.rng.randrange(SERVERS)
    all_apart = chaos.rng.random() < 0.25
    for one in range(SERVERS):
        for other in range(SERVERS):
            if one != other and (all_apart or alone in (one, other)):
                await asyncio.to_thread(lab.cut_port, one, other, nats.route_port(other))
    what = "all NATS servers are" if all_apart else f"NATS server {nats.name(alone)} is"
    await chaos.lasts(f"{what} cut off from the others", chaos.some(0.5, 4))


async def _switch_gone(chaos: Chaos, host: int) -> None:
    await asyncio.to_thread(chaos.stage.lab.stop_switch)
    await chaos.lasts("the switch is gone", chaos.some(0.2, 3))


async def _loss(chaos: Chaos, host: int) -> None:
    fraction = chaos.rng.uniform(0.05, 0.6)
    await asyncio.to_thread(chaos.stage.lab.lose, host, fraction)
    await chaos.lasts(
        f"{chaos.name_of(host)} loses {100 * fraction:.0f} % of its packets", chaos.some(0.5, 4)
    )


async def _flapping(chaos: Chaos, host: int) -> None:
    up, down = chaos.some(0.05, 0.6), chaos.some(0.05, 0.6)
    chaos.stage.lab.flap_link(host, up_seconds=up, down_seconds=down)
    await chaos.lasts(
        f"the link of {chaos.name_of(host)} flaps: {up:.1f} s up, {down:.1f} s down", chaos.some(1, 5)
    )


def _another(chaos: Chaos, host: int) -> int:
    return (host + chaos.rng.randrange(1, HOSTS)) % HOSTS


# --- processes


async def _kill_node(chaos: Chaos, host: int) -> None:
    chaos.say(f"SIGKILL {chaos.name_of(host)}")
    chaos.stage.node(host).kill()


async def _kill_keeper(chaos: Chaos, host: int) -> None:
    chaos.say(f"SIGKILL the keeper of {chaos.name_of(host)}")
    chaos.stage.node(host).kill_keeper()


async def _kill_both(chaos: Chaos, host: int) -> None:
    with chaos.held(host):
        chaos.stage.node(host).kill_both()
        await chaos.lasts(f"SIGKILL {chaos.name_of(host)} and its keeper, gone", chaos.some(0, 2))


async def _kill_program(chaos: Chaos, host: int) -> None:
    host = chaos.active
    chaos.say(f"SIGKILL the program on {chaos.name_of(host)}")
    send(chaos.stage.program_pids(host), signal.SIGKILL)


async def _kill_host(chaos: Chaos, host: int) -> None:
    """As the loss of power, but for what is in the page cache."""
    seconds, nats = chaos.some(0.5, 3), chaos.stage.nats
    with chaos.held(host):
        pids = chaos.stage.pids(host)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            send(pids, number)
        if host < SERVERS:
            nats.kill(host)
        await chaos.lasts(f"host of {chaos.name_of(host)} is lost with all that runs there", seconds)
        if host < SERVERS:
            nats.start(host)


async def _freeze_node(chaos: Chaos, host: int) -> None:
    node = chaos.stage.node(host)
    node.freeze()
    await chaos.lasts(f"SIGSTOP {chaos.name_of(host)}", chaos.some(0.2, 3))
    if node.is_running:
        node.thaw()


async def _freeze_keeper(chaos: Chaos, host: int) -> None:
    pid = chaos.stage.node(host).keeper_pid
    send([pid], signal.SIGSTOP)
    await chaos.lasts(f"SIGSTOP the keeper of {chaos.name_of(host)}", chaos.some(0.2, 3))
    send([pid], signal.SIGCONT)


async def _freeze_both(chaos: Chaos, host: int) -> None:
    node, began = chaos.stage.node(host), system.now()
    pids = [node.keeper_pid, node.pid]
    send(pids, signal.SIGSTOP)
    await chaos.lasts(f"SIGSTOP {chaos.name_of(host)} and its keeper, not the program", chaos.some(0.2, 3))
    chaos.woken(host, began, program=False)
    send(pids[::-1], signal.SIGCONT)


async def _freeze_program(chaos: Chaos, host: int) -> None:
    host = chaos.active
    pids = chaos.stage.program_pids(host)
    send(pids, signal.SIGSTOP)
    await chaos.lasts(f"SIGSTOP the program on {chaos.name_of(host)}", chaos.some(0.2, 3))
    send(pids, signal.SIGCONT)


async def _freeze_host(chaos: Chaos, host: int) -> None:
    nats, began = chaos.stage.nats, system.now()
    pids = chaos.stage.pids(host)
    send(pids, signal.SIGSTOP)
    if host < SERVERS:
        nats.freeze(host)
        chaos.stage.frozen_servers.add(host)
    await chaos.lasts(f"host of {chaos.name_of(host)} stands still", chaos.some(0.2, 3))
    chaos.woken(host, began, program=True)
    if host < SERVERS:
        nats.thaw(host)
        chaos.stage.frozen_servers.discard(host)
    # In the order in which they were stopped: nobody's, as when a virtual machine goes on.
    send(pids, signal.SIGCONT)


async def _kill_server(chaos: Chaos, host: int) -> None:
    server = host if host < SERVERS else chaos.rng.randrange(SERVERS)
    chaos.stage.nats.kill(server)
    await chaos.lasts(f"SIGKILL NATS server {chaos.stage.nats.name(server)}", chaos.some(0.2, 3))
    await asyncio.to_thread(chaos.stage.nats.start, server)


async def _freeze_server(chaos: Chaos, host: int) -> None:
    nats = chaos.stage.nats
    server = host if host < SERVERS else chaos.rng.randrange(SERVERS)
    nats.freeze(server)
    chaos.stage.frozen_servers.add(server)
    await chaos.lasts(f"SIGSTOP NATS server {nats.name(server)}", chaos.some(0.2, 3))
    nats.thaw(server)
    chaos.stage.frozen_servers.discard(server)


NETWORK: dict[str, Fault] = {
    "one way": _one_way,
    "one way, all": _one_way_all,
    "both ways": _both_ways,
    "isolated": _isolated,
    "cable": _cable,
    "minority": _minority,
    "majority": _majority,
    "from NATS": _from_nats,
    "NATS apart": _servers_apart,
    "switch": _switch_gone,
    "loss": _loss,
    "flapping": _flapping,
}
PROCESSES: dict[str, Fault] = {
    "kill node": _kill_node,
    "kill keeper": _kill_keeper,
    "kill both": _kill_both,
    "kill program": _kill_program,
    "kill host": _kill_host,
    "kill NATS": _kill_server,
    "freeze node": _freeze_node,
    "freeze keeper": _freeze_keeper,
    "freeze both": _freeze_both,
    "freeze program": _freeze_program,
    "freeze host": _freeze_host,
    "freeze NATS": _freeze_server,
}
"""Name → fault; each gets the host that it is at work on."""
