"""Wrong input to the command line: one line with key, value and remedy, exit code 2, nothing was started."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

import pytest

from phalanx import system
from phalanx.cli import main
from phalanx.config.build import VARIABLES


class Case:
    """One wrong input: what is written, how it is called, and what the line has to name."""

    def __init__(
        self, toml: str | None = None, *names: str, command: str = "run phalanx.toml", **env: str
    ) -> None:
        self.toml, self.names, self.command, self.env = toml, names, command, env


DECLARED = {
    "platform name": Case('[platform]\nname = "Prod_1"', "platform.name", "'Prod_1'", "a-z"),
    "node name": Case('[platform]\nname = "prod"\nnode = "a.b"', "platform.node", "'a.b'", "a-z"),
    "app name": Case(
        '[platform]\nname = "prod"\n[apps.audit]\npattern = "active-passive"', "apps", "'audit'", "choose"
    ),
    "ttl below the floor": Case(
        '[platform]\nname = "prod"\n[timings]\nttl = "500ms"', "timings.ttl", "500ms", "1"
    ),
    "renewal not below ttl": Case(
        '[platform]\nname = "prod"\n[timings]\nttl = 2\nrenew_every = 2', "timings.renew_every", "2", "choose"
    ),
    "unknown key": Case(
        '[platform]\nname = "prod"\n[timings]\nttk = 2', "timings.ttk", "2", "did you mean ttl?"
    ),
    "broken TOML": Case('[platform]\nname = "prod', "phalanx.toml:2", "correct the TOML"),
    "empty file": Case("", "platform.name", "set it"),
    "missing file": Case(
        "", "absent.toml", "No such file", "name a readable TOML file", command="run absent.toml"
    ),
    "node option": Case(
        '[platform]\nname = "prod"', "--node", "'N 1'", "a-z", command="run phalanx.toml --node=N\t1"
    ),
    "NATS option": Case(
        '[platform]\nname = "prod"',
        "--nats",
        "http://x",
        "nats://host:4222",
        command="run phalanx.toml --nats http://x",
    ),
    "HTTP variable": Case(
        '[platform]\nname = "prod"', "PHALANX_HTTP", "'nonsense'", "host:port", PHALANX_HTTP="nonsense"
    ),
    "no such module": Case(None, "'absent'", "no module of that name", command="run absent:platform"),
    "module without that name": Case(None, "'mine:other'", "mine:platform?", command="run mine:other"),
    "module's name is no platform": Case(None, "'mine:number'", "int", command="run mine:number"),
    "module that raises": Case(None, "'broken'", "ZeroDivisionError", "broken.py:2", command="run broken:x"),
    "module with a wrong declaration": Case(None, "platform.name", "'No'", command="run wrong:platform"),
    "neither file nor module": Case(None, "'a b:c'", "module:name", command="run a\tb:c"),
    "data directory is a file": Case(
        '[platform]\nname = "prod"\ndata_dir = "mine.py"', "platform.data_dir", "mine.py", "set data_dir"
    ),
    "unknown command": Case(None, '"runn"', command="runn x"),
    "unknown option": Case(None, "--nod", "--help", command="run phalanx.toml --nod n1"),
    "no target": Case(None, "TARGET", "--help", command="run"),
    "dev: too many nodes": Case(
        '[platform]\nname = "prod"', "--nodes", "17", "1 to 9", command="dev phalanx.toml --nodes 17"
    ),
    "audit: no time": Case(None, "--since", "'soon'", "10m", command="audit --since soon --platform prod"),
    "status: which platform": Case(None, "--platform", "phalanx.toml", command="status"),
}
"""What can be seen without looking at the machine."""

MODULES = {
    "mine.py": "from phalanx import Platform\nplatform = Platform('prod')\nnumber = 3\nplatform.run()\n",
    "broken.py": "x = 1\ny = 1 / 0\n",
    "wrong.py": "from phalanx import Platform\nplatform = Platform('No')\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with some Python modules; environment and modules are as before afterwards."""
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in {*VARIABLES, "PHALANX_PLATFORM"}:
        monkeypatch.setenv(name, "x")  # so that it is put back, whatever the command does to it
        monkeypatch.delenv(name)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *names: str) -> None:
    """One line, with all of *names* in it."""
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for name in names:
        assert name in lines[0], lines[0]


def words(command: str) -> list[str]:
    """The arguments; a tab stands for a space inside of one."""
    return [word.replace("\t", " ") for word in command.split(" ")]


@pytest.mark.parametrize("name", DECLARED)
def test_wrong_declaration_is_one_line_and_starts_nothing(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every wrong value leads to exit code 2, one line that names it, no file and no process."""
    case = DECLARED[name]
    if case.toml is not None:
        (folder / "phalanx.toml").write_text(case.toml)
    before = {path.name for path in folder.rglob("*")}
    mark = f"test-{secrets.token_hex(8)}"
    for variable, value in {
        system.MARKER_ENV: mark,
        "XDG_STATE_HOME": str(folder / "state"),
        **case.env,
    }.items():
        monkeypatch.setenv(variable, value)
    assert main.run(words(case.command)) == 2
    refused(capsys, *case.names)
    assert {path.name for path in folder.rglob("*")} == before
    assert system.find_marked(mark) == []


def test_config_check_lists_all_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``config check`` prints every error, one line each, and as JSON with key and remedy."""
    (folder / "phalanx.toml").write_text('[platform]\nname = "No"\n[timings]\nttl = 0.1\n[http]\nprot = 1\n')
    assert main.run(["config", "check"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)
    assert main.run(["config", "check", "phalanx.toml", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert {error["key"] for error in told["errors"]} == {"platform.name", "timings.ttl", "http.prot"}
    assert told["ok"] is False


LACKING = """\
[platform]
name = "prod"
[apps.wiki]
pattern = "active-passive"
vip = { address = "203.0.113.9/24", interface = "phx-none" }
[apps.wiki.backend]
type = "process"
command = "/no/such/wiki"
[apps.shop]
pattern = "active-passive"
[apps.shop.backend]
type = "docker"
image = "shop:1"
socket = "no-such.sock"
"""


def test_config_check_says_what_this_host_lacks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program, an interface and an engine that are missing: all of it, not only the first; or, for another
    host, none of it."""
    text = LACKING.replace("no-such.sock", str(folder / "no-such.sock"))
    (folder / "phalanx.toml").write_text(text)
    assert main.run(["config", "check"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert len(lines) == 3
    assert "/no/such/wiki does not exist" in lines[0]
    assert "203.0.113.9/24" in lines[1]  # no such interface; or, for a user, no right to have addresses
    assert "no Docker Engine" in lines[2]
    assert main.run(["config", "check", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)["errors"]
    assert [error["key"] for error in told] == ["apps.wiki.backend", "apps.wiki.vip", "apps.shop.backend"]
    assert all(error["remedy"] for error in told)
    assert main.run(["config", "check", "--other-host"]) == 0
