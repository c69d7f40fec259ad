"""What the pages say about the code is looked up in the code."""

from __future__ import annotations

import ast
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.docs.pages import ROOT, Block, anchors, blocks, links, pages

from phalanx.bus import provision
from phalanx.cli import exits
from phalanx.coord import lock_body, membership
from phalanx.coord.direct import DirectSecret
from phalanx.data import (
    entries,
    history,
    image_format,
    objects,
    owner,
    replica_store,
    second_copy,
    settlement,
    status,
)
from phalanx.data.wal_files import LogState
from phalanx.decide.election import LeaderBody
from phalanx.decide.hold import MemberList
from phalanx.decide.pool import PoolScale
from phalanx.decide.ring_ownership import PartitionBody
from phalanx.decide.ring_plan import RingMember, RingPlan
from phalanx.decide.session import SessionBody, StreamList
from phalanx.messaging.event_fence import FenceBody
from phalanx.names import Names
from phalanx.observe.audit import AuditEntry
from phalanx.observe.metrics import Metrics
from phalanx.types import (
    Candidate,
    FenceNote,
    Member,
    NodeStatus,
    Nomination,
    Pause,
    PlannedSwitchover,
    Position,
    Resource,
)

NAMES = Names("prod")
SOURCES = sorted((ROOT / "src" / "phalanx").rglob("*.py"))

CONFIGURATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "app bucket": lambda: provision.bucket_config(NAMES, "prod_wiki", "wiki", history=8, replicas=3),
    "platform bucket": lambda: provision.bucket_config(NAMES, "prod_platform", None, history=4, replicas=3),
    "session stream": lambda: provision.session_config(NAMES, "prod_sessions_1"),
    "audit stream": lambda: provision.audit_config(NAMES, replicas=3),
    "events stream": lambda: provision.events_config(
        NAMES, "wiki", max_age_seconds=7 * 86400, max_bytes=1 << 30, replicas=3
    ),
    "dead letters": lambda: provision.dead_config(NAMES, replicas=3),
    "log stream": lambda: provision.wal_config(NAMES, "wiki", replicas=3),
    "object store": lambda: provision.objects_config(NAMES, "wiki", replicas=3),
}
VALUES: dict[str, Any] = {
    "Identity": membership.Identity,
    "StreamList": StreamList,
    "Member": Member,
    "Pause": Pause,
    "FenceNote": FenceNote,
    "AppRegistration": membership.AppRegistration,
    "leader": LeaderBody,
    "PoolScale": PoolScale,
    "RingMember": RingMember,
    "RingPlan": RingPlan,
    "PartitionBody": PartitionBody,
    "Candidate": Candidate,
    "Nomination": Nomination,
    "MemberList": MemberList,
    "DirectSecret": DirectSecret,
    "PlannedSwitchover": PlannedSwitchover,
    "Holder": lock_body.Holder,
    "Holders": lock_body.Holders,
    "FenceBody": FenceBody,
    "SessionBody": SessionBody,
    "AuditEntry": AuditEntry,
    "Resource": Resource,
    "RestoreRequest": status.RestoreRequest,
    "Seal": entries._SealBody,  # pyright: ignore[reportPrivateUsage]
    "object": objects._Entry,  # pyright: ignore[reportPrivateUsage]
    "ImageHead": image_format.ImageHead,
    "ImageTail": image_format.ImageTail,
    "Owner": owner.Owner,
    "State": replica_store.State,
    "followed": history._LastSeal,  # pyright: ignore[reportPrivateUsage]
    "Diverged": settlement.Diverged,
    "Note": second_copy.Note,
}


