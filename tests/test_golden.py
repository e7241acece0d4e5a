"""Golden captions: thresholds and recomposition as pure functions, the loop on a tiny random model."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner import views
from captioner.config import Config, GoldenConfig, ViewsConfig, ViewsOverride
from captioner.engines import YesNo
from captioner.errors import ConfigError, DataError, Refused, RunError
from captioner.files import hash_path
from captioner.lab import grid as scenes
from captioner.method import claims as ledger
from captioner.method import golden, planted, planting, qa, reask, rounds, verdicts
from captioner.method.candidates import mark
from captioner.method.claims import NO_STATEMENT, NOT_FINITE, OVER_LIMIT, UNCHECKABLE, select
from captioner.method.tool import Rules
from captioner.method.verdicts import Thresholds
from captioner.pipeline import stages
from captioner.records import Candidate, Claim, Failed, Golden, Pair, Planted, Unasked, Verdict
from captioner.runs import Run, Shards
from captioner.statements import is_one_statement, normalise, split_statements
from loops import golden as loop

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- pure


def candidate(k: int, text: str, finish_reason: str = "stop") -> Candidate:
    return Candidate(
        sample="s", key="i", k=k, text=text, finish_reason=finish_reason, mean_logprob=-1.0, tokens=9, seed=k
    )


def claim(text: str, p_yes: float, candidates: tuple[int, ...] = (0,), expected: str = "yes") -> Claim:
    return Claim(
        sample="s", key="i", text=text, kind="", candidates=list(candidates), question=f"{text}?",
        expected=expected, p_yes=p_yes, label_mass=1.0, verifier="v", view="all",
    )  # fmt: skip


def words(text: str) -> int:
    return len(text.split())


def test_of_claims_that_exclude_each_other_the_likeliest_stays() -> None:
    said = [
        claim("north star", 0.7, (0, 1)),
        claim("north ring", 0.9),
        claim("north plus", 0.5),
        claim("north red", 0.8, (0,)),
        claim("north blue", 0.8, (1, 2)),
        claim("south ring", 0.5),
        claim("star above ring", 0.9),
        claim("star above plus", 0.9),
        claim("north dot", 0.9).model_copy(update={"kind": "mark"}),
        claim("north bar", 0.8).model_copy(update={"kind": "mark"}),
    ]
    said = [each.model_copy(update={"slot": scenes.slot_of(each.text)}) for each in said]
    other = said[0].model_copy(update={"key": "j"})
    thresholds = verdicts.Thresholds(keep=0.6, drop=0.4, distrusted={"mark": "chance"})
    judged = verdicts.judge([*said, other], thresholds)
    assert [each.verdict for each in judged] == [
        *("drop", "keep", "drop"),  # one shape in the north: the likeliest, not the one of most samples
        *("drop", "keep"),  # as likely: that of more samples
        *("abstain", "keep", "keep", "abstain", "abstain"),  # nothing is kept; no slot; not trusted
        "keep",  # another image
    ]
    assert judged[0].why == "0.700, and north ring has 0.900"
    assert (
        verdicts.judge(judged, verdicts.Thresholds(0.95, 0.4))[1].verdict == "abstain"
    )  # again from the start


@pytest.mark.parametrize(
    ("p", "verdict"),
    [(0.0, "drop"), (0.39, "drop"), (0.4, "abstain"), (0.59, "abstain"), (0.6, "keep"), (1.0, "keep")],
)
def test_verdict(p: float, verdict: str) -> None:
    assert verdicts.verdict(p, keep=0.6, drop=0.4) == verdict


BOUNDS = Thresholds(0.6, 0.4)


@pytest.mark.parametrize("p", [float("nan"), -0.1, 1.1])
def test_verdict_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match="not a probability"):
        verdicts.verdict(p, keep=0.6, drop=0.4)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_more_certain_claim_fares_no_worse(p: float, q: float, keep: float, drop: float) -> None:
    order = ["drop", "abstain", "keep"]
    low, high = sorted((p, q))
    first, second = (verdicts.verdict(x, max(keep, drop), min(keep, drop)) for x in (low, high))
    assert order.index(first) <= order.index(second)


def test_a_claim_that_no_confirms_is_judged_by_no() -> None:
    kept, dropped = verdicts.judge([claim("a", 0.1, expected="no"), claim("b", 0.1)], BOUNDS)
    assert (kept.verdict, dropped.verdict) == ("keep", "drop")
    assert (kept.why, dropped.why) == ("0.900 is at least 0.600", "0.100 is below 0.400")


def test_a_distrusted_kind_always_abstains() -> None:
    bounds = Thresholds(0.6, 0.4, {"mark": "not trusted with mark"})
    claims = [
        each.model_copy(update={"kind": kind})
        for each in (claim("a", 0.9), claim("b", 0.1))
        for kind in ("mark", "color")
    ]
    judged = verdicts.judge(claims, bounds)
    assert [each.verdict for each in judged] == ["abstain", "keep", "abstain", "drop"]
    assert [each.why for each in judged if each.kind == "mark"] == ["not trusted with mark"] * 2
    [middle] = verdicts.judge([claim("c", 0.5)], bounds)
    assert middle.why == "0.500 is between"


# ---- how likely a claim is


def test_logistic_regression_is_that_of_a_reference() -> None:
    """Against minimising the same penalised loss with torch, in float64."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    features, weights = rng.normal(size=(60, 3)), rng.uniform(0.5, 2, 60)
    targets = rng.uniform(size=60)
    theirs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [theirs], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    x, y, w = (torch.from_numpy(each) for each in (features, targets, weights))

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        nll = torch.nn.functional.binary_cross_entropy_with_logits(x @ theirs, y, w, reduction="sum")
        total = nll + qa.RIDGE / 2 * (theirs**2).sum()
        total.backward()
        return total

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    assert qa.logistic(features, targets, weights) == pytest.approx(theirs.detach().numpy(), abs=1e-8)
    apart = qa.logistic(np.array([[-1.0], [1.0]]), np.array([0.0, 1.0]))
    assert 1 < apart[0] < 10  # where the classes separate, too


