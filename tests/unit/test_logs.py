"""Log lines: their form, what they hide, and that they stop nobody."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from phalanx.config import Logging, NatsOptions
from phalanx.config.secret import Secret
from phalanx.observe.logs import configure_logging

log = logging.getLogger("phalanx.coord")
Configure = Callable[..., Callable[[], None]]


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Each test leaves the logger as it was."""
    root = logging.getLogger("phalanx")
    before = (root.level, root.propagate, list(root.handlers))
    yield
    assert (root.level, root.propagate, list(root.handlers)) == before


@pytest.fixture
def configure() -> Iterator[Configure]:
    """configure_logging for node n1 of prod, undone after the test."""
    undo: list[Callable[[], None]] = []

    def set_up(format: str, stream: io.TextIOBase, level: str = "info") -> Callable[[], None]:
        config = Logging(format=format, level=level)  # pyright: ignore[reportArgumentType]
        undo.append(configure_logging(config, platform="prod", node="n1", stream=stream))  # pyright: ignore[reportArgumentType]
        return undo[-1]

    yield set_up
    for each in undo:
        each()


def entries(stream: io.StringIO) -> list[dict[str, Any]]:
    """The JSON objects, one a line."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_has_one_object_a_line_with_all_fields(configure: Configure) -> None:
    """Time in UTC with milliseconds, level, logger, message, who, and the extra fields with their types."""
    stream = io.StringIO()
    configure("json", stream)
    before = time.time()
    extra = {"app": "wiki", "epoch": 12, "duration_seconds": 0.5, "session": "n1.ab", "why": None, "odd": {1}}
    log.warning("app %s\nbecame active", "wiki", extra=extra)
    (entry,) = entries(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
    assert (
        abs(time.mktime(time.strptime(entry["time"][:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone - before) < 2
    )
    del entry["time"]
    assert entry == {
        "level": "warning",
        "logger": "phalanx.coord",
        "message": "app wiki\nbecame active",
        "platform": "prod",
        "node": "n1",
        "app": "wiki",
        "epoch": 12,
        "session": "n1.ab",
        "duration_seconds": 0.5,
        "odd": [1],
    }


def test_json_has_the_traceback_in_one_field(configure: Configure) -> None:
    """An exception does not break the one-line rule."""
    stream = io.StringIO()
    configure("json", stream)
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        log.exception("failed")
    (entry,) = entries(stream)
    assert entry["exc"].startswith("Traceback")
    assert "ValueError: first\nsecond" in entry["exc"]


def test_extra_fields_cannot_overwrite_the_standard_ones(configure: Configure) -> None:
    """Only platform and node may be given: several nodes can live in one process."""
    stream = io.StringIO()
    configure("json", stream)
    log.info("x", extra={"level": "debug", "time": "never", "logger": "other", "node": "n2"})
    (entry,) = entries(stream)
    assert (entry["level"], entry["logger"], entry["node"]) == ("info", "phalanx.coord", "n2")
    assert entry["time"] != "never"


@pytest.mark.parametrize("format", ["json", "console"])
def test_secrets_are_hidden_in_messages_and_fields(configure: Configure, format: str) -> None:
    """Wherever a Secret gets to, its content does not get out."""
    stream = io.StringIO()
    configure(format, stream)
    options = NatsOptions(user="u", password=Secret("hunter2"), token=Secret("hunter2"))
    secret = Secret("hunter2")
    log.info("%s %r %s", secret, options, [secret], extra={"a": secret, "b": options, "c": {"d": [secret]}})
    log.info("as a key", extra={"d": {secret: 1}})
    assert "hunter2" not in stream.getvalue()
    assert "***" in stream.getvalue()


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize(
    "value",
    ["\udcff", 2**80, float("nan"), object(), b"\xff", {1: {2}}, [[[]]], "\x1b[2J\r\n"],
    ids=lambda v: type(v).__name__,
)
def test_any_value_is_logged_as_one_line(configure: Configure, format: str, value: object) -> None:
    """Whatever is given as argument or field, one line comes out and nothing raises."""
    stream = io.StringIO()
    configure(format, stream)
    log.info("value %s", value, extra={"field": value})
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    if format == "json":
        assert json.loads(line)["message"].startswith("value ")


def test_wrong_arguments_are_reported_not_raised(configure: Configure) -> None:
    """A log call that cannot be formatted still leaves a line."""
    stream = io.StringIO()
    configure("console", stream)
    log.info("%d and %d", "x")
    assert "could not be formatted" in stream.getvalue()
    assert "%d and %d" in stream.getvalue()


def test_console_is_short_and_readable(configure: Configure) -> None:
    """Time, level, logger, message, and what the message does not name; no color off a terminal."""
    stream = io.StringIO()
    configure("console", stream)
    extra = {"app": "wiki", "epoch": 12, "duration_seconds": 0.0312, "session": "", "problem": "two words"}
    log.info("app wiki: active (epoch 12)", extra=extra)
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3} INFO    coord: app wiki: active \(epoch 12\)"
        r'  duration_seconds=0\.031 problem="two words"\n',
        stream.getvalue(),
    )


def test_console_cannot_be_made_to_show_forged_lines(configure: Configure) -> None:
    """Line breaks and escape sequences in a message are shown as such; tracebacks keep their lines."""
    stream = io.StringIO()
    configure("console", stream)
    log.info("path %s", "/x\n12:00:00 ERROR forged\x1b[31m")
    (line,) = stream.getvalue().splitlines()
    assert "\\n12:00:00" in line
    assert "\\x1b[31m" in line
    log.error("failed", exc_info=ValueError("bad"))
    assert stream.getvalue().endswith("\n    ValueError: bad\n")


def test_color_only_on_a_terminal(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal gets colors, unless NO_COLOR is set."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    configure("console", stream)
    log.error("red")
    monkeypatch.setenv("NO_COLOR", "1")
    configure("console", stream)
    log.error("plain")
    red, plain = stream.getvalue().splitlines()
    assert red.startswith("\x1b[31m")
    assert red.endswith("\x1b[0m")
    assert "\x1b" not in plain


def test_level_is_obeyed(configure: Configure) -> None:
    """Less important lines are not shown."""
    stream = io.StringIO()
    configure("json", stream, level="warning")
    log.info("no")
    log.error("yes")
    assert [entry["message"] for entry in entries(stream)] == ["yes"]


def test_other_loggers_are_not_touched(configure: Configure) -> None:
    """The user's logging sees nothing of ours, and ours nothing of theirs."""
    stream, theirs = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handler = logging.StreamHandler(theirs)
    root.addHandler(handler)
    try:
        configure("json", stream)
        logging.getLogger("myapp").error("theirs")
        log.error("ours")
    finally:
        root.removeHandler(handler)
    assert theirs.getvalue() == "theirs\n"
    assert [entry["message"] for entry in entries(stream)] == ["ours"]


