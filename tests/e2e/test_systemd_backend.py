"""What is peculiar to a systemd unit as backend; what all backends have in common is in tests/conformance."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.systemd_units import command_line, remove_unit, systemctl, try_systemctl, write_unit
from tests.waiting import until

from phalanx import cgroup, config, system, units
from phalanx.backends import make_backend
from phalanx.backends.systemd_run import UnitRun
from phalanx.errors import BackendError
from phalanx.keeper.fencing import kill_resources
from phalanx.ports import Backend, Running, SectionContext
from phalanx.types import ProgramState, Resource

pytestmark = pytest.mark.in_systemd

UNIT = "phalanx-e2e.service"
SLEEPS = "ExecStart=/bin/sleep 1000"
REGISTERED: dict[str, Resource] = {}


async def register(resource: Resource) -> None:
    """What the keeper would know."""
    REGISTERED[resource.id] = resource


def section(epoch: int = 7, database: str = "") -> SectionContext:
    """An active section of app ``wiki``."""
    return SectionContext("prod", "n1", "wiki", epoch, register, lambda name: REGISTERED.pop(name), database)


def backend(unit: str = UNIT, **options: object) -> Backend:
    """The backend of app ``wiki`` as declared."""
    declared = config.Systemd(unit, **options)  # pyright: ignore
    app = config.build_app("wiki", config.ActivePassive(), backend=declared)
    assert app.backend is not None
    return make_backend(app.backend)


def script(code: str) -> str:
    """ExecStart= of Python code."""
    return f"ExecStart={command_line([sys.executable, '-uc', code])}"


def state(unit: str = UNIT) -> str:
    """As systemctl has it."""
    return systemctl("is-active", unit, check=False)


async def how_it_ended(running: Running) -> str:
    """Its end, which must come."""
    async with asyncio.timeout(10):
        return await running.ended


@pytest.fixture(autouse=True)
def no_unit() -> Iterator[None]:
    """No test leaves its unit behind."""
    REGISTERED.clear()
    yield
    for name in (UNIT, "phalanx-e2e@blue.service", "phalanx-other.service"):
        if os.path.lexists(units.DROP_INS / name) or os.path.exists(units.permit_path(name)):
            remove_unit(name)


def nothing_is_left() -> bool:
    """Neither registered nor running nor permitted."""
    return not REGISTERED and state() in ("inactive", "failed") and not units.permit_path(UNIT).exists()


# --- what cannot be run


@pytest.mark.parametrize(
    ("lines", "problem", "remedy"),
    [
        ((SLEEPS, "Type=oneshot"), "Type=oneshot", "another Type"),
        ((SLEEPS, "RemainAfterExit=yes"), "RemainAfterExit=yes", "RemainAfterExit=no"),
        (("Type=simple",), "cannot be loaded: .*bad unit file setting", "systemd-analyze verify"),
        ((SLEEPS, "[Unit]", "RefuseManualStart=yes"), "RefuseManualStart=yes", "systemctl edit"),
        ((SLEEPS, "[Unit]", "RefuseManualStop=yes"), "RefuseManualStop=yes", "systemctl edit"),
    ],
)
async def test_unit_that_cannot_be_run_is_refused(lines: tuple[str, ...], problem: str, remedy: str) -> None:
    """One line with the remedy, from prepare() and start(); nothing is started, registered or changed."""
    write_unit(UNIT, *lines)
    for attempt in (backend().prepare("wiki"), backend().start(section())):
        with pytest.raises(BackendError, match=problem) as caught:
            await attempt
        assert caught.value.step == "prepare"
        assert remedy in caught.value.remedy
    assert nothing_is_left()
    assert not units.guard_path(UNIT).exists()


async def test_masked_unit_is_refused() -> None:
    """It cannot be started by anybody; the remedy is the command."""
    (units.DROP_INS / UNIT).symlink_to("/dev/null")
    systemctl("daemon-reload")
    with pytest.raises(BackendError, match=f"{UNIT} is masked; systemctl unmask {UNIT}"):
        await backend().prepare("wiki")


async def test_enabled_unit_is_refused() -> None:
    """systemd would start it at boot on a standby, before Phalanx can have a say."""
    write_unit(UNIT, SLEEPS, "[Install]", "WantedBy=multi-user.target")
    systemctl("enable", "--runtime", UNIT)
    try:
        with pytest.raises(BackendError, match=f"is enabled: .* on a standby; systemctl disable {UNIT}"):
            await backend().prepare("wiki")
    finally:
        systemctl("disable", "--runtime", UNIT)


async def test_unit_that_somebody_else_runs_is_refused_and_left_alone() -> None:
    """It is not for Phalanx to end what it did not start."""
    write_unit(UNIT, SLEEPS)
    systemctl("start", UNIT)
    for attempt in (backend().prepare("wiki"), backend().start(section())):
        with pytest.raises(BackendError, match=f"runs already .*; systemctl stop {UNIT}"):
            await attempt
    assert await backend().fence("wiki") == []
    assert state() == "active"
    assert not REGISTERED


async def test_bus_that_is_not_there_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """D-Bus is not installed, or its socket is elsewhere."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/no/such/socket")
    began = system.now()
    with pytest.raises(
        BackendError, match=r"systemd cannot be asked over the system bus: .*No such file"
    ) as caught:
        await backend().prepare("wiki")
    assert system.now() - began < 10
    assert "dbus" in caught.value.remedy


