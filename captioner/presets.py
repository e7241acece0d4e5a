"""Settings for a model and a machine: what `captioner init` writes. Imports no torch.

The numbers are starting points: rates as the field uses them, batches by a rule of thumb for memory. None of
them was tried on a GPU yet.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from captioner.errors import CheckpointError, ConfigError

SPARE = 0.15  # share of a card that stays free
CONTEXT = 1.5  # GB that CUDA and its libraries take
GLOBAL_BATCH = 64  # images of an optimizer step in SFT
RATES = {"adapters": 2e-4, "lora": 1e-4, "full": 1e-5}


@dataclass(frozen=True)
class Machine:
    """Equal cards that train together."""

    gpus: int
    gpu_memory: float  # GB of one


@dataclass(frozen=True)
class Sizes:
    """What of a checkpoint decides how it is trained."""

    parameters: float  # billions

    @property
    def weights(self) -> float:
        """GB in bfloat16."""
        return self.parameters * 1e9 * 2 / 2**30

    @property
    def weights_4bit(self) -> float:
        """GB with the layers in NF4; embeddings and head stay as they are."""
        return 0.36 * self.weights

    @property
    def per_image(self) -> float:
        """GB that an image of six 448 px views needs beside the weights, activations computed again."""
        return 0.8 + 0.1 * self.parameters


def read_sizes(path: Path) -> Sizes:
    """The sizes of a checkpoint, from its index or its files. Raises CheckpointError without either."""
    index = path / "model.safetensors.index.json"
    try:
        dtype = json.loads((path / "config.json").read_text()).get("dtype")
        total = json.loads(index.read_text())["metadata"]["total_size"] if index.is_file() else 0
        total = int(total) or sum(file.stat().st_size for file in path.glob("*.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the size of the weights cannot be read: {error}", where=str(path), fix="copy it again"
        ) from error
    if not total:
        raise CheckpointError(
            "no weights, and no index that tells their size",
            where=str(path),
            fix="fetch model.safetensors, or model.safetensors.index.json of a checkpoint in several files",
        )
    return Sizes(total / (4 if dtype == "float32" else 2) / 1e9)


@dataclass(frozen=True)
class Preset:
    """How one model trains on one machine."""

    four_bit: bool
    batch: int  # images a card sees at once in SFT and QA
    accumulation: int

    @property
    def pairs_batch(self) -> int:
        """Images a card sees at once in preference training, each with its captions."""
        return max(1, self.batch // 2)


def choose(sizes: Sizes, machine: Machine) -> Preset:
    """The largest batch that fits, in 4 bits where nothing fits otherwise.

    Raises ConfigError where not even that does.
    """
    room = (1 - SPARE) * machine.gpu_memory - CONTEXT
    for four_bit, weights in ((False, sizes.weights), (True, sizes.weights_4bit)):
        most = (room - weights) / sizes.per_image
        if most >= 3 or (four_bit and most >= 1):
            batch = min(16, max(1, GLOBAL_BATCH // machine.gpus), 2 ** int(math.log2(most)))
            return Preset(four_bit, batch, max(1, round(GLOBAL_BATCH / (batch * machine.gpus))))
    least = math.ceil((sizes.weights_4bit + sizes.per_image + CONTEXT) / (1 - SPARE))
    raise ConfigError(
        f"{sizes.parameters:.1f} billion parameters do not train on {machine.gpu_memory:g} GB",
        where="--gpu-memory",
        fix=f"take a card of {least} GB or more, or a smaller model of the family",
    )


def toml(model: str, sizes: Sizes, machine: Machine, caption_tokens: int = 256) -> str:
    """The settings as a commented TOML file.

    ``caption_tokens``: the longest caption wanted, tokens; every other length follows from it. The fields of
    the data stand as comments: a command that needs one that is not set stops and names it.
    """
    preset = choose(sizes, machine)
    longest = round(caption_tokens * 1.25)
    return TEMPLATE.format(
        model=json.dumps(model),
        parameters=sizes.parameters,
        gpus=machine.gpus,
        memory=machine.gpu_memory,
        four_bit=str(preset.four_bit).lower(),
        batch=preset.batch,
        accumulation=preset.accumulation,
        images=preset.batch * preset.accumulation * machine.gpus,
        pairs_batch=preset.pairs_batch,
        rate=RATES["adapters"],
        lora=RATES["lora"],
        full=RATES["full"],
        golden_rate=RATES["adapters"] / 2,
        dpo_rate=RATES["adapters"] / 10,
        caption=caption_tokens,
        longest=longest,
        questions=max(60, caption_tokens // 2),
        sequences=64 if machine.gpu_memory >= 40 else 16,
    )


TEMPLATE = """\
# captioner: {parameters:.1f} billion parameters on {gpus} x {memory:g} GB.
# Written by `captioner init`; every line may change. `captioner sft --help sft` tells what a field means.
# Set the fields marked DATA (docs/formats.md tells what they may name). A command that needs one that is not
# set stops and names it.

[model]
path = {model}
# in 4 bits where the weights in bfloat16 leave no room to train
load_in_4bit = {four_bit}

[sft]
# DATA images with captions in shorthand
# data = ["captioned/"]
# DATA others of the kind, for the validation loss
# validation = "captioned-held-out/"
# adapters fuse into a stock checkpoint; lora, parts, full: docs/model.md
tuning.type = "adapters"

[sft.training]
num_train_epochs = 3
# images a card sees at once; with accumulation and all cards {images} a step
per_device_train_batch_size = {batch}
microbatch_size = {batch}
gradient_accumulation_steps = {accumulation}
# for adapters; LoRA {lora:g}, full {full:g}
learning_rate = {rate:g}
save_steps = 200
early_stopping_patience = 3

[qa]
# DATA images with yes/no questions, or a VQAv2, GQA or POPE file
# data = "questions/"

[qa.training]
num_train_epochs = 2
per_device_train_batch_size = {batch}
microbatch_size = {batch}
gradient_accumulation_steps = {accumulation}
learning_rate = {rate:g}
save_steps = 200

[golden]
# DATA images of the rounds; "unlabelled/?part=1&count=10000" takes a part of a large set
# images = "unlabelled/"
samples = 6
# of a golden caption; a sample may be longer, for one that is cut cannot be paired
max_tokens = {caption}
sampling.max_tokens = {longest}
# a claim takes about four tokens, and samples differ
max_questions = {questions}

[pairs]
max_tokens = {longest}

[dpo]
golden_sft_steps = 200
golden_sft_learning_rate = {golden_rate:g}
alarms.max_tokens = {longest}
alarms.images = 32
alarms.every = 50

[dpo.training]
num_train_epochs = 1
# images, each with all its pairs
per_device_train_batch_size = {pairs_batch}
microbatch_size = {pairs_batch}
gradient_accumulation_steps = {accumulation}
learning_rate = {dpo_rate:g}
save_steps = 100

[evaluate]
# DATA held-out images of the final table; what judges them: docs/judges.md
# data = "test/"
max_tokens = {longest}

[gate]
# DATA held-out images that decide on a round, some hundreds
# data = "held-out/"

[engine]
max_num_seqs = {sequences}

[caption]
sampling.max_tokens = {longest}
"""
