"""Runs where the `adapters` library is: our hook against it, and its own kinds in training and captioning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import adapters as library
import pytest
import torch
from PIL import Image
from torch import Tensor

from captioner.config import (
    AdapterTuning,
    EngineConfig,
    SamplingConfig,
    SoftPromptConfig,
    TrainingConfig,
    ViewsConfig,
)
from captioner.engines import CaptionRequest
from captioner.engines.hf import HFEngine
from captioner.errors import ConfigError
from captioner.fit import fit, trainers
from captioner.models import adapters, fuse, model, render, soft_prompt
from captioner.models.model import Captioner
from loops import sft
from tests.test_losses import RUN, rows
from tests.tiny import tiny_captioner

Kind = Literal["parallel", "sequential", "pfeiffer", "houlsby"]
PICTURES = [Image.open(path).convert("RGB") for path in sorted((RUN / "images").iterdir())]


def tuned(placement: Kind, dtype: torch.dtype = torch.float32) -> Captioner:
    captioner = tiny_captioner("qwen2_5_vl", dtype)
    tuning = AdapterTuning(vision_width=6, language_width=8, placement=placement)
    fit.tune(captioner, tuning, SoftPromptConfig(length=3), 0)
    return captioner


def batch(captioner: Captioner) -> dict[str, Tensor]:
    renderer = render.Renderer(captioner, ViewsConfig())
    pixels, grid = renderer.images(PICTURES[0])
    branch = renderer.branch_ids(None, "northwest circle, northwest red")
    return render.collate(renderer, [render.TrainRow(pixels, grid, False, [branch])])


class LibraryTower:
    """The library's own ParBn or Bn on a tower, with the units of ours."""

    def __init__(self, captioner: Captioner, parallel: bool):
        self.units: dict[str, Any] = {}
        for tower, layers in captioner.layers.items():
            target: Any = captioner.visual if tower == "vision" else captioner.language_model
            interface = library.AdapterModelInterface(
                adapter_methods=["bottleneck"],
                model_embeddings="patch_embed" if tower == "vision" else "embed_tokens",
                model_layers="blocks" if tower == "vision" else "layers",
                layer_self_attn=None,
                layer_cross_attn=None,
                attn_qkv_proj="",
                attn_o_proj=None,
                layer_intermediate_proj="mlp",
                layer_output_proj="mlp",
                layer_pre_ffn="mlp",
                base_model="",
            )
            library.init(target, interface=interface)
            kind = library.ParBnConfig if parallel else library.BnConfig
            settings = dict(mh_adapter=False, output_adapter=True, non_linearity="relu", scaling=1.0)
            target.add_adapter("a", config=kind(reduction_factor=2, **settings))
            target.adapters_config.active_setup = library.composition.Stack("a")
            for layer, block in zip(layers, captioner.blocks[tower], strict=True):
                self.units[block] = layer.get_submodule("output_adapters.adapters.a")


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_our_hook_equals_the_librarys(placement: Kind) -> None:
    """Forward and gradients of the whole model, to 1e-6 of the largest."""
    ours, theirs = tuned(placement, torch.float64), tiny_captioner("qwen2_5_vl", torch.float64)
    soft_prompt.attach(theirs, 3, "Caption")
    with torch.no_grad():
        soft_prompt.rows(theirs).copy_(soft_prompt.rows(ours))
        for number, parameter in enumerate(adapters._parameters(ours).values()):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tower = LibraryTower(theirs, placement == "parallel")
    for block, _, unit in adapters._units(ours):
        tower.units[block].adapter_down = unit.adapter_down
        tower.units[block].adapter_up = unit.adapter_up
    fed = batch(ours)
    found = []
    for captioner in (ours, theirs):
        for parameter in adapters._parameters(ours).values():
            parameter.grad = None
        made = captioner.model(**fed)
        made.loss.backward()
        gradients = [p.grad.clone() for p in adapters._parameters(ours).values() if p.grad is not None]
        found.append([made.logits.detach(), soft_prompt.rows(captioner).grad, *gradients])
    assert len(found[0]) == len(found[1]) > 12
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()
    plain = tiny_captioner("qwen2_5_vl", torch.float64)
    soft_prompt.attach(plain, 3, "Caption")
    with torch.no_grad():
        assert (plain.model(**fed).logits - found[0][0]).abs().max() > 0.1


@pytest.mark.parametrize("placement", ["sequential", "pfeiffer", "houlsby"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_and_captions_with_a_kind_that_is_not_exported(
    placement: Kind, checkpointing: bool, tmp_path: Path
) -> None:
    captioner = tuned(placement, torch.bfloat16 if checkpointing else torch.float32)
    trained = {name for name, p in captioner.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in captioner.model.parameters() if p.requires_grad} == {torch.float32}
    before = {name: p.detach().clone() for name, p in captioner.model.named_parameters()}
    renderer = render.Renderer(captioner, ViewsConfig())
    training = TrainingConfig(
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        gradient_checkpointing=checkpointing,
    )
    images = sft.training_images(rows(), sft.SFTConfig())
    fit.train(renderer, images, trainers.CrossEntropy(), training, tmp_path / "sft")
    after = dict(captioner.model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    attention = [name for name in trained if "attention_adapters" in name]
    assert bool(attention) == (placement == "houlsby")

    adapters.save(captioner, fit.ADAPTER, tmp_path / "adapter")
    soft_prompt.save(captioner, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=f"A {placement} adapter cannot be exported"):
        fuse.export(captioner, tmp_path / "out")
    again = tiny_captioner("qwen2_5_vl", captioner.model.dtype)
    adapters.load(again, fit.ADAPTER, tmp_path / "adapter")
    soft_prompt.load(again, tmp_path / "adapter")
    written = [captions(one) for one in (captioner, again, tiny_captioner("qwen2_5_vl"))]
    assert written[0] == written[1] != written[2]


def captions(captioner: Captioner) -> list[str]:
    engine = HFEngine(captioner, ViewsConfig(), EngineConfig(max_num_seqs=4))
    requests = [CaptionRequest(str(i), picture, f"{i:064x}") for i, picture in enumerate(PICTURES)]
    return [row[0].text for row in engine.sample(requests, 1, SamplingConfig(temperature=0, max_tokens=16))]


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
def test_a_new_adapter_of_the_library_changes_nothing(placement: Kind) -> None:
    plain, new = tiny_captioner("qwen2_5_vl"), tuned(placement)
    soft_prompt.attach(plain, 3, "Caption")
    with torch.no_grad():
        soft_prompt.rows(plain).copy_(soft_prompt.rows(new))
        fed = batch(new)
        assert torch.equal(plain.model(**fed).logits, new.model(**fed).logits)
    assert model.describe_trainable(new.model)
