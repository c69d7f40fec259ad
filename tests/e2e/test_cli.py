"""The command line against real nodes, that are real ``phalanx run`` processes, and a real NATS server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phalanx import system
from phalanx.client import PlatformClient
from phalanx.config import NatsOptions
from phalanx.errors import ConfigError, PlatformNotFound, StepDownFailed
from phalanx.testing.nats import NatsCluster, NatsServer
from phalanx.testing.nodes import Nodes

CLI = (sys.executable, "-m", "phalanx.cli.main")

TOML = """
[platform]
name = "prod"
[timings]
ttl = "2s"
[apps.wiki]
pattern = "active-passive"
[apps.wiki.backend]
type = "process"
command = "sleep 1000"
[apps.shop]
pattern = "active-passive"
"""


class Platform:
    """Two nodes of one platform, and the command line to look at it."""

    def __init__(self, server: NatsCluster, nodes: Nodes, toml: Path) -> None:
        self.server, self.nodes, self.toml = server, nodes, toml

    def call(
        self, *words: str, code: int | None = 0, options: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line; it must end with *code* (None: any)."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("PHALANX_")}
        if options:
            env |= {"PHALANX_PLATFORM": "prod", "PHALANX_NATS": self.server.url()}
        done = subprocess.run(
            [*CLI, *words],
            env=env,
            cwd=self.toml.parent,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert code in (done.returncode, None), (words, done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def json(self, *words: str, code: int = 0) -> Any:
        """What it prints with --json."""
        return json.loads(self.call(*words, "--json", code=code).stdout)

    async def up(self) -> None:
        """Both nodes take part, and both apps are active somewhere."""
        for app in ("wiki", "shop"):
            await self.nodes.wait_for_active(app)
            await self.nodes.wait_for_standbys(app, 1)


@pytest.fixture(scope="module")
def shared() -> Iterator[Platform]:
    """Two nodes from one phalanx.toml; what a test does to them it puts right again."""
    with tempfile.TemporaryDirectory() as folder, NatsServer() as server:
        toml = Path(folder, "prod.toml")
        toml.write_text(TOML)
        with Nodes([*CLI, "run", str(toml)], server.urls, count=2) as nodes:
            yield Platform(server, nodes, toml)


@pytest.fixture
async def platform(shared: Platform) -> Platform:
    """The shared platform, with both nodes up."""
    shared.nodes.start()
    await shared.up()
    return shared


async def test_status_shows_nodes_and_apps(platform: Platform) -> None:
    """``status`` names every node, and for each app who is active; --json has the documented fields."""
    shown = platform.json("status")
    assert set(shown) == {"platform", "nodes", "apps"}
    assert [node["node"] for node in shown["nodes"]] == ["n1", "n2"]
    assert all(node["answers"] and node["live"] and node["ready"] for node in shown["nodes"])
    assert {node["pid"] for node in shown["nodes"]} == {node.pid for node in platform.nodes}
    apps = {app["name"]: app for app in shown["apps"]}
    assert apps["wiki"]["active"] == platform.nodes.actives("wiki")[0]
    assert apps["wiki"]["epoch"] > 0
    assert {each["role"] for each in apps["wiki"]["nodes"]} == {"active", "standby"}
    text = platform.call("status").stdout
    assert "\x1b" not in text
    assert text.splitlines()[0] == "platform prod, 2 nodes"
    assert any(line.split()[:3] == ["wiki", "active", apps["wiki"]["active"]] for line in text.splitlines())


async def test_status_finds_platform_by_file(platform: Platform) -> None:
    """With --config the file says which platform and NATS, and flags win over it."""
    done = platform.call(
        "status", "--json", "--config", str(platform.toml), "--nats", platform.server.url(), options=False
    )
    assert json.loads(done.stdout)["platform"] == "prod"
    done = platform.call(
        "status", "--config", str(platform.toml), "--nats", platform.server.url(), "--platform", "other",
        code=3, options=False,
    )  # fmt: skip
    assert done.stderr.startswith("error: there is no platform 'other'")


async def test_stepdown_to_a_named_node_and_its_audit(platform: Platform) -> None:
    """``stepdown`` says who took over; the audit log has the reason and who asked."""
    before = platform.nodes.actives("wiki")[0]
    other = {"n1": "n2", "n2": "n1"}[before]
    done = platform.json("stepdown", "wiki", "--node", other, "--reason", "a new kernel")
    assert (done["app"], done["previous"], done["active"]) == ("wiki", before, other)
    assert done["seconds"] < 10
    assert platform.json("status")["apps"][1]["active"] == other
    assert platform.json("status")["apps"][1]["epoch"] == done["epoch"]

    def entries() -> list[dict[str, Any]]:
        lines = platform.call("audit", "--since", "10m", "--json").stdout.splitlines()
        return [entry for line in lines if (entry := json.loads(line))["app"] == "wiki"]

    await until(lambda: any(e["action"] == "active" and e["epoch"] == done["epoch"] for e in entries()))
    asked = [entry for entry in entries() if entry["action"] == "handing-over"][-1]
    assert asked["node"] == before
    assert "a new kernel" in asked["reason"]
    assert "asked by" in asked["reason"]
    assert set(asked) == {
        "id", "time", "node", "category", "action", "app", "epoch", "reason", "duration_seconds", "details",
    }  # fmt: skip
    assert "app.handing-over  wiki" in platform.call("audit").stdout


async def test_stepdown_of_what_is_not_there(platform: Platform) -> None:
    """An unknown app or node is bad input; the active app stays where it is."""
    before = platform.nodes.actives("wiki")
    wrong = platform.call("stepdown", "wikki", code=2).stderr
    assert wrong.startswith("error: app = 'wikki'")
    assert "shop, wiki" in wrong
    assert platform.call("stepdown", "wiki", "--node", "n9", code=2).stderr.startswith("error: --node = 'n9'")
    assert platform.nodes.actives("wiki") == before


async def test_audit_follows(platform: Platform) -> None:
    """``audit --follow`` prints what happens while it runs, and ends with 130 at Ctrl-C."""
    process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
        [*CLI, "audit", "--follow", "--json", "--limit", "1", "--platform", "prod"],
        env={**os.environ, "PHALANX_NATS": platform.server.url()},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        entries = [json.loads(await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 20))]
        known = [json.loads(line) for line in platform.call("audit", "--json").stdout.splitlines()]
        assert entries[0] in known
        platform.call("stepdown", "shop")
        while (entries[-1]["app"], entries[-1]["action"]) != ("shop", "active"):
            line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 20)
            entries.append(json.loads(line))
        # Each once, and none from before the one that --limit asked for.
        ids = [entry["id"] for entry in entries]
        assert len(set(ids)) == len(ids)
        assert not set(ids[1:]) & {entry["id"] for entry in known[: known.index(entries[0])]}
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait, 10) == 130
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def test_status_watch_shows_each_change(platform: Platform) -> None:
    """``status --watch --json`` prints one object at first, and another when the leader has changed."""
    process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
        [*CLI, "status", "--watch", "--json", "--platform", "prod"],
        env={**os.environ, "PHALANX_NATS": platform.server.url()},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        before = platform.nodes.actives("wiki")[0]
        platform.call("stepdown", "wiki")
        seen: list[str | None] = []
        while not seen or seen[-1] in (None, before):
            line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 20)
            seen.append({app["name"]: app["active"] for app in json.loads(line)["apps"]}["wiki"])
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def test_status_on_a_terminal_has_colours(platform: Platform) -> None:
    """On a terminal, and only there, the roles are coloured."""
    env = {**os.environ, "PHALANX_NATS": platform.server.url(), "TERM": "xterm-256color"}
    env.pop("NO_COLOR", None)
    command = f"{' '.join(CLI)} status --platform prod"
    done = await asyncio.to_thread(
        subprocess.run, ["script", "-qec", command, "/dev/null"], env=env, capture_output=True, timeout=30
    )
    assert done.returncode == 0
    assert b"\x1b[1;32mactive" in done.stdout


async def test_health_and_a_node_that_died(platform: Platform) -> None:
    """``health`` is fine with all nodes there; after a crash it names the dead one, and exits with 1."""
    assert platform.call("health").stdout.startswith("healthy: 2 nodes, 2 apps")
    platform.nodes["n1"].kill()
    try:
        await platform.nodes.wait_for_active("wiki", other_than="n1")

        def over() -> bool:
            node = {each["node"]: each for each in platform.json("status")["nodes"]}["n1"]
            return not node["live"] and not node["answers"]

        await until(over)
        told = platform.json("health", code=1)
        assert told["healthy"] is False
        assert told["reasons"] == ["node n1: the node does not answer, its session is over"]
        assert "n1" in platform.call("health", code=1).stdout
    finally:
        platform.nodes.start()
        await platform.up()


async def test_sigterm_hands_over(platform: Platform) -> None:
    """SIGTERM of ``phalanx run`` hands its apps over, and it ends with 0 and without leftovers."""
    active = platform.nodes.actives("wiki")[0]
    node = platform.nodes[active]
    keeper = system.ProcessRef.of(node.keeper_pid)
    node.terminate()
    assert await asyncio.to_thread(node.wait) == 0
    try:
        await platform.nodes.wait_for_active("wiki", other_than=active)
        await until(lambda: not keeper.alive())
        assert [each["node"] for each in platform.json("status")["nodes"]] == [
            {"n1": "n2", "n2": "n1"}[active]
        ]
    finally:
        platform.nodes.start()
        await platform.up()


async def test_second_node_of_one_id_is_refused(platform: Platform, tmp_path: Path) -> None:
    """``phalanx run --node n1`` while n1 runs ends with 2, and says who has the id."""
    words = ("run", str(platform.toml), "--node", "n1", "--data-dir", str(tmp_path), "--http", "off")
    done = await asyncio.to_thread(platform.call, *words, code=2)
    assert "node id 'n1' is taken by session" in done.stderr
    assert "Traceback" not in done.stderr


async def test_doctor_finds_all_well(platform: Platform) -> None:
    """With a good platform nothing fails; one server only is a warning; no stream is left behind."""
    lines = platform.call("doctor", "--json").stdout.splitlines()
    found = {(each := json.loads(line))["check"]: each for line in lines}
    assert "fail" not in {each["level"] for each in found.values()}
    assert found["replicas"]["level"] == "warn"
    assert found["members"]["text"] == "2 answer: n1, n2"
    assert {"python", "keeper", "jetstream", "permissions", "round-trip", "clocks"} <= set(found)
    async with PlatformClient("prod", NatsOptions(urls=platform.server.urls)) as client:
        streams = (await client.bus.api("STREAM.NAMES", {}))["streams"]
    assert not [name for name in streams if "doctor" in name]


async def test_doctor_names_the_remedy(platform: Platform, tmp_path: Path) -> None:
    """A port that is taken and a NATS that is not there are FAIL, with a remedy, and exit code 1."""
    toml = tmp_path / "phalanx.toml"
    port = int(platform.server.port())
    toml.write_text(
        f'[platform]\nname = "prod"\nnode = "n9"\n[http]\nport = {port}\n'
        '[nats]\nurls = ["nats://127.0.0.1:1"]\n'
    )
    done = platform.call("doctor", str(toml), "--json", "--timeout", "0.5", code=1, options=False)
    failed = {
        each["check"]: each
        for line in done.stdout.splitlines()
        if (each := json.loads(line))["level"] == "fail"
    }
    assert set(failed) == {"http", "nats"}
    assert "choose another" in failed["http"]["remedy"]
    assert "nats.urls" in failed["nats"]["remedy"]


async def test_doctor_sees_a_dead_nats_server_and_missing_permissions(tmp_path: Path) -> None:
    """One of three servers is gone: a warning that names it. A login that may only look: FAIL."""
    toml = tmp_path / "prod.toml"
    toml.write_text(TOML)
    accounts = """
        accounts { P { jetstream: enabled, users: [
            { user: "node", password: "n" }
            { user: "look", password: "l", permissions: { subscribe: "_INBOX.>", publish: [
                "$JS.API.INFO", "$JS.API.STREAM.INFO.>", "$JS.API.DIRECT.GET.>", "prod._.control.status" ] } }
        ] } }"""
    with NatsCluster(3, extra=accounts, system_user=False) as cluster:
        urls = {
            user: ",".join(url.replace("://", f"://{user}:{user[0]}@") for url in cluster.urls)
            for user in ("node", "look")
        }
        with Nodes([*CLI, "run", str(toml)], urls["node"].split(","), count=1) as nodes:
            platform = Platform(cluster, nodes, toml)
            await nodes.wait_for_active("wiki")

            def findings(user: str, code: int | None = None) -> dict[str, list[dict[str, str]]]:
                words = ("doctor", "--json", "--platform", "prod", "--nats", urls[user])
                found: dict[str, list[dict[str, str]]] = {}
                for line in platform.call(*words, code=code, options=False).stdout.splitlines():
                    found.setdefault((each := json.loads(line))["check"], []).append(each)
                return found

            well = await asyncio.to_thread(findings, "node", 0)
            assert [each["level"] for each in (*well["replicas"], *well["sessions"], *well["peers"])] == [
                "ok"
            ] * 3
            looking = await asyncio.to_thread(findings, "look", 1)
            assert looking["permissions"][0]["level"] == "fail"
            assert "$kv.prod_platform.member.doctor" in looking["permissions"][0]["text"].lower()
            assert looking["round-trip"][0]["level"] == "fail"
            assert "$js.api.stream.create.prod_doctor_" in looking["round-trip"][0]["text"]
            cluster.kill(2)

            def names_the_dead() -> bool:
                # While JetStream elects a leader anew (seconds) other checks may fail.
                found = findings("node")
                assert found["permissions"][0]["level"] == "ok"
                return any(each["text"].startswith("n3 ") for each in found["peers"])

            await until(names_the_dead, 60)


async def test_nats_unreachable_is_3(platform: Platform) -> None:
    """Looking at a platform whose NATS is not there: exit code 3."""
    for command in (("status",), ("health",), ("stepdown", "wiki"), ("audit",)):
        done = platform.call(*command, "--nats", "nats://127.0.0.1:1", "--timeout", "0.3", code=3)
        assert done.stderr.count("\n") == 1
        assert "nats://127.0.0.1:1" in done.stderr


async def test_broken_pipe_is_silent(platform: Platform) -> None:
    """Whoever reads only the first line sees no complaint."""
    done = await asyncio.to_thread(
        subprocess.run,
        ["bash", "-c", f"{' '.join(CLI)} audit --json --limit 100000 | true; exit ${{PIPESTATUS[0]}}"],
        env={**os.environ, "PHALANX_PLATFORM": "prod", "PHALANX_NATS": platform.server.url()},
        capture_output=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (141, b"")


async def test_client_from_python(platform: Platform) -> None:
    """The same from a program: status, members, audit, step down, and its errors."""
    async with PlatformClient("prod", NatsOptions(urls=platform.server.urls)) as client:
        assert [status.node for status in await client.status()] == ["n1", "n2"]
        assert set(await client.members()) == {"n1", "n2"}
        assert (await client.audit(limit=3))[-1].node in {"n1", "n2"}
        done = await client.step_down("shop", reason="a test")
        assert done.active not in (None, done.previous)
        with pytest.raises(ConfigError, match="choose from: shop, wiki"):
            await client.step_down("nothing")
    async with PlatformClient("absent", NatsOptions(urls=platform.server.urls)) as client:
        with pytest.raises(PlatformNotFound):
            await client.status()


async def test_client_status_does_not_wait_for_the_bound(platform: Platform) -> None:
    """When all live members have answered the status is there at once, however long the bound."""
    async with PlatformClient("prod", NatsOptions(urls=platform.server.urls)) as client:
        began = system.now()
        assert len(await client.status(timeout=30)) == 2
        assert system.now() - began < 5


async def test_stepdown_of_an_app_that_nobody_serves(platform: Platform) -> None:
    """With all nodes gone there is nobody to step down: that is a failure, not bad input."""
    for node in platform.nodes:
        node.terminate()
    for node in platform.nodes:
        await asyncio.to_thread(node.wait)
    async with PlatformClient("prod", NatsOptions(urls=platform.server.urls)) as client:
        with pytest.raises(StepDownFailed, match="no node is active"):
            await client.step_down("wiki")
    assert platform.json("health", code=1)["reasons"] == ["the platform has no nodes"]


# --- phalanx dev


class Dev:
    """A running ``phalanx dev``, and what it has said."""

    def __init__(self, *words: str, mark: str, folder: Path) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PHALANX_")}
        self.events: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [*CLI, "dev", *words, "--json"],
            cwd=folder,
            env={**env, "DEV_MARK": mark, "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    async def wait_for(self, kind: str, node: str = "", timeout: float = 120) -> dict[str, Any]:
        """The next event of that kind."""
        assert self.process.stdout is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while line := await asyncio.to_thread(self.process.stdout.readline):
                    event = json.loads(line)
                    self.events.append(event)
                    if event["event"] == kind and node in ("", event.get("node")):
                        return event
        said = "\n".join(str(event.get("line") or event) for event in self.events[-60:])
        raise AssertionError(f"it did not say {kind} within {timeout:g} s:\n{said}")

    def close(self) -> None:
        """End it, should it still run: gracefully, since it has children."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def marked(mark: str) -> list[int]:
    """All processes that come from that ``phalanx dev``."""
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if f"DEV_MARK={mark}".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
    return found


