"""captioner review: check claims of a round by hand, on a local page with the keyboard.

Shows claims of ``--round`` with their image; the keys are y, n, c (cannot tell) and u (undo). P(yes) stays
hidden. Every answer is on the disk at once: stop whenever you like, the same command goes on. The answers lie
in ``review/round-N.jsonl`` of the run and measure its verifiers: that of a later round with `captioner golden
--golden.planted FILE`, and the gate's judge without being told.
``--gate`` shows what both captioners of the round state about the gate's images; once nine in ten of their
statements have an answer in ``review/gate-N.jsonl``, people are the gate's judge.
``--pairs A B`` asks instead which of two caption data sets says it better, in random positions.
"""

from __future__ import annotations

import json
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
from captioner.method.tool import Rules
from captioner.records import CaptionRow, Claim
from captioner.report import review as reviewing
from captioner.runs import Run, RunDir, Shards, input_of
from captioner.sources import resolve
from captioner.sources.folder import read_captions, read_folder
from captioner.statements import comparable_statements, visible
from loops.stages import StagePlan

HOST = "127.0.0.1"


def plan(
    run: Run, round: int = 1, pairs: tuple[Path, Path] | None = None, gate: bool = False
) -> list[StagePlan]:
    """What is read and written."""
    home = run.stage_dir(f"round-{round}")
    claims = home / "evaluation.json" if gate else home / "claims"
    inputs: dict[str, Path | str] = {str(path): path for path in pairs} if pairs else {"claims": claims}
    return [StagePlan("", inputs, outputs=[answers_path(run.path, round, pairs, gate)])]


def review(
    run: RunDir,
    config: Config,
    round: int = 1,
    *,
    count: int = 200,
    kind: str | None = None,
    gate: bool = False,
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
        gate: Show what the captioners of the round state about the gate's images instead.
        pairs: Compare these two caption data sets instead.
        images: The images that both were made of; else `evaluate.data`.
        port: Port on 127.0.0.1; 0 = a free one.
    """
    run = Run.open(run, config, create=False)
    if pairs:
        review_pairs(run, pairs[0], pairs[1], images, count, port)
    else:
        review_claims(run, round, count=count, kind=kind, gate=gate, port=port)


def answers_path(run_dir: Path, round: int, pairs: Iterable[Path] | None = None, gate: bool = False) -> Path:
    """Where the answers of a review lie."""
    name = f"gate-{round}" if gate else f"round-{round}"
    if pairs:
        name = "-".join(["pairs", *(path.resolve().name for path in pairs)])
    return run_dir / "review" / f"{name}.jsonl"


def review_claims(
    run: Run, round: int, *, count: int = 200, kind: str | None = None, gate: bool = False, port: int = 0
) -> None:
    """Serve the page until it is interrupted, then write ``review/round-N.json`` with the agreement.

    Raises RunError where the round has no claims yet, ConfigError for a kind that no claim has.
    """
    from captioner.report.review_app import claims_app

    rows, folder = _stated(run, round) if gate else _asked(run, round)
    if kind is not None and kind not in (kinds := sorted({row.kind or "other" for row in rows})):
        raise ConfigError(
            f"No claim is of kind {kind!r}.", where="--kind", fix=f"One of: {', '.join(kinds)}."
        )
    rows = [row for row in rows if kind in (None, row.kind or "other")]
    items = reviewing.choose(rows, count, run.config.seed)
    images = {row.key: row.path for row in read_folder(folder, captions=False)}
    path = answers_path(run.path, round, gate=gate)
    limit = run.config.golden.min_kind_accuracy
    answers = checked.Answers(path)
    try:
        serve(lambda token: claims_app(items, answers, images, None if gate else limit, token), port)
    finally:
        answers.close()
    if not gate:
        _print_agreement(path, limit)
    print(f"{len(answers.rows)} of {len(items)} claims answered: {path}")


def _print_agreement(path: Path, limit: float) -> None:
    found = reviewing.agreements(checked.read_checked(path), limit)
    atomic_write_json(path.with_suffix(".json"), {"limit": limit, "kinds": [asdict(row) for row in found]})
    for row in found:
        share = f"{row.agree}/{row.asked} ({row.low:.2f} to {row.high:.2f})"
        more = f"{row.decided} the limit" if row.decided else f"{row.more or 'many'} more would decide"
        print(f"{row.kind}: the verifier agrees on {share}; {more}")


def _asked(run: Run, round: int) -> tuple[list[Claim], Path]:
    """The ledger of a round, and its images."""
    home = run.stage_dir(f"round-{round}")
    folder = input_of(home / "candidates", "images")
    if folder is None or not (home / "claims" / "stage.json").is_file():
        raise RunError(
            f"Round {round} has no claims yet.",
            where=str(home),
            fix=f"captioner golden --round {round} --run {run.path}",
        )
    return Shards(home / "claims", Claim).read_all(), folder


def _stated(run: Run, round: int) -> tuple[list[Claim], Path]:
    """What the captioners of a round state about the gate's images, and these."""
    file = run.path / f"round-{round}" / "evaluation.json"
    if not file.is_file():
        fix = f"captioner evaluate --round {round} --run {run.path}"
        raise RunError(f"The captioners of round {round} are not compared yet.", where=str(file), fix=fix)
    summary, rules, found = json.loads(file.read_text(encoding="utf-8")), Rules(), {}
    for one in summary["captioners"]:
        for row in Shards(run.path / one["captions"], CaptionRow).read_all():
            for text in filter(visible, comparable_statements(row.caption or "")):
                found[row.key, text] = Claim(
                    sample=row.id,
                    key=row.key,
                    text=text,
                    kind=rules.kind(text),
                    candidates=[],
                    question=rules.decompose(text).text,
                    expected="yes",
                    p_yes=0.5,  # nobody was asked
                    label_mass=1.0,
                    verifier="",
                    view="all",
                )
    return list(found.values()), resolve(str(summary["data"]), run)


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
