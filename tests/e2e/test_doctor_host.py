"""``phalanx doctor FILE`` on the host that the file is for: programs, addresses, the fence command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.vip_lab import mac

from phalanx.testing.netlab import Host, NetLab
from phalanx.testing.vips import VipStage

VIP, VIP6 = "10.66.0.100", "fd66:66::100"
CLI = [sys.executable, "-m", "phalanx.cli.main"]
TOML = """
[platform]
name = "prod"
node = "n1"
data_dir = "{folder}/data"
[nats]
urls = ["nats://127.0.0.1:1"]
[http]
enabled = false
[fence]
command = "{fence} {{node}}"
[apps.wiki]
pattern = "active-passive"
vip = {vip}
[apps.wiki.backend]
type = "process"
command = "{command}"
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[NetLab]:
    """Two hosts, with IPv6."""
    with NetLab(2, ipv6=True) as lab:
        yield lab


def doctor(host: Host, *words: str) -> list[tuple[str, str, str, str]]:
    """What it finds of the apps: check, level, text, remedy."""
    done = host.run([*CLI, "doctor", *words, "--json", "--timeout", "0.5"], check=False, timeout=120)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = ("backend", "addresses", "fence", "apps")
    return [
        (each["check"], each["level"], each["text"], each["remedy"])
        for each in found
        if each["check"] in wanted
    ]


def declare(folder: Path, vip: list[str], command: str = "/bin/sleep 1000", fence: str = "/bin/true") -> str:
    """A file of one app with those addresses, that program and that fence command."""
    toml = folder / "phalanx.toml"
    toml.write_text(TOML.format(folder=folder, vip=json.dumps(vip), command=command, fence=fence))
    return str(toml)


def test_host_that_has_all_is_well(lab: NetLab, tmp_path: Path) -> None:
    """One line for each: program, addresses, fence command; and nobody else answers for the addresses."""
    toml = declare(tmp_path, [f"{VIP}/24", f"{VIP6}/64"])
    assert doctor(lab[0], toml) == [
        ("backend", "ok", "app wiki: its program can be started on this host", ""),
        ("addresses", "ok", f"app wiki: there is a place for {VIP}/24, {VIP6}/64 on this host", ""),
        ("fence", "ok", "/bin/true can be run", ""),
        ("addresses", "ok", "app wiki: nobody else answers for its addresses", ""),
    ]


def test_host_that_lacks_something_is_told_with_the_remedy(lab: NetLab, tmp_path: Path) -> None:
    """As by ``config check``: each is FAIL, and nobody is asked for an address that has no place here."""
    found = doctor(lab[0], declare(tmp_path, ["192.0.2.9/24"], "/no/such/program", "/no/such/fence"))
    assert [(check, level) for check, level, _, _ in found] == [
        ("backend", "fail"),
        ("addresses", "fail"),
        ("fence", "fail"),
    ]
    assert "/no/such/program" in found[0][2]
    assert "192.0.2.9/24: no interface has an address in its network" in found[1][2]
    assert found[2][2:] == (
        "/no/such/fence: there is no such program on this host",
        "put it there on every node, or correct fence.command",
    )
    assert all(remedy for _, _, _, remedy in found)


def test_fence_command_that_is_missing_is_bad_input(tmp_path: Path, lab: NetLab) -> None:
    """`config check` says so in one line; for another host it does not look."""
    toml = declare(tmp_path, [f"{VIP}/24"], fence=str(tmp_path / "fence.sh"))
    (tmp_path / "fence.sh").write_text("#!/bin/sh\n")
    done = lab[0].run([*CLI, "config", "check", toml], check=False)
    assert done.returncode == 2
    assert "fence.command" in done.stderr
    assert "chmod +x" in done.stderr
    assert lab[0].run([*CLI, "config", "check", toml, "--other-host"], check=False).returncode == 0


@pytest.mark.parametrize(("address", "length"), [(VIP, 24), (VIP6, 64)])
def test_address_of_a_stranger_is_a_warning_with_its_hardware_address(
    lab: NetLab, tmp_path: Path, address: str, length: int
) -> None:
    """It is found before a failover needs the address."""
    option = ("nodad",) if ":" in address else ()
    lab[1].ip("addr", "add", f"{address}/{length}", "dev", "eth0", *option)
    try:
        warnings = [
            each for each in doctor(lab[0], declare(tmp_path, [f"{address}/{length}"])) if each[1] == "warn"
        ]
    finally:
        lab[1].ip("addr", "del", f"{address}/{length}", "dev", "eth0")
    text = (
        f"app wiki: {address}/{length} is answered by {mac(lab[1])} on eth0, and no node is known to have it"
    )
    assert [each[:3] for each in warnings] == [("addresses", "warn", text)]


def test_address_that_a_node_holds_is_no_stranger(tmp_path: Path) -> None:
    """Neither on its own host nor on a standby's, whose neighbour answers for it as it should."""
    with VipStage() as stage:
        active = stage.settled()
        for node in stage.names:
            host, file = stage.host(node), stage.directory / f"{node}.toml"
            levels = {level for check, level, _, _ in doctor(host, str(file)) if check == "addresses"}
            assert levels == {"ok"}, (node, active)
