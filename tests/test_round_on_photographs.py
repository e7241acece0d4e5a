"""A round on real photographs, over an engine on HTTP: planted claims, trust by kind, neutral abstention."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from captioner.config import Config, GoldenConfig
from captioner.errors import Refused
from captioner.method import kinds, planted, planting, qa, verdicts
from captioner.records import Golden, Pair, Planted
from captioner.runs import Run, Shards
from captioner.sources.folder import ImageRow
from captioner.statements import comparable_statements, normalise
from loops import dpo
from loops import golden as loop
from tests import photographs, tiny
from tests.http_stand_in import Vllm

KNOWN = photographs.read()
SAMPLES = 4


# ---------------------------------------------------------------- what is planted


@pytest.mark.parametrize(
    ("caption", "claim", "said"),
    [
        ("a small red cup on the wooden table", "red cup", True),
        ("a small red cup on the wooden table", "cup on table", True),
        ("small red cups", "a red cup", True),
        ("a cup and a blue bowl", "blue cup", False),
        ("a blue bowl with a cup", "blue cup", False),
        ("no dogs", "dog", False),
        ("a man riding a horse", "man rides horse", True),
        ("a man on a horse", "horse on a man", False),
        ("red cup. green bowl", "cup green", False),
        ("anything", "", False),
    ],
)
def test_what_a_caption_says(caption: str, claim: str, said: bool) -> None:
    assert planting.says(caption, claim) is said


def references(with_samples: bool) -> list[planting.Reference]:
    """The photographs; their samples state every second fact three times and each falsehood once."""
    found = []
    for key, about in KNOWN.items():
        said = (
            [", ".join([*about["facts"][::2], about["false"][k]]) for k in range(3)] if with_samples else []
        )
        row = ImageRow(key, Path(f"{key}.png"), caption=", ".join(about["facts"]))
        found.append(planting.reference_of(row, said))
    return [each for each in found if each]


@pytest.mark.parametrize("with_samples", [True, False])
def test_planted_claims_of_photographs_are_what_they_say(with_samples: bool) -> None:
    rows = planting.from_references(references(with_samples), 24, seed=0)
    asked = [(row.key, question) for row in rows for question in row.questions or []]
    assert len(asked) > (60 if with_samples else 120)
    assert {"stated", "swap", "other image"} == {question["stratum"] for _, question in asked}
    by_kind = Counter((question["kind"], question["answer"]) for _, question in asked)
    assert all(by_kind[kind, "yes"] == by_kind[kind, "no"] for kind, _ in by_kind)
    for key, question in asked:
        facts = {normalise(text) for text in KNOWN[key]["facts"]}
        text = normalise(question["question"])
        assert question["kind"] == kinds.kind_of(question["question"])
        assert (text in facts) == (question["answer"] == "yes"), (key, question)
        if with_samples and question["answer"] == "yes":
            assert text in {normalise(each) for each in KNOWN[key]["facts"][::2]}


def test_questions_of_the_user_are_planted_too() -> None:
    asked = [
        {"question": "a red saucer", "answer": "yes", "kind": "x", "stratum": ""},
        {"question": "a blue kettle", "answer": "no", "kind": "x", "stratum": ""},
        {"question": "Is there a spoon?", "answer": "yes", "kind": "x", "stratum": ""},
    ]
    reference = planting.reference_of(ImageRow("a", Path("a.png"), questions=asked))
    assert reference is not None
    assert (list(reference.true), list(reference.false)) == (["a red saucer"], ["a blue kettle"])
    [row] = planting.from_references([reference], 8, seed=0)
    assert {q["answer"] for q in row.questions or []} == {"yes", "no"}
    assert planting.reference_of(ImageRow("b", Path("b.png"))) is None


# ---------------------------------------------------------------- what is decided


def table(**kinds_: tuple[float, int]) -> dict[str, dict[str, Any]]:
    rows = {f"kind {kind}": {"accuracy": a, "count": n} for kind, (a, n) in kinds_.items()}
    return {"all": {"accuracy": 0.92, "count": 200}} | rows


def test_grades_of_kinds() -> None:
    found = planted.decide(
        table(color=(0.95, 30), size=(0.8, 30), count=(0.6, 30), text=(0.1, 5)),
        table(text=(0.97, 40)),
        GoldenConfig(),
        named=("object",),
    )
    assert found.refused is None
    assert (set(found.distrusted), set(found.cautious)) == ({"count"}, {"size"})
    assert "kind text: 0.970 on 40 held-out questions: trusted" in found.reasons
    assert "kind object: 0.920 on 200 planted claims, that of all: trusted" in found.reasons


def test_distrust_is_remembered_until_enough_speaks_for_the_kind() -> None:
    before = {"color": "why", "count": "why"}
    found = planted.decide(
        table(color=(1.0, 19), count=(0.95, 20)), table(color=(0.99, 300)), GoldenConfig(), before
    )
    assert set(found.distrusted) == {"color"} and "earlier round" in found.distrusted["color"]
    assert planted.decide(table(), {}, GoldenConfig(), before).distrusted.keys() == before.keys()


def test_a_cautious_kind_is_refuted_and_never_kept() -> None:
    from tests.test_golden import claim

    thresholds = verdicts.Thresholds(0.6, 0.4, {"a": "no"}, {"b": "only refutes"})
    said = [claim(f"{kind} {p}", p).model_copy(update={"kind": kind}) for kind in "abc" for p in (0.9, 0.1)]
    judged = verdicts.judge(said, thresholds)
    assert [each.verdict for each in judged] == ["abstain", "abstain", "abstain", "drop", "keep", "drop"]
    assert judged[2].why == "only refutes" and thresholds.neutral == {"a", "b"}


# ---------------------------------------------------------------- a round


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("checkpoints")
    return {
        name: tiny.tiny_checkpoint(home / name, seed=seed).path
        for seed, name in enumerate(("captioner", "verifier"))
    }


def chance(*parts: object) -> float:
    """A number 0..1 that depends on its arguments alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") / 2**32


