"""What the node has running, and how the keeper makes sure that it is gone.

The list is also kept in a file, so that a keeper which starts after both died (node and keeper
killed at once) finds the left-overs and kills them before its node may become active.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path

import msgspec

from phalanx import cgroup_v2, system
from phalanx.keeper import containers, units
from phalanx.keeper.addresses import drop
from phalanx.types import Resource

log = logging.getLogger("phalanx.keeper")

REGISTERED = "registered.json"
"""What is registered, in a file of the node's data directory."""

KILL_DEADLINE_SECONDS = 2.0
BOOT_SLACK_SECONDS = 2.0
"""A file that is so much older than the boot, by the wall clock, is of an earlier one."""

ADDRESSES_WAIT_SECONDS = 0.2
"""How long addresses wait for the end of the programs behind them."""

_RETRY_SECONDS = 0.1
_FIND_SECONDS = 0.25


class _File(msgspec.Struct):
    boot_id: str
    resources: list[Resource]


class LeftOversUnknown(Exception):
    """What an earlier life of the node has left running cannot be known."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path} {problem}, so what an earlier life of this node has left is unknown; see that nothing "
            "of its apps runs on this host, then remove the file"
        )


class Registry:
    """The registered resources, in memory and in ``<state_dir>/registered.json``."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / REGISTERED
        self._resources: dict[str, Resource] = {}

    def __len__(self) -> int:
        return len(self._resources)

    @property
    def resources(self) -> list[Resource]:
        """What is registered, in order of registration."""
        return list(self._resources.values())

    @property
    def has_sections(self) -> bool:
        """Whether code inside the node itself is active."""
        return any(resource.kind == "section" for resource in self._resources.values())

    def add(self, resource: Resource) -> None:
        """Register; returns once the file holds it too (sections die with the node: memory is enough).

        Raises OSError if the file can't be written. What ran before it stays registered, as it is now: the
        node has to take back what it does not start, or has killed.
        """
        is_new = resource.id not in self._resources
        self._resources[resource.id] = resource
        if resource.kind == "section":
            return
        try:
            self._save()
        except OSError:
            if is_new:
                del self._resources[resource.id]
            raise

    def remove(self, resource_id: str) -> None:
        """Forget something that has ended. Never fails: a file that says too much does no harm.

        What it names too much no longer runs, and no other process ever has its marker.
        """
        gone = self._resources.pop(resource_id, None)
        if gone is not None and gone.kind != "section":
            try:
                self._save()
            except OSError as error:
                log.error("%s: still names %s, which has ended: %s", self._path, resource_id, error)

    def _save(self) -> None:
        # No fsync: after a power loss the boot id differs and nothing of this runs any more.
        lasting = [r for r in self._resources.values() if r.kind != "section"]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(_File(system.boot_id(), lasting)))
        temporary.replace(self._path)

    def left_over(self) -> list[Resource]:
        """What an earlier life of this node on this boot had registered and not removed.

        Raises LeftOversUnknown: then something may run of which nobody knows, and nothing may begin here.
        """
        try:
            saved = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except (FileNotFoundError, IsADirectoryError):
            return []  # a folder: no keeper has ever written anything there
        except (msgspec.DecodeError, json.JSONDecodeError) as error:
            if self._is_of_an_earlier_boot():
                log.warning("%s is damaged (%s), by a loss of power: nothing of it runs", self._path, error)
                return []
            raise LeftOversUnknown(self._path, f"is damaged ({error})") from error
        except OSError as error:
            raise LeftOversUnknown(self._path, f"cannot be read ({error.strerror})") from error
        return saved.resources if saved.boot_id == system.boot_id() else []

    def _is_of_an_earlier_boot(self) -> bool:
        booted_at = system.wall() - system.now()
        return self._path.stat().st_mtime < booted_at - BOOT_SLACK_SECONDS


Known = dict[str, list[system.ProcessRef]]
"""Processes that were seen, by resource id."""


