"""The first stage of a round: captions that the captioner samples of every image, marked, none removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import prompts
from captioner.config import Config
from captioner.method import rounds
from captioner.method.rounds import Plan
from captioner.pipeline import stages
from captioner.pipeline.stages import Output, Prepared
from captioner.processes import is_main
from captioner.records import Candidate, Failed
from captioner.runs import Run, Shards, Stage
from captioner.sources.folder import ImageRow
from captioner.statements import comparable_statements, repeats

if TYPE_CHECKING:
    from captioner.engines import Engine


def mark(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One image's candidates with ``repeats`` and ``duplicate_of`` set."""
    first: dict[tuple[str, ...], int] = {}
    marked = []
    for each in candidates:
        said = comparable_statements(each.text)
        original = first.setdefault(tuple(dict.fromkeys(said)), each.k)
        update = {"repeats": repeats(said), "duplicate_of": None if original == each.k else original}
        marked.append(each.model_copy(update=update))
    return marked


def read(home: Path) -> dict[str, list[Candidate]]:
    """The candidates of a round's images, by key."""
    return rounds.by_key(Shards(home / "candidates", Candidate).read_all())


def made_of(plan: Plan, config: Config) -> tuple[rounds.Inputs, dict[str, Any]]:
    """Inputs and settings of the stage."""
    section = {
        **config.golden.model_dump(mode="json", include={"samples", "sampling", "shard_rows"}),
        "views": config.views,
        "dtype": config.model.dtype,
        "prompt": prompts.prompt_hash("caption"),
    }
    return {"captioner": plan.captioner, "images": plan.source}, section


def fill(stage: Stage, run: Run, plan: Plan, config: Config, images: list[ImageRow]) -> None:
    """Sample ``golden.samples`` captions of each image."""
    if stage.done:
        return
    settings = config.golden
    output = Output(stage.dir, Candidate)
    sampling = settings.sampling.model_copy(update={"seed": config.seed + settings.sampling.seed})

    def work(
        engine: Engine, images: Iterable[Prepared[ImageRow]]
    ) -> Iterator[tuple[ImageRow, list[Candidate] | Failed]]:
        for image, said in stages.caption_images(engine, images, settings.samples, sampling):
            yield image.row, image.failed() if image.reason else mark(said)

    parts = rounds.parts(images, settings.shard_rows)
    stages.fill(output, "sampling", parts, plan.captioner, config, work)
    if not is_main():
        return
    rows = output.rows.read_all()
    counts = {
        "images": len(images),
        "candidates": len(rows),
        "cut": sum(r.finish_reason != "stop" for r in rows),
        "repeating": sum(r.repeats > 0 for r in rows),
        "duplicates": sum(r.duplicate_of is not None for r in rows),
    }
    rounds.finish(stage, run, counts, len(images))