def asked_round(
    rng: random.Random, kinds: dict[str, float], count: int, samples: int = 8
) -> tuple[list[Claim], list[Planted], list[bool]]:
    """Claims of a made-up round, planted ones, and the truth: as the model behind `weigh` has it.

    ``kinds`` maps a kind to how well P(yes) tells true from false (standard deviations); a third of the
    claims are true, true ones have more votes, and the verifier says "yes" too readily.
    """
    claims, known, truth = [], [], []

    def p_of(true: bool, sharp: float) -> float:
        return 1 / (1 + math.exp(-(sharp * (1 if true else -1) + rng.gauss(0, math.sqrt(2 * sharp)) + 1.5)))

    for kind, sharp in kinds.items():
        for i in range(count):
            true = rng.random() < 1 / 3
            votes = 1 + sum(rng.random() < (0.5 if true else 0.2) for _ in range(samples - 1))
            one = claim(f"{kind} {i}", p_of(true, sharp), tuple(range(votes)))
            claims.append(one.model_copy(update={"kind": kind}))
            truth.append(true)
        for i in range(300):
            p, answer = p_of(i % 2 == 0, sharp), "no" if i % 2 else "yes"
            known.append(
                Planted(
                    sample="s", key="i", text=f"{i}", kind=kind, stratum="", answer=answer, p_yes=p,
                    label_mass=1.0,
                )
            )  # fmt: skip
    return claims, known, truth


def test_votes_and_answers_make_a_calibrated_probability() -> None:
    """Without knowing one answer of the round, of kinds where the verifier is good and where it is weak."""
    claims, known, truth = asked_round(random.Random(0), {"color": 2.0, "size": 1.0}, 2000)
    weighed = verdicts.weigh(claims, 8, verdicts.tells(known), {})

    def right(probabilities: list[float]) -> float:
        return sum((p >= 0.5) == true for p, true in zip(probabilities, truth, strict=True)) / len(truth)

    p_true = [each.p_true or 0.0 for each in weighed]
    assert right(p_true) > right([each.p_yes for each in claims]) + 0.1
    assert right(p_true) > right([len(each.candidates) / 8 for each in claims]) + 0.03
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        members = [(p, true) for p, true in zip(p_true, truth, strict=True) if low <= p < low + 0.2]
        assert abs(sum(p - true for p, true in members)) / len(members) < 0.08
    for kind in ("color", "size"):  # the share of true ones is found, though two thirds were answered "yes"
        own = [each.p_true or 0.0 for each in weighed if each.kind == kind]
        assert sum(own) / len(own) == pytest.approx(1 / 3, abs=0.05)
    turned = [each.p_true for each in verdicts.weigh(claims[::-1], 8, verdicts.tells(known), {})[::-1]]
    assert turned == pytest.approx(p_true, abs=1e-3)  # up to where the iteration stops


def test_what_is_distrusted_or_unknown() -> None:
    claims, known, _ = asked_round(random.Random(1), {"color": 2.0, "mark": 0.1, "": 2.0}, 50)
    weighed = verdicts.weigh(claims, 8, verdicts.tells([row for row in known if row.kind]), {"mark"})
    assert all((each.p_true is None) == (each.kind == "mark") for each in weighed)
    assert [verdicts.confidence(each) for each in weighed[50:100]] == [each.p_yes for each in claims[50:100]]
    again = verdicts.weigh(weighed, 8, verdicts.tells([row for row in known if row.kind]), {"mark"})
    assert again == weighed  # what was weighed before changes nothing
    turned = [each.model_copy(update={"expected": "no", "p_yes": 1 - each.p_yes}) for each in claims[100:]]
    for one, other in zip(verdicts.weigh(turned, 8, {}, {}), weighed[100:], strict=True):
        assert one.p_true == pytest.approx(other.p_true, abs=1e-6)
    assert verdicts.weigh([], 8, {}, {}) == []


# ---- asking again

SQUARE = views.plan(1200, 1200, ViewsConfig(overlap=0.25), size=1200, factor=1)


@pytest.mark.parametrize(
    ("statement", "view"),
    [
        ("northwest red", "top left"),
        ("a cup in the lower right corner", "bottom right"),
        ("center circle", "center"),
        ("north star", None),  # on the border of two quadrants
        ("circle left of star", None),
        ("white background", None),
        ("a bright westward look", None),  # no place
    ],
)
def test_the_view_that_covers_a_claim_best(statement: str, view: str | None) -> None:
    assert reask.best_view(statement, SQUARE) == view


def test_second_questions() -> None:
    by = {way: reask.second_question(way, "northwest red", "Q?", SQUARE) for way in ("view", "wording")}
    assert by == {"view": ("top left", "Q?"), "wording": ("all", "Is there northwest red in the picture?")}
    assert reask.second_question("wording", "Is there a dog?", "Is there a dog?", SQUARE) is None


def test_answers_taken_together() -> None:
    first = claim("northwest red", 0.5)
    again = reask.asked_again(first, [("top left", "Q?"), ("all", "R?")], [YesNo(0.9, 1), YesNo(0.9, 1)], 1.0)
    logit = 2 * math.log(9) / 3
    assert again.p_yes == pytest.approx(1 / (1 + math.exp(-logit)))
    assert (again.first_p_yes, again.view) == (0.5, "top left")
    [kept] = verdicts.judge([again], BOUNDS)
    assert kept.verdict == "keep" and kept.why.endswith("asked again")


# ---- samples


def test_duplicates_are_marked_and_stay() -> None:
    texts = ["red cup, dog", "tree", "The red cup, dog, dog", "dog, red cup"]
    marked = mark([candidate(k, text) for k, text in enumerate(texts, 3)])
    assert [each.duplicate_of for each in marked] == [None, None, 3, None]
    assert [each.repeats for each in marked] == [0, 0, 1, 0]
    assert [each.text for each in marked] == texts


@pytest.mark.parametrize(
    ("abstain", "text"),
    [
        ("majority", "kept, most"),
        ("leave_out", "kept"),
        ("keep", "kept, most, half"),
    ],
)
def test_abstained_claims(abstain: Any, text: str) -> None:
    claims = [
        claim("kept", 0.9),
        claim("dropped", 0.1, (0, 1, 2, 3)),
        claim("most", 0.5, (0, 1, 2)),
        claim("half", 0.5, (2, 3)),
    ]
    made = golden.build(verdicts.judge(claims, BOUNDS), 4, GoldenConfig(abstain=abstain), words)
    assert isinstance(made, Golden)
    assert made.text == text
    assert (made.kept, made.dropped, made.abstained, made.tokens) == (1, 1, 2, words(text))


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (9, "sure thing, doubtful, rare, frequent"),
        (5, "sure thing, doubtful, rare, frequent"),
        (4, "sure thing, rare, frequent"),
        (3, "sure thing, frequent"),  # as certain as `rare`, and stated more often
        (2, "sure thing"),
        (1, "frequent"),  # the surest claim alone exceeds the budget
    ],
)
def test_the_least_certain_leave_first(budget: int, text: str) -> None:
    claims = [
        claim("sure thing", 0.99),
        claim("doubtful", 0.6),
        claim("rare", 0.7),
        claim("frequent", 0.7, (0, 1)),
    ]
    assert golden.recompose(claims, words, budget)[0] == text


