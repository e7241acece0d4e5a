"""What a step sees: images with what is learned of each, drawn, cut and packed into a batch.

What is drawn at a step depends on (seed, position) alone, so a resumed run equals an uninterrupted one.

Shapes: B images of a batch, N their pairs, U branches (B chosen, N rejected and, where a loss asks for them,
B more), L tokens of the longest branch, T tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from captioner.config import DPOConfig, TrainingConfig
from captioner.errors import DataError, RunError
from captioner.files import row_seed
from captioner.fit import objectives
from captioner.fit.examples import PairedImages, Target, TrainingImages, by_image
from captioner.models import adapters
from captioner.models.render import Renderer, TrainRow, collate
from captioner.records import Pair
from captioner.views import BadImage, load_image

CACHE_BYTES = 1 << 29  # of cut images that are kept between epochs
CACHED_BRANCHES = 1 << 16


class Order:
    """Position in the training -> index of an image; an epoch is a permutation drawn from (seed, epoch)."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch, self.permutation = count, seed, -1, list[int]()

    def __call__(self, position: int) -> int:
        epoch, at = divmod(position, self.count)
        if epoch != self.epoch:
            self.epoch, self.permutation = epoch, list(range(self.count))
            random.Random(row_seed(self.seed, "order", epoch)).shuffle(self.permutation)
        return self.permutation[at]


