"""The sections about one model: how it is loaded, what views it sees, what of it is trained, and how."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from captioner.config.base import Section


class ModelConfig(Section):
    path: str = "scenes-base"
    """Checkpoint directory of a Qwen-VL family model; `scenes-base` is the shipped one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Number format of the weights; `auto` = bfloat16 on CUDA, float32 elsewhere."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs; `auto` = CUDA if there is one, then MPS, then CPU."""
    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits (NF4, bitsandbytes, CUDA) while adapters or LoRA train on it."""


class ViewsConfig(Section):
    """How an image is cut into views; kept in a captioner's config.json."""

    levels: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2), min_length=1)
    """Grid of each level: 1 = the whole image, 2 = four quadrants, 3 = nine tiles."""
    center: bool = True
    """Add the centre crop, as large as a tile of the finest level."""
    size: int | None = Field(None, ge=16)
    """Side of a square view, pixels; others keep the area. None = what the checkpoint says, else 448."""
    overlap: float = Field(0.0, ge=0.0, lt=0.5)
    """Share of a tile's side that it reaches into its neighbours; 0 = none."""
    tags: bool = True
    """Name each view in the prompt (`whole`, `top left`, ...); false = order alone tells."""


class ViewsOverride(Section):
    """The views a checkpoint was trained with, but for what is set here."""

    levels: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(None, min_length=1)
    """Grid of each level: 1 = the whole image, 2 = quadrants, ... None = the checkpoint's, else 1,2."""
    center: bool | None = None
    """Add the centre crop, as large as a tile of the finest level. None = the checkpoint's, else true."""
    size: int | None = Field(None, ge=16)
    """Side of a square view, pixels; others keep the area. None = the checkpoint's, else 448."""
    overlap: float | None = Field(None, ge=0.0, lt=0.5)
    """Share of a tile's side that it reaches into its neighbours. None = the checkpoint's, else 0."""
    tags: bool | None = None
    """Name each view in the prompt (`whole`, `top left`, ...). None = the checkpoint's, else true."""

    def over(self, views: ViewsConfig) -> ViewsConfig:
        """``views`` with the fields that are set here."""
        return views.model_copy(update=self.model_dump(exclude_none=True))


class TrainingConfig(Section):
    max_steps: int = Field(200, ge=1)
    """Optimizer steps."""
    num_train_epochs: float | None = Field(None, gt=0)
    """Passes over the images; decides instead of `max_steps` where it is set. None = `max_steps` decides."""
    per_device_train_batch_size: int = Field(16, ge=1)
    """Images a device sees at once; with all their pairs in preference training."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches per optimizer step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak rate of AdamW, reached after the warm-up; cosine to zero after it."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps that warm up."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW; 0 = off."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    save_steps: int = Field(50, ge=1)
    """Steps between resumable checkpoints."""
    logging_steps: int = Field(10, ge=1)
    """Steps between lines of metrics.jsonl."""
    early_stopping_patience: int = Field(0, ge=0)
    """Validation losses (one per `save_steps`) without a new best that stop the training; 0 = off."""
    gradient_checkpointing: bool | None = None
    """Compute activations again in the backward pass: less memory, about a third more time. None = for
    models of more than 500 M parameters."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that get the metrics beside metrics.jsonl; each must be installed."""
    seed: int = 0
    """Seed of data order, initial weights and dropout."""
    microbatch_size: int | None = Field(None, ge=1)
    """Images that one forward pass sees, a divisor of `per_device_train_batch_size`; gradients are added up.
    None = the whole batch, or 1 for models of more than 500 M parameters."""


Part = Literal["merger", "vision", "language", "head", "embeddings"]


class AdapterTuning(Section):
    type: Literal["adapters"] = "adapters"
    """What is trained: `adapters`, `lora` or named `parts` of a frozen base, or `full` for every weight."""
    vision_width: int = Field(32, ge=0)
    """Inner units of the adapter of each vision layer; 0 = none there."""
    language_width: int = Field(64, ge=0)
    """Inner units of the adapter of each language layer; 0 = none there."""
    vision_layers: tuple[int, ...] | None = Field(None, min_length=1)
    """Numbers of the vision layers that get one, from 0 or, counted from the end, -1; None = all."""
    language_layers: tuple[int, ...] | None = Field(None, min_length=1)
    """Numbers of the language layers that get one, from 0 or, counted from the end, -1; None = all."""
    placement: Literal["parallel", "sequential", "pfeiffer", "houlsby"] = "parallel"
    """`parallel` fuses into a stock checkpoint. The others follow the feed-forward block, `houlsby` the
    attention too, and cannot be exported; `pfeiffer` and `houlsby` need the extra `adapters`."""


class LoraTuning(Section):
    type: Literal["lora"] = "lora"
    """What is trained: `adapters`, `lora` or named `parts` of a frozen base, or `full` for every weight."""
    method: Literal["lora", "dora", "vera"] = "lora"
    """`dora` also learns the norm of each row; `vera` learns two vectors between shared random matrices."""
    r: int = Field(16, ge=1)
    """Rank of the change of each weight matrix; VeRA wants some hundreds."""
    lora_alpha: float = Field(32.0, gt=0)
    """The change is scaled by lora_alpha / r; VeRA has no scale."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on what goes into the change."""
    targets: tuple[Literal["language", "vision", "merger"], ...] = Field(("language",), min_length=1)
    """Where: every linear layer of the language model, the encoder, the merger between them."""
    parts: tuple[Part, ...] = ()
    """Parts trained fully beside it: merger, vision, language, head, embeddings."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if twice := sorted(set(self.targets) & set(self.parts)):
            raise ValueError(f"{', '.join(twice)} cannot be a target and a part")
        if self.method == "vera" and self.use_rslora:
            raise ValueError("VeRA has no scale to stabilize")
        return self


class PartsTuning(Section):
    type: Literal["parts"] = "parts"
    """What is trained: `adapters`, `lora` or named `parts` of a frozen base, or `full` for every weight."""
    parts: tuple[Part, ...] = ("merger",)
    """Parts trained fully: merger, vision, language, head, embeddings; empty = the soft prompt alone."""


class FullTuning(Section):
    type: Literal["full"] = "full"
    """What is trained: `adapters`, `lora` or named `parts` of a frozen base, or `full` for every weight."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` draws new weights for the checkpoint's architecture."""
    shard: bool = True
    """Each of several processes holds a part of weights and optimizer (FSDP); false = all of it (DDP)."""


Tuning = Annotated[AdapterTuning | LoraTuning | PartsTuning | FullTuning, Field(discriminator="type")]


def check_round(training: TrainingConfig, tuning: Tuning) -> None:
    """Raise ValueError for what a training of a round cannot keep."""
    if training.early_stopping_patience:
        raise ValueError(
            "training.early_stopping_patience must be 0: this training has no validation loss to stop on"
        )
    if isinstance(tuning, AdapterTuning) and tuning.placement != "parallel":
        raise ValueError("tuning.placement must be parallel: this training ends with an exported checkpoint")
    if isinstance(tuning, FullTuning) and tuning.init != "pretrained":
        raise ValueError("tuning.init must be pretrained: this training starts from a captioner")


class SoftPromptConfig(Section):
    length: int = Field(8, ge=0)
    """Learned tokens that stand where the caption prompt would; 0 = off."""
    init: str | None = None
    """Text whose tokens they start from (repeated to fill); None = the caption prompt."""
    trainable: bool = True
    """false = they stay what they start from."""
