"""The first part: an HTTP server, and what a client sees of the faults."""

from __future__ import annotations

from examples.demo.client import EVERY_SECONDS
from examples.demo.part import HEAL_SECONDS, Part
from examples.demo.promises import Fault
from phalanx import system


class HttpPart(Part):
    """Three nodes, one of which serves a file."""

    def _introduce(self) -> None:
        app, port = self._hosts.app, self._client.port
        self._say("demo", f"app {app!r}, active-passive; its program: uploadserver, on port {port}")
        self._say("client", f"asks every {1000 * EVERY_SECONDS:g} ms, each time on a new connection")

    def _prepare(self) -> None:
        self._wait(lambda: not self._misplaced(), self._misplaced, HEAL_SECONDS)

    def _play(self, fault: Fault) -> None:
        self.outcomes.append(self._inflict(fault))
        self._timeline.outcome(self.outcomes[-1])
        self._heal()

    def _cause(self, fault: Fault, active: str) -> float:
        return {
            "kill": self._kill,
            "handover": self._hand_over,
            "nats": self._kill_nats,
            "freeze": self._freeze,
            "host": self._kill_host,
        }[fault.key](active)

    def _kill_nats(self, active: str) -> float:
        host = self._wait_for(
            lambda: next((host for host in self._hosts if host.leads_stream()), None),
            lambda: "no NATS server leads the app's stream",
            10,
        )
        side = "the host of the active node" if host.name == active else f"not on {active}'s host"
        self._say("demo", f"kill -KILL: the NATS server of {host.name} ({side})")
        began = system.now()
        host.kill_nats()
        return began

    def _freeze(self, active: str) -> float:
        node = self._hosts[active].node
        self._say("demo", f"kill -STOP {node.pid}: {active}, which is active, stands still")
        began = system.now()
        node.freeze()
        self._wait(
            lambda: not node.is_running, lambda: f"{active} stands still, its program goes on serving", 10
        )
        self._say("demo", f"{active} was killed by its keeper; kill -CONT finds nobody")
        return began

    def _kill_host(self, active: str) -> float:
        host = self._hosts[active]
        self._say("demo", f"kills all of {active}, which is active: nobody is left to tell of it")
        began = system.now()
        host.die([program.pid for program in self._programs.running() if program.node == active])
        return began