def test_user_without_rights_is_told(tmp_path: Path) -> None:
    """Whoever is not root, and was not given what it needs, hears it from ``prepare``."""
    write_unit(UNIT, SLEEPS)
    program = (
        "import asyncio, os\n"
        "from phalanx import config\n"
        "from phalanx.backends import make_backend\n"
        "import dbus_fast.aio, dbus_fast.unpack\n"
        "os.setresuid(65534, 65534, 65534)\n"
        f"app = config.build_app('wiki', config.ActivePassive(), backend=config.Systemd({UNIT!r}))\n"
        "asyncio.run(make_backend(app.backend).prepare('wiki'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30
    )
    assert f"only root can run {UNIT}: this user cannot write" in done.stderr, done.stderr
    assert "run the node as root" in done.stderr


# --- only by Phalanx


async def test_nobody_else_can_start_it_once_phalanx_has_run_it() -> None:
    """G1: after the end, and with Restart=always, neither systemd nor an operator brings it back."""
    write_unit(UNIT, SLEEPS, "Restart=always", "RestartSec=0", "RestartForceExitStatus=SIGKILL")
    running = await backend().start(section())
    pid = systemctl("show", "-P", "MainPID", UNIT)
    os.kill(int(pid), 9)
    assert await how_it_ended(running) == "killed by SIGKILL"
    await running.stop("it ended")
    assert nothing_is_left()
    assert "Assertion failed" in try_systemctl("start", UNIT)
    assert state() in ("inactive", "failed")


async def test_start_that_comes_after_the_kill_does_not_start_it() -> None:
    """G1: what a dead node has asked systemd for, and systemd reads only now, is in vain."""
    write_unit(UNIT, SLEEPS)
    running = await backend().start(section())
    (resource,) = REGISTERED.values()
    assert await kill_resources([resource])
    assert systemctl("start", "--no-block", UNIT, check=False) == ""
    await until(lambda: systemctl("show", "-P", "Job", UNIT) == "")
    assert state() in ("inactive", "failed")
    assert cgroup.processes(resource.details["cgroup"]) == set()
    await running.kill()


async def test_restart_by_somebody_else_is_noticed() -> None:
    """``systemctl restart`` makes it another start, of which nobody knows whether it serves."""
    write_unit(UNIT, SLEEPS)
    running = await backend().start(section())
    systemctl("restart", UNIT)
    assert "by somebody else" in await how_it_ended(running)
    await running.stop("it ended")
    assert nothing_is_left()


async def test_stop_by_somebody_else_is_noticed() -> None:
    """``systemctl stop`` is an end like another."""
    write_unit(UNIT, SLEEPS)
    running = await backend().start(section())
    systemctl("stop", UNIT)
    # The latter if that was all over when it was looked at.
    assert await how_it_ended(running) in ("was stopped by somebody else", "killed by SIGTERM")
    await running.stop("it ended")
    assert nothing_is_left()


async def left_running(line: str) -> Resource:
    """What a node that ended in a pause has left, for the next one to adopt."""
    write_unit(UNIT, line)
    dies = await backend().start(section())
    assert isinstance(dies, UnitRun)
    await dies._let_go()
    (resource,) = REGISTERED.values()
    return resource


