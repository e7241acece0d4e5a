"""Adapters and soft prompt: what trains, what stays, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from captioner.config import AdapterTuning
from captioner.errors import CheckpointError, ConfigError
from captioner.models import adapters, fuse, model, soft_prompt
from captioner.models.model import Captioner, SoftEmbedding
from tests.tiny import tiny_captioner, tiny_checkpoint, tokenizer

FAMILIES = list(model.FAMILIES)
Placement = Literal["parallel", "sequential"]


def add(
    captioner: Captioner,
    name: str,
    vision_width: int,
    language_width: int,
    placement: Placement = "parallel",
    seed: int = 0,
) -> None:
    tuning = AdapterTuning(vision_width=vision_width, language_width=language_width, placement=placement)
    adapters.tune(captioner, tuning, name, seed)


def inputs(captioner: Captioner, ids: list[int] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Two views, then ``ids``."""
    config = captioner.model.config
    pads = [config.vision_start_token_id, *[config.image_token_id] * 16, config.vision_end_token_id]
    words = captioner.tokenizer.encode("northwest circle, northwest red") if ids is None else ids
    patches = torch.randn(128, 384, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    row = torch.tensor([pads * 2 + words])
    return {
        "input_ids": row,
        "mm_token_type_ids": (row == config.image_token_id).int(),
        "pixel_values": patches.to(captioner.model.dtype),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * 2),
    }


