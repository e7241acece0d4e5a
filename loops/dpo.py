"""captioner dpo --round N [--gpus N]: preference training on the pairs of a round.

The pairs are looked through first. Then a short SFT on the golden captions, whose result is the round's
reference; then DPO with cross-entropy on the chosen captions from there, both with a fresh adapter. Writes
round-N/dpo and round-N/captioner (a stock checkpoint). An alarm while training exits 3 and keeps the last
good checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from captioner.config import Config, TrainingConfig
from captioner.errors import RunError
from captioner.fit import distributed
from captioner.method import pairs as pairing
from captioner.records import Claim, Golden, Pair
from captioner.runs import Run, Shards, hash_path, is_main, remove_dir
from captioner.sources import resolve
from captioner.sources.folder import read_folder
from captioner.statements import normalise


def run(config: Config, args: argparse.Namespace) -> int:
    """The dpo stage of a round."""
    if distributed.wanted(args):
        return distributed.launch("dpo", config, args)
    run = Run.open(args.run_dir, config, create=False)
    start = run.current_captioner(args.round)
    home = run.stage_dir(f"round-{args.round}")
    golden, pairs = _done(run, args.round, "golden"), _done(run, args.round, "pairs")
    images = _images(_done(run, args.round, "candidates"))
    section = {"dpo": config.dpo, "pairs": config.pairs, "views": config.views, "dtype": config.model.dtype}
    inputs = {"captioner": start, "golden": golden, "pairs": pairs, "images": images}
    if weighted := (config.dpo.refuted_weight, config.dpo.confirmed_weight) != (1.0, 1.0):
        inputs["claims"] = _done(run, args.round, "claims")
    origin = run.captioner_dir(0) if config.dpo.alarms.every and config.dpo.alarms.max_kl else None
    if origin:
        inputs["origin"] = origin
    with distributed.main_first(config.model.device):
        stage = run.stage(f"round-{args.round}/dpo", section, inputs, redo=args.redo)
        if is_main() and not stage.done:
            remove_dir(home / "captioner")
    if stage.done:
        print(f"dpo was done before: {stage.dir}")
        return 0
    rows = Shards(pairs, Pair).read_all()
    if not rows:
        mend = "look at the claims; --pairs.min_refuted 0 pairs every sample"
        raise RunError("the round has no pairs", where=str(pairs), mend=mend)
    with distributed.main_first(config.model.device):  # the held-out scenes may have to be drawn
        rows, seen = linted(run, rows, start)
    print("pairs: " + ", ".join(f"{_short(count)} {name}" for name, count in seen.items()))
    paths = {row.key: row.path for row in read_folder(images, captions=False)}
    reference, metrics = start, {}
    if config.dpo.golden_sft_steps:
        reference = stage.dir / "reference"
        captions = Shards(golden, Golden).read_all()
        if not reference.is_dir():
            metrics = golden_sft(config, start, captions, rows, paths, stage.dir / "golden-sft", reference)
        distributed.barrier()  # rank 0 publishes the reference
    judged = verdicts(inputs["claims"]) if weighted else {}
    metrics |= prefer(config, reference, rows, paths, stage.dir, home / "captioner", origin, judged)
    if not is_main():
        return 0
    shutil.rmtree(stage.dir / "golden-sft" / "checkpoints", ignore_errors=True)
    shutil.rmtree(stage.dir / "checkpoints")
    steps = config.dpo.training.steps
    where = reference.relative_to(run.path)
    stage.finish(
        {"pairs": len(rows), "steps": steps, "golden_sft_steps": config.dpo.golden_sft_steps},
        metrics,
        linted=seen,
        reference={"path": str(where), "hash": hash_path(reference)},
    )
    print(
        f"round {args.round}: {steps} steps on {len(rows)} pairs against {where}, "
        f"log-probability of chosen {metrics['logps/chosen']:.1f}, of rejected "
        f"{metrics['logps/rejected']:.1f}, preferred {metrics['rewards/accuracies']:.0%}: "
        f"{home / 'captioner'}"
    )
    return 0


def linted(run: Run, rows: Sequence[Pair], checkpoint: Path) -> tuple[list[Pair], dict[str, float]]:
    """The pairs that the linter lets through and what it counted; see :func:`captioner.method.pairs.lint`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    held_out = {}
    for source in (run.config.gate.data, run.config.evaluate.data):
        for row in read_folder(resolve(source, run), captions=False):
            held_out[hash_path(row.path)] = f"{row.key} of {source}"

    def token_ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    return pairing.lint(rows, token_ids, held_out, run.config.pairs)


