"""Health checks against real servers, commands and functions; the monitor in real time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import until

from phalanx import config, system
from phalanx.config import Check, CommandCheck, FunctionCheck, HttpCheck, TcpCheck
from phalanx.observe.health import CheckFailed, HealthMonitor, run_check
from phalanx.probes import Probe, run_program
from phalanx.types import Health


def checked(*checks: Check) -> tuple[Check, ...]:
    """As the configuration gives them: commands split, names filled in."""
    return config.build_app("wiki", config.ActivePassive(), checks=checks).checks


class Server:
    """Answers every connection with the same bytes, then closes it, or keeps it open."""

    def __init__(self, answer: bytes, *, hangs: bool = False) -> None:
        self.answer, self.hangs, self.asked = answer, hangs, list[bytes]()
        self.port = 0

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(self.answer)
            if self.hangs:
                await reader.read()
        writer.close()

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/health?deep=1"


async def run(check: Check) -> str:
    """Run a check once."""
    return await run_check(checked(check)[0])


# --- HTTP and TCP


async def test_http_passes_by_status() -> None:
    """A GET of path and query with Host and Connection: close; a redirect passes and is not followed."""
    async with Server(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n") as server:
        assert await run(HttpCheck(server.url)) == "HTTP 302"
        head = server.asked[0].decode().split("\r\n")
    assert head[0] == "GET /health?deep=1 HTTP/1.1"
    assert f"Host: 127.0.0.1:{server.port}" in head
    assert "Connection: close" in head


async def test_http_login_is_sent_as_basic_authorization() -> None:
    """A login in the URL is used, and is in no Host header."""
    async with Server(b"HTTP/1.1 200 OK\r\n\r\n") as server:
        await run(HttpCheck(f"http://me:p%40ss@127.0.0.1:{server.port}"))
        assert b"Authorization: Basic bWU6cEBzcw==\r\n" in server.asked[0]
        assert b"@" not in server.asked[0]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 500 Oops\r\n\r\n", "HTTP 500, expected 200 to 399"),
        (b"HTTP/1.1 404\r\n\r\n", "HTTP 404"),
        (b"", "closed without an answer"),
        (b"SSH-2.0-OpenSSH\r\n", "no HTTP answer: 'SSH-2.0-OpenSSH'"),
        (b"x" * 100_000, "more than 16384 bytes"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 20, "interim answers only"),
    ],
)
async def test_http_fails_with_what_was_seen(answer: bytes, problem: str) -> None:
    """Any other status, and anything that is no HTTP, fails and says what it was."""
    async with Server(answer) as server:
        with pytest.raises(CheckFailed) as caught:
            await run(HttpCheck(server.url))
    assert problem in caught.value.detail


async def test_http_passes_over_interim_answers() -> None:
    """103 Early Hints before the answer."""
    async with Server(
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"
    ) as server:
        assert await run(HttpCheck(server.url)) == "HTTP 204"


async def test_http_answer_that_never_ends_passes_soon() -> None:
    """An event stream: the status is known, nobody waits for the end of the body."""
    async with Server(b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n", hangs=True) as server:
        began = system.now()
        assert await run(HttpCheck(server.url, timeout=5)) == "HTTP 200"
        assert system.now() - began < 4


async def test_http_server_that_does_not_answer_times_out() -> None:
    """It accepts and is silent: failed after the timeout, not later."""
    async with Server(b"", hangs=True) as server:
        began = system.now()
        with pytest.raises(CheckFailed, match=r"no result within 0\.2 s"):
            await run(HttpCheck(server.url, timeout=0.2))
        assert 0.2 <= system.now() - began < 5


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate with its key."""
    path = tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", path, "-out", tmp_path / "c",
         "-days", "1", "-subj", "/CN=localhost"],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode != 0:
        pytest.skip("no openssl")
    path.write_bytes(path.read_bytes() + (tmp_path / "c").read_bytes())
    return path


async def test_https_certificate_is_verified(certificate: Path) -> None:
    """A certificate that nobody vouches for fails, with the reason."""
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(CheckFailed, match=r"(?i)certificate verify failed"):
        await run(HttpCheck(f"https://127.0.0.1:{port}/"))
    server.close()


async def test_tcp() -> None:
    """A connection passes; a closed port fails and says so."""
    async with Server(b"") as server:
        assert await run(TcpCheck(f"127.0.0.1:{server.port}")) == "connected"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(CheckFailed, match=f"cannot connect to 127.0.0.1 port {port}: Connection refused"):
        await run(TcpCheck(f"127.0.0.1:{port}"))


