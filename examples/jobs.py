"""A scheduler that gives work to a pool: each job is taken from one list, and done by whichever node is free.

Run it on every node: ``phalanx run examples.jobs:platform``. Then, from anywhere::

    phalanx call scheduler submit '[3, 4, 5]'
    phalanx call scheduler results
    phalanx scale workers 1

The scheduler is active on one node (it decides, so there must not be two), the workers on two. A job that a
node did not answer for is given to another one: ``square`` is idempotent, so it may be done twice.
"""

from __future__ import annotations

import asyncio

from phalanx import ActiveContext, CallContext, CallError, Platform, Pool

AT_A_TIME = 8

platform = Platform("prod", nats="nats://127.0.0.1:4222")
scheduler = platform.app("scheduler")
workers = platform.app("workers", Pool(replicas=2))


# --- the pool


@workers.handle("square", idempotent=True)
async def square(number: int, ctx: CallContext) -> tuple[int, str]:
    """The work: any instance will do."""
    await asyncio.sleep(0.02)
    return number * number, ctx.node


# --- the scheduler


@scheduler.handle("submit")
async def submit(numbers: list[int], ctx: CallContext) -> int:
    """Put jobs on the list, which outlives this node."""
    await ctx.kv.put_many({f"job.{number}": number for number in numbers})
    return len(numbers)


@scheduler.handle("results", idempotent=True)
async def results(ctx: CallContext) -> dict[str, tuple[int, str]]:
    """What is done: the square, and which node has computed it."""
    found: dict[str, tuple[int, str]] = {}
    for key in await ctx.kv.keys("done."):
        found[key.removeprefix("done.")] = await ctx.kv.value(key, tuple[int, str], (0, ""))
    return found


@scheduler.on_active
async def schedule(ctx: ActiveContext) -> None:
    """Give out what is on the list, some at a time, as long as this node is the scheduler."""
    ctx.ready()
    while not ctx.is_cancelled:
        jobs = await ctx.kv.keys("job.")
        await asyncio.gather(*(give_out(ctx, key) for key in jobs[:AT_A_TIME]))
        if not jobs:
            await asyncio.sleep(0.1)


async def give_out(ctx: ActiveContext, key: str) -> None:
    """One job: it leaves the list once its result is stored, by this scheduler or not at all."""
    number = await ctx.kv.value(key, int, 0)
    try:
        done = await platform.api("workers").call("square", number, returns=tuple[int, str], timeout=10)
    except CallError:
        return  # it stays on the list
    await ctx.kv.put(key.replace("job.", "done.", 1), done)
    await ctx.kv.delete(key)


if __name__ == "__main__":
    platform.run()
