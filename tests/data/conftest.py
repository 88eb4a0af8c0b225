"""Where the pictures lie, which are no part of the project."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pictures_root():
    """The folder of all data sets; tests that need it are skipped where it is missing."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    root = Path(os.environ.get("CADYQ_DATA") or beside)
    if not (root / "eval" / "Set5").is_dir():
        pytest.skip(f"no pictures in {root}; set CADYQ_DATA to the folder that holds eval/ and train/")
    return root
