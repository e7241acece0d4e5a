"""captioner review: the choice of claims, answers that survive kills, statistics, the page in a browser."""

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect
from skimage import data
from statsmodels.stats.proportion import proportion_confint

from captioner.config import Config
from captioner.errors import ConfigError, DataError, RunError
from captioner.judges import checked as judged
from captioner.records import CaptionRow, Claim, write_parquet
from captioner.report import review
from captioner.runs import Run, Shards
from loops.review import answers_path
from tests import browser

PHOTOS = {"astronaut": data.astronaut, "cat": data.chelsea, "coffee": data.coffee, "rocket": data.rocket}


def claim(key: str, text: str, kind: str = "object", p_yes: float = 0.8, view: str = "all") -> Claim:
    return Claim(
        sample=f"{key}-sha",
        key=key,
        text=text,
        kind=kind,
        candidates=[0],
        question=f"Is there {text}?",
        expected="yes",
        p_yes=p_yes,
        label_mass=1.0,
        verdict="keep",
        verifier="v",
        view=view,
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose first round made claims about photographs."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, read in PHOTOS.items():
        Image.fromarray(read()[..., :3]).save(photos / f"{name}.jpg")
    run = Run.open(tmp_path / "run", Config())
    stage = run.stage("round-1/candidates", {}, {"images": photos})
    stage.finish({"images": len(PHOTOS)})
    stage = run.stage("round-1/claims", {}, {})
    texts = {"cat": "a cat", "coffee": "a cup", "rocket": "a rocket", "astronaut": "a flag"}
    claims = [claim(key, text) for key, text in texts.items()]
    claims += [claim(key, f"an orange {key}", "color", 0.2, "center") for key in texts]
    Shards(stage.dir, Claim).write(0, claims)
    stage.finish({"claims": len(claims)})
    return run


@contextmanager
def reviewing(run: Run, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The real command in a process of its own, and the address it prints."""
    command = [sys.executable, "-c", "import sys; from loops.cli import main; sys.exit(main())", "review"]
    process = subprocess.Popen(
        [*command, "--run", str(run.path), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + process.stderr.read()
        yield found[0], process
    finally:
        process.kill()
        process.communicate()


def test_claims_are_chosen_evenly_over_kinds_and_probabilities() -> None:
    claims = [claim(f"{i}", f"thing {i}", "object", 0.95) for i in range(500)]
    claims += [claim(f"{i}", f"thing {i}", "object", 0.05) for i in range(500, 510)]
    claims += [claim(f"{i}", f"color {i}", "color", 0.6) for i in range(10)]
    items = review.choose(claims, 24, seed=3)
    assert Counter((item.kind, item.p_yes) for item in items) == {
        ("object", 0.95): 8, ("object", 0.05): 8, ("color", 0.6): 8
    }  # fmt: skip
    assert items == review.choose(reversed(claims), 24, seed=3)
    assert items != review.choose(claims, 24, seed=4)
    assert len({item.id for item in review.choose(claims * 2, 5000, seed=0)}) == 520


@pytest.mark.parametrize("successes, trials", [(0, 3), (5, 5), (47, 50), (180, 200)])
def test_interval_is_wilsons(successes: int, trials: int) -> None:
    expected = proportion_confint(successes, trials, method="wilson")
    assert review.interval(successes, trials) == pytest.approx(expected, abs=1e-9)


def test_more_needed_is_the_first_count_that_decides() -> None:
    for successes, trials, limit in ((0, 0, 0.9), (19, 20, 0.9), (8, 10, 0.9), (50, 50, 0.9)):
        more = review.more_needed(successes, trials, limit)
        assert more is not None
        rate = successes / trials if trials else 1.0

        def decided(count: int, rate: float = rate, limit: float = limit) -> bool:
            low, high = proportion_confint(rate * count, count, method="wilson")
            return low > limit or high < limit

        assert decided(trials + more)
        assert more == 0 or trials + more == 20 or not decided(trials + more - 1)
    assert review.more_needed(90, 100, 0.9) is None


def test_answers_measure_the_verifier_of_a_later_round(run: Run, tmp_path: Path) -> None:
    """What golden.planted makes of review/round-N.jsonl: questions about the images of that round."""
    file = answers_path(run.path, 1)
    answers = judged.Answers(file)
    for item in review.choose(Shards(run.stage_dir("round-1/claims"), Claim).read_all(), 8, seed=0):
        told = {"cat": "cannot tell", "rocket": "no"}.get(item.key, "yes")
        review.add(answers, item, told)
    answers.close()
    rows = judged.as_questions(file)
    assert rows is not None and {row.key: row.path.name for row in rows} == {
        key: f"{key}.jpg" for key in ("astronaut", "coffee", "rocket")
    }
    asked = {(row.key, q["question"]): (q["answer"], q["kind"]) for row in rows for q in row.questions or []}
    assert asked["coffee", "a cup"] == ("yes", "object")
    assert asked["rocket", "an orange rocket"] == ("no", "color") and len(asked) == 6
    assert judged.as_questions(tmp_path / "claims.jsonl") is None
    moved = tmp_path / "review" / "round-1.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="the images of these answers are not there"):
        judged.as_questions(moved)


def test_agreement_counts_passes_and_vetoes_apart() -> None:
    def checked(p_yes: float, answer: str, expected: str = "yes") -> judged.Checked:
        return judged.Checked("s", "k", "t", "object", "q", expected, p_yes, answer)

    rows = [checked(0.9, "yes")] * 16 + [checked(0.9, "no")] * 13 + [checked(0.1, "yes")] * 2
    rows += [checked(0.1, "no", expected="no"), checked(0.5, "cannot tell")]
    found = review.agreements(rows, 0.9)[0]
    assert (found.asked, found.cannot_tell, found.agree) == (32, 1, 17)
    assert (found.false_pass, found.false_veto, found.decided) == (13, 2, "below")


def test_answers_outlive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    item = review.choose([claim("cat", "a cat")], 1, 0)[0]
    answers = judged.Answers(path)
    review.add(answers, item, "yes")
    answers.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "torn", "answ')
    answers = judged.Answers(path)
    assert list(answers.rows) == [item.id] and path.read_bytes() == whole
    assert answers.undo() == item.id and answers.undo() is None
    answers.close()
    assert judged.read_checked(path) == []
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataError, match="Line 1"):
        judged.Answers(path)


def test_a_caption_pair_is_shown_in_both_orders() -> None:
    first = {str(i): "a" for i in range(200)}
    pairs = review.pair_up(first, {key: "b" for key in first} | {"0": "a"}, 500, seed=0)
    assert len(pairs) == 199 and 60 < sum(pair.swapped for pair in pairs) < 140
    answers = [{"answer": "second"}] * 6 + [{"answer": "first"}] * 2 + [{"answer": "tie"}] * 2
    result = review.win_rate(answers)
    assert result["win_rate"] == pytest.approx(0.7)
    assert (result["low"], result["high"]) == pytest.approx(
        proportion_confint(6, 8, method="wilson"), abs=1e-9
    )


@pytest.mark.slow
def test_claims_are_answered_by_keyboard_and_survive_a_kill(run: Run, tmp_path: Path) -> None:
    path = answers_path(run.path, 1)
    with browser.page() as page:
        with reviewing(run) as (address, process):
            page.goto(address)
            expect(page.locator("#question")).not_to_be_empty()
            shown = page.locator("#image")
            assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
            questions = []
            for number, key in enumerate("ync"):
                questions.append(page.inner_text("#question"))
                page.keyboard.press(key)
                expect(page.locator("#count")).to_have_text(f"{number + 1} of 8")
            page.screenshot(path=tmp_path / "review.png")
            process.send_signal(signal.SIGKILL)
            process.wait()
            page.keyboard.press("y")
            expect(page.locator("#error")).to_contain_text("Not saved")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["question"] for row in rows] == questions
        assert [row["answer"] for row in rows] == ["yes", "no", "cannot tell"]
        with reviewing(run) as (address, process):
            page.goto(address)
            expect(page.locator("#count")).to_have_text("3 of 8")
            assert page.inner_text("#question") not in questions
            page.keyboard.press("u")
            expect(page.locator("#count")).to_have_text("2 of 8")
            assert page.inner_text("#question") == questions[2]
            for number in range(2, 8):
                page.click("[data-answer=yes]")
                expect(page.locator("#count")).to_have_text(f"{number + 1} of 8")
            assert "All claims are answered" in page.inner_text("#question")
            assert "color" in page.inner_text("#table")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
    summary = json.loads(path.with_suffix(".json").read_text())
    assert summary["kinds"][0]["kind"] == "all" and summary["kinds"][0]["asked"] == 8
    assert len(judged.read_checked(path)) == 8


def test_only_the_reviewer_reaches_the_page(run: Run) -> None:
    with reviewing(run) as (address, _):
        host = address.split("/")[2]
        assert httpx.get(f"http://{host}/").status_code == 404
        assert httpx.get(f"http://{host}/{'x' * 32}/next").status_code == 404
        assert httpx.get(address + "next", headers={"Host": "evil.example"}).status_code == 400
        shown = httpx.get(address + "next").json()
        assert "p_yes" not in json.dumps(shown)
        for body in (
            {"item": 99, "answer": "yes"},
            {"item": True, "answer": "yes"},
            {"item": 0, "answer": "x"},
            [],
        ):
            assert httpx.post(address + "answer", json=body).status_code == 400
        assert httpx.get(address + "image/99").status_code == 404
        assert "default-src 'self'" in httpx.get(address).headers["content-security-policy"]
    assert answers_path(run.path, 1).read_text() == ""


@pytest.mark.slow
def test_two_captioners_are_compared(run: Run, tmp_path: Path) -> None:
    for name in ("old", "new"):
        rows = [
            CaptionRow(
                id=key,
                key=key,
                caption=f"{name} {key}",
                finish_reason="stop",
                tokens=2,
                model="m",
                config="c",
            )
            for key in PHOTOS
        ]
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "00000.parquet", rows, CaptionRow)
    pairs = ["--pairs", str(tmp_path / "old"), str(tmp_path / "new"), "--images", str(tmp_path / "photos")]
    with browser.page(width=420) as page, reviewing(run, *pairs) as (address, process):
        page.goto(address)
        for number in range(4):
            expect(page.locator("#count")).to_have_text(f"{number} of 4")
            new_is_left = page.inner_text("#left").startswith("new")
            page.keyboard.press("ArrowLeft" if new_is_left else "ArrowRight")
        expect(page.locator("#count")).to_have_text("4 of 4")
        assert "100 %" in page.inner_text("#note")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    result = json.loads(
        answers_path(run.path, 0, [tmp_path / "old", tmp_path / "new"]).with_suffix(".json").read_text()
    )
    assert result["win_rate"] == 1.0 and result["images"] == 4


def test_a_round_without_claims_is_an_error(tmp_path: Path, run: Run) -> None:
    from loops.review import review_claims as verb

    with pytest.raises(RunError, match="no claims yet"):
        verb(run, 2)
    with pytest.raises(ConfigError, match="No claim is of kind 'mood'"):
        verb(run, 1, kind="mood")
