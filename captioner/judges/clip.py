"""How alike a contrastive model finds image and caption: CLIPScore (Hessel et al. 2021, arXiv:2104.08718).

The checkpoint is a local CLIP or SigLIP in the form of `transformers`. Shapes: B pairs, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.errors import CheckpointError
from captioner.judges.metrics import Array
from captioner.judges.scores import Scores, ratio, tabulate
from captioner.models.checkpoint import check_contrastive
from captioner.views import load_image

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT = 2.5  # of the cosine in CLIPScore
BATCH = 16  # pairs at a time


class Contrastive:
    """A CLIP or SigLIP model and its processor."""

    def __init__(self, checkpoint: Path, device: str = "cpu"):
        """Raises CheckpointError for another model, and for files that could run code."""
        kind = check_contrastive(checkpoint)
        import torch
        from transformers import AutoModel, AutoProcessor

        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            model = AutoModel.from_pretrained(checkpoint, use_safetensors=True, dtype=torch.float32, **local)
            self.processor = AutoProcessor.from_pretrained(checkpoint, **local)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"the {kind} checkpoint cannot be loaded: {reason}",
                where=str(checkpoint),
                fix="copy the whole checkpoint again",
            ) from error
        self.device = device
        self.model = model.to(device).eval()
        self.length: int = model.config.text_config.max_position_embeddings

    def cosines(self, images: Sequence[Path], texts: Sequence[str]) -> tuple[list[float], list[bool]]:
        """Cosine of image and text of each of B pairs, and whether the text was cut to fit."""
        import torch

        pictures = [load_image(path)[0] for path in images]
        made = self.processor(
            images=pictures,
            text=list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        whole = self.processor.tokenizer(list(texts), verbose=False)["input_ids"]
        with torch.inference_mode():
            out = self.model(**{name: each.to(self.device) for name, each in made.items()})
        image, text = _unit(out.image_embeds), _unit(out.text_embeds)  # [B, D]
        return (image * text).sum(-1).tolist(), [len(ids) > self.length for ids in whole]


def _unit(embeds: Tensor) -> Tensor:
    return embeds / embeds.norm(dim=-1, keepdim=True)


def clip(captions: Mapping[str, str], images: Mapping[str, Path], model: Contrastive) -> Scores:
    """CLIPScore, 2.5 max(cosine, 0), mean over images; ``cut`` is the share of texts that did not fit.

    An empty caption says nothing of its image and scores 0. ``images`` are files by key.
    """
    rows: dict[str, dict[str, float]] = {key: {"captions": 1} for key in captions}
    said = sorted(key for key, text in captions.items() if text.strip())
    for start in range(0, len(said), BATCH):
        keys = said[start : start + BATCH]
        found = model.cosines([images[key] for key in keys], [captions[key] for key in keys])
        for key, cosine, cut in zip(keys, *found, strict=True):
            rows[key] |= {"sum": WEIGHT * max(cosine, 0.0), "cut": cut}
    columns = ("captions", "sum", "cut")
    return tabulate("clip", rows, _metrics, columns=columns, annotated=len(images), lower_is_better=["cut"])


def _metrics(sums: Mapping[str, Array]) -> dict[str, Array]:
    return {name: ratio(sums[of], sums["captions"]) for name, of in (("clip", "sum"), ("cut", "cut"))}
