"""No secret of a declaration is ever shown."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import msgspec
import pytest

from phalanx.config import (
    ActivePassive,
    FunctionCheck,
    HttpCheck,
    NatsOptions,
    Process,
    Secret,
    build_app,
    build_platform,
    hide_secrets,
    redacted,
    restore_secrets,
    reveal_secrets,
)
from phalanx.errors import ConfigError

LEAK = "hunter2"


def platform(**options: Any) -> Any:
    """A node of "prod" in an empty environment."""
    return build_platform("prod", environ={}, node="n1", data_dir="/data", **options)


@pytest.mark.parametrize(
    "nats",
    [
        f"nats://u:{LEAK}@h:x",
        f"nats://u:{LEAK}@h,nats://u:{LEAK}x@h",
        f"nats://u:{LEAK}/x@h",
        f"nats://u:{LEAK}#x@h",
        f"u:{LEAK},x@h",
        f"nats://u:{LEAK}",
        f"u:{LEAK}",
        f"nats://{LEAK}@",
        [f"nats://u:{LEAK}@h", "http://h"],
        [f"nats://u:{LEAK}@h", 5],
        [[f"nats://u:{LEAK}@h"]],
        {"urls": {"password": LEAK}},
        {"pasword": LEAK},
        {"password": LEAK},
        {"password": [LEAK]},
        {"user": "u", "password": f"{LEAK}\n"},
        {"nkey_seed": LEAK},
        {"embedded": True, "user": "u", "password": f"$2a${LEAK}"},
        {"embedded": {"port": "x", "token": LEAK}, "token": LEAK},
        {"urls": "v:x@h", "user": "v", "password": LEAK},
        {"urls": f"v:{LEAK}@h", "user": "v", "password": "x"},
        {"urls": "h", 5: LEAK},
        f"nats://u:{LEAK}@h".encode(),
    ],
)
def test_no_error_shows_a_secret(nats: Any) -> None:
    """Whatever is wrong around a password, the message does not hold it."""
    with pytest.raises(ConfigError) as caught:
        platform(nats=nats)
    error = caught.value
    assert LEAK not in str(error)
    assert LEAK not in repr(error)
    assert LEAK not in repr(error.value)


def test_secret_shows_itself_nowhere() -> None:
    """Neither printing, formatting, encoding nor pickling shows it; reveal() does."""
    secret = Secret(LEAK)
    options = NatsOptions(user="u", password=LEAK)  # plain text is hidden at once
    for text in (str(secret), repr(secret), f"{secret}", f"{secret!r:>20}", repr(options)):
        assert LEAK not in text
        assert "***" in text
    with pytest.raises(TypeError):
        msgspec.json.encode(options)
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    assert LEAK.encode() not in msgspec.json.encode(options, enc_hook=hide_secrets)
    assert secret.reveal() == LEAK


def test_secret_is_a_value() -> None:
    """Equal secrets are equal, hash alike, cannot be changed, copy as themselves; empty ones are false."""
    assert Secret("a") == Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert hash(Secret("a")) == hash(Secret("a"))
    assert not Secret()
    assert copy.deepcopy(Secret("a")) == Secret("a")
    with pytest.raises(AttributeError):
        Secret("a")._value = "b"  # type: ignore
    with pytest.raises(TypeError):
        Secret(5)  # type: ignore


def test_secrets_reach_the_keeper_when_asked() -> None:
    """reveal_secrets and restore_secrets take a declaration through JSON unchanged."""
    options = platform(nats=f"nats://u:{LEAK}@h").nats
    data = msgspec.json.encode(options, enc_hook=reveal_secrets)
    assert msgspec.json.decode(data, type=NatsOptions, dec_hook=restore_secrets) == options


def test_redacted_is_json_without_secrets() -> None:
    """For /status and logs: passwords, values of env and logins in URLs are hidden, the rest is there."""

    def works() -> bool:
        return True

    node = redacted(platform(nats=f"nats://u:{LEAK}@h", labels={"zone": "a"}))
    wiki = redacted(
        build_app(
            "wiki",
            ActivePassive(),
            backend=Process("x", env={"PASSWORD": LEAK}, ready=HttpCheck(f"http://u:{LEAK}@h/")),
            checks=[FunctionCheck(works), HttpCheck(f"http://u:{LEAK}@h/x")],
        )
    )
    text = msgspec.json.encode([node, wiki]).decode()
    assert LEAK not in text
    assert node["nats"]["password"] == "***"
    assert node["labels"] == {"zone": "a"}
    assert wiki["backend"]["env"] == {"PASSWORD": "***"}
    assert wiki["backend"]["type"] == "process"
    assert wiki["checks"][0]["function"].endswith("works")
    assert LEAK not in repr(redacted(NatsOptions(urls=[f"nats://u:{LEAK}@h"])))
