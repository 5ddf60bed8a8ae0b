from pathlib import Path

import pytest

from tests.data import tiny_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus artifact of the standard library, with a tokenizer of 512 ids."""
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), documents=60)