def page(name: str) -> str:
    """The text of one page of docs/."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


# --- links


@pytest.mark.parametrize("path", [pytest.param(p, id=p.name) for p in pages()])
def test_links_lead_somewhere(path: Path) -> None:
    """Each link to a file of the repository has a file, and where it names a heading, that heading."""
    for target in links(path):
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), f"{target}: there are {sorted(anchors(found))}"


def test_index_names_every_page() -> None:
    """docs/index.md links all pages of docs/."""
    linked = {target.partition("#")[0] for target in links(ROOT / "docs" / "index.md")}
    assert {p.name for p in (ROOT / "docs").glob("*.md")} - linked - {"index.md"} == set()


# --- guarantees


def test_every_named_test_exists() -> None:
    """Wherever a page names a test by file and name, there is such a function."""
    named = [
        (path.name, file, name)
        for path in pages()
        for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", path.read_text(encoding="utf-8"))
    ]
    assert named
    for where, file, name in named:
        source = ROOT / file
        assert source.exists(), f"{where}: {file}"
        assert re.search(rf"^(async )?def {name}\(", source.read_text(), re.MULTILINE), f"{where}: {name}"


def test_every_promise_has_a_test() -> None:
    """Each section about a promise names at least one test that holds it."""
    text = page("guarantees.md")
    for promise in ("G1", "G2", "G3", "G4", "G5", "G7", "G8", "G9", "G10"):
        section = re.search(rf"^## {promise} .*?(?=^## )", text, re.MULTILINE | re.DOTALL)
        assert section, promise
        assert "::test_" in section[0], promise
        assert "Not promised" in section[0], promise


# --- tasks


def _named_tasks() -> Iterator[tuple[Path, str]]:
    """Where a task, a thread or a pool is named, and the name as a pattern: one group for each value."""
    makers = {"create_task", "_own", "_background", "spawn", "ThreadPoolExecutor"}
    for path in SOURCES:
        if {"cli", "testing"} & set(path.relative_to(ROOT / "src" / "phalanx").parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function not in makers:
                continue
            names = [keyword.value for keyword in node.keywords if keyword.arg and "name" in keyword.arg]
            for value in names or node.args[-1:]:
                pattern = _pattern(value)
                if pattern is not None:
                    yield path, pattern


def _pattern(value: ast.expr) -> str | None:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return re.escape(value.value)
    if isinstance(value, ast.JoinedStr):
        parts = (re.escape(p.value) if isinstance(p, ast.Constant) else r"<[\w ]+>" for p in value.values)
        return "".join(str(part) for part in parts)
    return None


def test_every_named_task_and_thread_is_described() -> None:
    """docs/tasks.md has each name that the code gives to a task or thread, with <…> for what varies."""
    text = page("tasks.md")
    found = list(_named_tasks())
    assert len(found) > 20
    missing = {f"{p.name}: {pattern}" for p, pattern in found if not re.search(f"`{pattern}`", text)}
    assert missing == set()


# --- storage


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=str(b)) for b in blocks("json") if b.page.name == "storage.md"]
)
def test_stored_json_is_what_the_code_writes(block: Block) -> None:
    """Stream configurations are equal; examples of values decode, and encode to the same again."""
    shown = json.loads(block.text)
    if block.mark in CONFIGURATIONS:
        assert shown == CONFIGURATIONS[block.mark]()
    else:
        value = msgspec.convert(shown, VALUES[block.mark])
        assert json.loads(msgspec.json.encode(value)) == shown


def test_journal_entry_is_as_described() -> None:
    """docs/storage.md describes an entry of a replica's journal byte by byte."""
    rows = re.findall(r"^\| (\d+)–(\d+) \| (.*) \|$", page("storage.md"), re.MULTILINE)
    entry = replica_store.encode_entry(Position(0x0102, 0x0304), LogState(b"saltsalt", 5, (6, 7)))
    shown = {what.split()[0]: entry[int(first) : int(last) + 1] for first, last, what in rows}
    assert shown == {
        "sequence": (0x0102).to_bytes(8, "big"),
        "txid": (0x0304).to_bytes(8, "big"),
        "salts": b"saltsalt",
        "number": (5).to_bytes(4, "big"),
        "its": (6).to_bytes(4, "big") + (7).to_bytes(4, "big"),
        "CRC-32": zlib.crc32(entry[:36]).to_bytes(4, "big"),
    }
    assert b"".join(shown.values()) == entry


def test_every_configuration_and_value_is_shown() -> None:
    """None of them is left out of docs/storage.md."""
    assert {b.mark for b in blocks("json") if b.page.name == "storage.md"} == {*CONFIGURATIONS, *VALUES}


# --- operations


def _audited() -> Iterator[str]:
    """The actions that the code reports, by the literal first arguments of the calls that report."""
    methods = {"node", "nats", "platform", "_journal_app", "app"}
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            value = call.func.value
            if call.func.attr == "report" and "data" in path.parts and call.args:
                yield from _texts(call.args[0])
                continue
            owner = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")
            journal = "journal" in owner
            if call.func.attr == "_journal_app" or (journal and call.func.attr in methods):
                yield from _texts(call.args[1 if call.func.attr == "app" else 0])


def _texts(value: ast.expr) -> Iterator[str]:
    for part in ast.walk(value):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value
        if isinstance(part, ast.Name) and isinstance(found := getattr(status, part.id, None), str):
            yield found


def _capture_events() -> Iterator[str]:
    """What happens to a capture is reported as `capture-<kind>`."""
    for path in (ROOT / "src" / "phalanx" / "data").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in ("RunEnded", "_event", "_on_event"):
                yield from (f"capture-{kind}" for kind in _texts(call.args[0]))


def test_every_audited_action_is_explained() -> None:
    """docs/operations.md says what each action in the audit log means."""
    text = page("operations.md")
    parts = {"", "server-", "capture-"}
    actions = {action for action in (*_audited(), *_capture_events()) if action not in parts}
    assert len(actions) > 40
    assert {"database-restored", "capture-gap", "capture-broken"} < actions
    assert {action for action in actions if f"`{action}`" not in text} == set()


def test_every_metric_is_listed() -> None:
    """docs/operations.md lists each metric that a node shows."""
    shown = Metrics("prod", "n1", "0").render(NodeStatus("prod", "n1", "0")).decode()
    names = set(re.findall(r"^# TYPE (\w+)", shown, re.MULTILINE))
    assert len(names) > 10
    assert {name for name in names if f"`{name}`" not in page("operations.md")} == set()


def test_exit_codes_are_listed() -> None:
    """docs/operations.md has each exit code of the command line."""
    codes = {value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}
    text = page("operations.md")
    assert {code for code in codes if not re.search(rf"^\| {code} \|", text, re.MULTILINE)} == set()


def test_environment_variables_are_documented() -> None:
    """Each PHALANX_* variable that the code reads or sets is on some page."""
    text = "".join(path.read_text(encoding="utf-8") for path in pages())
    used = {
        name
        for path in SOURCES
        if "testing" not in path.parts
        for name in re.findall(r'"(PHALANX_[A-Z_]+)"', path.read_text())
    }
    assert len(used) > 5
    assert {name for name in used if name not in text} == set()
