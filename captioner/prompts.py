"""The prompts: plain text in ``prompts/<name>.md`` with named ``{slots}``, nothing executable."""

from __future__ import annotations

import difflib
import hashlib
import re
from functools import cache
from pathlib import Path

from captioner.errors import ConfigError

_HERE = Path(__file__).resolve().parent
_SLOT = re.compile(r"\{([a-z_]+)\}")


def load(name: str, **slots: str) -> str:
    """The text of a prompt, its final line break removed and its slots filled.

    Raises ConfigError for an unknown prompt, a slot not given, and a slot that the prompt does not have.
    """
    text = _text(name)
    wanted = set(_SLOT.findall(text))
    if wanted != set(slots):
        raise ConfigError(
            f"prompt {name} has the slots {sorted(wanted)}, given were {sorted(slots)}",
            where=str(_folder() / f"{name}.md"),
        )
    return _SLOT.sub(lambda match: slots[match[1]], text)


def prompt_hash(name: str) -> str:
    """sha256 of the prompt's text with its slots open."""
    return hashlib.sha256(_text(name).encode()).hexdigest()


def _folder() -> Path:
    """`prompts/` of the checkout, or its copy in an installed package."""
    packaged = _HERE / "_prompts"
    return packaged if packaged.is_dir() else _HERE.parent / "prompts"


@cache
def _text(name: str) -> str:
    known = {path.stem: path for path in _folder().glob("*.md")}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"known prompts: {', '.join(sorted(known))}"
        raise ConfigError(f"unknown prompt {name}", where=str(_folder()), fix=fix)
    return known[name].read_text(encoding="utf-8").rstrip("\n")
