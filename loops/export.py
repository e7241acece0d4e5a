"""captioner export --out DIR: write a captioner as a stock checkpoint.

By default the run's newest promoted captioner. With ``--adapter DIR`` (what `captioner sft` leaves in
sft/adapter) the adapter and soft prompt in DIR are fused into the base ``--model.path``. The result loads
in transformers and vLLM.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from captioner.config import Config
from captioner.errors import RunError
from captioner.runs import Run, checkpoint_path, hash_path


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


def run(config: Config, args: argparse.Namespace) -> int:
    """Export into ``args.out``; raises RunError where something else is there."""
    from captioner import adapters, fuse, model, soft_prompt

    _check_free(args.out, args.redo)
    if args.adapter:
        source = checkpoint_path(config.model.path)
    else:
        source = Run.open(args.run_dir, config, create=False).newest_captioner()
    dtype = config.model.dtype if config.model.dtype != "auto" else model.stored_dtype(source)
    captioner = model.load(
        config.model.model_copy(update={"path": str(source), "dtype": dtype, "device": "cpu"})
    )
    name = None
    if args.adapter and (args.adapter / adapters.CONFIG_FILE).is_file():
        name = "captioner"
        adapters.load(captioner, name, args.adapter)
    if args.adapter and (args.adapter / soft_prompt.FILE).is_file():
        soft_prompt.load(captioner, args.adapter)
    elif args.adapter and name is None:
        raise RunError("the directory holds no adapter", where=str(args.adapter), mend="name RUN/sft/adapter")
    card = {"source": source.name, "source_sha256": hash_path(source)}
    if name:
        card["adapter_sha256"] = hash_path(args.adapter)
    fuse.export(captioner, args.out, name, card)
    parameters = sum(p.numel() for p in captioner.model.parameters())
    print(f"export: {captioner.family.name}, {parameters / 1e6:.1f} M parameters, {dtype}: {args.out}")
    return 0


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