async def until(condition: Callable[[], bool], timeout: float = 20) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + timeout
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.05)


async def test_dev_three_nodes_one_killed_then_ctrl_c(tmp_path: Path) -> None:
    """``dev`` brings up three nodes; one is killed, another takes over; Ctrl-C leaves no process, no file."""
    toml = tmp_path / "try.toml"
    toml.write_text(TOML)
    mark = f"dev-{os.getpid()}-{system.now()}"
    dev = Dev("try.toml", "--nodes", "3", mark=mark, folder=tmp_path)
    try:
        up = await dev.wait_for("up")
        assert len(up["nats"]) == 3
        assert [node["node"] for node in up["nodes"]] == ["node-1", "node-2", "node-3"]
        active = up["active"]["wiki"]
        os.kill({node["node"]: node["pid"] for node in up["nodes"]}[active], signal.SIGKILL)
        assert (await dev.wait_for("ended", active))["text"] == "killed by SIGKILL"
        async with PlatformClient("prod", NatsOptions(urls=up["nats"])) as client:
            async with asyncio.timeout(20):
                while True:
                    actives = {
                        status.node
                        for status in await client.status()
                        for app in status.apps
                        if app.name == "wiki" and app.role == "active"
                    }
                    if actives and active not in actives:
                        break
                    await asyncio.sleep(0.05)
        await dev.wait_for("started", active)
        dev.process.send_signal(signal.SIGINT)
        await dev.wait_for("stopped")
        assert await asyncio.to_thread(dev.process.wait, 30) == 0
        assert marked(mark) == []
        assert os.listdir(tmp_path) == ["try.toml"]
    finally:
        dev.close()


