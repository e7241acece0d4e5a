"""captioner sft [FILE.toml] [--gpus N]: supervised fine-tuning of the captioner.

Teaches the base the style of the captions. Trains adapters, LoRA or named parts and a soft prompt on a frozen
base, or the whole model (``sft.tuning.type``). Writes sft/adapter (but for ``full``), sft/captioner (a stock
checkpoint; of adapters for parallel ones only) and sft/metrics.jsonl. ``--gpus N`` trains in N processes, as
torchrun and accelerate launch do; a step then has N times as many batches as in one process. With ``full``
tuning each process holds a shard of the model (``sft.tuning.shard``).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from captioner import prompts
from captioner.config import Config, SFTConfig
from captioner.fit import distributed
from captioner.fit.examples import Target, TrainingImages
from captioner.fit.rows import usable
from captioner.processes import is_main
from captioner.runs import Run, RunDir, Stage, checkpoint_path
from captioner.sources.folder import ImageRow, read_folder
from loops.stages import StagePlan, begin, opened


def plan(run: Run) -> list[StagePlan]:
    """What the stage reads, is made with and writes."""
    sft, model, views = run.config.sft, run.config.model, run.config.views
    inputs: dict[str, Path | str] = {"model": checkpoint_path(model.path)}
    inputs |= {f"data {i}": source for i, source in enumerate(sft.data)}
    if sft.validation:
        inputs["validation"] = sft.validation
    return [StagePlan("sft", inputs, {"sft": sft, "model": model, "views": views})]


def sft(run: RunDir, config: Config, *, redo: bool = False, gpus: int = 1) -> Path:
    """Fine-tune the captioner on captions; returns its stage, with the checkpoint in ``captioner/``.

    Args:
        run: Run directory; made if it does not exist.
        config: Settings; `model`, `views` and `sft` are read.
        redo: Remove the results of this stage and make them anew.
        gpus: Processes to start, one per GPU.
    """
    if distributed.wanted(gpus):
        distributed.launch("sft", run, config, gpus, redo=redo)
        return Run.open(run, config).stage_dir("sft")
    with opened(run, config) as run:
        [planned] = plan(run)
        with distributed.main_first(config.model.device):
            stage = begin(run, planned, redo)
        if stage.done:
            print(f"sft was done before: {stage.dir}")
        else:
            _train(config, stage)
    return stage.dir


def _train(config: Config, stage: Stage) -> None:
    sft, inputs = config.sft, stage.inputs
    from captioner.fit import fit, trainers

    data = [path for name, path in inputs.items() if name.startswith("data ")]

    def learned(paths: Sequence[Path], name: str) -> TrainingImages:
        rows = [row for path in paths for row in read_folder(path)]
        lacking = partial(_lacking, columns=sft.columns)
        rows = usable(rows, lacking, stage.dir, config, paths, name)
        return training_images(rows, sft)

    images = learned(data, "failed")
    held_out = learned([inputs["validation"]], "failed-validation") if sft.validation else None
    start, objective = fit.Start(config), trainers.CrossEntropy(held_out)
    card = {"Training": {"base": inputs["model"].name, "sft": sft.model_dump(mode="json")}}
    metrics = fit.fit(
        start, sft.tuning, images, objective, sft.training, stage.dir, prompt=sft.soft_prompt, card=card
    )
    if not is_main():
        return
    counts = {"images": len(images), "steps": int(metrics["steps"])}
    shutil.rmtree(stage.dir / "checkpoints")
    stage.finish(counts, metrics)
    losses = "".join(
        f", {name} {metrics[name]:.4f}" for name in ("loss", "validation_loss") if name in metrics
    )
    print(f"sft: {counts['steps']} steps on {len(images)} images{losses}: {stage.dir}")


def _lacking(row: ImageRow, columns: Sequence[str]) -> str | None:
    """Why a row cannot be learned from, None where it has what ``columns`` name."""
    lacking = {"shorthand": "caption", "prose": "prose", "questions": "questions"}
    return next((f"no {column}" for column in columns if not getattr(row, lacking[column])), None)


def training_images(rows: Sequence[ImageRow], sft: SFTConfig) -> TrainingImages:
    """The rows with what ``sft.columns`` names of each."""
    keys, paths = [row.key for row in rows], [row.path for row in rows]
    return TrainingImages(keys, paths, lambda i, rng: targets(rows[i], sft, rng), sft.multi_view_share)


def targets(row: ImageRow, sft: SFTConfig, rng: random.Random) -> list[Target]:
    """The captions of a row and a fresh draw of its questions."""
    from captioner.method import qa

    found = []
    if "shorthand" in sft.columns and row.caption:
        found.append(Target(None, row.caption))
    if "prose" in sft.columns and row.prose:
        found.append(Target(prompts.load("describe"), row.prose))
    if "questions" in sft.columns and row.questions:
        drawn = rng.sample(row.questions, min(sft.questions_per_image, len(row.questions)))
        found += [Target(qa.question_text(question), question["answer"]) for question in drawn]
    return found
