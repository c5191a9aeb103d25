"""The cluster of a test session, what trains on it, and the training that all are compared with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from ..recipes.conftest import TinyRun, tiny_run, tiny_shards  # noqa: F401
from .cluster import Cluster, obstacle
from .jobs import Job


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two hosts with Slurm; where they can't be had, tests skip, but under CI they fail."""
    if reason := obstacle():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with Cluster(hosts=2, folder=tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, whole again after each test whatever that did to it."""
    yield session_cluster
    session_cluster.mend()


@pytest.fixture(scope="session")
def uninterrupted(session_cluster: Cluster, tiny_run: Callable[..., TinyRun]) -> Job:  # noqa: F811
    """A training of two ranks on the first host that nothing has happened to."""
    job = Job(session_cluster, tiny_run("one_host"), "one host")
    job.start().succeed()
    return job


@pytest.fixture
def job(cluster: Cluster, tiny_run: Callable[..., TinyRun]) -> Callable[..., Job]:  # noqa: F811
    """Makes a job of the same training: `job("deepspeed", "its_name", stage=3)`."""

    def make(launcher: str, name: str, stage: int = 2, doctor: bool = False) -> Job:
        return Job(cluster, tiny_run(name, deepspeed={"stage": stage}), launcher, doctor)

    return make
