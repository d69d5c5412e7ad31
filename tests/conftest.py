import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the modules lie flat in the root

import pytest

from tiny import RANKINGS, checkpoint, records


@pytest.fixture
def sft_model(tmp_path):
    return checkpoint(tmp_path / 'sft')


@pytest.fixture
def data(tmp_path):
    """Rankings; a test module may have other data by the same name."""
    return records(tmp_path / 'rankings.jsonl', RANKINGS)
