"""A partitioned cache: each key lives in the memory of one node, and moves with its partition.

Start it on several nodes; each holds its share of the keys. What was put survives a planned move, as the
owner saves its partition when it releases it; a crash loses what was put since the last one::

    PHALANX_NODE=n1 python -m examples.cache
    phalanx call cache put '{"key": "eva", "value": "7"}' --to key:eva
    phalanx call cache get '"eva"' --to key:eva
    phalanx ring show cache
"""

from __future__ import annotations

import msgspec

from phalanx import CallContext, CallError, PartitionContext, Platform, PrepareContext, Ring

platform = Platform("prod")
cache = platform.app("cache", Ring(partitions=64))

memory: dict[int, dict[str, str]] = {}
"""What this node holds, by partition."""
warm: dict[int, dict[str, str]] = {}
"""What was read ahead for partitions that come."""


class Item(msgspec.Struct, frozen=True):
    """What is put."""

    key: str
    value: str


@cache.on_prepare
async def prepare(partition: int, ctx: PrepareContext) -> None:
    """The present owner still answers: read what it has saved so far."""
    saved = await ctx.kv.get(f"part.{partition}", dict[str, str])
    warm[partition] = saved.value if saved is not None else {}


@cache.on_own
async def own(partition: int, ctx: PartitionContext) -> None:
    """Nobody else has it any more: what is read now is the last word."""
    warm.pop(partition, None)  # a real cache would only fetch what has changed since
    saved = await ctx.kv.get(f"part.{partition}", dict[str, str])
    memory[partition] = saved.value if saved is not None else {}


@cache.on_release
async def release(partition: int, ctx: PartitionContext) -> None:
    """The next owner begins when this has returned. The write is refused if somebody owns it already."""
    await ctx.kv.put(f"part.{partition}", memory.pop(partition, {}))


@cache.handle("put", idempotent=True)
async def put(item: Item, ctx: CallContext) -> str:
    """Only the owner of the key's partition gets here: two nodes never hold the same key."""
    memory[_mine(item.key, ctx)][item.key] = item.value
    return ctx.node


@cache.handle("get", idempotent=True)
async def get(key: str, ctx: CallContext) -> str | None:
    """None: it is not in the cache."""
    return memory[_mine(key, ctx)].get(key)


def _mine(key: str, ctx: CallContext) -> int:
    """The partition that was called; whoever routes by one key and asks for another is told."""
    partition = cache.partition_of(key)
    if partition != ctx.partition:
        raise CallError("wrong-key", f"call it with to=Key({key!r})")
    return partition


if __name__ == "__main__":
    platform.run()