Setting = Callable[[Callable[[str, bool], float]], tuple[Run, Config]]


@pytest.fixture
def setting(tmp_path: Path, checkpoints: dict[str, Path]) -> Iterator[Setting]:
    """A run whose captioner states every fact in three of four samples and every falsehood in one or two.

    ``wrong(kind, true)`` is how often the verifier answers a claim of that kind wrongly.
    """
    servers: list[Vllm] = []

    def make(wrong: Callable[[str, bool], float]) -> tuple[Run, Config]:
        images = photographs.copy(tmp_path / "photographs")
        lines = [
            json.dumps({"file_name": path.name, "text": ", ".join(KNOWN[key]["facts"])})
            for key, path in images.items()
        ]
        (tmp_path / "photographs" / "metadata.jsonl").write_text("\n".join(lines))
        turns: dict[str, int] = defaultdict(int)

        def speak(name: str, key: str) -> str:
            turns[key] += 1
            k = turns[key] % SAMPLES
            facts = [text for at, text in enumerate(KNOWN[key]["facts"]) if at % SAMPLES != k]
            return ", ".join([*facts, *(text for at, text in enumerate(KNOWN[key]["false"]) if at % 3 == k)])

        def p_yes(name: str, key: str, question: str) -> float:
            text = normalise(question.removeprefix("Visible: ").removesuffix("?"))
            true = text in {normalise(fact) for fact in KNOWN[key]["facts"]}
            flip = chance(key, text) < wrong(kinds.kind_of(text), true)
            return 0.95 if true != flip else 0.05

        servers.append(Vllm(checkpoints, images, speak, p_yes))
        config = Config.model_validate(
            {
                "model": {"path": str(checkpoints["captioner"]), "device": "cpu"},
                "engine": {"type": "server", "urls": [servers[-1].url], "retries": 0, "in_flight": 1},
                "golden": {
                    "images": str(tmp_path / "photographs"), "samples": SAMPLES, "max_tokens": 900,
                    "sampling": {"max_tokens": 900}, "shard_rows": 5,
                },
            }
        )  # fmt: skip
        run = Run.open(tmp_path / "run", config)
        home = run.path / "round-1" / "qa"
        run.captioner_dir(0).parent.mkdir(parents=True)
        run.captioner_dir(0).symlink_to(checkpoints["captioner"])
        home.mkdir(parents=True)
        (home / "captioner").symlink_to(checkpoints["verifier"])
        calibration = qa.Calibration(temperature=1.0, keep=0.6, drop=0.4)
        (home / "calibration.json").write_text(calibration.model_dump_json())
        (home / "accuracy.json").write_text('{"all": {"accuracy": 0.95, "count": 500}}')
        (home / "stage.json").write_text("{}")
        return run, config

    yield make
    for server in servers:
        server.close()


