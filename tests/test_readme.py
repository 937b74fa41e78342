"""README.md: its Python example runs as it stands."""

import contextlib
import io
import os
import pathlib
import re

from tests.helpers import tmp

README = pathlib.Path(__file__).parent.parent / 'README.md'


def test_python_example():
    code = re.search(r'```python\n(.*?)```', README.read_text(encoding='utf-8'), re.S)[1]
    out, names, before = io.StringIO(), {}, os.getcwd()
    os.chdir(tmp())
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            exec(code, names)
    finally:
        os.chdir(before)
    accuracy, answer, logits = out.getvalue().splitlines()[-3:]
    assert float(accuracy) == names['results']['test']['accuracy'] > 0.5
    [(label, probability)] = eval(answer)
    assert label in names['run'].labels and 0.5 <= probability <= 1
    assert logits.startswith("['negative', 'positive'] [["), logits
