"""The audit spool: order, crashes, torn and corrupt files, full and failing disks."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from phalanx.config.secret import Secret
from phalanx.names import Names
from phalanx.observe.audit import AuditEntry, AuditLog
from phalanx.observe.spool import MIN_BYTES, Spool

NAMES = Names("prod")


def open_log(directory: Path, max_spool_bytes: int = 1024 * 1024) -> AuditLog:
    """An audit log of node n1."""
    return AuditLog(NAMES, "n1", directory / "audit", max_spool_bytes=max_spool_bytes)


def deliver_one(log: AuditLog) -> AuditEntry | None:
    """The next entry, acknowledged: what run() does, without a bus."""
    line = log._next()
    if line is None:
        return None
    log._done(line)
    return msgspec.json.decode(line, type=AuditEntry)


def deliver_all(log: AuditLog) -> list[AuditEntry]:
    """All entries, in the order of their delivery."""
    return list(iter(lambda: deliver_one(log), None))


def numbers(entries: list[AuditEntry]) -> list[int]:
    """The ``n`` of the test's own entries."""
    return [int(entry.details["n"]) for entry in entries if entry.category == "test"]


def lost(entries: list[AuditEntry]) -> int:
    """How many entries were reported as lost."""
    return sum(int(entry.details["lost"]) for entry in entries if entry.action == "entries-lost")


def segments(directory: Path) -> list[Path]:
    """The spool's segments, oldest first."""
    return sorted((directory / "audit").glob("*.jsonl"))


def note(log: AuditLog, *values: int) -> None:
    """Record test entries with these numbers."""
    for n in values:
        log.record("test", "one", n=n)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file can grow beyond *limit* bytes: write(2) fails with EFBIG, as it does on a full disk."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_entries_come_out_as_they_were_recorded(tmp_path: Path) -> None:
    """Every field survives the spool, with the node's name, a time and a unique id."""
    log = open_log(tmp_path)
    log.record("app", "active", app="wiki", epoch=12, reason="elected", duration_seconds=0.25, step="hook")
    log.record("node", "started")
    first, second = deliver_all(log)
    assert (first.name, first.app, first.epoch, first.reason) == ("app.active", "wiki", 12, "elected")
    assert (first.duration_seconds, first.details, first.node) == (0.25, {"step": "hook"}, "n1")
    assert second.name == "node.started"
    assert second.time >= first.time > 0
    assert first.id != second.id
    assert first.id.startswith("n1-")
    assert log.undelivered == 0
    log.close()


@pytest.mark.parametrize("name", ["", "Not.a-label", "a.b", "a b", "*", ">", "x" * 64])
def test_names_that_are_no_subject_tokens_are_refused(tmp_path: Path, name: str) -> None:
    """A category or action that could not be one token of a subject never gets into the spool."""
    log = open_log(tmp_path)
    with pytest.raises(ValueError, match="DNS label"):
        log.record(name, "started")
    with pytest.raises(ValueError, match="DNS label"):
        log.record("node", name)
    assert log.undelivered == 0
    log.close()


def test_secrets_and_strange_texts_are_recorded_safely(tmp_path: Path) -> None:
    """Secrets are hidden, lone surrogates escaped, endless texts cut, and nothing raises."""
    log = open_log(tmp_path)
    log.record("test", "one", reason="\udcff" + "x" * 5000, password=Secret("hunter2"), big="\0" * 9000)
    log.record("test", "one", **{f"k{i}": "\x01" * 500 for i in range(100)})
    first, second = deliver_all(log)
    assert first.details["password"] == "***"
    assert first.reason.startswith("\\udcff")
    assert len(first.reason) == 1000
    assert second.details == {"cut": "too long"}
    log.close()


def test_what_was_not_delivered_is_delivered_after_a_restart_in_order(tmp_path: Path) -> None:
    """Three processes in a row, each delivering a part: every entry comes once, in order."""
    log = open_log(tmp_path)
    note(log, *range(10))
    got = numbers([entry for _ in range(4) if (entry := deliver_one(log))])
    log.close()
    log = open_log(tmp_path)
    assert log.undelivered == 6
    note(log, *range(10, 15))
    got += numbers([entry for _ in range(8) if (entry := deliver_one(log))])
    log.close()
    log = open_log(tmp_path)
    got += numbers(deliver_all(log))
    assert got == list(range(15))
    log.close()


