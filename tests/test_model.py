"""Loading, refusing, building, and the fast vision path against transformers' own."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from captioner.config import EngineConfig, ModelConfig, ViewsConfig
from captioner.engines.hf import HFEngine
from captioner.errors import CheckpointError
from captioner.models import checkpoint, model, render, stock
from tests.test_adapters import add
from tests.test_adapters import train as step
from tests.tiny import VIEW_SIZE, architecture, tiny_captioner, tiny_checkpoint, tokenizer

FAMILIES = list(model.FAMILIES)


def patches(grids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randn(int(grids.prod(1).sum()), 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_is_stock_and_loads_back(family: str, tmp_path: Path) -> None:
    captioner = tiny_checkpoint(tmp_path, family)
    assert captioner.view_size == VIEW_SIZE and captioner.soft_prompt_ids == []
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        stock.stock_class(captioner.model)
    ]
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, local_files_only=True)
    for (name, ours), theirs in zip(
        captioner.model.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    processor = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    image = Image.new("RGB", (200, 200), "red")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    assert (
        text == "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    fed = processor(text=[text], images=[image], return_tensors="pt")
    assert fed["image_grid_thw"].tolist() == [[1, 8, 8]]  # 64 px in patches of 8
    assert plain(**fed).logits.shape == (1, fed["input_ids"].shape[1], len(tokenizer()))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "grids", [[[1, 8, 8]] * 6, [[1, 8, 8], [1, 4, 12], [1, 8, 8]], [[2, 4, 4]], [[1, 6, 6]]]
)
def test_fast_vision_equals_transformers(family: str, grids: list[list[int]], tmp_path: Path) -> None:
    fast = tiny_checkpoint(tmp_path, family, torch.float64).visual
    slow = AutoModelForImageTextToText.from_pretrained(
        tmp_path, local_files_only=True, dtype=torch.float64
    ).model.visual
    grid = torch.tensor(grids)
    results = []
    for visual in (slow, fast, fast):  # the second time from the cache
        visual.zero_grad()
        outputs = visual(patches(grid), grid_thw=grid)
        main, deep = outputs.pooler_output, outputs.get("deepstack_features", [])
        (main.square().mean() + sum(x.square().mean() for x in deep)).backward()
        results.append([main, *deep, *(p.grad for p in visual.parameters())])
    for result in results[1:]:
        for expected, got in zip(results[0], result, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-9)


def test_fast_vision_is_in_use() -> None:
    visual = tiny_captioner().visual
    grid = torch.tensor([[1, 8, 8]] * 4)
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def count(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(query.shape[0])
        return original(query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
        visual(patches(grid), grid_thw=grid)
    assert calls == [4, 4]  # one call a layer for all four views


@pytest.mark.parametrize("family", FAMILIES)
def test_a_photograph_takes_a_call_for_each_distinct_length(family: str) -> None:
    """Six views of 4:3 have two grids, and Qwen2.5-VL's windows at their borders some more."""
    visual = tiny_captioner(family).visual
    grid = torch.tensor([[1, 8, 12], [1, 6, 8], [1, 6, 8], [1, 6, 8], [1, 6, 8], [1, 6, 8]])
    calls: list[tuple[int, int]] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def count(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append((query.shape[0], query.shape[2]))
        return original(query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
        visual(patches(grid), grid_thw=grid)
    whole = [(5, 48), (1, 96)]
    if family == "qwen2_5_vl":  # its first layer attends in windows of 4 by 4 patches
        assert calls[-2:] == whole and len(calls) == 2 + len({length for _, length in calls[:-2]})
    else:
        assert calls == whole * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_patches_are_normalised_on_the_models_side(family: str, dtype: torch.dtype) -> None:
    captioner = tiny_captioner(family, dtype)
    renderer = render.Renderer(captioner, ViewsConfig())
    noise = torch.randint(0, 256, (96, 128, 3), generator=torch.Generator().manual_seed(0))
    raw, grid = renderer.patches_batch([Image.fromarray(noise.numpy().astype("uint8"))])[0]
    assert raw.dtype == torch.uint8 and renderer.pixels([raw]).dtype == torch.uint8
    assert renderer.pixels([raw, renderer.normalise(raw)]).dtype == torch.float32
    with torch.no_grad():
        one, other = (
            captioner.model.model.get_image_features(pixels, grid).pooler_output
            for pixels in (raw, renderer.normalise(raw))
        )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert renderer.normalise(raw).nbytes == 8 * raw.nbytes


def test_dropped_captioners_are_gone() -> None:
    """Loaded, tuned, trained and dropped five times: none waits for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        left = []
        for seed in range(5):
            captioner = tiny_captioner(FAMILIES[seed % 3], seed=seed)
            add(captioner, "captioner", 4, 4)
            captioner.model.gradient_checkpointing_enable({"use_reentrant": False})
            step(captioner)
            engine = HFEngine(captioner, ViewsConfig(), EngineConfig())
            engine.close()
            left.append(weakref.ref(captioner.model))
            del captioner
        assert [one() for one in left] == [None] * 5
    finally:
        gc.enable()


def test_random_init_draws_new_weights_of_the_same_shape(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path)
    one, same, other = (model.load(tmp_path, init="random", seed=seed) for seed in (1, 1, 2))
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    weights = [c.model.state_dict()[name] for c in (base, one, same, other)]
    assert len({w.shape for w in weights}) == 1
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[3])


def test_random_init_leaves_the_callers_random_state(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.load(tmp_path, init="random")
    assert torch.equal(torch.rand(3), expected)


def test_dtype_and_device_are_what_the_config_says(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    captioner = model.load(ModelConfig(path=str(tmp_path), dtype="bfloat16", device="cpu"))
    assert captioner.model.dtype == torch.bfloat16 and captioner.device.type == "cpu"
    assert model.load(ModelConfig(path=str(tmp_path), device="cpu")).model.dtype == torch.float32
    assert checkpoint.stored_dtype(tmp_path) == "float32"


def _no_directory(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def _other_architecture(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "llava"}')


def _pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _truncated(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000])


def _lacking_a_tensor(path: Path) -> None:
    state = load_file(path / "model.safetensors")
    del state["model.visual.merger.linear_fc1.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_no_directory, "no checkpoint directory"),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (_other_architecture, "'llava' is not supported"),
        (_pickled, "pickled"),
        (lambda path: (path / "model.safetensors").unlink(), "no weights"),
        (lambda path: (path / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (lambda path: (path / "tokenizer_config.json").unlink(), "tokenizer_config.json"),
        (
            lambda path: [(path / name).unlink(missing_ok=True) for name in ("tokenizer.json", "vocab.json")],
            "tokenizer.json",
        ),
        (lambda path: (path / "tokenizer.json").write_text("{"), "tokenizer.json is not JSON"),
        (
            lambda path: (path / "preprocessor_config.json").write_text('{"patch_size": "two"}'),
            "processor does not",
        ),
        (lambda path: (path / "config.json").write_text("{"), "not JSON"),
        (_truncated, "weights do not load"),
        (_lacking_a_tensor, "lack 1 tensors, model.visual.merger.linear_fc1.weight"),
    ],
)
def test_refuses_what_it_cannot_load(spoil, says: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "checkpoint"
    tiny_checkpoint(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        model.load(folder)
    assert caught.value.where and caught.value.fix


def test_describe_trainable_folds_layers() -> None:
    captioner = tiny_captioner()
    captioner.model.requires_grad_(False)
    captioner.visual.merger.requires_grad_(True)
    captioner.model.get_submodule("model.language_model.layers.1.mlp.gate_proj").requires_grad_(True)
    rows = model.describe_trainable(captioner.model)
    assert rows[0][0] == "model.visual.merger.linear_fc1" and rows[0][1] == 4 * 96 * (4 * 96 + 1)
    total = sum(p.numel() for p in captioner.model.parameters())
    assert ("model.language_model.layers.*.mlp.gate_proj", 64 * 96, 64 * 96 / total) in rows


def test_tokenizer_knows_every_text() -> None:
    words = tokenizer()
    for text in ("northwest circle, northwest red", "Ünïcode 漢字 🙂\n\ttabs", "12345"):
        assert words.decode(words.encode(text)) == text
    assert words.eos_token == "<|im_end|>" and words.pad_token == "<|endoftext|>"
    assert all(len(words.encode(token)) == 1 for token in model.SPECIAL_TOKENS)


def test_vocabulary_may_have_padding(tmp_path: Path) -> None:
    captioner = tiny_checkpoint(tmp_path, padding=12)
    assert captioner.model.get_input_embeddings().num_embeddings == len(tokenizer()) + 12


def test_head_width_is_one_vllm_takes() -> None:
    for family in FAMILIES:
        config = architecture(family, 420)
        vision = config.vision_config
        width = vision.embed_dim if family == "qwen2_vl" else vision.hidden_size
        assert config.text_config.hidden_size // config.text_config.num_attention_heads >= 32
        assert width // vision.num_heads >= 32
