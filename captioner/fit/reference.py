"""Log-probabilities of the reference of a preference training, computed once, before the first step.

They are stored with hashes of the weights, the pixels and the tokens (and token weights) that they are of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from captioner.fit import distributed
from captioner.fit.batches import Order, PairCollator, stale
from captioner.fit.branches import shared_prefix
from captioner.processes import is_main
from captioner.progress import progress
from captioner.records import Pair
from captioner.runs import Shards


def stored(trainer: Any, out: Path) -> list[Pair]:
    """The pairs with what ``out/pairs`` stores of their reference; it is computed where nothing is stored.

    That pixels and tokens are still the same is seen when the collator draws them. Raises RunError where the
    pairs or the weights are others.
    """
    collator: PairCollator = trainer.data_collator
    pairs, weights = collator.pairs, collator.weights
    shards = Shards(out / "pairs", Pair)
    there = shards.has(0)
    distributed.barrier()  # before a rank writes it
    if not there:
        scored = score(trainer, trainer.args.per_device_train_batch_size)
        if is_main():
            shards.write(0, scored)
        distributed.barrier()
    found = shards.read(0)
    plain = [(pair.key, pair.chosen, pair.rejected) for pair in found]
    if plain != [(pair.key, pair.chosen, pair.rejected) for pair in pairs]:
        raise stale("pairs", str(shards.path(0)))
    if any(pair.ref_weights != weights for pair in found):
        raise stale("weights", str(shards.path(0)))
    return found


def score(trainer: Any, batch_size: int) -> list[Pair]:
    """Its pairs with the log-probabilities that the trainer's model, as it is now, gives their captions.

    Every rank scores its share of the batches and gets all.
    """
    collator: PairCollator = trainer.data_collator
    groups, pairs = collator.groups, collator.pairs
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
            name = "ref_unpaired_logp" if collator.kto else "ref_masked_logp"
            for b, (group, hashes) in enumerate(zip(part, collator.hashes, strict=True)):
                for pair, of_pair in zip(group, hashes, strict=True):
                    logps = {"ref_chosen_logp": chosen[b], "ref_rejected_logp": next(rejected)}
                    logps |= {name: further[b]} if further else {}
                    found.append((number[id(pair)], {**logps, **of_pair, "ref_weights": collator.weights}))
            bar.advance(len(part))
    collator.order = Order(len(groups), collator.seed)
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
        with trainer.accelerator.autocast(), shared_prefix(trainer.model) as seen:
            trainer.model(**part, labels=labels, fused_lm_head=True)
        values += seen[-1].sum(1).tolist()
    return values