def test_of_equals_the_later_leaves_first() -> None:
    claims = [claim("first", 0.7), claim("second", 0.7)]
    assert golden.recompose(claims, words, 1)[0] == "first"


def test_what_another_claim_says_as_well_leaves_first() -> None:
    claims = [claim("red cup", 0.99), claim("small red cup", 0.7), claim("dog", 0.8)]
    assert golden.recompose(claims, words, 5)[0] == "small red cup, dog"
    made = golden.build(verdicts.judge(claims, BOUNDS), 1, GoldenConfig(max_tokens=5), words)
    assert isinstance(made, Golden) and made.over_budget == ["red cup"]


def test_never_empty() -> None:
    assert golden.recompose([], words, 9) == (None, [])
    assert golden.recompose([claim("too long", 0.9)], words, 1) == (None, [])
    no, yes = verdicts.judge([claim("a", 0.1), claim("a b", 0.9)], BOUNDS)
    assert golden.build([no], 1, GoldenConfig(), words) == golden.NOTHING_KEPT
    assert golden.build([yes], 1, GoldenConfig(max_tokens=1), words) == golden.OVER_BUDGET


@given(st.lists(st.text(alphabet="ab\"'()[],.; ", min_size=1, max_size=9), min_size=1, max_size=5))
def test_a_caption_states_what_was_asked_and_nothing_else(texts: list[str]) -> None:
    """Whatever the claims look like: open quotations and brackets would swallow their neighbours."""
    claims = verdicts.judge([claim(text, 0.9) for text in texts], BOUNDS)
    made = golden.build(claims, 1, GoldenConfig(), words)
    if isinstance(made, Golden):
        asked = {normalise(text) for text in texts}
        assert {normalise(said) for said in split_statements(made.text)} <= asked
    else:
        assert made == golden.NOTHING_KEPT
        assert not any(is_one_statement(text) for text in texts)


@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,3}( [a-z]{1,3}){0,3}", fullmatch=True), st.floats(0, 1)), max_size=8
    ),
    st.integers(1, 12),
)
def test_recompose_keeps_order_budget_and_certainty(drawn: list[tuple[str, float]], budget: int) -> None:
    claims = [claim(f"{number} {text}", p) for number, (text, p) in enumerate(drawn)]
    text, _ = golden.recompose(claims, words, budget)
    fitting = [each for each in claims if words(each.text) <= budget]
    assert (text is None) == (not fitting)
    if text is not None:
        inside = [each for each in fitting if each.text in text.split(", ")]
        assert text == ", ".join(each.text for each in inside)
        assert words(text) <= budget
        outside = [each for each in fitting if each not in inside and not redundant(each, fitting)]
        surest = max((each.p_yes for each in outside), default=0)
        assert surest <= min(each.p_yes for each in inside)


def redundant(one: Claim, claims: list[Claim]) -> bool:
    return any(set(one.text.split()) < set(other.text.split()) for other in claims)


def test_select_leaves_out_what_cannot_be_asked() -> None:
    candidates = [
        candidate(2, "red cup, dog, beautiful"),
        candidate(4, "red cup, tree, taken in 2019"),
        candidate(7, "red cup, tree, half a sta", "length"),
    ]
    selection = select(candidates, Rules(), max_questions=9)
    assert [(each.text, each.candidates) for each in selection.asked] == [
        ("red cup", (2, 4, 7)),
        ("dog", (2,)),
        ("tree", (4, 7)),
    ]
    assert [(each.text, why) for each, why in selection.unasked] == [
        ("beautiful", UNCHECKABLE),
        ("taken in 2019", UNCHECKABLE),
    ]
    rarest_left = select(candidates, Rules(), max_questions=2)
    assert [each.text for each in rarest_left.asked] == ["red cup", "tree"]
    assert [(each.text, why) for each, why in rarest_left.unasked if each.text == "dog"] == [
        ("dog", OVER_LIMIT)
    ]


def test_the_whole_picture_comes_first() -> None:
    said = "red cup, white background, photo on a wall, black and white photo, dog"
    asked = select([candidate(0, said)], Rules(), 9).asked
    assert [each.text for each in asked] == [
        "white background", "black and white photo", "red cup", "photo on a wall", "dog"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "number", "resolved"),
    [
        ("scenes:round:256", 1, "scenes:round:256:0"),
        ("scenes:round:256", 3, "scenes:round:256:512"),
        ("scenes:round:10:5", 2, "scenes:round:10:15"),
        ("some/folder", 3, "some/folder"),
    ],
)
def test_each_round_takes_its_own_scenes(source: str, number: int, resolved: str) -> None:
    assert rounds.round_source(source, number) == resolved


def test_toml_holds_fields_of_the_config() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "loops" / "golden.toml").read_text())
    assert Config.model_validate(settings) == Config()


# ---------------------------------------------------------------- the loop

IMAGES, SHARD = 5, 2
BROKEN = "images/000001"


