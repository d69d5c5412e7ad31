import importlib.util
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
    """Close progress bars that an earlier test left open: they would be written around an error's line."""
    for bar in [*tqdm._instances]:
        bar.close()

@pytest.fixture(autouse=True, scope='session')
def every_figure_is_readable():
    """Fail where a figure that is saved shows a tick in TeX, or a title that its edge cuts off."""
    if importlib.util.find_spec('matplotlib') is None:
        yield
        return
    from matplotlib.figure import Figure
    savefig = Figure.savefig

    def checked(figure, *args, **kwargs):
        figure.canvas.draw()
        for ax in (ax for ax in figure.axes if ax.get_visible()):
            ticks = [tick.get_text() for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_ticklabels(which='both')]
            assert not [tick for tick in ticks if '$' in tick or 'mathdefault' in tick]
            title = ax.title.get_window_extent()
            assert figure.bbox.x0 <= title.x0 and title.x1 <= figure.bbox.x1, ax.get_title()
        return savefig(figure, *args, **kwargs)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Figure, 'savefig', checked)
        yield