def shake(captioner: Captioner, seed: int = 3) -> None:
    """Move everything that trains away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in captioner.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)


def logits(captioner: Captioner, fed: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        result: Tensor = captioner.model(**(fed or inputs(captioner))).logits
    return result


def train(captioner: Captioner, steps: int = 1, fed: dict[str, Tensor] | None = None) -> float:
    trainable = [p for p in captioner.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0)
    fed = fed or inputs(captioner)
    labels = torch.full_like(fed["input_ids"], -100)
    labels[:, -4:] = 7
    for _ in range(steps):
        optimizer.zero_grad()
        loss = captioner.model(**fed, labels=labels).loss
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def snapshot(captioner: Captioner, pick: Callable[[torch.nn.Parameter], bool]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in captioner.model.named_parameters() if pick(p)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_new_adapter_changes_nothing_and_a_trained_one_does(family: str, placement: Placement) -> None:
    captioner = tiny_captioner(family)
    before = logits(captioner)
    kind = type(captioner.model)
    add(captioner, "captioner", 5, 7, placement)
    assert type(captioner.model) is kind
    assert torch.equal(logits(captioner), before)
    shake(captioner)
    assert (logits(captioner) - before).abs().max() > 1e-2


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("family", FAMILIES)
def test_base_stays_bit_equal_and_everything_trainable_moves(family: str, placement: Placement) -> None:
    captioner = tiny_captioner(family)
    add(captioner, "captioner", 5, 7, placement)
    soft_prompt.attach(captioner, 3, "Caption")
    shake(captioner)  # at first the up-projection is zero, and what is below it gets no gradient
    fed = inputs(captioner, captioner.soft_prompt_ids + captioner.tokenizer.encode("north red, dot"))
    frozen = snapshot(captioner, lambda p: not p.requires_grad)
    moving = snapshot(captioner, lambda p: p.requires_grad)
    parallel = placement == "parallel"
    vision = (len(captioner.family.vision_mlp.inputs) if parallel else 1) * 2 + 2  # weights and biases
    assert len(moving) == 2 * vision + 2 * (3 if parallel else 2) + 1
    train(captioner, fed=fed)
    parameters = dict(captioner.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert [name for name, value in moving.items() if torch.equal(parameters[name], value)] == []


def test_training_lowers_the_loss_from_the_zero_start() -> None:
    captioner = tiny_captioner()
    add(captioner, "captioner", 8, 8)
    first = train(captioner)
    assert train(captioner, steps=15) < 0.5 * first


def test_language_only_adapter_leaves_the_encoder_alone() -> None:
    captioner = tiny_captioner()
    kind = type(captioner.visual)
    add(captioner, "qa", vision_width=0, language_width=6)
    assert type(captioner.visual) is kind
    trainable = [name for name, p in captioner.model.named_parameters() if p.requires_grad]
    assert trainable and all("language_model.layers" in name for name in trainable)
    only_vision = tiny_captioner()
    add(only_vision, "captioner", vision_width=6, language_width=0)
    assert all("visual.blocks" in n for n, p in only_vision.model.named_parameters() if p.requires_grad)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.rand(len(drawn))  # the caller's random state does not matter
        captioner = tiny_captioner()
        add(captioner, "captioner", 4, 4, seed=seed)
        drawn.append(torch.cat([p.flatten() for p in captioner.model.parameters() if p.requires_grad]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_cache_masks_and_positions_work(placement: Placement) -> None:
    captioner = tiny_captioner()
    add(captioner, "captioner", 5, 7, placement)
    shake(captioner)
    fed = inputs(captioner)
    whole = logits(captioner, fed)
    length = whole.shape[1]
    positions, _ = captioner.model.model.get_rope_index(
        fed["input_ids"], fed["mm_token_type_ids"], fed["image_grid_thw"]
    )
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    masked = logits(captioner, fed | {"attention_mask": mask, "position_ids": positions})
    torch.testing.assert_close(masked, whole, atol=1e-4, rtol=1e-4)

    ids = fed["input_ids"]
    with torch.no_grad():
        head = captioner.model(
            **fed | {"input_ids": ids[:, :-2], "position_ids": positions[..., :-2]}, use_cache=True
        )
        tail = captioner.model(
            input_ids=ids[:, -2:], position_ids=positions[..., -2:], past_key_values=head.past_key_values
        )
    torch.testing.assert_close(tail.logits, whole[:, -2:], atol=1e-4, rtol=1e-4)
    generated = captioner.model.generate(**fed, max_new_tokens=3, do_sample=False)
    assert generated[0, length] == whole[0, -1].argmax()


def test_backbone_and_head_give_the_logits() -> None:
    """What TRL's fused head does."""
    captioner = tiny_captioner()
    add(captioner, "captioner", 5, 7)
    soft_prompt.attach(captioner, 2, "Caption")
    shake(captioner)
    fed = inputs(captioner, [*captioner.soft_prompt_ids, 5, 6])
    with torch.no_grad():
        hidden = captioner.model.model(**fed).last_hidden_state
        product = hidden @ captioner.model.get_output_embeddings().weight.T
    torch.testing.assert_close(product, logits(captioner, fed))
    assert product.shape[-1] == len(tokenizer())


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_gradient_checkpointing_gives_the_same_gradients(placement: Placement) -> None:
    captioner = tiny_captioner()
    add(captioner, "captioner", 5, 7, placement)
    shake(captioner)
    captioner.model.train()
    fed = inputs(captioner)
    # without a mask and without a cache, Qwen3-VL of transformers 4.57 takes image positions for packed rows
    fed["attention_mask"] = torch.ones_like(fed["input_ids"])
    gradients, runs = [], []
    captioner.layers["language"][0].mlp.register_forward_pre_hook(lambda *_: runs.append(len(gradients)))
    for enable in (False, True):
        if enable:
            captioner.model.gradient_checkpointing_enable({"use_reentrant": False})
        captioner.model.zero_grad()
        captioner.model(**fed, labels=fed["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in captioner.model.parameters() if p.grad is not None])
    assert runs == [0, 1, 1]  # with checkpointing a layer runs twice
    assert gradients[0]
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_adapter_is_float32_on_a_bfloat16_base() -> None:
    captioner = tiny_captioner(dtype=torch.bfloat16)
    add(captioner, "captioner", 4, 4)
    soft_prompt.attach(captioner, 2, "Caption")
    shake(captioner)
    assert {p.dtype for p in captioner.model.parameters() if p.requires_grad} == {torch.float32}
    fed = inputs(captioner, [*captioner.soft_prompt_ids, 5, 6, 7, 8])
    assert logits(captioner, fed).dtype == torch.bfloat16
    moving = snapshot(captioner, lambda p: p.requires_grad)
    train(captioner, fed=fed)
    assert not any(
        torch.equal(value, dict(captioner.model.named_parameters())[name]) for name, value in moving.items()
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_saved_adapter_and_soft_prompt_come_back(family: str, placement: Placement, tmp_path: Path) -> None:
    captioner = tiny_checkpoint(tmp_path / "base", family)
    add(captioner, "captioner", 5, 7, placement)
    soft_prompt.attach(captioner, 3, "Caption in shorthand.")
    shake(captioner)
    adapters.save(captioner, "captioner", tmp_path / "adapter")
    soft_prompt.save(captioner, tmp_path / "adapter")
    fed = inputs(captioner, captioner.soft_prompt_ids)
    again = model.load(tmp_path / "base")
    adapters.load(again, "captioner", tmp_path / "adapter")
    soft_prompt.load(again, tmp_path / "adapter")
    assert torch.equal(logits(again, fed), logits(captioner, fed))
    assert not soft_prompt.rows(again).requires_grad
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["vision_width"], written["language_width"], written["placement"]) == (5, 7, placement)
    assert adapters.describe(again, "captioner") == written


def test_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    captioner = tiny_captioner(seed=0)
    add(captioner, "captioner", 5, 7)
    adapters.save(captioner, "captioner", tmp_path)
    with pytest.raises(CheckpointError, match="another base"):
        adapters.load(tiny_captioner(seed=1), "captioner", tmp_path)
    adapters.load(tiny_captioner(seed=0), "captioner", tmp_path)


def test_one_moved_weight_is_another_base_and_a_number_format_is_not() -> None:
    base = adapters.fingerprint(tiny_captioner())
    assert adapters.fingerprint(tiny_captioner(dtype=torch.float64)) == base
    moved = tiny_captioner()
    with torch.no_grad():
        moved.model.get_submodule("model.visual.merger.linear_fc1").bias[3] += 0.5
    assert adapters.fingerprint(moved) != base


@pytest.mark.parametrize("spoil", ["adapter.safetensors", "adapter_config.json"])
def test_damaged_adapter_is_refused(spoil: str, tmp_path: Path) -> None:
    captioner = tiny_captioner()
    add(captioner, "captioner", 5, 7)
    adapters.save(captioner, "captioner", tmp_path)
    (tmp_path / spoil).write_bytes((tmp_path / spoil).read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"cannot be read|not JSON"):
        adapters.load(tiny_captioner(), "captioner", tmp_path)


def test_adapter_whose_tensors_do_not_fit_is_refused(tmp_path: Path) -> None:
    captioner = tiny_captioner()
    add(captioner, "captioner", 5, 7)
    adapters.save(captioner, "captioner", tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"language_width": 8}))
    with pytest.raises(CheckpointError, match="do not fit"):
        adapters.load(tiny_captioner(), "captioner", tmp_path)