@pytest.mark.parametrize("command", ["restart", "stop"])
async def test_g1_what_cannot_be_adopted_is_ended(command: str, tmp_path: Path) -> None:
    """Somebody restarted it while its node was away, or it takes its time to stop: none of it is left."""
    deaf = tmp_path / "deaf"
    ignores = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); "
        f"open({str(deaf)!r}, 'w').close(); time.sleep(1000)"
    )
    resource = await left_running(script(ignores) if command == "stop" else SLEEPS)
    if command == "stop":
        await until(deaf.exists)
    systemctl(command, "--no-block" if command == "stop" else "--quiet", UNIT)
    await until(lambda: state() == ("deactivating" if command == "stop" else "active"))
    assert await backend().adopt(section(), resource) is None
    assert state() in ("inactive", "failed")
    assert cgroup.processes(resource.details["cgroup"]) == set()
    assert not units.permit_path(UNIT).exists()
    REGISTERED.clear()


async def test_unit_is_adopted_once_the_bus_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """D-Bus restarts at the same time as the node: the same start of the unit runs on."""
    resource = await left_running(SLEEPS)
    invocation = systemctl("show", "-P", "InvocationID", UNIT)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/no/such/socket")
        adopting = asyncio.create_task(backend().adopt(section(), resource))
        await asyncio.sleep(0.7)
        assert not adopting.done()
    async with asyncio.timeout(10):
        running = await adopting
    assert running is not None
    assert systemctl("show", "-P", "InvocationID", UNIT) == invocation
    await running.stop("over")
    assert nothing_is_left()


async def test_g1_adoption_that_is_cancelled_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """The section takes it for one that left nothing, so it ends the unit, even without D-Bus."""
    resource = await left_running(SLEEPS)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/no/such/socket")
    adopting = asyncio.create_task(backend().adopt(section(), resource))
    await asyncio.sleep(0.2)
    adopting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adopting
    assert nothing_is_left()


async def test_two_apps_with_one_unit_do_not_share_it() -> None:
    """The second is refused, and the first goes on."""
    write_unit(UNIT, SLEEPS)
    running = await backend().start(section())
    other = SectionContext("prod", "n1", "other", 9, register, lambda name: None)
    with pytest.raises(BackendError, match="for app 'wiki'; give each app"):
        await backend().start(other)
    assert state() == "active"
    await running.kill()


# --- how it runs


async def test_unit_has_what_a_process_has_in_its_environment(tmp_path: Path) -> None:
    """PHALANX_EPOCH and the others, of this very start, whatever is in the values."""
    out, path = tmp_path / "out", 'a "b" $HOME \\ `c`'
    code = (
        "import os, time\n"
        "said = sorted(entry for entry in os.environ.items() if 'PHALANX' in entry[0])\n"
        f"print(said, file=open({str(out)!r}, 'a'), flush=True)\n"
        "time.sleep(100)"
    )
    write_unit(UNIT, script(code))
    for epoch in (7, 8):
        running = await backend().start(section(epoch, path))
        await until(lambda epoch=epoch: out.exists() and len(out.read_text().splitlines()) == epoch - 6)
        await running.stop("done")
    expected = [
        [("PHALANX_APP", "wiki"), ("PHALANX_DATABASE", path), ("PHALANX_EPOCH", str(epoch)),
         ("PHALANX_NODE", "n1"), ("PHALANX_PLATFORM", "prod")]
        for epoch in (7, 8)
    ]  # fmt: skip
    assert [eval(line) for line in out.read_text().splitlines()] == expected


async def test_instance_of_a_template() -> None:
    """Each instance is a unit of its own."""
    template = units.DROP_INS / "phalanx-e2e@.service"
    template.write_text("[Service]\nExecStart=/bin/sleep 1000\n")
    systemctl("daemon-reload")
    try:
        running = await backend("phalanx-e2e@blue").start(section())
        assert running.status().what == "unit phalanx-e2e@blue.service"
        assert state("phalanx-e2e@blue.service") == "active"
        await running.stop("done")
        assert state("phalanx-e2e@blue.service") == "inactive"
    finally:
        template.unlink()
        units.guard_path("phalanx-e2e@blue.service").unlink(missing_ok=True)
        systemctl("daemon-reload")


NOTIFIES = """
import os, socket, time
time.sleep(0.7)
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
time.sleep(100)
"""


