"""The configuration of an embedded server: what is written, and what is refused."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from phalanx.bus import embedded_config
from phalanx.bus.binary import nats_server_binary
from phalanx.bus.embedded import EmbeddedServer
from phalanx.config import EmbeddedNats, Secret
from phalanx.errors import ConfigError


def rendered(config: EmbeddedNats, directory: Path = Path("/data/nats")) -> str:
    """The text for node n1 of platform prod."""
    return embedded_config.render(embedded_config.checked(config), "prod", "n1", directory)


def test_single_server_has_no_cluster_and_syncs_always() -> None:
    """The default is one server on loopback that syncs before it acknowledges."""
    text = rendered(EmbeddedNats())
    assert "cluster" not in text
    assert 'sync_interval: "always"' in text
    assert 'listen: "127.0.0.1:4222"' in text
    assert 'server_name: "prod-n1"' in text


def test_cluster_is_named_after_the_platform_and_its_routes_log_in() -> None:
    """Routes carry the escaped route secret, and the cluster asks for it."""
    config = EmbeddedNats(
        host="10.0.0.1",
        token=Secret("t"),
        routes=("10.0.0.2:6222", "[fd00::3]:6222"),
        route_secret=Secret("a/b@c"),
    )
    text = rendered(config)
    assert 'name: "prod"' in text
    assert '"nats-route://route:a%2Fb%40c@10.0.0.2:6222"' in text
    assert '"nats-route://route:a%2Fb%40c@[fd00::3]:6222"' in text
    assert 'authorization { user: route, password: "a/b@c", timeout: 5 }' in text


@pytest.mark.parametrize(
    "config",
    [
        EmbeddedNats(),
        EmbeddedNats(
            user='u"\\', password=Secret('$x "\\#{}é'), max_store="10GB", sync="2m", monitor_port=8222
        ),
        EmbeddedNats(token=Secret("12345"), store_dir="rel/store", server_name="mine"),
        EmbeddedNats(host="::1", routes=("[::1]:6223", "localhost:6224"), route_secret=Secret("s")),
        EmbeddedNats(host="0.0.0.0", token=Secret("t"), routes=("b.example:6222",), route_secret=Secret("s")),
    ],
)
def test_nats_server_accepts_what_is_written(config: EmbeddedNats, tmp_path: Path) -> None:
    """nats-server -t finds nothing wrong with the file, whatever quotes and signs the secrets hold."""
    path = tmp_path / "nats.conf"
    path.write_text(rendered(config, tmp_path))
    answer = subprocess.run(
        [nats_server_binary(), "-t", "-c", str(path)], capture_output=True, text=True, check=False, timeout=10
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EmbeddedNats(port=0), "nats.embedded.port = 0"),
        (EmbeddedNats(port=6222, routes=("localhost:6222",)), "nats.embedded.cluster_port = 6222"),
        (EmbeddedNats(monitor_port=4222), "nats.embedded.monitor_port = 4222"),
        (EmbeddedNats(sync="sometimes"), "nats.embedded.sync = 'sometimes'"),
        (EmbeddedNats(max_store="lots"), "nats.embedded.max_store = 'lots'"),
        (EmbeddedNats(routes=("nats://b:6222",)), "nats.embedded.routes[0] = 'nats://b:6222'"),
        (EmbeddedNats(routes=("localhost:99999",)), "nats.embedded.routes[0] = 'localhost:99999'"),
        (EmbeddedNats(routes=("10.0.0.2:6222",)), "could not reach this one"),
        (EmbeddedNats(host="0.0.0.0"), "without authentication"),
        (EmbeddedNats(host="nats.example"), "without authentication"),
        (EmbeddedNats(host="10.0.0.1", token=Secret("t"), routes=("10.0.0.2:6222",)), "open to anybody"),
        (EmbeddedNats(user="u"), "nats.embedded.password"),
        (EmbeddedNats(password=Secret("p")), "nats.embedded.user"),
        (EmbeddedNats(user="u", password=Secret("p"), token=Secret("t")), "exclude each other"),
        (EmbeddedNats(token=Secret("$2a$11$abc")), "bcrypt"),
        (EmbeddedNats(token=Secret("a\nb")), "control characters"),
        (EmbeddedNats(tls_cert="c.pem"), "nats.embedded.tls_key"),
    ],
)
def test_wrong_or_open_declarations_are_refused(config: EmbeddedNats, message: str, tmp_path: Path) -> None:
    """One line names key, value and remedy, shows no secret, and nothing has been written."""
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        EmbeddedServer(config, platform="prod", node="n1", data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert "$2a$" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_options_lead_to_this_machine_even_when_listening_everywhere(tmp_path: Path) -> None:
    """A node connects to its own server by loopback, with the credentials that the server asks for."""
    config = EmbeddedNats(host="0.0.0.0", port=4300, user="u", password=Secret("p"))
    options = EmbeddedServer(config, platform="prod", node="n1", data_dir=tmp_path).options
    assert options.urls == ("nats://127.0.0.1:4300",)
    assert (options.user, options.password.reveal()) == ("u", "p")
    assert (options.server_name, options.replicas) == ("prod-n1", None)


def test_options_carry_the_declared_copies_and_the_name_of_this_host_s_server(tmp_path: Path) -> None:
    """The bus learns which server is its own, so that streams can be led elsewhere, and how many copies."""
    config = EmbeddedNats(routes=("localhost:6222", "localhost:6223"), replicas=3, server_name="mine")
    options = EmbeddedServer(config, platform="prod", node="n1", data_dir=tmp_path).options
    assert options.urls == ("nats://127.0.0.1:4222",)
    assert (options.server_name, options.replicas) == ("mine", 3)


def test_passwords_given_as_plain_text_are_hidden_and_written(tmp_path: Path) -> None:
    """A declaration made by hand with a plain password works as one with a Secret does."""
    config = EmbeddedNats(user="u", password="plain")
    assert 'password: "plain"' in rendered(config)
    assert EmbeddedServer(config, platform="prod", node="n1", data_dir=tmp_path).options.password == Secret(
        "plain"
    )