async def test_unknown_host_fails() -> None:
    """A name that does not resolve is a failed check, no crash."""
    with pytest.raises(CheckFailed, match=r"cannot connect to no-such-host\.invalid"):
        await run(TcpCheck("no-such-host.invalid:80", timeout=10))


# --- commands


async def test_command_passes_by_exit_code() -> None:
    """Exit code 0 passes; the last line is the detail either way."""
    assert await run(CommandCheck("sh -c 'echo one; echo two'")) == "two"
    with pytest.raises(CheckFailed, match="exited with code 2: disk full"):
        await run(CommandCheck("sh -c 'echo disk full >&2; exit 2'"))
    with pytest.raises(CheckFailed, match="cannot run /no/such/program: No such file"):
        await run(CommandCheck("/no/such/program"))


async def test_command_is_killed_whole_when_out_of_time(tmp_path: Path) -> None:
    """The timeout ends the program and what it started, though it ignores every other signal."""
    pids = tmp_path / "pids"
    script = f"trap '' TERM; sleep 60 & echo $! >> {pids}; echo $$ >> {pids}; wait"
    with pytest.raises(CheckFailed, match=r"no result within 0\.5 s"):
        await run(CommandCheck(["sh", "-c", script], timeout=0.5))
    written = [int(pid) for pid in pids.read_text().split()]
    assert len(written) == 2
    await until(lambda: not any(system.is_running(pid) for pid in written))


async def test_background_children_of_a_command_do_not_pile_up(tmp_path: Path) -> None:
    """What a check leaves in the background ends with it, and holding the pipe does not make it hang."""
    pid = tmp_path / "pid"
    assert await run(CommandCheck(["sh", "-c", f"sleep 60 & echo $! > {pid}; echo fine"])) == "fine"
    await until(lambda: not system.is_running(int(pid.read_text())))


async def test_command_with_endless_output_is_bounded() -> None:
    """`yes` as a check: it fails by its timeout, and the loop went on all the time."""
    check = asyncio.create_task(run(CommandCheck("yes", timeout=0.5)))
    worst = 0.0
    while not check.done():
        began = system.now()
        await asyncio.sleep(0.01)
        worst = max(worst, system.now() - began - 0.01)
    with pytest.raises(CheckFailed):
        await check
    assert worst < 0.25


async def test_cancelled_command_is_killed(tmp_path: Path) -> None:
    """Leaving the active section in the middle of a check leaves no program behind."""
    pid = tmp_path / "pid"
    check = asyncio.create_task(
        run(CommandCheck(["sh", "-c", f"echo $$ > {pid}; exec sleep 60"], timeout=60))
    )
    await until(lambda: pid.exists() and pid.read_text())
    check.cancel()
    with pytest.raises(asyncio.CancelledError):
        await check
    await until(lambda: not system.is_running(int(pid.read_text())))


# --- functions


def boom() -> None:
    raise RuntimeError("no disk")


async def slow() -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda: False, "returned False"),
        (boom, "RuntimeError: no disk"),
        (lambda: sys.exit(3), "SystemExit: 3"),
        (slow, "no result within 0.1 s"),
    ],
)
async def test_function_fails(function: Callable[[], object], problem: str) -> None:
    """False, an exception, even sys.exit(), and being late: all are failures that say what happened."""
    with pytest.raises(CheckFailed) as caught:
        await run(FunctionCheck(function, timeout=0.1))
    assert caught.value.detail == problem


async def test_function_passes() -> None:
    """Anything but False passes, async or not."""

    async def fine() -> str:
        return "lag 3 ms"

    assert await run(FunctionCheck(fine)) == "lag 3 ms"
    assert await run(FunctionCheck(lambda: None)) == ""


class Stubborn:
    """An async function that ignores cancellation until it is let go, and counts its runs."""

    def __init__(self) -> None:
        self.running = self.most = self.calls = 0
        self.let_go = asyncio.Event()

    async def __call__(self) -> None:
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        while not self.let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.let_go.wait()
        self.running -= 1


async def test_function_that_ignores_cancellation_hangs_nobody() -> None:
    """It fails in time; while it runs on, further runs fail without starting it again."""
    stubborn = Stubborn()
    probe = Probe(checked(FunctionCheck(stubborn, timeout=0.1))[0])
    began = system.now()
    with pytest.raises(CheckFailed, match=r"no result within 0\.1 s"):
        await probe.run()
    assert system.now() - began < 5
    with pytest.raises(CheckFailed, match="its last run has not ended"):
        await probe.run()
    assert stubborn.calls == 1
    stubborn.let_go.set()
    await until(lambda: stubborn.running == 0)
    assert await probe.run() == ""
    assert stubborn.calls == 2


# --- the monitor


