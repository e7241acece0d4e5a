"""captioner export --out DIR [--verify]: write a captioner as a stock checkpoint.

By default the run's newest promoted captioner. With ``--adapter DIR`` (what `captioner sft` leaves in
sft/adapter) what was trained is fused into the base ``--model.path``. The result loads in transformers and
vLLM, and its README.md says how it was trained and what it reaches.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.config import Config
from captioner.errors import RunError
from captioner.runs import Run, checkpoint_path, hash_path

if TYPE_CHECKING:
    from captioner.models.model import Captioner
    from captioner.models.render import Prompt

VERIFIED = 4  # prompts that --verify compares
VERIFIED_CAPTION = "red cup on a wooden table, small spoon to the left of the cup, window behind the table"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="directory to write; a new one"
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        type=Path,
        help="adapter to fuse into --model.path (default: the run's captioner)",
    )
    parser.add_argument(
        "--multiple",
        type=_positive,
        default=1,
        metavar="N",
        help="pad inner widths with zeros to a multiple of N, for tensor parallelism (default 1)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help=f"compare the logits of {VERIFIED} prompts before and after; refuse if they differ",
    )


def run(config: Config, args: argparse.Namespace) -> int:
    """Export into ``args.out``; raises RunError where something else is there."""
    from captioner.models import adapters, fuse, model, soft_prompt

    _check_free(args.out, args.redo)
    if args.adapter:
        source = checkpoint_path(config.model.path)
    else:
        source = Run.open(args.run_dir, config, create=False).newest_captioner()
    dtype = config.model.dtype if config.model.dtype != "auto" else model.stored_dtype(source)
    stored = {"path": str(source), "dtype": dtype, "device": "cpu", "load_in_4bit": False}
    captioner = model.load(config.model.model_copy(update=stored))
    name = None
    if args.adapter and (args.adapter / adapters.CONFIG_FILE).is_file():
        name = "captioner"
        adapters.load(captioner, name, args.adapter)
    if args.adapter and (args.adapter / soft_prompt.FILE).is_file():
        soft_prompt.load(captioner, args.adapter)
    elif args.adapter and name is None:
        raise RunError("the directory holds no adapter", where=str(args.adapter), mend="name RUN/sft/adapter")
    captioner.views = config.views.over(captioner.views)
    made = args.adapter.parent if args.adapter else source.parent
    origin = {"source": source.name, "source sha256": hash_path(source)}
    if args.adapter:
        origin["adapter sha256"] = hash_path(args.adapter)
    card = {"Origin": origin, **_history(made)}
    prompts = _prompts(captioner, config.seed) if args.verify else ()
    difference = fuse.export(captioner, args.out, name, card, multiple=args.multiple, prompts=prompts)
    parameters = sum(p.numel() for p in captioner.model.parameters())
    print(f"export: {captioner.family.name}, {parameters / 1e6:.1f} M parameters, {dtype}: {args.out}")
    if difference:
        print(
            f"verified on {difference.prompts} prompts: logits differ by at most {difference.largest:.3g} of "
            f"{difference.scale:.3g}; the likeliest token is the same at {difference.same_tokens:.2%}"
        )
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _history(made: Path) -> dict[str, Any]:
    """What the manifests beside a captioner say of its training, and the scores of its run."""
    found: dict[str, Any] = {}
    for manifest in (made / "stage.json", made / "dpo" / "stage.json"):
        if manifest.is_file():
            stage = json.loads(manifest.read_text(encoding="utf-8"))
            about = {key: stage[key] for key in ("section", "counts", "seeds", "versions", "wall_s")}
            found |= {f"Training: {stage['stage']}": about, "Metrics of the training": stage["metrics"]}
    evaluation = made.parent / "evaluation.json" if made.name == "sft" else made / "evaluation.json"
    if evaluation.is_file():
        scores = json.loads(evaluation.read_text(encoding="utf-8"))
        for one in scores["captioners"]:
            if (made / "captioner").resolve() == Path(one["checkpoint"]).resolve():
                scored = {key: interval["value"] for key, interval in one["metrics"].items()}
                values = {key: value for key, value in scored.items() if value is not None}  # undefined
                found[f"Metrics on {scores['data']}"] = values
    return found


def _prompts(captioner: Captioner, seed: int) -> list[Prompt]:
    """Pictures of noise with all their views, the caption prompt and a caption."""
    import numpy as np
    from PIL import Image

    from captioner.models import render

    renderer = render.Renderer(captioner, captioner.views)
    found = []
    for index in range(VERIFIED):
        rng = np.random.default_rng([seed, index])
        noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((256, 192), Image.Resampling.BICUBIC)
        prompt = renderer.prompt(picture)
        said = renderer.branch_ids(None, VERIFIED_CAPTION)[0]
        opened = len(renderer.branch_ids(None)[0])
        found.append(replace(prompt, input_ids=prompt.input_ids[:-opened] + said))
    return found


def _check_free(out: Path, redo: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if redo and (out / "config.json").is_file():  # only a checkpoint may be replaced
        return
    raise RunError(
        "there is something at the place to write",
        where=str(out),
        mend="name another --out, or add --redo to replace a checkpoint",
    )
