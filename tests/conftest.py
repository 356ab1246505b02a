"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from tests import runs


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `run` is a finished run of ten steps; tests must not write to it."""
    folder = tmp_path_factory.mktemp("finished")
    runs.run(folder, "--output.save-every=5", "--output.validate-every=4")
    return folder
