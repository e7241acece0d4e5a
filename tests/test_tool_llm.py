"""The tool LLM and what it must survive; a stand-in plays the model, which is the point of these tests."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from captioner.config import ToolConfig
from captioner.engines import NoAnswer
from captioner.errors import DataError
from captioner.method.llm import LLM, UNGROUNDED, grounded, make_tool
from captioner.method.reformulate import reformulate
from captioner.method.tool import Question, Rules, Statement, ToolFailed
from captioner.records import Failed
from captioner.runs import Shards
from captioner.sources.folder import read_folder
from captioner.statements import split_statements
from tests.http_stand_in import HANG, Reply, StandIn, chat, prompt_of

CAPTIONS = ["red cup on a table, blue bowl", "blue bowl, two spoons", "red cup on a table, beautiful mood"]


def data(body: dict[str, Any]) -> Any:
    """The captions or statements in a prompt."""
    return json.loads(prompt_of(body).rpartition(": ")[2])


def honest(body: dict[str, Any]) -> Reply:
    """A model that does what the prompts ask for, by rules."""
    given, kind = data(body), body["response_format"]["json_schema"]["name"]
    if kind == "Merged":
        merged = Rules().merge(given)
        made: Any = {"statements": [{"text": s.text, "captions": list(s.candidates)} for s in merged]}
    elif kind == "Decomposed":
        made = {
            "questions": [
                {
                    "statement": i,
                    "question": f"Is there {text}?",
                    "expected": "yes",
                    "checkable": "mood" not in text,
                }
                for i, text in enumerate(given)
            ]
        }
    else:
        made = {"caption": ", ".join(split_statements(given))}
    return json.dumps(made)


def llm(server: StandIn, folder: Path, **settings: Any) -> LLM:
    config = ToolConfig(
        **{"type": "server", "urls": (server.url,), "timeout": 5.0, "wait": 10.0, "retries": 2, **settings}
    )
    tool = make_tool(config, folder)
    assert isinstance(tool, LLM)
    return tool


def test_merge_and_decompose(tmp_path: Path) -> None:
    with StandIn(honest) as server:
        tool = llm(server, tmp_path)
        merged = tool.merge(CAPTIONS)
        assert Statement("blue bowl", (0, 1)) in merged and Statement("red cup on a table", (0, 2)) in merged
        assert tool.decompose("two spoons") == Question("Is there two spoons?", "yes")
        assert tool.checkable("two spoons") and not tool.checkable("dark mood")
        assert tool.kind("red cup") == "color"
        assert list(tool.reformulate(["A cup. A bowl."])) == ["A cup, A bowl"]
        assert tool.merge(["", " ,"]) == []
        tool.close()


def test_its_own_wording_can_be_checked_where_the_language_of_the_captions_is_known(tmp_path: Path) -> None:
    with StandIn(honest) as server:
        known = llm(server, tmp_path)
        tool = make_tool(known.config, tmp_path, kind_of=lambda text: "")
        tool.merge(CAPTIONS)
        assert tool.checkable("two spoons") and not tool.checkable("dark mood")
        assert not Rules(lambda text: "").checkable("two spoons")
        tool.close()
        known.close()


def test_prepared_images_are_asked_about_together_and_only_once(tmp_path: Path) -> None:
    images = [[f"red cup {i}, blue bowl", f"blue bowl, cup {i}"] for i in range(6)]
    with StandIn(honest) as server:
        tool = llm(server, tmp_path, statements=5, in_flight=4)
        tool.prepare(images)
        asked = len(server.requests)
        # six merges; 13 distinct statements (the bowl is one for all) by five make three
        assert asked == 6 + 3 and server.most <= 4
        for captions in images:
            assert [tool.decompose(each.text).expected for each in tool.merge(captions)] == ["yes"] * 3
        assert len(server.requests) == asked
        tool.close()


def test_a_repeated_run_pays_nothing(tmp_path: Path) -> None:
    with StandIn(honest) as server:
        tool = llm(server, tmp_path)
        tool.prepare([CAPTIONS])
        first = [(each, tool.decompose(each.text)) for each in tool.merge(CAPTIONS)]
        tool.close()
        count = len(server.requests)
        again = llm(server, tmp_path)
        again.prepare([CAPTIONS])
        assert [(each, again.decompose(each.text)) for each in again.merge(CAPTIONS)] == first
        assert len(server.requests) == count
        again.merge(CAPTIONS[:2])  # other content
        assert len(server.requests) == count + 1
        again.close()
    with StandIn(honest, model="another") as server:
        tool = llm(server, tmp_path)
        tool.merge(CAPTIONS)  # another model
        assert len(server.requests) == 1
        tool.close()


def test_another_prompt_is_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StandIn(honest) as server:
        for digest in ("a", "a", "b"):
            monkeypatch.setattr("captioner.prompts.prompt_hash", lambda name, digest=digest: digest)
            tool = llm(server, tmp_path)
            tool.merge(CAPTIONS)
            tool.close()
        assert len(server.requests) == 2


def test_half_a_line_of_a_killed_run_is_asked_again(tmp_path: Path) -> None:
    with StandIn(honest) as server:
        for damage in (None, 20, 1):
            if damage:
                kept = (tmp_path / "merge.jsonl").read_bytes()
                (tmp_path / "merge.jsonl").write_bytes(kept[:-damage])
            tool = llm(server, tmp_path)
            assert tool.merge(CAPTIONS) and tool.merge(CAPTIONS[::-1])
            tool.close()
        assert len(server.requests) == 4


WRONG_MERGES: list[tuple[Any, str]] = [
    ({"statements": []}, "invalid"),
    ({"statements": [{"text": "red cup", "captions": [7]}]}, "not there"),
    ({"statements": [{"text": "red cup", "captions": []}]}, "invalid"),
    ({"statements": [{"text": "purple elephant dancing", "captions": [0]}]}, "in no caption"),
    ({"statements": [{"text": "blue bowl", "captions": [0]}] * 9}, "looping"),
    ({"statements": [{"text": "x" * 301, "captions": [0]}]}, "invalid"),
    ({"statements": [{"text": "red cup", "captions": ["0"]}]}, "invalid"),
    ({"statements": [{"text": "red cup", "captions": [0], "run": "rm"}]}, "invalid"),
    ([1, 2], "invalid"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("made", "reason"), WRONG_MERGES)
def test_a_wrong_merge_is_refused(made: Any, reason: str, tmp_path: Path) -> None:
    with StandIn(lambda body: json.dumps(made)) as server:
        tool = llm(server, tmp_path, retries=1)
        for _ in range(2):  # the second time it is known to fail, and not asked again
            with pytest.raises(ToolFailed, match=reason):
                tool.merge(CAPTIONS)
        assert len(server.requests) == 2 and not (tmp_path / "merge.jsonl").exists()
        tool.close()


def test_what_a_merge_invents_is_left_out_and_what_it_doubles_joined(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"text": text, "captions": [0]} for text in ("red cup", "a table", "blue  bowl", "cup")
    ]
    rows += [{"text": "green dragon", "captions": [0]}, {"text": "Blue bowl", "captions": [1]}]
    with StandIn(lambda body: json.dumps({"statements": rows})) as server:
        tool = llm(server, tmp_path)
        assert tool.merge(CAPTIONS) == [
            Statement("red cup", (0,)),
            Statement("a table", (0,)),
            Statement("blue bowl", (0, 1)),
            Statement("cup", (0,)),
        ]
        tool.close()


def test_a_statement_that_breaks_its_request_takes_few_with_it(tmp_path: Path) -> None:
    with StandIn(lambda body: (400, b"no") if "poison" in prompt_of(body) else honest(body)) as server:
        tool = llm(server, tmp_path, statements=16)
        answers = tool._decomposed([f"cup {i}" for i in range(20)] + ["poison"])
        assert [isinstance(each, NoAnswer) for each in answers] == [False] * 20 + [True]
        tool._decomposed(["poison"])  # known to fail
        assert len(server.requests) == 2 + 3
        tool.close()


@pytest.mark.parametrize("numbers", [[], [0, 0], [0, 1, 2], [1, 2]])
def test_each_statement_has_its_question(numbers: list[int], tmp_path: Path) -> None:
    rows = [{"statement": i, "question": f"{i}?", "expected": "no", "checkable": True} for i in numbers]
    with StandIn(lambda body: json.dumps({"questions": rows})) as server:
        tool = llm(server, tmp_path, retries=0)
        tool._decomposed(["red cup", "blue bowl"])
        with pytest.raises(ToolFailed):
            tool.decompose("red cup")
        tool.close()


def test_a_wrong_answer_is_asked_for_again_in_another_way(tmp_path: Path) -> None:
    replies: list[Reply] = ["no JSON", '{"statements": []}']
    with StandIn(lambda body: replies.pop(0) if replies else honest(body)) as server:
        tool = llm(server, tmp_path)
        assert tool.merge(CAPTIONS)
        assert [body["temperature"] for body in server.requests] == [0.0, 0.7, 0.7]
        tool.close()


@pytest.mark.slow
def test_what_a_sick_server_cost_changes_nothing_that_is_asked(tmp_path: Path) -> None:
    """Neither the temperature nor how many answers may be wrong: a crash must not show in the rows."""
    replies: list[Reply] = [(500, b""), (503, b""), "no JSON", (500, b""), "no JSON"]

    def answer(body: dict[str, Any]) -> Reply:
        if prompt_of(body) == "yes":  # a probe
            return "yes"
        return replies.pop(0) if replies else honest(body)

    with StandIn(answer) as server:
        tool = llm(server, tmp_path, retries=3)
        assert tool.merge(CAPTIONS)
        asked = [body for body in server.requests if prompt_of(body) != "yes"]
        assert [body["temperature"] for body in asked] == [0.0, 0.0, 0.0, 0.7, 0.7, 0.7]
        assert [body["seed"] for body in asked] == [0, 0, 0, 1, 1, 2]
        tool.close()


def mutant(seed: int) -> Iterator[Reply]:
    """Every way to be wrong, in any order, now and then the right one."""
    draw = random.Random(seed)
    while True:
        yield draw.choice(
            [
                (200, draw.randbytes(200)),
                (200, chat(draw.randbytes(100).decode("latin-1"))),
                '{"statements": [{"text": "green dragons", "captions": [0]}]}',
                '{"questions": [{"statement": 0, "question": "?", "expected": "perhaps", "checkable": 1}]}',
                json.dumps({"statements": [{"text": "y" * 1_000_000, "captions": [0]}]}),
                '{"statements": []}',
                '{"questions": []}',
                "null",
                "",
                (200, chat('{"statements": [', "length")),
                (500, b"oh"),
                (503, b""),
                (429, b"slow down"),
                (400, b"no"),
                (200, b"{}"),
                HANG,
                "honest",
            ]
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_mutant_loses_no_image(seed: int, tmp_path: Path) -> None:
    """Each image ends with statements and questions that hold up, or with a reason."""
    replies = mutant(seed)

    def answer(body: dict[str, Any]) -> Reply:
        if prompt_of(body) == "yes":  # a probe: it is sick, not dead
            return "yes"
        reply = next(replies)
        return honest(body) if reply == "honest" else reply

    images = {f"k{i}": [f"red cup {i}, blue bowl", "blue bowl, spoons"] for i in range(12)}
    with StandIn(answer) as server:
        tool = llm(server, tmp_path, timeout=0.3, retries=2, in_flight=1, statements=8)
        tool.prepare(list(images.values()))
        good, failed = 0, []
        for key, captions in images.items():
            try:
                statements = [each for each in tool.merge(captions) if tool.checkable(each.text)]
                assert all(tool.decompose(each.text).text for each in statements)
                good += 1
            except ToolFailed as error:
                failed.append(Failed(sample="", key=key, reason=str(error)))
        assert good + len(failed) == 12 and failed and all(row.reason for row in failed)
        assert len(server.requests) <= 3 * (12 + 3 + 24) * 2  # bounded tries, probes included
        tool.close()


def test_rules_reformulate() -> None:
    captions = [
        "The image shows a red cup. There is a blue bowl, a beautiful mood.",
        "amazing!",
        "a cup, a cup",
    ]
    made = list(Rules().reformulate(captions))
    assert made[0] == "red cup, blue bowl" and made[2] == "cup"
    assert isinstance(made[1], NoAnswer)


def test_a_folder_is_reformulated(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    for name, caption in (("a", "The image shows a red cup."), ("deep/b", "lovely"), ("c", None)):
        Image.new("RGB", (8, 8)).save(source / f"{name}.png")
        if caption:
            (source / f"{name}.txt").write_text(caption)
    count, failed = reformulate(source, tmp_path / "out", Rules())
    [row] = read_folder(tmp_path / "out")
    assert (row.key, row.caption, row.prose) == ("a", "red cup", "The image shows a red cup.")
    assert count == 1 and sorted(each.key for each in failed) == ["c", "deep/b"]
    assert Shards(tmp_path / "out" / "failed", Failed).read_all() == failed
    with pytest.raises(DataError, match="exists already"):
        reformulate(source, tmp_path / "out", Rules())


def test_a_model_reformulates_and_may_not_invent(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        if "cup" in str(data(body)):
            return honest(body)
        return json.dumps({"caption": "seven green dragons"})

    with StandIn(answer) as server:
        tool = llm(server, tmp_path, retries=0)
        made = list(tool.reformulate(["a red cup. a bowl", "a tree", "a red cup. a bowl"]))
        assert made[0] == made[2] == "a red cup, a bowl" and isinstance(made[1], NoAnswer)
        assert len(server.requests) == 2  # equal captions are one request
        tool.close()


@pytest.mark.parametrize(
    ("statement", "question", "fits"),
    [
        ("a red circle", "Is this an image?", False),
        ("a red circle", "Is there a red circle?", True),
        ("a red circle", "Is the circle red in this picture?", True),
        ("a red circle", "Is there a blue square?", False),
        ("woman smiling at two dogs", "Does the woman smile at dogs?", True),
        ("no people", "Are there any people?", True),
        ("", "Is anything visible?", True),
    ],
)
def test_a_question_is_about_its_statement(statement: str, question: str, fits: bool) -> None:
    assert grounded(question, statement) is fits


def test_a_trivial_question_is_no_answer(tmp_path: Path) -> None:
    """A model that asks "Is this an image?" about every second statement: only those fail."""

    def lazy(body: dict[str, Any]) -> Reply:
        reply = json.loads(str(honest(body)))
        for each in reply.get("questions", []):
            if "bowl" in data(body)[each["statement"]]:
                each["question"] = "Is this an image?"
        return json.dumps(reply)

    with StandIn(lazy) as server:
        tool = llm(server, tmp_path)
        tool.prepare([CAPTIONS])
        assert tool.decompose("two spoons").text == "Is there two spoons?"
        with pytest.raises(ToolFailed, match=UNGROUNDED):
            tool.decompose("blue bowl")
        tool.close()
