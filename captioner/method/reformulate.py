"""An image folder with prose captions -> the same images with shorthand; how faithful shorthand is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from captioner.engines import NoAnswer
from captioner.errors import DataError
from captioner.files import atomic_dir
from captioner.method.tool import Tool
from captioner.records import Failed
from captioner.runs import Shards
from captioner.sources.captions import read_text
from captioner.sources.folder import json_line, link_image, read_folder
from captioner.statements import split_statements, visible


def reformulate(source: Path, out: Path, tool: Tool) -> tuple[int, list[Failed]]:
    """Write ``out`` (images, metadata.jsonl with ``text`` = shorthand and ``prose`` = the caption before).

    Returns the count of images written and those left out, which also stand in ``out``/failed with their
    reasons. ``out`` is there whole or not at all. Raises DataError where ``out`` exists or no image has a
    caption.
    """
    if out.exists():
        raise DataError("the output exists already", where=str(out), fix="name a new --out, or remove it")
    rows = read_folder(source)
    told = [row for row in rows if row.caption]
    if not told:
        raise DataError("no image has a caption", where=str(source), fix="see data/README.md for the forms")
    failed = [Failed(sample="", key=row.key, reason="no caption") for row in rows if not row.caption]
    count = 0
    with atomic_dir(out) as folder:
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
            made = tool.reformulate([row.caption or "" for row in told])
            for row, text in zip(told, made, strict=True):
                if isinstance(text, NoAnswer):
                    failed.append(Failed(sample="", key=row.key, reason=text.reason))
                    continue
                name = link_image(row, source, folder)
                file.write(json_line({"file_name": name, "text": text, "prose": row.caption}))
                count += 1
        Shards(folder / "failed", Failed).write(0, failed)
    return count, failed


# ---------------------------------------------------------------- fidelity


class Checked(BaseModel):
    """A prose caption and what a person says it states: a fact is some of its words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prose: str
    facts: list[str]
    held_out: bool = False  # was looked at only after the rules were written


@dataclass(frozen=True)
class Fidelity:
    """What a reformulation keeps of captions, over all of them."""

    captions: int
    failed: int  # without an answer
    facts: int
    kept: int  # facts whose words stand in one statement
    lost: tuple[str, ...]
    words: int  # of the shorthand
    added: int  # words of the shorthand that are not in its caption in any form
    statements: int
    terse: int  # statements without an article in front, a finite "is", or a word that cannot be checked
    prose_words: int


def read_checked(path: Path) -> list[Checked]:
    """The captions of a JSON Lines file. Raises DataError for one that is none."""
    try:
        return [Checked.model_validate_json(line) for line in read_text(path).split("\n") if line.strip()]
    except ValidationError as error:
        fix = 'a line is {"prose": ..., "facts": ["red cup", ...]}'
        raise DataError("not captions with their facts", where=str(path), fix=fix) from error


def fidelity(checked: Sequence[Checked], tool: Tool) -> Fidelity:
    """How a tool reformulates captions whose facts are known."""
    lost: list[str] = []
    failed = words = added = statements = terse = 0
    made = tool.reformulate([each.prose for each in checked])
    for each, text in zip(checked, made, strict=True):
        failed += isinstance(text, NoAnswer)
        said = [] if isinstance(text, NoAnswer) else split_statements(text)
        stems = [_stems(statement) for statement in said]
        lost += [fact for fact in each.facts if not any(set(_stems(fact)) <= set(own) for own in stems)]
        known = set(_stems(each.prose)) | {"with"}  # "has" becomes "with"
        words += sum(map(len, stems))
        added += sum(stem not in known for own in stems for stem in own)
        statements += len(said)
        terse += sum(_terse(statement) for statement in said)
    facts = sum(len(each.facts) for each in checked)
    prose = sum(len(each.prose.split()) for each in checked)
    kept = facts - len(lost)
    return Fidelity(len(checked), failed, facts, kept, tuple(lost), words, added, statements, terse, prose)


def fidelity_table(checked: Sequence[Checked], tool: Tool) -> str:
    """Markdown: of all captions, and of those that were held out."""
    groups = {"all": checked, "held out": [each for each in checked if each.held_out]}
    lines = [
        "| captions | facts kept | words added | terse statements | words, of the prose's |",
        "|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        found = fidelity(group, tool)
        kept, words = f"{found.kept} of {found.facts}", f"{found.words} of {found.prose_words}"
        terse = f"{found.terse} of {found.statements}"
        lines.append(f"| {found.captions} {name} | {kept} | {found.added} | {terse} | {words} |")
    return "\n".join(lines)


def _stems(text: str) -> list[str]:
    """Its words, in a form in which "sits" is "sitting"."""
    return [_stem(word) for word in re.findall(r"[\w'-]+", text.casefold())]


def _stem(word: str) -> str:
    word = word.strip("'-")
    if word in ("lie", "lies", "lying"):
        return "lie"
    end = next((end for end in ("ies", "ing", "ed", "es", "s", "e") if word.endswith(end)), "")
    stem = word.removesuffix(end) if len(word) - len(end) > 2 else word
    stem = stem.removesuffix("y") if len(stem) > 3 else stem
    return stem[:-1] if len(stem) > 3 and stem[-1] == stem[-2] else stem


def _terse(statement: str) -> bool:
    return visible(statement) and not re.match(
        r"(?:an?|the|there)\b|.*\b(?:is|are|was|were)\b", statement, re.I
    )
