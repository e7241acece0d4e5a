"""A caption job on a Ray cluster of two real nodes; a worker is killed in the middle of it.

    python -m tests.ray_nodes WORDS...   (of ``captioner``)

Prints what became of the job: its exit code, the nodes that workers were on, and how many were killed.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from loops import cli
from tests import conftest  # noqa: F401  (threads and network, before torch)


def actors() -> list[psutil.Process]:
    """The processes of this cluster that caption."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "ray::_Actor" in " ".join(process.cmdline())]


def kill_one(out: Path, killed: list[int]) -> None:
    """Kill a worker as soon as the job has published something."""
    while not list(out.glob("*.parquet")):
        time.sleep(0.05)
    for process in actors()[:1]:
        os.kill(process.pid, signal.SIGKILL)
        killed.append(process.pid)


def main() -> None:
    words = sys.argv[1:]
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False},
    )
    cluster.add_node(num_cpus=2, object_store_memory=80_000_000)
    killed: list[int] = []
    out = Path(words[words.index("--out") + 1])
    threading.Thread(target=kill_one, args=(out, killed), daemon=True).start()
    code = cli.main([*words, "--runner", "ray", "--caption.ray_address", cluster.address])
    nodes = len(cluster.list_all_nodes())
    print(json.dumps({"code": code, "nodes": nodes, "killed": len(killed)}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