_CHILD = """
import sys
from pathlib import Path
from phalanx.names import Names
from phalanx.observe.audit import AuditLog
log = AuditLog(Names("prod"), "n1", Path(sys.argv[1]) / "audit")
n = 0
while True:
    log.record("test", "one", n=n)
    print(n, flush=True)
    n += 1
"""


def test_process_killed_while_recording_loses_no_recorded_entry(tmp_path: Path) -> None:
    """SIGKILL in the middle of recording: all that record() had returned for is there at the next start."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) == 300:
                child.kill()
                break
        rest = child.stdout.read().split("\n")
    confirmed = max([300, *(int(text) for text in rest[:-1] if text)])
    log = open_log(tmp_path)
    got = numbers(deliver_all(log))
    assert got == list(range(len(got)))
    assert len(got) > confirmed
    log.close()


def test_torn_last_line_is_ignored_and_reported(tmp_path: Path) -> None:
    """A line that a crash tore is passed over; an entry says so, and what follows is not harmed."""
    log = open_log(tmp_path)
    note(log, 0, 1, 2)
    log.close()
    path = segments(tmp_path)[-1]
    os.truncate(path, path.stat().st_size - 5)
    log = open_log(tmp_path)
    note(log, 3)
    entries = deliver_all(log)
    assert numbers(entries) == [0, 1, 3]
    assert lost(entries) == 1
    assert "torn" in next(entry.reason for entry in entries if entry.category == "audit")
    log.close()


@pytest.mark.parametrize("junk", [b"\0" * 40, b"{}", b"\xff\xfe", b'{"id":1}', b"[" * 5000], ids=repr)
def test_corrupt_line_is_set_aside_and_the_others_go_on(tmp_path: Path, junk: bytes) -> None:
    """A file with junk in it is kept under another name; its good lines are delivered, its loss reported."""
    log = open_log(tmp_path)
    note(log, *range(6))
    for _ in range(2):
        deliver_one(log)
    log.close()
    path = segments(tmp_path)[0]
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = junk + b"\n"
    path.write_bytes(b"".join(lines))
    log = open_log(tmp_path)
    entries = deliver_all(log)
    assert numbers(entries) == [2, 3, 5]
    assert lost(entries) == 1
    assert (tmp_path / "audit" / f"{path.name}.corrupt").read_bytes() == b"".join(lines)
    log.close()
    log = open_log(tmp_path)
    assert deliver_all(log) == []
    log.close()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 26, b"nonsense\n", b"000000000001 000000000007\n"], ids=repr
)
def test_unreadable_position_delivers_again_rather_than_losing(tmp_path: Path, content: bytes) -> None:
    """Whatever the position file says, nothing undelivered is passed over."""
    log = open_log(tmp_path)
    note(log, *range(5))
    deliver_one(log)
    log.close()
    (tmp_path / "audit" / "delivered").write_bytes(content)
    log = open_log(tmp_path)
    assert numbers(deliver_all(log)) == list(range(5))
    log.close()


def test_full_spool_drops_the_oldest_and_says_how_many(tmp_path: Path) -> None:
    """Recorded = delivered + reported as lost, the newest are there, and the disk limit holds."""
    log = open_log(tmp_path, MIN_BYTES)
    for n in range(3000):
        note(log, n)
        used = sum(path.stat().st_size for path in segments(tmp_path)) if n % 100 == 0 else 0
        assert used <= MIN_BYTES
    log.close()
    log = open_log(tmp_path, MIN_BYTES)
    entries = deliver_all(log)
    got = numbers(entries)
    assert got == sorted(got)
    assert got[-1] == 2999
    assert len(got) < 3000
    assert len(got) + lost(entries) == 3000
    log.close()


def test_full_spool_while_an_entry_is_on_its_way_goes_on_with_the_next(tmp_path: Path) -> None:
    """The entry in hand is dropped from the disk: its late acknowledgement acknowledges nothing else."""
    log = open_log(tmp_path, MIN_BYTES)
    note(log, 0)
    in_hand = log._next()
    assert in_hand is not None
    for n in range(1, 3000):
        note(log, n)
    before = log.undelivered
    log._done(in_hand)
    assert log._next() is not in_hand
    log._done(in_hand)
    assert log.undelivered == before
    got = numbers(deliver_all(log))
    assert got == list(range(got[0], 3000))
    log.close()


def test_full_disk_keeps_entries_in_memory_and_writes_them_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk refuses in the middle of a line: nothing raises, nothing is torn, order is kept."""
    log = open_log(tmp_path)
    note(log, *range(5))
    with file_size_limit(segments(tmp_path)[0].stat().st_size + 10):
        note(log, *range(5, 10))
        assert log.undelivered == 10
    assert "cannot be written" in caplog.text
    note(log, 10)
    log.close()
    log = open_log(tmp_path)
    assert numbers(deliver_all(log)) == list(range(11))
    log.close()


