"""A run as one self-contained HTML page: scores, verifier accuracy, claims on images, training curves.

Pure: a :class:`Report` in, a string out. Captions, claims and keys are untrusted (a model or a file name
wrote them), so every string passes :func:`html.escape`; the page holds no script, loads nothing from
outside, and says so in a content security policy.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from PIL import Image

from captioner import scenes
from captioner.errors import DataError
from captioner.records import Claim

COLUMNS = (
    ("precision", "Precision"),
    ("recall", "Recall"),
    ("f1", "F1"),
    ("hallucinated", "Hallucinated"),
    ("ended", "Ended"),
    ("repeated", "Repeated"),
    ("parsed", "Parsed"),
    ("tokens", "Tokens"),
)
THUMBNAIL_PX = 256
VERDICTS = {"keep": "✓", "drop": "✗", "abstain": "?"}  # a sign beside each colour


@dataclass(frozen=True)
class Curve:
    """One training quantity over steps; points are (step, value)."""

    stage: str
    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Example:
    """One image of a round, from its samples to its golden caption, with the captions before and after."""

    key: str
    image: str  # data URI
    samples: Sequence[str]
    claims: Sequence[Claim]
    golden: str | None
    before: str | None
    after: str | None
    facts: str | None = None


@dataclass(frozen=True)
class RoundReport:
    number: int
    accuracy: Mapping[str, Any] | None = None  # the round's qa/accuracy.json
    gate: Mapping[str, Any] | None = None  # the round's gate.json
    examples: Sequence[Example] = ()
    verifier: Mapping[str, Any] | None = None  # the round's verifier.json


@dataclass(frozen=True)
class Report:
    title: str
    evaluation: Mapping[str, Any] | None = None  # evaluation.json
    rounds: Sequence[RoundReport] = ()
    curves: Sequence[Curve] = ()
    about: Mapping[str, str] = field(default_factory=dict)


def thumbnail(image: Image.Image) -> str:
    """A data URI: PNG where the picture is small already, else JPEG of at most ``THUMBNAIL_PX`` a side."""
    small = image.convert("RGB")
    kind = "PNG" if max(small.size) <= THUMBNAIL_PX else "JPEG"
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 82}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render_html(report: Report) -> str:
    """The whole page."""
    parts = [f"<h1>{escape(report.title)}</h1>", _about(report.about)]
    if report.evaluation:
        parts.append(_evaluation(report.evaluation))
    parts += [_round(one) for one in report.rounds]
    if report.curves:
        parts.append(_curves(report.curves))
    return _PAGE.format(title=escape(report.title), style=_STYLE, body="\n".join(p for p in parts if p))


def _about(about: Mapping[str, str]) -> str:
    if not about:
        return ""
    rows = "".join(f"<dt>{escape(_words(k))}</dt><dd>{escape(v)}</dd>" for k, v in about.items())
    return f"<dl class=about>{rows}</dl>"


def cell(name: str, interval: Mapping[str, float | None] | None, short: bool = False) -> tuple[str, str]:
    """(value, interval) as text: shares in percent, tokens as they are; a dash where undefined.

    ``short`` is for narrow columns.
    """
    if not interval or interval["value"] is None:
        return "–", ""
    scale, unit = (1, "") if name == "tokens" else (100, " %")
    low, high, between = interval["low"], interval["high"], "–" if short else " to "
    span = "" if low is None or high is None else f"{_short(low * scale)}{between}{_short(high * scale)}"
    return f"{_short(interval['value'] * scale)}{unit}", span


def _short(value: float) -> str:
    """One decimal below 100, which keeps columns narrow."""
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; the first of each row is its header."""
    top = "".join(f"<th scope=col>{h}</th>" for h in head)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{c}</td>' for c in row[1:])}</tr>" for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _interval_cell(name: str, interval: Mapping[str, float | None] | None) -> str:
    value, span = cell(name, interval)
    return f"{value}<small>{span}</small>" if span else value


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    captioners = evaluation["captioners"]
    rows = [
        [escape(c["name"]), *(_interval_cell(name, c["metrics"].get(name)) for name, _ in COLUMNS)]
        for c in captioners
    ]
    parts = [
        "<section><h2>Scores</h2>",
        f"<p>{int(evaluation['images'])} held-out images ({escape(str(evaluation['data']))}); "
        "small print: 95 % bootstrap interval over images.</p>",
        _table(["Captioner", *(label for _, label in COLUMNS)], rows),
    ]
    groupings = dict.fromkeys(name for c in captioners for name in c.get("breakdown", {}))
    for grouping in groupings:
        groups = dict.fromkeys(g for c in captioners for g in c["breakdown"].get(grouping, {}))
        body = [
            [
                escape(c["name"]),
                *(_interval_cell("", c["breakdown"].get(grouping, {}).get(g)) for g in groups),
            ]
            for c in captioners
        ]
        parts.append(f"<details><summary>{escape(grouping.capitalize())}</summary>")
        parts.append(_table(["Captioner", *map(escape, groups)], body) + "</details>")
    return "".join(parts) + "</section>"


