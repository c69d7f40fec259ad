"""A real dockerd of its own, for tests and benchmarks of backends, and images made without a registry.

::

    with DockerDaemon() as dockerd:                    # or: the session-scoped fixture ``dockerd``
        dockerd.docker("run", "--rm", dockerd.busybox_image(), "echo", "hi")

Root only, Linux only. Nothing of a daemon that the host has is touched: data, sockets, bridge and control
group are its own, and it writes no iptables rules (docker-proxy publishes ports, for clients on this host).
It needs Debian's packages docker.io, iproute2, busybox-static, and debootstrap for the systemd image. What
is missing is an error, not a skip.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from phalanx import child
from phalanx.testing import docker_images
from phalanx.testing.docker_images import DockerError, require

READY_SECONDS = 30.0
COMMAND_SECONDS = 60.0
SYSTEMD_SECONDS = 60.0
"""How long a systemd in a container may take until it says ``running``: some 5 s on a quiet machine."""

BUSYBOX_IMAGE = "phalanx-test/busybox"
EMPTY_IMAGE = "phalanx-test/empty"
SYSTEMD_IMAGE = "phalanx-test/systemd"

CPU_SHARES = 16 * 1024
"""A daemon's control group competes with each process outside as one: so many of theirs is what it gets, lest
nodes in its containers starve, and lose their sessions, where other tests run beside."""

_BRIDGES = "phxdk"
# What a systemd inside needs of the host; --privileged would need more than a machine in a VM may give.
_SYSTEMD_OPTIONS = (
    "--cap-add=SYS_ADMIN", "--cap-add=NET_ADMIN", "--security-opt=seccomp=unconfined",
    "--tmpfs=/run", "--tmpfs=/run/lock", "--tmpfs=/tmp", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw",
    "--env=container=docker", "--stop-signal=SIGRTMIN+3",
)  # fmt: skip

_live: set[DockerDaemon] = set()


class DockerDaemon:
    """A dockerd with everything that it starts in one temporary directory.

    *live_restore*: containers outlive the daemon. *options*: further options of dockerd.
    """

    def __init__(self, *, live_restore: bool = False, options: Sequence[str] = ()) -> None:
        require("dockerd", "docker.io")
        require("docker", "docker.io")
        require("ip", "iproute2")
        if os.geteuid() != 0:
            raise DockerError("dockerd runs as root only: run the tests as root")
        self._options = (*(("--live-restore",) if live_restore else ()), *options)
        self.directory = Path(tempfile.mkdtemp(prefix="phalanx-docker-"))
        self.socket = str(self.directory / "docker.sock")
        self.bridge = ""
        self._process: subprocess.Popen[bytes] | None = None
        _live.add(self)

    @property
    def url(self) -> str:
        """What clients have in DOCKER_HOST."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        """The daemon's process id. Raises RuntimeError when it does not run."""
        if self._process is None:
            raise RuntimeError("dockerd does not run")
        return self._process.pid

    @property
    def cgroup(self) -> str:
        """The control group that all of its containers are below."""
        return f"/{self.directory.name}"

    def log(self) -> str:
        """What dockerd and its containerd have logged."""
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    # --- life and death

    def start(self) -> None:
        """Start it (again), on the same data, and wait until it answers. Raises DockerError."""
        if self._process is not None and self._process.poll() is None:
            return
        if not self.bridge:
            self.bridge = _make_bridge()
            _give_cpu(self.cgroup)
        for left in ("pid", "exec/containerd/containerd.pid"):  # of one that was killed
            (self.directory / left).unlink(missing_ok=True)
        command = [
            # SIGTERM, not SIGKILL: it ends its containers and its containerd then.
            *(word if word != "KILL" else "TERM" for word in child.dies_with_node()),
            "dockerd",
            *("--data-root", str(self.directory / "data"), "--exec-root", str(self.directory / "exec")),
            *("--pidfile", str(self.directory / "pid"), "--host", self.url),
            *("--bridge", self.bridge, "--iptables=false", "--ip6tables=false"),
            *("--cgroup-parent", self.cgroup, "--shutdown-timeout", "2"),
            *self._options,
        ]
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._wait_answering()

    def _wait_answering(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while self._run("version", timeout=10.0).returncode != 0:
            if self._process is not None and (code := self._process.poll()) is not None:
                raise DockerError(f"dockerd exited with {code}:\n{self.log()[-3000:]}")
            if time.monotonic() > deadline:
                raise DockerError(f"dockerd does not answer after {READY_SECONDS:g} s:\n{self.log()[-3000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL dockerd alone. Its containers run on, until it is started again (live-restore: longer)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def terminate(self) -> None:
        """SIGTERM dockerd and wait for its end: it ends its containers, unless it has live-restore."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            self.kill()

    def freeze(self) -> None:
        """SIGSTOP dockerd: it takes connections, and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT dockerd."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it with all that it started, and delete its files. Harmless when done twice."""
        _kill_all(_in_cgroup(self.cgroup))
        self.terminate()
        _kill_all(_in_cgroup(self.cgroup) | _of_directory(self.directory))
        if self.bridge:
            _remove_bridge(self.bridge)
            self.bridge = ""
        _unmount(self.directory)
        _remove_cgroups(self.cgroup)
        shutil.rmtree(self.directory, ignore_errors=True)
        _live.discard(self)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- commands

    def docker(self, *arguments: str, timeout: float = COMMAND_SECONDS) -> str:
        """Run ``docker ARGUMENTS`` against it; what it printed. Raises DockerError."""
        done = self._run(*arguments, timeout=timeout)
        if done.returncode != 0:
            words = " ".join(arguments)
            raise DockerError(f"docker {words}: {(done.stderr or done.stdout).decode(errors='replace')}")
        return done.stdout.decode(errors="replace").strip()

    def try_docker(
        self, *arguments: str, timeout: float = COMMAND_SECONDS
    ) -> subprocess.CompletedProcess[bytes]:
        """The same without judging its end."""
        return self._run(*arguments, timeout=timeout)

    def _run(
        self, *arguments: str, stdin: IO[bytes] | int = subprocess.DEVNULL, timeout: float
    ) -> subprocess.CompletedProcess[bytes]:
        command = ["docker", "--host", self.url, *arguments]
        try:
            return subprocess.run(command, stdin=stdin, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, b"", b"no answer within %g s" % timeout)

    # --- images

    def busybox_image(self) -> str:
        """An image of the static busybox with its links (0.1 s, once): its name."""
        if self.try_docker("image", "inspect", BUSYBOX_IMAGE).returncode != 0:
            with docker_images.busybox() as tarball:
                self.import_image(BUSYBOX_IMAGE, tarball, 'CMD ["/bin/sh"]', "ENV PATH=/bin")
        return BUSYBOX_IMAGE

    def empty_image(self) -> str:
        """An image with nothing in it, for programs whose files are mounted: its name."""
        if self.try_docker("image", "inspect", EMPTY_IMAGE).returncode != 0:
            with docker_images.empty() as tarball:
                self.import_image(EMPTY_IMAGE, tarball)
        return EMPTY_IMAGE

    def systemd_image(self) -> str:
        """An image of a minimal Debian with systemd: its name. The cache keeps its file system."""
        if self.try_docker("image", "inspect", SYSTEMD_IMAGE).returncode != 0:
            with open(docker_images.systemd(), "rb") as tarball:
                self.import_image(SYSTEMD_IMAGE, tarball, 'CMD ["/lib/systemd/systemd", "--system"]')
        return SYSTEMD_IMAGE

    def import_image(self, image: str, tarball: IO[bytes], *changes: str) -> None:
        """Make *image* of a file system; *changes* are lines of a Dockerfile. Raises DockerError."""
        options = (f"--change={change}" for change in changes)
        done = self._run("import", *options, "-", image, stdin=tarball, timeout=COMMAND_SECONDS)
        if done.returncode != 0:
            raise DockerError(f"docker import {image}: {done.stderr.decode(errors='replace')}")

    def run_systemd(self, name: str, *options: str, wait: bool = True) -> str:
        """Start a container with a systemd as its first process, and wait until that runs (some 5 s).

        *options*: further options of ``docker run``. Returns the container's id. Raises DockerError.
        """
        found = self.docker(
            *("run", "--detach", "--name", name, "--hostname", name),
            *_SYSTEMD_OPTIONS,
            *options,
            self.systemd_image(),
            *("/lib/systemd/systemd", "--system"),
        )
        deadline = time.monotonic() + SYSTEMD_SECONDS
        while wait:
            state = self.try_docker("exec", name, "systemctl", "is-system-running").stdout.decode().strip()
            if state in ("running", "degraded"):
                break
            if time.monotonic() > deadline:
                raise DockerError(f"systemd in {name} is {state!r} after {SYSTEMD_SECONDS:g} s")
            time.sleep(0.1)
        return found


# --- what it leaves on the host


def _make_bridge() -> str:
    """A bridge named by our pid, with a network that no route of this host has. Those of dead owners go."""
    _remove_old_bridges()
    routes = subprocess.run(
        ["ip", "-4", "route"], capture_output=True, text=True, check=True, timeout=10
    ).stdout
    name = f"{_BRIDGES}{os.getpid()}"[:15]
    for third in ((os.getpid() + step) % 250 for step in range(250)):
        network = f"10.213.{third}."
        if network in routes:
            continue
        if len(_live) > 1:
            name = f"{_BRIDGES}{os.getpid()}"[:13] + f".{len(_live)}"
        _ip("link", "add", name, "type", "bridge")
        _ip("addr", "add", f"{network}1/24", "dev", name)
        _ip("link", "set", name, "up")
        return name
    raise DockerError("no free network in 10.213.0.0/16")


def _remove_old_bridges() -> None:
    for path in Path("/sys/class/net").glob(f"{_BRIDGES}*"):
        owner = path.name.removeprefix(_BRIDGES).partition(".")[0]
        if owner.isdecimal() and not os.path.exists(f"/proc/{owner}"):
            _remove_bridge(path.name)


def _remove_bridge(name: str) -> None:
    with contextlib.suppress(DockerError):
        _ip("link", "del", name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=10)
    if done.returncode != 0:
        raise DockerError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _give_cpu(cgroup: str) -> None:
    """Where the controller is a hierarchy of its own (v1); in v2 dockerd makes the group, and weighs it."""
    controller = Path("/sys/fs/cgroup/cpu")
    if (controller / "cpu.shares").exists():
        folder = controller / cgroup.lstrip("/")
        folder.mkdir(exist_ok=True)
        (folder / "cpu.shares").write_text(str(CPU_SHARES))


def _in_cgroup(cgroup: str) -> set[int]:
    return {pid for pid in _pids() if f":{cgroup}/" in _read(f"/proc/{pid}/cgroup")}


def _of_directory(directory: Path) -> set[int]:
    """containerd and its shims: their command lines name a socket or a file below the directory."""
    return {pid for pid in _pids() if f"{directory}/" in _read(f"/proc/{pid}/cmdline")} - {os.getpid()}


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _kill_all(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.005)


def _runs(pid: int) -> bool:
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] not in ([], ["Z"], ["X"])


def _unmount(directory: Path) -> None:
    mounted = [line.split()[1] for line in _read("/proc/mounts").splitlines()]
    for target in sorted((m for m in mounted if m.startswith(f"{directory}/")), reverse=True):
        subprocess.run(["umount", "--lazy", target], capture_output=True, check=False, timeout=10)


def _remove_cgroups(cgroup: str) -> None:
    for root in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*")):
        top = root / cgroup.lstrip("/")
        if top.is_dir():
            for folder, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


@atexit.register
def _stop_all() -> None:
    for daemon in list(_live):
        daemon.stop()
