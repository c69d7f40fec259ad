"""The ten lines of the README: a web server that runs on whichever node is active.

Run it on every node: ``phalanx run examples.wiki:platform``, or ``python -m examples.wiki``.
"""

from __future__ import annotations

from phalanx import ActiveContext, ActivePassive, Platform, Process

platform = Platform("prod", nats="nats://127.0.0.1:4222")
wiki = platform.app("wiki", ActivePassive(), backend=Process("python3 -m http.server 8080"))


@wiki.on_active
async def serve(ctx: ActiveContext) -> None:
    """Runs once the web server does. ``ctx.kv`` writes are refused as soon as another node leads."""
    await ctx.kv.put("served-by", f"{ctx.node}, epoch {ctx.epoch}")


if __name__ == "__main__":
    platform.run()
