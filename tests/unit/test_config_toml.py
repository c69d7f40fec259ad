"""phalanx.toml: the same as in Python, syntax errors by line, secrets from elsewhere, all errors at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.config import (
    ActivePassive,
    EmbeddedNats,
    HttpCheck,
    NatsOptions,
    Process,
    TcpCheck,
    Timings,
    build_app,
    build_platform,
    check_toml,
    load_toml,
)
from phalanx.errors import ConfigError, ConfigFileError

ROOT = Path(__file__).parents[2]
FULL = """
[platform]
name = "prod"
node = "n1"
data_dir = "data"

[nats]
urls = ["nats://h:1"]
user = "u"
password_env = "NATS_PASSWORD"
tls_ca = "ca.pem"

[timings]
ttl = "2s"

[labels]
zone = "a"

[apps.wiki]
pattern = "active-passive"
kv_history = 3
retry = { first = "1s" }

[apps.wiki.backend]
type = "process"
command = ["run", "${HOME}"]
cwd = "/srv"
ready = { type = "tcp", address = "h:1" }

[apps.wiki.hook_timeouts]
on_stop = 3

[[apps.wiki.checks]]
type = "http"
url = "http://h/"

[[apps.wiki.checks]]
type = "tcp"
address = "h:1"
depends_on = ["http"]

[apps.mail]
pattern = { type = "active-passive", priority = 3 }
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A file to write to."""
    return tmp_path / "phalanx.toml"


def wrong(path: Path, text: str, environ: dict[str, str] | None = None) -> list[ConfigError]:
    """All errors of *text*; the first is what load_toml raises. Each is one line."""
    path.write_text(text)
    errors = check_toml(path, environ=environ or {})
    assert errors
    with pytest.raises(ConfigError) as caught:
        load_toml(path, environ=environ or {})
    assert str(caught.value) == str(errors[0])
    assert all(str(error).isprintable() for error in errors)
    return errors


def test_file_means_the_same_as_python(toml: Path, tmp_path: Path) -> None:
    """A file with every section is the declaration that one would write in Python."""
    toml.write_text(FULL)
    assert check_toml(toml, environ={"NATS_PASSWORD": "p"}) == []
    platform, apps = load_toml(toml, environ={"NATS_PASSWORD": "p"})
    assert platform == build_platform(
        "prod",
        environ={},
        node="n1",
        data_dir=tmp_path / "data",
        nats=NatsOptions(urls=("nats://h:1",), user="u", password="p", tls_ca=tmp_path / "ca.pem"),
        timings=Timings(ttl=2),
        labels={"zone": "a"},
    )
    assert apps == [
        build_app(
            "wiki",
            ActivePassive(),
            kv_history=3,
            retry={"first": 1},
            backend=Process(["run", "${HOME}"], cwd="/srv", ready=TcpCheck("h:1")),
            hook_timeouts={"on_stop": 3},
            checks=[HttpCheck("http://h/"), TcpCheck("h:1", depends_on=["http"])],
        ),
        build_app("mail", ActivePassive(priority=3)),
    ]


def test_example_file_is_right() -> None:
    """examples/phalanx.toml loads as it stands."""
    platform, apps = load_toml(ROOT / "examples" / "phalanx.toml", environ={"PHALANX_NODE": "n1"})
    assert (platform.name, [app.name for app in apps]) == ("prod", ["wiki"])


def test_commented_lines_of_the_example_are_right(toml: Path) -> None:
    """The embedded alternative that the example shows in comments loads too."""
    text = (ROOT / "examples" / "phalanx.toml").read_text()
    start = text.index("# [nats.embedded]")
    block = text[start : text.index("\n\n", start)].replace("\n# ", "\n").removeprefix("# ")
    toml.write_text(f'[platform]\nname = "prod"\nnode = "n1"\n{block}\n')
    platform, _ = load_toml(toml, environ={"NATS_PASSWORD": "p", "NATS_ROUTE_SECRET": "r"})
    assert isinstance(platform.nats, EmbeddedNats)
    assert platform.nats.route_secret.reveal() == "r"


@pytest.mark.parametrize("nats", ["[nats]\nembedded = true\nport = 5", "[nats.embedded]\nport = 5"])
def test_embedded_nats_in_both_notations(toml: Path, nats: str) -> None:
    """A switch in [nats], or a section of its own."""
    toml.write_text(f'[platform]\nname = "prod"\nnode = "n1"\n{nats}\n')
    assert load_toml(toml, environ={})[0].nats == EmbeddedNats(port=5)


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("a = \n", 1, 5),
        ('[platform]\nname = "hunter2\n', 2, 16),
        ("[platform]\n[platform]\n", 2, 10),
        ("[platform]\nname =", 2, 7),
        ("a = 1\na = 2\n", 2, 6),
        ("a = 2020-99-99", 1, 9),
    ],
)
def test_syntax_errors_have_line_and_column(toml: Path, text: str, line: int, column: int) -> None:
    """No TOML: the message begins with file:line:column, and shows nothing of the line."""
    [error] = wrong(toml, text)
    assert isinstance(error, ConfigFileError)
    assert (error.line, error.column) == (line, column)
    assert str(error).startswith(f"{toml}:{line}:{column}: ")
    assert "hunter2" not in str(error)


def test_files_that_cannot_be_read(toml: Path, tmp_path: Path) -> None:
    """Missing, a folder, not UTF-8, too large, too deep: one line, no traceback."""
    [missing] = check_toml(toml)
    assert "No such file" in str(missing)
    [folder] = check_toml(tmp_path)
    assert "directory" in str(folder)
    [nul] = check_toml("a\0b")
    assert isinstance(nul, ConfigFileError)
    toml.write_bytes(b"a = 1\nb = '\xff'\n")
    [encoding] = check_toml(toml)
    assert str(encoding).startswith(f"{toml}:2:6: not UTF-8")
    toml.write_bytes(b"#" * (1 << 20) + b"#")
    [large] = check_toml(toml)
    assert "1 MiB" in str(large)
    toml.write_text("a = " + "[" * 100_000)
    [deep] = check_toml(toml)
    assert isinstance(deep, ConfigFileError)


def test_all_errors_of_a_file_at_once(toml: Path) -> None:
    """check_toml goes on after an error: platform, sections, every app, every check."""
    errors = wrong(
        toml,
        """
        plattform = 1
        [platform]
        name = "Prod"
        node = "n1"
        labels = {}
        [timings]
        ttl = 0
        [http]
        prot = 1
        [apps]
        mail = 5
        [apps.Wiki]
        pattern = "active-passive"
        kv_history = 0
        [apps.wiki]
        name = "x"
        pattern = "active-active"
        [apps.wiki.backend]
        command = "x"
        [[apps.wiki.checks]]
        type = "function"
        [[apps.wiki.checks]]
        type = "tcp"
        """,
    )
    assert sorted(error.key for error in errors) == sorted(
        [
            "plattform",
            "platform.name",
            "platform.labels",
            "timings.ttl",
            "http.prot",
            "apps.mail",
            "apps",
            "apps.Wiki.kv_history",
            "apps.wiki.name",
            "apps.wiki.pattern.type",
            "apps.wiki.backend.type",
            "apps.wiki.checks[0].type",
            "apps.wiki.checks[1].address",
        ]
    )


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "platform.name"),
        ("platform = 5", "platform"),
        ("apps = []\n[platform]\nname = 'prod'", "apps"),
        ("[platform]\nname = 'prod'\n[nats]\nembedded = 1", "nats.embedded"),
        ("[platform]\nname = 'prod'\n[nats.embedded]\nhots = 1", "nats.embedded.hots"),
        ("[platform]\nname = 'prod'\n[labels]\na = 2020-01-01", "labels.a"),
        ("[platform]\nname = 'prod'\n[timings]\nttl = nan", "timings.ttl"),
        ("[platform]\nname = 'prod'\n[apps.a]", "apps.a.pattern"),
    ],
)
def test_wrong_files(toml: Path, text: str, key: str) -> None:
    """What only a file can get wrong is named by its key too."""
    assert wrong(toml, text)[0].key == key


SECRET = "[platform]\nname = 'prod'\nnode = 'n1'\n[nats]\nuser = 'u'\n"


def test_secret_from_a_file(toml: Path, tmp_path: Path) -> None:
    """password_file is found from the file's folder; the line end at its end is not part of the secret."""
    (tmp_path / "pw").write_text("hunter2\n")
    toml.write_text(f"{SECRET}password_file = 'pw'")
    options = load_toml(toml, environ={})[0].nats
    assert isinstance(options, NatsOptions)
    assert options.password.reveal() == "hunter2"


