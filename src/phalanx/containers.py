"""Containers as the host sees them: their processes, and their certain end, whatever the Docker Engine does.

Blocking and small, with the standard library only: the keeper ends containers with this, in a thread.
Sources: the Engine API (docs.docker.com/reference/api/engine), proc_pid_cgroup(5).

A container's processes are those with its id in their control group's path: both of Docker's cgroup drivers
put it there (``/docker/<id>``, ``/system.slice/docker-<id>.scope``). They can be seen where the engine runs
on this very host and we share its PID namespace; :func:`find` says so of a container that runs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import time
from typing import Any, NamedTuple, cast
from urllib.parse import quote, urlencode

from phalanx import system
from phalanx.types import Resource

REQUEST_SECONDS = 2.0
"""An engine that takes longer for one answer counts as silent."""

PING_SECONDS = 0.5
"""The same for the least that can be asked, when nobody has to wait for more: all its processes are gone."""

_POLL_SECONDS = 0.02
_SECOND_LOOK_SECONDS = 0.25
"""When a request to start may still be under way, a container that does not run is looked at once more."""


class EngineSilent(Exception):
    """The engine cannot be reached, or does not answer."""


class Target(NamedTuple):
    """A container to be ended. *remove*: it was made for one start, so it goes with its anonymous volumes.

    *pid*, *start_time*: its first process, as this host sees it; 0 where that is not known, or it has not
    been seen to run.
    """

    socket: str
    id: str
    remove: bool
    pid: int = 0
    start_time: int = 0

    @classmethod
    def of(cls, resource: Resource) -> Target:
        """What a resource of kind ``container`` stands for; :meth:`details` are its details."""
        details = resource.details
        return cls(
            details["socket"],
            details["container"],
            details.get("made") == "yes",
            int(details.get("pid", "0")),
            resource.start_time,
        )

    def details(self) -> dict[str, str]:
        """As a resource carries it, together with ``start_time``. Described in docs/storage.md."""
        pid = {"pid": str(self.pid)} if self.pid else {}
        return {
            "socket": self.socket,
            "container": self.id,
            "made": "yes" if self.remove else "no",
            **pid,
        }


class Report(NamedTuple):
    """What :func:`end` did. *gone*: nothing of it runs, for certain. *problem*: what went wrong otherwise."""

    gone: bool
    killed: tuple[int, ...] = ()
    problem: str = ""


# --- processes


def find(container: str) -> list[system.ProcessRef]:
    """The running processes of the container with that id (64 hex digits), of those this host can see."""
    if len(container) < 12:
        raise ValueError(f"not the id of a container: {container!r}")
    found: list[system.ProcessRef] = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/cgroup") as file:
                is_member = container in file.read()
        except OSError:
            continue
        if is_member and (one := system.ProcessRef.of(int(name))).alive():
            found.append(one)
    return found


def _kill_processes(target: Target, deadline: float) -> tuple[set[int], bool]:
    """SIGKILL what runs of it. Whom; and whether nobody is left, seen twice. Raises PermissionError."""
    killed: set[int] = set()
    first = system.ProcessRef(target.pid, target.start_time)
    clean = 0
    while clean < 2:
        # The first process takes the others of its PID namespace with it; so it goes first.
        alive = sorted(find(target.id), key=lambda one: one != first)
        clean = 0 if alive else clean + 1
        for one in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
            killed.add(one.pid)
        while any(one.alive() for one in alive):
            if system.now() > deadline:
                return killed, False
            time.sleep(0.001)
    return killed, True


# --- the engine


class Engine:
    """Requests to the Engine API, one connection each. Raises EngineSilent."""

    def __init__(self, path: str, timeout_seconds: float = REQUEST_SECONDS) -> None:
        self._path, self._timeout = path, timeout_seconds

    def request(self, method: str, path: str, **query: str) -> tuple[int, dict[str, Any]]:
        """The answer's status and, where it is a JSON object, its content."""
        connection = _Connection(self._path, self._timeout)
        try:
            connection.request(method, f"{path}?{urlencode(query)}" if query else path)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineSilent(f"{self._path}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        content: object = None
        with contextlib.suppress(ValueError):
            content = json.loads(data)
        return answer.status, cast("dict[str, Any]", content) if isinstance(content, dict) else {}

    def state(self, container: str) -> dict[str, Any] | None:
        """``State`` of the container's inspection; None if there is none of that id."""
        status, content = self.request("GET", f"/containers/{quote(container)}/json")
        if status == 404:
            return None
        if status != 200:
            raise EngineSilent(f"inspection answers {status}: {content.get('message', '')}")
        return cast("dict[str, Any]", content.get("State") or {})


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_seconds: float) -> None:
        super().__init__("docker", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def runs(state: dict[str, Any] | None) -> bool:
    """Whether a container in that state has processes, or could get some without being asked."""
    return state is not None and any(state.get(key) for key in ("Running", "Paused", "Restarting"))


# --- its end


def end(target: Target, deadline_seconds: float = 2 * REQUEST_SECONDS) -> Report:
    """Kill the container at once, and remove it if it is to be removed. Doing it again is harmless.

    Its processes are killed by this host where it can see them, so that an engine that hangs delays nothing;
    then the engine is asked. Only a look that finds nobody, or the engine's word, makes it ``gone``. What an
    engine that hangs has not removed then is removed at the next start.
    """
    deadline = system.now() + deadline_seconds
    killed: set[int] = set()
    seen_gone, problem = False, ""
    if target.pid:
        try:
            killed, seen_gone = _kill_processes(target, deadline)
        except PermissionError:
            problem = "no right to kill its processes"  # not root: the engine has to do it
        except OSError as error:
            problem = f"cannot see its processes: {error}"
    try:
        if seen_gone:
            Engine(target.socket, PING_SECONDS).request("GET", "/_ping")
        gone, problem = _end_by_engine(target, deadline)
    except EngineSilent as error:
        return Report(seen_gone, tuple(sorted(killed)), f"the Docker Engine is silent: {error}")
    return Report(gone, tuple(sorted(killed)), problem)


def _end_by_engine(target: Target, deadline: float) -> tuple[bool, str]:
    engine, path = Engine(target.socket), f"/containers/{quote(target.id)}"
    if target.remove:
        status, content = engine.request("DELETE", path, force="true", v="true")
        if status in (204, 404):
            return True, ""
        problem = str(content.get("message", status))  # a mount that is busy, say: it may be dead or not
    else:
        problem = ""
    looked_again = bool(target.pid) or target.remove
    while True:
        state = engine.state(target.id)
        if not runs(state):
            if looked_again:
                return True, problem
            looked_again = True
            time.sleep(_SECOND_LOOK_SECONDS)
            continue
        if system.now() > deadline:
            return False, problem or "it does not die"
        if state and state.get("Paused"):
            engine.request("POST", f"{path}/unpause")  # what is frozen cannot die
        engine.request("POST", f"{path}/kill", signal="SIGKILL")
        time.sleep(_POLL_SECONDS)
