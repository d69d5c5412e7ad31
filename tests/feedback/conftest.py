"""Fixtures that the tests of annotators and of judges share."""
import pytest

from tiny import records

@pytest.fixture
def some(tmp_path):
    """Seven tasks; the fourth has nothing to ask. The ranks that stand in the file are nobody's business."""
    rows = [dict(prompt=f'Q{n}', responses=['b', 'a', f'{n}'] if n != 3 else ['a', 'a'], ranks=[0, 1, 2][:3 - (n == 3)],
                 number=n) for n in range(7)]
    return dict(answers=records(tmp_path / 'a.jsonl', rows), device='cpu', out=str(tmp_path / 'out.jsonl'))

@pytest.fixture
def told(tmp_path):
    path = tmp_path / 'told.txt'
    path.write_text('Which?\n')
    return str(path)
