import signal
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)] # the repository's root, and `tiny` for tests in folders below

import pytest
from tqdm import tqdm

for number in (signal.SIGINT, getattr(signal, 'SIGHUP', None)): # a shell's background job, or nohup, ignores them
    if number and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

from tiny import RANKINGS, checkpoint, records

@pytest.fixture
def sft_model(tmp_path):
    return checkpoint(tmp_path / 'sft')

@pytest.fixture
def data(tmp_path):
    """Write rankings; a test module may have other data by the same name."""
    return records(tmp_path / 'rankings.jsonl', RANKINGS)

@pytest.fixture(scope='session')
def hf():
    """Give transformers, an independent GPT-2; stored numbers are compared where it is not installed."""
    transformers = pytest.importorskip('transformers', reason="the independent GPT-2; stored numbers stand in for it")
    transformers.logging.set_verbosity_error()
    return transformers

@pytest.fixture(autouse=True)
def no_bars_of_other_tests():
    """Forget progress bars that an earlier test left open: an error's line would be written around them."""
    tqdm._instances.clear()
