"""What tests of every room share."""

import tempfile
from pathlib import Path

import pytest

from tests import slurm as slurm_here


@pytest.fixture(scope="session")
def slurm():
    """A Slurm of three nodes that takes jobs; see `tests.slurm.Cluster`. There is one for all tests."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as root:
        yield from slurm_here.running(Path(root))