def test_disk_that_never_works_delivers_from_memory_and_reports_what_did_not_fit(tmp_path: Path) -> None:
    """With a file where the directory should be, the newest are delivered, and the others counted."""
    (tmp_path / "audit").write_text("in the way")
    log = open_log(tmp_path)
    note(log, *range(1000))
    entries = deliver_all(log)
    got = numbers(entries)
    assert got == list(range(1000 - len(got), 1000))
    assert len(got) > 400
    # One more: the entry that reported the trouble was the oldest.
    assert len(got) + lost(entries) == 1001
    log.close()


def test_segment_that_vanishes_is_reported_and_passed_over(tmp_path: Path) -> None:
    """Somebody deletes a file of the running spool: its entries are counted as lost, the rest goes on."""
    log = open_log(tmp_path, MIN_BYTES)
    note(log, *range(150))
    paths = segments(tmp_path)
    assert len(paths) > 2
    paths[0].unlink()
    entries = deliver_all(log)
    note(log, 150)
    entries += deliver_all(log)
    got = numbers(entries)
    assert got == list(range(got[0], 151))
    assert got[0] > 0
    assert len(got) + lost(entries) == 151
    log.close()


def test_delivered_segments_are_removed(tmp_path: Path) -> None:
    """A node that runs for long with NATS there keeps next to nothing on disk."""
    log = open_log(tmp_path, MIN_BYTES)
    for n in range(5000):
        note(log, n)
        deliver_one(log)
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= MIN_BYTES / 8
    log.close()


@pytest.mark.parametrize("seed", range(30))
def test_any_mixture_of_recording_delivering_and_restarts_keeps_order(tmp_path: Path, seed: int) -> None:
    """Random histories: what comes out is what went in, in order, once, less what is reported lost."""
    choose = random.Random(seed)
    log, recorded = open_log(tmp_path, MIN_BYTES), 0
    entries: list[AuditEntry] = []
    for _ in range(60):
        what = choose.random()
        if what < 0.5:
            count = choose.randrange(80)
            note(log, *range(recorded, recorded + count))
            recorded += count
        elif what < 0.85:
            entries += [entry for _ in range(choose.randrange(60)) if (entry := deliver_one(log))]
        else:
            log.close()
            log = open_log(tmp_path, MIN_BYTES)
    entries += deliver_all(log)
    got = numbers(entries)
    assert got == sorted(set(got))
    assert len(got) + lost(entries) == recorded
    log.close()


def test_too_small_spool_and_too_long_line_are_refused(tmp_path: Path) -> None:
    """Limits that cannot work are errors of the programmer, told at once."""
    with pytest.raises(ValueError, match="at least"):
        open_log(tmp_path, 100)
    spool = Spool(
        tmp_path / "s",
        MIN_BYTES,
        is_line=lambda _: True,
        on_dropped=lambda _: b"{}",
        on_damage=lambda *_: None,
    )
    with pytest.raises(ValueError, match="longer than"):
        spool.append(b"x" * MIN_BYTES)


def test_spool_is_readable_by_people(tmp_path: Path) -> None:
    """One JSON object a line, for the owner's eyes only."""
    log = open_log(tmp_path)
    note(log, 7)
    (path,) = segments(tmp_path)
    assert json.loads(path.read_text())["details"] == {"n": "7"}
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    log.close()
