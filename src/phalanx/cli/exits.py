"""What the exit codes of ``phalanx`` mean (docs/cli.md), and which errors lead to which."""

from __future__ import annotations

from phalanx.errors import (
    BusTimeout,
    BusUnavailable,
    ConfigError,
    NatsUnusable,
    NoHandlers,
    PhalanxError,
    PlatformNotFound,
    StartError,
    TooDeep,
    TooLarge,
    UnknownApp,
    UnknownMethod,
    WrongRoute,
    WrongType,
)

OK = 0
NO = 1
"""The answer is no, or something failed."""
BAD_INPUT = 2
"""Wrong input, or a node that cannot start: one line says what is wrong; nothing was started."""
UNREACHABLE = 3
"""NATS cannot be reached, or holds no such platform."""
INTERRUPTED = 130
"""Ended by Ctrl-C."""
TERMINATED = 143
"""Ended by SIGTERM or SIGHUP, in good order: nothing temporary is left."""
BROKEN_PIPE = 141
"""Whoever read the output went away; what a program that dies of SIGPIPE ends with."""

EPILOGUE = (
    "Exit codes: 0 fine; 1 the answer is no, or something failed; 2 wrong input, or a node cannot start; "
    "3 NATS is unreachable, or holds no such platform; 130 interrupted; 143 terminated. See docs/cli.md."
)


_WRONG_CALLS = (UnknownApp, UnknownMethod, NoHandlers, WrongRoute, WrongType, TooLarge, TooDeep)


class Failed(PhalanxError):
    """A command failed with what its message says; exit code 1."""


def code_of(error: PhalanxError) -> int:
    """The exit code for *error*, for commands that look at a platform or change it."""
    if isinstance(error, NatsUnusable | PlatformNotFound | BusUnavailable | BusTimeout):
        return UNREACHABLE
    if isinstance(error, ConfigError | StartError):
        return BAD_INPUT
    if isinstance(error, _WRONG_CALLS) and not error.started:
        return BAD_INPUT
    return NO
