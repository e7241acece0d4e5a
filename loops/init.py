"""captioner init --model PATH_OR_HUB_ID [--gpus N] [--gpu-memory GB]: settings to start from.

Writes a commented TOML for that model on that machine. Its data fields are for you to set; a command that
needs one that is not set stops and names it. Of a model on the hub the JSON files are enough.
"""

from __future__ import annotations

from pathlib import Path

from captioner import presets
from captioner.config import Config, load
from captioner.errors import ConfigError
from captioner.files import atomic_write_text
from captioner.runs import Run, RunDir, checkpoint_path
from loops.stages import StagePlan


def plan(run: Run, model: str, out: Path = Path("captioner.toml")) -> list[StagePlan]:
    """What is read and written."""
    return [StagePlan("", {"model": checkpoint_path(model)}, outputs=[out])]


def init(
    run: RunDir,
    config: Config,
    *,
    model: str,
    gpus: int = 1,
    gpu_memory: float = 80.0,
    caption_tokens: int = 256,
    out: Path = Path("captioner.toml"),
    force: bool = False,
) -> Path:
    """Write settings for a model and a machine; returns the file.

    Args:
        run: Not used: nothing of a run is read or written.
        config: Not used.
        model: Checkpoint directory, or OWNER/NAME in the hub's cache.
        gpus: Cards of the machine.
        gpu_memory: Memory of one card, GB.
        caption_tokens: Longest golden caption, tokens; the other lengths follow from it.
        out: File to write.
        force: Write over an existing file.
    """
    if gpus < 1 or gpu_memory <= 0 or caption_tokens < 16:
        raise ConfigError("gpus, gpu-memory and caption-tokens must be at least 1, 1 and 16")
    if out.exists() and not force:
        raise ConfigError("the file exists already", where=str(out), fix="--out another, or --force")
    machine = presets.Machine(gpus, gpu_memory)
    sizes = presets.read_sizes(checkpoint_path(model))
    text = presets.toml(model, sizes, machine, caption_tokens)
    atomic_write_text(out, text)
    load(out)  # what is written is read
    print(f"{out}: {sizes.parameters:.1f} billion parameters on {gpus} x {gpu_memory:g} GB. Set the fields")
    print(f"marked DATA, then: captioner sft {out} --gpus {gpus}")
    return out
