"""`captioner verify`: captions of real photographs that somebody else wrote, over an engine on HTTP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from captioner.config import Config
from captioner.engines import YesNo
from captioner.errors import RunError
from captioner.method import qa, verdicts
from captioner.method.verdicts import Thresholds
from captioner.method.verifier import Settings, Verifier, export, without_refuted
from captioner.records import CaptionRow, Claim, Planted, Verdict
from captioner.runs import Run, Shards
from captioner.statements import comparable_statements, normalise
from loops import cli
from tests import photographs, tiny
from tests.http_stand_in import Vllm

KNOWN = photographs.read()


def prose(key: str) -> str:
    """Facts and falsehoods in turn, as sentences with more than one statement each."""
    facts, false = KNOWN[key]["facts"], KNOWN[key]["false"]
    first, second = f"{facts[0].capitalize()}, {false[0]}, {facts[1]}", false[1].capitalize()
    return f"{first}. {second}. {facts[2].capitalize()}."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("verifier") / "captioner", seed=1).path


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path) -> Path:
    """A run whose round 1 exported its verifier."""
    made = Run.open(tmp_path / "run", Config())
    home = made.stage_dir("round-1")
    shutil.copytree(checkpoint, home / "qa" / "captioner")
    (home / "qa" / "calibration.json").write_text(
        qa.Calibration(temperature=1.0, keep=0.6, drop=0.4).model_dump_json()
    )
    rows = [
        Planted(
            sample="", key="", text=f"{i}", kind="count", stratum="", answer="no" if i % 2 else "yes",
            p_yes=0.1 if i % 2 else 0.4, label_mass=1.0,
        )
        for i in range(40)
    ]  # fmt: skip
    Shards(home / "planted", Planted).write(0, rows)
    thresholds = Thresholds(0.5, 0.3, {"style": "not trusted with style"}, {"size": "only refutes"})
    export(made, 1, home / "qa" / "captioner", home / "qa" / "calibration.json", thresholds)
    return made.path


@pytest.fixture
def server(tmp_path: Path, checkpoint: Path) -> Iterator[Vllm]:
    """A verifier that knows the photographs, and says yes to every style."""
    images = photographs.copy(tmp_path / "set")
    lines = [json.dumps({"file_name": path.name, "text": prose(key)}) for key, path in images.items()]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))

    def p_yes(name: str, key: str, question: str) -> float:
        text = normalise(question.removeprefix("Visible: ").removesuffix("?"))
        facts = {normalise(fact) for fact in KNOWN[key]["facts"]}
        return 0.97 if text in facts or "photograph" in text else 0.03

    made = Vllm({"verifier": checkpoint}, images, lambda name, key: "", p_yes)
    yield made
    made.close()


def served_by(server: Vllm) -> list[str]:
    """The flags of a server that is asked one thing at a time."""
    engine = {"type": "server", "urls": server.url, "retries": 3, "in_flight": 1}
    return [word for name, value in engine.items() for word in (f"--engine.{name}", str(value))]


Check = Callable[..., int]


@pytest.fixture
def check(tmp_path: Path, run: Path, server: Vllm) -> Check:
    def checked(*words: str) -> int:
        engine = served_by(server)
        place = ["--run", str(run), "--out", str(tmp_path / "out")]
        return cli.main(["verify", str(tmp_path / "set"), *place, *engine, "--model.device", "cpu", *words])

    return checked


def rows_of(out: Path) -> dict[str, CaptionRow]:
    return {row.key: row for row in Shards(out / "captions", CaptionRow).read_all()}


def test_refuted_statements_leave_and_the_rest_stays_word_for_word(
    tmp_path: Path, check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check() == 0
    rows = rows_of(tmp_path / "out")
    assert rows.keys() == KNOWN.keys()
    coffee = rows["coffee"]
    assert prose("coffee") == "Cup of coffee, cup of tea, red saucer. Blue saucer. Wooden table."
    assert coffee.caption == "Cup of coffee, red saucer. Wooden table."
    assert coffee.verdicts == ["keep", "drop", "keep", "drop", "keep"]
    for key, row in rows.items():
        facts = {normalise(text) for text in KNOWN[key]["facts"]}
        said = comparable_statements(row.caption or "")
        assert [text for text in comparable_statements(prose(key)) if text in facts] == [
            text for text in said if text in facts
        ]
        assert not [text for text in said if text not in facts and "photograph" not in text]
    claims = Shards(tmp_path / "out" / "claims", Claim).read_all()
    judged = Shards(tmp_path / "out" / "verdicts", Verdict).read_all()
    assert [(one.key, one.text) for one in claims] == [(one.key, one.text) for one in judged]
    styles = [row for claim, row in zip(claims, judged, strict=True) if claim.kind == "style"]
    assert styles and {(row.verdict, row.why) for row in styles} == {("abstain", "not trusted with style")}
    refuted = [row for row in judged if row.verdict == "drop"]
    assert refuted and all("below 0.300" in row.why or " has 0." in row.why for row in refuted)
    assert f"{len(refuted)} refuted" in capsys.readouterr().out


def test_flagged_captions_stay(tmp_path: Path, check: Check) -> None:
    assert check("--flag") == 0
    rows = rows_of(tmp_path / "out")
    assert all(row.caption == prose(key) and "drop" in (row.verdicts or []) for key, row in rows.items())


def test_what_cannot_be_checked_is_a_counted_row(tmp_path: Path, check: Check, server: Vllm) -> None:
    (tmp_path / "set" / "coffee.png").write_bytes(b"no image")
    lines = (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    for row in told:
        if row["file_name"] == "chelsea.png":
            row["text"] = "black cat, blue eyes"
        if row["file_name"] == "rocket.jpg":
            row["text"] = "a beautiful mood"
        if row["file_name"] == "page.png":
            del row["text"]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, told)))
    assert check("--max-failed", "0.05") == 3
    assert check("--max-failed", "0.5") == 0
    rows = rows_of(tmp_path / "out")
    assert rows["chelsea"].error == "every statement was refuted" and rows["chelsea"].caption is None
    assert (rows["rocket"].caption, rows["rocket"].statements) == ("a beautiful mood", [])
    assert rows["page"].error == "no caption"
    assert rows["coffee"].error is not None and rows["coffee"].caption is None


def test_the_same_command_goes_on_and_another_threshold_asks_nothing(
    tmp_path: Path, check: Check, run: Path, server: Vllm
) -> None:
    assert check() == 0
    asked = len(server.requests)
    before = rows_of(tmp_path / "out")
    assert check() == 0
    assert rows_of(tmp_path / "out") == before
    file = run / "verifier" / "verifier.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"distrusted": {}}))
    assert check() == 2  # stale
    assert len(server.requests) == asked


def test_without_a_verifier(
    tmp_path: Path, check: Check, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "verifier")
    assert check() == 2
    assert "captioner golden" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bulk_captions_are_checked_by_the_verifier_of_the_run(tmp_path: Path, run: Path) -> None:
    images = photographs.copy(tmp_path / "set")
    captioner = tiny.tiny_checkpoint(tmp_path / "captioner", seed=2).path

    def p_yes(name: str, key: str, question: str) -> float:
        assert name == "verifier"
        text = normalise(question.removeprefix("Visible: ").removesuffix("?"))
        return 0.97 if text in {normalise(fact) for fact in KNOWN[key]["facts"]} else 0.03

    verifier = run / "round-1" / "qa" / "captioner"
    server = Vllm({"captioner": captioner, "verifier": verifier}, images, lambda name, key: prose(key), p_yes)
    try:
        engine = served_by(server)
        words = ["caption", str(tmp_path / "set"), "--run", str(run), "--checkpoint", str(captioner), *engine]
        more = ["--caption.reduced_decode", "false", "--caption.sampling.max_tokens", "400"]
        assert cli.main([*words, "--out", str(tmp_path / "out"), "--drop-refuted", *more]) == 0
    finally:
        server.close()
    rows = {row.key: row for row in Shards(tmp_path / "out", CaptionRow).read_all()}
    assert rows["coffee"].caption == "Cup of coffee, red saucer. Wooden table."
    assert rows["coffee"].verdicts == ["keep", "drop", "keep", "drop", "keep"]
    assert rows["coffee"].p_true == pytest.approx([0.97, 0.03, 0.97, 0.03, 0.97], abs=1e-6)
    brick = rows["brick"]
    kinds = dict(zip(brick.statements or [], brick.p_true or [], strict=True))
    assert brick.caption is not None and None not in kinds.values()
    assert rows.keys() == KNOWN.keys() and not any(row.error for row in rows.values())


def test_an_exported_captioner_brings_its_verifier(tmp_path: Path, run: Path) -> None:
    tiny.tiny_checkpoint(run / "sft" / "captioner", seed=2)
    out = tmp_path / "model"
    assert cli.main(["export", "--out", str(out), "--run", str(run)]) == 0
    before, made = Verifier.load(run), Verifier.load(out)
    assert made.hash == before.hash
    same = {"checkpoint": before.settings.checkpoint}
    assert made.settings.model_copy(update=same) == before.settings
    shutil.rmtree(run)  # nothing leads back to it
    images = dict(list(photographs.copy(tmp_path / "set").items())[:3])
    for path in set((tmp_path / "set").iterdir()) - set(images.values()):
        path.unlink()
    turns: dict[str, int] = {}

    def speak(name: str, key: str) -> str:
        turns[key] = turns.get(key, 0) + 1
        return prose(key) if turns[key] % 2 else ", ".join(KNOWN[key]["facts"])

    def p_yes(name: str, key: str, question: str) -> float:
        assert name == "verifier"
        text = normalise(question.removeprefix("Visible: ").removesuffix("?"))
        return 0.97 if text in {normalise(fact) for fact in KNOWN[key]["facts"]} else 0.03

    server = Vllm({"captioner": out, "verifier": out / "verifier" / "checkpoint"}, images, speak, p_yes)
    try:
        words = ["caption", str(tmp_path / "set"), "--checkpoint", str(out), "--out", str(tmp_path / "out")]
        words += ["--run", str(tmp_path / "other"), "--verify", "--caption.best_of", "2"]
        words += ["--caption.sampling.temperature", "1", "--caption.sampling.max_tokens", "400"]
        words += ["--engine.type", "server", "--engine.urls", server.url, "--engine.in_flight", "1"]
        assert cli.main([*words, "--caption.reduced_decode", "false"]) == 0
    finally:
        server.close()
    rows = {row.key: row for row in Shards(tmp_path / "out", CaptionRow).read_all()}
    assert rows.keys() == images.keys()
    for key, row in rows.items():  # of two samples the true one stays
        assert comparable_statements(row.caption or "") == [normalise(text) for text in KNOWN[key]["facts"]]
        assert (
            {"keep"} <= set(row.verdicts or []) <= {"keep", "abstain"}
        )  # what it is trusted with goes along


# ---------------------------------------------------------------- the verifier by itself


def test_a_verifier_is_loaded_with_what_the_round_found(run: Path) -> None:
    verifier = Verifier.load(run)
    assert verifier.checkpoint == (run / "round-1" / "qa" / "captioner").resolve()
    assert Verifier.load(run / "verifier").settings == verifier.settings
    assert set(verifier.settings.tells) == {"count"}
    said = ["two cups", "red cup", "black and white photograph", "small cup"]
    answers = [YesNo(p, 1.0) for p in (0.4, 0.4, 0.9, 0.9)]
    judged = verifier.judge(verifier.claims("s", "k", said, answers))
    # 0.4 is a high answer of this verifier to a count, and as it stands to a color
    assert [claim.verdict for claim in judged] == ["keep", "abstain", "abstain", "abstain"]
    assert judged[1].p_true == pytest.approx(0.4) and judged[2].p_true is None
    refuted = verifier.judge(
        verifier.claims("s", "k", ["blue cup", "red bowl"], [YesNo(0.1, 1), YesNo(0.9, 1)])
    )
    assert (
        without_refuted(
            "A blue cup,  a red bowl.", [claim.text for claim in refuted if claim.verdict == "drop"]
        )
        == "a red bowl."
    )


@pytest.mark.parametrize("damage", ["checkpoint", "settings", "decision of a round"])
def test_a_damaged_verifier_is_named(run: Path, damage: str) -> None:
    place = run
    if damage == "checkpoint":
        shutil.rmtree(run / "round-1" / "qa" / "captioner")
    elif damage == "settings":
        (run / "verifier" / "verifier.json").write_text('{"checkpoint": 1}')
    else:
        place = run / "round-1"
        (place / "verifier.json").write_text("{}")
    with pytest.raises(RunError):
        Verifier.load(place)


def test_the_settings_are_small_and_say_everything(run: Path) -> None:
    text = (run / "verifier" / "verifier.json").read_text()
    settings = Settings.model_validate_json(text)
    assert settings.checkpoint == "../round-1/qa/captioner" and len(text) < 1000
    assert verdicts.tells([]) == {}
