"""The report: self-contained, escaped, true to its numbers, and usable in a real browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from skimage import data

from captioner.config import Config
from captioner.errors import DataError, RunError
from captioner.files import atomic_write_json
from captioner.judges import metrics
from captioner.records import Candidate, CaptionRow, Claim, Golden, Verdict
from captioner.report import report
from captioner.report.report import ClaimShown, Curve, ImageShown, Report, RoundShown
from captioner.runs import Run, Shards
from loops.report import collect
from loops.report import report as write_report
from tests import browser

EVIL = "<script>alert('x')</script>\" onload='y' & </style></script>"
VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


PHOTO = report.thumbnail(Image.fromarray(data.coffee()))


def scores(true: int, false: int, facts: int = 10) -> dict[str, object]:
    """Metrics of five captions with so many true and false statements each."""
    values = dict.fromkeys(metrics.COLUMNS, 0) | {"captions": 1, "true": true, "false": false, "facts": facts}
    values |= {"statements": true + false, "recalled": true, "ended": 1, "tokens": 20}
    rows = [metrics.Counts(str(i), True, tuple(values.values())) for i in range(5)]
    return {name: value.to_json() for name, value in metrics.evaluate(rows, resamples=100).items()}


def evaluation(name: str = "round 1") -> dict[str, object]:
    wide = {"precision by kind": {name: {"value": 0.5, "low": 0.4, "high": 0.6}}}
    captioners = [
        {"name": "SFT", "metrics": scores(5, 5), "breakdown": wide},
        {"name": name, "metrics": scores(6, 2), "breakdown": wide},
    ]
    return {"data": name, "images": 5, "captioners": captioners}


def image(key: str, text: str = "a red cup", **other: object) -> ImageShown:
    claim = ClaimShown(text, "object", f"Visible: {text}?", 0.91, "keep", "said twice", 2)
    about = {"samples": [text], "claims": [claim], "golden": text, "captions": [("SFT", text)]} | other
    return ImageShown(key, "round 1", PHOTO, 600, 400, [("whole", (0, 0, 600, 400))], **about)  # type: ignore[arg-type]


def full_report(text: str = "round 1", images: int = 3) -> Report:
    accuracy = {
        "threshold": 0.5,
        "kinds": {text: {"accuracy": 0.93, "count": 12}},
        "all": {"accuracy": 0.9},
    }
    gate = {"promoted": True, "reasons": [text]}
    verifier = {"passed": True, "reasons": [text], "planted": {text: {"accuracy": 0.5}}}
    flow = {text: {"keep": 3, "drop": 1}, "other": {"abstain": 2}}
    one = RoundShown(1, accuracy, gate, verifier, flow, [(0.9, True), (0.2, False)])
    curves = [Curve(text, "loss", [(1, 4.0), (2, float("nan")), (3, 1.0)])]
    shown = [image(f"{text} {i}", text) for i in range(images)]
    return Report(text, evaluation(text), [one], shown, curves, {text: text})


def test_untrusted_text_stays_text() -> None:
    html = report.render_html(full_report(EVIL))
    page = Page(html)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert sum("<script>" in text for text in page.text) > 10  # it is shown, as text
    assert page.tags.count("script") == 3 and page.tags.count("style") == 1
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)
    assert [row["key"] for row in json.loads(blocks[1])] == [f"{EVIL} {i}" for i in range(3)]


def test_nothing_is_loaded_from_outside() -> None:
    page = Page(report.render_html(full_report()))
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert [v for n, v in page.attributes if n in ("src", "href", "srcset", "style")] == []


def test_content_is_there() -> None:
    text = " ".join(" ".join(Page(report.render_html(full_report())).text).split())
    for wanted in (
        "Scores",
        "75.0 %",
        "Precision by kind",
        "Gate: promoted",
        "Verifier gate: passed",
        "0.930",
        "where the sampled claims went",
        "how far P(yes) can be believed",
        "SFT",
        "loss",
    ):
        assert wanted in text, wanted


def test_the_verdict_says_what_was_kept_and_what_changed() -> None:
    refused = RoundShown(2, gate={"promoted": False, "reasons": []})
    kept = RoundShown(1, gate={"promoted": True, "reasons": []})
    assert report.verdict(Report("t", evaluation(), [kept, refused])) == (
        "The run keeps round 1. Its gate refused round 2. From SFT to round 1, on 5 held-out images: "
        "F1 from 50.0 % to 66.7 %, the hallucinated share from 50.0 % to 25.0 %, "
        "recall from 50.0 % to 60.0 %."
    )
    nothing = {"data": "photos", "images": 9, "captioners": [{"name": "SFT", "metrics": {}}]}
    assert "Nothing has judged the truth" in report.verdict(Report("t", nothing, [refused]))
    unjudged = RoundShown(1, gate={"promoted": True, "unjudged": True, "reasons": []})
    assert "--accept-unjudged" in report.verdict(Report("t", nothing, [unjudged]))
    assert report.verdict(Report("t")) == "No captioner has been evaluated yet."


def test_statements_are_marked_by_facts_then_by_verdicts() -> None:
    facts = {"a red cup": True, "a blue cup": False}
    verdicts = {"spoon": "drop", "red cup": "drop"}
    caption = "A red cup, a blue cup; a spoon, and light."
    pieces = report.mark(caption, lambda text: facts.get(text.lower()), verdicts)
    assert "".join(text for text, _ in pieces) == caption
    styles = {text: style for text, style in pieces if style}
    assert styles == {"A red cup": "true", "a blue cup": "false", "a spoon": "drop"}


def test_reliability_agrees_with_a_direct_count() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(500)
    yes = rng.random(500) < p
    bins = report.reliability([*zip(p.tolist(), yes.tolist(), strict=True), (float("nan"), True)])
    which = np.minimum((p * 10).astype(int), 9)
    expected = [(p[which == b].mean(), yes[which == b].mean(), (which == b).sum()) for b in range(10)]
    assert np.allclose(bins, expected)


def test_undefined_scores_are_dashes() -> None:
    assert report.cell("precision", {"value": None, "low": None, "high": None}) == ("–", "")
    assert report.cell("tokens", {"value": 31.25, "low": 30.0, "high": 32.0}) == ("31.2", "30.0 to 32.0")
    assert (
        report.plane([{"name": "x", "metrics": {"recall": {"value": None, "low": None, "high": None}}}]) == []
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_thumbnails_are_small_data_uris(mode: str) -> None:
    uri = report.thumbnail(Image.new(mode, (2000, 1000)))
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 30_000
    assert report.thumbnail(Image.new(mode, (64, 64))).startswith("data:image/png;base64,")


def test_curves_leave_out_what_is_no_number() -> None:
    rows = [
        {"step": 10, "loss": 2.0},
        {"step": 10, "validation_loss": 1.5},
        {"step": 20, "loss": 1.0, "text": "x"},
    ]
    curves = report.curves_of("SFT", rows)
    assert [(c.name, list(c.points)) for c in curves] == [("loss", [(10.0, 2.0), (20.0, 1.0)])]
    assert report.line([(1, 1.0), (2, float("inf"))]) is None
    assert report.line([(1, 1.0), (2, 1.0)]) is not None
    with pytest.raises(DataError):
        report.curves_of("SFT", [3])  # type: ignore[list-item]


def test_a_run_on_photographs_is_collected(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, picture in {"cat": data.chelsea(), "coffee": data.coffee()}.items():
        Image.fromarray(picture).save(photos / f"{name}.jpg")
    (photos / "broken.jpg").write_bytes(b"no image")
    run = Run.open(tmp_path / "run", Config())
    with pytest.raises(RunError, match="nothing to report"):
        write_report(run, Config(), images=5)
    home = run.stage_dir("round-1")
    stage = run.stage("round-1/candidates", {}, {"images": photos})
    said = dict(finish_reason="stop", mean_logprob=-1.0, tokens=4, seed=0)
    rows = [Candidate(sample="s", key=key, k=0, text=f"a {key}, grass", **said) for key in ("cat", "coffee")]  # type: ignore[arg-type]
    Shards(stage.dir, Candidate).write(0, rows)
    stage.finish({})
    asked = dict(sample="s", key="cat", kind="object", candidates=[0], expected="yes", label_mass=1.0)
    asked |= {"verifier": "v", "view": "all"}
    claims = [Claim(text="grass", question="grass?", p_yes=0.1, verdict="drop", **asked)]  # type: ignore[arg-type]
    claims.append(Claim(text="cat", question="cat?", p_yes=0.9, verdict="keep", **asked))  # type: ignore[arg-type]
    Shards(home / "claims", Claim).write(0, claims)
    Shards(home / "verdicts", Verdict).write(0, [Verdict.of(row) for row in claims])
    golden = Golden(sample="s", key="cat", text="a cat", kept=1, dropped=1, abstained=0, tokens=2)
    Shards(home / "golden", Golden).write(0, [golden])
    made = CaptionRow(
        id="s", key="coffee", caption="a cup", finish_reason="stop", tokens=2, model="m", config="c"
    )
    Shards(run.path / "evaluation/x", CaptionRow).write(0, [made])
    captioner = {"name": "SFT", "captions": "evaluation/x", "metrics": {}}
    atomic_write_json(
        run.path / "evaluation.json", {"data": str(photos), "images": 2, "captioners": [captioner]}
    )
    page = collect(run)
    assert [(one.part, one.key) for one in page.images] == [
        ("held-out", "cat"), ("held-out", "coffee"), ("round 1", "cat"), ("round 1", "coffee")
    ]  # fmt: skip
    assert page.rounds[0].flow == {"object": {"drop": 1, "keep": 1}}
    cat, coffee = page.images[2], page.images[1]
    assert coffee.captions == [("SFT", "a cup")] and len(coffee.views) == 6
    assert report.mark(cat.samples[0], cat.truth, {"grass": "drop"})[-1] == ("grass", "drop")
    assert (cat.width, cat.height, cat.golden) == (451, 300, "a cat")
    html = report.render_html(page)
    assert "Nothing has judged the truth of the captions of 2 held-out images." in html


@pytest.mark.slow
def test_two_thousand_images_are_searched_sorted_and_opened(tmp_path: Path) -> None:
    def one(i: int) -> ImageShown:
        claims = [
            ClaimShown("a cup", "object", "a cup?", 0.5 + i / 4000, "drop" if i == 7 else "keep", "", 1)
        ]
        text = "a zebra" if i == 1234 else "a cup"
        said = [("SFT", "a cup"), ("round 1", f"{text}, {EVIL}" if i == 1234 else text)]
        return image(f"photo-{i:04}", captions=said, claims=claims)

    target = tmp_path / "report.html"
    target.write_text(report.render_html(Report("t", images=[one(i) for i in range(2000)])), encoding="utf-8")
    with browser.page() as page:
        page.goto(target.as_uri())
        expect(page.locator("#count")).to_have_text("2000 of 2000 images")
        assert page.locator(".card").count() < 300, "cards are made as they are scrolled to"
        page.keyboard.press("/")
        page.keyboard.type("zebra")
        expect(page.locator("#count")).to_have_text("1 of 2000 images")
        page.keyboard.press("Escape")
        page.keyboard.press("j")
        expect(page.locator("#dialog-key")).to_contain_text("photo-1234")
        assert EVIL in page.inner_text("#rows")
        page.keyboard.press("v")
        expect(page.locator("#photo rect")).to_have_count(1)
        page.click("#close")
        page.fill("#search", "")
        page.select_option("#sort", "errors")
        page.locator(".card").first.click()
        expect(page.locator("#dialog-key")).to_contain_text("photo-0007")
        page.click("#close")
        page.select_option("#sort", "change")
        page.locator(".card").first.click()
        expect(page.locator("#dialog-key")).to_contain_text("photo-1234")
        page.keyboard.press("j")
        expect(page.locator("#dialog-key")).to_contain_text("2 of 2000")
        page.keyboard.press("k")
        expect(page.locator("#dialog-key")).to_contain_text("1 of 2000")


@pytest.mark.slow
@pytest.mark.parametrize("width, dark", [(400, False), (1280, True)])
def test_the_page_fits_phones_and_the_dark(tmp_path: Path, width: int, dark: bool) -> None:
    target = tmp_path / "report.html"
    target.write_text(report.render_html(full_report()), encoding="utf-8")
    with browser.page(width=width, dark=dark) as page:
        page.goto(target.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 251, 250)"
        assert light != dark
        page.screenshot(path=tmp_path / "page.png", full_page=True)