class Watched:
    """A monitor that runs, the changes it reported, and switches for its checks."""

    def __init__(self, *checks: Check) -> None:
        self.changes: list[tuple[Health, str]] = []
        self.monitor = HealthMonitor("wiki", checked(*checks), lambda h, r: self.changes.append((h, r)))

    async def __aenter__(self) -> HealthMonitor:
        self._task = asyncio.create_task(self.monitor.run())
        return self.monitor

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        assert self._task.cancelled()

    @property
    def healths(self) -> list[Health]:
        return [health for health, _ in self.changes]


class Switch:
    """A check function that passes or not, as the test says, and counts."""

    def __init__(self, good: bool = True) -> None:
        self.good, self.times = good, list[float]()

    def __call__(self) -> bool:
        self.times.append(system.now())
        return self.good


def function(switch: Callable[[], Any], name: str, **options: Any) -> FunctionCheck:
    return FunctionCheck(switch, name=name, **{"interval": 0.05, "timeout": 0.2, **options})


async def test_change_is_reported_once() -> None:
    """Unknown, healthy, ill, healthy: one report each, with the reason, however often it is checked."""
    switch = Switch()
    watched = Watched(function(switch, "disk", when="always", failures=2))
    async with watched as monitor:
        await until(lambda: monitor.verdict is Health.HEALTHY)
        switch.good = False
        await until(lambda: monitor.verdict is Health.UNHEALTHY)
        assert monitor.reason == "disk: returned False"
        assert monitor.standby_verdict is Health.UNHEALTHY
        seen = len(switch.times)
        await until(lambda: len(switch.times) > seen + 3)
        switch.good = True
        await until(lambda: monitor.verdict is Health.HEALTHY)
    assert watched.changes == [
        (Health.HEALTHY, ""),
        (Health.UNHEALTHY, "disk: returned False"),
        (Health.HEALTHY, ""),
    ]


async def test_active_checks_run_in_the_active_section_only() -> None:
    """They begin with fresh counters at each activation, end with it, and do not decide candidacy."""
    web, disk = Switch(good=False), Switch()
    watched = Watched(function(web, "web", failures=2), function(disk, "disk", when="always"))
    async with watched as monitor:
        await until(lambda: monitor.standby_verdict is Health.HEALTHY)
        assert monitor.verdict is Health.HEALTHY
        assert not web.times
        for _ in range(2):
            monitor.set_active(True)
            assert monitor.verdict is Health.UNKNOWN
            await until(lambda: monitor.verdict is Health.UNHEALTHY)
            assert monitor.standby_verdict is Health.HEALTHY
            monitor.set_active(False)
            assert monitor.verdict is Health.HEALTHY
            assert monitor.results()[0].health is Health.UNKNOWN
        runs = len(web.times)
        seen = len(disk.times)
        await until(lambda: len(disk.times) > seen + 3)
        assert len(web.times) == runs
    assert watched.healths == [
        Health.HEALTHY,
        *[Health.UNKNOWN, Health.UNHEALTHY, Health.HEALTHY] * 2,
    ]


async def test_set_active_before_run() -> None:
    """A section that began before the monitor runs is checked as soon as it does."""
    web = Switch()
    watched = Watched(function(web, "web"))
    watched.monitor.set_active(True)
    async with watched as monitor:
        await until(lambda: monitor.verdict is Health.HEALTHY)


async def test_what_the_program_says_of_itself_counts_in_the_active_section() -> None:
    """Told before, it counts from then on beside the checks, is reported once, and goes with the section."""
    web = Switch()
    watched = Watched(function(web, "web"))
    async with watched as monitor:
        monitor.tell(Health.UNHEALTHY, "no disk")
        assert monitor.verdict is Health.UNKNOWN
        monitor.set_active(True)
        await until(lambda: monitor.results()[0].health is Health.HEALTHY)
        assert monitor.verdict is Health.UNHEALTHY
        assert monitor.reason == "container health: no disk"
        assert [result.name for result in monitor.results()] == ["web", "container health"]
        monitor.tell(Health.UNHEALTHY, "no disk")
        monitor.tell(Health.HEALTHY, "")
        assert monitor.verdict is Health.HEALTHY
        monitor.tell(Health.UNHEALTHY, "again")
        monitor.set_active(False)
        assert monitor.verdict is Health.UNKNOWN
        monitor.tell(Health.UNHEALTHY, "of one that was not ready yet")
        monitor.set_active(False)  # its activation has failed
        monitor.set_active(True)
        await until(lambda: monitor.verdict is Health.HEALTHY)
    ill = [reason for health, reason in watched.changes if health is Health.UNHEALTHY]
    assert ill == ["container health: no disk", "container health: again"]


