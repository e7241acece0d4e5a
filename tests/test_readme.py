"""README.md's commands can be given as they are printed, from a clone's root after `make install`."""

from __future__ import annotations

import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from captioner.config import load
from loops import cli

REPO = Path(__file__).resolve().parent.parent
TEXT = (REPO / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"(^|/|-- )captioner [a-z]")
ACTIVATED = TEXT.index(". .venv/bin/activate")


def commands() -> list[tuple[int, str]]:
    """(place, command) of every command in an indented block or between backticks."""
    blocks = re.compile(r"^```[^`]*^```$|^ {4}[^\n]*$", re.M)
    found = [(block.start(), block[0].strip()) for block in blocks.finditer(TEXT)]
    prose = blocks.sub(lambda block: " " * len(block[0]), TEXT)
    found += [(span.start(), span[1]) for span in re.finditer("`([^`]+)`", prose)]
    return [(place, " ".join(text.split())) for place, text in found if COMMAND.search(text)]


@pytest.mark.parametrize(("place", "command"), commands())
def test_a_command_is_understood_and_writes_into_no_folder_of_the_repository(
    place: int, command: str
) -> None:
    before, _, rest = command.partition("captioner ")
    assert before == ".venv/bin/" or place > ACTIVATED, "it is not on the path yet"
    words = shlex.split(rest, comments=True)
    name = " ".join(words[:2]) if " ".join(words[:2]) in cli.COMMANDS else words[0]
    own, toml, overrides = cli._split_fields(words[len(name.split()) :])
    assert toml is None or f"cat > {toml} <<" in TEXT[:place]
    load(None, overrides)
    cli._parse(name, cli.load(cli.COMMANDS[name]), own)
    held = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    tops = {line.partition("/")[0] for line in held.splitlines()}
    for flag, value in pairwise(words):
        if flag in ("--out", "--run"):
            assert Path(value).parts[0] not in tops, f"{flag} {value} is a folder of the repository"


def test_the_settings_file_is_one(tmp_path: Path) -> None:
    [block] = re.findall(r"cat > mine.toml <<'END'\n(.*?)^ *END$", TEXT, re.M | re.S)
    (tmp_path / "mine.toml").write_text("\n".join(line[4:] for line in block.splitlines()))
    assert load(tmp_path / "mine.toml").sft.validation == "captioned-held-out/"


def test_there_are_as_many_commands_as_are_seen() -> None:
    assert len(commands()) > 20
