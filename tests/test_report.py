"""The report: self-contained, escaped, parseable."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from PIL import Image

from captioner import scenes
from captioner.errors import DataError
from captioner.judges import metrics
from captioner.records import Claim
from captioner.report import report
from captioner.report.report import Curve, Example, Report, RoundReport

EVIL = "<script>alert('x')</script>\" onload='y' & </style>"
VOID = {"meta", "img", "br"}


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

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def claim(text: str, verdict: str, p: float) -> Claim:
    question = f"Visible: {text}?"
    rest = {"expected": "yes", "label_mass": 0.9, "verifier": "v", "view": "all"}
    said = {"sample": "s", "key": "k", "text": text, "kind": "", "candidates": [0, 2], "question": question}
    return Claim.model_validate({**said, **rest, "p_yes": p, "verdict": verdict})


def example(facts: str | None = None, text: str = EVIL) -> Example:
    image = report.thumbnail(Image.new("RGB", (400, 300), "red"))
    claims = [claim(text, "keep", 0.91), claim("north circle", "drop", 0.2), claim("mood", "abstain", 0.5)]
    return Example(text, image, [text, "north circle"], claims, text, text, text, facts)


def full_report(text: str = EVIL) -> Report:
    rows = [
        metrics.count(str(i), scenes.shorthand(s), s.to_json(), finish_reason="stop", tokens=20)
        for i, s in enumerate(scenes.sample("test", i) for i in range(5))
    ]
    scores = {k: v.to_json() for k, v in metrics.evaluate(rows, resamples=100).items()}
    broken = {
        g: {k: v.to_json() for k, v in table.items()}
        for g, table in metrics.breakdown(rows, resamples=100).items()
    }
    captioner = {"name": text, "metrics": scores, "breakdown": broken}
    accuracy = {
        "threshold": 0.5,
        "kinds": {f"kind {text}": {"accuracy": 0.93, "count": 12}},
        "all": {"accuracy": 0.9},
    }
    gate = {"promoted": True, "reasons": [text]}
    verifier = {"passed": True, "reasons": [f"kind {text}"], "planted": {text: {"accuracy": 0.5}}}
    one = RoundReport(1, accuracy, gate, [example(), example(scenes.sample("test", 0).to_json())], verifier)
    curves = [Curve(text, "loss", [(1, 4.0), (2, float("nan")), (3, 1.0)])]
    return Report(text, {"data": text, "images": 5, "captioners": [captioner]}, [one], curves, {text: text})


def test_untrusted_text_stays_text() -> None:
    html = report.render_html(full_report())
    page = Page(html)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert sum("<script>" in text for text in page.text) > 10  # it is shown, as text
    assert page.tags.count("style") == 1


def test_nothing_is_loaded_from_outside() -> None:
    page = Page(report.render_html(full_report("plain")))
    assert [v for n, v in page.attributes if n == "http-equiv"] == ["Content-Security-Policy"]
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data")]
    assert sources
    assert all(value.startswith("data:image/") for value in sources)


def test_content_is_there() -> None:
    text = " ".join(Page(report.render_html(full_report("plain"))).text)
    for wanted in (
        "Scores",
        "100 %",
        "Recall by size",
        "Gate: promoted",
        "Verifier gate: passed",
        "0.930",
        "Golden",
        "Before",
        "After",
        "0.91",
        "loss",
    ):
        assert wanted in text, wanted


def test_verdicts_against_the_facts_are_marked() -> None:
    scene = scenes.sample("test", 0)
    true = scenes.statements(scene)[1]
    false = next(f"{name} background" for name in scenes.BACKGROUNDS if name != scene.background)
    asked = [(true, "drop"), (false, "drop"), (false, "keep"), (true, "keep")]
    claims = [claim(text, verdict, 0.5) for text, verdict in asked]
    said = [f"{true}, {false}, mood"]
    one = Example("k", "data:image/png;base64,", said, claims, None, None, None, scene.to_json())
    html = report.render_html(Report("t", rounds=[RoundReport(1, examples=[one])]))
    styles = [v for n, v in Page(html).attributes if n == "class" and v.startswith("claim")][
        4:
    ]  # after the legend
    assert styles == ["claim drop wrong", "claim drop", "claim keep wrong", "claim keep"]
    assert f"<span class=false>{false}</span>" in html
    assert "<span class=unparsed>mood</span>" in html


def test_empty_report_is_a_page() -> None:
    assert "<h1>t</h1>" in report.render_html(Report("t"))


def test_undefined_scores_are_dashes() -> None:
    assert report.cell("precision", {"value": None, "low": None, "high": None}) == ("–", "")
    assert report.cell("tokens", {"value": 31.25, "low": 30.0, "high": 32.0}) == ("31.2", "30.0 to 32.0")


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
    assert report.line_svg([(1, 1.0), (2, float("inf"))]) == ""
    assert report.line_svg([(1, 1.0), (2, 1.0)]).startswith("<svg")
    with pytest.raises(DataError):
        report.curves_of("SFT", [3])  # type: ignore[list-item]
