"""README.md and docs/editing.md: their Python examples run as they stand."""

import contextlib
import io
import os
import pathlib
import re

from tests.helpers import tmp

TOP = pathlib.Path(__file__).parent.parent


def example(page):
    """Run the Python of a page -> what it printed, its names"""
    code = re.search(r'```python\n(.*?)```', (TOP / page).read_text(encoding='utf-8'), re.S)[1]
    out, names, before = io.StringIO(), {}, os.getcwd()
    os.chdir(tmp())
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            exec(code, names)
    finally:
        os.chdir(before)
    return out.getvalue(), names


def test_python_example():
    text, names = example('README.md')
    accuracy, answer, logits = text.splitlines()[-3:]
    assert float(accuracy) == names['results']['test']['accuracy'] > 0.5
    [(label, probability)] = eval(answer)
    assert label in names['run'].labels and 0.5 <= probability <= 1
    assert logits.startswith("['negative', 'positive'] [["), logits


def test_a_loop_of_ones_own():
    text, _ = example('docs/editing.md')
    assert float(text.split()[-1]) > 0.7, text
