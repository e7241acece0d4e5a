"""A caption job on a Ray cluster of two real nodes; in the middle of it a worker is killed, then a node.

    python -m tests.ray_nodes WORDS...   (of ``captioner``)

Prints what became of the job: its exit code, the nodes at the start and at the end, how many workers were
killed, and what becomes of tasks that prepare an image: one ends well, one raises, one kills its process; and
whether messages to a worker keep their order.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from captioner.engines import ray_pool
from captioner.views import BadImage
from loops import cli
from tests import conftest  # noqa: F401  (threads and network, before torch)

MESSAGES = 300


def actors() -> list[psutil.Process]:
    """The processes of this cluster that caption."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "ray::_Actor" in " ".join(process.cmdline())]


def kill(out: Path, cluster: Cluster, node: object, killed: list[int]) -> None:
    """Kill a worker as soon as the job has published something, and a node when it has published more."""
    while not list(out.glob("*.parquet")):
        time.sleep(0.05)
    for process in actors()[:1]:
        os.kill(process.pid, signal.SIGKILL)
        killed.append(process.pid)
    while len(list(out.glob("*.parquet"))) < 3:
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)


def task(number: int) -> int:
    if number == 1:
        raise BadImage("no image")
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def outcomes() -> list[str]:
    """Of such tasks, as a worker sees them."""
    tasks = ray_pool.RayTasks(3)
    futures = [tasks.submit(task, number) for number in range(3)]
    found = ["fine" if futures[0].result(60) == 0 else ""]
    for future in futures[1:]:
        error = future.exception(60)
        found.append(
            error.reason if isinstance(error, BadImage) else "crashed" * isinstance(error, tasks.crashed)
        )
    return found


def echo(settings: object, executor: object, receive: Callable[[], Any], emit: Callable[[Any], None]) -> None:
    while (message := receive()) is not None:
        emit(("heard", message))


def in_order() -> bool:
    """Whether a worker hears what it is told in the order in which it is told."""
    pool = ray_pool.RayPool(echo, None, list, gpus_each=0)
    pool.start(0)
    for number in range(MESSAGES):
        pool.send(0, number)
    pool.send(0, None)
    events: list[tuple[Any, ...]] = []
    while not events or events[-1][0] != "died":
        events += [event for _, event in pool.poll(1.0)]
    pool.close()
    return [event[1] for event in events[:-1]] == list(range(MESSAGES))


def main() -> None:
    words = sys.argv[1:]
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False},
    )
    node = cluster.add_node(num_cpus=2, object_store_memory=80_000_000)
    nodes = [len(cluster.list_all_nodes())]
    killed: list[int] = []
    out = Path(words[words.index("--out") + 1])
    threading.Thread(target=kill, args=(out, cluster, node, killed), daemon=True).start()
    code = cli.main([*words, "--runner", "ray", "--caption.ray_address", cluster.address])
    nodes.append(len(cluster.list_all_nodes()))
    found = {"code": code, "nodes": nodes, "killed": len(killed)}
    print(json.dumps(found | {"tasks": outcomes(), "in order": in_order()}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