def test_adapters_do_not_stack() -> None:
    captioner = tiny_captioner()
    add(captioner, "captioner", 5, 7)
    assert adapters.name_of(captioner) == "captioner"
    with pytest.raises(ConfigError, match="already has the adapter 'captioner'"):
        add(captioner, "qa", 0, 7)
    with pytest.raises(ConfigError, match="no adapter 'qa'"):
        adapters.save(captioner, "qa", Path("nowhere"))


# ── soft prompt ──────────────────────────────────────────────────────────────────────────────────────────


def test_soft_prompt_starts_as_its_text() -> None:
    captioner = tiny_captioner()
    words = captioner.tokenizer.encode("Caption in shorthand.")
    soft_prompt.attach(captioner, len(words), "Caption in shorthand.")
    assert len(words) > 1
    plain, soft = (logits(captioner, inputs(captioner, ids)) for ids in (words, captioner.soft_prompt_ids))
    assert torch.equal(plain, soft)
    assert captioner.tokenizer.encode("<|soft_0|><|soft_1|>") == captioner.soft_prompt_ids[:2]
    repeated = tiny_captioner()
    soft_prompt.attach(repeated, 2 * len(words) + 1, "Caption in shorthand.")
    rows = soft_prompt.rows(repeated)
    assert torch.equal(rows[len(words) : 2 * len(words)], rows[: len(words)]) and torch.equal(
        rows[-1], rows[0]
    )


