"""The local page on which a person checks claims or compares captions: a small Starlette application.

It serves one reviewer on the loopback interface. Every path begins with a secret token, other hosts' names
are refused (DNS rebinding), and the page loads nothing from outside.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route

from captioner.errors import DataError
from captioner.judges.checked import Checked
from captioner.report import review
from captioner.report.review import Answers, CaptionPair, Item
from captioner.views import BadImage, load_image

IMAGE_PX = 1600  # longest side of the picture that the page shows
WINNERS = {"left": 0, "right": 1}
_TEMPLATES = Environment(loader=PackageLoader("captioner.report"), autoescape=select_autoescape())


def claims_app(
    items: Sequence[Item], answers: Answers, images: Mapping[str, Path], limit: float | None, token: str
) -> Starlette:
    """A page that asks about claims. ``images`` maps keys to files, ``limit`` is what the verifier's
    agreement has to reach; None where no verifier was asked."""

    def shown(index: int) -> dict[str, Any]:
        item = items[index]
        view = "" if item.view == "all" else item.view
        return {"image": index, "key": item.key, "kind": item.kind, "question": item.question, "view": view}

    def store(index: int, answer: str) -> None:
        review.add(answers, items[index], answer)

    def progress() -> dict[str, Any]:
        rows = [Checked(**_fields(row, Checked)) for row in answers.rows.values()]
        kinds = [] if limit is None else [asdict(row) for row in review.agreements(rows, limit)]
        return {"kinds": kinds, "limit": limit}

    return _app("claims", items, answers, images, token, shown, store, progress)


def pairs_app(
    items: Sequence[CaptionPair], answers: Answers, images: Mapping[str, Path], token: str
) -> Starlette:
    """A page that asks which of two captions is better, in random positions."""

    def shown(index: int) -> dict[str, Any]:
        item = items[index]
        captions = [item.second, item.first] if item.swapped else [item.first, item.second]
        return {"image": index, "key": item.key, "left": captions[0], "right": captions[1]}

    def store(index: int, answer: str) -> None:
        item = items[index]
        if answer not in (*WINNERS, "tie"):
            raise DataError(f"{answer!r} is not an answer.", fix="Answer left, right or tie.")
        names = ("second", "first") if item.swapped else ("first", "second")
        winner = "tie" if answer == "tie" else names[WINNERS[answer]]
        answers.add(item.id, winner, key=item.key, swapped=item.swapped)

    def progress() -> dict[str, Any]:
        return {"pairs": review.win_rate(answers.rows.values())}

    return _app("pairs", items, answers, images, token, shown, store, progress)


def _fields(row: Mapping[str, Any], record: Any) -> dict[str, Any]:
    return {name: row[name] for name in record.__dataclass_fields__}


def _app(
    mode: str,
    items: Sequence[Any],
    answers: Answers,
    images: Mapping[str, Path],
    token: str,
    shown: Callable[[int], dict[str, Any]],
    store: Callable[[int, str], None],
    progress: Callable[[], dict[str, Any]],
) -> Starlette:
    by_id = {item.id: index for index, item in enumerate(items)}

    def state(index: int | None = None) -> JSONResponse:
        if index is None:
            index = next(review.unanswered(items, answers), None)
        done = sum(item.id in answers.rows for item in items)
        item = None if index is None else shown(index)
        return JSONResponse({"item": item, "done": done, "total": len(items), **progress()})

    def following(request: Request) -> JSONResponse:
        return state()

    async def answer(request: Request) -> JSONResponse:
        try:
            body = await request.json()
            index, said = body["item"], body["answer"]
            if type(index) is not int or not 0 <= index < len(items):
                raise DataError(f"There is no item {index!r}.")
            store(index, said)
        except (ValueError, KeyError, TypeError, DataError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return state()

    async def undo(request: Request) -> JSONResponse:
        latest = answers.undo()
        return state(by_id.get(latest) if latest is not None else None)

    def picture(request: Request) -> Response:
        index = request.path_params["index"]
        if not 0 <= index < len(items) or items[index].key not in images:
            return Response("There is no such image.", status_code=404)
        try:
            return Response(_jpeg(images[items[index].key]), media_type="image/jpeg")
        except BadImage as error:
            return Response(f"The image cannot be shown: {error.reason}", status_code=404)

    routes = [
        Route("/", lambda request: _page(mode)),
        Route("/next", following),
        Route("/answer", answer, methods=["POST"]),
        Route("/undo", undo, methods=["POST"]),
        Route("/image/{index:int}", picture),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    return Starlette(routes=[Mount(f"/{token}", routes=routes)], middleware=[hosts])


def _page(mode: str) -> HTMLResponse:
    nonce = secrets.token_urlsafe(16)
    policy = f"default-src 'self'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
    html = _TEMPLATES.get_template("review.html").render(mode=mode, nonce=nonce)
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(html, headers=headers)


def _jpeg(path: Path) -> bytes:
    image: Image.Image = load_image(path)[0]
    image.thumbnail((IMAGE_PX, IMAGE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