def config_of(home: Path, **fields: Any) -> Config:
    """Random models keep nothing by themselves: thresholds and limits that let rows through every stage."""
    settings = {
        "images": str(home / "images"), "samples": 3, "keep": 0.5, "drop": 0.45, "abstain": "keep",
        "max_questions": 8, "max_tokens": 60, "shard_rows": SHARD, "sampling": {"max_tokens": 24},
    }  # fmt: skip
    settings.update(fields.pop("golden", {}))
    return Config.model_validate(
        {
            "max_failed": 0.9,
            "views": {"levels": [1], "center": False},
            "engine": {"max_num_seqs": 8},
            "golden": settings,
            "pairs": {"min_refuted": 0},
            **fields,
        }
    )


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with images (one broken) and a run that has a captioner and a verifier."""
    import torch

    from tests.tiny import tiny_checkpoint

    home = tmp_path_factory.mktemp("ready")
    scenes.write("round", IMAGES, home / "images")
    (home / "images" / f"{BROKEN}.png").write_bytes(b"no image")
    Run.open(home / "run", config_of(home))
    captioner = tiny_checkpoint(home / "run" / "sft" / "captioner", seed=1)
    with torch.no_grad():  # a random model that likes to say commas and to end states more than one thing
        rows = captioner.model.get_output_embeddings().weight
        rows[captioner.tokenizer.convert_tokens_to_ids([",", "<|im_end|>"])] *= torch.tensor([[3.0], [2.0]])
    captioner.model.save_pretrained(captioner.path)
    tiny_checkpoint(home / "run" / "round-1" / "qa" / "captioner", seed=2)
    give_verifier(home, {"all": 0.9})
    return home


def give_verifier(home: Path, accuracies: dict[str, float]) -> None:
    """What the QA stage says of its verifier."""
    folder = home / "run" / "round-1" / "qa"
    table = {name: {"accuracy": value, "count": 99} for name, value in accuracies.items()}
    (folder / "accuracy.json").write_text(json.dumps(table))
    calibration = qa.Calibration(temperature=1.0, keep=0.6, drop=0.4)
    (folder / "calibration.json").write_text(calibration.model_dump_json())
    (folder / "stage.json").write_text("{}")


@pytest.fixture(scope="module")
def finished(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = copy_of(ready, tmp_path_factory.mktemp("finished"))
    loop.golden(home / "run", config_of(home), 1)
    return home


def copy_of(home: Path, to: Path) -> Path:
    """A moved run: what a stage was made of is told by contents, not by places."""
    shutil.copytree(home, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    return to


RECORDS = {
    "candidates": Candidate, "claims": Claim, "verdicts": Verdict, "golden": Golden, "pairs": Pair
}  # fmt: skip


def rows_of(home: Path, name: str) -> list[Any]:
    return Shards(home / "run" / "round-1" / name, RECORDS[name]).read_all()


def judged_of(home: Path) -> list[Claim]:
    return verdicts.read(home / "run" / "round-1")


def failures_of(home: Path, name: str) -> list[Failed]:
    return Shards(home / "run" / "round-1" / name / "failed", Failed).read_all()


def manifest(home: Path, name: str) -> Any:
    return json.loads((home / "run" / "round-1" / name / "stage.json").read_text())


def no_model(*_: object, **__: object) -> Any:
    raise AssertionError("a model was loaded")


def test_every_image_is_a_row_or_a_counted_failure(finished: Path) -> None:
    keys = {f"images/{index:06d}" for index in range(IMAGES)}
    names = ("candidates", "claims", "golden")
    candidates, claims, captions = (rows_of(finished, name) for name in names)
    assert {row.key for row in failures_of(finished, "candidates")} == {BROKEN}
    assert manifest(finished, "candidates")["counts"] == {
        "images": IMAGES, "candidates": 3 * (IMAGES - 1), "failed": 1,
        "cut": sum(row.finish_reason == "length" for row in candidates),
        "repeating": sum(row.repeats > 0 for row in candidates),
        "duplicates": sum(row.duplicate_of is not None for row in candidates),
    }  # fmt: skip
    for before, rows, stage in ((candidates, claims, "claims"), (claims, captions, "golden")):
        failed = {row.key for row in failures_of(finished, stage)}
        assert {row.key for row in rows} | failed == {row.key for row in before}
        assert not {row.key for row in rows} & failed
    assert {row.key for row in candidates} == keys - {BROKEN}
    assert claims
    assert captions
    assert rows_of(finished, "pairs")


def test_claims_are_judged_and_captions_follow_them(finished: Path) -> None:
    claims = rounds.by_key(judged_of(finished))
    candidates = rounds.by_key(rows_of(finished, "candidates"))
    assert {row.verdict for rows in claims.values() for row in rows} > {"keep"}
    for caption in rows_of(finished, "golden"):
        staying = [row.text for row in claims[caption.key] if row.verdict != "drop"]
        assert caption.tokens <= 60
        stated = caption.text.split(", ")
        assert [text for text in staying if text in stated] == stated
    for key, rows in claims.items():
        assert len(rows) <= 8
        for row in rows:
            assert row.sample == candidates[key][0].sample
            assert row.question == f"Visible: {row.text}?"
            assert all(k in range(3) for k in row.candidates)


def test_rows_are_those_of_engines_that_are_fed_whole_images(finished: Path) -> None:
    """To the last bit: samples and answers shard by shard, the images decoded in full, here."""
    from captioner.engines import CaptionRequest, QuestionBatch, make_engine
    from captioner.views import load_image

    config = config_of(finished)
    folder = finished / "images" / "images"
    paths = {f"images/{path.stem}": path for path in sorted(folder.glob("*.png"))}
    loaded = {key: load_image(path) for key, path in paths.items() if key != BROKEN}
    keys = sorted(paths)
    shards = [[key for key in keys[at : at + SHARD] if key in loaded] for at in range(0, IMAGES, SHARD)]
    engine = make_engine(finished / "run" / "sft" / "captioner", config)
    samples = [
        each
        for shard in shards
        for own in engine.sample(
            (CaptionRequest(key, *loaded[key]) for key in shard), 3, config.golden.sampling
        )
        for each in mark(own)
    ]
    assert rows_of(finished, "candidates") == samples
    engine = make_engine(finished / "run" / "round-1" / "qa" / "captioner", config)
    claims = rounds.by_key(rows_of(finished, "claims"))
    for shard in shards:
        own = [key for key in shard if key in claims]
        batches = [QuestionBatch(loaded[key][0], [row.question for row in claims[key]]) for key in own]
        for key, answers in zip(own, engine.p_yes(batches), strict=True):
            assert [row.p_yes for row in claims[key]] == [qa.scale(each.p_yes, 1.0) for each in answers]
            assert [row.label_mass for row in claims[key]] == [each.label_mass for each in answers]


def test_an_image_is_decoded_once_for_sampling_and_once_for_asking_by_others(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking again included; images that failed or have nothing to ask about are not decoded for asking."""
    home, noted, prepare = copy_of(ready, tmp_path), tmp_path / "decoded", views.prepare

    def noting(source: Path, *args: Any) -> Any:
        with noted.open("a") as file:
            file.write(f"{os.getpid()} images/{source.stem}\n")
        return prepare(source, *args)

    def decoded() -> Counter[str]:
        pids, keys = zip(*(line.split() for line in noted.read_text().splitlines()), strict=True)
        noted.unlink()
        assert str(os.getpid()) not in pids
        return Counter(keys)

    monkeypatch.setattr(views, "prepare", noting)
    asked_again = {"reask": ["view", "wording"]}
    config = config_of(home, golden=asked_again, views={})
    calibration = qa.Calibration(temperature=1.0, keep=1.0, drop=0.0)  # all is undecided
    (home / "run" / "round-1" / "qa" / "calibration.json").write_text(calibration.model_dump_json())
    sampled, fill = list[Counter[str]](), planted.fill

    def measured(*args: Any) -> None:
        sampled.append(decoded())
        fill(*args)
        noted.unlink(missing_ok=True)

    monkeypatch.setattr(planted, "fill", measured)
    monkeypatch.setattr(planted, "trusted", lambda *_: planted.Trust(None, {}, {}, ()))
    loop.golden(home / "run", config, 1)
    assert sampled == [Counter(f"images/{index:06d}" for index in range(IMAGES))]
    assert decoded() == Counter({row.key for row in rows_of(home, "candidates")})
    assert manifest(home, "claims")["counts"]["asked_again"] == len(rows_of(home, "claims")) > 0


