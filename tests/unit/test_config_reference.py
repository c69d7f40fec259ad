"""docs/configuration.md: up to date, complete, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path

from phalanx import config
from phalanx.config import load_toml
from phalanx.config.reader import fields_of
from phalanx.config.reference import main, reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_page_is_up_to_date() -> None:
    """Whoever changes a declaration writes the page anew."""
    written = PAGE.read_text(encoding="utf-8")
    assert written == reference(), "run: python -m phalanx.config.reference docs/configuration.md"


def test_page_names_every_field_of_every_declaration() -> None:
    """No declaration is left out."""
    text = reference()
    for name in config.__all__:
        kind = getattr(config, name)
        if hasattr(kind, "__struct_fields__"):
            for field, about in fields_of(kind).items():
                assert f"| `{field}` |" in text
                assert about.about.meaning.replace("|", "\\|") in text


def test_every_field_says_what_it_means_and_takes() -> None:
    """A meaning is a sentence; the words for a value are there."""
    for name in config.__all__:
        kind = getattr(config, name)
        if hasattr(kind, "__struct_fields__"):
            for field in fields_of(kind).values():
                assert field.about.meaning.endswith((".", "`."))
                assert field.about.rule.shape


def test_examples_of_the_page_run_and_mean_the_same(tmp_path: Path) -> None:
    """The Python example and the TOML example declare the same platform and app."""
    [python] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    [toml] = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(python, "docs/configuration.md", "exec"), names)
    file = tmp_path / "phalanx.toml"
    file.write_text(toml)
    platform, apps = load_toml(file)
    assert platform == names["platform"]
    assert apps == [names["wiki"]]


def test_page_is_written_to_the_file_named(tmp_path: Path, capsys: object) -> None:
    """`python -m phalanx.config.reference FILE` writes that file."""
    main([str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == reference()
