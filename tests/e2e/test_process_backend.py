"""The process backend: what it gives its program, how it says that it can't, what it does with output."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import logging
import os
import pwd
import resource as resource_module
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from tests.waiting import until

from phalanx import cgroup_v2, child, config, system
from phalanx.backends import Holder, ProcessBackend, abandoning, gate, holder, process
from phalanx.errors import BackendError, SessionLost
from phalanx.keeper.fencing import kill_resources
from phalanx.ports import Running, SectionContext
from phalanx.testing.holders import holder_of
from phalanx.types import Resource


class Sections:
    """Makes sections, and knows what is registered."""

    def __init__(self, holder: Holder | None) -> None:
        self.holder = holder
        self.resources: dict[str, Resource] = {}
        self.markers: set[str] = set()
        self.before_group: Callable[[], Awaitable[None]] | None = None
        """What happens before the registration of a group is confirmed."""

    async def register(self, resource: Resource) -> None:
        self.resources[resource.id] = resource
        self.markers.add(resource.id)
        if resource.pgid and self.before_group is not None:
            await self.before_group()

    def unregister(self, resource_id: str) -> None:
        del self.resources[resource_id]

    async def start(self, command: object, **options: object) -> Running:
        """Start a program in a section of epoch 12, and wait until it is ready; else it is killed."""
        running = await self.begin(command, **options)
        try:
            await running.wait_ready()
        except BaseException:
            await running.kill()
            raise
        return running

    async def begin(self, command: object, **options: object) -> Running:
        """Start a program, and do not wait for it."""
        declared = config.build_app(
            "wiki",
            config.ActivePassive(),
            backend=config.Process(command, **options),  # pyright: ignore
        ).backend
        assert declared is not None
        section = SectionContext("prod", "n1", "wiki", 12, self.register, self.unregister, "/srv/wiki.db")
        return await ProcessBackend(declared, self.holder).start(section)


@pytest.fixture
async def sections(tmp_path: Path) -> AsyncIterator[Sections]:
    """Sections of which nothing is left after the test, no descriptor either."""
    before = set(os.listdir("/proc/self/fd"))
    async with Holder(tmp_path) as holder:
        assert await holder.claim("none") is None
        made = Sections(holder)
        yield made
    for marker in made.markers:
        system.kill_marked(marker)
    with contextlib.suppress(TimeoutError):
        await until(lambda: len(os.listdir("/proc/self/fd")) <= len(before))
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def is_there(path: str) -> bool:
    """Whether *path* exists."""
    return os.path.exists(path)


def python(code: str) -> list[str]:
    """A command that runs *code*."""
    return [sys.executable, "-uc", code]


LINES = logging.getLogger("phalanx.app.wiki")


REPORT = """
import json, os, sys
print(json.dumps({
    "env": dict(os.environ), "cwd": os.getcwd(), "uid": os.getuid(), "gid": os.getgid(),
    "groups": os.getgroups(), "leader": os.getpid() == os.getpgrp() == os.getsid(0),
    "stdin": sys.stdin.read(), "fds": sorted(os.listdir("/proc/self/fd")),
}))
"""


async def report(sections: Sections, lines: list[str], **options: object) -> dict[str, object]:
    """What a program sees of its surroundings."""
    running = await sections.start(python(REPORT), **options)
    assert await asyncio.wait_for(running.ended, 10) == "exited with code 0"
    await running.stop("done")
    return json.loads("".join(lines))


async def test_surroundings(
    sections: Sections, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environment, directory, session, empty stdin; no descriptor, and no service manager, of the node's."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/nowhere")
    monkeypatch.setenv("FROM_NODE", "1")
    monkeypatch.setattr(child, "MAX_LINE_BYTES", 1 << 20)
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    env = {"MORE": "2", "PHALANX_SECTION": "forged"}
    seen = await report(sections, lines, env=env, cwd=str(tmp_path))
    os.close(reading), os.close(writing)

    env = seen["env"]
    assert isinstance(env, dict)
    assert env["PHALANX_SECTION"] in sections.markers
    expected = {"PLATFORM": "prod", "NODE": "n1", "APP": "wiki", "EPOCH": "12"}
    assert {name: env[f"PHALANX_{name}"] for name in expected} == expected
    assert (env["FROM_NODE"], env["MORE"]) == ("1", "2")
    assert "NOTIFY_SOCKET" not in env
    assert seen["cwd"] == str(tmp_path)
    assert seen["leader"] is True
    assert seen["stdin"] == ""
    assert len(seen["fds"]) == 4  # pyright: ignore - 0, 1, 2, and the listing itself


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the user")
async def test_runs_as_another_user(
    sections: Sections, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """User, its groups, HOME and USER; and what it leaves is found all the same."""
    monkeypatch.setattr(child, "MAX_LINE_BYTES", 1 << 20)
    nobody = pwd.getpwnam("nobody")
    command = ["/bin/sh", "-c", "echo $(id -u) $(id -g) $(id -G) $HOME $USER; sleep 60"]
    running = await sections.start(command, user="nobody", cwd="/")
    await until(lambda: lines)
    groups = " ".join(map(str, os.getgrouplist("nobody", nobody.pw_gid)))
    assert lines == [f"{nobody.pw_uid} {nobody.pw_gid} {groups} {nobody.pw_dir} nobody"]
    await running.stop("done")
    assert not [pid for marker in sections.markers for pid in system.find_marked(marker)]


async def test_what_cannot_be_started_says_why(sections: Sections, tmp_path: Path) -> None:
    """Each wrong declaration: step prepare, the problem, a remedy; nothing is left registered."""
    plain, bad, orphan = tmp_path / "plain", tmp_path / "bad", tmp_path / "orphan"
    plain.write_text("#!/bin/sh\n")
    bad.write_text("echo no first line\n")
    orphan.write_text("#!/no/such/interpreter\n")
    bad.chmod(0o755)
    orphan.chmod(0o755)
    wrong: list[tuple[dict[str, object], str]] = [
        ({"command": "no-such-program-here"}, "no program 'no-such-program-here' in PATH"),
        ({"command": "/no/such/program"}, "/no/such/program does not exist"),
        ({"command": str(plain)}, "is not executable"),
        ({"command": str(tmp_path)}, "is not executable"),
        ({"command": str(bad)}, "Exec format error"),
        ({"command": str(orphan)}, "No such file or directory"),
        ({"command": "true", "cwd": "/no/such/directory"}, "cwd /no/such/directory does not exist"),
        ({"command": "true", "cwd": str(plain)}, "is no directory"),
        ({"command": "true", "user": "no-such-user"}, "there is no user 'no-such-user'"),
        ({"command": "true", "env": {"PATH": "/nowhere"}}, "no program 'true' in PATH"),
    ]
    for options, problem in wrong:
        with pytest.raises(BackendError) as caught:
            await sections.start(**options)  # pyright: ignore
        assert caught.value.step == "prepare", options
        assert problem in caught.value.problem, options
        assert caught.value.remedy, options
        assert not sections.resources


async def test_relative_program_is_found_from_cwd(
    sections: Sections, tmp_path: Path, lines: list[str]
) -> None:
    """./run is that of cwd, as a shell there would take it."""
    (tmp_path / "run").write_text("#!/bin/sh\necho here\n")
    (tmp_path / "run").chmod(0o755)
    running = await sections.start("./run", cwd=str(tmp_path))
    await running.ended
    await running.stop("done")
    assert lines == ["here"]


async def test_ready_check_that_passes_for_a_dead_program(sections: Sections) -> None:
    """Somebody else answers on the port, and ours has ended because of it: not ready."""
    running = python("raise SystemExit(1)")

    async def passes_late() -> None:
        await until(lambda: [r for r in sections.resources.values() if r.pgid])
        (resource,) = sections.resources.values()
        await until(lambda: not system.is_running(resource.pgid))

    with pytest.raises(BackendError, match="exited with code 1 before it was ready"):
        await sections.start(running, ready=config.FunctionCheck(passes_late, timeout=20))


async def test_cancelled_while_its_holder_spawns_it(sections: Sections, tmp_path: Path) -> None:
    """G8: the program may appear after the cancellation; start() waits and kills it."""
    parent = holder_of(tmp_path)
    os.kill(parent, signal.SIGSTOP)
    start = asyncio.create_task(sections.start("sleep 60"))
    try:
        await until(lambda: sections.resources)
        await asyncio.sleep(0.2)
        start.cancel()
        await asyncio.sleep(0.1)
        assert not start.done()
    finally:
        os.kill(parent, signal.SIGCONT)
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not [pid for marker in sections.markers for pid in system.find_marked(marker)]
    assert not sections.resources


async def test_holder_that_stands_still(
    sections: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start fails in time and leaves nothing; what runs is killed all the same, and then all goes on."""
    monkeypatch.setattr(holder, "ANSWER_SECONDS", 0.5)
    running = await sections.start("sleep 60")
    (resource,) = sections.resources.values()
    os.kill(holder_of(tmp_path), signal.SIGSTOP)
    with pytest.raises(BackendError, match=r"has not answered within 0\.5 s") as caught:
        await sections.start("sleep 61")
    assert caught.value.step == "start"
    assert list(sections.resources) == [resource.id]
    await running.kill()
    assert not system.is_running(resource.pgid)
    assert not sections.resources
    with pytest.raises(BackendError, match="has not answered"):  # it holds nothing: it is given up
        await sections.start("sleep 62")
    again = await sections.start(["/bin/echo", "up"])
    assert await again.ended == "exited with code 0"
    await again.stop("done")
    assert not [pid for marker in sections.markers for pid in system.find_marked(marker)]


