"""Many deadlines at once."""

from __future__ import annotations

import asyncio

from tests.waiting import until

from phalanx.aio import Deadlines


async def test_deadlines_are_found_over_and_those_removed_are_not() -> None:
    """Each once and never too early; what was removed is not told of, nor what was closed."""
    over = list[str]()
    deadlines: Deadlines[str] = Deadlines(over.append)
    loop = asyncio.get_running_loop()
    began = loop.time()
    slots = {name: deadlines.add(name, 0.05) for name in ("a", "b", "c")}
    deadlines.add("never", 600)
    deadlines.remove("b", slots["b"])
    deadlines.remove("b", slots["b"])
    await until(lambda: len(over) == 2)
    assert loop.time() - began >= 0.05
    assert sorted(over) == ["a", "c"]
    deadlines.remove("a", slots["a"])
    deadlines.close()
    assert sorted(over) == ["a", "c"]


async def test_deadlines_that_are_far_leave_nothing_behind() -> None:
    """Calls with long timeouts that are answered soon keep no timer."""
    deadlines: Deadlines[int] = Deadlines(lambda _: None)
    for number in range(1000):
        deadlines.remove(number, deadlines.add(number, 3600 + number))
    assert not deadlines._slots
