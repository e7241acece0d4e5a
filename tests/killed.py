"""`captioner iterate` on a tiny random model, killed once in the middle and started again."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from captioner.config import Config
from loops import sft
from tests.test_demo import small

REPO = Path(__file__).resolve().parent.parent
MAIN = "import sys; from loops.cli import main; sys.exit(main(sys.argv[1:]))"
IMAGES = 6
GONE_SECONDS = 60.0


def begin(home: Path) -> Path:
    """A run whose SFT is done; its round has six images in shards of one."""
    settings = small(home)
    settings["golden"] |= {"shard_rows": 1}
    settings["engine"] = {"max_num_seqs": 2}
    settings["gate"] |= {"data": "scenes:validation:3"}
    settings["evaluate"]["max_tokens"] = 6
    sft.sft(home / "run", Config.model_validate(settings))
    return home / "run"


class Iterate:
    """The command, in the interpreter ``python``."""

    def __init__(self, python: str, run: Path, *words: str, **environment: str):
        self.run = run
        self.words = [python, "-c", MAIN, "iterate", "--run", str(run), *words]
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **environment}

    def _start(self) -> subprocess.Popen[bytes]:
        with (self.run / "log").open("ab") as log:
            return subprocess.Popen(
                self.words, cwd=REPO, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def _said(self) -> str:
        return (self.run / "log").read_text(errors="replace")[-3000:]

    def killed_in(self, stage: str) -> None:
        """Start it and kill it, alone, once a shard of a stage is there; what it started ends by itself.

        Files of another process are looked for again and again, because nothing tells when one is there.
        """
        process = self._start()
        home = self.run / "round-1" / stage
        while not list(home.glob("[0-9]*.parquet")):
            assert process.poll() is None, self._said()
            time.sleep(0.005)
        others = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert not (home / "stage.json").exists()
        _, left = psutil.wait_procs(others, GONE_SECONDS)
        assert not left, left

    def done(self, last: str = "gate.json") -> None:
        """Start it and wait for its end; the gate may refuse what a random model learned.

        ``last``: a file of the round that is there then. Samples of a random model that never end make no
        pairs, so that a round may be refused before its training.
        """
        process = self._start()
        process.wait()
        assert process.returncode in (0, 3), self._said()
        assert (self.run / "round-1" / last).is_file(), self._said()


def check_rows(run: Path, evaluated: bool = True) -> None:
    """Every image once among samples, answers and captions: as a row, or as a failure with its reason."""
    home = run / "round-1"
    candidates = [row["key"] for row in rows(home / "candidates")]
    keys = {f"images/{index:06d}" for index in range(IMAGES)}
    assert Counter(candidates) == dict.fromkeys(keys, 3)
    claims = rows(home / "claims")
    assert len({(row["key"], row["text"]) for row in claims}) == len(claims) > 0
    failed = [row["key"] for row in rows(home / "claims" / "failed")]
    assert Counter([*failed, *{row["key"] for row in claims}]) == dict.fromkeys(keys, 1)
    if not evaluated:
        return
    captions = [rows(folder) for folder in (run / "evaluation").iterdir()]
    assert sorted(len({row["key"] for row in own}) for own in captions) == [3, 3, IMAGES, IMAGES]
    assert all(len({row["key"] for row in own}) == len(own) for own in captions)


def rows(folder: Path) -> list[dict[str, object]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, ignore=shutil.ignore_patterns(".lock"))
    return to
