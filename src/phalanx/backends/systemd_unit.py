"""What is to be known of a systemd unit before and after it runs: pure judgements of what systemd says."""

from __future__ import annotations

import re
import signal

from phalanx import child, units
from phalanx.backends.systemd_manager import ManagerError, Service, Unit
from phalanx.errors import BackendError

# systemd, src/basic/cgroup-util.c: names that a file of the kernel in the same folder may have.
_ESCAPED = re.compile(
    r"[_.]|(notify_on_release|release_agent|tasks)$"
    r"|(cgroup|cpu|cpuacct|cpuset|io|blkio|memory|devices|pids|hugetlb|rdma|misc|net_cls|net_prio)\."
)
_CLD_EXITED = 1
_EXIT_EXEC = {200: "CHDIR", 203: "EXEC", 216: "GROUP", 217: "USER", 226: "NAMESPACE"}
"""Exit codes by which systemd itself says that it could not execute the program (systemd.exec(5))."""


def refusal(asked: str, unit: Unit, service: Service) -> tuple[str, str] | None:
    """Why Phalanx can't run this unit, and the remedy; None if it can."""
    name = unit.id
    match unit.load_state:
        case "loaded":
            pass
        case "not-found":
            remedy = "install it, or correct unit (after its file was written: systemctl daemon-reload)"
            return f"there is no unit {asked} on this host", remedy
        case "masked":
            return f"{name} is masked", f"systemctl unmask {name}"
        case state:
            why = unit.load_error[1] or state
            return f"{name} cannot be loaded: {why}", f"see: systemd-analyze verify {name}"
    if unit.unit_file_state in ("enabled", "enabled-runtime"):
        problem = f"{name} is enabled: systemd starts it at boot, also on a standby"
        return problem, f"systemctl disable {name}"
    if service.type == "oneshot":
        problem = f"{name} is of Type=oneshot: once started it is over"
        return problem, "give it a program that runs on, and another Type"
    if service.remain_after_exit:
        problem = f"{name} has RemainAfterExit=yes, so that the end of its program would not be seen"
        return problem, f"systemctl edit {name}: RemainAfterExit=no"
    if not unit.can_start or not unit.can_stop:
        setting = "RefuseManualStop" if unit.can_start else "RefuseManualStart"
        return f"{name} has {setting}=yes", f"systemctl edit {name}: {setting}=no"
    return None


def is_guarded(unit: Unit, service: Service) -> bool:
    """Whether systemd itself has read what the guard says (:data:`phalanx.units.GUARD`), from wherever."""
    permit = str(units.permit_path(unit.id))
    return (
        any(
            condition == "AssertPathExists" and not is_alternative and not negated and path == permit
            for condition, is_alternative, negated, path, _ in unit.asserts
        )
        and any(path == permit for path, _ in service.environment_files)
        and service.restart == "no"
        and not any(service.restart_force_exit_status)
    )


def control_group(root: str, slice_name: str, unit: str) -> str:
    """Where the processes of *unit* will be. *root*: see :meth:`Manager.root`."""
    parts = slice_name.removesuffix(".slice").split("-") if slice_name not in ("", "-.slice") else []
    slices = ["-".join(parts[: number + 1]) + ".slice" for number in range(len(parts))]
    return "/".join([root, *slices, f"_{unit}" if _ESCAPED.match(unit) else unit])


def has_exited(unit: Unit, service: Service) -> bool:
    """Whether its program has ended, whatever it has left."""
    return not unit.runs or bool(service.exec_main_code)


def how_ended(unit: Unit, service: Service) -> str:
    """How a unit that has ended did so, in words."""
    code = service.exec_main_status
    match service.result:
        case "success" | "exit-code" | "signal" | "core-dump" if service.exec_main_code == _CLD_EXITED:
            if code in _EXIT_EXEC and service.result == "exit-code":
                return f"could not be executed ({code}/{_EXIT_EXEC[code]})"
            return child.how_ended(code)
        case "success" | "signal" | "core-dump" if service.exec_main_code:
            dumped = ", core dumped" if service.result == "core-dump" else ""
            return child.how_ended(-code if code in signal.valid_signals() else code) + dumped
        case "success":
            return "was stopped by somebody else"
        case "oom-kill":
            return "killed by the kernel: out of memory (oom-kill)"
        case "timeout":
            return "ran into a timeout of its unit"
        case "watchdog":
            return "killed by systemd: it did not feed its watchdog"
        case result:
            return f"failed ({result}), see: systemctl status {unit.id}"


def failed(app: str, step: str, unit: str, error: ManagerError) -> BackendError:
    """A refusal of systemd, or none to be asked, as users see it."""
    if error.is_denied:
        remedy = "run the node as root, or let polkit allow it org.freedesktop.systemd1.manage-units"
        return BackendError(app, step, f"{unit}: systemd refuses this user: {error.text}", remedy)
    if error.is_unreachable:
        problem = f"{unit}: systemd cannot be asked over the system bus: {error.text}"
        return BackendError(app, step, problem, "see that systemd and dbus run here, or use another backend")
    return BackendError(app, step, f"{unit}: {error.text}", f"see: systemctl status {unit}")
