"""captioner export --out DIR [--verify]: write a captioner as a stock checkpoint.

By default the run's newest promoted captioner. With ``--adapter DIR`` (what `captioner sft` leaves in
sft/adapter) what was trained is fused into the base ``--model.path``. The result loads in transformers and
vLLM, and its README.md says how it was trained and what it reaches. The run's verifier goes with it, in
``verifier/``: `captioner caption --checkpoint DIR --verify` and `captioner verify --verifier DIR` ask it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.config import Config
from captioner.errors import ConfigError, RunError
from captioner.files import hash_path
from captioner.method.verifier import Verifier, settings_of
from captioner.runs import Run, RunDir, checkpoint_path
from loops.stages import StagePlan

if TYPE_CHECKING:
    from captioner.models.model import Captioner
    from captioner.models.render import Prompt

VERIFIED = 4  # prompts that --verify compares
VERIFIED_CAPTION = "red cup on a wooden table, small spoon to the left of the cup, window behind the table"


def plan(run: Run, out: Path, adapter: Path | None = None) -> list[StagePlan]:
    """What is read and written."""
    inputs: dict[str, Path | str] = {"checkpoint": _source(run if adapter is None else None, run.config)}
    if adapter:
        inputs["adapter"] = adapter
    return [StagePlan("", inputs, outputs=[out])]


def export(
    run: RunDir,
    config: Config,
    *,
    out: Path,
    adapter: Path | None = None,
    multiple: int = 1,
    verify: bool = False,
    redo: bool = False,
) -> Path:
    """Write a captioner as a stock checkpoint, and the run's verifier with it; returns its directory.

    Args:
        run: Run directory whose newest captioner is written where no adapter is named.
        config: Settings; `model` is read.
        out: Directory to write; a new one.
        adapter: Adapter to fuse into `model.path`, instead of the run's captioner.
        multiple: Pad inner widths with zeros to a multiple of this, for tensor parallelism.
        verify: Compare the logits of four prompts before and after; refuse if they differ.
        redo: Replace a checkpoint that is there.

    Raises:
        RunError: something other than a checkpoint stands at `out`.
    """
    from captioner.models import adapters, checkpoint, fuse, model, soft_prompt

    if multiple < 1:
        raise ConfigError(f"--multiple {multiple} must be at least 1")
    out = Path(out)
    _check_free(out, redo)
    source = _source(Run.open(run, config, create=False) if adapter is None else None, config)
    dtype = config.model.dtype if config.model.dtype != "auto" else checkpoint.stored_dtype(source)
    stored = {"path": str(source), "dtype": dtype, "device": "cpu", "load_in_4bit": False}
    captioner = model.load(config.model.model_copy(update=stored))
    name = None
    if adapter and (adapter / adapters.CONFIG_FILE).is_file():
        name = "captioner"
        adapters.load(captioner, name, adapter)
    if adapter and (adapter / soft_prompt.FILE).is_file():
        soft_prompt.load(captioner, adapter)
    elif adapter and name is None:
        raise RunError("the directory holds no adapter", where=str(adapter), fix="name RUN/sft/adapter")
    captioner.views = config.views.over(captioner.views)
    made = adapter.parent if adapter else source.parent
    origin = {"source": source.name, "source sha256": hash_path(source)}
    if adapter:
        origin["adapter sha256"] = hash_path(adapter)
    card = {"Origin": origin, **_history(made)}
    prompts = _prompts(captioner, config.seed) if verify else ()
    difference = fuse.export(captioner, out, name, card, multiple=multiple, prompts=prompts)
    parameters = sum(p.numel() for p in captioner.model.parameters())
    print(f"export: {captioner.family.name}, {parameters / 1e6:.1f} M parameters, {dtype}: {out}")
    if adapter is None and settings_of(Run.path_of(run)).is_file():
        print(f"its verifier: {Verifier.load(Run.path_of(run)).copy(out)}")
    if difference:
        print(
            f"verified on {difference.prompts} prompts: logits differ by at most {difference.largest:.3g} of "
            f"{difference.scale:.3g}; the likeliest token is the same at {difference.same_tokens:.2%}"
        )
    return out


def _source(run: Run | None, config: Config) -> Path:
    return run.newest_captioner() if run else checkpoint_path(config.model.path)


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
        found.append(replace(prompt, branch=said))
    return found


def _check_free(out: Path, redo: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if redo and (out / "config.json").is_file():  # only a checkpoint may be replaced
        return
    raise RunError(
        "there is something at the place to write",
        where=str(out),
        fix="name another --out, or add --redo to replace a checkpoint",
    )
