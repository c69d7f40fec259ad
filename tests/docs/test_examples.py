"""Every example of the documentation is run for real; see tests/docs/__init__.py for the marks."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.docs.pages import ROOT, Block, blocks, commands

from phalanx.bus import permissions, provision
from phalanx.bus.connection import NatsBus
from phalanx.cli.main import app as command_line
from phalanx.config import NatsOptions, check_toml
from phalanx.names import Names
from phalanx.testing.nats import NatsServer, Ports
from phalanx.testing.nodes import NodeProcess

SECONDS = 90.0
PYTHON = blocks("python")
SECRETS = {"NATS_PASSWORD": "example", "NATS_ROUTE_SECRET": "example"}

_IN_ON_ACTIVE = """
import asyncio
from phalanx import *

platform = Platform("prod")
app = platform.app("wiki")
done = asyncio.Event()
problems = []


@app.on_active
async def on_active(ctx):
    try:
        await body(ctx, app)
    except BaseException as error:
        problems.append(error)
    done.set()


async def body(ctx, app):
{block}


async def main():
    async with platform:
        async with asyncio.timeout(60):
            await done.wait()
    if problems:
        raise problems[0]


asyncio.run(main())
"""


def _kind(block: Block) -> str:
    if block.mark:
        return block.mark.partition(":")[0]
    if block.page.name == "nats.md":
        return "app user"
    if re.search(r"^ *\S+\.run\(\)$", block.text, re.MULTILINE):
        return "node"
    return "pytest" if re.search(r"^(async )?def test_", block.text, re.MULTILINE) else "script"


def _of(*kinds: str) -> list[object]:
    return [pytest.param(block, id=str(block)) for block in PYTHON if _kind(block) in kinds]


def _file(block: Block, folder: Path, ports: Ports) -> Path:
    """The block as a file, and all named files of its page beside it. Port 8080 may be in use."""
    port = str(ports.take())
    for each in PYTHON:
        name = re.match(r"# (\w+\.py)\n", each.text)
        if name and each.page == block.page:
            (folder / name[1]).write_text(each.text.replace("8080", port))
    kind = "test_example.py" if _kind(block) == "pytest" else "example.py"
    path = folder / kind
    path.write_text(block.text.replace("8080", port))
    return path


def _environment(folder: Path, nats: NatsServer | None = None) -> Mapping[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    own = {
        "PATH": path,
        "PHALANX_DATA": str(folder / "data"),
        "PHALANX_NODE": "n1",
        "PHALANX_HTTP": "0",
        "PHALANX_DATABASES": str(folder),
    }
    return {**os.environ, **own, **SECRETS, **({"PHALANX_NATS": nats.url()} if nats else {})}


def _run(*command: str, folder: Path, env: Mapping[str, str]) -> None:
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.fixture
def ports() -> Iterator[Ports]:
    """Free ports, kept for this test."""
    taken = Ports()
    yield taken
    taken.close()


@pytest.mark.parametrize("block", _of("node"))
async def test_program_runs_as_a_node(
    block: Block, tmp_path: Path, nats_server: NatsServer, ports: Ports
) -> None:
    """Every app of the program becomes active on a real NATS server, and SIGTERM ends it with 0."""
    path = _file(block, tmp_path, ports)
    await _is_active_and_ends([sys.executable, str(path)], tmp_path, nats_server, ports)


async def _is_active_and_ends(command: list[str], folder: Path, nats: NatsServer, ports: Ports) -> None:
    env = {
        "PATH": _environment(folder)["PATH"],
        "PHALANX_NATS": nats.url(),
        "PHALANX_DATABASES": str(folder),
        "PYTHONPATH": str(folder),
    }
    node = NodeProcess(command, "n1", folder / "node", ports.take(), env)
    node.start()
    try:
        async with asyncio.timeout(SECONDS):
            while not (apps := node.status().get("apps")) or any(app["role"] != "active" for app in apps):
                assert node.is_running, node.log()
                await asyncio.sleep(0.02)
        assert "hook-failed" not in node.log()
        node.terminate()
        assert await asyncio.to_thread(node.wait, SECONDS) == 0, node.log()
    except TimeoutError:
        pytest.fail(f"not active: {node.log()}")
    finally:
        node.stop()


def _of_another_host(block: Block) -> bool:
    """It has a network or an image that this host has not: whether it is right is checked all the same."""
    return "vip = " in block.text


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b, id=str(b))
        for b in blocks("toml")
        if b.page.name == "README.md" and not _of_another_host(b)
    ],
)
async def test_file_runs_as_a_node(
    block: Block, tmp_path: Path, nats_server: NatsServer, ports: Ports
) -> None:
    """`phalanx run phalanx.toml` does what the program does; a block with one table gets a platform."""
    text = block.text if "[platform]" in block.text else f'[platform]\nname = "prod"\n\n{block.text}'
    (tmp_path / "data").mkdir()
    path = tmp_path / "phalanx.toml"
    path.write_text(text.replace("8080", str(ports.take())))
    await _is_active_and_ends(
        [sys.executable, "-m", "phalanx.cli.main", "run", str(path)], tmp_path, nats_server, ports
    )


@pytest.mark.parametrize("block", _of("in on_active"))
def test_snippet_runs_in_an_active_section(block: Block, tmp_path: Path, nats_server: NatsServer) -> None:
    """The lines run in an on_active hook, with ctx and app, and raise nothing."""
    text = _IN_ON_ACTIVE.format(block=textwrap.indent(block.text, "    "))
    (tmp_path / "example.py").write_text(text)
    _run(sys.executable, "example.py", folder=tmp_path, env=_environment(tmp_path, nats_server))


@pytest.mark.parametrize("block", _of("script"))
def test_script_runs(block: Block, tmp_path: Path, nats_server: NatsServer, ports: Ports) -> None:
    """The program ends with 0, with a real NATS server at hand."""
    path = _file(block, tmp_path, ports)
    _run(sys.executable, path.name, folder=tmp_path, env=_environment(tmp_path, nats_server))


@pytest.mark.parametrize("block", _of("pytest"))
def test_tests_of_users_pass(block: Block, tmp_path: Path, ports: Ports) -> None:
    """What a user copies into a test file passes, with the fixtures that the plugin gives."""
    path = _file(block, tmp_path, ports)
    [ini] = [each.text for each in blocks("ini") if "[pytest]" in each.text]
    (tmp_path / "pytest.ini").write_text(f"{ini}filterwarnings = error\n")
    environment = {k: v for k, v in _environment(tmp_path).items() if not k.startswith("PHALANX_")}
    _run(sys.executable, "-m", "pytest", "-q", path.name, folder=tmp_path, env=environment)


@pytest.mark.parametrize("block", _of("app user"))
async def test_client_of_an_app_user(block: Block) -> None:
    """The client of docs/nats.md, on a server with the permissions that `phalanx nats permissions` prints."""
    users = ("prod-node", "prod-app-wiki", "prod-operator", "prod-viewer")
    conf = permissions.render("prod", ["wiki"], passwords={user: f"pw-{user}" for user in users})
    with NatsServer(extra=conf, system_user=False) as server:
        import nats

        node = await nats.connect(server.url(), user="prod-node", password="pw-prod-node")
        config = provision.bucket_config(Names("prod"), "prod_wiki", "wiki", history=8, replicas=1)
        await node.request(
            f"$JS.API.STREAM.CREATE.{config['name']}", __import__("json").dumps(config).encode()
        )
        await node.close()
        names = {"nats": nats, "url": server.url(), "password": "pw-prod-app-wiki"}
        code = compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        await eval(code, names)
        await names["client"].close()  # type: ignore[attr-defined]


# --- repairs of docs/operations.md


_WIKI = """
from phalanx import Platform

