"""Folders of small models that the tests of this room share."""

from pathlib import Path

import pytest

from tests.support.families import FAMILIES, save_random


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    """family -> Hugging Face folder with random weights, norms and biases included."""
    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in folders:
            folders[family] = save_random(FAMILIES[family], tmp_path_factory.mktemp(family))
        return folders[family]

    return get
