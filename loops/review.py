"""captioner review: check claims of a round by hand, on a local page with the keyboard.

Shows claims of ``--round`` with their image; the keys are y, n, c (cannot tell) and u (undo). P(yes) stays
hidden. Every answer is on the disk at once: stop whenever you like, the same command goes on. The answers lie
in ``review/round-N.jsonl`` of the run; they measure the verifier and fill the `checked` judge.
``--pairs A B`` asks instead which of two caption data sets says it better, in random positions.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from captioner.config import Config
from captioner.errors import ConfigError, DataError, RunError
from captioner.files import atomic_write_json
from captioner.judges import checked
from captioner.records import Claim
from captioner.report import review as reviewing
from captioner.runs import Run, RunDir, Shards, input_of
from captioner.sources import resolve
from captioner.sources.folder import read_captions, read_folder
from loops.stages import StagePlan

HOST = "127.0.0.1"


def plan(run: Run, round: int = 1, pairs: tuple[Path, Path] | None = None) -> list[StagePlan]:
    """What is read and written."""
    claims = run.stage_dir(f"round-{round}/claims")
    inputs: dict[str, Path | str] = {str(path): path for path in pairs} if pairs else {"claims": claims}
    return [StagePlan("", inputs, outputs=[answers_path(run.path, round, pairs)])]


def review(
    run: RunDir,
    config: Config,
    round: int = 1,
    *,
    count: int = 200,
    kind: str | None = None,
    pairs: tuple[Path, Path] | None = None,
    images: str | None = None,
    port: int = 0,
) -> None:
    """Serve a page that asks for answers, until it is interrupted; then write how they agree.

    Args:
        run: Run directory with claims of the round.
        config: Settings; `golden.min_kind_accuracy`, `evaluate.data` and `seed` are read.
        round: Number of the round, from 1.
        count: Claims or pairs to show.
        kind: Only claims of this kind.
        pairs: Compare these two caption data sets instead.
        images: The images that both were made of; else `evaluate.data`.
        port: Port on 127.0.0.1; 0 = a free one.
    """
    run = Run.open(run, config, create=False)
    if pairs:
        review_pairs(run, pairs[0], pairs[1], images, count, port)
    else:
        review_claims(run, round, count=count, kind=kind, port=port)


def answers_path(run_dir: Path, round: int, pairs: Iterable[Path] | None = None) -> Path:
    """Where the answers of a review lie."""
    name = "-".join(["pairs", *(path.resolve().name for path in pairs)]) if pairs else f"round-{round}"
    return run_dir / "review" / f"{name}.jsonl"


def review_claims(run: Run, round: int, *, count: int = 200, kind: str | None = None, port: int = 0) -> None:
    """Serve the page until it is interrupted, then write ``review/round-N.json`` with the agreement.

    Raises RunError where the round has no claims yet, ConfigError for a kind that no claim has.
    """
    from captioner.report.review_app import claims_app

    home = run.stage_dir(f"round-{round}")
    claims = Shards(home / "claims", Claim)
    folder = input_of(home / "candidates", "images")
    if folder is None or not (home / "claims" / "stage.json").is_file():
        raise RunError(
            f"Round {round} has no claims yet.",
            where=str(home),
            fix=f"captioner golden --round {round} --run {run.path}",
        )
    rows = claims.read_all()
    if kind is not None and kind not in (kinds := sorted({row.kind or "other" for row in rows})):
        raise ConfigError(
            f"No claim is of kind {kind!r}.", where="--kind", fix=f"One of: {', '.join(kinds)}."
        )
    rows = [row for row in rows if kind in (None, row.kind or "other")]
    items = reviewing.choose(rows, count, run.config.seed)
    images = {row.key: row.path for row in read_folder(folder, captions=False)}
    path, limit = answers_path(run.path, round), run.config.golden.min_kind_accuracy
    answers = checked.Answers(path)
    try:
        serve(lambda token: claims_app(items, answers, images, limit, token), port)
    finally:
        answers.close()
    found = reviewing.agreements(checked.read_checked(path), limit)
    atomic_write_json(path.with_suffix(".json"), {"limit": limit, "kinds": [asdict(row) for row in found]})
    for row in found:
        share = f"{row.agree}/{row.asked} ({row.low:.2f} to {row.high:.2f})"
        more = f"{row.decided} the limit" if row.decided else f"{row.more or 'many'} more would decide"
        print(f"{row.kind}: the verifier agrees on {share}; {more}")
    print(f"{len(answers.rows)} of {len(items)} claims answered: {path}")


def review_pairs(
    run: Run, first: Path, second: Path, source: str | None, count: int = 200, port: int = 0
) -> None:
    """As :func:`review_claims`, for two caption data sets of the same images (else ``evaluate.data``)."""
    from captioner.report.review_app import pairs_app

    captions = [
        {row.key: row.caption for row in read_captions(path) if row.caption} for path in (first, second)
    ]
    items = reviewing.pair_up(captions[0], captions[1], count, run.config.seed)
    if not items:
        raise DataError(
            "The two data sets have no image with different captions.",
            where=f"{first}, {second}",
            fix="Caption the same images with both captioners.",
        )
    folder = resolve(source or run.config.evaluate.data, run)
    images = {row.key: row.path for row in read_folder(folder, captions=False)}
    path = answers_path(run.path, 0, (first, second))
    answers = checked.Answers(path)
    try:
        serve(lambda token: pairs_app(items, answers, images, token), port)
    finally:
        answers.close()
    result = reviewing.win_rate(answers.rows.values())
    atomic_write_json(path.with_suffix(".json"), result)
    print(f"{second} wins {result['win_rate'] or 0:.1%} of {result['images']} images: {path}")


def serve(make_app: Any, port: int) -> None:
    """Serve an application on the loopback interface until it is interrupted; prints its address."""
    import socket

    import uvicorn

    token = secrets.token_urlsafe(24)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()  # whoever reads the address may connect at once
        except OSError as error:
            raise ConfigError(
                f"Port {port} cannot be used: {error.strerror}.", where="--port", fix="Name another port."
            ) from error
        print(f"Open http://{HOST}:{listener.getsockname()[1]}/{token}/ and stop with Ctrl-C.", flush=True)
        server = uvicorn.Server(uvicorn.Config(make_app(token), log_level="warning", access_log=False))
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has closed
            server.run(sockets=[listener])
