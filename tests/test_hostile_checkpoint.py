"""A checkpoint whose files ask for code or for the network: exit 2 with the key named, and nothing happens.

What is planted is loaded in a process of its own, in which every connection and every import of what the
checkpoint brings is told.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from captioner.errors import CheckpointError
from captioner.models import adapters, checkpoint, model
from tests.test_adapters import add
from tests.tiny import tiny_captioner, tiny_checkpoint

REPO = Path(__file__).resolve().parent.parent
EVIL = "evil-org/evil-kernel"
# What a load does is seen by an audit hook; transformers may ask the network, for the test is not offline.
WATCH = """
import json, os, sys
os.environ.pop("HF_HUB_OFFLINE", None)
seen = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
        seen.append(f"{event} {args[1:]}")
    if event == "import" and ("evil" in args[0] or args[0].split(".")[0] in ("kernels", "timm")):
        seen.append(f"import {args[0]}")
    if event == "open" and "evil" in str(args[0]) and str(args[0]).endswith(".py"):
        seen.append(f"open {args[0]}")
sys.addaudithook(hook)
from captioner.config import Config, ModelConfig
from captioner.errors import CaptionerError
from captioner.models import model, render
from PIL import Image
seen.clear()
said, code = "", 0
try:
    captioner = getattr(model, sys.argv[2])(__import__("pathlib").Path(sys.argv[1]))
    render.Renderer(captioner, captioner.views)
except CaptionerError as error:
    said, code = str(error), error.exit_code