class Collator:
    """Positions -> a batch: reads and cuts the images, draws their targets, packs them by ``collate``."""

    def __init__(self, renderer: Renderer, images: TrainingImages, seed: int, batch_size: int):
        self.renderer, self.images, self.seed, self.batch_size = renderer, images, seed, batch_size
        self.order = Order(len(images), seed)
        self.branch = lru_cache(CACHED_BRANCHES)(renderer.branch_ids)  # questions come again and again
        self.cache: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self.room = CACHE_BYTES
        text = renderer.captioner.model.config.get_text_config()
        self.longest = text.max_position_embeddings

    def __call__(self, features: Sequence[dict[str, int]]) -> dict[str, Any]:
        positions = [feature["position"] for feature in features]
        whole_only = not self._multi_view(positions[0] // self.batch_size)
        picked = [self.order(position) for position in positions]
        rows = [
            TrainRow(patches, grid, whole_only, [self.branch(t.text, t.answer, t.silent) for t in targets])
            for (patches, grid), targets in zip(
                self._patches(picked, whole_only), map(self._targets, picked, positions), strict=True
            )
        ]
        return self.pack(rows, positions, picked) | {"positions": torch.tensor(positions)}

    def pack(self, rows: list[TrainRow], positions: list[int], picked: list[int]) -> dict[str, Any]:
        """The model's arguments."""
        batch = collate(self.renderer, rows)
        reach = batch["position_ids"].amax(dim=(0, 2))
        if int(reach.max()) >= self.longest:
            raise DataError(
                f"a row reaches position {int(reach.max())}; the model ends at {self.longest}",
                where=self.images.keys[picked[int(reach.argmax())]],
                fix="shorten its caption, or use fewer or smaller views",
            )
        return batch

    def check_lengths(self) -> None:
        """Raise DataError, which counts and names them, for captions that do not fit behind their views.

        Only images whose text could be too long are opened.
        """
        renderer = self.renderer
        cells = (renderer.size // renderer.factor) ** 2  # of a view; it advances positions by less
        most = 64 + sum(cells + 2 + len(renderer.text_ids(tag)) for tag in renderer.tags())
        long = []
        for index in range(len(self.images)):
            targets = self._targets(index, index)
            reach = max((len(self.branch(t.text, t.answer)[0]) for t in targets), default=0)
            if reach + most >= self.longest and reach + self._prefix_reach(index) > self.longest:
                long.append(self.images.keys[index])
        if long:
            raise DataError(
                f"{len(long)} of {len(self.images)} images have captions that do not fit: the model ends at "
                f"position {self.longest}",
                where=", ".join(long[:5]) + (", ..." if len(long) > 5 else ""),
                fix="shorten or leave out these captions, or use fewer or smaller views",
            )

    def _prefix_reach(self, index: int) -> int:
        renderer = self.renderer
        grids = [
            [1, view.height // renderer.patch, view.width // renderer.patch]
            for view in renderer.plan(*self._image(index).size)
        ]
        return renderer.prefix(torch.tensor(grids), renderer.tags()).next_position

    def keys(self, positions: Sequence[int]) -> list[str]:
        return [self.images.keys[self.order(position)] for position in positions]

    def _multi_view(self, batch: int) -> bool:
        share = self.images.multi_view_share
        return int((batch + 1) * share) > int(batch * share)

    def _targets(self, index: int, position: int) -> Sequence[Target]:
        return self.images.draw(index, random.Random(row_seed(self.seed, "targets", position)))

    def _patches(self, picked: list[int], whole_only: bool) -> list[tuple[Tensor, Tensor]]:
        """uint8 patches and grid of each image; the first that are read stay in memory, up to CACHE_BYTES."""
        found = {i: self.cache[i, whole_only] for i in picked if (i, whole_only) in self.cache}
        missing = [i for i in dict.fromkeys(picked) if i not in found]
        cut = self.renderer.patches_batch([self._image(i) for i in missing], whole_only) if missing else []
        for index, entry in zip(missing, cut, strict=True):
            found[index] = entry
            if (size := entry[0].nbytes) <= self.room:
                self.cache[index, whole_only] = entry
                self.room -= size
        return [found[i] for i in picked]

    def _image(self, index: int) -> Any:
        path = self.images.paths[index]
        try:
            return load_image(path)[0]
        except BadImage as error:
            raise DataError(str(error), where=str(path), fix="remove or replace the image") from error


# ---- preferences


class PairCollator(Collator):
    """Images with all their pairs, in the layout of TRL's trainers, computed on packed rows.

    ``packed`` holds the rows that the model sees; ``gather`` [U, L] says where in them each token of a branch
    lies and ``expand`` which branch each caption of TRL's batch is (the chosen one of an image comes once for
    each of its pairs). ``reference`` holds the pairs with their reference log-probabilities, by image.
    """

    def __init__(self, renderer: Renderer, examples: PairedImages, training: TrainingConfig, dpo: DPOConfig):
        self.pairs, self.verdicts, self.dpo = examples.pairs, examples.verdicts, dpo
        self.groups = by_image(self.pairs)
        self.weights = adapters.fingerprint(renderer.captioner)
        self.kto = "kto" in dpo.loss_type
        self.weighted = (dpo.refuted_weight, dpo.confirmed_weight) != (1.0, 1.0)
        self.reference: list[list[Pair]] = []
        self.hashes: list[list[dict[str, str]]] = []  # of the last batch, by image and pair
        keys = [group[0].key for group in self.groups]
        images = TrainingImages(keys, [examples.paths[key] for key in keys], self._draw)
        super().__init__(renderer, images, training.seed, training.per_device_train_batch_size)

    def _draw(self, index: int, _rng: Any) -> list[Target]:
        group = self.groups[index]
        said = [group[0].chosen, *(pair.rejected for pair in group)]
        if self.kto:  # Ethayarajh et al. 2024: the KL is estimated on captions of other images
            said.append(self.groups[(index + 1) % len(self.groups)][0].chosen)
        return [Target(None, text) for text in said]

    def pack(self, rows: list[TrainRow], positions: list[int], picked: list[int]) -> dict[str, Any]:
        groups = [self.groups[i] for i in picked]
        scored = [self.reference[i] for i in picked] if self.reference else []
        shown = [*rows, *(self._gray(row) for row in rows if self.dpo.image_weight)]
        times = len(shown) // len(rows)
        packed = super().pack(shown, positions * times, picked * times)
        packed.pop("labels")
        starts = self._starts(shown, packed["input_ids"].shape[1])
        last = [len(row.branches) - 1 for row in rows]
        # first the chosen captions, then the rejected ones, then what a further term needs
        order = [(b, 0) for b in range(len(rows))]
        order += [(b, j) for b in range(len(rows)) for j in range(1, last[b] + 1 - self.kto)]
        order += [(b, last[b]) for b in range(len(rows)) if self.kto]
        order += [(b, 0) for b in range(len(rows), len(shown))]
        branches = [shown[b].branches[j] for b, j in order]
        places = [range(starts[b][j], starts[b][j] + len(shown[b].branches[j][0])) for b, j in order]
        batch: dict[str, Any] = {
            "input_ids": _table([ids for ids, _ in branches]),
            "completion_mask": _table([[int(on) for on in mask] for _, mask in branches]),
            "attention_mask": _table([[1] * len(ids) for ids, _ in branches]),
            "packed": packed,
            "gather": _table(places),
        }
        if self.weighted:
            of = [(groups[b % len(rows)], j) for b, j in order]
            batch["weights"] = self._weights(of, batch["completion_mask"])
        self.hashes = self._hashes(rows, groups)
        self._check(scored)
        sizes = [len(group) for group in groups]
        return _for_kto(batch, sizes, scored) if self.kto else self._for_dpo(batch, sizes, scored)

    def _gray(self, row: TrainRow) -> TrainRow:
        """The chosen caption behind gray views."""
        channels = self.renderer.normalise(row.pixel_values[:1]).shape[1]
        gray = row.pixel_values.new_zeros(len(row.pixel_values), channels).float()
        return TrainRow(gray, row.grid, row.whole_only, row.branches[:1])

    def _starts(self, rows: list[TrainRow], width: int) -> list[list[int]]:
        """Where each branch of each row begins in the flattened rows."""
        starts = []
        for b, row in enumerate(rows):
            first = b * width + len(self.renderer.prefix_ids(row.grid, row.whole_only))
            starts.append(list(accumulate((len(ids) for ids, _ in row.branches), initial=first)))
        return starts

    def _weights(self, of: list[tuple[list[Pair], int]], completion: Tensor) -> Tensor:
        """Token weights [U, L]: of statements by their verdict, 1 elsewhere. ``of``: group and branch."""
        weights = torch.ones(completion.shape)
        tokenizer, dpo = self.renderer.captioner.tokenizer, self.dpo
        for u, (group, j) in enumerate(of):
            if j > len(group):  # another image's
                continue
            text = group[j - 1].rejected if j else group[0].chosen
            encoded = tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            verdicts = self.verdicts.get(group[0].key, {})
            own = objectives.token_weights(
                text, encoded["offset_mapping"], verdicts, dpo.confirmed_weight, dpo.refuted_weight
            )
            start = int(completion[u].argmax())
            weights[u, start : start + len(own)] = torch.tensor(own)
        return weights

    def _hashes(self, rows: list[TrainRow], groups: list[list[Pair]]) -> list[list[dict[str, str]]]:
        """Hashes of the pixels and tokens (and token weights) of each pair, by image."""
        setting = [self.dpo.refuted_weight, self.dpo.confirmed_weight] if self.weighted else []
        hashes = []
        for row, group in zip(rows, groups, strict=True):
            pixels = hashlib.sha256(row.pixel_values.numpy().tobytes() + row.grid.numpy().tobytes())
            prefix = self.renderer.prefix_ids(row.grid, row.whole_only)
            chosen, *rejected = (ids for ids, _ in row.branches)
            others = rejected[len(group) :]  # the caption of another image
            seen = [[prefix, chosen, ids, setting, *others] for ids in rejected[: len(group)]]
            tokens = [hashlib.sha256(json.dumps(each).encode()).hexdigest() for each in seen]
            hashes.append([{"ref_pixels": pixels.hexdigest(), "ref_tokens": each} for each in tokens])
        return hashes

    def _check(self, scored: list[list[Pair]]) -> None:
        for of_pair, pair in zip(chain(*self.hashes), chain(*scored), strict=True) if scored else ():
            for name, value in of_pair.items():
                if getattr(pair, name) != value:
                    raise stale(name.removeprefix("ref_"), pair.key)

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
            rejected = rejected + objectives.length_offset(long, short, self.dpo.length_margin, self.dpo.beta)
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


def _table(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def stale(what: str, where: str) -> RunError:
    return RunError(
        f"the stored reference log-probabilities were computed of other {what}",
        where=where,
        fix="add --redo to make the stage anew, or restore what it was made with",
    )