def golden_round(run: Run, config: Config) -> Path:
    loop.golden(run.path, config, 1)
    return run.path / "round-1"


@pytest.mark.slow
def test_a_good_verifier_makes_true_captions(setting: Setting) -> None:
    home = golden_round(*setting(lambda kind, true: 0.02))
    decision = json.loads((home / "verifier.json").read_text())
    assert decision["passed"] and not decision["distrusted"]
    asked = Shards(home / "planted", Planted).read_all()
    assert {"stated", "swap", "other image"} == {row.stratum for row in asked}
    true = false = 0
    for row in Shards(home / "golden", Golden).read_all():
        facts = {normalise(text) for text in KNOWN[row.key]["facts"]}
        said = comparable_statements(row.text)
        true, false = true + len(facts & set(said)), false + len(set(said) - facts)
    total = sum(len(about["facts"]) for about in KNOWN.values())
    assert true / total > 0.9 and false / (true + false) < 0.05


@pytest.mark.slow
def test_a_verifier_that_believes_every_color_may_not_speak_of_colors(setting: Setting) -> None:
    run, config = setting(lambda kind, true: 0.9 if kind == "color" and not true else 0.02)
    home = golden_round(run, config)
    decision = json.loads((home / "verifier.json").read_text())
    assert set(decision["distrusted"]) == {"color"}
    row = decision["planted"]["kind color"]
    assert row["false_pass"] > 0.7 and row["false_veto"] < 0.1 and row["count"] >= qa.ENOUGH
    assert decision["planted"]["kind object"]["false_pass"] < 0.2

    claims = verdicts.read(home)
    assert {each.verdict for each in claims if each.kind == "color"} == {"abstain"}
    pairs = Shards(home / "pairs", Pair).read_all()
    asked = {(each.key, normalise(each.text)) for each in claims if each.kind == "color"}
    assert pairs and any(pair.refuted_in_rejected for pair in pairs)
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):  # the kind is in neither
            assert not {(pair.key, text) for text in comparable_statements(side)} & asked
    captions = Shards(home / "golden", Golden).read_all()
    silent = [each for each in captions if each.silent]
    assert silent
    for each in silent:
        assert each.sft_text is not None
        parts = dpo.silent_parts(each)
        read = "".join(each.sft_text[start:stop] for start, stop in parts)
        assert all(text in read for text in each.silent)
        learned, at = "", 0
        for start, stop in parts:
            learned, at = learned + each.sft_text[at:start], stop
        assert comparable_statements(learned + each.sft_text[at:]) == comparable_statements(each.text)


@pytest.mark.slow
def test_a_verifier_that_guesses_is_refused(setting: Setting) -> None:
    run, config = setting(lambda kind, true: 0.5)
    with pytest.raises(Refused, match=r"cannot be trusted: all: 0\.\d+ on \d+ planted claims"):
        golden_round(run, config)