print("RESULT" + json.dumps([code, said, seen]))
"""


def put(folder: Path, file: str, key: str, value: Any) -> None:
    """Set a dotted key of a JSON file, which is made if it is not there."""
    path = folder / file
    settings = whole = json.loads(path.read_text()) if path.exists() else {}
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
    settings[last] = value
    path.write_text(json.dumps(whole))


REMOTE = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")}
REMOTE |= {name: f"evil.{name}" for name in ("AutoTokenizer", "AutoImageProcessor", "AutoVideoProcessor")}
CONFIG, TOKENS, IMAGES, VIDEOS, JOINT = (
    f"{name}config.json" for name in ("", "tokenizer_", "preprocessor_", "video_preprocessor_", "processor_")
)
INDEX = "model.safetensors.index.json"
# what is planted: file, dotted key, value
PLANTED: dict[str, tuple[str, str, Any]] = {
    "kernel": (CONFIG, "_attn_implementation_internal", EVIL),
    "public kernel": (CONFIG, "attn_implementation", EVIL),
    "known kernel": (CONFIG, "_attn_implementation", "flash_attention_2"),
    "kernels by part": (CONFIG, "attn_implementation", {"": EVIL}),
    "nested kernel": (CONFIG, "vision_config._attn_implementation_internal", EVIL),
    "experts": (CONFIG, "text_config.experts_implementation", EVIL),
    "kernel config": (CONFIG, "kernel_config", {"RMSNorm": f"{EVIL}:Norm"}),
    "remote model": (CONFIG, "auto_map", REMOTE),
    "nested remote": (CONFIG, "text_config.auto_map", REMOTE),
    "other weights": (CONFIG, "transformers_weights", "../evil.bin"),
    "backbone": (CONFIG, "vision_config.backbone", "evil-org/net"),
    "quantizer": (CONFIG, "quantization_config", {"quant_method": "awq"}),
    "generation": ("generation_config.json", "custom_generate", "evil-org/gen"),
    "remote tokenizer": (TOKENS, "auto_map", REMOTE),
    "other tokenizer": (TOKENS, "tokenizer_class", "EvilTokenizer"),
    "foreign tokenizer": (TOKENS, "tokenizer_class", "BertJapaneseTokenizer"),
    "remote images": (IMAGES, "auto_map", REMOTE),
    "other images": (IMAGES, "image_processor_type", "TimmWrapperImageProcessor"),
    "other videos": (VIDEOS, "video_processor_type", "EvilVideoProcessor"),
    "remote processor": (JOINT, "auto_map", REMOTE),
    "nested processor": (JOINT, "image_processor.image_processor_type", "EvilProcessor"),
    "other processor": (JOINT, "processor_class", "ClvpProcessor"),
    "audio": (JOINT, "audio_tokenizer", {"audio_tokenizer_class": "EvilTokenizer"}),
    "an adapter": ("adapter_config.json", "base_model_name_or_path", "evil-org/m"),
    "pickled shard": (INDEX, "weight_map", {"lm_head.weight": "evil.bin"}),
    "shard elsewhere": (INDEX, "weight_map", {"a": "../../other.safetensors"}),
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "checkpoint"
    tiny_checkpoint(folder)
    return folder


def planted(clean: Path, home: Path) -> Path:
    """A copy with Python files that must not run."""
    folder = home / "checkpoint"
    shutil.copytree(clean, folder)
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("import evil\n")
    return folder


def watched(folder: Path, how: str = "load") -> tuple[int, str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", WATCH, folder, how],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        cwd=folder.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    code, said, seen = json.loads(done.stdout.rpartition("RESULT")[2])
    return code, said, seen


@pytest.mark.parametrize("name", PLANTED)
def test_refused_before_anything_is_loaded(name: str, clean: Path, tmp_path: Path) -> None:
    file, key, value = PLANTED[name]
    folder = planted(clean, tmp_path)
    put(folder, file, key, value)
    with pytest.raises(CheckpointError) as caught:
        model.load(folder)
    assert caught.value.exit_code == 2 and caught.value.fix
    assert f"`{key}`" in str(caught.value) or f"`{file}`" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["load", "load_frontend"])
def test_nothing_is_fetched_or_run(how: str, clean: Path, tmp_path: Path) -> None:
    """All of it at once, without the offline switch; and a clean one, to see that the watch sees a load."""
    folder = planted(clean, tmp_path)
    assert watched(folder, how) == (0, "", [])
    for file, key, value in PLANTED.values():
        if file != INDEX:
            put(folder, file, key, value)
    code, said, seen = watched(folder, how)
    assert (code, seen) == (2, []) and "adapter" in said
    (folder / "adapter_config.json").unlink()
    code, said, seen = watched(folder, how)
    assert (code, seen) == (2, []) and " sets `" in said


@pytest.mark.slow
def test_a_template_cannot_reach_python(clean: Path, tmp_path: Path) -> None:
    folder = planted(clean, tmp_path)
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(escape)
    code, said, seen = watched(folder)
    assert (code, seen) == (2, []) and "chat template" in said


def test_what_published_checkpoints_hold_is_no_offence(clean: Path, tmp_path: Path) -> None:
    folder = planted(clean, tmp_path)
    put(folder, "config.json", "_attn_implementation_autoset", True)
    put(folder, "config.json", "quantization_config", None)
    put(folder, "config.json", "text_config.linear_conv_kernel_dim", 4)
    put(folder, "tokenizer_config.json", "tokenizer_class", "Qwen2TokenizerFast")
    put(folder, "preprocessor_config.json", "image_processor_type", "Qwen2VLImageProcessorFast")
    model.load(folder)
    vocabulary = {"auto_map": 0, "kernel_config": 1}  # tokens, not settings
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    assert checkpoint.check_files(folder)["model_type"] == "qwen3_vl"


def test_a_quantized_checkpoint_may_be_served(clean: Path, tmp_path: Path) -> None:
    folder = planted(clean, tmp_path)
    put(folder, "config.json", "quantization_config", {"quant_method": "fp8"})
    assert model.load_frontend(folder).view_size == 64
    with pytest.raises(CheckpointError, match="quantized"):
        model.load(folder)


@pytest.mark.parametrize(
    "own",
    [
        {"views": {"levels": []}},
        {"soft_prompt_ids": [5, -1]},
        {"soft_prompt_ids": [1, 5]},
        {"soft_prompt_ids": [10**9]},
        ["views"],
    ],
)
def test_our_own_section_is_checked_too(own: Any, clean: Path, tmp_path: Path) -> None:
    folder = planted(clean, tmp_path)
    put(folder, "config.json", "captioner", own)
    with pytest.raises(CheckpointError):
        model.load(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '"a"', "nul"])
def test_json_that_is_no_object(text: str, clean: Path, tmp_path: Path) -> None:
    folder = planted(clean, tmp_path)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="not JSON"):
        model.load(folder)


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation", "auto_mapping", "kernel_config"])
def test_an_adapters_manifest_is_checked(key: str, tmp_path: Path) -> None:
    captioner = tiny_captioner()
    add(captioner, "captioner", 5, 7)
    adapters.save(captioner, "captioner", tmp_path)
    put(tmp_path, "adapter_config.json", key, {"base_model_class": "evil"})
    with pytest.raises(CheckpointError, match=key):
        adapters.load(tiny_captioner(), "captioner", tmp_path)
