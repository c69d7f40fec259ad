"""Where control groups are found, and how limits are written, with plain files in the kernel's place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phalanx import cgroup_v2, config
from phalanx.backends import limits
from phalanx.errors import BackendError, ConfigError

MOUNTS = {
    "unified": "30 23 0:26 / {root} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate",
    "part": "30 23 0:26 /system.slice/x.service {root} rw - cgroup2 cgroup2 rw",
}


def found(
    monkeypatch: pytest.MonkeyPatch, root: Path, mount: str, own: str = "0::/system.slice/x.service\n"
) -> str | None:
    """What is found with these files of /proc."""
    files = {"/proc/self/cgroup": own, "/proc/self/mountinfo": MOUNTS[mount].format(root=root) + "\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])  # pyright: ignore
    return cgroup_v2._own_directory()


def test_own_cgroup_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the whole tree, and where only a part of it is mounted; beside version 1; not outside of it."""
    assert found(monkeypatch, tmp_path, "unified") == f"{tmp_path}/system.slice/x.service"
    assert found(monkeypatch, tmp_path, "part") == str(tmp_path)
    hybrid = "4:memory:/elsewhere\n0::/\n"
    assert found(monkeypatch, tmp_path, "unified", hybrid) == str(tmp_path)
    assert found(monkeypatch, tmp_path, "part", hybrid) is None
    assert found(monkeypatch, tmp_path, "unified", "0::/../other\n") is None
    assert found(monkeypatch, tmp_path, "unified", "4:memory:/only/version/1\n") is None


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base with all controllers, and the node's processes in it."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    (tmp_path / "cgroup.procs").write_text("101\n102\n")
    monkeypatch.setattr(cgroup_v2, "base", lambda: str(tmp_path))
    return tmp_path


def test_limits_become_files(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in the kernel's own words; what is not limited is not touched."""
    all_three = config.Limits(memory=64 << 20, cpus=1.5, processes=100)
    files = limits.of_cgroup(all_three)
    assert files == {
        "memory.max": "67108864", "memory.oom.group": "1", "cpu.max": "150000 100000", "pids.max": "100",
    }  # fmt: skip
    assert limits.of_cgroup(config.Limits()) == {}
    limits.check(all_three, "wiki")
    group = base / f"{cgroup_v2.PREFIX}wiki"
    group.mkdir()
    for file in files:
        (group / file).touch()
    cgroup_v2.create("wiki", files).release()
    assert {file: (group / file).read_text() for file in files} == files
    assert (base / "cgroup.subtree_control").read_text().startswith("+memory +pids")


def test_node_leaves_the_base_where_controllers_want_that(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses controllers below a group with processes of its own (EBUSY)."""
    real, refused = cgroup_v2._write, list[str]()
    (base / cgroup_v2.OWN).mkdir()
    (base / cgroup_v2.OWN / "cgroup.procs").touch()
    moved: list[str] = []

    def write(path: str, text: str) -> None:
        if path.endswith("subtree_control") and not moved:
            refused.append(text)
            raise OSError(16, "busy", path)
        if path.endswith(f"{cgroup_v2.OWN}/cgroup.procs"):
            moved.append(text)
        real(path, text)

    monkeypatch.setattr(cgroup_v2, "_write", write)
    with pytest.raises(OSError, match="busy"):
        cgroup_v2._enable(frozenset({"pids"}))
    assert not moved, "it was not delegated to us: they may be anybody's"
    refused.clear()
    monkeypatch.setattr(cgroup_v2, "_is_delegated", lambda path: path == str(base))
    cgroup_v2._enable(frozenset({"cpu"}))
    assert not refused, "it is there already"
    cgroup_v2._enable(frozenset({"cpu", "pids"}))
    assert (refused, moved) == (["+pids"], ["101", "102"])
    assert (base / "cgroup.subtree_control").read_text().startswith("+pids")


def test_limit_that_cannot_be_enforced_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No controller, no control groups, or no right: which limit, why, and what to do."""
    (base / "cgroup.controllers").write_text("hugetlb\n")
    for given, word in (({"memory": "1 GiB"}, "memory"), ({"cpus": 1}, "cpu"), ({"processes": 9}, "pids")):
        app = config.build_app(
            "wiki", config.ActivePassive(), backend=config.Process("true", limits=config.Limits(**given))
        )
        assert isinstance(app.backend, config.Process)
        with pytest.raises(BackendError, match=rf"limits\.\w+ = .*no controller {word} in") as caught:
            limits.check(app.backend.limits, "wiki")
        assert "Delegate=yes" in caught.value.remedy
    monkeypatch.setattr(cgroup_v2, "base", lambda: "")
    with pytest.raises(BackendError, match=r"limits\.memory = 1048576 cannot be enforced here") as caught:
        limits.check(config.Limits(memory=1 << 20), "wiki")
    assert caught.value.step == "prepare"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(limits.resource, "getrlimit", lambda kind: (100, 4096))
    limits.check(config.Limits(open_files=4096, nice=19), "wiki")
    with pytest.raises(BackendError, match="may have 4096 at most"):
        limits.check(config.Limits(open_files=4097), "wiki")
    with pytest.raises(BackendError, match="only root can go below"):
        limits.check(config.Limits(nice=-20), "wiki")


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"memory": 100}, "memory"),
        ({"memory": "much"}, "memory"),
        ({"cpus": 0}, "cpus"),
        ({"processes": 0}, "processes"),
        ({"open_files": 1}, "open_files"),
        ({"nice": 20}, "nice"),
        ({"core": -1}, "core"),
    ],
)
def test_limit_that_means_nothing_is_refused(given: dict[str, object], key: str) -> None:
    """Before anything starts, with its key."""
    backend = config.Process("true", limits=config.Limits(**given))  # pyright: ignore
    with pytest.raises(ConfigError) as caught:
        config.build_app("wiki", config.ActivePassive(), backend=backend)
    assert f"apps.wiki.backend.limits.{key}" in str(caught.value)
