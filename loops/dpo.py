"""captioner dpo --round N [--gpus N]: preference training on the pairs of a round.

The pairs are looked through first. Then a short SFT on the golden captions, whose result is the round's
reference; then DPO with cross-entropy on the chosen captions from there, both with a fresh adapter. Writes
round-N/dpo and round-N/captioner (a stock checkpoint). An alarm while training exits 3 and keeps the last
good checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from captioner.config import Config
from captioner.errors import RunError
from captioner.files import hash_path, remove_dir
from captioner.fit import distributed
from captioner.fit.examples import PairedImages, Target, TrainingImages
from captioner.processes import is_main
from captioner.records import Golden, Pair
from captioner.runs import Run, RunDir, Shards, Stage, input_of
from captioner.sources import resolve
from captioner.sources.folder import read_folder
from captioner.statements import normalise, statement_spans
from loops.stages import StagePlan, begin


def plan(run: Run, round: int) -> list[StagePlan]:
    """What the stage reads, is made with and writes."""
    config, home = run.config, run.stage_dir(f"round-{round}")
    section = {"dpo": config.dpo, "pairs": config.pairs, "views": config.views, "dtype": config.model.dtype}
    inputs: dict[str, Path | str] = {"captioner": run.current_captioner(round)}
    inputs |= {"golden": home / "golden", "pairs": home / "pairs", "images": _images(run, round)}
    if (config.dpo.refuted_weight, config.dpo.confirmed_weight) != (1.0, 1.0):
        from captioner.method import rounds  # the methods import scipy: --help would wait for it

        inputs |= rounds.judged(home)
    if config.dpo.alarms.every and config.dpo.alarms.max_kl:
        inputs["origin"] = run.captioner_dir(0)
    return [StagePlan(f"round-{round}/dpo", inputs, section, outputs=[home / "captioner"])]


def dpo(run: RunDir, config: Config, round: int = 1, *, redo: bool = False, gpus: int = 1) -> Path:
    """Train on the preference pairs of a round; returns the checkpoint of the round's captioner.

    Args:
        run: Run directory with the golden captions and pairs of the round.
        config: Settings; `model`, `views`, `pairs` and `dpo` are read, `gate.data` and `evaluate.data` too.
        round: Number of the round, from 1.
        redo: Remove the results of this stage and make them anew.
        gpus: Processes to start, one per GPU.

    Raises:
        Refused: the linter dropped too many pairs, or an alarm stopped the training.
    """
    if distributed.wanted(gpus):
        distributed.launch("dpo", run, config, gpus, round=round, redo=redo)
        return Run.open(run, config).captioner_dir(round)
    run = Run.open(run, config, create=False)
    [planned] = plan(run, round)
    with distributed.main_first(config.model.device):
        stage = begin(run, planned, redo)
        if is_main() and not stage.done:
            remove_dir(run.captioner_dir(round))
    if stage.done:
        print(f"dpo was done before: {stage.dir}")
    else:
        _train(run, stage, round)
    return run.captioner_dir(round)


def _train(run: Run, stage: Stage, round: int) -> None:
    """Lint the pairs, train the reference and the captioner from it, and finish the stage."""
    from captioner.fit import fit, trainers

    config, inputs = run.config, stage.inputs
    dpo = config.dpo
    trainers.check(trainers.Preference(dpo), dpo.training, fit.sharded(dpo.tuning))
    start, golden, pairs, images = (inputs[name] for name in ("captioner", "golden", "pairs", "images"))
    target = run.captioner_dir(round)
    rows = Shards(pairs, Pair).read_all()
    if not rows:
        fix = "look at the claims; --pairs.min_refuted 0 pairs every sample"
        raise RunError("the round has no pairs", where=str(pairs), fix=fix)
    with distributed.main_first(config.model.device):  # the held-out scenes may have to be drawn
        rows, seen = linted(run, rows, start)
    print("pairs: " + ", ".join(f"{count:.1f} {name}".replace(".0 ", " ") for name, count in seen.items()))
    paths = {row.key: row.path for row in read_folder(images, captions=False)}
    reference, metrics = start, {}
    if config.dpo.golden_sft_steps:
        reference = stage.dir / "reference"
        if not reference.is_dir():
            captions = Shards(golden, Golden).read_all()
            metrics = golden_sft(config, start, captions, rows, paths, stage.dir / "golden-sft", reference)
    judged = verdicts_of(inputs["claims"].parent) if "claims" in inputs else {}
    metrics |= prefer(config, reference, rows, paths, stage.dir, target, inputs.get("origin"), judged)
    if not is_main():
        return
    shutil.rmtree(stage.dir / "golden-sft" / "checkpoints", ignore_errors=True)
    shutil.rmtree(stage.dir / "checkpoints")
    steps = int(metrics["steps"])
    where = reference.relative_to(run.path)
    stage.finish(
        {"pairs": len(rows), "steps": steps, "golden_sft_steps": config.dpo.golden_sft_steps},
        metrics,
        linted=seen,
        reference={"path": str(where), "hash": hash_path(reference)},
    )
    print(
        f"round {round}: {steps} steps on {len(rows)} pairs against {where}, "
        f"log-probability of chosen {metrics['logps/chosen']:.1f}, of rejected "
        f"{metrics['logps/rejected']:.1f}, preferred {metrics['rewards/accuracies']:.0%}: "
        f"{target}"
    )


def linted(run: Run, rows: Sequence[Pair], checkpoint: Path) -> tuple[list[Pair], dict[str, float]]:
    """The pairs that the linter lets through and what it counted; see :func:`captioner.method.pairs.lint`."""
    from transformers import AutoTokenizer

    from captioner.method import pairs as pairing

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    held_out = {}
    for source in (run.config.gate.data, run.config.evaluate.data):
        for row in read_folder(resolve(source, run), captions=False):
            held_out[hash_path(row.path)] = f"{row.key} of {source}"

    def token_ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    return pairing.lint(rows, token_ids, held_out, run.config.pairs)


def verdicts_of(home: Path) -> dict[str, dict[str, str]]:
    """The verdict on each statement (normalised) of each image, from the round in ``home``."""
    from captioner.method import verdicts

    found: dict[str, dict[str, str]] = {}
    for claim in verdicts.read(home):
        found.setdefault(claim.key, {})[normalise(claim.text)] = claim.verdict
    return found


def silent_parts(golden: Golden) -> tuple[tuple[int, int], ...]:
    """The characters of a golden caption's SFT text that are not learned, with the separator before them."""
    text, silent = golden.sft_text or golden.text, {normalise(each) for each in golden.silent}
    parts, before = [], 0
    for start, stop, _ in statement_spans(text):
        if normalise(text[start:stop]) in silent:
            parts.append((before, stop))
        before = stop
    return tuple(parts)