async def test_ready_is_when_systemd_says_so() -> None:
    """Type=notify: start() returns while it starts, wait_ready() when it has sent READY=1."""
    write_unit(UNIT, script(NOTIFIES), "Type=notify")
    began = system.now()
    running = await backend().start(section())
    assert running.status().state is ProgramState.STARTING
    await running.wait_ready()
    assert system.now() - began > 0.6
    assert running.status().state is ProgramState.RUNNING
    await running.stop("done")
    assert nothing_is_left()


async def test_never_ready_by_systemd() -> None:
    """READY=1 does not come: it is given up after ready_timeout, long before systemd's own."""
    write_unit(UNIT, SLEEPS, "Type=notify")
    running = await backend(ready_timeout=0.5).start(section())
    with pytest.raises(BackendError, match=r"not ready within 0\.5 s: systemd has not finished its start"):
        await running.wait_ready()
    await running.kill()
    assert nothing_is_left()


async def test_start_that_systemd_gives_up() -> None:
    """TimeoutStartSec= is shorter: the failure comes at once, and says so."""
    write_unit(UNIT, SLEEPS, "Type=notify", "TimeoutStartSec=0.3")
    running = await backend(ready_timeout=60).start(section())
    with pytest.raises(BackendError, match="timeout of its unit before it was ready"):
        async with asyncio.timeout(10):
            await running.wait_ready()
    await running.kill()
    assert nothing_is_left()


async def test_program_that_is_missing() -> None:
    """The unit is fine, its program is not there: said by its failure, with systemd's name for it."""
    write_unit(UNIT, "ExecStart=/no/such/program")
    running = await backend().start(section())
    assert await how_it_ended(running) == "could not be executed (203/EXEC)"
    await running.kill()
    assert nothing_is_left()


async def test_program_that_daemonises(tmp_path: Path) -> None:
    """Type=forking: systemd knows the main process, and its end is the unit's."""
    pid_file = tmp_path / "pid"
    code = (
        "import os, time\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        f"open({str(pid_file)!r} + '.new', 'w').write(str(os.getpid()))\n"
        f"os.rename({str(pid_file)!r} + '.new', {str(pid_file)!r})\n"
        "time.sleep(100)"
    )
    write_unit(UNIT, script(code), "Type=forking", f"PIDFile={pid_file}")
    running = await backend().start(section())
    await running.wait_ready()
    assert f"main process {pid_file.read_text()}" in running.status().detail
    os.kill(int(pid_file.read_text()), 9)
    assert await how_it_ended(running) == "killed by SIGKILL"
    await running.stop("it ended")
    assert nothing_is_left()


async def test_dependency_that_cannot_be_started() -> None:
    """A unit that it requires fails: start() says which kind of failure that is, and nothing runs."""
    write_unit("phalanx-other.service", "Type=oneshot", "ExecStart=/bin/false")
    needs = ("Requires=phalanx-other.service", "After=phalanx-other.service")
    write_unit(UNIT, SLEEPS, unit=needs)
    with pytest.raises(BackendError, match="a unit that it needs cannot be started") as caught:
        await backend().start(section())
    assert caught.value.step == "start"
    assert nothing_is_left()


async def test_start_that_waits_for_another_unit_can_be_cancelled() -> None:
    """G8: a job that waits is cancelled with the start; it does not run later."""
    write_unit("phalanx-other.service", "Type=oneshot", "ExecStart=/bin/sleep 2")
    needs = ("Requires=phalanx-other.service", "After=phalanx-other.service")
    write_unit(UNIT, SLEEPS, unit=needs)
    start = asyncio.create_task(backend().start(section()))
    await until(lambda: state("phalanx-other.service") == "activating")
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await until(lambda: state("phalanx-other.service") != "activating")
    await asyncio.sleep(0.2)
    assert nothing_is_left()


async def test_many_starts_in_a_row_are_not_limited_by_systemd() -> None:
    """StartLimitBurst= is for systemd's own restarts; how often to try is for Phalanx."""
    write_unit(UNIT, SLEEPS)
    for epoch in range(8):
        running = await backend().start(section(epoch))
        await running.stop("done")
    assert nothing_is_left()


async def test_guard_costs_one_reload() -> None:
    """A second start, also of another node, finds systemd to know the guard already."""
    write_unit(UNIT, SLEEPS)
    await (await backend().start(section())).stop("done")
    written = units.guard_path(UNIT).stat().st_mtime_ns
    await (await backend().start(section())).stop("done")
    assert units.guard_path(UNIT).stat().st_mtime_ns == written


# --- the end