async def test_dev_of_a_module_keeps_its_data(tmp_path: Path) -> None:
    """``dev module:platform`` on one node and one server; the module's own run() does not get in the way."""
    (tmp_path / "mine.py").write_text(
        "from phalanx import ActivePassive, Platform\n"
        "platform = Platform('own', nats='nats://user:secret@127.0.0.1:1')\n"
        "app = platform.app('wiki', ActivePassive())\n"
        "platform.run()\n"
    )
    mark = f"dev-{os.getpid()}-{system.now()}"
    dev = Dev("mine:platform", "--nodes", "1", "--data-dir", "kept", mark=mark, folder=tmp_path)
    try:
        up = await dev.wait_for("up")
        assert up["active"] == {"wiki": "node-1"}
        assert len(up["nats"]) == 1
        assert "secret" not in json.dumps(dev.events)
        dev.process.terminate()
        await dev.wait_for("stopped")
        assert await asyncio.to_thread(dev.process.wait, 30) == 0
        assert marked(mark) == []
        assert (tmp_path / "kept" / "node-1" / "identity.json").exists()
    finally:
        dev.close()


async def test_dev_with_nodes_that_cannot_start(tmp_path: Path) -> None:
    """When no node can start, ``dev`` ends by itself with 2, and nothing is left."""
    toml = tmp_path / "try.toml"
    toml.write_text(TOML)
    (tmp_path / "kept").mkdir()
    for node in ("node-1", "node-2"):
        (tmp_path / "kept" / node).write_text("in the way")
    mark = f"dev-{os.getpid()}-{system.now()}"
    dev = Dev("try.toml", "--nodes", "2", "--data-dir", "kept", mark=mark, folder=tmp_path)
    try:
        await dev.wait_for("stopped")
        assert await asyncio.to_thread(dev.process.wait, 30) == 2
        said = [event["line"] for event in dev.events if event["event"] == "log" and "line" in event]
        assert any("platform.data_dir" in line for line in said)
        assert marked(mark) == []
    finally:
        dev.close()