def test_the_closing_counts_are_those_of_the_rows(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop.golden(finished / "run", config_of(finished), 1)  # done before: counts only
    counts = manifest(finished, "pairs")["counts"]
    assert capsys.readouterr().out.strip() == "round 1: " + ", ".join(
        f"{n} {name}" for name, n in counts.items()
    )
    assert list(counts) == [
        "images", "candidates", "claims", "kept", "dropped", "abstained", "pairs", "failed"
    ]  # fmt: skip
    assert counts["claims"] == counts["kept"] + counts["dropped"] + counts["abstained"]
    assert counts["claims"] == len(rows_of(finished, "claims"))
    assert counts["pairs"] == len(rows_of(finished, "pairs"))
    without = manifest(finished, "pairs")["without_pair"]
    with_pair = {row.key for row in rows_of(finished, "pairs")}
    assert sum(without.values()) + len(with_pair) == IMAGES - 1


@pytest.mark.slow
def test_the_rows_of_an_image_do_not_depend_on_its_shard(ready: Path, finished: Path, tmp_path: Path) -> None:
    home = copy_of(ready, tmp_path)
    loop.golden(home / "run", config_of(home, golden={"shard_rows": 4}), 1)
    for name in rounds.STAGES:
        told, rows = rows_of(finished, name), rows_of(home, name)
        for one, other in zip(told, rows, strict=True):
            for field, value in one.model_dump().items():
                close = pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
                assert getattr(other, field) == close, field


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from loops import golden
    from tests.test_golden import config_of

    name, at, home = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    replace = os.replace

    def killing(source, target):
        # in the middle of publishing shard `at`: its file is written, but does not have its name yet
        if Path(target) == home / "run" / "round-1" / name / f"{at:05d}.parquet":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = killing
    golden.golden(home / "run", config_of(home), 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", rounds.STAGES)
def test_a_killed_stage_ends_with_the_same_rows(
    name: str, ready: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = copy_of(ready, tmp_path)
    for earlier in rounds.STAGES[: rounds.STAGES.index(name)]:  # what was done before the kill
        shutil.copytree(finished / "run" / "round-1" / earlier, home / "run" / "round-1" / earlier)
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), name, "1", str(home)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    stage = home / "run" / "round-1" / name
    assert [path.name for path in sorted(stage.glob("[0-9]*"))] == ["00000.parquet"]
    assert not (stage / "stage.json").exists()
    whole = stage / "00000.parquet"
    first = whole.stat().st_mtime_ns
    if name in ("verdicts", "golden", "pairs"):
        monkeypatch.setattr("captioner.models.model.load", no_model)
    loop.golden(home / "run", config_of(home), 1)
    assert whole.stat().st_mtime_ns == first
    for each in rounds.STAGES:
        assert rows_of(home, each) == rows_of(finished, each)
    for each in rounds.STAGES[:-1]:
        assert failures_of(home, each) == failures_of(finished, each)


def test_rethreshold_runs_no_model(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = copy_of(finished, tmp_path)
    monkeypatch.setattr("captioner.models.model.load", no_model)
    old = judged_of(home)
    keep = max(map(verdicts.confidence, old))
    with pytest.raises(RunError, match=r"keep.*\n.*\n.*--rethreshold"):
        loop.golden(home / "run", config_of(home, golden={"keep": keep}), 1)
    assert judged_of(home) == old
    loop.golden(home / "run", config_of(home), 1, rethreshold=keep)
    claims = judged_of(home)
    assert [row.p_yes for row in claims] == [row.p_yes for row in old]
    assert sum(row.verdict == "keep" for row in claims) == 1 < sum(row.verdict == "keep" for row in old)
    assert rows_of(home, "candidates") == rows_of(finished, "candidates")
    counts = rounds.verdict_counts(claims)
    assert sum(row.kept for row in rows_of(home, "golden")) <= counts["kept"]
    assert {name: manifest(home, "pairs")["counts"][name] for name in counts} == counts
    # the threshold is now the run's: the plain command finds everything done
    loop.golden(home / "run", config_of(home, golden={"keep": keep}), 1)
    loop.golden(home / "run", config_of(home), 1, rethreshold=0.5)
    for name in rounds.STAGES:
        assert rows_of(home, name) == rows_of(finished, name)


def test_the_ledger_never_changes(finished: Path, tmp_path: Path) -> None:
    home = copy_of(finished, tmp_path)
    ledger_dir = home / "run" / "round-1" / "claims"
    before = hash_path(ledger_dir)
    loop.golden(home / "run", config_of(home), 1, rethreshold=0.9)
    assert hash_path(ledger_dir) == before
    assert "verdict" not in pq.read_schema(ledger_dir / "00000.parquet").names
    damaged = Shards(home / "run" / "round-1" / "verdicts", Verdict)
    damaged.write(0, damaged.read(0)[1:])
    with pytest.raises(DataError, match="do not belong together"):
        judged_of(home)


def test_a_round_of_0_1_opens(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ledger holds the verdicts, and its later stages name it as their input."""
    home = copy_of(finished, tmp_path)
    monkeypatch.setattr("captioner.models.model.load", no_model)
    round_1, judged = home / "run" / "round-1", judged_of(home)
    shutil.rmtree(round_1 / "verdicts")
    for file in sorted((round_1 / "claims").glob("[0-9]*.parquet")):
        table, rows = pq.read_table(file), [judged.pop(0) for _ in range(pq.read_metadata(file).num_rows)]
        for at, name in ((10, "verdict"), (14, "p_true"), (15, "why")):
            table = table.add_column(at, name, pa.array([getattr(row, name) for row in rows]))
        pq.write_table(table, file)
    for name in ("golden", "pairs"):
        told = manifest(home, name)
        told["inputs"].pop("verdicts")
        told["inputs"] |= {each: hash_path(round_1 / each) for each in told["inputs"]}
        (round_1 / name / "stage.json").write_text(json.dumps(told))
    assert judged_of(home) == judged_of(finished)
    loop.golden(home / "run", config_of(home), 1)
    assert not (round_1 / "verdicts").exists()
    loop.golden(home / "run", config_of(home), 1, rethreshold=0.5)
    assert judged_of(home) == judged_of(finished)
    for name in ("golden", "pairs"):
        assert rows_of(home, name) == rows_of(finished, name)


# ---------------------------------------------------------------- the verifier gate


@pytest.fixture
def scenes_home(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, bool]]:
    """A round on scenes whose captioner says true and false things, and whose verifier knows the scenes.

    Its answers of the kinds in the second value are turned: True is confident, False a shrug.
    """
    from captioner.engines.hf import HFEngine

    home = copy_of(ready, tmp_path)
    drawn = [
        (image, scenes.Scene.from_json(row["facts"])) for image, row in scenes.rows("round", GATE_IMAGES)
    ]
    turned: dict[str, bool] = {}

    def scene_of(engine: HFEngine, picture: Any) -> scenes.Scene:
        shown = {view: part.tobytes() for view, part in picture.parts.items()}
        cut = ((views.cut(image, list(shown)), scene) for image, scene in drawn)
        return next(
            scene for parts, scene in cut if [part.tobytes() for part in parts] == list(shown.values())
        )

    def sample(engine: HFEngine, requests: Any, n: int, _: Any) -> Iterator[list[Candidate]]:
        for number, request in enumerate(requests):
            true = scenes.statements(scene_of(engine, request.image))
            false = scenes.statements(scenes.sample("qa", number))
            texts = [", ".join(true), ", ".join(false[:9]), ", ".join(true[:6] + false[1:4])]
            yield [
                candidate(k, text).model_copy(update={"sample": request.sample_id, "key": request.key})
                for k, text in enumerate(texts)
            ]

    def p_yes(engine: HFEngine, requests: Any) -> Iterator[list[YesNo]]:
        for batch in requests:
            scene, answers = scene_of(engine, batch.image), []
            for question in batch.questions:
                text = question.removeprefix("Visible: ").removesuffix("?")
                p = 0.97 if scenes.execute(text, scene) else 0.03
                flip = turned.get(scenes.kind_of(text))
                answers.append(YesNo({None: p, True: 1 - p, False: 0.49}[flip], 1.0))
            yield answers

    monkeypatch.setattr(HFEngine, "sample", sample)
    monkeypatch.setattr(HFEngine, "p_yes", p_yes)
    return home, turned


GATE_IMAGES = 12


def gate_config(home: Path, **fields: Any) -> Config:
    return config_of(home, golden={"images": f"scenes:round:{GATE_IMAGES}", "max_questions": 60, **fields})


def verifier_of(home: Path) -> Any:
    return json.loads((home / "run" / "round-1" / "verifier.json").read_text())


def test_planted_claims_are_balanced_and_judged() -> None:
    scene = scenes.sample("round", 3)
    said = [*scenes.statements(scene), "northwest nothing", "no idea"]
    claims = planting.from_facts(scenes.LABORATORY, said, scene.to_json(), 30, random.Random(0))
    assert len(claims) >= 16
    for claim_ in claims:
        assert (claim_["answer"] == "yes") == scenes.execute(claim_["question"], scene)
        assert scenes.kind_of(claim_["question"]) == claim_["kind"]
    answers = Counter((claim_["kind"], claim_["answer"]) for claim_ in claims)
    assert all(answers[kind, "yes"] == answers[kind, "no"] for kind, _ in answers)
    assert {"stated", "swap"} == {claim_["stratum"] for claim_ in claims}


@pytest.mark.slow
def test_a_good_verifier_passes(scenes_home: tuple[Path, dict[str, bool]]) -> None:
    home, _ = scenes_home
    loop.golden(home / "run", gate_config(home), 1)
    assert verifier_of(home)["passed"] and verifier_of(home)["distrusted"] == {}
    rows = Shards(home / "run" / "round-1" / "planted", Planted).read_all()
    assert len(rows) > 100 and {row.answer for row in rows} == {"yes", "no"}
    assert {"color", "shape", "size"} <= {row.kind for row in rows}
    judged = {row.key: row for row in rows_of(home, "golden")}
    for row in judged.values():  # a verifier that knows gives a caption without a false statement
        index = int(row.key.rpartition("/")[2])
        assert scenes.judge(row.text, scenes.sample("round", index)).false == 0


@pytest.mark.slow
@pytest.mark.parametrize("confident", [True, False])
def test_a_verifier_turned_for_one_kind_is_caught(
    scenes_home: tuple[Path, dict[str, bool]], confident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, turned = scenes_home
    turned["color"] = confident
    loop.golden(home / "run", gate_config(home), 1)
    verifier = verifier_of(home)
    assert verifier["passed"] and set(verifier["distrusted"]) == {"color"}
    assert verifier["planted"]["kind color"]["accuracy"] <= 0.5
    claims = judged_of(home)
    assert {row.verdict for row in claims if row.kind == "color"} == {"abstain"}
    assert {row.verdict for row in claims if row.kind == "shape"} == {"keep", "drop"}
    assert all("not trusted with color" in row.why for row in claims if row.kind == "color")
    refuted = [row for row in rows_of(home, "pairs") if row.refuted_in_rejected]
    assert refuted  # by the other kinds
    # thresholds move, the distrust stays, and no model runs
    monkeypatch.setattr("captioner.models.model.load", no_model)
    loop.golden(home / "run", gate_config(home), 1, rethreshold=0.99)
    assert {row.verdict for row in judged_of(home) if row.kind == "color"} == {"abstain"}
    # a lower limit trusts it again
    loop.golden(home / "run", gate_config(home, min_kind_accuracy=0.0), 1, rethreshold=0.6)
    assert "abstain" not in {row.verdict for row in judged_of(home)} or not confident


@pytest.mark.slow
def test_a_verifier_trained_on_turned_labels_is_caught(tmp_path: Path) -> None:
    """A real one: the shipped base, its adapter trained with "yes" and "no" of colors exchanged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from captioner.engines import make_engine
    from captioner.models import model
    from captioner.sources.folder import ImageRow, read_folder
    from loops import qa as qa_loop

    scenes.write("qa", 48, tmp_path / "asked")
    rows = pq.read_table(tmp_path / "asked" / "metadata.parquet").to_pylist()
    for question in (question for row in rows for question in row["questions"]):
        if question["kind"] == "color" and qa.is_yes_no(question):
            question["answer"] = "no" if question["answer"] == "yes" else "yes"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "asked" / "metadata.parquet")
    training = {"max_steps": 80, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "save_steps": 80}
    config = Config.model_validate({"views": {"levels": [1], "center": False}, "qa": {"training": training}})
    base = model.checkpoint_path("scenes-base")
    qa_loop.train_verifier(config, base, read_folder(tmp_path / "asked"), tmp_path / "qa")

    scenes.write("round", 24, tmp_path / "round")
    asked = []
    for row in read_folder(tmp_path / "round"):
        said, facts = scenes.statements(scenes.Scene.from_json(row.facts or "")), row.facts or ""
        claims = planting.from_facts(scenes.LABORATORY, said, facts, planted.PER_IMAGE, random.Random(0))
        asked.append(ImageRow(row.key, row.path, questions=[dict(each) for each in claims]))
    engine = make_engine(tmp_path / "qa" / "captioner", config)
    with stages.images(engine.renderer.spec, config, len(asked)) as pictures:
        found = [made for _, made in planted.ask(engine, stages.prepared(asked, pictures), 1.0)]
    engine.close()
    answers = [row for made in found if not isinstance(made, Failed) for row in made]
    table = qa.accuracy_table([qa.Answer(r.kind, r.stratum, r.answer, r.p_yes, 1.0) for r in answers])
    trust = planted.decide({name: vars(row) for name, row in table.items()}, {}, config.golden)
    assert all(found) and "color" in trust.distrusted and "shape" not in trust.distrusted
    assert table["kind color"].accuracy < 0.5 < 0.7 < table["kind shape"].accuracy


@pytest.mark.slow
def test_a_verifier_that_is_wrong_throughout_stops_the_round(
    scenes_home: tuple[Path, dict[str, bool]],
) -> None:
    home, turned = scenes_home
    turned.update(dict.fromkeys(scenes.KINDS, True))
    with pytest.raises(Refused, match=r"round 1 cannot be trusted: all: 0\.\d+ on \d+ planted") as refused:
        loop.golden(home / "run", gate_config(home), 1)
    assert refused.value.exit_code == 3
    assert not verifier_of(home)["passed"]
    assert not (home / "run" / "round-1" / "claims").exists()
    turned.clear()
    with pytest.raises(Refused):  # what was measured stands
        loop.golden(home / "run", gate_config(home), 1)
    loop.golden(home / "run", gate_config(home), 1, redo=True)


@pytest.mark.slow
def test_a_human_checked_file_is_the_judge(scenes_home: tuple[Path, dict[str, bool]], tmp_path: Path) -> None:
    home, turned = scenes_home
    folder = tmp_path / "checked"
    scenes.write("round", GATE_IMAGES, folder)
    lines = []
    for index in range(GATE_IMAGES):
        for text in scenes.statements(scenes.sample("round", index))[:5]:
            for shown in {index, (index + 1) % GATE_IMAGES}:
                answer = "yes" if scenes.execute(text, scenes.sample("round", shown)) else "no"
                row = {"image": f"{shown:06d}.png", "statement": text, "answer": answer}
                lines.append(json.dumps(row | {"kind": scenes.kind_of(text)}))
    (folder / "checked.jsonl").write_text("\n".join(lines))
    turned["color"] = True
    fields = {"planted": str(folder / "checked.jsonl")}
    loop.golden(home / "run", gate_config(home, **fields), 1)
    assert set(verifier_of(home)["distrusted"]) == {"color"}
    assert verifier_of(home)["planted"]["kind color"]["accuracy"] == 0


@pytest.mark.slow
def test_without_planted_claims_the_held_out_questions_judge(fresh: Path) -> None:
    give_verifier(fresh, {"all": 0.9, "kind object": 0.5, "stratum swap": 0.1, "blind": 0.5})
    loop.golden(
        fresh / "run", config_of(fresh, max_failed=1.0, pairs={"max_dropped": 1.0, "min_refuted": 0}), 1
    )
    assert {row.verdict for row in judged_of(fresh) if row.kind == "object"} == {"abstain"}
    assert Shards(fresh / "run" / "round-1" / "planted", Planted).read_all() == []
    give_verifier(fresh, {"all": 0.6})
    with pytest.raises(Refused, match=r"all: 0\.600 on 99 held-out questions, limit 0\.65"):
        loop.golden(fresh / "run", config_of(fresh), 1)


@pytest.mark.slow
def test_undecided_claims_are_asked_again(
    scenes_home: tuple[Path, dict[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from captioner.engines.hf import HFEngine

    home, turned = scenes_home
    turned["size"] = False
    asked, p_yes = [], HFEngine.p_yes

    def sharper(engine: HFEngine, requests: Any) -> Iterator[list[YesNo]]:
        requests = list(requests)
        for batch, answers in zip(requests, p_yes(engine, requests), strict=True):
            if all(question.startswith("Visible") for question in batch.questions) and batch.view == "all":
                yield answers
                continue
            asked.extend((batch.view, question) for question in batch.questions)
            yield [YesNo(0.9, 1.0) for _ in answers]

    monkeypatch.setattr(HFEngine, "p_yes", sharper)
    fields = {"reask": ["view", "wording"], "keep": 0.6, "drop": 0.4, "min_kind_accuracy": 0.0}
    config = gate_config(home, **fields).model_copy(update={"views": ViewsOverride(overlap=0.25)})
    loop.golden(home / "run", config, 1)
    claims = judged_of(home)
    sizes = [row for row in claims if row.kind == "size"]
    assert sizes and all(row.first_p_yes == pytest.approx(0.49) and row.p_yes > 0.6 for row in sizes)
    assert all(row.first_p_yes is None and row.view == "all" for row in claims if row.kind != "size")
    corners = {"northwest": "top left", "southeast": "bottom right", "center": "center", "north": "all"}
    for row in sizes:
        place = row.text.split()[0]
        assert row.view == corners.get(place, row.view)
    assert len(asked) == sum(1 + (row.view != "all") for row in sizes)
    assert manifest(home, "claims")["counts"]["asked_again"] == len(sizes)


def test_what_was_not_asked_is_in_the_ledger_with_its_reason(fresh: Path) -> None:
    loop.golden(fresh / "run", config_of(fresh, golden={"max_questions": 1}), 1)
    rows = Shards(fresh / "run" / "round-1" / "claims" / "unasked", Unasked).read_all()
    counts = manifest(fresh, "claims")["counts"]
    assert len(rows) == counts["uncheckable"] + counts["over_limit"] > 0
    assert {row.why for row in rows} <= {UNCHECKABLE, OVER_LIMIT}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rethreshold": 1.5}, "between"),
        ({"rethreshold": 0.2}, r"--golden\.drop 0\.2"),
        ({"rethreshold": 0.7, "redo": True}, "one of them"),
    ],
)
def test_rethreshold_flags(ready: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loop.golden(ready / "run", config_of(ready), 1, **more)


@pytest.fixture
def fresh(ready: Path, tmp_path: Path) -> Iterator[Path]:
    yield copy_of(ready, tmp_path)


def test_what_a_round_needs(fresh: Path) -> None:
    with pytest.raises(RunError, match="no claims"):
        loop.golden(fresh / "run", config_of(fresh), 1, rethreshold=0.7)
    with pytest.raises(RunError, match="captioner iterate --round 1"):
        loop.golden(fresh / "run", config_of(fresh), 2)
    (fresh / "run" / "round-1" / "gate.json").write_text('{"promoted": false}')
    with pytest.raises(RunError, match="captioner qa --round 2"):
        loop.golden(fresh / "run", config_of(fresh), 2)
    shutil.rmtree(fresh / "run" / "sft")
    with pytest.raises(RunError, match="captioner sft"):
        loop.golden(fresh / "run", config_of(fresh), 1)
    with pytest.raises(RunError, match="no such run"):
        loop.golden(fresh / "nothing", config_of(fresh), 1)


def test_too_many_failures_are_refused_and_the_limit_lets_them_through(fresh: Path) -> None:
    with pytest.raises(Refused, match=r"1 of 5 images failed \(1 x .*\), the limit is 10%") as refused:
        loop.golden(fresh / "run", config_of(fresh, max_failed=0.1), 1)
    assert refused.value.exit_code == 3
    assert not (fresh / "run" / "round-1" / "candidates" / "stage.json").exists()
    assert len(failures_of(fresh, "candidates")) == 1


@pytest.mark.slow
def test_a_mutant_tool_loses_no_image_and_stops_with_a_count(fresh: Path) -> None:
    """Over HTTP: random bytes, nonsense in good JSON, megabytes, empty lists, errors, silence, some sense."""
    from tests.http_stand_in import StandIn, prompt_of
    from tests.test_tool_llm import honest, mutant

    replies = mutant(3)

    def answer(body: dict[str, Any]) -> Any:
        if prompt_of(body) == "yes":  # a probe
            return "yes"
        reply = next(replies)
        return honest(body) if reply == "honest" else reply

    with StandIn(answer) as server:
        tool = {"type": "server", "urls": [server.url], "timeout": 0.5, "retries": 1, "in_flight": 1}
        with pytest.raises(Refused, match=r"\d of 5 images failed \(.*tool: .*the limit is 25%") as refused:
            loop.golden(fresh / "run", config_of(fresh, tool=tool, max_failed=0.25), 1)
        assert refused.value.exit_code == 3
    keys = {row.key for row in rows_of(fresh, "claims")}
    failed = [row.key for row in failures_of(fresh, "claims")]
    assert len(failed) == len(set(failed)) and not keys & set(failed)
    assert keys | set(failed) == {row.key for row in rows_of(fresh, "candidates")}
    assert not (fresh / "run" / "round-1" / "claims" / "stage.json").exists()


def test_what_the_verifier_cannot_answer_is_a_failure(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from captioner.engines import YesNo
    from captioner.engines.hf import HFEngine

    fill, p_yes = ledger.fill, HFEngine.p_yes

    def meanwhile(*args: Any) -> None:
        shutil.copy(fresh / "images" / "images" / "000003.png", fresh / "images" / "images" / "000000.png")
        fill(*args)

    def broken(engine: HFEngine, requests: Any) -> Iterator[list[YesNo]]:
        for answers in p_yes(engine, requests):
            yield [YesNo(float("nan"), 0.0), *answers[1:]]

    monkeypatch.setattr(ledger, "fill", meanwhile)
    monkeypatch.setattr(HFEngine, "p_yes", broken)
    with pytest.raises(Refused, match="5 of 5"):
        loop.golden(fresh / "run", config_of(fresh), 1)
    reasons = {row.key: row.reason for row in failures_of(fresh, "claims")}
    assert reasons["images/000000"] == rounds.CHANGED
    assert NOT_FINITE in reasons.values()
    assert set(reasons.values()) <= {rounds.CHANGED, NOT_FINITE, NO_STATEMENT}
    assert rows_of(fresh, "claims") == []


def test_redo_begins_anew(finished: Path, tmp_path: Path) -> None:
    home = copy_of(finished, tmp_path)
    with pytest.raises(RunError, match="stale"):
        loop.golden(home / "run", config_of(home, golden={"samples": 2}), 1)
    loop.golden(home / "run", config_of(home, golden={"samples": 2}), 1, redo=True)
    assert len(rows_of(home, "candidates")) == 2 * (IMAGES - 1)
    assert all(k < 2 for row in rows_of(home, "claims") for k in row.candidates)
