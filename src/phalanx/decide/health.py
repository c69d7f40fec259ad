"""What an app's health is, given how its checks went. Pure: times and probes are the caller's.

A check goes ill after so many failed runs in a row, and well after so many good ones. Before it has done
either it is unknown, except that its first good run makes it healthy: one look is enough to start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from phalanx.types import Health


class Rule(msgspec.Struct, frozen=True):
    """What decides about one check: its thresholds (runs in a row), what it depends on, when it runs."""

    name: str
    failures: int = 3
    successes: int = 1
    depends_on: tuple[str, ...] = ()
    always: bool = False


class Tally(msgspec.Struct, frozen=True):
    """How one check has gone. Of ``failures`` and ``successes`` in a row one is always 0."""

    health: Health = Health.UNKNOWN
    failures: int = 0
    successes: int = 0

    def after(self, passed: bool, rule: Rule) -> Tally:
        """One more run."""
        if not passed:
            failures = self.failures + 1
            return Tally(Health.UNHEALTHY if failures >= rule.failures else self.health, failures, 0)
        successes = self.successes + 1
        wanted = rule.successes if self.health is Health.UNHEALTHY else 1
        return Tally(Health.HEALTHY if successes >= wanted else self.health, 0, successes)


class Verdict(msgspec.Struct, frozen=True):
    """The health of an app, and why it is not better; the reason of a healthy one is empty."""

    health: Health
    reason: str = ""


def running(rules: Iterable[Rule], *, active: bool) -> tuple[Rule, ...]:
    """The checks that run: all in the active section, else only those that always do."""
    return tuple(rule for rule in rules if active or rule.always)


def waits_for(rule: Rule, rules: Iterable[Rule], tallies: Mapping[str, Tally]) -> tuple[str, ...]:
    """The checks among *rules* that must be healthy, and are not, before *rule* counts and is run.

    Over any number of steps: what depends on an ill check is itself nobody's proof of health. Those that
    don't run (are not among *rules*) hold nobody up.
    """
    by_name = {one.name: one for one in rules}
    found: list[str] = []
    seen, waiting = {rule.name}, list(reversed(rule.depends_on))
    while waiting:
        name = waiting.pop()
        if name in seen or name not in by_name:
            continue
        seen.add(name)
        if tallies.get(name, Tally()).health is not Health.HEALTHY:
            found.append(name)
        waiting += reversed(by_name[name].depends_on)
    return tuple(found)


def judge(rules: Iterable[Rule], tallies: Mapping[str, Tally], details: Mapping[str, str]) -> Verdict:
    """The verdict of the running checks *rules*: ill if one is that counts, else unknown if one is.

    A check that waits for another does not count: the other one is ill or unknown, and says enough.
    *details* are what each check saw last. No checks at all: unknown.
    """
    rules = tuple(rules)
    if not rules:
        return Verdict(Health.UNKNOWN)
    counting = [rule for rule in rules if not waits_for(rule, rules, tallies)]
    for health, otherwise in ((Health.UNHEALTHY, "failed"), (Health.UNKNOWN, "no result yet")):
        such = [rule.name for rule in counting if tallies.get(rule.name, Tally()).health is health]
        if such:
            return Verdict(health, "; ".join(f"{name}: {details.get(name) or otherwise}" for name in such))
    return Verdict(Health.HEALTHY if counting else Health.UNKNOWN)