IGNORES = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
time.sleep(100)
"""


async def test_everything_in_the_control_group_has_its_time_and_no_more() -> None:
    """By default systemd asks all of a unit's processes to end: SIGKILL when stop_timeout is over."""
    write_unit(UNIT, script(IGNORES))
    running = await backend(stop_timeout=0.6).start(section())
    (resource,) = REGISTERED.values()
    await until(lambda: len(cgroup.processes(resource.details["cgroup"])) == 2)
    await asyncio.sleep(0.2)
    began = system.now()
    await running.stop("done")
    assert 0.5 < system.now() - began < 4
    assert cgroup.processes(resource.details["cgroup"]) == set()
    assert nothing_is_left()


@pytest.mark.parametrize("mode", ["process", "none"])
async def test_what_systemd_would_leave_behind_is_killed(mode: str) -> None:
    """KillMode=process and none leave children alone; they are ended nevertheless."""
    write_unit(
        UNIT, script(IGNORES.replace("signal.SIG_IGN)\nif", "signal.SIG_DFL)\nif")), f"KillMode={mode}"
    )
    running = await backend(stop_timeout=2).start(section())
    (resource,) = REGISTERED.values()
    await until(lambda: len(cgroup.processes(resource.details["cgroup"])) == 2)
    await running.stop("done")
    assert cgroup.processes(resource.details["cgroup"]) == set()
    assert nothing_is_left()


async def test_commands_after_the_end_are_killed_too(tmp_path: Path) -> None:
    """kill() waits for no ExecStop= and no ExecStopPost=."""
    write_unit(UNIT, SLEEPS, "ExecStop=/bin/sleep 50", "ExecStopPost=/bin/sleep 50", "TimeoutStopSec=60")
    running = await backend(stop_timeout=60).start(section())
    began = system.now()
    await running.kill()
    assert system.now() - began < 20
    assert nothing_is_left()


async def test_keeper_kills_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd does not answer: the keeper kills the control group, and nothing starts it again."""
    write_unit(UNIT, SLEEPS)
    running = await backend().start(section())
    (resource,) = REGISTERED.values()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        assert await kill_resources([resource])
    assert cgroup.processes(resource.details["cgroup"]) == set()
    assert not units.permit_path(UNIT).exists()
    await running.kill()
    assert nothing_is_left()


# --- when the bus or systemd itself is away


@pytest.mark.parametrize("what", ["bus", "systemd", "reload"])
async def test_it_is_followed_over_restarts_of_the_bus_and_of_systemd(what: str) -> None:
    """The connection breaks, or systemd executes itself anew: the end of the unit is seen all the same."""
    write_unit(UNIT, SLEEPS)
    running = await backend().start(section())
    pid = int(systemctl("show", "-P", "MainPID", UNIT))
    disturb(what)
    assert not asyncio.ensure_future(running.ended).done()
    os.kill(pid, 9)
    assert await how_it_ended(running) == "killed by SIGKILL"
    await running.stop("it ended")
    assert nothing_is_left()


@pytest.mark.parametrize("what", ["bus", "systemd", "reload"])
async def test_ready_comes_over_restarts_of_the_bus_and_of_systemd(what: str) -> None:
    """The same while it starts: the result of its job may never be told."""
    write_unit(UNIT, script(NOTIFIES), "Type=notify")
    running = await backend().start(section())
    ready = asyncio.create_task(running.wait_ready())
    await asyncio.sleep(0.05)
    await asyncio.to_thread(disturb, what)
    async with asyncio.timeout(10):
        await ready
    assert running.status().state is ProgramState.RUNNING
    await running.stop("done")
    assert nothing_is_left()


@pytest.mark.parametrize("what", ["bus", "systemd"])
async def test_it_is_stopped_while_the_bus_or_systemd_restarts(what: str) -> None:
    """A graceful stop in the middle of that ends it, gracefully or not."""
    write_unit(UNIT, SLEEPS)
    running = await backend().start(section())
    disturbing = asyncio.create_task(asyncio.to_thread(disturb, what))
    await running.stop("done")
    await disturbing
    assert nothing_is_left()


def disturb(what: str) -> None:
    """Restart the D-Bus daemon or systemd, or have it read all units again."""
    match what:
        case "bus":
            pid = int(systemctl("show", "-P", "MainPID", "dbus.service"))
            os.kill(pid, 9)
        case "systemd":
            systemctl("daemon-reexec")
        case _:
            systemctl("daemon-reload")
