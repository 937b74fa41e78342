"""lib/page.py: `eval.py RUN --html FILE`."""

import contextlib
import html.parser
import io
import os
import re

import numpy as np

import eval
from lib.files import UserError
from lib.intervals import bootstrap, wilson
from lib.page import chart
from lib.runs import open_run
from tests.helpers import gen_run, raises, tiny_run, tmp, write


class Balanced(html.parser.HTMLParser):
    """Raises AssertionError where a tag is closed that is not the open one."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words = [], []
        self.feed(text)
        assert self.open in ([], ['html']), self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ('meta', 'hr', 'br', 'path', 'circle', 'polyline'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ('path', 'circle', 'polyline'):  # <path .../>
            assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, text):
        self.words.append(text)


def page_of(run, rows, *flags):
    """The page of a run over rows (text, label) -> its HTML, the numbers of --json."""
    folder = tmp()
    lines = ['text,label'] + [f'"{text}",{label}' for text, label in rows]
    test, out = write('rows.csv', '\n'.join(lines), folder), os.path.join(folder, 'page.html')
    with contextlib.redirect_stdout(io.StringIO()):
        numbers = eval.main([run, '--test', test, '--html', out, *flags])
    with open(out, encoding='utf-8') as f:
        return f.read(), numbers


def test_page_of_a_run():
    """Numbers, errors by their probability, every text escaped, nothing from elsewhere."""
    for run in (tiny_run('lora'), gen_run('lora'), gen_run('full')):
        labels = open_run(run, 'cpu', 'fp32').labels
        texts = [
            f'cat <b>dog</b> {word} & one' for word in 'horse two three bird fish four'.split()
        ]
        rows = [(text, labels[i % len(labels)]) for i, text in enumerate(texts)]
        page, numbers = page_of(run, rows)
        words = ''.join(Balanced(page).words)
        assert 'http' not in page and 'src=' not in page and '<script' not in page
        m = numbers['runs'][0]
        assert f'{m["accuracy"]:.4f}' in words and f'{m["mcc"]:.4f}' in words
        assert '[{:.4f}, {:.4f}]'.format(*m['ci95']) in words
        wrong = sum(map(sum, m['confusion'])) - sum(np.diag(m['confusion']))
        assert wrong and f'{wrong} of 6 wrong' in words.replace('texts ', '').replace('text ', '')
        assert page.count('<hr>') == wrong and page.count('&lt;') >= wrong
        sure = [float(p) for p in re.findall(r'</b> (\d\.\d{4}) against', page)]
        assert len(sure) == wrong and sure == sorted(sure, reverse=True)
        assert page.count('<polyline') >= 2  # curves, perfect calibration
        assert 'validation' in words


def test_page_without_errors():
    """A run that is always right."""
    run = tiny_run('head')
    opened, texts = open_run(run, 'cpu', 'fp32'), list('abcdefghijklmnopqrstuvwxyz')
    answers = {label: text for text, (label, _) in zip(texts, opened.predict(texts))}
    assert len(answers) == 2
    page, _ = page_of(run, [(text, label) for label, text in answers.items()], '--plain')
    assert '0 texts of 2 wrong' in page and '<hr>' not in page
    Balanced(page)


def test_page_is_of_one_run():
    run, out = tiny_run('head'), os.path.join(tmp(), 'page.html')
    raises(UserError, eval.main, [run, run, '--html', out], match='--html writes the page of one')
    answers, truth = write('p.json', '["a"]'), write('l.json', '["a"]')
    raises(UserError, eval.main, ['--preds', answers, '--labels', truth, '--html', out])
    assert not os.path.exists(out)


def test_bootstrap():
    """Close to Wilson's interval where both apply; the same every time."""
    right = np.arange(400) < 340
    scores = lambda rows: dict(accuracy=right[rows].mean(), none=None)  # noqa: E731
    low, high = bootstrap(scores, 400, ['accuracy'])['accuracy']
    assert np.allclose((low, high), wilson(340, 400), atol=0.01)
    assert bootstrap(scores, 400, ['accuracy'])['accuracy'] == [low, high]


def test_chart():
    """Points lie where the axes say."""
    svg = chart('t', 'x', (0, 10), (0, 1), [('a', 'red', (0, 10), (0, 1))], [('blue', 5, 0.5, 3)])
    Balanced(svg)
    [(x0, y0), (x1, y1)] = [
        tuple(map(float, point.split(','))) for point in re.search('points="(.*?)"', svg)[1].split()
    ]
    x, y = map(float, re.search('cx="(.*?)" cy="(.*?)"', svg).groups())
    assert x0 < x1 and y0 > y1 and abs(2 * x - x0 - x1) < 0.2 and abs(2 * y - y0 - y1) < 0.2
