"""The table of families: where the parts of each architecture are. A new family is an entry here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mlp:
    """Names inside a feed-forward block: rows of ``inputs`` and columns of ``output`` are its inner units."""

    gated: bool  # down(act(gate x) * (up x)) or fc2(act(fc1 x))
    bias: bool
    inputs: tuple[str, ...]
    output: str
    activation: str  # attribute that holds the activation function


@dataclass(frozen=True)
class Family:
    """Where the parts of one architecture are, as attribute paths of the model."""

    name: str
    vision_mlp: Mlp
    language_mlp: Mlp
    # config field of the encoder's width D, where its inner width is `mlp_ratio` times D, a whole number of
    # times: transformers 5 reads no other; None: it is `intermediate_size`
    ratio_of: str | None = None
    visual: str = "model.visual"
    language_model: str = "model.language_model"
    vision_layers: str = "blocks"  # below ``visual``
    language_layers: str = "layers"  # below ``language_model``
    embedding: str = "embed_tokens"  # below ``language_model``
    mergers: tuple[str, ...] = ("merger",)  # below ``visual``: what projects into the language model
    mlp: str = "mlp"  # the feed-forward block's name in every layer of both towers


_SWIGLU = Mlp(
    gated=True, bias=False, inputs=("gate_proj", "up_proj"), output="down_proj", activation="act_fn"
)
_SWIGLU_BIAS = Mlp(
    gated=True, bias=True, inputs=("gate_proj", "up_proj"), output="down_proj", activation="act_fn"
)
FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family("qwen2_vl", Mlp(False, True, ("fc1",), "fc2", "act"), _SWIGLU, ratio_of="embed_dim"),
    "qwen2_5_vl": Family("qwen2_5_vl", _SWIGLU_BIAS, _SWIGLU),
    "qwen3_vl": Family(
        "qwen3_vl",
        Mlp(False, True, ("linear_fc1",), "linear_fc2", "act_fn"),
        _SWIGLU,
        mergers=("merger", "deepstack_merger_list"),
    ),
}
