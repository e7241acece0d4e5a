"""The gate on real photographs, from the files over an engine on HTTP to gate.json and the report."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from captioner.config import Config
from captioner.errors import ConfigError, Refused
from captioner.judges import facts as facts_judge
from captioner.judges.checked import Answers
from captioner.report.report import render_html
from captioner.report.review import add, choose
from captioner.runs import Run
from captioner.statements import normalise
from loops import cli, iterate, report, review
from tests import photographs, tiny
from tests.http_stand_in import Vllm

KNOWN = photographs.read()
Setting = Callable[..., tuple[Run, Vllm]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("base", "start", "made", "verifier")):
        tiny.tiny_checkpoint(home / name, seed=seed)
    return {path.name: path for path in sorted(home.iterdir())}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return photographs.copy(tmp_path_factory.mktemp("images") / "photographs")


@pytest.fixture(scope="module")
def server(checkpoints: dict[str, Path], images: dict[str, Path]) -> Iterator[Vllm]:
    playing = Vllm(checkpoints, images, lambda name, key: "")
    yield playing
    playing.close()


@pytest.fixture
def setting(tmp_path: Path, checkpoints: dict[str, Path], images: dict[str, Path], server: Vllm) -> Setting:
    """A run at its gate: the captioner of round 1 beside the one it started from, on photographs."""

    def make(
        before: Callable[[str], list[str]], after: Callable[[str], list[str]], **judge: str
    ) -> tuple[Run, Vllm]:
        say = {"base": lambda key: [f"There is a {facts(key)[0]}."], "start": before, "made": after}
        server.speak = lambda name, key: ", ".join(say[name](key))
        run_dir = tmp_path / "run"
        config = Config.model_validate(
            {
                "model": {"path": str(checkpoints["base"]), "device": "cpu"},
                "engine": {"type": "server", "urls": [server.url], "in_flight": 4},
                "gate": {
                    "data": str(images["coffee"].parent),
                    "judge": {"train": False, **judge},
                    "max_length_ratio": 4.0,
                },
                "evaluate": {"bootstrap": 500, "max_tokens": 400},
            }
        )
        run = Run.open(run_dir, config)
        shutil.copytree(checkpoints["start"], run.captioner_dir(0))
        shutil.copytree(checkpoints["made"], run.captioner_dir(1))
        return run, server

    return make


def facts(key: str) -> list[str]:
    return list(KNOWN[key]["facts"])


def nonsense(key: str) -> list[str]:
    """As many statements as there are facts, and none of them true."""
    return list(photographs.NONSENSE[: len(KNOWN[key]["facts"])])


@pytest.mark.slow
def test_nonsense_without_a_judge_is_refused(setting: Setting) -> None:
    run, _ = setting(facts, nonsense)
    with pytest.raises(Refused) as refusal:
        iterate.gate(run, 1)
    message = str(refusal.value)
    assert refusal.value.exit_code == 3
    assert "no judge can tell whether the captions are true" in message
    assert f"{len(KNOWN)} of {len(KNOWN)} images" in message
    assert "captioner iterate --round 1 --accept-unjudged" in message
    gate = json.loads((run.path / "round-1" / "gate.json").read_text())
    assert (gate["promoted"], gate["unjudged"]) == (False, True)
    assert run.newest_captioner() == run.captioner_dir(0)


@pytest.mark.slow
def test_a_round_is_accepted_unjudged_on_the_users_word(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = setting(facts, facts)
    iterate.gate(run, 1, accept_unjudged=True)
    assert "round 1 is promoted unjudged" in capsys.readouterr().out
    gate = json.loads((run.path / "round-1" / "gate.json").read_text())
    assert (gate["promoted"], gate["unjudged"]) == (True, True)
    assert any("accepted unjudged" in reason for reason in gate["reasons"])
    assert run.newest_captioner() == run.captioner_dir(1)
    assert "Gate: promoted unjudged" in render_html(report.collect(run, 12))


@pytest.mark.slow
def test_the_users_word_is_no_word_for_loops(setting: Setting) -> None:
    run, _ = setting(facts, lambda key: facts(key)[:3] * 2)
    with pytest.raises(Refused, match="repeated share"):
        iterate.gate(run, 1, accept_unjudged=True)


# ---------------------------------------------------------------- with a list of facts per image


def half_wrong(key: str) -> list[str]:
    """Four facts, and two plausible falsehoods between them."""
    true, false = facts(key), KNOWN[key]["false"]
    return [true[0], false[0], true[1], true[2], false[1], true[3]]


def better(key: str) -> list[str]:
    """More facts, and fewer falsehoods."""
    return [*facts(key), KNOWN[key]["false"][0]]


def talkative(key: str) -> list[str]:
    """The same facts, and everything else that somebody might have photographed."""
    return [*half_wrong(key), *KNOWN[key]["false"][2:], *photographs.NONSENSE]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "promoted"), [(better, True), (nonsense, False), (talkative, False), (half_wrong, False)]
)
def test_lists_of_facts_decide(
    setting: Setting, after: Callable[[str], list[str]], promoted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = setting(half_wrong, after, facts=str(photographs.FILE))
    if promoted:
        iterate.gate(run, 1)
    else:
        with pytest.raises(Refused, match="the gate refused round 1"):
            iterate.gate(run, 1)
    gate = json.loads((run.path / "round-1" / "gate.json").read_text())
    assert (gate["promoted"], gate["judge"], gate["unjudged"]) == (promoted, "facts", False)
    assert "judge: facts" in " ".join(capsys.readouterr().out.split())


def test_images_without_facts_are_named(setting: Setting, tmp_path: Path) -> None:
    lines = photographs.FILE.read_text().splitlines()
    (tmp_path / "facts.jsonl").write_text("\n".join(lines[2:]))
    run, _ = setting(half_wrong, better, facts=str(tmp_path / "facts.jsonl"))
    with pytest.raises(Refused, match=r"2 of 18 images have no known facts \(astronaut, brick\)"):
        iterate.gate(run, 1)


def test_the_flag_reaches_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        iterate, "run_round", lambda *args, accept_unjudged, **flags: seen.append(accept_unjudged)
    )
    Run.open(tmp_path / "run", Config())
    (tmp_path / "run" / "sft" / "captioner").mkdir(parents=True)
    for words in ([], ["--accept-unjudged"]):
        assert cli.main(["iterate", "--run", str(tmp_path / "run"), *words]) == 0
    assert seen == [False, True]


# ---------------------------------------------------------------- with people's answers


def test_people_judge_once_they_have_answered_enough(setting: Setting) -> None:
    """Refused, reviewed, promoted: `captioner review --gate` shows what both say of the gate's images."""
    run, _ = setting(half_wrong, better)
    with pytest.raises(Refused, match=r"captioner review --gate --round 1"):
        iterate.gate(run, 1)
    claims, folder = review._stated(run, 1)
    assert str(folder) == run.config.gate.data
    texts = {(each.key, each.text) for each in claims}
    assert texts == {(key, normalise(text)) for key in KNOWN for text in [*half_wrong(key), *better(key)]}
    listed = facts_judge.read_file(photographs.FILE)
    items = choose(claims, len(claims), seed=0)
    answers = Answers(review.answers_path(run.path, 1, gate=True))
    for item in items[: len(items) // 2]:
        add(answers, item, "yes" if listed[KNOWN[item.key]["file_name"]].holds(item.text) else "no")
    with pytest.raises(Refused, match=r"people have not answered \d+ statements of start"):
        iterate.gate(run, 1)
    for item in items[len(items) // 2 :]:
        add(answers, item, "yes" if listed[KNOWN[item.key]["file_name"]].holds(item.text) else "no")
    answers.close()
    iterate.gate(run, 1)
    gate = json.loads((run.path / "round-1" / "gate.json").read_text())
    assert (gate["promoted"], gate["judge"]) == (True, "checked")
    file = review.answers_path(run.path, 1, gate=True)  # answers about other images of the same names
    file.write_text(re.sub('"sample": "[0-9a-f]+"', '"sample": "other"', file.read_text()))
    with pytest.raises(Refused, match="no judge can tell"):
        iterate.gate(run, 1)


# ---------------------------------------------------------------- with a verifier that errs


@pytest.fixture
def judge(tmp_path: Path, checkpoints: dict[str, Path]) -> Path:
    """A verifier as a QA stage leaves it: its checkpoint, and how well it answers held-out questions."""
    stage = tmp_path / "judge"
    shutil.copytree(checkpoints["verifier"], stage / "captioner")
    (stage / "calibration.json").write_text('{"temperature": 1.0, "keep": 0.5, "drop": 0.5}')
    (stage / "accuracy.json").write_text('{"all": {"accuracy": 0.93, "count": 400, "recall": 0.95}}')
    return stage / "captioner"


def erring(missed: float, false_pass: float) -> Callable[[str, str, str], float]:
    """A verifier that errs at these rates, the same way each time."""
    listed = facts_judge.read_file(photographs.FILE)
    lists = {Path(name).stem: each for name, each in listed.items()}

    def p_yes(name: str, key: str, question: str) -> float:
        assert name == "verifier"
        text = question.removeprefix("Visible: ").removesuffix("?")
        holds, draw = bool(lists[key].holds(text)), random.Random(f"{key} {text}").random()
        return 0.95 if draw >= (missed if holds else 1 - false_pass) else 0.05

    return p_yes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "promoted"), [(better, True), (nonsense, False), (talkative, False), (half_wrong, False)]
)
def test_a_verifier_decides(
    setting: Setting,
    judge: Path,
    after: Callable[[str], list[str]],
    promoted: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the user's own assumption: eighteen photographs are too few for the default's."""
    run, server = setting(half_wrong, after, checkpoint=str(judge), samples="1", false_pass="0.5")
    server.p_yes = erring(missed=0.05, false_pass=0.1)
    if promoted:
        iterate.gate(run, 1)
    else:
        with pytest.raises(Refused, match="the gate refused round 1"):
            iterate.gate(run, 1)
    gate = json.loads((run.path / "round-1" / "gate.json").read_text())
    assert (gate["promoted"], gate["judge"], gate["unjudged"]) == (promoted, "verifier", False)
    assert any("accuracy 0.930 on 400 held-out questions" in note for note in gate["notes"])
    assert "judge: verifier" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_few_photographs_do_not_outweigh_the_assumed_rate(
    setting: Setting, judge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, server = setting(half_wrong, better, checkpoint=str(judge), samples="1")
    server.p_yes = erring(missed=0.05, false_pass=0.1)
    with pytest.raises(Refused, match="the gate refused round 1"):
        iterate.gate(run, 1)
    notes = " ".join(json.loads((run.path / "round-1" / "gate.json").read_text())["notes"])
    assert "0.75 is assumed" in notes and "checked false claims" in notes and "captioner review" in notes


@pytest.mark.slow
def test_a_verifier_is_asked_once(setting: Setting, judge: Path) -> None:
    run, server = setting(half_wrong, better, checkpoint=str(judge), samples="1", false_pass="0.5")
    server.p_yes = erring(missed=0.05, false_pass=0.1)
    iterate.gate(run, 1)
    first, asked = (run.path / "round-1" / "gate.json").read_text(), len(server.requests)
    iterate.gate(run, 1)
    assert (run.path / "round-1" / "gate.json").read_text() == first
    assert len(server.requests) == asked


def test_nobody_judges_what_he_has_taught(setting: Setting, judge: Path) -> None:
    run, _ = setting(half_wrong, better, checkpoint=str(judge))
    shutil.copytree(judge, run.path / "round-1" / "qa" / "captioner")
    with pytest.raises(ConfigError, match="made golden captions"):
        iterate.gate(run, 1)
