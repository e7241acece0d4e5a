"""A run as one HTML file: a verdict, pictures, tables, and a browser of all its images.

Pure: a :class:`Report` in, a string out. Captions, claims and keys are untrusted (a model or a file name
wrote them): the template escapes them, the browser's rows are JSON that the page only ever sets as text, and
a content security policy allows no script but ours and nothing from outside.
"""

from __future__ import annotations

import base64
import io
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from captioner.errors import DataError
from captioner.statements import comparable_statements, normalise, statement_spans

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
CHUNK = 100  # images in one JSON block of the page: what is parsed at a time
Truth = Callable[[str], bool | None]  # of one statement about one image; None: nobody knows

_CURVES = (
    "loss", "eval_loss", "validation_loss", "accuracy", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "probe/ended", "probe/repeated", "probe/tokens", "probe/kl",
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One training quantity over steps; points are (step, value)."""

    stage: str
    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class ClaimShown:
    text: str
    kind: str
    question: str
    p_yes: float
    verdict: str  # "keep", "drop" or "abstain"
    why: str
    votes: int  # samples that state it
    truth: bool | None = None  # by known facts


@dataclass(frozen=True)
class ImageShown:
    """One image of the browser; ``part`` says where it is from: "held-out", "round 1", ..."""

    key: str
    part: str
    thumbnail: str  # data URI
    width: int  # px of the whole image
    height: int
    views: Sequence[tuple[str, tuple[int, int, int, int]]] = ()  # tag, box in px
    captions: Sequence[tuple[str, str]] = ()  # (captioner, caption), oldest first
    samples: Sequence[str] = ()
    claims: Sequence[ClaimShown] = ()
    golden: str | None = None
    truth: Truth = lambda statement: None


@dataclass(frozen=True)
class RoundShown:
    number: int
    accuracy: Mapping[str, Any] | None = None  # the round's qa/accuracy.json
    gate: Mapping[str, Any] | None = None  # the round's gate.json
    verifier: Mapping[str, Any] | None = None  # the round's verifier.json
    flow: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # kind -> verdict -> claims
    answers: Sequence[tuple[float, bool]] = ()  # (P(yes), whether "yes" is right) of planted claims


@dataclass(frozen=True)
class Report:
    title: str
    evaluation: Mapping[str, Any] | None = None  # evaluation.json
    rounds: Sequence[RoundShown] = ()
    images: Sequence[ImageShown] = ()
    curves: Sequence[Curve] = ()
    about: Mapping[str, str] = field(default_factory=dict)


def render_html(report: Report) -> str:
    """The whole page."""
    env = Environment(loader=PackageLoader("captioner.report"), autoescape=select_autoescape())
    env.filters |= {"words": _words, "line": line, "tree": tree}
    env.filters |= {
        "cell_of": lambda interval, name: cell(name, interval),
        "sum_of": lambda x: sum(x.values()),
    }
    rows = [_row(image) for image in report.images]
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    return env.get_template("report.html").render(
        report=report,
        verdict=verdict(report),
        plane=plane((report.evaluation or {}).get("captioners", [])),
        reliability={one.number: reliability(one.answers) for one in report.rounds if one.answers},
        columns=COLUMNS,
        index=[_index(row) for row in rows],
        chunks=chunks,
        chunk=CHUNK,
        nonce=secrets.token_urlsafe(16),
    )


# ---------------------------------------------------------------- the verdict


def verdict(report: Report) -> str:
    """The run in one sentence or two."""
    gates = [(one.number, bool(one.gate["promoted"])) for one in report.rounds if one.gate]
    kept = [number for number, promoted in gates if promoted]
    refused = [str(number) for number, promoted in gates if not promoted]
    parts = [f"The run keeps round {kept[-1]}." if kept else "No round was promoted."] if gates else []
    if refused:
        parts.append(f"Its gate refused round{'s' * (len(refused) > 1)} {', '.join(refused)}.")
    if any(one.gate and one.gate["promoted"] and one.gate.get("unjudged") for one in report.rounds):
        parts.append("A round was promoted although nothing judged its truth (--accept-unjudged).")
    captioners = (report.evaluation or {}).get("captioners", [])
    parts.append(_change(captioners, kept[-1] if kept else None, report.evaluation or {}))
    return " ".join(parts)


def _change(captioners: Sequence[Mapping[str, Any]], kept: int | None, evaluation: Mapping[str, Any]) -> str:
    if not captioners:
        return "No captioner has been evaluated yet."
    names = [str(one["name"]) for one in captioners]
    last = names.index(f"round {kept}") if f"round {kept}" in names else len(names) - 1
    first = names.index("SFT") if "SFT" in names else 0
    old, new = captioners[first]["metrics"], captioners[last]["metrics"]
    known = [
        f"{label} from {cell(name, old[name])[0]} to {cell(name, new[name])[0]}"
        for name, label in (("f1", "F1"), ("hallucinated", "the hallucinated share"), ("recall", "recall"))
        if old.get(name) and new.get(name) and old[name]["value"] is not None is not new[name]["value"]
    ]
    images = f"{evaluation.get('images', '?')} held-out images"
    if not known:
        return f"Nothing has judged the truth of the captions of {images}."
    if first == last:
        return f"On {images}, {names[first]} has an F1 of {cell('f1', new.get('f1'))[0]}."
    return f"From {names[first]} to {names[last]}, on {images}: {', '.join(known)}."


# ---------------------------------------------------------------- the browser's rows


def _row(image: ImageShown) -> dict[str, Any]:
    verdicts = {normalise(claim.text): claim.verdict for claim in image.claims}

    def marked(caption: str) -> list[tuple[str, str]]:
        return mark(caption, image.truth, verdicts)

    captions = [(name, marked(text)) for name, text in image.captions]
    said = [set(comparable_statements(text)) for _, text in image.captions]
    newest = captions[-1][1] if captions else marked(image.golden or "")
    wrong = sum(style in ("false", "drop") for _, style in newest)
    return {
        "key": image.key,
        "part": image.part,
        "thumbnail": image.thumbnail,
        "size": (image.width, image.height),
        "views": image.views,
        "captions": captions,
        "samples": [marked(text) for text in image.samples],
        "claims": [asdict(claim) for claim in image.claims],
        "golden": None if image.golden is None else marked(image.golden),
        "errors": wrong,
        "doubt": _doubt(image.claims),
        "change": len(said[0] ^ said[-1]) if len(said) > 1 else 0,
    }


def _doubt(claims: Sequence[ClaimShown]) -> float:
    """Mean closeness of P(yes) to a half: 0 sure, 1 a coin."""
    return sum(1 - abs(2 * claim.p_yes - 1) for claim in claims) / len(claims) if claims else 0.0


def _index(row: Mapping[str, Any]) -> dict[str, Any]:
    """What searching and sorting need of a row."""
    texts = ["".join(text for text, _ in parts) for _, parts in row["captions"]]
    texts += [claim["text"] for claim in row["claims"]]
    words = " ".join([row["key"], *texts]).casefold()
    return {name: row[name] for name in ("key", "part", "errors", "doubt", "change")} | {"words": words}


def mark(caption: str, truth: Truth, verdicts: Mapping[str, str]) -> list[tuple[str, str]]:
    """(text, style) pieces that join to the caption. A statement's style is "true" or "false" by known facts,
    else the verdict on it ("keep", "drop", "abstain"), else ""."""
    pieces, at = [], 0
    for start, stop, _ in statement_spans(caption):
        statement = caption[start:stop]
        known = truth(statement)
        style = verdicts.get(normalise(statement), "") if known is None else str(known).lower()
        pieces += [(caption[at:start], ""), (statement, style)]
        at = stop
    return [piece for piece in [*pieces, (caption[at:], "")] if piece[0]]


def thumbnail(image: Image.Image) -> str:
    """A data URI: PNG where the picture is small already, else JPEG of at most ``THUMBNAIL_PX`` a side."""
    small = image.convert("RGB")
    kind = "PNG" if max(small.size) <= THUMBNAIL_PX else "JPEG"
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 78}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---------------------------------------------------------------- numbers and tables


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


def tree(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Nested numbers as tables: each has a ``name``, a ``head`` and ``rows`` of text.

    ``{name: number}`` is a table with one column, ``{row: {column: number}}`` one with several; what is
    deeper comes behind, under its name.
    """
    return [table for table in _tables("", values) if table["rows"]]


def _tables(name: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = {k: v for k, v in values.items() if isinstance(v, Mapping)}
    deep = {k: v for k, v in rows.items() if any(isinstance(inner, Mapping) for inner in v.values())}
    flat = {k: v for k, v in rows.items() if k not in deep}
    head = list(dict.fromkeys(column for row in flat.values() for column in row))
    single = [[_words(k), _number(v)] for k, v in values.items() if k not in rows]
    several = [[str(k), *(_number(row.get(column)) for column in head)] for k, row in flat.items()]
    found = [
        {"name": name, "head": ["", "Value"], "rows": single},
        {"name": name, "head": ["", *map(_words, head)], "rows": several},
    ]
    return found + [table for k, v in deep.items() for table in _tables(_words(k), v)]


def _words(name: str) -> str:
    return str(name).replace("_", " ").capitalize()


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "–" if value is None else str(value)


# ---------------------------------------------------------------- pictures


def plane(captioners: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where each captioner stands on the plane of recall (x) and precision (y), in percent."""
    points = []
    for one in captioners:
        recall, precision = one["metrics"].get("recall"), one["metrics"].get("precision")
        if recall and precision and None not in (*recall.values(), *precision.values()):
            points.append(
                {
                    "name": str(one["name"]),
                    "x": {k: 100 * v for k, v in recall.items()},
                    "y": {k: 100 * v for k, v in precision.items()},
                }
            )
    return points


def reliability(answers: Sequence[tuple[float, bool]], bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean P(yes), share of "yes", count) per bin of P(yes); no empty bins (DeGroot & Fienberg 1983)."""
    groups: dict[int, list[tuple[float, bool]]] = {}
    for p, yes in answers:
        if math.isfinite(p):
            groups.setdefault(min(int(p * bins), bins - 1), []).append((p, yes))
    return [
        (sum(p for p, _ in group) / len(group), sum(yes for _, yes in group) / len(group), len(group))
        for _, group in sorted(groups.items())
    ]


def line(points: Sequence[tuple[float, float]], width: int = 320, height: int = 150) -> dict[str, Any] | None:
    """A line chart of (x, y): SVG points and the ends of both axes; None for fewer than two finite points."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return None
    left, right, top, bottom = 44, width - 8, 8, height - 22
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    span_x, span_y = (x1 - x0) or 1, (y1 - y0) or 1
    path = " ".join(
        f"{left + (x - x0) / span_x * (right - left):.1f},{bottom - (y - y0) / span_y * (bottom - top):.1f}"
        for x, y in points
    )
    return {"path": path, "x0": x0, "x1": x1, "y0": y0, "y1": y1, "first": ys[0], "last": ys[-1]}


def curves_of(stage: str, rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Curves of one metrics.jsonl. Raises DataError where a row is not an object."""
    if not all(isinstance(row, Mapping) for row in rows):
        raise DataError("A line of metrics.jsonl is not an object.", where=stage)
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
