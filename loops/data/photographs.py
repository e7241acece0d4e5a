"""captioner data prepare PHOTOS | check SET | boxes FILE: sets from photographs, by hand or by boxes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

from captioner.config import Config
from captioner.errors import DataError, Refused
from captioner.files import atomic_dir
from captioner.records import Failed
from captioner.runs import RunDir, Shards
from captioner.sources.captions import finder
from captioner.sources.folder import json_line, link_image, read_folder
from loops.data.edge import check_free, folder_of, plan, report

__all__ = ["boxes", "check", "plan", "prepare"]

SHOWN = 20  # problems that are printed of each kind


def prepare(
    run: RunDir,
    config: Config,
    source: str,
    *,
    out: Path,
    longest: int | None = None,
    validation: float = 0.0,
    group: Literal["file", "folder"] = "file",
) -> Path:
    """Copy photographs upright, in sRGB, as JPEG or PNG, with a table to fill in; returns the new folder.

    Args:
        run: Not read.
        config: Settings; `seed` and `max_failed` are read.
        source: Photographs, with captions or without. They are only read.
        out: Folder to write; a new one. Fill in its captions.csv; `captioner data check` reads it back.
        longest: Longest side, pixels; larger ones are scaled down.
        validation: Share of the images in the split `validation`: OUT/captions.csv#validation.
        group: What is split: single files, or whole folders.

    Raises:
        Refused: more than `max_failed` of the images cannot be read.
    """
    from captioner.sources.prepare import prepare as write

    check_free(out)
    with folder_of(source) as folder, atomic_dir(out) as part:
        rows = read_folder(folder)
        count, failed = write(
            rows, part, longest=longest, validation=validation, group=group, seed=config.seed
        )
        Shards(part / "failed", Failed).write(0, failed)
    report(count, Counter(each.reason for each in failed), config.max_failed, out, "images prepared")
    return out


def check(run: RunDir, config: Config, source: str) -> None:
    """Print every image without a caption, row that is there twice, row without an image, and damaged image.

    Args:
        run: Not read.
        config: Settings; only `max_failed` is read.
        source: Images with captions.

    Raises:
        Refused: they are more than `max_failed` of all.
    """
    from captioner.sources.prepare import problems

    with folder_of(source) as folder:
        rows = read_folder(folder)
        found = problems(rows)
    counts = Counter(each.kind for each in found)
    for kind, count in counts.most_common():
        print(f"{count:,} {kind}")
        for each in [each for each in found if each.kind == kind][:SHOWN]:
            print(f"  {each.key}: {each.what}")
        if count > SHOWN:
            print(f"  and {count - SHOWN:,} more")
    print(f"{len(rows) - len(found):,} of {len(rows):,} images are ready: {source}")
    if len(found) > config.max_failed * len(rows):
        what = f"{len(found):,} of {len(rows):,} are not, more than max_failed = {config.max_failed:.1%}"
        raise Refused(what, where=source, fix="mend what is named above, or allow more with --max-failed")


def boxes(run: RunDir, config: Config, source: str, *, images: str, out: Path, per_image: int = 16) -> Path:
    """Turn boxes that people drew into exact questions, facts and captions; returns the new folder.

    Args:
        run: Not read.
        config: Settings; `seed` and `max_failed` are read.
        source: COCO's instances_*.json.
        images: Where the images are.
        out: Folder to write; a new one, with facts.jsonl for the judge `facts`. A source of `qa.data`.
        per_image: Questions of an image at most, half of them with the answer yes.

    Raises:
        Refused: more than `max_failed` of the annotated images are not there.
    """
    from captioner.method.annotations import annotate, as_metadata, read_coco

    check_free(out)
    known, classes = read_coco(Path(source))
    lost: Counter[str] = Counter()
    count = 0
    with folder_of(images) as folder, atomic_dir(out) as part:
        rows = {row.path.relative_to(folder).as_posix(): row for row in read_folder(folder, captions=False)}
        find = finder(rows, str(folder))
        with (
            (part / "metadata.jsonl").open("w", encoding="utf-8") as table,
            (part / "facts.jsonl").open("w", encoding="utf-8") as facts,
        ):
            for file_name, about in annotate(known, classes, per_image, config.seed):
                name = find(file_name)
                if name is None or not about.facts:
                    lost["its image is not there" if name is None else "no box"] += name is None
                    continue
                placed = link_image(rows[name], folder, part)
                table.write(json_line(as_metadata(placed, about)))
                facts.write(json_line({"file_name": placed, "facts": about.facts}))
                count += 1
        if not count:
            raise DataError(
                "no annotated image is there", where=images, fix="--images FOLDER of COCO's images"
            )
    report(count, +lost, config.max_failed, out, "images with questions and facts")
    return out