async def test_check_waits_for_its_dependency() -> None:
    """While the database is ill the page is not asked and does not count; once it is well, it is, at once."""
    db, page = Switch(good=False), Switch()
    watched = Watched(
        function(db, "db", failures=1, when="always"),
        function(page, "page", depends_on=["db"], interval=60.0, when="always"),
    )
    async with watched as monitor:
        await until(lambda: monitor.verdict is Health.UNHEALTHY)
        assert not page.times
        assert monitor.reason == "db: returned False"
        assert monitor.results()[1].detail == "waits for db"
        db.good = True
        await until(lambda: monitor.verdict is Health.HEALTHY, 5)
        assert len(page.times) == 1


async def test_runs_are_from_start_to_start() -> None:
    """A run that takes most of the interval does not stretch it."""
    times: list[float] = []

    async def takes_time() -> None:
        times.append(system.now())
        await asyncio.sleep(0.06)

    async with Watched(function(takes_time, "slow", interval=0.1, when="always")):
        await until(lambda: len(times) > 10)
    average = (times[10] - times[0]) / 10
    assert 0.099 <= average < 0.14


async def test_stubborn_function_makes_ill_and_the_monitor_ends() -> None:
    """A function that ignores cancellation: ill, never run twice at once, others go on, run() can end."""
    stubborn, disk = Stubborn(), Switch()
    watched = Watched(
        function(stubborn, "stubborn", timeout=0.1, failures=2, when="always"),
        function(disk, "disk", when="always"),
    )
    async with watched as monitor:
        await until(lambda: monitor.verdict is Health.UNHEALTHY)
        assert monitor.reason.startswith("stubborn: its last run has not ended")
        assert monitor.results()[1].health is Health.HEALTHY
        began = system.now()
    assert system.now() - began < 5
    assert stubborn.most == stubborn.calls == 1
    stubborn.let_go.set()
    await until(lambda: stubborn.running == 0)


async def test_switching_fast_never_overlaps_runs() -> None:
    """On, off, on, off within one run: the function still runs once at a time, and the last word counts."""
    state = {"now": 0, "most": 0}

    async def probe() -> None:
        state["now"] += 1
        state["most"] = max(state["most"], state["now"])
        try:
            await asyncio.sleep(0.02)
        finally:
            await asyncio.sleep(0.02)
            state["now"] -= 1

    watched = Watched(function(probe, "web", failures=1))
    async with watched as monitor:
        for n in range(21):
            monitor.set_active(n % 2 == 0)
            await asyncio.sleep(0.007)
        await until(lambda: monitor.verdict is Health.HEALTHY)
    assert state == {"now": 0, "most": 1}
    assert Health.UNHEALTHY not in watched.healths, "waiting for the last run to end is no failure"


async def test_listener_that_raises_does_not_end_the_checks(caplog: pytest.LogCaptureFixture) -> None:
    """An error in on_change is logged, and the checks go on."""
    switch = Switch()

    def listener(health: Health, reason: str) -> None:
        raise RuntimeError("broken listener")

    monitor = HealthMonitor("wiki", checked(function(switch, "disk", when="always")), listener)
    task = asyncio.create_task(monitor.run())
    await until(lambda: len(switch.times) > 3)
    assert "broken listener" in caplog.text
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_results_tell_each_check() -> None:
    """Name, health, detail, duration, and since when."""

    async def lag() -> str:
        await asyncio.sleep(0.02)
        return "lag 3 ms"

    began = system.now()
    async with Watched(function(lag, "lag", when="always")) as monitor:
        assert monitor.results()[0].since == 0
        await until(lambda: monitor.verdict is Health.HEALTHY)
        (result,) = monitor.results()
    assert (result.name, result.health, result.detail) == ("lag", Health.HEALTHY, "lag 3 ms")
    assert 0.02 <= result.duration_seconds < system.now() - began
    assert abs(system.wall() - result.since) < 10


@pytest.fixture(autouse=True)
async def no_descriptors_leak() -> AsyncIterator[None]:
    """Every test closes what it opened: no sockets, pipes or pidfds are left behind."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    with contextlib.suppress(TimeoutError):
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_command_that_is_cancelled_twice_leaves_no_process_unreaped() -> None:
    """By its own deadline and by whoever waits for it: a Popen that nobody reaped would say so here."""
    others = _children()  # of pytest itself: servers that other tests share
    running = asyncio.create_task(run_program(("sleep", "100"), lambda _: None))
    await until(lambda: _children() - others)
    found = _children() - others
    running.cancel()
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    del running
    gc.collect()
    assert not _children() & found


def _children() -> set[str]:
    """This process's children, zombies included."""
    return {
        pid
        for thread in Path("/proc/self/task").iterdir()
        for pid in (thread / "children").read_text().split()
    }
