"""The tool LLM on a server. Its answers are untrusted.

What does not hold up against the question is asked again a bounded number of times and then fails; good
answers are kept on disk, and none is paid for twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from captioner import prompts
from captioner.config import ToolConfig
from captioner.engines import NoAnswer, TextRequest
from captioner.method.tool import Question, Rules, Statement, Tool, ToolFailed
from captioner.progress import progress
from captioner.statements import comparable_statements, normalise, repeats, visible


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Text = Annotated[str, Field(min_length=1, max_length=300)]


class MergedStatement(_Answer):
    text: Text
    captions: list[int] = Field(min_length=1)


class Merged(_Answer):
    statements: list[MergedStatement] = Field(min_length=1, max_length=200)


class Asked(_Answer):
    statement: int
    question: Text
    expected: Literal["yes", "no"]
    checkable: bool


class Decomposed(_Answer):
    questions: list[Asked] = Field(min_length=1)


class Reformulated(_Answer):
    caption: str = Field(min_length=1, max_length=4000)


UNGROUNDED = "its question is about something else"
# Words that put a question and say nothing about the image.
FRAME = """
is are was were be been there here this that these those it its in on at of to with by for from and or no not
any some do does did can could you see seen visible show shown image picture photo photograph scene have has
had what which who where
"""
T = TypeVar("T")
AnswerT = TypeVar("AnswerT", bound=_Answer)
# what is kept of each prompt's answers: of questions one by one
KEPT: dict[str, type[_Answer]] = {"merge": Merged, "decompose": Asked, "reformulate": Reformulated}


class LLM(Rules):
    """An instruction-tuned model on a server; word lists still tell kinds, and what is never checkable.

    ``folder`` keeps the answers of earlier runs. Raises EngineError where no server answers.
    """

    def __init__(
        self,
        config: ToolConfig,
        folder: Path,
        kind_of: Callable[[str], str] | None = None,
        slot_of: Callable[[str], str] | None = None,
    ):
        from captioner.engines.text import TextEngine

        super().__init__(kind_of, slot_of)
        self.config = config
        self._engine = TextEngine(config)
        self._folder = folder
        self._kept: dict[str, dict[str, str]] = {}  # of each prompt: the answers on disk, by key
        self._failed: dict[str, str] = {}  # why, by key; forgotten with the run, so that the next tries again

    @property
    def tokens(self) -> int:
        """Tokens that the model wrote."""
        return self._engine.tokens

    def close(self) -> None:
        """End what is under way."""
        self._engine.close()

    def prepare(self, images: Sequence[Sequence[str]]) -> None:
        """Merge the captions of each image and ask about all their statements, many at a time."""
        images = [captions for captions in images if any(map(_words, captions))]
        merged = self._answers("merge", Merged, [self._merging(captions) for captions in images])
        self._decomposed(
            [
                each.text
                for captions, answer in zip(images, merged, strict=True)
                if isinstance(answer, Merged)
                for each in _statements(answer, captions)
            ]
        )

    def merge(self, captions: Sequence[str]) -> list[Statement]:
        """The distinct statements of the captions, in natural order."""
        if not any(map(_words, captions)):
            return []
        [merged] = self._answers("merge", Merged, [self._merging(captions)])
        if isinstance(merged, NoAnswer):
            raise ToolFailed(merged.reason)
        return _statements(merged, captions)

    def decompose(self, statement: str) -> Question:
        """One yes/no question about it."""
        asked = self._asked(statement)
        return Question(asked.question, asked.expected)

    def checkable(self, statement: str) -> bool:
        """Whether looking can confirm it, in the model's judgement and by the word lists."""
        return visible(statement) and self._asked(statement).checkable

    def reformulate(self, captions: Iterable[str]) -> Iterator[str | NoAnswer]:
        """Shorthand for each caption, in order."""
        requests = [
            _Request(caption, {"caption": json.dumps(caption, ensure_ascii=False)}, _shorthand(caption))
            for caption in captions
        ]
        for answer in self._answers("reformulate", Reformulated, requests):
            yield answer if isinstance(answer, NoAnswer) else " ".join(answer.caption.split())

    def _merging(self, captions: Sequence[str]) -> _Request:
        listed = json.dumps(list(captions), ensure_ascii=False)
        return _Request(listed, {"captions": listed, "count": str(len(captions))}, _grounded(captions))

    def _asked(self, statement: str) -> Asked:
        [asked] = self._decomposed([statement])
        if isinstance(asked, NoAnswer):
            raise ToolFailed(asked.reason)
        return asked

    def _decomposed(self, statements: Sequence[str]) -> list[Asked | NoAnswer]:
        """What is asked about each statement, kept one by one.

        Several share a request; those of one that failed are asked about once more in smaller ones, so that a
        statement takes few others with it.
        """
        kept = self._load("decompose")
        keys = [self._key("decompose", Decomposed, statement) for statement in statements]
        todo = self._unanswered(kept, keys, statements)
        for size in (self.config.statements, max(1, self.config.statements // 8)):
            failed: dict[str, str] = {}
            left = list(todo.items())
            chunks = [left[start : start + size] for start in range(0, len(left), size)]
            requests = []
            for chunk in chunks:
                listed = json.dumps([text for _, text in chunk], ensure_ascii=False)
                requests.append(_Request(listed, {"statements": listed}, _one_each(len(chunk))))
            for chunk, answer in zip(chunks, self._ask("decompose", Decomposed, requests), strict=True):
                if isinstance(answer, NoAnswer):
                    failed |= {key: answer.reason for key, _ in chunk}
                    continue
                asked = [(*chunk[each.statement], each) for each in answer.questions]
                good = {key: each for key, text, each in asked if grounded(each.question, text)}
                failed |= {key: UNGROUNDED for key, *_ in asked if key not in good}
                self._keep("decompose", good)
            todo = {key: text for key, text in todo.items() if key in failed}
        self._failed |= failed
        return self._told(kept, keys, Asked)

    def _answers(
        self, name: str, schema: type[AnswerT], requests: Sequence[_Request]
    ) -> list[AnswerT | NoAnswer]:
        """The answer to each request: kept, already failed, or asked for now."""
        kept = self._load(name)
        keys = [self._key(name, schema, request.content) for request in requests]
        todo = self._unanswered(kept, keys, requests)
        for key, answer in zip(todo, self._ask(name, schema, list(todo.values())), strict=True):
            if isinstance(answer, NoAnswer):
                self._failed[key] = answer.reason
            else:
                self._keep(name, {key: answer})
        return self._told(kept, keys, schema)

    def _unanswered(self, kept: Mapping[str, str], keys: Sequence[str], asked: Sequence[T]) -> dict[str, T]:
        """What is neither kept nor failed, once each."""
        pairs = zip(keys, asked, strict=True)
        return {key: each for key, each in pairs if key not in kept and key not in self._failed}

    def _told(
        self, kept: Mapping[str, str], keys: Sequence[str], schema: type[AnswerT]
    ) -> list[AnswerT | NoAnswer]:
        return [
            NoAnswer(self._failed[key]) if key in self._failed else schema.model_validate_json(kept[key])
            for key in keys
        ]

    def _ask(
        self, name: str, schema: type[AnswerT], requests: Sequence[_Request]
    ) -> Iterator[AnswerT | NoAnswer]:
        asked = (
            TextRequest(prompts.load(name, **each.slots), self.config.max_tokens, each.check)
            for each in requests
        )
        with progress(f"tool: {name}", len(requests)) as bar:
            before = self.tokens
            for answer in self._engine.complete(asked, schema):
                bar.advance(1, tokens=self.tokens - before)
                yield answer

    # ---- the answers on disk: one line of JSON each

    def _key(self, name: str, schema: type[BaseModel], content: str) -> str:
        parts = [name, content, prompts.prompt_hash(name), schema.model_json_schema(), self._engine.model]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _load(self, name: str) -> dict[str, str]:
        if name not in self._kept:
            self._kept[name] = {}
            path = self._folder / f"{name}.jsonl"
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
            for line in lines:
                try:
                    row = json.loads(line)
                    KEPT[name].model_validate_json(row["answer"])
                    self._kept[name][row["key"]] = row["answer"]
                except (ValueError, LookupError, TypeError, ValidationError):
                    continue  # half a line, where a run was killed: asked again
        return self._kept[name]

    def _keep(self, name: str, answers: dict[str, Any]) -> None:
        kept = self._load(name)
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            for key, answer in answers.items():
                kept[key] = answer.model_dump_json()
                file.write("\n" + json.dumps({"key": key, "answer": kept[key]}))  # behind half a line, too
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class _Request:
    content: str  # what the answer depends on, beside the prompt
    slots: dict[str, str]
    check: Callable[[Any], str | None]


def make_tool(
    config: ToolConfig,
    folder: Path,
    kind_of: Callable[[str], str] | None = None,
    slot_of: Callable[[str], str] | None = None,
) -> Tool:
    """The tool that ``config.type`` names; ``folder`` keeps an LLM's answers."""
    return Rules(kind_of, slot_of) if config.type == "rules" else LLM(config, folder, kind_of, slot_of)


# ---- what an answer must hold up against


def _statements(merged: Merged, captions: Sequence[str]) -> list[Statement]:
    """The statements, near-duplicates joined; what shares no word with its captions is left out."""
    words = [_words(caption) for caption in captions]
    texts: dict[str, str] = {}
    stated: dict[str, set[int]] = {}
    for each in merged.statements:
        text = " ".join(each.text.split())
        if _words(text) & set().union(*(words[index] for index in each.captions)):
            texts.setdefault(normalise(text), text)
            stated.setdefault(normalise(text), set()).update(each.captions)
    return [Statement(text, tuple(sorted(stated[key]))) for key, text in texts.items()]


def _grounded(captions: Sequence[str]) -> Callable[[Merged], str | None]:
    """Statements name captions that exist and share a word with them; few are said twice."""
    words = [_words(caption) for caption in captions]

    def check(merged: Merged) -> str | None:
        stated = merged.statements
        if any(not 0 <= index < len(captions) for each in stated for index in each.captions):
            return "a statement of a caption that is not there"
        invented = sum(
            not _words(each.text) & set().union(*(words[i] for i in each.captions)) for each in stated
        )
        if 5 * invented > len(stated):
            return f"{invented} of {len(stated)} statements are in no caption"
        return "looping answer" if _loops([normalise(each.text) for each in stated]) else None

    return check


def _one_each(count: int) -> Callable[[Decomposed], str | None]:
    """Every statement has one question."""

    def check(made: Decomposed) -> str | None:
        numbers = sorted(each.statement for each in made.questions)
        if numbers != list(range(count)):
            return f"not one question for each of {count} statements"
        return "looping answer" if _loops([each.question for each in made.questions]) else None

    return check


def _shorthand(caption: str) -> Callable[[Reformulated], str | None]:
    """Shorthand is no longer than its caption, made of its words, and has no loop."""
    words = _words(caption)

    def check(made: Reformulated) -> str | None:
        if len(made.caption) > 1.5 * len(caption) + 20:
            return "over-long answer"
        said = _words(made.caption)
        if 2 * len(said & words) < len(said):
            return "most words are not in the caption"
        return "looping answer" if _loops(comparable_statements(made.caption)) else None

    return check


def _loops(texts: Sequence[str]) -> bool:
    """More than a quarter of them are repeats."""
    return len(texts) > 3 and 4 * repeats(texts) > len(texts)


def grounded(question: str, statement: str) -> bool:
    """Whether a question asks about its statement: it has at least half of its content words.

    Words count as the same where their first four letters are: "smiles" and "smiling".
    """
    asked = {word[:4] for word in _content(question)}
    wanted = [word[:4] for word in _content(statement)]
    return 2 * sum(word in asked for word in wanted) >= len(wanted)


def _content(text: str) -> set[str]:
    return _words(text) - _words(FRAME)


def _words(text: str) -> set[str]:
    """The words of a text, in a form in which plural and singular mostly agree."""
    return {word.rstrip("s") or word for word in re.findall(r"\w+", normalise(text))}
