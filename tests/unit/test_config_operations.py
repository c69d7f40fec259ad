"""Declarations of backends, virtual addresses, restarts and the fence: what is refused, and how it reads."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx import Platform
from phalanx.config import ActivePassive, Docker, Restart, Systemd, VirtualIP, build_app, build_platform
from phalanx.errors import ConfigError

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"vip": "10.0.0.9"}, "apps.wiki.vip.address", "10.0.0.9/24"),
    ({"vip": "10.0.0.300/24"}, "apps.wiki.vip.address", "10.0.0.9/24"),
    ({"vip": "10.0.0.0/24"}, "apps.wiki.vip.address", "the network itself"),
    ({"vip": "10.0.0.255/24"}, "apps.wiki.vip.address", "broadcast"),
    ({"vip": "127.0.0.1/8"}, "apps.wiki.vip.address", "no address that a host can have"),
    ({"vip": ["10.0.0.9/24", "::1/128"]}, "apps.wiki.vip[1].address", "no address that a host can have"),
    ({"vip": {"address": "10.0.0.9/24", "interface": "a" * 16}}, "apps.wiki.vip.interface", "1 to 15"),
    ({"vip": {"address": "10.0.0.9/24", "lifetime": 0}}, "apps.wiki.vip.lifetime", "1 s to"),
    ({"vip": {"adress": "10.0.0.9/24"}}, "apps.wiki.vip.adress", "did you mean address?"),
    ({"vip": 7}, "apps.wiki.vip", "VirtualIP(...)"),
    ({"backend": Docker()}, "apps.wiki.backend.image", "neither image nor container"),
    ({"backend": Docker(image="a", container="b")}, "apps.wiki.backend.image", "exclude each other"),
    ({"backend": Docker(container="b", ports=["80"])}, "apps.wiki.backend.ports", "has its own"),
    ({"backend": Docker(container="b", env={"K": "v"})}, "apps.wiki.backend.env", "has its own"),
    ({"backend": Systemd("")}, "apps.wiki.backend.unit", "not a unit name"),
    ({"restart": Restart(count=-1)}, "apps.wiki.restart.count", "0 to 1000"),
    ({"restart": {"counts": 1}}, "apps.wiki.restart.counts", "did you mean count?"),
    ({"pattern": ActivePassive(no_failover="yes")}, "apps.wiki.pattern.no_failover", "true or false"),  # type: ignore
]


@pytest.mark.parametrize(("options", "key", "hint"), WRONG)
def test_wrong_value(options: dict[str, Any], key: str, hint: str) -> None:
    """The first thing that is wrong is named by its key, with what would be right."""
    pattern = options.pop("pattern", ActivePassive())
    with pytest.raises(ConfigError) as caught:
        build_app("wiki", pattern, **options)
    assert caught.value.key == key
    assert hint in str(caught.value)


def test_address_in_all_its_forms() -> None:
    """Text, a declaration, a table, a list of them: the same; the address in normal form."""
    forms: list[Any] = [
        "2001:DB8::9/64",
        VirtualIP("2001:db8::9/64"),
        {"address": "2001:db8:0::9/64"},
        ["2001:db8::9/64"],
    ]
    for form in forms:
        (found,) = build_app("wiki", ActivePassive(), vip=form).vip
        assert found.address == "2001:db8::9/64"


def test_fence_in_all_its_forms() -> None:
    """A command alone is enough; it is split like a shell would."""
    forms: list[Any] = ["ipmi-off {node}", ["ipmi-off", "{node}"], {"command": "ipmi-off {node}"}]
    for form in forms:
        fence = build_platform("prod", environ={}, node="n1", data_dir="/data", fence=form).fence
        assert fence is not None
        assert fence.command == ("ipmi-off", "{node}")


SHARED: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"vip": "10.0.0.9/24"}, {"vip": ["10.0.0.8/24", "10.0.0.9/32"]}, "apps.blog.vip", "address"),
    ({"backend": Systemd("w.service")}, {"backend": Systemd("w.service")}, "apps.blog.backend.unit", "unit"),
    (
        {"backend": Docker(container="w")},
        {"backend": Docker(container="w")},
        "apps.blog.backend.container",
        "container",
    ),
]


@pytest.mark.parametrize(("wiki", "blog", "key", "thing"), SHARED)
def test_g1_what_is_there_once_on_a_host_belongs_to_one_app(
    wiki: dict[str, Any], blog: dict[str, Any], key: str, thing: str
) -> None:
    """Two apps with one address, unit or container would end each other's: the second one is refused."""
    platform = Platform("test", node="n1", nats="nats://127.0.0.1:4222")
    platform.app("wiki", **wiki)
    with pytest.raises(ConfigError) as caught:
        platform.app("blog", **blog)
    assert caught.value.key == key
    assert f"app 'wiki' has the same {thing}" in str(caught.value)


def test_apps_may_share_an_image_and_an_instance_is_a_unit_of_its_own() -> None:
    """What is made anew for each start, or differs in its instance, is not shared."""
    platform = Platform("test", node="n1", nats="nats://127.0.0.1:4222")
    platform.app("a", backend=Docker(image="wiki"), vip="10.0.0.8/24")
    platform.app("b", backend=Docker(image="wiki"), vip="10.0.0.9/24")
    platform.app("c", backend=Systemd("wiki@c.service"))
    platform.app("d", backend=Systemd("wiki@d.service"))
    assert len(platform.apps) == 4


def test_app_that_holds_needs_a_way_to_the_other_nodes() -> None:
    """One line says what is missing, before anything starts; with it the app is declared."""
    with pytest.raises(ConfigError, match=r"apps\.wiki\.on_nats_loss.*cannot reach each other without NATS"):
        Platform("prod", node="n1").app("wiki", ActivePassive(on_nats_loss="hold"))
    platform = Platform("prod", node="n1", direct="127.0.0.1:7421")
    app = platform.app("wiki", ActivePassive(on_nats_loss="hold"))
    assert app.config.pattern.on_nats_loss == "hold"


@pytest.mark.parametrize("direct", ["0.0.0.0:7421", "[::]:7421", "host", "host:0", "host:99999"])
def test_direct_is_an_address_that_others_can_send_to(direct: str) -> None:
    """A wildcard is nowhere to be reached."""
    with pytest.raises(ConfigError, match="direct"):
        Platform("prod", node="n1", direct=direct)
