"""The third part: a virtual address on hosts of their own, as network namespaces. Needs root.

Three nodes with their own network each, a client on a fourth host; the NATS server is on a fifth.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from examples.demo.timeline import Timeline
from phalanx import system
from phalanx.testing.netlab import NetLabError
from phalanx.testing.vips import Answer, VipStage

TTL_SECONDS = 2.0
_EVERY_SECONDS = 0.01


class _Harm(NamedTuple):
    """What is done to the active node, and how long an outage is borne: five hosts share this machine."""

    title: str
    do: Callable[[VipStage, str], object]
    bound_seconds: float


_HARMS = (
    _Harm("SIGKILL of the active node", lambda stage, node: stage.nodes[node].kill(), 2.0),
    _Harm("SIGTERM of the active node", lambda stage, node: stage.nodes[node].terminate(), 2.0),
    _Harm(
        "the cable of the active host is pulled",
        lambda stage, node: stage.lab.cut_link(stage.names.index(node)),
        2 * TTL_SECONDS,
    ),
)


class _Asking:
    """The client: asks again and again, and notes who answered when."""

    def __init__(self, stage: VipStage) -> None:
        self._stage = stage
        self.answers: list[tuple[float, Answer]] = []
        self.requests = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_EVERY_SECONDS):
            answer = self._stage.ask(timeout=0.1)
            self.requests += 1
            if answer.node:
                self.answers.append((system.now(), answer))

    def outage(self) -> float:
        """The longest time between two answers."""
        times = [at for at, _ in self.answers]
        return max((after - before for before, after in itertools.pairwise(times)), default=0.0)

    def went_back(self) -> bool:
        """Whether an epoch answered after a later one."""
        epochs = [answer.epoch for _, answer in self.answers]
        return epochs != sorted(epochs)


def run(timeline: Timeline) -> tuple[list[str], int]:
    """The whole part: what went wrong, and how many requests were sent. Without root it says so, and that is
    all."""
    timeline.title("a virtual address")
    try:
        with VipStage(3, ttl=TTL_SECONDS) as stage:
            return _play(stage, timeline)
    except NetLabError as error:
        timeline.say("demo", f"left out here: {error}")
        return [], 0
    except TimeoutError as error:
        return [str(error).splitlines()[0]], 0


def _play(stage: VipStage, timeline: Timeline) -> tuple[list[str], int]:
    problems: list[str] = []
    requests = 0
    timeline.say("demo", f"three hosts in network namespaces, the address {stage.vip}, a client on a fourth")
    for harm in _HARMS:
        active = stage.settled()
        timeline.say("client", f"{stage.vip} is answered by {active}, epoch {stage.ask().epoch}")
        with _Asking(stage) as asking:
            stage.wait_until(lambda asking=asking: asking.answers, "nobody answers the client")
            timeline.say("demo", f"{harm.title}: {active}")
            harm.do(stage, active)
            after = stage.wait_for_active(other_than=active)
            time.sleep(0.2)  # whoever answers too, against all promises, has time to do so
        requests += asking.requests
        outage = asking.outage()
        timeline.say("client", f"{stage.vip} is answered by {after}; outage {1000 * outage:.0f} ms")
        if asking.went_back():
            problems.append(f"{harm.title}: an old epoch answered after a newer one")
        if outage > harm.bound_seconds:
            problems.append(f"{harm.title}: an outage of {outage:.1f} s, more than {harm.bound_seconds:g} s")
        stage.lab.heal()
        if harm.title.startswith("SIGTERM"):
            stage.nodes[active].wait(20)
        if not stage.nodes[active].is_running:
            stage.nodes[active].start()
        stage.wait_until(
            lambda active=active: stage.vip not in stage.host(active).addresses(), f"{active} still has it"
        )
    return problems, requests
