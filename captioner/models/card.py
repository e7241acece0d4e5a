"""What an exported captioner says of itself: its README.md, and a chat template that renders its own prompt.

A stranger who shows it images and no text gets the prompt that it was trained with: the name before each
view, and the soft prompt or ``prompts/caption.md`` behind them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from captioner import prompts
from captioner.models.model import Captioner
from captioner.models.render import Renderer

_BEGIN, _END = "{#- captioner: begin -#}", "{#- captioner: end -#}"
_OWN = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.S)
# In front of the stock template. `messages` is replaced where a user shows images and says nothing.
_TEMPLATE = """\
{%- set own = namespace(messages=[], content=[]) -%}
{%- for message in messages -%}
{%- set own.content = [] -%}
{%- if message.role == 'user' and message.content is not string -%}
{%- set shown = message.content | selectattr('type', 'in', ['image', 'image_url']) | list -%}
{%- if shown and shown | length == message.content | length -%}
{%- set names = ALL_TAGS if shown | length == ALL_COUNT else ONE_TAG if shown | length == 1 else [] -%}
{%- for part in message.content -%}
{%- if names -%}
{%- set own.content = own.content + [{'type': 'text', 'text': names[loop.index0]}] -%}
{%- endif -%}
{%- set own.content = own.content + [part] -%}
{%- endfor -%}
{%- set own.content = own.content + [{'type': 'text', 'text': PROMPT}] -%}
{%- endif -%}
{%- endif -%}
{%- if own.content -%}
{%- set own.messages = own.messages + [{'role': message.role, 'content': own.content}] -%}
{%- else -%}
{%- set own.messages = own.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = own.messages -%}
"""


def chat_template(captioner: Captioner) -> str:
    """The captioner's chat template, which also renders its prompt for a user turn of images alone."""
    renderer = Renderer(captioner, captioner.views)
    tags = list(renderer.tags()) if captioner.views.tags else []
    one = list(renderer.tags(whole_only=True)) if captioner.views.tags else []
    values = {"ALL_TAGS": tags, "ALL_COUNT": len(renderer.tags()), "ONE_TAG": one}
    values["PROMPT"] = _prompt(captioner)
    own = _TEMPLATE
    for slot, value in values.items():
        own = own.replace(slot, json.dumps(value, ensure_ascii=False))
    # an export of an export does not render twice
    return _BEGIN + own + _END + _OWN.sub("", captioner.processor.chat_template)


def _prompt(captioner: Captioner) -> str:
    soft = captioner.tokenizer.convert_ids_to_tokens(captioner.soft_prompt_ids)
    return "".join(soft) or prompts.load("caption")