def test_nkey_seed_file_is_left_to_whoever_connects(toml: Path, tmp_path: Path) -> None:
    """It is a field of its own, not a way to give nkey_seed, and need not exist yet."""
    toml.write_text("[platform]\nname = 'prod'\nnode = 'n1'\n[nats]\nnkey_seed_file = 'seed'")
    options = load_toml(toml, environ={})[0].nats
    assert isinstance(options, NatsOptions)
    assert (options.nkey_seed_file, bool(options.nkey_seed)) == (str(tmp_path / "seed"), False)


@pytest.mark.parametrize(
    ("lines", "key", "problem"),
    [
        ("password_file = 'missing'", "nats.password_file", "No such file"),
        ("password_file = 'empty'", "nats.password_file", "empty"),
        ("password_file = 'binary'", "nats.password_file", "UTF-8"),
        ("password_file = 'large'", "nats.password_file", "too large"),
        ("password_file = '.'", "nats.password_file", "directory"),
        ("password_file = 5", "nats.password_file", "not text"),
        ("password_file = 'two'", "nats.password", "control characters"),
        ("password_env = 'UNSET'", "nats.password_env", "not set"),
        ("password_env = 'EMPTY'", "nats.password_env", "not set"),
        ("password_env = 5", "nats.password_env", "not the name"),
        ("password = 'x'\npassword_env = 'SET'", "nats.password_env", "is set too"),
        ("password_file = 'two'\npassword_env = 'SET'", "nats.password_env", "is set too"),
        ("password = '${SET}'", "nats.password", "looks like a variable"),
    ],
)
def test_secrets_that_cannot_be_had(toml: Path, tmp_path: Path, lines: str, key: str, problem: str) -> None:
    """A secret that is not where it should be is an error that says where it was looked for."""
    for name, data in {"empty": b"\n", "binary": b"\xff", "large": b"x" * 70_000, "two": b"a\nb\n"}.items():
        (tmp_path / name).write_bytes(data)
    error = wrong(toml, SECRET + lines, {"SET": "x", "EMPTY": ""})[0]
    assert error.key == key
    assert problem in error.problem


def test_environment_wins_over_the_file(toml: Path) -> None:
    """The same file serves several nodes: PHALANX_* differ."""
    toml.write_text(FULL)
    environ = {"NATS_PASSWORD": "p", "PHALANX_NODE": "n2", "PHALANX_DATA": "/n2", "PHALANX_HTTP": "7421"}
    platform, _ = load_toml(toml, environ=environ)
    assert (platform.node, platform.data_dir, platform.http.port) == ("n2", "/n2", 7421)