def golden_sft(
    config: Config,
    start: Path,
    captions: Sequence[Golden],
    pairs: Sequence[Pair],
    paths: Mapping[str, Path],
    out: Path,
    reference: Path,
) -> dict[str, float]:
    """A short SFT on the golden captions, and on ``golden_sft_samples`` rejected ones of each image.

    Publishes the round's reference. A golden caption is not the captioner's own; before it has learned it,
    DPO would push it where it never goes (Yang et al. 2025, OPA-DPO, arXiv 2501.09695).
    """
    from captioner.fit import fit, trainers

    dpo = config.dpo
    own: dict[str, list[str]] = {}
    for pair in pairs:
        own.setdefault(pair.key, []).append(pair.rejected)
    targets = [
        [
            Target(None, each.sft_text or each.text, silent_parts(each)),
            *(Target(None, text) for text in own.get(each.key, [])[: dpo.golden_sft_samples]),
        ]
        for each in captions
    ]
    keys = [golden.key for golden in captions]
    images = TrainingImages(keys, [paths[key] for key in keys], lambda index, _rng: targets[index])
    own_steps = {"max_steps": dpo.golden_sft_steps, "num_train_epochs": None}
    training = dpo.training.model_copy(update={**own_steps, "learning_rate": dpo.golden_sft_learning_rate})
    begin, objective = fit.Start(config, start), trainers.CrossEntropy()
    out.mkdir(exist_ok=True)
    metrics = fit.fit(begin, dpo.tuning, images, objective, training, out, reference, keep_adapter=False)
    return {f"golden_sft_{name}": value for name, value in metrics.items()}


def prefer(
    config: Config,
    reference: Path,
    pairs: Sequence[Pair],
    paths: Mapping[str, Path],
    out: Path,
    target: Path,
    origin: Path | None = None,
    verdicts: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, float]:
    """Preference training from the reference with a fresh tuning; publishes ``out/adapter`` and ``target``.

    ``origin`` is the captioner that the rounds began with, for the alarm of drift; it is measured and gone
    before the reference is loaded.
    """
    from captioner.fit import alarms, fit, trainers
    from captioner.models import model, render

    dpo, measured = config.dpo, None
    if origin is not None:
        first = model.load(fit.Start(config, origin).model)
        said = [(paths[key], text) for key, text in {pair.key: pair.chosen for pair in pairs}.items()]
        measured = alarms.origin(render.Renderer(first, config.views), said[: dpo.alarms.images])
        del first
    examples, objective = PairedImages(pairs, paths, verdicts or {}), trainers.Preference(dpo, measured)
    return fit.fit(fit.Start(config, reference), dpo.tuning, examples, objective, dpo.training, out, target)


def _images(run: Run, round: int) -> Path | str:
    """The image folder that the candidates of a round were sampled from, as their manifest names it.

    Before they were sampled: what the config names.
    """
    return input_of(run.stage_dir(f"round-{round}/candidates"), "images") or run.config.golden.images