def verdicts(claims: Path) -> dict[str, dict[str, str]]:
    """The verdict on each statement (normalised) of each image, from the claims of a round."""
    found: dict[str, dict[str, str]] = {}
    for claim in Shards(claims, Claim).read_all():
        found.setdefault(claim.key, {})[normalise(claim.text)] = claim.verdict
    return found


def _short(count: float) -> str:
    return f"{count:.1f}" if isinstance(count, float) else str(count)


def golden_sft(
    config: Config,
    start: Path,
    captions: Sequence[Golden],
    pairs: Sequence[Pair],
    paths: dict[str, Path],
    out: Path,
    reference: Path,
) -> dict[str, float]:
    """A short SFT on the golden captions, and on ``golden_sft_samples`` rejected ones of each image.

    Publishes the round's reference. A golden caption is not the captioner's own; before it has learned it,
    DPO would push it where it never goes (Yang et al. 2025, OPA-DPO, arXiv 2501.09695).
    """
    from captioner.fit import train
    from captioner.models import fuse, model, render

    dpo = config.dpo
    training = _seeded(config, steps=dpo.golden_sft_steps, learning_rate=dpo.golden_sft_learning_rate)
    captioner = model.load(config.model.model_copy(update={"path": str(start)}))
    train.tune(captioner, dpo.tuning, None, training.seed)
    own: dict[str, list[str]] = {}
    for pair in pairs:
        own.setdefault(pair.key, []).append(pair.rejected)
    said = [[golden.text, *own.get(golden.key, [])[: dpo.golden_sft_samples]] for golden in captions]
    targets = [[train.Target(None, text) for text in texts] for texts in said]
    keys = [golden.key for golden in captions]
    images = train.TrainingImages(keys, [paths[key] for key in keys], lambda index, _rng: targets[index])
    out.mkdir(exist_ok=True)
    renderer = render.Renderer(captioner, config.views)
    captioner.views = renderer.config
    metrics = train.train_sft(captioner, renderer, images, training, out)
    if is_main():
        fuse.export(captioner, reference, train.ADAPTER)
    return {f"golden_sft_{name}": value for name, value in metrics.items()}


def prefer(
    config: Config,
    reference: Path,
    pairs: Sequence[Pair],
    paths: dict[str, Path],
    out: Path,
    target: Path,
    origin: Path | None = None,
    verdicts: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, float]:
    """Preference training from the reference with a fresh adapter; publishes ``out/adapter`` and ``target``.

    ``origin`` is the captioner that the rounds began with, for the alarm of drift; it is measured and gone
    before the reference is loaded.
    """
    from captioner.fit import alarms, preference, train
    from captioner.models import adapters, fuse, model, render

    dpo = config.dpo
    training = _seeded(config)
    measured = None
    if origin is not None:
        first = model.load(config.model.model_copy(update={"path": str(origin)}))
        said = [(paths[key], text) for key, text in {pair.key: pair.chosen for pair in pairs}.items()]
        renderer = render.Renderer(first, config.views)
        measured = alarms.origin(first, renderer, said[: dpo.alarms.images])
        del first, renderer
    captioner = model.load(config.model.model_copy(update={"path": str(reference)}))
    train.tune(captioner, dpo.tuning, None, training.seed)
    renderer = render.Renderer(captioner, config.views)
    captioner.views = renderer.config
    metrics = preference.train_preference(
        captioner, renderer, pairs, paths, training, out, dpo, verdicts=verdicts, origin=measured
    )
    if is_main():
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
