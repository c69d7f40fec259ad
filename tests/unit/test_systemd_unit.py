"""What Phalanx makes of a systemd unit's state, its permit, and its name."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from phalanx import config, system, units
from phalanx.backends import systemd_unit
from phalanx.backends.systemd_manager import Service, Unit
from phalanx.errors import ConfigError

UNIT = Unit(
    id="wiki.service",
    load_state="loaded",
    load_error=("", ""),
    active_state="failed",
    sub_state="failed",
    unit_file_state="disabled",
    can_start=True,
    can_stop=True,
    need_daemon_reload=False,
    job=(0, "/"),
    asserts=[("AssertPathExists", False, False, "/run/phalanx/units/wiki.service", 1)],
    inactive_exit_timestamp=0,
    invocation_id=b"\1" * 16,
)
SERVICE = Service(
    type="simple",
    restart="no",
    restart_force_exit_status=([], []),
    remain_after_exit=False,
    slice="system.slice",
    control_group="",
    environment_files=[("/run/phalanx/units/wiki.service", True)],
    result="success",
    exec_main_code=0,
    exec_main_status=0,
    main_pid=0,
)


@pytest.mark.parametrize(
    ("result", "code", "status", "words"),
    [
        ("success", 1, 0, "exited with code 0"),
        ("exit-code", 1, 3, "exited with code 3"),
        ("exit-code", 1, 203, "could not be executed (203/EXEC)"),
        ("signal", 2, 9, "killed by SIGKILL"),
        ("core-dump", 3, 11, "killed by SIGSEGV, core dumped"),
        ("success", 0, 0, "was stopped by somebody else"),
        ("oom-kill", 2, 9, "killed by the kernel: out of memory (oom-kill)"),
        ("timeout", 2, 15, "ran into a timeout of its unit"),
        ("watchdog", 3, 6, "killed by systemd: it did not feed its watchdog"),
        ("resources", 0, 0, "failed (resources), see: systemctl status wiki.service"),
    ],
)
def test_end_of_a_unit_in_words(result: str, code: int, status: int, words: str) -> None:
    """By systemd's result, and by what became of the main process (siginfo's code and status)."""
    service = msgspec.structs.replace(SERVICE, result=result, exec_main_code=code, exec_main_status=status)
    assert systemd_unit.how_ended(UNIT, service) == words


@pytest.mark.parametrize(
    ("root", "slice_name", "unit", "group"),
    [
        ("", "system.slice", "wiki.service", "/system.slice/wiki.service"),
        ("", "-.slice", "wiki.service", "/wiki.service"),
        ("", "apps-web.slice", "wiki@a.service", "/apps.slice/apps-web.slice/wiki@a.service"),
        ("/docker/3f", "system.slice", "io.service", "/docker/3f/system.slice/_io.service"),
    ],
)
def test_control_group_is_known_before_the_start(root: str, slice_name: str, unit: str, group: str) -> None:
    """As systemd will name it, so that the keeper can look there if it does not hear of it any more."""
    assert systemd_unit.control_group(root, slice_name, unit) == group


def test_guard_counts_only_as_a_whole() -> None:
    """What systemd has read is what counts, not which file is where."""
    assert systemd_unit.is_guarded(UNIT, SERVICE)
    replace = msgspec.structs.replace
    (assertion,) = UNIT.asserts
    alternative = (assertion[0], True, *assertion[2:])
    for unit, service in (
        (replace(UNIT, asserts=[]), SERVICE),
        (replace(UNIT, asserts=[alternative]), SERVICE),
        (replace(UNIT, id="other.service"), SERVICE),
        (UNIT, replace(SERVICE, restart="on-failure")),
        (UNIT, replace(SERVICE, restart_force_exit_status=([3], []))),
        (UNIT, replace(SERVICE, environment_files=[])),
    ):
        assert not systemd_unit.is_guarded(unit, service)


@pytest.fixture
def permits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where permits are, in this test."""
    monkeypatch.setattr(units, "PERMITS", tmp_path / "units")
    return tmp_path / "units"


def test_permit_tells_who_holds_it(permits: Path) -> None:
    """The app, the node's process, and systemd's id of the start."""
    assert units.read_permit("wiki.service") is None
    units.permit("wiki.service", {"PHALANX_APP": "wiki"}, "abc")
    permit = units.read_permit("wiki.service")
    assert permit == ("wiki", system.ProcessRef.of(os.getpid()), "abc")
    assert permit is not None
    assert permit.is_held
    units.take_permit_back("wiki.service")
    units.take_permit_back("wiki.service")
    assert list(permits.iterdir()) == []


@pytest.mark.parametrize("text", ["", "# node\n", "# node a b\n", "\0\xff", "# node 1 2 3"])
def test_permit_that_is_damaged_is_nobodys(permits: Path, text: str) -> None:
    """Whoever wrote it is taken to be gone, so that its unit is ended."""
    permits.mkdir()
    (permits / "wiki.service").write_text(text)
    permit = units.read_permit("wiki.service")
    assert permit is not None
    assert not permit.is_held


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("wiki.timer", "not a service"),
        ("wiki@.service", "a template"),
        ("wiki@", "a template"),
        ("a/b", "not a unit name"),
        ("", "not a unit name"),
        (".service", "no name"),
        ("a" * 250, "not a unit name"),
    ],
)
def test_name_that_is_no_service(name: str, problem: str) -> None:
    """Said by the declaration, before anything is asked."""
    with pytest.raises(ConfigError, match=problem):
        config.build_app("wiki", config.ActivePassive(), backend=config.Systemd(name))


def test_suffix_may_be_left_out() -> None:
    """It is a service in any case."""
    app = config.build_app("wiki", config.ActivePassive(), backend=config.Systemd("wiki@a"))
    assert isinstance(app.backend, config.Systemd)
    assert app.backend.unit == "wiki@a.service"
