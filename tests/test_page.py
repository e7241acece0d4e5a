"""The page of a job: what it says, that hostile words stay words, and that it does not grow with the job."""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from captioner.config import CaptionConfig
from captioner.files import row_seed
from captioner.pipeline.output import PAGE, PAGE_STATE, THUMBNAILS, Output, Tally
from captioner.pipeline.page import REPEATED, SHOWN, Page, Summary, Thumbnails, bars
from captioner.pipeline.watch import Watch
from captioner.records import CaptionRow
from captioner.views import Cut, View
from tests import browser, test_resume
from tests.test_resume import Job

job = test_resume.job  # a fixture
HOSTILE = (
    "<script>document.title='live'</script>",
    "</bdi></p><img src=x onerror=document.title='live'>",
    "{{ 7 * 7 }}{% for x in y %}",
    "\u202egnp.live",
    "javascript:alert(1)' onmouseover='document.title=1",
    "http://example.invalid/a.png",
)


def row(
    number: int, caption: str | None, key: str = "", tokens: int = 3, error: str | None = None
) -> CaptionRow:
    sha = f"{row_seed(0, number):08x}" * 8
    made = dict(caption=caption, finish_reason="stop", tokens=tokens, model="m", config="c", error=error)
    return CaptionRow(id=sha, key=key or f"k{number}", fault="image" if error else None, **made)


def publish(output: Output, part: int, rows: list[CaptionRow]) -> None:
    output.shards.write(part, rows)
    output.enter(part, Tally.of(rows))


def written(output: Output, state: str = "running") -> Page:
    """The page of an output as it is."""
    page = Page(output)
    bar = SimpleNamespace(advance=lambda count: None)
    watch = Watch(CaptionConfig(), output, shards=9, images=1000, bar=bar, page=page)  # type: ignore[arg-type]
    watch.say("worker 0 died (<b>SIGKILL</b>)")
    watch.tick(state=state, force=True)
    return page


def cut(shade: int) -> Cut:
    whole = View("whole", (0, 0, 600, 300), 600, 300)
    return Cut((600, 300), {whole: Image.new("RGB", (600, 300), (shade, 90, 160))})


@pytest.mark.slow
def test_a_page_of_hostile_words_in_a_browser(tmp_path: Path) -> None:
    output = Output(tmp_path)
    rows = [row(n, text, key=text, tokens=10 * n) for n, text in enumerate(HOSTILE * 3)]
    failed = [row(100 + n, None, error=text) for n, text in enumerate(HOSTILE)]
    publish(output, 0, rows + failed)
    thumbnails = Thumbnails(tmp_path)
    for number, one in enumerate(rows):
        thumbnails.offer(one.id, cut(10 * number))
    written(output)
    with browser.page() as view:
        view.goto((tmp_path / PAGE).as_uri())
        assert view.title() == f"running: {tmp_path.name}"
        cards = view.locator(".grid li")
        assert cards.count() == len(rows)
        said = Counter(cards.locator("p:first-of-type").all_inner_texts())
        assert said == Counter(HOSTILE * 3)
        widths = view.eval_on_selector_all(".grid img", "images => images.map(i => i.naturalWidth)")
        assert widths == [160] * len(rows)
        assert view.locator("script, img[onerror], [onmouseover], a").count() == 0
        assert view.locator("table").first.inner_text().count("\n") == len(HOSTILE) - 1  # reasons
        assert view.locator("h2:has-text('repeated') + table tr").count() == 1 + len(HOSTILE)
        assert "<b>SIGKILL</b>" in view.locator(".warnings").inner_text()
        if "CAPTIONER_SCREENSHOTS" in os.environ:
            view.screenshot(path=f"{os.environ['CAPTIONER_SCREENSHOTS']}/job.png", full_page=True)


def test_memory_and_page_do_not_grow_with_the_job() -> None:
    dice, summary, sizes = random.Random(3), Summary(), []
    for part in range(40):
        rows = [row(part * 1000 + n, f"a caption {dice.random()}" * 3) for n in range(500)]
        rows[::5] = [row(part * 1000 + 500 + n, "a photo") for n in range(100)]
        summary.add(part, rows)
        sizes.append(len(json.dumps(summary.values())))
    assert max(sizes[5:]) < 1.1 * sizes[4]
    assert len(summary.repeated) <= REPEATED and len(summary.sample) == SHOWN
    [(text, count)] = summary.repeated.most_common(1)
    assert text == "a photo" and 4000 - 20_000 / REPEATED <= count <= 4000
    assert summary.parts == set(range(40)) and summary.values()["parts"] == [(0, 39)]


@pytest.mark.slow
def test_a_job_in_pieces_has_the_page_of_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample, the lengths and the repeated captions; a part that is made again is counted anew."""
    monkeypatch.setattr(
        "captioner.pipeline.page.SLICE", math.inf
    )  # a busy machine reads nothing in half a second
    parts = [[row(10 * part + n, f"caption {n % 4}", tokens=n) for n in range(10)] for part in range(15)]
    (tmp_path / "whole").mkdir()
    whole = Output(tmp_path / "whole")
    for number, rows in enumerate(parts):
        publish(whole, number, rows)
    (tmp_path / "pieces").mkdir()
    for number in random.Random(1).sample(range(15), 15):
        pieces = Output(tmp_path / "pieces")
        publish(pieces, number, parts[number])
        written(pieces)
    assert written(pieces).summary.values() == written(whole).summary.values()
    publish(pieces, 4, [row(5, None, error="x")])
    again = Output(tmp_path / "pieces")
    again.retry(every=True)
    written(again)  # as a job does before it begins
    publish(again, 4, parts[4])
    assert written(again).summary.values() == written(whole).summary.values()
    (tmp_path / "pieces" / PAGE_STATE).write_text("[broken")
    assert written(again).summary.values() == written(whole).summary.values()


@pytest.mark.slow
def test_thumbnails_stay_a_hundred(tmp_path: Path) -> None:
    output = Output(tmp_path)
    for part in range(4):
        rows = [row(part * 1000 + n, "x") for n in range(100)]
        for half in (rows[:50], rows[50:]):
            thumbnails = Thumbnails(tmp_path)  # of a worker that was started anew
            for one in half:
                thumbnails.offer(one.id, cut(1))
        publish(output, part, rows)
    written(output)
    shown = sorted(sha for part in range(4) for sha in (one.id for one in output.shards.read(part)))[:SHOWN]
    assert sorted(path.stem for path in (tmp_path / THUMBNAILS).iterdir()) == shown


def test_lengths_are_drawn_in_equal_ranges() -> None:
    assert bars({}) == []
    assert bars({0: 1, 2: 5}) == [(0, 0, 1), (1, 1, 0), (2, 2, 5)]
    assert bars({3: 1, 301: 2})[0] == (0, 10, 1) and bars({3: 1, 301: 2})[-1] == (297, 307, 2)


def test_a_job_writes_its_page(job: Job) -> None:
    assert job.run() == 0
    page = (job.out / PAGE).read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") == 10 and 'http-equiv="refresh"' not in page
    assert "<title>done: out</title>" in page
    assert job.run("--redo") == 0 and (job.out / PAGE).read_text(encoding="utf-8").count("<img") == 10
