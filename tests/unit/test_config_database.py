"""Declarations of databases: forms, defaults, paths, and what does not fit together between apps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import phalanx
from phalanx import ConfigError, Platform, SQLite
from phalanx.config import ActivePassive, build_app, check_toml, load_toml, redacted
from phalanx.config.databases import folder_of

HEAD = '[platform]\nname = "prod"\nnode = "n1"\n'


def database(value: Any) -> SQLite:
    """The checked database of an app that declares *value*."""
    made = build_app("wiki", ActivePassive(), database=value).database
    assert made is not None
    return made


def error_of(value: Any) -> ConfigError:
    """The error of an app that declares *value*; one line, with its remedy."""
    with pytest.raises(ConfigError) as caught:
        database(value)
    assert str(caught.value).isprintable()
    assert caught.value.remedy in str(caught.value)
    return caught.value


def file_errors(folder: Path, text: str) -> list[ConfigError]:
    """All errors of a phalanx.toml in *folder* with these apps."""
    file = folder / "phalanx.toml"
    file.write_text(HEAD + text)
    return check_toml(file, environ={})


# --- what is right


def test_path_alone_is_a_database_with_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, pathlib, a struct and a table mean the same; the path counts from the working directory."""
    monkeypatch.chdir(tmp_path)
    made = database("data/wiki.db")
    assert made.path == str(tmp_path / "data/wiki.db")
    for form in (Path("data/wiki.db"), SQLite("data/wiki.db"), {"path": "data/wiki.db"}, made):
        assert database(form) == made
    assert (made.sync, made.sync_timeout, made.max_lag) == ("auto", 5.0, 30.0)
    assert (made.snapshot_every, made.keep_snapshots, made.keep_snapshots_for) == (3600.0, 24, 7 * 86400.0)
    assert (made.log_limit, made.spool_limit, made.copy_to) == (1 << 30, 1 << 30, "")


def test_database_of_a_file_in_both_notations(tmp_path: Path) -> None:
    """The short form is a path, the long one a table; paths count from the file's folder."""
    short = HEAD + '[apps.wiki]\npattern = "active-passive"\ndatabase = "data/wiki.db"\n'
    long = HEAD + '[apps.wiki]\npattern = "active-passive"\n[apps.wiki.database]\npath = "data/wiki.db"\n'
    expected = SQLite(tmp_path / "data/wiki.db")
    for text in (short, long, long + 'type = "sqlite"\n'):
        (tmp_path / "phalanx.toml").write_text(text)
        _, [app] = load_toml(tmp_path / "phalanx.toml", environ={})
        assert app.database == database(expected)
    (tmp_path / "phalanx.toml").write_text(long + 'copy_to = "copy"\nkeep_snapshots_for = "30d"\n')
    _, [app] = load_toml(tmp_path / "phalanx.toml", environ={})
    assert app.database is not None
    assert (app.database.copy_to, app.database.keep_snapshots_for) == (str(tmp_path / "copy"), 30 * 86400.0)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (1 << 20, 1 << 20),
        ("1048576 B", 1 << 20),
        ("64 MiB", 64 << 20),
        ("64MiB", 64 << 20),
        ("1 GB", 10**9),
        ("1.5 GiB", 3 << 29),
        ("2000 kB".replace("k", "K"), 2_000_000),
        ("1 TiB", 1 << 40),
    ],
)
def test_sizes_in_all_notations(given: Any, count: int) -> None:
    """Numbers are bytes, text has a unit, binary or decimal."""
    assert database(SQLite("/w.db", log_limit=given)).log_limit == count


