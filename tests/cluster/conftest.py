"""The cluster that the tests of this folder share, started where SLURM is installed."""

import os
import shutil
from collections.abc import Iterator

import pytest
from slurm_cluster import TOOLS, Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [name for name in TOOLS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing) or 'SLURM'} (make cluster-test installs it)")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.environment["PATH"] += ":/usr/sbin"
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