def test_gradients_reach_only_the_soft_prompt() -> None:
    captioner = tiny_captioner()
    captioner.model.requires_grad_(False)
    soft_prompt.attach(captioner, 4, "Caption")
    fed = inputs(captioner, [*captioner.soft_prompt_ids, 5, 6, 7, 8])
    others = snapshot(captioner, lambda p: not p.requires_grad)
    before = soft_prompt.rows(captioner).detach().clone()
    train(captioner, fed=fed)
    assert all(
        torch.equal(p, others[name]) for name, p in captioner.model.named_parameters() if name in others
    )
    assert (soft_prompt.rows(captioner) != before).any(dim=1).all()
    assert all(p.grad is None for p in captioner.model.parameters() if not p.requires_grad)


def test_soft_tokens_have_no_logits_and_order_of_attaching_does_not_matter() -> None:
    one, other = tiny_captioner(), tiny_captioner()
    soft_prompt.attach(one, 3, "Caption")
    add(one, "captioner", 4, 4)
    add(other, "captioner", 4, 4)
    soft_prompt.attach(other, 3, "Caption")
    names = [{name for name, p in c.model.named_parameters() if p.requires_grad} for c in (one, other)]
    assert names[0] == names[1] and "model.language_model.embed_tokens.soft" in names[0]
    assert logits(one).shape[-1] == len(tokenizer())
    assert one.model.get_output_embeddings().weight is one.model.get_input_embeddings().weight


def test_attached_again_the_rows_stay() -> None:
    captioner = tiny_captioner()
    soft_prompt.attach(captioner, 3, "Caption", trainable=False)
    rows = soft_prompt.rows(captioner).detach().clone()
    soft_prompt.attach(captioner, 3, "other words", trainable=True)
    assert torch.equal(soft_prompt.rows(captioner), rows) and soft_prompt.rows(captioner).requires_grad
    with pytest.raises(ConfigError, match="has 3 soft tokens, not 4"):
        soft_prompt.attach(captioner, 4, "Caption")
    with pytest.raises(ConfigError, match="at least one"):
        soft_prompt.attach(tiny_captioner(), 0, "Caption")


def test_soft_prompt_of_another_width_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"soft_prompt": torch.zeros(3, 65)}, tmp_path / soft_prompt.FILE)
    with pytest.raises(CheckpointError, match="width is 64"):
        soft_prompt.load(tiny_captioner(), tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be read|not JSON"):
        soft_prompt.load(tiny_captioner(), tmp_path / "missing")


def test_soft_tokens_may_lie_in_the_vocabularys_padding(tmp_path: Path) -> None:
    """Real Qwen checkpoints have more embedding rows than tokens."""
    captioner = tiny_checkpoint(tmp_path / "base", padding=2)
    captioner.model.requires_grad_(False)
    soft_prompt.attach(captioner, 3, "Caption")
    shake(captioner)
    first = len(tokenizer())
    assert captioner.soft_prompt_ids == [first, first + 1, first + 2]
    fed = inputs(captioner, captioner.soft_prompt_ids)
    expected = logits(captioner, fed)
    assert expected.shape[-1] == first + 2 and (expected[..., first:] == 0).all()
    fuse.export(captioner, tmp_path / "out", adapter=None)
    again = model.load(tmp_path / "out")
    assert isinstance(again.model.get_input_embeddings(), SoftEmbedding)
    torch.testing.assert_close(logits(again, fed), expected)