def _round(one: RoundReport) -> str:
    parts = [f"<section><h2>Round {one.number}</h2>"]
    if one.gate:
        word = "promoted" if one.gate["promoted"] else "refused"
        word += " unjudged" if one.gate["promoted"] and one.gate.get("unjudged") else ""
        reasons = "".join(f"<li>{escape(str(r))}</li>" for r in one.gate["reasons"])
        parts.append(f"<h3>Gate: {word}</h3><ul>{reasons}</ul>")
    if one.verifier:
        word = "passed" if one.verifier["passed"] else "refused"
        reasons = "".join(f"<li>{escape(str(r))}</li>" for r in one.verifier["reasons"])
        parts.append(f"<h3>Verifier gate: {word}</h3><ul>{reasons}</ul>{_tree(one.verifier['planted'])}")
    if one.accuracy:
        parts.append(_accuracy(one.accuracy))
    if one.examples:
        parts.append(
            "<h3>From samples to the golden caption</h3><p class=legend>"
            "The first images of the round, not picked. "
            "Claims with the verifier's P(yes): <span class='claim keep'>✓ kept</span> "
            "<span class='claim drop'>✗ dropped</span> <span class='claim abstain'>? abstained</span>"
            "; a <span class='claim keep wrong'>dashed frame</span> marks a verdict "
            "that the known facts contradict. "
            "In captions, <span class=false>false statements</span> and "
            "<span class=unparsed>statements nobody can judge</span>.</p>"
        )
        parts += [_example(e) for e in one.examples]
    return "".join(parts) + "</section>"


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    return "<h3>Verifier accuracy on held-out questions</h3>" + _tree(accuracy)


def _tree(tree: Mapping[str, Any]) -> str:
    """Nested numbers as tables: {name: number}, {row: {column: number}}, what is deeper under its name."""
    rows = {k: v for k, v in tree.items() if isinstance(v, Mapping)}
    deep = {k: v for k, v in rows.items() if any(isinstance(inner, Mapping) for inner in v.values())}
    parts = []
    single = [[escape(_words(k)), _number(v)] for k, v in tree.items() if k not in rows]
    if single:
        parts.append(_table(["", "Value"], single))
    flat = {k: v for k, v in rows.items() if k not in deep}
    if flat:
        head = list(dict.fromkeys(name for row in flat.values() for name in row))
        body = [[escape(str(k)), *(_number(row.get(h)) for h in head)] for k, row in flat.items()]
        parts.append(_table(["", *(escape(_words(h)) for h in head)], body))
    parts += [f"<h4>{escape(_words(k))}</h4>{_tree(v)}" for k, v in deep.items()]
    return "".join(parts)


def _words(name: str) -> str:
    return str(name).replace("_", " ").capitalize()


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "–" if value is None else escape(str(value))


def _example(e: Example) -> str:
    scene = scenes.Scene.from_json(e.facts) if e.facts else None
    samples = "".join(f"<li>{_caption(s, scene)}</li>" for s in e.samples)
    claims = " ".join(_claim(c, scene) for c in e.claims)
    rows = [
        ("Before", None if e.before is None else _caption(e.before, scene)),
        (f"Samples ({len(e.samples)})", f"<ol>{samples}</ol>" if e.samples else None),
        (f"Claims ({len(e.claims)})", claims or None),
        ("Golden", None if e.golden is None else _caption(e.golden, scene)),
        ("After", None if e.after is None else _caption(e.after, scene)),
    ]
    body = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in rows if v is not None)
    return (
        f"<article><figure><img src='{escape(e.image)}' alt='{escape(e.key)}'><figcaption>{escape(e.key)}"
        f"</figcaption></figure><dl>{body}</dl></article>"
    )


def _caption(text: str, scene: scenes.Scene | None) -> str:
    """A caption with each statement marked by the known facts, where there are any."""
    if scene is None:
        return escape(text)
    marked = []
    for part in text.split(","):
        truth = scenes.execute(part, scene)
        style = {True: "", False: "false", None: "unparsed"}[truth]
        marked.append(f"<span class={style}>{escape(part.strip())}</span>" if style else escape(part.strip()))
    return ", ".join(marked)


def _claim(claim: Claim, scene: scenes.Scene | None) -> str:
    truth = None if scene is None else scenes.execute(claim.text, scene)
    wrong = truth is not None and claim.verdict != "abstain" and (claim.verdict == "keep") != truth
    sign = VERDICTS.get(claim.verdict, "?")
    style = f"claim {claim.verdict if claim.verdict in VERDICTS else 'abstain'}{' wrong' if wrong else ''}"
    hint = f"{claim.question} said by {len(claim.candidates)} samples; {claim.why}"
    said = f"{sign} {escape(claim.text)} <b>{claim.p_yes:.2f}</b>"
    return f"<span class='{style}' title='{escape(hint)}'>{said}</span>"


# ---------------------------------------------------------------- curves


