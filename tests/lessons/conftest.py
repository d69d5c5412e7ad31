"""The fixture that the tests of all lessons share."""
import io
from contextlib import redirect_stdout

import pytest

from lessons import course

@pytest.fixture(scope='module')
def ran(request, tmp_path_factory):
    """Give a function of a lesson's number that runs it once: its module, what main returned, the folder.

    The test module says LESSONS and SETTINGS.
    """
    done, out = {}, tmp_path_factory.mktemp('root')

    def run(n):
        if n not in done:
            lesson = course.load(request.module.LESSONS[n])
            with pytest.MonkeyPatch.context() as m, redirect_stdout(io.StringIO()) as said:
                m.setattr(course, 'HERE', out / 'lessons')
                done[n] = lesson, lesson.main(**request.module.SETTINGS[n]), out / 'out' / 'lessons'
            lines = said.getvalue().splitlines()
            assert not [line for line in lines if line != line.rstrip() or ' 1 answers' in line]
        return done[n]

    return run
