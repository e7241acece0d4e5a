"""Preference training on TRL's DPOTrainer and KTOTrainer, with one sequence for all captions of an image.

TRL scores a batch of captions; here the model sees rows in which the images are encoded once and the chosen
caption and every rejected one are branches behind them. :func:`shared_prefix` stands between the two, so
every loss of TRL works unchanged, and :mod:`captioner.fit.losses` adds terms from the same forward.

Shapes: B images of a batch, N their pairs, U branches (B chosen, N rejected and, where a loss asks for them,
B more), L tokens of the longest branch, T tokens of a row, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # the type that TRL asks for
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from captioner import config
from captioner.config import TrainingConfig
from captioner.errors import Refused, RunError
from captioner.files import atomic_write_json
from captioner.fit import alarms, distributed, losses, train
from captioner.fit.train import Collator, Target, TrainingImages
from captioner.models import adapters
from captioner.models.model import Captioner
from captioner.models.render import Renderer, TrainRow
from captioner.processes import is_main, world_size
from captioner.progress import progress
from captioner.records import Pair
from captioner.runs import Shards

Verdicts = Mapping[str, Mapping[str, str]]  # key of an image -> normalised statement -> verdict
PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1")  # what TRL's fused head gives, each [U, L - 1]


def by_image(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs of each image that have the same chosen caption, in order of first appearance."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.key, pair.chosen), []).append(pair)
    return list(groups.values())


class PairCollator(Collator):
    """Images with all their pairs, in the layout of TRL's trainers, computed on packed rows.

    ``packed`` holds the rows that the model sees; ``gather`` [U, L] says where in them each token of a branch
    lies and ``expand`` which branch each caption of TRL's batch is (the chosen one of an image comes once for
    each of its pairs). ``reference`` holds the pairs with their reference log-probabilities, by image.
    """

    def __init__(
        self,
        renderer: Renderer,
        pairs: Sequence[Pair],
        paths: Mapping[str, Path],
        training: TrainingConfig,
        dpo: config.DPOConfig,
        verdicts: Verdicts,
    ):
        self.groups, self.dpo, self.verdicts = by_image(pairs), dpo, verdicts
        self.weighted = (dpo.refuted_weight, dpo.confirmed_weight) != (1.0, 1.0)
        self.reference: list[list[Pair]] = []
        self.hashes: list[list[dict[str, str]]] = []  # of the last batch, by image and pair
        keys = [group[0].key for group in self.groups]
        images = TrainingImages(keys, [paths[key] for key in keys], self._draw)
        super().__init__(renderer, images, training.seed, training.per_device_train_batch_size)

    def _draw(self, index: int, _rng: Any) -> list[Target]:
        group = self.groups[index]
        said = [group[0].chosen, *(pair.rejected for pair in group)]
        if (
            "kto" in self.dpo.loss_type
        ):  # Ethayarajh et al. 2024: the KL is estimated on captions of other images
            said.append(self.groups[(index + 1) % len(self.groups)][0].chosen)
        return [Target(None, text) for text in said]

    def pack(self, rows: list[TrainRow], positions: list[int], picked: list[int]) -> dict[str, Any]:
        kto = "kto" in self.dpo.loss_type
        shown = list(rows)
        if self.dpo.image_weight:
            channels = self.renderer.normalise(rows[0].pixel_values[:1]).shape[1]
            gray = [row.pixel_values.new_zeros(len(row.pixel_values), channels).float() for row in rows]
            shown += [
                TrainRow(pixels, row.grid, row.whole_only, row.branches[:1])
                for pixels, row in zip(gray, rows, strict=True)
            ]
            positions, picked = positions * 2, picked * 2
        packed = super().pack(shown, positions, picked)
        packed.pop("labels")
        places = self._places(shown, packed["input_ids"].shape[1])  # of each branch, row by row
        branches = [row.branches for row in shown]
        # first the chosen captions, then the rejected ones, then what a further term needs
        order = [(b, 0) for b in range(len(rows))]
        order += [(b, j) for b, row in enumerate(rows) for j in range(1, len(row.branches) - kto)]
        order += [(b, len(row.branches) - 1) for b, row in enumerate(rows) if kto]
        order += [(b, 0) for b in range(len(rows), len(shown))]
        ids = _table([branches[b][j][0] for b, j in order])
        completion = _table([[int(on) for on in branches[b][j][1]] for b, j in order])
        attention = _table([[1] * len(branches[b][j][0]) for b, j in order])
        gather = _table([list(range(places[b][j], places[b][j] + len(branches[b][j][0]))) for b, j in order])
        batch: dict[str, Any] = {"input_ids": ids, "completion_mask": completion, "attention_mask": attention}
        groups = [self.groups[i] for i in picked[: len(rows)]]
        if self.weighted:
            said = [_said(groups[b % len(rows)], j, len(branches[b])) for b, j in order]
            keys = [groups[b % len(rows)][0].key for b, _ in order]
            batch["weights"] = self._weights(said, keys, completion)
        self.hashes = self._hashes(rows, groups)
        scored = [self.reference[i] for i in picked[: len(rows)]] if self.reference else []
        self._check(scored)
        batch |= {"packed": packed, "gather": gather}
        sizes = [len(group) for group in groups]
        return _for_kto(batch, sizes, scored) if kto else self._for_dpo(batch, sizes, scored)

    def _places(self, rows: list[TrainRow], width: int) -> list[list[int]]:
        """Where each branch of each row begins in the flattened rows."""
        places: list[list[int]] = []
        for b, row in enumerate(rows):
            at = b * width + len(self.renderer.prefix_ids(row.grid, row.whole_only))
            places.append([])
            for ids, _ in row.branches:
                places[-1].append(at)
                at += len(ids)
        return places

    def _weights(self, said: list[str | None], keys: list[str], completion: Tensor) -> Tensor:
        """Token weights [U, L]: of statements by their verdict, 1 elsewhere."""
        weights = torch.ones(completion.shape)
        tokenizer = self.renderer.captioner.tokenizer
        for u, (text, key) in enumerate(zip(said, keys, strict=True)):
            if text is None:
                continue
            encoded = tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            own = losses.token_weights(
                text,
                encoded["offset_mapping"],
                self.verdicts.get(key, {}),
                self.dpo.confirmed_weight,
                self.dpo.refuted_weight,
            )
            start = int(completion[u].argmax())
            weights[u, start : start + len(own)] = torch.tensor(own)
        return weights

    def _hashes(self, rows: list[TrainRow], groups: list[list[Pair]]) -> list[list[dict[str, str]]]:
        """Hashes of the pixels and tokens (and token weights) of each pair, by image."""
        setting = [self.dpo.refuted_weight, self.dpo.confirmed_weight] if self.weighted else []
        hashes: list[list[dict[str, str]]] = []
        for row, group in zip(rows, groups, strict=True):
            pixels = hashlib.sha256(row.pixel_values.numpy().tobytes() + row.grid.numpy().tobytes())
            prefix = self.renderer.prefix_ids(row.grid, row.whole_only)
            hashes.append([])
            for j in range(1, len(group) + 1):
                seen = [prefix, row.branches[0][0], row.branches[j][0], setting]
                if len(row.branches) > len(group) + 1:  # the caption of another image
                    seen.append(row.branches[-1][0])
                tokens = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
                hashes[-1].append({"ref_pixels": pixels.hexdigest(), "ref_tokens": tokens})
        return hashes

    def _check(self, scored: list[list[Pair]]) -> None:
        for hashes, group in zip(self.hashes if scored else (), scored, strict=True):
            for of_pair, pair in zip(hashes, group, strict=True):
                for name, value in of_pair.items():
                    if getattr(pair, name) != value:
                        raise _stale(name.removeprefix("ref_"), pair.key)

    def _for_dpo(self, batch: dict[str, Any], sizes: list[int], scored: list[list[Pair]]) -> dict[str, Any]:
        """N chosen, then N rejected: [2N, L], as TRL's DPOTrainer has them."""
        owner = torch.tensor([b for b, size in enumerate(sizes) for _ in range(size)])
        expand = torch.cat([owner, len(sizes) + torch.arange(len(owner))])
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        for name in ("input_ids", "completion_mask", "attention_mask"):
            batch[name] = batch[name][expand]
        batch |= {"expand": expand, "branch_labels": labels}
        if not scored:
            return batch
        pairs = [pair for group in scored for pair in group]
        chosen, rejected = (
            torch.tensor([getattr(pair, f"ref_{side}_logp") for pair in pairs])
            for side in ("chosen", "rejected")
        )
        if self.dpo.length_margin:
            long, short = batch["completion_mask"].sum(1).chunk(2)
            rejected = rejected + losses.length_offset(long, short, self.dpo.length_margin, self.dpo.beta)
        batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        if self.dpo.image_weight:
            batch["ref_masked_logps"] = torch.tensor([group[0].ref_masked_logp for group in scored])
        return batch


