"""The untrained base: a stock Qwen3-VL of 3.7 M parameters, a byte-level tokenizer, processor files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import prompts
from captioner.config import ViewsConfig
from captioner.lab.scenes import language, things
from captioner.models import model, stock

if TYPE_CHECKING:
    from captioner.models.model import Captioner

VIEW_PX = 96
PATCH_PX = 16
WIDTH = 192  # of the encoder
HIDDEN = 160  # of the language model
HEAD = 32  # vLLM's CPU attention refuses narrower heads
VOCABULARY = 4096  # more than the words need: training ends when each is one token
INITIALIZER_RANGE = 0.06  # of so narrow a model; at 0.02 the first hundred steps learn little
ROPE_THETA = 10_000.0
OTHER_WORDS = (
    "user assistant yes no none nothing one two sticker background on what is where size how many whole"
    " The picture shows There is We can see with a at the and on"
)


def config(vocabulary: int) -> Any:
    """The configuration for ``vocabulary`` tokens."""
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=vocabulary,
            initializer_range=INITIALIZER_RANGE,
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=4,
            num_attention_heads=HIDDEN // HEAD,
            num_key_value_heads=HIDDEN // HEAD,
            head_dim=HEAD,
            max_position_embeddings=4096,
            rope_theta=ROPE_THETA,
            rope_scaling={"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=4,
            initializer_range=INITIALIZER_RANGE,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_heads=4,
            patch_size=PATCH_PX,
            spatial_merge_size=1,
            temporal_patch_size=2,
            out_hidden_size=HIDDEN,
            num_position_embeddings=(VIEW_PX // PATCH_PX) ** 2,
            deepstack_visual_indexes=[],
        ),
        tie_word_embeddings=True,
    )


def write(folder: Path, seed: int = 0) -> Captioner:
    """Write and load the checkpoint with random weights."""
    tokenizer = model.build_tokenizer(_texts(), VOCABULARY)
    return model.build_random(folder, config(len(tokenizer)), tokenizer, view_size=VIEW_PX, seed=seed)


def _texts() -> list[str]:
    """What the tokenizer is trained on: prompts, and every word at the start of a text and inside one."""
    texts = [prompts.load("caption"), prompts.load("describe"), prompts.load("question", statement="x")] * 20
    words = [*things.NOUNS, *things.SIZES, *things.STICKERS, *things.BACKGROUNDS]
    for more in (*things.PLACES, *language.RELATIONS, OTHER_WORDS):
        words += more.split()
    texts += [f"{word} {word}" for word in dict.fromkeys(words)] * 20
    return texts + [f"two {plural}" for plural in language.NOUN_OF_PLURAL]


def export(captioner: Captioner, folder: Path) -> None:
    """Write the checkpoint in float16, in files that transformers 4.57 and 5 both read."""
    own = {"views": ViewsConfig(size=VIEW_PX).model_dump(mode="json")}
    stock.write_model(folder, captioner.model.half(), captioner=own)
    stock.write_processor(folder, captioner.processor)
    (folder / "model.safetensors").chmod(0o644)
