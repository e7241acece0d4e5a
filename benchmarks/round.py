"""A round's sampling and asking against the bare engine that is fed prepared requests.

    python benchmarks/round.py [--images 64] [--size 1024] [--repeats 5] [--cores ENGINE,REST]

Draws scenes, saves them as JPEGs of SIZE x SIZE px, and has the stages `candidates` and `claims` of a round
made of them (read, decode, cut, sample or ask, write), with the engine hf. The bare engine gets the same
requests, shard by shard, with all images cut before. The two take turns; every repeat has other scenes. Left
out are the start of the engine and of the processes, and what the tool does before anything is asked.

Prints the median over the repeats of (seconds of the bare engine / seconds of the stage) and its range; the
same of the CPU seconds of the engine's process, which tell on a machine with other work what the stage costs
it; and how often an image is decoded for each stage. Aim: 0.95 or more, and 1 decode.

--cores 0,1 keeps the engine on core 0 and preparation on core 1. The captioner and verifier is --checkpoint,
by default scenes-base.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from captioner import views
from captioner.config import Config
from captioner.engines import CaptionRequest, QuestionBatch, make_engine
from captioner.lab import grid as scenes
from captioner.method import candidates, claims, qa, rounds
from captioner.method.tool import Rules
from captioner.pipeline import stages
from captioner.records import Candidate, Claim
from captioner.runs import Run, Shards, checkpoint_path
from captioner.sources.folder import ImageRow, read_folder

Spent = tuple[float, float]  # seconds, CPU seconds of this process
SAMPLES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores")
    parser.add_argument("--checkpoint", default="scenes-base")
    given = parser.parse_args()
    cores = tuple(map(int, given.cores.split(","))) if given.cores else None
    checkpoint = checkpoint_path(given.checkpoint)
    found: dict[str, list[tuple[Spent, Spent, float]]] = {"sampling": [], "asking": []}
    for repeat in range(given.repeats):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            draw(home / "images", given.images, given.size, repeat * given.images)
            for name, one in repeated(home, checkpoint, cores, repeat):
                found[name].append(one)
                print(f"{repeat}: {name}", *(f"{a:.2f}/{b:.2f} s" for a, b in zip(*one[:2], strict=True)))
    print(f"{given.images} images of {given.size} x {given.size} px (JPEG), {given.repeats} repeats")
    for name, rows in found.items():
        wall, cpu = ([bare[at] / whole[at] for whole, bare, _ in rows] for at in (0, 1))
        told = (f"{median(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in (wall, cpu))
        print(f"{name:9} ratio {next(told)}, of CPU {next(told)}, decodes per image {rows[0][2]:.2f}")


def draw(folder: Path, count: int, size: int, first: int) -> None:
    (folder / "images").mkdir(parents=True)
    for index in range(first, first + count):
        picture = scenes.draw(scenes.sample("round", index), index).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        picture.save(folder / "images" / f"{index:06d}.jpg", quality=92)


def repeated(
    home: Path, checkpoint: Path, cores: tuple[int, ...] | None, repeat: int
) -> Iterator[tuple[str, tuple[Spent, Spent, float]]]:
    """Both stages, each beside the bare engine; which of the two comes first changes with the repeat."""
    config = Config.model_validate(
        {
            "model": {"device": "cpu"},
            "caption": {"prepare_processes": 1},
            "golden": {"images": str(home / "images"), "samples": SAMPLES, "reask": []},
        }
    )
    run = Run.open(home / "run", config)
    plan = rounds.Plan(1, str(home / "images"), checkpoint, home / "qa", home / "run" / "round-1")
    (home / "qa").mkdir()
    (home / "qa" / "captioner").symlink_to(checkpoint)
    calibration = qa.Calibration(temperature=1.0, keep=0.6, drop=0.4)
    (home / "qa" / "calibration.json").write_text(calibration.model_dump_json())
    images = read_folder(home / "images")
    engine = make_engine(checkpoint, config)
    cuts = {row.key: views.prepare(row.path, engine.renderer.spec) for row in images}

    def sampled() -> None:
        stage = run.stage("round-1/candidates", {}, {"images": home / "images"})
        candidates.fill(stage, run, plan, config, images)

    def asked() -> None:
        stage = run.stage("round-1/claims", {}, {"images": home / "images"})
        claims.fill(stage, run, plan, config, images, Rules(), ())

    def bare_sampling(part: list[ImageRow]) -> None:
        requests = [CaptionRequest(row.key, *cuts[row.key]) for row in part]
        sampling = config.golden.sampling
        assert len(list(engine.sample(requests, SAMPLES, sampling))) == len(part)

    def bare_asking(part: list[ImageRow]) -> None:
        batches = [
            QuestionBatch(cuts[row.key][0], questions[row.key]) for row in part if row.key in questions
        ]
        assert len(list(engine.p_yes(batches))) == len(batches)

    parts = rounds.parts(images, config.golden.shard_rows)
    questions: dict[str, list[str]] = {}
    for name, whole, bare in (("sampling", sampled, bare_sampling), ("asking", asked, bare_asking)):
        if name == "asking":
            said = rounds.by_key(Shards(plan.home / "candidates", Candidate).read_all())
            for key, own in said.items():
                texts = [each.text for each in claims.select(own, Rules(), config.golden.max_questions).asked]
                if texts:
                    questions[key] = [Rules().decompose(text).text for text in texts]
        turns: list[Callable[[], Spent]] = [
            lambda whole=whole: in_a_stage(whole, cores, home / "decodes"),  # type: ignore[misc]
            lambda bare=bare: on_core(cores, lambda: [bare(part) for part in parts]),  # type: ignore[misc]
        ]
        took = {at: turns[at]() for at in ((0, 1) if repeat % 2 else (1, 0))}
        decoded = len((home / "decodes").read_text())
        (home / "decodes").unlink()
        yield name, (took[0], took[1], decoded / len(images))
    ledger = Shards(plan.home / "claims", Claim).read_all()
    assert {row.key for row in ledger} == set(questions)


def in_a_stage(fill: Callable[[], None], cores: tuple[int, ...] | None, decodes: Path) -> Spent:
    """From the moment that the engine and the processes are there to the last published shard."""
    started: list[float] = []
    prepare, executor = views.prepare, stages.executor

    def noted(*args: Any) -> Any:
        with decodes.open("a") as file:
            file.write(".")
        return prepare(*args)

    def hands(*args: Any) -> Any:
        if cores:
            os.sched_setaffinity(0, [cores[1]])
        found = executor(*args)
        if cores:
            os.sched_setaffinity(0, [cores[0]])
        started[:] = time.monotonic(), time.process_time()
        return found

    before = os.sched_getaffinity(0)
    views.prepare, stages.executor = noted, hands
    try:
        fill()
        return time.monotonic() - started[0], time.process_time() - started[1]
    finally:
        views.prepare, stages.executor = prepare, executor
        os.sched_setaffinity(0, before)


def on_core(cores: tuple[int, ...] | None, work: Callable[[], Any]) -> Spent:
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, [cores[0]])
    started, worked = time.monotonic(), time.process_time()
    work()
    spent = time.monotonic() - started, time.process_time() - worked
    os.sched_setaffinity(0, before)
    return spent


if __name__ == "__main__":
    main()