_CUT = """\
from PIL import Image, ImageOps

LEVELS, CENTER, OVERLAP = {levels}, {center}, {overlap}  # grids, centre crop, share of a tile
SIZE, CELL = {size}, {cell}  # pixels


def cut(image):
    \"\"\"The views of an RGB image, in the order of training.\"\"\"
    w, h = image.size
    boxes = [(a, c, b, d) for n in LEVELS for c, d in edges(h, n) for a, b in edges(w, n)]
    if CENTER and LEVELS[-1] > 1:
        a, d = w // LEVELS[-1], h // LEVELS[-1]
        left, top = (w - a) // 2, (h - d) // 2
        boxes.append((left, top, left + a, top + d))
    return [image.crop(box).resize(fit(box), Image.Resampling.BICUBIC) for box in boxes]


def edges(length, n):
    \"\"\"Start and end of each of ``n`` tiles.\"\"\"
    reach = round(OVERLAP * length / n)
    spans = [(i * length // n, (i + 1) * length // n) for i in range(n)]
    return [(max(0, a - reach), min(length, b + reach)) for a, b in spans]


def fit(box):
    \"\"\"Width and height of a view: multiples of CELL, at most SIZE squared pixels.\"\"\"
    cells, aspect = (SIZE // CELL) ** 2, (box[2] - box[0]) / (box[3] - box[1])
    across = min(cells, max(1, round((cells * aspect) ** 0.5)))
    down = min(cells, max(1, round((cells / aspect) ** 0.5)))
    if across >= down:
        across = min(across, cells // down)
    else:
        down = min(down, cells // across)
    return across * CELL, down * CELL


views = cut(ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB"))
"""
_TRANSFORMERS = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(".")
messages = [{"role": "user", "content": [{"type": "image"} for _ in views]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(text=[text], images=views, do_resize=False, return_tensors="pt").to(model.device)
made = model.generate(**inputs, max_new_tokens=256, do_sample=False)
print(processor.decode(made[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
_VLLM = """\
vllm serve . --served-model-name captioner \\
    --limit-mm-per-prompt '{{"image": {count}, "video": 0}}' \\
    --mm-processor-kwargs '{kwargs}' --generation-config vllm
"""
_CLIENT = """\
import base64, io
from openai import OpenAI

def png(view):
    data = io.BytesIO()
    view.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
content = [{{"type": "image_url", "image_url": {{"url": png(view)}}}} for view in views]
answer = client.chat.completions.create(
    model="captioner", messages=[{{"role": "user", "content": content}}],
    temperature=0, max_tokens=256, logit_bias={bias},  # the learned prompt is never said
)
print(answer.choices[0].message.content)
"""


def _use(captioner: Captioner) -> list[str]:
    """How a stranger uses the checkpoint, without this package."""
    renderer = Renderer(captioner, captioner.views)
    views, count = captioner.views, len(renderer.tags())
    size = {"size": {"shortest_edge": renderer.factor**2, "longest_edge": renderer.size**2}}
    bias = {str(token): -100 for token in captioner.soft_prompt_ids}
    numbers = {
        "levels": tuple(sorted(set(views.levels))),
        "center": views.center,
        "overlap": views.overlap,
        "size": renderer.size,
        "cell": renderer.factor,
    }
    return [
        "## Use",
        "",
        "Show it images and no text: its chat template adds the prompt that it was trained with and the name",
        f"of each view. It takes one image, or the {count} views that `cut` makes of it:",
        "",
        *("```python", *_CUT.format(**numbers).splitlines(), "```", ""),
        "With transformers:",
        "",
        *("```python", *_TRANSFORMERS.splitlines(), "```", ""),
        "With vLLM, and a client of its server:",
        "",
        *("```sh", *_VLLM.format(count=count, kwargs=json.dumps(size)).splitlines(), "```", ""),
        *("```python", *_CLIENT.format(bias=json.dumps(bias)).splitlines(), "```"),
    ]


def model_card(captioner: Captioner, card: Mapping[str, Any], verified: str = "") -> str:
    """README.md of an exported captioner: what it is, how to use it, how it was trained, what it reaches.

    ``card`` maps a heading to its entries; `metrics` is among them where there are any. ``verified`` tells
    how its logits compare with those of the captioner it was made from.
    """
    count = sum(parameter.numel() for parameter in captioner.model.parameters())
    learned = f"is learned: `{_prompt(captioner)}`" if captioner.soft_prompt_ids else "is ordinary text"
    views = ", ".join(f"{name} {value}" for name, value in captioner.views.model_dump(mode="json").items())
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    lines += ["tags: [image-captioning, captioner]", "---", "", "# Captioner", ""]
    lines += [
        f"A stock `{captioner.family.name}` checkpoint, {count / 1e6:,.1f} M parameters, written by",
        f"`captioner export`: adapters are part of its weights. The caption prompt {learned}.",
        f"It was trained on these views of an image: {views}.",
        "",
        *_use(captioner),
    ]
    for heading, entries in card.items():
        lines += ["", f"## {heading}", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in _flat(entries)]
    lines += ["", "## Verified", "", verified] if verified else []
    return "\n".join([*lines, ""])


def _flat(entries: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted name."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}{key}.")
        else:
            yield f"{name}{key}", value


def _cell(value: Any) -> str:
    """Text that cannot leave its cell of a Markdown table; of a path on this machine, the last part."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = Path(text).name if text.startswith("/") else text
    return " ".join(text.replace("|", "\\|").split())
