"""An exported captioner is stock in behaviour: a stranger's plain code gets the captions that ours gets."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from skimage import data as photographs
from transformers import AutoProcessor

from captioner.config import Config, ModelConfig, SamplingConfig, ViewsConfig
from captioner.engines import CaptionRequest, make_engine
from captioner.models import fuse, model
from captioner.models.card import chat_template
from captioner.models.render import Renderer
from captioner.views import load_image
from tests.test_fuse import FAMILIES, adapted

# Qwen's own templates number images where asked to, and Qwen2-VL's begins with a system turn
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
)


def shown(count: int, text: str | None = None) -> list[dict[str, Any]]:
    content: list[dict[str, str]] = [{"type": "image"}] * count
    return [{"role": "user", "content": content + ([{"type": "text", "text": text}] if text else [])}]


def ids(processor: Any, messages: list[dict[str, Any]]) -> list[int]:
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    found: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def expected(renderer: Renderer, whole_only: bool) -> list[int]:
    """The ids of our own prompt, with one placeholder for each view."""
    count = len(renderer.tags(whole_only))
    prefix = renderer.prefix(torch.tensor([[1, 2, 2]] * count), renderer.tags(whole_only))
    return prefix.ids + renderer.branch_ids(None)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "soft"), [*((family, 3) for family in FAMILIES), ("qwen3_vl", 0)])
def test_images_alone_are_the_prompt_of_training(family: str, soft: int, tmp_path: Path) -> None:
    captioner = adapted(family, torch.float32, soft=soft)
    captioner.processor.chat_template = stock = SYSTEM + captioner.processor.chat_template
    captioner.views = ViewsConfig()
    fuse.export(captioner, tmp_path / "one")
    exported = model.load(ModelConfig(path=str(tmp_path / "one"), dtype="float32", device="cpu"))
    fuse.export(exported, tmp_path / "two", adapter=None)  # the next round's
    ours = Renderer(captioner, captioner.views)
    for name in ("one", "two"):
        processor = AutoProcessor.from_pretrained(tmp_path / name)
        assert ids(processor, shown(6)) == expected(ours, whole_only=False)
        assert ids(processor, shown(1)) == expected(ours, whole_only=True)
        written = processor.chat_template
        said = {m: processor.apply_chat_template(shown(m, "Is it red?"), tokenize=False) for m in (1, 6)}
        processor.chat_template = stock
        for count, text in said.items():  # whoever writes a text gets the stock template
            assert text == processor.apply_chat_template(shown(count, "Is it red?"), tokenize=False)
        assert ids(processor, shown(1)) != expected(ours, whole_only=True)
    assert written.count("captioner: begin") == 1


def test_views_without_names_stay_so() -> None:
    captioner = adapted("qwen3_vl", torch.float32)
    captioner.views = ViewsConfig(tags=False)
    ours = Renderer(captioner, captioner.views)
    captioner.processor.chat_template = chat_template(captioner)
    assert ids(captioner.processor, shown(6)) == expected(ours, whole_only=False)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "overlap"), [((300, 451), 0.0), ((90, 700), 0.25)])
def test_the_code_of_the_card_captions_as_we_do(
    size: tuple[int, int], overlap: float, tmp_path: Path
) -> None:
    """Run as printed in a plain process, on a photograph."""
    from PIL import Image

    captioner = adapted("qwen3_vl", torch.float32)
    captioner.views = ViewsConfig(levels=(1, 2), center=True, overlap=overlap)
    folder = tmp_path / "captioner"
    fuse.export(captioner, folder)
    photo = folder / "photo.jpg"
    Image.fromarray(photographs.astronaut()).resize(size).save(photo)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    code = blocks[0] + blocks[1].replace("max_new_tokens=256", "max_new_tokens=24")
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    engine = make_engine(folder, Config.model_validate({"model": {"dtype": "float32"}}))
    greedy = SamplingConfig(temperature=0.0, max_tokens=24)
    image, sample = load_image(photo)
    [[found]] = engine.sample([CaptionRequest("photo", image, sample)], 1, greedy)
    assert result.stdout.strip() == found.text.strip() != ""