platform = Platform("prod", timings={"ttl": "1s"})
platform.app("wiki")
platform.run()
"""


async def _platform_without(stream: str, nats: NatsServer, folder: Path) -> NodeProcess:
    """A node that was active once, is stopped, and whose NATS has lost *stream*."""
    (folder / "mine.py").write_text(_WIKI)
    command = [sys.executable, str(folder / "mine.py")]
    ports = Ports()
    node = NodeProcess(command, "n1", folder / "node", ports.take(), {"PHALANX_NATS": nats.url()})
    ports.close()
    await _run_until_active(node)
    bus = await NatsBus.connect(NatsOptions(urls=(nats.url(),)))
    await bus.api(f"STREAM.DELETE.{stream}", {})
    await bus.close()
    return node


async def _run_until_active(node: NodeProcess) -> int:
    """Start the node, wait until it is active, stop it; the epoch."""
    node.start()
    try:
        async with asyncio.timeout(SECONDS):
            while not node.is_active("wiki"):
                assert node.is_running, node.log()
                await asyncio.sleep(0.02)
        epoch = int(node.status()["apps"][0]["epoch"])
        node.terminate()
        await asyncio.to_thread(node.wait, SECONDS)
        return epoch
    finally:
        node.stop()


@pytest.mark.parametrize("block", _of("recover sessions"))
async def test_session_streams_are_made_anew(block: Block, tmp_path: Path, nats_server: NatsServer) -> None:
    """Without session streams no node gets a session; after the repair one is active again."""
    node = await _platform_without("prod_sessions_1", nats_server, tmp_path)
    (tmp_path / "example.py").write_text(block.text)
    _run(sys.executable, "example.py", folder=tmp_path, env=_environment(tmp_path, nats_server))
    assert await _run_until_active(node) > 0


def test_fragments_are_python() -> None:
    """A fragment, if there is one, says why it is one, and at least compiles."""
    for block in (one for one in PYTHON if _kind(one) == "fragment"):
        assert block.mark.partition(":")[2].strip(), "say why: <!-- test: fragment: why -->"
        compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_every_python_block_is_of_a_known_kind() -> None:
    """A mistyped mark would leave a block out."""
    known = {"node", "in on_active", "script", "pytest", "app user", "fragment", "recover sessions"}
    assert {str(b): _kind(b) for b in PYTHON if _kind(b) not in known} == {}


@pytest.mark.parametrize("block", [pytest.param(b, id=str(b)) for b in blocks("toml")])
def test_toml_is_right(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`phalanx config check` has nothing to say; where a block shows one table, the platform is added."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text = block.text if "[platform]" in block.text else f'[platform]\nname = "prod"\n\n{block.text}'
    path = tmp_path / "phalanx.toml"
    path.write_text(text)
    assert [str(error) for error in check_toml(path)] == []


@pytest.mark.parametrize(
    ("block", "arguments"), [pytest.param(b, a, id=f"{b} {' '.join(a)}") for b, a in commands()]
)
def test_command_line_parses(block: Block, arguments: list[str]) -> None:
    """The command exists, takes these options, and misses none."""
    command_line.parse_args(arguments, exit_on_error=False, print_error=False)


def test_make_targets_exist() -> None:
    """What README and docs tell to make can be made."""
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = {
        target
        for block in blocks("console", "bash", "sh")
        for target in re.findall(r"(?:^|\$ )make (?:-s )?([a-z]+)", block.text, re.MULTILINE)
    }
    assert wanted - known == set()
