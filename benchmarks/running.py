"""Runs what starts processes so that they end with it, also when it is asked to end."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T], *, as_nodes: bool = True) -> T:
    """Like ``asyncio.run``; SIGTERM too cancels *work*, which cleans up. Raises KeyboardInterrupt then.

    *as_nodes*: on the event loop that nodes use, uvloop. Its transports raise where asyncio's only drop
    what is written after a reset, which ``TcpProxy`` counts on.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with asyncio.Runner(loop_factory=_loop_factory() if as_nodes else None) as runner:
            return runner.run(work)
    finally:
        signal.signal(signal.SIGTERM, before)


def validation_parser(
    script: str, about: str | None, *, seconds: float, lasts: str
) -> argparse.ArgumentParser:
    """The arguments that every validation script has. *lasts*: what its *seconds* are."""
    parser = argparse.ArgumentParser(prog=f"scripts/{script}", description=about)
    parser.add_argument("--seconds", type=float, default=seconds, help=f"{lasts} (default {seconds:g})")
    parser.add_argument("--seed", type=int, help="draws the faults (default: a new one, which is printed)")
    parser.add_argument("--ttl", type=float, default=2.0, help="of the sessions, in seconds (default 2)")
    parser.add_argument("--keep", action="store_true", help="keep history and logs also if nothing broke")
    return parser


def validation_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """What was given, with a seed. Exits with 2 where it is out of range."""
    parsed = parser.parse_args(arguments)
    if parsed.seconds <= 0 or not 1 <= parsed.ttl <= 300:
        parser.error("--seconds must be above 0, --ttl from 1 to 300")
    if parsed.seed is None:
        parsed.seed = secrets.randbelow(1_000_000)
    return parsed


def _interrupt(number: int, frame: object) -> None:
    signal.raise_signal(signal.SIGINT)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
