"""The gate on exact scores, fact lists of real images, and what comes in as a plug-in."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from captioner import laboratory
from captioner.config import GateConfig
from captioner.errors import DataError
from captioner.judges import base, facts, metrics
from captioner.judges.base import NoJudge, Said
from captioner.judges.facts import FactList, FactsJudge
from captioner.judges.gate import Decision, decide
from captioner.lab import grid
from captioner.records import CaptionRow
from captioner.sources import resolve
from tests import photographs

SCENES = [grid.sample("test", i) for i in range(40)]
ORACLE = [grid.shorthand(scene) for scene in SCENES]


def said(captions: list[str], ended: bool = True, tokens: int = 30, copies: int = 1) -> Said:
    rows = [
        CaptionRow(id="", key=f"{i}-{copy}", caption=text, finish_reason="stop" if ended else "length",
                   tokens=tokens, model="", config="")
        for copy in range(copies)
        for i, text in enumerate(captions)
    ]  # fmt: skip
    return Said("", rows)


def gate(
    before: list[str],
    after: list[str],
    config: GateConfig | None = None,
    *,
    ended: bool = True,
    copies: int = 1,
) -> Decision:
    """What the gate says of captions of the scenes, judged by their facts."""
    known = {f"{i}-{c}": facts.read(s.to_json()) for i, s in enumerate(SCENES) for c in range(copies)}
    judge = FactsJudge({key: each for key, each in known.items() if each})
    compared = judge.compare(said(before, copies=copies), said(after, ended, copies=copies))
    return decide(compared, config or GateConfig())


def false_statements(scene: grid.Scene) -> list[str]:
    return [f"{name} background" for name in grid.BACKGROUNDS if name != scene.background]


def spoiled(rng: np.random.Generator, share: float) -> list[str]:
    return [
        ", ".join([text, *(f for f in false_statements(s) if rng.random() < share)])
        for text, s in zip(ORACLE, SCENES, strict=True)
    ]


# ---------------------------------------------------------------- the gate


def test_the_gate_promotes_a_better_captioner() -> None:
    decision = gate(spoiled(np.random.default_rng(5), 0.5), ORACLE)
    assert (decision.promoted, decision.judge) == (True, "facts")
    assert len(decision.reasons) == 7


@pytest.mark.parametrize(
    ("after", "ended", "reason"),
    [
        (spoiled(np.random.default_rng(6), 0.9), True, "hallucinated"),
        ([", ".join(grid.statements(s)[:-2]) for s in SCENES], True, "recall"),
        (ORACLE, False, "ended"),
        ([""] * len(SCENES), True, "hallucinated"),  # says nothing: no hallucination, and no captioner either
        (ORACLE, True, "better in one"),  # nothing changed: no reason to replace it
        ([f"{c}, {c.split(', ')[0]}" for c in ORACLE], True, "repeated"),
    ],
)
def test_the_gate_refuses(after: list[str], ended: bool, reason: str) -> None:
    decision = gate(ORACLE, after, ended=ended)
    assert not decision.promoted
    assert any(line.startswith("REFUSED") and reason in line for line in decision.reasons)


def test_a_loss_is_ruled_out_where_the_images_are_enough() -> None:
    """The same small loss of recall: forty images cannot tell it from a large one, four hundred can."""
    before = spoiled(np.random.default_rng(7), 0.9)
    after = [", ".join(grid.statements(s)[: -1 if i % 5 == 0 else None]) for i, s in enumerate(SCENES)]
    config = GateConfig(max_whole_recall_loss=0.018)
    few = gate(before, after, config)
    assert -0.02 < few.difference["recall"].value < 0 and few.difference["recall"].low < -0.018
    assert [r.split(" ")[1] for r in few.reasons if r.startswith("REFUSED")] == ["recall"]
    assert gate(before, after, config, copies=10).promoted


def test_recall_at_equal_length_is_not_earned_by_talking() -> None:
    """Every other statement against all of them: whole captions recall more, equally long ones do not."""
    half = [", ".join(grid.statements(s)[::2]) for s in SCENES]
    change = gate(half, ORACLE).difference
    assert change["recall"].value > 0.3 and abs(change["even_recall"].value) < 0.1
    cut = base.evenly(said(["a, b, c", ""]), said(["b; a", "a"]))
    assert [[row.caption for row in side.rows] for side in cut] == [["a, b", ""], ["b, a", ""]]


def test_completeness_wins_by_f1() -> None:
    """Twice as much said with the same share of false statements: nothing is less false, and it is better."""
    both = [(grid.statements(s), false_statements(s)) for s in SCENES]
    half = [", ".join([*true[::2], false[0]]) for true, false in both]
    more = [", ".join([*true, *false[:2]]) for true, false in both]
    decision = gate(half, more, GateConfig(max_hallucinated_rise=0.05, max_recall_loss=0.1))
    assert decision.difference["f1"].low > 0 and decision.difference["hallucinated"].high > 0
    assert decision.promoted


def test_more_said_does_not_win_where_more_of_it_is_false() -> None:
    half = [", ".join(grid.statements(s)[::2]) for s in SCENES]
    more = [", ".join([*grid.statements(s), *false_statements(s)[:1]]) for s in SCENES]
    decision = gate(half, more)
    assert decision.difference["f1"].low > 0
    assert not decision.promoted
    assert any(line.startswith("REFUSED: hallucinated") for line in decision.reasons)


def test_without_a_judge_it_refuses_and_on_the_users_word_watches_repetition() -> None:
    judge = NoJudge("10 of 10 images have no known facts")
    good, loops = said(["a cat, a dog"] * 10), said(["a cat, a cat, a cat"] * 10)
    refused = decide(judge.compare(good, good), GateConfig())
    assert (refused.promoted, refused.unjudged) == (False, True)
    assert any("10 of 10 images have no known facts" in reason for reason in refused.reasons)
    assert decide(judge.compare(good, good), GateConfig(), accept_unjudged=True).promoted
    assert not decide(judge.compare(good, loops), GateConfig(), accept_unjudged=True).promoted


# ---------------------------------------------------------------- lists of facts


def known(*listed: str | list[str]) -> FactList:
    return FactList.of(list(listed))


def test_a_fact_list_by_hand() -> None:
    cup = known("White cup on a table", ["a red saucer", "red plate"], "no people")
    truth = {
        "white cup": True,
        "a cup on the table": True,
        "Red plate.": True,
        "table on cup": False,  # the order of the words tells who is on whom
        "blue cup": False,
        "people": False,  # the fact denies them
        "no people": True,
        "no cup": False,
        "cozy mood": None,  # nobody can see a mood
    }
    assert {text: cup.holds(text) for text in truth} == truth
    row = metrics.count("a", "red plate, a white cup on table, white cup, a dog, cozy mood, a dog", cup,
                        finish_reason="stop", tokens=9)  # fmt: skip
    columns = ("statements", "repeated", "unparsed", "true", "false", "facts", "recalled")
    assert [row[name] for name in columns] == [6, 1, 1, 3, 1, 3, 2]


def test_every_photograph_has_facts_that_hold_and_falsehoods_that_do_not() -> None:
    listed = facts.read_file(photographs.FILE)
    rows = photographs.read()
    assert len(listed) == len(rows) == 18
    for row in rows.values():
        one = listed[row["file_name"]]
        assert all(one.holds(text) for text in row["facts"])
        assert [text for text in (*row["false"], *photographs.NONSENSE) if one.holds(text) is not False] == []
        assert one.judge(", ".join(row["facts"])).recalled == len(row["facts"])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "a line is not JSON"),
        ('["red cup"]', "no file_name"),
        ('{"file_name": "a.png"}', "not a list of facts"),
        ('{"file_name": "a.png", "facts": []}', "not a list of facts"),
        ('{"file_name": "a.png", "facts": ["red cup", 3]}', "not a list of facts"),
        ('{"file_name": "a.png", "facts": ["..."]}', "not a list of facts"),
        ('{"file_name": "a.png", "facts": ["x"]}\n{"file_name": "a.png", "facts": ["y"]}', "named twice"),
    ],
)
def test_bad_fact_files(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text(f'{{"file_name": "good.png", "facts": ["fine"]}}\n\n{text}\n')
    with pytest.raises(DataError, match=what) as refusal:
        facts.read_file(file)
    assert "line 3" in str(refusal.value) or "line 4" in str(refusal.value)


def test_facts_of_an_image_are_of_a_laboratory_or_a_list() -> None:
    assert facts.read(None) is None
    scene = facts.read(SCENES[0].to_json())
    assert scene is not None and scene.holds(grid.statements(SCENES[0])[0]) is True
    listed = facts.read('["background", "red cup"]')
    assert listed is not None and listed.holds("cup") is True
    for wrong in ("not json", '{"objects": []}', "3"):
        with pytest.raises(DataError):
            facts.read(wrong)


# ---------------------------------------------------------------- laboratories

PLUGIN = """
class Rooms:
    splits = ("day", "night")
    directions = {"starboard": "right"}

    def write(self, split, count, folder, *, offset=0, seed=0):
        (folder / f"{split}-{count}-{offset}-{seed}.txt").write_text("drawn")

    def read(self, facts):
        return None

LABORATORY = Rooms()
"""


def test_a_plug_in_brings_a_laboratory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rooms.py").write_text(PLUGIN)
    about = tmp_path / "rooms-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: rooms\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{laboratory.GROUP}]\nrooms = rooms:LABORATORY\n")
    monkeypatch.syspath_prepend(tmp_path)
    laboratory.laboratories.cache_clear()
    try:
        assert set(laboratory.laboratories()) == {"scenes", "rooms"}
        folder = resolve("rooms:night:3:4", cache=tmp_path / "cache")
        assert [file.name for file in folder.iterdir()] == ["night-3-4-0.txt"]
        assert laboratory.plainly("a lamp on the Starboard wall") == "a lamp on the right wall"
        with pytest.raises(DataError, match="no rooms split 'noon'"):
            resolve("rooms:noon:3", cache=tmp_path / "cache")
    finally:
        laboratory.laboratories.cache_clear()
        sys.modules.pop("rooms", None)
