"""Start-up of a job most of whose shards are finished.

    python benchmarks/bulk_resume.py [SHARDS]

Makes an output with SHARDS (default 10,000) finished shards over as many input tars, and times what a command
does before its first worker starts: listing, manifest, journal (aim: under 2 s).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from captioner.bulk import output
from captioner.bulk.output import Output, Tally
from captioner.config import Config
from captioner.runs import atomic_write_json, checkpoint_path
from loops import caption


def main() -> None:
    shards = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        tars, out = Path(folder, "tars"), Path(folder, "out")
        for place in (tars, out):
            place.mkdir()
        for shard in range(shards + 1):
            (tars / f"{shard:06d}.tar").write_bytes(b"\0" * 1024)
        args = argparse.Namespace(input=f"{tars}/*.tar", out=out, verify=False, drop_refuted=False)
        source = caption._Source(Config(), args)
        job, *_ = caption._job(Config(), args, source, checkpoint_path("scenes-base"))
        atomic_write_json(out / output.MANIFEST, job)
        with (out / output.JOURNAL).open("w") as journal:
            for shard in range(shards):
                (out / f"{shard:05d}.parquet").touch()
                journal.write(json.dumps({"shard": shard, **asdict(Tally(rows=1000))}) + "\n")
        started, worked = time.monotonic(), time.process_time()
        job, found, _ = caption._job(Config(), args, source, checkpoint_path("scenes-base"))
        done: Output = output.claim(out, job)
        missing = next(shard for shard in source.shards() if shard.index not in done.done)
        seconds, cpu = time.monotonic() - started, time.process_time() - worked
        assert (found, len(done.done), missing.index) == (shards + 1, shards, shards)
    print(f"{shards:,} finished shards: {seconds:.2f} s ({cpu:.2f} s of CPU) to the first missing one")


if __name__ == "__main__":
    main()
