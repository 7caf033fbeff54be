"""What test_ray.py has done to a cluster, in a process of its own: python -m tests.ray_faults NAME …"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from probe import progress
from probe.cli import main
from probe.embedding import Device
from probe.engines.ray import RayWorkers
from probe.engines.worker import Job, Place, Receipt
from probe.errors import EngineError
from probe.sources import Example


def lost_node(cache: str, *command: str) -> int:
    """Runs `command --ray-address A` on two nodes, the second of which is killed once four shards are sealed."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    driver = subprocess.Popen([*command, "--ray-address", cluster.address])
    while driver.poll() is None and len(list(Path(cache).glob("shards/*/*.json"))) < 4:
        time.sleep(0.05)
    cluster.remove_node(second, allow_graceful=False)
    code = driver.wait()
    cluster.shutdown()
    return code


def with_a_gpu(*command: str) -> int:
    """Runs `command` where a cluster says that it has a GPU, and RAY_ADDRESS where it is."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    code = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": cluster.address}, check=False).returncode
    cluster.shutdown()
    return code


class Fragile:
    """Dies of shard 3, and of nothing else."""

    def load(self, backbone: str) -> Place:
        return Place(Device("cpu", "cpu"), "here", os.getpid())

    def begin(self, job: Job, tag: str) -> None:
        pass

    def make(self, number: int, examples: list[Example]) -> Receipt:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return Receipt(number, len(examples), len(examples), ())


def bad_shard() -> int:
    """Prints how the shard is reported that no worker can make."""
    job = Job(Path(), "", None, list, None, 1, False)  # type: ignore[arg-type]
    shards = [(number, [Example(b"picture-%d" % number, (), None, None, 0, 0)]) for number in range(8)]
    try:
        with RayWorkers(num_workers=2, worker=Fragile) as workers:
            workers.start("")
            made = {receipt.number for receipt in workers.make(job, shards, lambda tag: None)}
        print("all made:", made)
    except EngineError as err:
        print(err)
    return 0


def few_cpus() -> int:
    """Prints what is said where decode actors would never find room."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        RayWorkers(address=cluster.address, num_workers=1, num_decoders=2)
    except EngineError as err:
        print(err)
    cluster.shutdown()
    return 0


def talkative(*command: str) -> int:
    """Runs a command that tells of its progress whenever there is some."""
    progress._PLAIN_SECONDS = 0
    return main(command)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    parts = (lost_node, with_a_gpu, bad_shard, few_cpus, talkative)
    sys.exit({part.__name__: part for part in parts}[what](*arguments))
