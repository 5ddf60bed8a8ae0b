"""What several tests of the data pipeline share."""

import tempfile
from pathlib import Path

import pytest

from tests import slurm as slurm_here


@pytest.fixture(scope="session")
def slurm():
    """A Slurm that takes jobs."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as root:
        yield from slurm_here.running(Path(root))