async def test_holder_that_is_given_up_is_asked_nothing_while_it_dies(sections: Sections) -> None:
    """Whoever starts something at that very moment gets a new one."""
    await (await sections.start("sleep 60")).kill()
    assert sections.holder is not None
    link = sections.holder._link
    assert link is not None
    link._give_up()
    assert link.is_gone
    again = await sections.start(["/bin/echo", "up"])
    assert await again.ended == "exited with code 0"
    await again.stop("done")


async def test_holder_that_is_killed_takes_its_programs_with_it(sections: Sections, tmp_path: Path) -> None:
    """The kernel sees to that; the section hears of an end, and the next start has a new holder."""
    running = await sections.start("sleep 60")
    (resource,) = sections.resources.values()
    os.kill(holder_of(tmp_path), signal.SIGKILL)
    assert "its holder has ended" in await asyncio.wait_for(running.ended, 10)
    await until(lambda: not system.is_running(resource.pgid))
    await running.stop("it ended")
    assert not sections.resources
    again = await sections.start("sleep 60")
    await again.kill()


async def test_g1_holder_that_stood_still_leaves_no_program_of_a_start_that_has_failed(
    sections: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It spawns once it goes on. Where there is no gate, that would run, and nobody would know of it."""
    assert sections.holder is not None
    monkeypatch.setattr(holder, "ANSWER_SECONDS", 0.5)
    other = await sections.start("sleep 60")  # for that it is not given up
    parent, late = holder_of(tmp_path), tmp_path / "late"
    os.kill(parent, signal.SIGSTOP)
    code = f"import os, time; open({str(late)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with open(os.devnull, "rb") as nothing, pytest.raises(OSError, match="has not answered"):  # noqa: ASYNC230
        await sections.holder.spawn(
            "wiki.12.late",
            python(code),
            env={system.MARKER_ENV: "wiki.12.late"},
            cwd="",
            identity=None,
            stdin=nothing.fileno(),
            group=None,
            on_line=lambda line: None,
            on_exit=lambda: None,
        )
    os.kill(parent, signal.SIGCONT)
    await other.kill()
    monkeypatch.setattr(holder, "ANSWER_SECONDS", 10.0)
    again = await sections.start(["/bin/echo", "up"])  # what came before has been seen to
    await again.ended
    await until(lambda: not system.find_marked("wiki.12.late"), 20)
    await again.stop("done")


async def test_holder_outlives_its_signals(sections: Sections, tmp_path: Path) -> None:
    """A terminal's Ctrl-C and a service manager's SIGTERM are for the node, which ends its programs."""
    running = await sections.start("sleep 60")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(holder_of(tmp_path), number)
    assert await sections.holder.claim("none") is None  # pyright: ignore
    assert not asyncio.ensure_future(running.ended).done()
    await running.kill()


async def test_without_a_holder(lines: list[str]) -> None:
    """As on macOS: a child of the node, which cannot be left running."""
    sections = Sections(None)
    running = await sections.start(["/bin/sh", "-c", "echo up; exit 3"])
    (resource,) = sections.resources.values()
    assert not resource.adoptable
    assert await running.ended == "exited with code 3"
    await running.stop("done")
    assert lines == ["up"]
    assert not sections.resources


async def test_cancelled_while_it_is_being_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: the same without a holder, in a thread of the node's."""
    sections = Sections(None)
    real, spawned, begun = child.spawn, list[int](), threading.Event()

    def slowly(*arguments: object, **options: object) -> object:
        begun.set()
        time.sleep(0.3)
        made = real(*arguments, **options)  # pyright: ignore
        spawned.append(made.pid)
        return made

    monkeypatch.setattr(child, "spawn", slowly)
    start = asyncio.create_task(sections.start("sleep 60"))
    await until(begun.is_set)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    (pid,) = spawned
    assert not system.is_running(pid)
    assert not sections.resources


# --- the gate

GATES: dict[str, dict[str, str]] = {"shell": {}, "python": {"UID": "7"}}
"""Environments with which each kind of gate is used."""


@pytest.mark.parametrize("env", GATES.values(), ids=GATES.keys())
async def test_g1_program_runs_only_once_its_group_is_known(
    sections: Sections, tmp_path: Path, env: dict[str, str]
) -> None:
    """Started, but held back until the second registration was confirmed."""
    ran, early = tmp_path / "ran", list[bool]()

    async def wait() -> None:
        await asyncio.sleep(0.3)
        early.append(ran.exists())

    sections.before_group = wait
    running = await sections.start(["/bin/sh", "-c", f"echo x > {ran}; sleep 60"], env=env)
    await until(ran.exists)
    assert early == [False]
    await running.kill()


NODE = """
import asyncio, sys
from phalanx import config
from pathlib import Path
from phalanx.backends import Holder, ProcessBackend
from phalanx.ports import SectionContext

async def register(resource):
    if resource.pgid:
        print(resource.pgid, flush=True)
        await asyncio.sleep(60)

async def main():
    app = config.build_app("wiki", config.ActivePassive(), backend=config.Process(
        ["/bin/sh", "-c", f"echo x > {sys.argv[1]}; sleep 60"], env=eval(sys.argv[2])))
    section = SectionContext("prod", "n1", "wiki", 12, register, lambda resource_id: None)
    holder = Holder(Path(sys.argv[3])) if len(sys.argv) > 3 else None
    await ProcessBackend(app.backend, holder).start(section)

asyncio.run(main())
"""


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("env", GATES.values(), ids=GATES.keys())
@pytest.mark.parametrize("mortal", [True, False])
async def test_g1_program_never_runs_if_its_node_dies_before_its_group_is_known(
    tmp_path: Path, env: dict[str, str], mortal: bool, held: bool
) -> None:
    """The end of the node is the end of the gate, also without the kernel's help (no setpriv)."""
    ran = tmp_path / "ran"
    code = NODE if mortal else "from phalanx import child\nchild.dies_with_node = lambda: ()\n" + NODE
    node = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(ran), repr(env), *([str(tmp_path)] if held else []),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert node.stdout is not None
    pid = int(await asyncio.wait_for(node.stdout.readline(), 20))
    assert system.is_running(pid)
    node.kill()
    await node.wait()
    await until(lambda: not system.is_running(pid))
    assert not ran.exists()


@pytest.mark.parametrize("env", GATES.values(), ids=GATES.keys())
async def test_program_does_not_notice_the_gate(
    sections: Sections, lines: list[str], monkeypatch: pytest.MonkeyPatch, env: dict[str, str]
) -> None:
    """Its environment is what it was given, nothing is open, no signal is ignored or blocked."""
    monkeypatch.setattr(child, "MAX_LINE_BYTES", 1 << 20)
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ODD", "two\nlines 'and' \"quotes\" $HOME \\ \udcff")
    if env:
        monkeypatch.setenv("discovery.type", "no name for a shell")
    code = (
        "env = dict(l.split(b'=', 1) for l in open('/proc/self/environ', 'rb').read().split(b'\\0') if l)\n"
        "status = dict(l.split(':\\t', 1) for l in open('/proc/self/status').read().splitlines())\n"
        "print(repr((env, sorted(os.listdir('/proc/self/fd')), os.readlink('/proc/self/fd/0'),"
        " status['SigBlk'], sys.argv)))"
    )
    arguments = ["a b", "", "$x", "-c"]
    # Without a Python in between, SigIgn is what the program was given.
    running = await sections.start(["/bin/sh", "-c", "grep SigIgn /proc/$$/status"], env=env)
    await running.ended
    await running.stop("done")
    # What this test's own parent had ignored is inherited by everybody; the gate adds nothing to it.
    plain = await asyncio.to_thread(
        subprocess.run,
        ["/bin/sh", "-c", "grep SigIgn /proc/$$/status"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert lines.pop().split() == plain.stdout.split()
    running = await sections.start(
        [sys.executable, "-c", "import os, sys\n" + code, *arguments], env={**env, "A": "1"}
    )
    await running.ended
    await running.stop("done")
    seen, descriptors, stdin, blocked, argv = ast.literal_eval(lines.pop())
    marker = os.fsdecode(seen[b"PHALANX_SECTION"])
    assert marker in sections.markers
    expected = {
        **child.environment(), **env, "A": "1", "PHALANX_SECTION": marker, "PHALANX_PLATFORM": "prod",
        "PHALANX_NODE": "n1", "PHALANX_APP": "wiki", "PHALANX_EPOCH": "12",
        "PHALANX_DATABASE": "/srv/wiki.db",
    }  # fmt: skip
    shells_own = {b"PWD", b"OLDPWD", b"SHLVL", b"_"}
    assert {k: v for k, v in seen.items() if k not in shells_own} == {
        os.fsencode(k): os.fsencode(v) for k, v in expected.items() if os.fsencode(k) not in shells_own
    }
    assert (len(descriptors), stdin, int(blocked, 16)) == (4, "/dev/null", 0)
    assert argv == ["-c", *arguments]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the user")
async def test_other_user_who_may_not_run_the_python_gate(
    sections: Sections, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Python in a directory that is closed to the program's user: it runs all the same."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "python").symlink_to(sys.executable)
    monkeypatch.setattr(gate.sys, "executable", str(closed / "python"))
    running = await sections.start(["/bin/sh", "-c", "id -un"], user="nobody", cwd="/", env=GATES["python"])
    assert await running.ended == "exited with code 0"
    await running.stop("done")
    assert lines == ["nobody"]


async def test_without_any_gate(
    sections: Sections, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is neither a shell nor a Python the program runs at once."""
    monkeypatch.setattr(gate, "_shell", lambda: "")
    monkeypatch.setattr(child, "dies_with_node", lambda: ())
    monkeypatch.setattr(gate.sys, "executable", "/no/such/python")
    running = await sections.start(["/bin/echo", "up"])
    await running.ended
    await running.stop("done")
    assert lines == ["up"]


@pytest.mark.alone
async def test_a_gate_costs_little(sections: Sections) -> None:
    """From the registration to the exec: some milliseconds (best of up to twenty: machines are busy)."""
    seconds: list[float] = [1.0]
    for _ in range(20):
        if min(seconds) < 0.05:
            break
        began = system.now()
        running = await sections.start("sleep 60")
        seconds.append(system.now() - began)
        await running.kill()
    assert min(seconds) < 0.05


# --- what the keeper knows, and when


async def test_registers_first_its_mark_and_then_its_group(sections: Sections) -> None:
    """G4: both before the program runs."""
    seen: list[tuple[int, int]] = []
    real = sections.register

    async def register(resource: Resource) -> None:
        seen.append((resource.pgid, resource.start_time))
        await real(resource)

    sections.register = register  # pyright: ignore
    running = await sections.start("sleep 60")
    (resource,) = sections.resources.values()
    assert seen == [(0, 0), (resource.pgid, resource.start_time)]
    assert (resource.kind, resource.app, resource.epoch) == ("process", "wiki", 12)
    assert system.ProcessRef(resource.pgid, resource.start_time).alive()
    await running.kill()


async def test_two_sections_do_not_meet(sections: Sections) -> None:
    """Each start has a marker of its own: the end of one leaves the other alone."""
    one, two = await sections.start("sleep 60"), await sections.start("sleep 60")
    await one.kill()
    (left,) = sections.resources.values()
    assert system.ProcessRef(left.pgid, left.start_time).alive()
    await two.kill()
    await until(lambda: system.process_start_time(left.pgid) == 0)


# --- its end


async def test_program_that_is_killed_says_so(sections: Sections) -> None:
    """A signal from outside is told from an exit code."""
    running = await sections.start(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert await asyncio.wait_for(running.ended, 5) == "killed by SIGKILL"
    await running.kill()


async def test_program_that_ends_before_it_is_ready_has_last_words(sections: Sections) -> None:
    """They are in the error."""
    never = config.FunctionCheck(lambda: False, interval=0.05)
    with pytest.raises(BackendError, match="exited with code 3 before it was ready: address in use"):
        await sections.start(python("import sys; print('address in use'); sys.exit(3)"), ready=never)
    assert not sections.resources


async def test_stop_gives_the_whole_group_its_time(sections: Sections, tmp_path: Path) -> None:
    """A worker that ends later than its parent is not killed while there is time (G10)."""
    said, up = tmp_path / "said", tmp_path / "up"
    code = (
        "import os, signal, time\n"
        "def bye(*_):\n"
        f"    time.sleep(0.3); open({str(said)!r}, 'w').write('bye'); os._exit(0)\n"
        "if os.fork() == 0:\n"
        f"    signal.signal(signal.SIGTERM, bye); open({str(up)!r}, 'w').close(); time.sleep(60)\n"
        "time.sleep(60)"
    )
    running = await sections.start(python(code))
    await until(up.exists)
    await running.stop("hand-over")
    assert said.read_text() == "bye"


# --- what a program leaves


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_g1_child_that_only_its_parent_tells_of_is_killed(
    sections: Sections, tmp_path: Path, how: str
) -> None:
    """A child with a session and an environment of its own, whose parent obeys the signal to stop."""
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        " env={}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid) + '\\n')\n"
        "time.sleep(60)"
    )
    running = await sections.start(python(code))
    await until(lambda: pid.exists() and pid.read_text().endswith("\n"))
    hidden = system.ProcessRef.of(int(pid.read_text()))
    assert hidden.alive()
    await (running.stop("done") if how == "stop" else running.kill())
    assert not hidden.alive()


# --- control groups

in_cgroups = pytest.mark.skipif(not cgroup_v2.base(), reason="this user may not make control groups here")

ESCAPES = (
    "import os, sys, time\n"
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    f"        os.execve({sys.executable!r}, ['x', '-c', 'import os, sys, time\\n"
    "print(os.getpid(), flush=True); time.sleep(60)'], {})\n"
    "    os._exit(0)\n"
    "os.wait(); sys.stdout.flush(); time.sleep(60)"
)
"""Leaves a daemon without mark, group or parent: only its control group tells of it."""


@in_cgroups
async def test_program_is_in_its_control_group_before_it_runs(sections: Sections, lines: list[str]) -> None:
    """One of its own, which the keeper knows first, and which is gone afterwards."""
    known: list[dict[str, str]] = []
    real = sections.register

    async def register(resource: Resource) -> None:
        known.append(resource.details)
        assert len(known) > 1 or not is_there(resource.details["cgroup"])
        await real(resource)

    sections.register = register  # pyright: ignore
    running = await sections.start(python("print(open('/proc/self/cgroup').read())"))
    await running.ended
    path = known[0]["cgroup"]
    assert known == [{"cgroup": path}] * 2
    assert is_there(path)
    await running.stop("done")
    assert any(path.endswith(line.partition("::")[2]) for line in lines if line.startswith("0::"))
    assert not is_there(path)


@in_cgroups
@pytest.mark.parametrize("how", ["stop", "kill", "crash"])
async def test_g1_daemon_that_nothing_else_tells_of_is_killed(
    sections: Sections, lines: list[str], how: str
) -> None:
    """Forked twice, a session of its own, an empty environment: gone with the program all the same."""
    running = await sections.start(python(ESCAPES))
    await until(lambda: lines)
    daemon = system.ProcessRef.of(int(lines[0]))
    (resource,) = sections.resources.values()
    assert daemon.pid not in system.find_marked(resource.id, resource.pgid)
    if how == "crash":
        os.kill(resource.pgid, 9)
        await running.ended
        assert daemon.alive()
    await (running.kill() if how == "kill" else running.stop("done"))
    assert not daemon.alive()


LEAVES = """
import asyncio, sys
from pathlib import Path
from phalanx import config
from phalanx.backends import Holder, ProcessBackend
from phalanx.ports import SectionContext
import msgspec, logging

class Says(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), flush=True)

async def register(resource):
    if resource.pgid:
        print(msgspec.json.encode(resource).decode(), flush=True)

async def main():
    logging.getLogger("phalanx.app.wiki").addHandler(Says())
    logging.getLogger("phalanx.app.wiki").setLevel("INFO")
    app = config.build_app("wiki", config.ActivePassive(), backend=config.Process(
        [sys.executable, "-uc", sys.argv[1]]))
    section = SectionContext("prod", "n1", "wiki", 12, register, lambda resource_id: None)
    holder = Holder(Path(sys.argv[2]))
    await ProcessBackend(app.backend, holder).start(section)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@in_cgroups
@pytest.mark.parametrize("who", ["holder", "keeper", "next node"])
async def test_g1_such_a_daemon_of_a_killed_node_is_killed(tmp_path: Path, who: str) -> None:
    """SIGKILL of the node: its holder kills it; its keeper, if that stands still; if all have died and the
    keeper's file is lost, the next start."""
    node = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LEAVES, ESCAPES, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert node.stdout is not None
    async with asyncio.timeout(20):
        resource = msgspec.json.decode(await node.stdout.readline(), type=Resource)
        daemon = system.ProcessRef.of(int(await node.stdout.readline()))
    assert daemon.alive()
    assert list(cgroup_v2.left_over("wiki.prod.n1.")) == [], "it is held"
    parent = holder_of(tmp_path)
    if who != "holder":
        os.kill(parent, signal.SIGKILL if who == "next node" else signal.SIGSTOP)
    node.kill()
    await node.wait()
    try:
        if who == "keeper":
            assert await kill_resources([resource])
        elif who == "next node":
            await until(lambda: not system.is_running(resource.pgid))
            await ProcessBackend(config.Process("true")).fence("wiki")
        else:
            await until(lambda: not system.is_running(parent))
        assert not daemon.alive()
        assert not is_there(resource.details["cgroup"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent, signal.SIGKILL)


@in_cgroups
async def test_control_group_that_cannot_be_entered(
    sections: Sections, lines: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The program runs without one, which is said; and nothing is left of it."""

    def refuse(group: cgroup_v2.Cgroup, pid: int) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(cgroup_v2.Cgroup, "add", refuse)
    running = await sections.start(["/bin/echo", "up"])
    (resource,) = sections.resources.values()
    await running.ended
    await running.stop("done")
    assert lines == ["up"]
    assert "without a control group" in caplog.text
    assert not is_there(resource.details["cgroup"])


async def test_without_control_groups(
    sections: Sections, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are none, the program runs as before, and nothing of it is asked for."""
    monkeypatch.setattr(cgroup_v2, "base", lambda: "")
    running = await sections.start(["/bin/echo", "up"])
    (resource,) = sections.resources.values()
    assert resource.details == {}
    await running.ended
    await running.stop("done")
    assert lines == ["up"]


# --- limits


async def test_limits_of_each_process(sections: Sections, lines: list[str]) -> None:
    """The program and its children have them, the node keeps its own."""
    before = resource_module.getrlimit(resource_module.RLIMIT_NOFILE)
    limits = config.Limits(open_files=100, core=0, nice=min(os.nice(0) + 3, 19))
    running = await sections.start(["/bin/sh", "-c", "ulimit -n; ulimit -Hn; ulimit -c; nice"], limits=limits)
    await running.ended
    await running.stop("done")
    assert lines == ["100", "100", "0", str(limits.nice)]
    assert resource_module.getrlimit(resource_module.RLIMIT_NOFILE) == before


async def test_limit_that_this_host_cannot_enforce(
    sections: Sections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is started, and the reason and the remedy are said."""
    monkeypatch.setattr(cgroup_v2, "base", lambda: "")
    with pytest.raises(BackendError, match=r"limits\.memory = 67108864 cannot be enforced here") as caught:
        await sections.start("sleep 60", limits=config.Limits(memory="64 MiB"))
    assert (caught.value.step, "Delegate=yes" in caught.value.remedy) == ("prepare", True)
    assert not sections.resources


@in_cgroups
async def test_limit_that_the_kernel_refuses_after_all(
    sections: Sections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller is there, but not for us: the start fails, and leaves nothing."""
    monkeypatch.setattr(cgroup_v2, "controllers", lambda: frozenset({"memory", "cpu", "pids"}))
    with pytest.raises(BackendError, match="its limits cannot be set in") as caught:
        await sections.start("sleep 60", limits=config.Limits(processes=100))
    assert caught.value.step == "start"
    assert not sections.resources
    assert list(cgroup_v2.left_over("wiki.prod.n1.12.")) == []


# --- output


async def test_lines_are_whole_and_bounded(sections: Sections, lines: list[str]) -> None:
    """Both streams, lines across writes, no newline at the end, bytes that are no text, lines without end."""
    code = (
        "import os, time\n"
        "os.write(1, b'par'); time.sleep(0.05); os.write(1, b't\\n\\n'); os.write(2, b'error\\n')\n"
        "os.write(1, b'\\xff%s\\r\\n' + b'x' * 10000 + b'\\n'); os.write(1, b'end')"
    )
    running = await sections.start(python(code))
    await running.ended
    await running.stop("done")
    assert lines[:3] == ["part", "error", "\ufffd%s"]
    assert [len(line) for line in lines[3:-1]] == [4096, 4096, 10000 - 2 * 4096]
    assert lines[-1] == "end"


async def test_last_words_are_not_lost(sections: Sections, lines: list[str]) -> None:
    """Of a pipe that is full when the program dies the last lines are logged, and how many were not."""
    code = "import os\nfor n in range(2000): os.write(1, b'%d\\n' % n)\nos._exit(1)"
    running = await sections.start(python(code))
    await running.ended
    await running.stop("done")
    assert lines[-1] == "1999"
    assert lines[-2] == "1998"


async def test_flood_of_output_does_not_hold_up_the_loop(sections: Sections) -> None:
    """A program that prints for ever waits for us, not we for it, however slow the log is."""
    lines, in_handler = 0, 0.0
    left_out: list[str] = []

    class Counts(logging.Handler):
        """A log as slow as a real one."""

        def emit(self, record: logging.LogRecord) -> None:
            nonlocal lines, in_handler
            began = system.now()
            lines, last = lines + 1, record.getMessage()
            left_out.extend([last] if "left out" in last else [])
            time.sleep(0.0003)
            in_handler += system.now() - began

    counts = Counts()
    LINES.addHandler(counts)
    LINES.setLevel(logging.INFO)
    LINES.propagate = False
    try:
        running = await sections.start(python("import os\nwhile True: os.write(1, b'y\\n' * 30000)"))
        await until(lambda: lines > 100)
        worst, since, in_handler = 0.0, system.now(), 0.0
        for _ in range(100):
            began = system.now()
            await asyncio.sleep(0.01)
            worst = max(worst, system.now() - began - 0.01)
        share = in_handler / (system.now() - since)
        await running.kill()
    finally:
        LINES.removeHandler(counts)
        LINES.setLevel(logging.NOTSET)
        LINES.propagate = True
    assert worst < 0.25
    assert share < 0.5
    assert len(left_out) == 1, "of a full pipe only the last lines are shown, and it says so"


async def test_escaped_holder_of_the_pipe_does_not_hang_stop(sections: Sections, lines: list[str]) -> None:
    """A daemon without mark or group, which nobody can find, holds the pipe: stop() returns all the same."""
    code = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"        os.execve({sys.executable!r}, ['x', '-c', 'import time; time.sleep(8)'], {{}})\n"
        "    os._exit(0)\n"
        "os.wait(); print('up'); time.sleep(60)"
    )
    running = await sections.start(python(code))
    await until(lambda: lines == ["up"])
    async with asyncio.timeout(5):
        await running.stop("done")
    assert not sections.resources


# --- processes that do not die


async def test_what_does_not_die_stays_registered(
    sections: Sections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1: stop() raises with the pids, the keeper keeps its entry, and a later kill() tries again."""
    running = await sections.start("sleep 60")
    real = system.kill_marked
    monkeypatch.setattr(process.system, "kill_marked", lambda *a, **k: system.KillReport((), (4711,), 2.0))
    with pytest.raises(BackendError, match="processes 4711 do not die") as caught:
        await running.stop("done")
    assert caught.value.step == "stop"
    assert sections.resources
    with pytest.raises(BackendError) as caught:
        await running.kill()
    assert caught.value.step == "kill"
    monkeypatch.setattr(process.system, "kill_marked", real)
    await running.kill()
    assert not sections.resources


async def test_failed_start_ends_only_when_all_is_gone(
    sections: Sections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1: the section takes a failed start for one that left nothing, so start() waits until that is true."""
    real, refused = system.kill_marked, 0

    def kill(*arguments: object, **options: object) -> system.KillReport:
        nonlocal refused
        refused += 1
        if refused < 3:
            return system.KillReport((), (4711,), 2.0)
        return real(*arguments, **options)  # pyright: ignore

    monkeypatch.setattr(process.system, "kill_marked", kill)
    monkeypatch.setattr(abandoning, "RETRY_SECONDS", 0.02)

    async def refuse() -> None:
        raise SessionLost("n1.ab", "gone")

    sections.before_group = refuse
    with pytest.raises(SessionLost):
        await sections.start("sleep 60")
    assert refused == 3
    assert not sections.resources


async def test_without_pidfd(sections: Sections, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sandbox has no pidfd, ends are found by polling."""
    monkeypatch.setattr(system, "open_pidfd", lambda pid: None)
    running = await sections.start(python("raise SystemExit(4)"))
    assert await asyncio.wait_for(running.ended, 5) == "exited with code 4"
    await running.stop("done")
    again = await sections.start("sleep 60")
    await again.stop("done")
    assert not sections.resources
