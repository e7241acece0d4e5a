"""Alarms of a preference training: what it would not recover from stops it, with the last good checkpoint.

Losses and margins look well while a captioner collapses. So its own captions are looked at every few steps,
and before every checkpoint: whether they end, repeat themselves, change their length or become the same for
all images; how far it has moved from the captioner that the rounds began with; and, at every step, whether
the chosen captions have become less likely than under the reference.

Shapes: K tokens of a position, T positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from captioner.config import AlarmsConfig, Config, EngineConfig, SamplingConfig
from captioner.engines.hf import HFEngine
from captioner.errors import Refused
from captioner.files import atomic_write_json
from captioner.fit import distributed, objectives
from captioner.fit.checkpoints import last_checkpoint
from captioner.models.render import Renderer, TrainRow, collate
from captioner.pipeline import stages
from captioner.pipeline.stages import Prepared
from captioner.processes import is_main
from captioner.sources.folder import ImageRow
from captioner.statements import comparable_statements, repeats
from captioner.views import BadImage

TOP = 32  # tokens of a position that the divergence from the origin is taken over; the rest is one outcome
MEND = (
    "lower dpo.training.learning_rate, or raise dpo.ce_weight or dpo.beta, and add --redo; dpo.alarms holds "
    "the limits"
)


@dataclass(frozen=True)
class Origin:
    """What the captioner that the rounds began with says at each token of a few captions."""

    said: Sequence[tuple[Path, str]]  # image and caption
    ids: Sequence[Tensor]  # [T, K] of each caption: its likeliest tokens
    log_probs: Sequence[Tensor]  # [T, K]


def pictures(renderer: Renderer, paths: Sequence[Path]) -> dict[Path, Prepared[ImageRow]]:
    """Images that are looked at again and again: decoded once, by other processes. Raises BadImage."""
    rows = [ImageRow(str(path), path) for path in dict.fromkeys(paths)]
    with stages.images(renderer.spec, Config(), len(rows)) as preparing:
        found = {image.row.path: image for image in stages.prepared(rows, preparing)}
    for image in found.values():
        if image.reason:
            raise BadImage(image.reason)
    return found


def origin(renderer: Renderer, said: Sequence[tuple[Path, str]]) -> Origin:
    """Measure an origin on images and their captions (the chosen ones of a round)."""
    shown = pictures(renderer, [path for path, _ in said])
    top = [scores.topk(min(TOP, scores.shape[1])) for scores in _scores(renderer, said, shown)]
    return Origin(said, [each.indices for each in top], [each.values for each in top])


def drift(renderer: Renderer, start: Origin, shown: Mapping[Path, Prepared[ImageRow]]) -> float:
    """Mean over the tokens of KL(origin || captioner), nats: one forward of each caption, nothing sampled."""
    scores = _scores(renderer, start.said, shown)
    each = [
        objectives.divergence(then, now.gather(1, ids))
        for now, ids, then in zip(scores, start.ids, start.log_probs, strict=True)
    ]
    return torch.cat(each).mean().item()


@torch.no_grad()
def _scores(
    renderer: Renderer,
    said: Sequence[tuple[Path, str]],
    shown: Mapping[Path, Prepared[ImageRow]],
) -> Iterator[Tensor]:
    """Log-probabilities [T, vocabulary] at the tokens of each caption, its end token included."""
    captioner = renderer.captioner
    model: Any = captioner.model
    for path, caption in said:
        picture = shown[path].picture
        assert picture is not None
        patches, grid = renderer.patches_batch([picture])[0]
        batch = collate(renderer, [TrainRow(patches, grid, False, [renderer.branch_ids(None, caption)])])
        answer = batch.pop("labels")[0, 1:] >= 0
        inputs = {name: tensor.to(captioner.device) for name, tensor in batch.items()}
        hidden = model.model(**inputs, use_cache=False)[0][0, :-1]
        yield model.lm_head(hidden[answer.to(hidden.device)]).float().log_softmax(-1)


def written(renderer: Renderer, shown: Sequence[Prepared[ImageRow]], longest: int) -> dict[str, float]:
    """What greedy captions are like: shares that end, repeat statements, are different ones; mean tokens."""
    engine = HFEngine(renderer.captioner, renderer.config, EngineConfig(max_num_seqs=len(shown)))
    greedy = SamplingConfig(temperature=0.0, max_tokens=longest)
    made = [candidate for _, [candidate] in stages.caption_images(engine, shown, 1, greedy)]
    statements = [comparable_statements(each.text) for each in made]
    repeated = [repeats(said) / len(said) for said in statements if said]
    return {
        "ended": fmean(each.finish_reason == "stop" for each in made),
        "repeated": fmean(repeated) if repeated else 0.0,
        "unique": len({each.text for each in made}) / len(made),
        "tokens": fmean(each.tokens for each in made),
    }


class Alarms(TrainerCallback):
    """Looks after a training; raises Refused where it goes wrong. :meth:`begin` comes before the first step.

    No checkpoint is written behind a look that rang, nor while chosen captions stay below their reference for
    half as long as is allowed: each that stands is a good one.
    """

    def __init__(
        self,
        config: AlarmsConfig,
        renderer: Renderer,
        paths: Sequence[Path],
        out: Path,
        origin: Origin | None,
    ):
        self.config, self.renderer, self.origin, self.out = config, renderer, origin, out
        self.paths = list(dict.fromkeys(paths))[: config.images]
        self.file = out / "probe.json"  # of the reference
        self.below = 0  # steps in a row with chosen below its reference

    @cached_property
    def shown(self) -> dict[Path, Prepared[ImageRow]]:
        """What rank 0 looks at."""
        told = self.origin.said if self.origin else ()
        return pictures(self.renderer, [*self.paths, *(path for path, _ in told)])

    def begin(
        self,
        chosen: Callable[[], float],
        write: Callable[[int, dict[str, float]], None],
        resumed: bool,
    ) -> None:
        """``chosen`` gives the last step's mean log p(chosen) - reference; ``write`` keeps what is seen."""
        self.chosen, self.write = chosen, write
        (self.out / "alarm.json").unlink(missing_ok=True)
        self.start: dict[str, float] = {}
        if self.config.every and resumed and self.file.is_file():
            self.start = json.loads(self.file.read_text())
        elif self.config.every:
            self.start = self.look()
            if is_main():
                atomic_write_json(self.file, self.start)

    def look(self) -> dict[str, float]:
        """What the captioner writes now, and how far it is from the origin; its mode is left as it was.

        Rank 0 looks for all.
        """
        seen = [self._look()] if is_main() else []
        return cast(dict[str, float], distributed.collect(seen, self.renderer.captioner.device)[0])

    def _look(self) -> dict[str, float]:
        model = self.renderer.captioner.model
        training = model.training
        model.eval()
        shown = [self.shown[path] for path in self.paths]
        seen = written(self.renderer, shown, self.config.max_tokens)
        if self.origin is not None:
            seen["kl"] = drift(self.renderer, self.origin, self.shown)
        model.train(training)
        return seen

    def on_step_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step, config = state.global_step, self.config
        self.below = self.below + 1 if self.chosen() < -config.max_chosen_fall else 0
        if config.chosen_below and self.below >= config.chosen_below:
            what = "the chosen captions were less likely than under the reference"
            self.stop(f"alarm at step {step}: for {self.below} steps {what}")
        if config.every and (control.should_save or step % config.every == 0):
            seen = self.look()
            self.write(step, {f"probe/{name}": value for name, value in seen.items()})
            if wrong := changed(self.start, seen, config):
                self.stop(f"alarm at step {step}: {'; '.join(wrong)}")
        if config.chosen_below and 2 * self.below >= config.chosen_below:
            control.should_save = False

    def stop(self, what: str, where: str = "", fix: str = MEND) -> NoReturn:
        """Raise Refused, which names the last good checkpoint; ``alarm.json`` keeps it."""
        last = last_checkpoint(self.out)
        kept = last.name if last else "none yet, the reference"
        if is_main():
            atomic_write_json(self.out / "alarm.json", {"what": what, "where": where, "kept": kept})
        place = f"{self.out}; the last good checkpoint: {kept}" + (f"; {where}" if where else "")
        raise Refused(what, where=place, fix=fix)


def changed(start: dict[str, float], now: dict[str, float], config: AlarmsConfig) -> list[str]:
    """What is wrong with ``now``, in words; empty where nothing is."""
    worst = config.max_change
    ratio = max(now["tokens"], 1.0) / max(start["tokens"], 1.0)
    length = f"the captions have {now['tokens']:.0f} tokens, they had {start['tokens']:.0f}"
    kl, budget = now.get("kl", 0.0), config.max_kl
    rules = {
        f"{now['ended']:.0%} of the captions end, {start['ended']:.0%} did": (
            now["ended"] < start["ended"] - worst
        ),
        f"{now['repeated']:.0%} of the statements repeat others, {start['repeated']:.0%} did": (
            now["repeated"] > start["repeated"] + worst
        ),
        f"{now['unique']:.0%} of the captions are different ones, {start['unique']:.0%} were": (
            now["unique"] < start["unique"] / 2
        ),
        length: not 1 / config.max_length_ratio <= ratio <= config.max_length_ratio,
        f"{kl:.2f} nats a token from the SFT captioner, the budget is {budget}": (
            budget is not None and kl > budget
        ),
    }
    return [text for text, is_wrong in rules.items() if is_wrong]
