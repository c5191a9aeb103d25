"""Trainings over two hosts, one rank on each, started with the launchers' own commands.

They prove the cluster: with ssh and pdsh, Slurm, torchrun's c10d rendezvous and accelerate's static
one, the losses are those of two ranks on one host.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ..recipes.conftest import TinyRun
from .cluster import Cluster
from .hosts import HostProcess, wait_for

pytestmark = [pytest.mark.process, pytest.mark.cluster]

PORT = "29500"  # of the cluster's own network, where it is always free


def _train(run: TinyRun) -> list[str]:
    return ["convnext_yolo.launch", "train", "--config", str(run.recipe)]


def _deepspeed(cluster: Cluster, run: TinyRun) -> list[HostProcess]:
    file = cluster.folder / "deepspeed_env"
    file.write_text("".join(f"{k}={v}\n" for k, v in cluster.environment.items()))
    words = ["deepspeed", "--hostfile", str(cluster.hostfile), "--launcher", "pdsh"]
    words += ["--master_addr", cluster.hosts[0].address, "--no_local_rank", "--module"]
    return [cluster.hosts[0].start([*words, *_train(run)], env={"DS_ENV_FILE": str(file)})]


def _slurm(cluster: Cluster, run: TinyRun) -> list[HostProcess]:
    ranks = "RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID"
    rank = f'export {ranks}; exec python -m "$@"'
    master = {"MASTER_ADDR": cluster.hosts[0].address, "MASTER_PORT": PORT}
    words = ["srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", rank, "rank"]
    return [cluster.hosts[0].start([*words, *_train(run)], env=master)]


def _torchrun(cluster: Cluster, run: TinyRun) -> list[HostProcess]:
    words = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    words += [f"--rdzv-endpoint={cluster.hosts[0].address}:{PORT}", "-m"]
    return [host.start([*words, *_train(run)]) for host in cluster.hosts]


def _accelerate(cluster: Cluster, run: TinyRun) -> list[HostProcess]:
    # --multi_gpu is accelerate's name for starting several processes, on CPUs too
    words = ["accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=2"]
    words += [f"--main_process_ip={cluster.hosts[0].address}", f"--main_process_port={PORT}"]
    words += ["--mixed_precision=no", "--dynamo_backend=no"]
    return [
        host.start([*words, f"--machine_rank={rank}", "-m", *_train(run)])
        for rank, host in enumerate(cluster.hosts)
    ]


@pytest.fixture(scope="module")
def losses_of_one_host(
    session_cluster: Cluster, tiny_run: Callable[..., TinyRun]
) -> list[dict[str, float]]:
    """The losses of two ranks on the first host."""
    run = tiny_run("one_host")
    words = ["torchrun", "--nproc-per-node=2", "-m", *_train(run)]
    session_cluster.hosts[0].run(words, timeout_s=200)
    return run.losses()


@pytest.mark.parametrize("start", [_deepspeed, _slurm, _torchrun, _accelerate])
def test_two_hosts_train_as_one(
    start: Callable[[Cluster, TinyRun], list[HostProcess]],
    cluster: Cluster,
    tiny_run: Callable[..., TinyRun],
    losses_of_one_host: list[dict[str, float]],
) -> None:
    run = tiny_run(start.__name__.strip("_"))
    fronts = start(cluster, run)
    wait_for(
        lambda: (
            all(host.processes(" train --config") for host in cluster.hosts)
            or any(front.poll() is not None for front in fronts)
        ),
        "both hosts train",
        60,
    )
    printed = [front.communicate(timeout=200)[0] for front in fronts]
    assert [front.returncode for front in fronts] == [0] * len(fronts), "\n".join(printed)
    assert run.losses() == [pytest.approx(step, abs=1e-4) for step in losses_of_one_host]
    assert not [host.name for host in cluster.hosts if host.processes(str(run.recipe))]
