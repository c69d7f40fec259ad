"""Whatever is declared, the outcome is a checked declaration or a ConfigError of one line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phalanx import config
from phalanx.config import build_app, build_platform, check_toml, redacted
from phalanx.config.reader import fields_of, tag_of
from phalanx.errors import ConfigError

DECLARATIONS = [
    kind
    for name in config.__all__
    if hasattr(kind := getattr(config, name), "__struct_fields__") and kind is not config.CheckSettings
]
QUICK = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)

words = st.sampled_from(
    [
        "",
        "x",
        "5s",
        "embedded",
        "nats://u:p@h",
        "http://h/",
        "h:1",
        "process",
        "http",
        "active-passive",
        "always",
    ]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**5000, max_value=10**5000 + 1),
    st.floats(),
    st.text(st.characters(), max_size=8),
    st.binary(max_size=4),
    st.dates(),
    st.just(object()),
    st.just(int),
    words,
)
keys = st.one_of(
    st.sampled_from([field for kind in DECLARATIONS for field in fields_of(kind)] + ["type", "embedded"]),
    scalars,
)
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(st.tuples(keys, inner), max_size=4).map(dict),
    ),
    max_leaves=8,
)


@st.composite
def declared(draw: st.DrawFn) -> Any:
    """A declaration of the right type with junk in its fields, as a struct or as a table."""
    kind = draw(st.sampled_from(DECLARATIONS))
    fields = fields_of(kind)
    chosen = draw(st.lists(st.sampled_from(list(fields)), max_size=3))
    values = {name: draw(junk) for name in fields if fields[name].required or name in chosen}
    return {**values, "type": tag_of(kind)} if draw(st.booleans()) else kind(**values)


def outcome(build: Callable[[], Any]) -> None:
    """Runs *build*; nothing but a ConfigError of one line may come out of it."""
    try:
        text = json.dumps(redacted(build()), allow_nan=False)
    except ConfigError as error:
        text = str(error)
        bearable = len(text) < 1000
    else:
        bearable = True
    assert text.isprintable()
    assert bearable


PLATFORM = [*fields_of(config.PlatformConfig)][1:]
APP = [*fields_of(config.AppConfig)][2:]
anything = st.one_of(junk, declared(), st.lists(declared(), max_size=2))


@QUICK
@given(name=st.one_of(st.just("prod"), junk), options=st.dictionaries(st.sampled_from(PLATFORM), anything))
def test_junk_in_platforms(name: Any, options: dict[str, Any]) -> None:
    """Junk in any field of a node, at any depth, is refused as a ConfigError."""
    outcome(lambda: build_platform(name, environ={}, **options))


@QUICK
@given(
    name=st.one_of(st.just("wiki"), junk),
    pattern=st.one_of(st.just("active-passive"), anything),
    options=st.dictionaries(st.sampled_from(APP), anything),
)
def test_junk_in_apps(name: Any, pattern: Any, options: dict[str, Any]) -> None:
    """Junk in any field of an app, at any depth, is refused as a ConfigError."""
    outcome(lambda: build_app(name, pattern, **options))


@QUICK
@given(
    environ=st.dictionaries(
        st.sampled_from(["PHALANX_NODE", "PHALANX_NATS", "PHALANX_DATA", "PHALANX_HTTP"]),
        st.one_of(words, st.text(max_size=10)),
    )
)
def test_junk_in_the_environment(environ: dict[str, str]) -> None:
    """Junk in the variables is refused as a ConfigError."""
    outcome(lambda: build_platform("prod", environ=environ))


EXAMPLE = (Path(__file__).parents[2] / "examples" / "phalanx.toml").read_text().encode()


@QUICK
@given(
    start=st.integers(0, len(EXAMPLE)),
    length=st.integers(0, 40),
    insert=st.one_of(st.binary(max_size=6), st.sampled_from([b"[", b'"', b"=", b"{", b"5", b"[apps.x]\n"])),
)
def test_junk_in_files(start: int, length: int, insert: bytes) -> None:
    """A file with a piece cut out and another put in is loaded, or refused with ConfigErrors."""
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(EXAMPLE[:start] + insert + EXAMPLE[start + length :])
        file.flush()
        assert all(str(error).isprintable() for error in check_toml(file.name, environ={}))
