"""Start-up of a job whose shards are finished.

    python benchmarks/bulk_resume.py [SHARDS] [tar|parquet]

Makes an output with SHARDS (default 10,000) finished shards over as many input files, and times the command
that finds nothing left to do: imports, listing the input, manifest, journal, closing line (aim: under 2 s).
Prints the fastest of three runs, and its CPU time: on a core that other work shares the clock runs on.
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.config import Config
from captioner.files import atomic_write_json
from captioner.pipeline import output
from captioner.pipeline.output import Tally
from captioner.runs import checkpoint_path
from loops import caption

COMMAND = [sys.executable, "-c", "import sys; from loops.cli import main; sys.exit(main())"]


def main() -> None:
    shards = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    kind = sys.argv[2] if len(sys.argv) > 2 else "tar"
    table = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"], "image": [b"no image"]}), table)
    data = {"tar": b"\0" * 1024, "parquet": table.getvalue()}[kind]
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        for place in (source, out):
            place.mkdir()
        for shard in range(shards):
            (source / f"{shard:06d}.{kind}").write_bytes(data)
        args = caption.Job(out, f"{source}/*.{kind}", out)
        given = caption._Source(Config(), args)
        listed = given.shards()
        job = caption._job(Config(), args, listed, checkpoint_path("scenes-base"))
        assert len(listed) == shards
        atomic_write_json(out / output.MANIFEST, job)
        with (out / output.JOURNAL).open("w") as journal:
            for shard in range(shards):
                (out / f"{shard:05d}.parquet").touch()
                journal.write(json.dumps({"shard": shard, **asdict(Tally(rows=1000))}) + "\n")
        words = ["caption", args.input, "--out", str(out), "--checkpoint", "scenes-base"]
        print(f"{shards:,} finished shards: {timed(words)}")
    print(f"captioner --version alone: {timed(['--version'])}")


def timed(words: list[str]) -> str:
    runs = []
    for _ in range(3):
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*COMMAND, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        runs.append((time.monotonic() - started, cpu))
    seconds, cpu = min(runs)
    return f"{seconds:.2f} s ({cpu:.2f} s of CPU)"


if __name__ == "__main__":
    main()
