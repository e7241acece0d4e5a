"""captioner dpo --round N: preference training on the pairs of a round.

First a short SFT on the golden captions, whose result is the round's reference; then DPO with cross-entropy
on the chosen captions from there, both with a fresh adapter. Writes round-N/dpo and round-N/captioner (a
stock checkpoint).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from captioner.config import Config, TrainingConfig
from captioner.errors import RunError
from captioner.formats.folder import read_folder
from captioner.records import Golden, Pair
from captioner.runs import Run, Shards, hash_path, remove_dir


def run(config: Config, args: argparse.Namespace) -> int:
    """The dpo stage of a round."""
    run = Run.open(args.run_dir, config, create=False)
    start = run.current_captioner(args.round)
    home = run.stage_dir(f"round-{args.round}")
    golden, pairs = _done(run, args.round, "golden"), _done(run, args.round, "pairs")
    images = _images(_done(run, args.round, "candidates"))
    section = {"dpo": config.dpo, "views": config.views, "dtype": config.model.dtype}
    inputs = {"captioner": start, "golden": golden, "pairs": pairs, "images": images}
    stage = run.stage(f"round-{args.round}/dpo", section, inputs, redo=args.redo)
    if stage.done:
        print(f"dpo was done before: {stage.dir}")
        return 0
    remove_dir(home / "captioner")
    rows = Shards(pairs, Pair).read_all()
    if not rows:
        mend = "look at the claims; --pairs.min_refuted 0 pairs every sample"
        raise RunError("the round has no pairs", where=str(pairs), mend=mend)
    paths = {row.key: row.path for row in read_folder(images, captions=False)}
    reference, metrics = start, {}
    if config.dpo.golden_sft_steps:
        reference = stage.dir / "reference"
        captions = Shards(golden, Golden).read_all()
        if not reference.is_dir():
            metrics = golden_sft(config, start, captions, paths, stage.dir / "golden-sft", reference)
    metrics |= prefer(config, reference, rows, paths, stage.dir, home / "captioner")
    shutil.rmtree(stage.dir / "golden-sft" / "checkpoints", ignore_errors=True)
    shutil.rmtree(stage.dir / "checkpoints")
    steps = config.dpo.training.steps
    where = reference.relative_to(run.path)
    stage.finish(
        {"pairs": len(rows), "steps": steps, "golden_sft_steps": config.dpo.golden_sft_steps},
        metrics,
        reference={"path": str(where), "hash": hash_path(reference)},
    )
    print(
        f"round {args.round}: {steps} steps on {len(rows)} pairs against {where}, "
        f"log-probability of chosen {metrics['logps/chosen']:.1f}, of rejected "
        f"{metrics['logps/rejected']:.1f}, preferred {metrics['rewards/accuracies']:.0%}: "
        f"{home / 'captioner'}"
    )
    return 0


def golden_sft(
    config: Config,
    start: Path,
    captions: Sequence[Golden],
    paths: dict[str, Path],
    out: Path,
    reference: Path,
) -> dict[str, float]:
    """A short SFT on the golden captions; publishes the round's reference."""
    from captioner import fuse, model, render, train

    dpo = config.dpo
    training = _seeded(config, steps=dpo.golden_sft_steps, learning_rate=dpo.golden_sft_learning_rate)
    captioner = model.load(config.model.model_copy(update={"path": str(start)}))
    train.tune(captioner, dpo.tuning, None, training.seed)
    targets = [[train.Target(None, golden.text)] for golden in captions]
    keys = [golden.key for golden in captions]
    images = train.TrainingImages(keys, [paths[key] for key in keys], lambda index, _rng: targets[index])
    out.mkdir(exist_ok=True)
    renderer = render.Renderer(captioner, config.views)
    captioner.views = renderer.config
    metrics = train.train_sft(captioner, renderer, images, training, out)
    fuse.export(captioner, reference, train.ADAPTER)
    return {f"golden_sft_{name}": value for name, value in metrics.items()}


def prefer(
    config: Config, reference: Path, pairs: Sequence[Pair], paths: dict[str, Path], out: Path, target: Path
) -> dict[str, float]:
    """DPO + CE from the reference with a fresh adapter; publishes ``out/adapter`` and the captioner."""
    from captioner import adapters, fuse, model, render, train

    dpo = config.dpo
    training = _seeded(config)
    captioner = model.load(config.model.model_copy(update={"path": str(reference)}))
    train.tune(captioner, dpo.tuning, None, training.seed)
    renderer = render.Renderer(captioner, config.views)
    captioner.views = renderer.config
    metrics = train.train_dpo(
        captioner, renderer, pairs, paths, training, out, beta=dpo.beta, ce_weight=dpo.ce_weight
    )
    adapters.save(captioner, train.ADAPTER, out / "adapter")
    fuse.export(captioner, target, train.ADAPTER)
    return metrics


def _seeded(config: Config, **changes: float) -> TrainingConfig:
    seed = config.seed + config.dpo.training.seed
    return config.dpo.training.model_copy(update={"seed": seed, **changes})


def _done(run: Run, number: int, name: str) -> Path:
    """The directory of a finished stage of the round. Raises RunError naming the command that makes it."""
    folder = run.stage_dir(f"round-{number}/{name}")
    if not (folder / "stage.json").is_file():
        mend = f"captioner golden --round {number} --run {run.path}"
        raise RunError(f"round {number} has no {name} yet", where=str(folder), mend=mend)
    return folder


def _images(candidates: Path) -> Path:
    """The image folder that the candidates were sampled from, as their manifest names it."""
    manifest = json.loads((candidates / "stage.json").read_text(encoding="utf-8"))
    return (candidates / manifest["input_paths"]["images"]).resolve()