def test_environment_says_where_relative_paths_count_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PHALANX_DATABASES gives nodes on one host files of their own, in files and in Python."""
    (tmp_path / "phalanx.toml").write_text(
        HEAD
        + '[apps.wiki]\npattern = "active-passive"\ndatabase = { path = "data/w.db", copy_to = "copy" }\n'
    )
    _, [app] = load_toml(tmp_path / "phalanx.toml", environ={"PHALANX_DATABASES": "/n1"})
    assert app.database is not None
    assert (app.database.path, app.database.copy_to) == ("/n1/data/w.db", "/n1/copy")
    monkeypatch.setenv("PHALANX_DATABASES", "/n1")
    assert database("data/w.db").path == "/n1/data/w.db"
    assert database("/srv/w.db").path == "/srv/w.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHALANX_DATABASES", "here")
    assert database("w.db").path == str(tmp_path / "here/w.db")
    monkeypatch.setenv("PHALANX_DATABASES", "~/here")
    with pytest.raises(ConfigError, match="PHALANX_DATABASES"):
        database("w.db")


def test_python_declares_a_database_by_path_or_struct() -> None:
    """Platform.app takes both; the public names are there."""
    platform = Platform("prod", node="n1")
    wiki = platform.app("wiki", database="/srv/wiki.db").config
    mail = platform.app("mail", database=phalanx.SQLite("/srv/mail.db", sync="standby")).config
    assert (wiki.database, mail.database) == (
        database("/srv/wiki.db"),
        database(SQLite("/srv/mail.db", sync="standby")),
    )
    assert phalanx.Position is not None
    assert platform.app("none").config.database is None


def test_database_is_shown_as_plain_data() -> None:
    """/status and logs show the declaration."""
    shown = redacted(build_app("wiki", ActivePassive(), database="/srv/wiki.db"))["database"]
    assert (shown["type"], shown["path"], shown["log_limit"]) == ("sqlite", "/srv/wiki.db", 1 << 30)


def test_folder_of_a_database_lies_beside_it() -> None:
    """The same file system, a name that nothing else has."""
    assert database("/srv/wiki.db").folder == folder_of("/srv/wiki.db") == Path("/srv/.wiki.db-phalanx")


# --- what is wrong

WRONG: list[tuple[Any, str, str]] = [
    (5, "", "SQLite(...)"),
    (SQLite, "", "SQLite(...)"),
    ("", ".path", "such as"),
    ("data/", ".path", "such as"),
    ("..", ".path", "such as"),
    (":memory:", ".path", "such as"),
    ("file:wiki.db?mode=rw", ".path", "such as"),
    ("~/wiki.db", ".path", "whole path"),
    ("a\nb", ".path", "remove"),
    ({"path": 5}, ".path", "path"),
    ({}, ".path", "set it"),
    ({"type": "postgres", "path": "x"}, ".type", "sqlite"),
    ({"path": "x", "snyc": 1}, ".snyc", "did you mean sync?"),
    ("/srv/" + "x" * 201, ".path", "shorter"),
    ("/" + "x" * 150 + "/" + "y" * 150 + "/" + "z" * 150 + "/w.db", ".path", "shorter"),
    (SQLite("x", sync="disk"), ".sync", "'server'"),  # type: ignore
    (SQLite("x", sync_timeout=0), ".sync_timeout", "10 ms to 1 h"),
    (SQLite("x", snapshot_every="59s"), ".snapshot_every", "1 m to 7 d"),
    (SQLite("x", snapshot_every="8d"), ".snapshot_every", "1 m to 7 d"),
    (SQLite("x", keep_snapshots=0), ".keep_snapshots", "1 to 10000"),
    (SQLite("x", keep_snapshots_for="3651d"), ".keep_snapshots_for", "3650 d"),
    (SQLite("x", log_limit=1), ".log_limit", "1 MiB to 1 TiB"),
    (SQLite("x", log_limit="2 TiB"), ".log_limit", "1 MiB to 1 TiB"),
    (SQLite("x", log_limit="64"), ".log_limit", "64 MiB"),
    (SQLite("x", log_limit="64 iB"), ".log_limit", "64 MiB"),
    (SQLite("x", log_limit="64M"), ".log_limit", "64 MiB"),
    (SQLite("x", log_limit=1e9), ".log_limit", "64 MiB"),  # type: ignore
    (SQLite("x", spool_limit=True), ".spool_limit", "64 MiB"),
    (SQLite("x", max_lag="2d"), ".max_lag", "100 ms to 1 d"),
    (SQLite("/srv/w.db", copy_to="/srv"), ".copy_to", "another folder"),
    (SQLite("/srv/w.db", copy_to="/srv/x/.."), ".copy_to", "another folder"),
    (SQLite("/srv/w.db", copy_to="/srv/w.db"), ".copy_to", "another folder"),
    (SQLite("/srv/w.db", copy_to="/srv/.w.db-phalanx/copy"), ".copy_to", "another folder"),
]


@pytest.mark.parametrize(("value", "field", "hint"), WRONG)
def test_wrong_database(value: Any, field: str, hint: str) -> None:
    """Each wrong value is one line that names the key and says what would be right."""
    error = error_of(value)
    assert error.key == f"apps.wiki.database{field}"
    assert hint in error.remedy


PAIRS: list[tuple[Any, Any, str]] = [
    ("wiki.db", "wiki.db", "path"),
    ("wiki.db", "x/../wiki.db", "path"),
    ("wiki.db", "link/wiki.db", "path"),
    ("wiki.db", "soft.db", "path"),
    ("wiki.db", "hard.db", "path"),
    ("wiki.db", "wiki.db-wal", "path"),
    ("wiki.db-shm", "wiki.db", "path"),
    ("wiki.db", ".wiki.db-phalanx/gen-1/replica.db", "path"),
    (".wiki.db-phalanx/x.db", "wiki.db", "path"),
    ("wiki.db", ".wiki.db-phalanx", "path"),
    (SQLite("wiki.db", copy_to="copy"), SQLite("mail.db", copy_to="copy"), "copy_to"),
    ("wiki.db", SQLite("mail.db", copy_to=".wiki.db-phalanx/copy"), "copy_to"),
]


@pytest.mark.parametrize(("first", "second", "field"), PAIRS)
def test_databases_of_two_apps_in_each_others_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Any, second: Any, field: str
) -> None:
    """A file belongs to one app, by whatever name; so does the folder beside it."""
    (tmp_path / "wiki.db").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "soft.db").symlink_to("wiki.db")
    os.link(tmp_path / "wiki.db", tmp_path / "hard.db")
    monkeypatch.chdir(tmp_path)
    platform = Platform("prod", node="n1")
    platform.app("wiki", database=first)
    with pytest.raises(ConfigError) as caught:
        platform.app("mail", database=second)
    assert caught.value.key == f"apps.mail.database.{field}"
    assert "'wiki'" in caught.value.problem
    assert list(platform.apps) == ["wiki"]


def test_databases_side_by_side_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours in one folder, names that begin alike, a database in the data directory: no problem."""
    monkeypatch.chdir(tmp_path)
    platform = Platform("prod", node="n1", data_dir=str(tmp_path))
    for name, path in (("a", "wiki.db"), ("b", "wiki.db2"), ("c", "data/wiki.db"), ("d", "wiki")):
        platform.app(name, database=SQLite(path, copy_to=f"copies/{name}"))
    assert len(platform.apps) == 4


def test_file_with_two_apps_of_one_database(tmp_path: Path) -> None:
    """phalanx config check says it of a file too, beside all other errors."""
    text = "".join(
        f'[apps.{name}]\npattern = "active-passive"\ndatabase = "{path}"\n{more}\n'
        for name, path, more in (("a", "w.db", ""), ("b", "./w.db", ""), ("c", "", "kv_history = 0"))
    )
    assert [error.key for error in file_errors(tmp_path, text)] == [
        "apps.c.database.path",
        "apps.c.kv_history",
        "apps.b.database.path",
    ]