def test_configuring_twice_replaces_and_one_undo_restores(configure: Configure) -> None:
    """Lines come once; the undo of a replaced call does nothing, that of the last one puts all back."""
    first, second = io.StringIO(), io.StringIO()
    undo_first, undo_second = configure("json", first), configure("json", second)
    undo_first()
    log.info("once")
    assert first.getvalue() == ""
    assert len(entries(second)) == 1
    undo_second()
    undo_second()
    assert logging.getLogger("phalanx").handlers == []
    assert logging.getLogger("phalanx").propagate


def test_full_pipe_costs_a_moment_once_then_lines_are_counted(configure: Configure) -> None:
    """A reader that stands still blocks nobody; when it goes on, a line says how many are missing."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as stream:
        configure("json", stream)
        began = time.monotonic()
        for n in range(2000):
            log.info("line %d %s", n, "x" * 100)
        assert time.monotonic() - began < 20, "each line was waited for, not one"
        held = os.read(reader.fileno(), 1 << 20)
        log.info("after")
        text = (held + os.read(reader.fileno(), 1 << 20)).decode()
    messages = [json.loads(line)["message"] for line in text.splitlines()]
    shown = [message for message in messages if message.startswith("line ")]
    missing = int(messages[-2].split()[0])
    assert messages[-1] == "after"
    assert "are lost" in messages[-2]
    assert 0 < len(shown) == 2000 - missing
    assert shown == [f"line {n} {'x' * 100}" for n in range(len(shown))]


def test_line_longer_than_the_pipe_is_torn_but_the_next_is_whole(configure: Configure) -> None:
    """What only went out in part is ended before the next line, and counted as lost."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as stream:
        configure("json", stream)
        log.info("x" * 200_000)
        os.read(reader.fileno(), 1 << 20)
        log.info("after")
        lines = os.read(reader.fileno(), 1 << 20).decode().splitlines()
    assert lines[0] == ""
    assert [json.loads(line)["message"] for line in lines[1:]] == [
        "1 log lines are lost: nobody read them",
        "after",
    ]


def test_closed_stream_and_broken_pipe_do_not_raise(configure: Configure) -> None:
    """Where nobody can read any more, logging goes on as if nothing had happened."""
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    configure("json", stream)
    os.close(reading)
    log.error("to a broken pipe")
    stream.close()
    log.error("to a closed stream")
    closed = io.StringIO()
    configure("json", closed)
    closed.close()
    log.error("to a closed text stream")


def test_file_gets_every_line(configure: Configure, tmp_path: Any) -> None:
    """A file is always ready: long lines are written whole."""
    path = tmp_path / "log"
    with path.open("w") as stream:
        configure("json", stream)
        for n in range(100):
            log.info("%d %s", n, "y" * 10_000)
    messages = [json.loads(line)["message"] for line in path.read_text().splitlines()]
    assert [message.split()[0] for message in messages] == [str(n) for n in range(100)]
