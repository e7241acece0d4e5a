"""Prompts: slots are checked, text is taken as it stands."""

from pathlib import Path

import pytest

from captioner import prompts
from captioner.errors import ConfigError


def test_shipped_prompts() -> None:
    assert prompts.load("caption") == "Caption in shorthand."
    assert prompts.load("question", statement="a {red} star") == "Visible: a {red} star?"


@pytest.mark.parametrize(
    ("name", "slots", "said"),
    [
        ("question", {}, r"has the slots \['statement'\], given were \[\]"),
        ("caption", {"statement": "x"}, r"has the slots \[\], given were \['statement'\]"),
        ("captoin", {}, r"unknown prompt captoin\n.*\n  fix:   did you mean caption\?"),
        ("../caption", {}, "unknown prompt"),
    ],
)
def test_wrong_use_is_named(name: str, slots: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prompts.load(name, **slots)


def test_hash_follows_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_folder", lambda: tmp_path)
    hashes = []
    for text in ("{a}", "{a}\n", "{a} b"):
        prompts._text.cache_clear()
        (tmp_path / "p.md").write_text(text)
        hashes.append(prompts.prompt_hash("p"))
    prompts._text.cache_clear()
    assert hashes[0] == hashes[1] != hashes[2]