def _for_kto(batch: dict[str, Any], sizes: list[int], scored: list[list[Pair]]) -> dict[str, Any]:
    """Every caption once [B + N, L] with its label, and a caption of another image [B, L] for the KL."""
    images, pairs = len(sizes), sum(sizes)
    for name in ("input_ids", "completion_mask", "attention_mask", "gather", "weights"):
        if name in batch:
            batch[name], batch[f"KL_{name}"] = batch[name].split([images + pairs, images])
    batch["label"] = torch.tensor([True] * images + [False] * pairs)
    if scored:
        chosen = [group[0].ref_chosen_logp for group in scored]
        rejected = [pair.ref_rejected_logp for group in scored for pair in group]
        batch["ref_logps"] = torch.tensor(chosen + rejected)
        batch["ref_KL_logps"] = torch.tensor([group[0].ref_unpaired_logp for group in scored])
    return batch


def _said(group: list[Pair], branch: int, branches: int) -> str | None:
    """The caption of a branch; None for one that is another image's."""
    if branch == 0:
        return group[0].chosen
    return group[branch - 1].rejected if branch <= len(group) else None


def _table(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def _stale(what: str, where: str) -> RunError:
    return RunError(
        f"the stored reference log-probabilities were computed of other {what}",
        where=where,
        fix="add --redo to make the stage anew, or restore what it was made with",
    )


# ---- between TRL and the model


@dataclass
class Seen:
    """What the last forward gave each branch: log-probabilities [U, L - 1], token weights applied."""

    log_probs: Tensor


@contextmanager
def shared_prefix(captioner: Captioner) -> Iterator[Seen]:
    """The backbone runs on ``packed`` rows, the head on branches, TRL sees captions.

    Of the backbone's states [B, T, D] those at ``gather`` [U, L] go to the head; what it gives each branch is
    weighted, and handed on for each caption of ``expand`` [2N]. Calls without ``gather`` are left alone.
    """
    seen, asked = Seen(torch.empty(0)), dict[str, Any]()

    def ask(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        asked.clear()
        if "gather" in kwargs:
            asked.update({name: kwargs.get(name) for name in ("gather", "expand", "weights")})
            kwargs = {**kwargs, "labels": kwargs.get("branch_labels", kwargs["labels"])}
        return args, kwargs

    def unpack(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return ((), {**kwargs["packed"], "use_cache": False}) if "gather" in kwargs else (args, kwargs)

    def pick(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if asked:
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[asked["gather"]]
        return output

    def answer(_module: Any, _args: Any, output: Any) -> Any:
        if not asked:
            return output
        if asked["weights"] is not None:
            output.log_probs = output.log_probs * asked["weights"][:, 1:]
        seen.log_probs = output.log_probs
        if asked["expand"] is not None:
            for name in PER_TOKEN:
                if (value := getattr(output, name)) is not None:
                    setattr(output, name, value[asked["expand"]])
        asked.clear()
        return output

    model, backbone = captioner.model, captioner.model.model
    handles = [
        model.register_forward_pre_hook(ask, with_kwargs=True),
        backbone.register_forward_pre_hook(unpack, with_kwargs=True),
        backbone.register_forward_hook(pick, with_kwargs=True),
        model.register_forward_hook(answer),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# ---- trainers


class _Preference(train._Trainer):
    """What both preference trainers share. Tokens and reference log-probabilities come with the batch: TRL
    neither tokenises nor precomputes. Our terms are added to TRL's loss."""

    not_finite = Refused
    seen: Seen  # what :func:`shared_prefix` yields
    dpo: config.DPOConfig
    _metrics: Any

    def _prepare_dataset(self, dataset: Dataset, *_args: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_args: Any) -> Dataset:
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Tensor:
        loss = super()._compute_loss(model, inputs, return_outputs)  # type: ignore[misc]
        for name, (weight, term) in self.terms(inputs).items():
            if weight:
                value = term()
                self._metrics["train"][f"loss/{name}"].append(value.item())
                loss = loss + weight * value
        return loss

    def terms(self, inputs: dict[str, Any]) -> dict[str, tuple[float, Callable[[], Tensor]]]:
        """Our losses by name: weight and value."""
        raise NotImplementedError


class _DPO(_Preference, DPOTrainer):
    def terms(self, inputs: dict[str, Any]) -> dict[str, tuple[float, Callable[[], Tensor]]]:
        logps, beta = self.seen.log_probs.sum(1), self.dpo.beta
        ref = inputs["ref_chosen_logps"]
        owner = inputs["expand"][: len(ref)]

        def image_term() -> Tensor:
            ref_masked = inputs["ref_masked_logps"]
            own = torch.searchsorted(owner, torch.arange(len(ref_masked), device=owner.device))
            chosen, masked = logps[: len(ref_masked)], logps[-len(ref_masked) :]
            return losses.image_conditional(chosen, ref[own], masked, ref_masked, beta)

        return {
            "anchor": (self.dpo.anchor_weight, lambda: losses.anchor(logps[owner], ref, beta)),
            "image": (self.dpo.image_weight, image_term),
        }


class _KTO(_Preference, KTOTrainer):
    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor:
        other = {name: batch[f"KL_{name}"] for name in ("gather", "weights") if f"KL_{name}" in batch}
        return super()._compute_kl_logps(model, batch | other)

    def terms(self, inputs: dict[str, Any]) -> dict[str, tuple[float, Callable[[], Tensor]]]:
        mask = inputs["completion_mask"][:, 1:] * inputs["label"][:, None]
        return {"ce": (self.dpo.ce_weight, lambda: losses.cross_entropy(self.seen.log_probs, mask))}


def arguments(
    captioner: Captioner, training: TrainingConfig, out: Path, dpo: config.DPOConfig
) -> DPOConfig | KTOConfig:
    """What TRL is told: its losses by name; cross-entropy is its `sft`."""
    own: dict[str, Any] = {"max_length": None, "precompute_ref_log_probs": True, "beta": dpo.beta}
    own |= train._arguments(captioner, training, out)
    if "kto" in dpo.loss_type:
        return KTOConfig(loss_type="kto", **own)
    types: list[str] = list(dpo.loss_type)
    weights = list(dpo.loss_weights) or [1.0] * len(dpo.loss_type)
    if dpo.ce_weight:
        types, weights = [*types, "sft"], [*weights, dpo.ce_weight]
    return DPOConfig(loss_type=types, loss_weights=weights, label_smoothing=dpo.label_smoothing, **own)


def train_preference(
    captioner: Captioner,
    renderer: Renderer,
    pairs: Sequence[Pair],
    paths: Mapping[str, Path],
    training: TrainingConfig,
    out: Path,
    dpo: config.DPOConfig,
    *,
    verdicts: Verdicts | None = None,
    origin: alarms.Origin | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, float]:
    """Preference training of what requires a gradient, on all pairs of an image at once.

    Loss = sum of TRL's losses of ``dpo.loss_type`` over pairs + ce_weight * mean -log p over the tokens of
    chosen (Pang et al. 2024) + our terms (:mod:`captioner.fit.losses`). c and r are summed log-probabilities
    of chosen and rejected, end token included; with `sigmoid`: mean of
    -log sigmoid(beta ((c - c_ref) - (r - r_ref))) (Rafailov et al. 2023, eq. 7). The reference is the
    captioner as it is passed in, its adapter still the zero function; its log-probabilities are computed
    once, by the same forward, and stored in ``out/pairs`` with hashes of weights, pixels and tokens; no
    second model is held. ``paths`` maps a pair's key to its image, ``verdicts`` serve the token weights,
    ``origin`` the alarm for drift.

    Otherwise as :func:`captioner.fit.train.train_sft`; raises Refused where an alarm stops it, and RunError
    where stored reference log-probabilities do not belong to these weights, pixels or tokens.
    """
    training = train.by_steps(training, len({pair.key for pair in pairs}), world_size())
    collator = PairCollator(renderer, pairs, paths, training, dpo, verdicts or {})
    args = arguments(captioner, training, out, dpo)
    weights = adapters.fingerprint(captioner)
    (out / "alarm.json").unlink(missing_ok=True)
    watch = alarms.Alarms(dpo.alarms, captioner, renderer, collator.images.paths, out, origin)

    def prepare(trainer: Any, log: Any, resumed: bool) -> None:
        trainer.seen, trainer.dpo = seen, dpo
        # TRL gathers one number a pair, and the ranks' batches hold different numbers of pairs
        trainer.accelerator.gather = lambda values: values.new_tensor(
            distributed.collect(values.flatten().tolist(), values.device)
        )
        collator.reference = by_image(_reference(trainer, pairs, weights, out))
        watch.begin(lambda: trainer._metrics["train"]["rewards/chosen"][-1] / dpo.beta, log.write, resumed)
        trainer.add_callback(watch)

    kind = _KTO if "kto" in dpo.loss_type else _DPO
    with shared_prefix(captioner) as seen:
        try:
            return train._train(kind, captioner, collator, args, out, train._Log(out), report, prepare)
        except Refused as alarm:
            last = train._last_checkpoint(out / "checkpoints")
            kept = last.name if last else "none yet, the reference"
            if is_main():
                atomic_write_json(
                    out / "alarm.json", {"what": alarm.what, "where": alarm.where, "kept": kept}
                )
            where = f"{out}; the last good checkpoint: {kept}" + (f"; {alarm.where}" if alarm.where else "")
            raise Refused(alarm.what, where=where, fix=alarm.fix) from alarm


# ---- reference log-probabilities


def _reference(trainer: Any, pairs: Sequence[Pair], weights: str, out: Path) -> list[Pair]:
    """The pairs with what is stored of their reference; computed and stored before the first step.

    That pixels and tokens are still the same is seen when the collator draws them.
    """
    shards = Shards(out / "pairs", Pair)
    there = shards.has(0)
    distributed.barrier()  # before a rank writes it
    if not there:
        scored = score(trainer, pairs, weights, trainer.args.per_device_train_batch_size)
        if is_main():
            shards.write(0, scored)
        distributed.barrier()
    stored = shards.read(0)
    plain = [(pair.key, pair.chosen, pair.rejected) for pair in stored]
    if plain != [(pair.key, pair.chosen, pair.rejected) for pair in pairs]:
        raise _stale("pairs", str(shards.path(0)))
    if any(pair.ref_weights != weights for pair in stored):
        raise _stale("weights", str(shards.path(0)))
    return stored


def score(trainer: Any, pairs: Sequence[Pair], weights: str, batch_size: int) -> list[Pair]:
    """The pairs with the log-probabilities that the trainer's model, as it is now, gives their captions.

    Every rank scores its share of the batches and gets all.
    """
    collator: PairCollator = trainer.data_collator
    groups = collator.groups
    collator.order = lambda position: position  # type: ignore[assignment]
    number = {id(pair): at for at, pair in enumerate(pairs)}
    found: list[tuple[int, dict[str, Any]]] = []  # of this rank
    batches = distributed.share_out(range(0, len(groups), batch_size))
    with progress("reference log-probabilities", min(len(batches) * batch_size, len(groups))) as bar:
        for start in batches:
            part = groups[start : start + batch_size]
            batch = collator([{"position": start + i} for i in range(len(part))])
            batch.pop("positions")
            values = _branch_logps(trainer, batch)
            chosen, rejected = values[: len(part)], iter(values[len(part) :])
            further = values[-len(part) :] if len(values) > len(part) + sum(map(len, part)) else None
            name = "ref_unpaired_logp" if "kto" in collator.dpo.loss_type else "ref_masked_logp"
            for b, (group, hashes) in enumerate(zip(part, collator.hashes, strict=True)):
                for pair, of_pair in zip(group, hashes, strict=True):
                    logps = {"ref_chosen_logp": chosen[b], "ref_rejected_logp": next(rejected)}
                    logps |= {name: further[b]} if further else {}
                    found.append((number[id(pair)], {**logps, **of_pair, "ref_weights": weights}))
            bar.advance(len(part))
    collator.order = train.Order(len(groups), collator.seed)
    of_all = dict(distributed.collect(found, trainer.args.device))
    return [pair.model_copy(update=of_all[at]) for at, pair in enumerate(pairs)]


@torch.no_grad()
def _branch_logps(trainer: Any, batch: dict[str, Any]) -> list[float]:
    """Log-probability of each branch of a batch, in the order of :meth:`PairCollator.pack`."""
    inputs = trainer._prepare_inputs(batch)
    values: list[float] = []
    kl = {name[3:]: value for name, value in inputs.items() if name.startswith("KL_")}
    for part in (inputs, inputs | kl) if kl else (inputs,):
        labels = part["input_ids"].masked_fill(part["completion_mask"] == 0, -100)
        with trainer.accelerator.autocast():
            trainer.model(**part, labels=labels, fused_lm_head=True)
        values += trainer.seen.log_probs.sum(1).tolist()
    return values