class NodeProcess:
    """The node: the keeper's parent, or one that has taken it up later (*ref*)."""

    def __init__(self, pid: int, ref: system.ProcessRef | None = None) -> None:
        self.pid, self._ref = pid, ref

    def lives(self) -> bool:
        """Whether it runs. A parent's pid is the node's while it is our parent."""
        return os.getppid() == self.pid if self._ref is None else self._ref.alive()

    def kill(self) -> None:
        """SIGKILL it, if it lives."""
        if self.lives():
            os.kill(self.pid, signal.SIGKILL)

    async def gone(self) -> None:
        """Wait until it has ended: SIGKILL is obeyed soon, but not at once. The caller goes on renewing."""
        while self.lives():  # noqa: ASYNC110 - the kernel tells a child by giving it another parent
            await asyncio.sleep(0.001)


async def find_processes(resources: list[Resource]) -> Known:
    """The processes of *resources*, to be looked for before the node is killed.

    The kernel kills its programs with it, and then the children that only they can tell of are hidden.
    """
    processes = [resource for resource in resources if resource.kind == "process"]
    try:
        async with asyncio.timeout(_FIND_SECONDS):
            found = await asyncio.gather(*(asyncio.to_thread(_find_one, resource) for resource in processes))
    except TimeoutError:  # /proc hangs: the node has to die nevertheless
        log.error("its processes were not seen within %g s", _FIND_SECONDS)
        return {}
    return {resource.id: known for resource, known in zip(processes, found, strict=True)}


def _find_one(resource: Resource) -> list[system.ProcessRef]:
    try:
        return system.find_processes(resource.id, resource.pgid or None, start_time=resource.start_time)
    except OSError as error:
        log.error("app %s: cannot see its processes: %s", resource.app, error)
        return []


async def kill_resources(resources: list[Resource], known: Known | None = None) -> bool:
    """Kill every program of *resources*, and what is *known*, then drop the addresses; True once all of it is
    seen to be gone.

    Addresses go last, so that the connections of the killed are closed from the address that the clients
    know; but they do not wait for what does not die.
    """
    programs = [resource for resource in resources if resource.kind not in ("section", "vip")]
    addresses = [resource for resource in resources if resource.kind == "vip"]
    killing = [
        asyncio.create_task(asyncio.to_thread(_kill_one, resource, tuple((known or {}).get(resource.id, ()))))
        for resource in programs
    ]
    if killing and addresses:
        await asyncio.wait(killing, timeout=ADDRESSES_WAIT_SECONDS)
    dropping = [asyncio.create_task(asyncio.to_thread(_kill_one, resource, ())) for resource in addresses]
    if all(await asyncio.gather(*killing, *dropping)):
        return True
    await asyncio.sleep(_RETRY_SECONDS)
    return False


def _kill_one(resource: Resource, known: tuple[system.ProcessRef, ...]) -> bool:
    """Whether all of it is seen to be gone. Never raises: a keeper that ends would leave it running."""
    try:
        match resource.kind:
            case "process":
                return _kill_process(resource, known)
            case "unit":
                return units.kill(resource)
            case "vip":
                return drop(resource)
            case "container":
                return containers.kill(resource)
            case kind:
                log.critical("app %s: nobody here can end a %s (%s)", resource.app, kind, resource.id)
                return False
    except Exception:
        log.exception("app %s: %s %s could not be ended", resource.app, resource.kind, resource.id)
        return False


def _kill_process(resource: Resource, known: tuple[system.ProcessRef, ...]) -> bool:
    try:
        report = system.kill_marked(
            resource.id,
            pgid=resource.pgid or None,
            start_time=resource.start_time,
            known=known,
            deadline_seconds=KILL_DEADLINE_SECONDS,
        )
    except (OSError, ValueError) as error:
        log.error("app %s: cannot see whether all of it is gone: %s", resource.app, error)
        return False
    remaining = report.remaining
    if not remaining and (path := resource.details.get("cgroup", "")):
        try:
            remaining = tuple(cgroup_v2.kill_and_remove(path, KILL_DEADLINE_SECONDS))
        except (OSError, ValueError) as error:
            log.error("app %s: cannot see whether %s is empty: %s", resource.app, path, error)
            return False
    if remaining:
        log.error("app %s: processes %s do not die", resource.app, remaining)
    elif report.killed:
        log.warning("app %s: killed processes %s of epoch %d", resource.app, report.killed, resource.epoch)
    return not remaining
