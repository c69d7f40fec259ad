"""What ``phalanx doctor`` looks at of the declared apps on this host, as ``phalanx config check`` does."""

from __future__ import annotations

import asyncio
from collections.abc import Set

from phalanx import preflight
from phalanx.cli.findings import Finding, fail, ok, warn
from phalanx.errors import AddressError, BackendError
from phalanx.platform import Platform
from phalanx.ports import AddressClaim
from phalanx.types import Role

HOLDING = (Role.ACTIVATING, Role.ACTIVE, Role.STANDING_DOWN)
"""The roles in which a node has the addresses of an app."""


class AppChecks:
    """The checks of *platform*'s apps."""

    def __init__(self, platform: Platform) -> None:
        self._apps, self._config = platform.apps, platform.config
        self._misplaced: set[str] = set()
        """Apps whose addresses cannot be here: nobody is asked for those."""

    async def programs(self) -> list[Finding]:
        """Whether the apps' programs could be started here, and their addresses be taken."""
        found: list[Finding] = []
        for name, app in self._apps.items():
            problems = await app.problems()
            found += [_failed(problem) for problem in problems]
            kinds = {type(problem) for problem in problems}
            if app.config.backend is not None and BackendError not in kinds:
                found.append(ok("backend", f"app {name}: its program can be started on this host"))
            if AddressError in kinds:
                self._misplaced.add(name)
            elif app.config.vip:
                shown = ", ".join(declared.address for declared in app.config.vip)
                found.append(ok("addresses", f"app {name}: there is a place for {shown} on this host"))
        return found

    async def fence(self) -> list[Finding]:
        """Whether the fence command is there. It is not run."""
        if self._config.fence is None:
            return []
        if problem := await asyncio.to_thread(preflight.fence_problem, self._config.fence):
            return [fail("fence", f"{problem.value}: {problem.problem}", problem.remedy)]
        return [ok("fence", f"{self._config.fence.command[0]} can be run")]

    async def claims(self, held: Set[str]) -> list[Finding]:
        """Whether somebody else answers for the addresses of apps that no node holds.

        *held*: the apps whose addresses some node holds, which are not asked for.
        """
        asked = {
            name: app
            for name, app in self._apps.items()
            if app.config.vip and name not in held and name not in self._misplaced
        }
        answers = await asyncio.gather(*(app.address_claims() for app in asked.values()))
        found: list[Finding] = []
        for name, claims in zip(asked, answers, strict=True):
            found += [_claimed(name, claim) for claim in claims]
            if not claims:
                found.append(ok("addresses", f"app {name}: nobody else answers for its addresses"))
        return found


def _claimed(app: str, claim: AddressClaim) -> Finding:
    who = f"{' and '.join(claim.macs)} on {claim.interface}"
    text = f"app {app}: {claim.address} is answered by {who}, and no node is known to have it"
    return warn("addresses", text, "nobody can take it while that is so: find that host, or choose another")


def _failed(problem: BackendError | AddressError) -> Finding:
    check = "backend" if isinstance(problem, BackendError) else "addresses"
    where = f"{problem.address}: " if isinstance(problem, AddressError) else ""
    return fail(check, f"app {problem.app}: {where}{problem.problem}", problem.remedy)