def _curves(curves: Sequence[Curve]) -> str:
    figures = "".join(
        f"<figure class=curve><figcaption>{escape(c.stage)}: {escape(c.name)}</figcaption>"
        f"{line_svg(c.points)}</figure>"
        for c in curves
        if len(c.points) > 1
    )
    return f"<section><h2>Training</h2><div class=curves>{figures}</div></section>" if figures else ""


def line_svg(points: Sequence[tuple[float, float]], width: int = 320, height: int = 150) -> str:
    """A line chart of (x, y) points in user units of px; points that are not finite are left out."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return ""
    left, right, top, bottom = 44, width - 8, 8, height - 22
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    span_x, span_y = (x1 - x0) or 1, (y1 - y0) or 1
    line = " ".join(
        f"{left + (x - x0) / span_x * (right - left):.1f},{bottom - (y - y0) / span_y * (bottom - top):.1f}"
        for x, y in points
    )
    labels = (
        f"<text x={left - 5} y={top + 8} text-anchor=end>{y1:.3g}</text>"
        f"<text x={left - 5} y={bottom} text-anchor=end>{y0:.3g}</text>"
        f"<text x={left} y={height - 6}>{x0:.0f}</text>"
        f"<text x={right} y={height - 6} text-anchor=end>{x1:.0f} steps</text>"
    )
    return (
        f"<svg viewBox='0 0 {width} {height}' role=img aria-label='from {ys[0]:.3g} to {ys[-1]:.3g}'>"
        f"<path class=axis d='M{left} {top}V{bottom}H{right}'/><polyline points='{line}'/>{labels}</svg>"
    )


def curves_of(stage: str, rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Curves of one metrics.jsonl. Raises DataError where a row is not an object."""
    if not all(isinstance(row, Mapping) for row in rows):
        raise DataError("a line of metrics.jsonl is not an object", where=stage)
    found = []
    for name in _CURVES:
        points = [
            (float(r.get("step", i)), float(r[name])) for i, r in enumerate(rows) if _is_number(r.get(name))
        ]
        if len(points) > 1:
            found.append(Curve(stage, name, points))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_CURVES = (
    "loss", "eval_loss", "validation_loss", "accuracy", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "probe/ended", "probe/repeated", "probe/tokens", "probe/kl",
)  # fmt: skip

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root{color-scheme:light dark;--ink:#1c1f24;--soft:#5d6570;--paper:#fbfbfa;--card:#fff;--line:#dfe2e6;
--keep:#12683c;--keep-bg:#e3f4ea;--drop:#a3201c;--drop-bg:#fbe6e4;
--abstain:#7a5200;--abstain-bg:#fdf1d6;--accent:#2457c5}
@media (prefers-color-scheme:dark){:root{
--ink:#e7e9ec;--soft:#a0a8b3;--paper:#15171a;--card:#1d2024;--line:#33383f;
--keep:#7fdba6;--keep-bg:#16301f;--drop:#ff9d94;--drop-bg:#3a1917;
--abstain:#f2c76a;--abstain-bg:#35290f;--accent:#8db2ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:72rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .5rem}h2{font-size:1.35rem;margin:2.5rem 0 .5rem}
h3{font-size:1.05rem;margin:1.5rem 0 .4rem}p,ul{max-width:46rem}
.legend,figcaption,small{color:var(--soft)}small{display:block;font-size:.75rem;white-space:nowrap}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.5rem 0 1rem}
th,td{padding:.4rem .9rem .4rem 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--line)}
th:first-child{text-align:left}thead th{color:var(--soft);font-weight:600;font-size:.85rem}
summary{cursor:pointer;color:var(--accent)}dl{margin:0}dd{margin:0 0 .8rem;overflow-wrap:anywhere}
dt{font-size:.8rem;font-weight:600;color:var(--soft)}dd ol{margin:0;padding-left:1.4rem;font-size:.9rem}
.about{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;font-size:.9rem}.about dd{margin:0}
article{display:grid;grid-template-columns:12rem 1fr;gap:1.25rem;background:var(--card);
border:1px solid var(--line);border-radius:10px;padding:1.1rem;margin:0 0 1rem}
@media (max-width:40rem){article{grid-template-columns:1fr}}
figure{margin:0}img{width:100%;border-radius:6px;display:block}
figcaption{font-size:.8rem;overflow-wrap:anywhere}
.claim{display:inline-block;padding:.05rem .5rem;margin:.12rem 0;border-radius:99px;
font-size:.85rem;border:1px solid transparent}
.claim b{font-weight:600;font-variant-numeric:tabular-nums;opacity:.8}
.keep{color:var(--keep);background:var(--keep-bg)}.drop{color:var(--drop);background:var(--drop-bg)}
.abstain{color:var(--abstain);background:var(--abstain-bg)}.wrong{border:1px dashed currentColor}
.false{color:var(--drop);text-decoration:underline wavy}.unparsed{color:var(--abstain);font-style:italic}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(18rem,1fr));gap:1rem}
svg{width:100%;height:auto}polyline{fill:none;stroke:var(--accent);stroke-width:1.6;stroke-linejoin:round}
.axis{fill:none;stroke:var(--line)}text{font-size:10px;fill:var(--soft)}
"""
