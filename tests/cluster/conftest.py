"""The cluster of a test session, and what trains on it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ..recipes.conftest import tiny_run, tiny_shards  # noqa: F401
from .cluster import Cluster, obstacle


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
