"""lib/seeds.py, and eval.py --mean."""

import os

import numpy as np

from lib.files import UserError, read_json
from lib.intervals import compare_means, mean_interval
from lib.report import means_table
from lib.seeds import by_method
from tests.helpers import raises, run_eval, tmp
from tests.test_eval import fake_run, fake_world


def info(kind='cls', method='lora', **args):
    return dict(kind=kind, method=method, args=dict(dict(seed=1, r=8, out='x', data='d'), **args))


def test_runs_are_grouped_by_method():
    infos = [info(seed=1), info(seed=2, out='y', device='cuda', log_every=7), info(seed=1, r=16)]
    infos += [info(seed=2, r=16), info('gen', seed=1), info(method='head', seed=1)]
    groups = by_method(list('abcdef'), infos)
    want = {'lora --r 8': [0, 1], 'lora --r 16': [2, 3], 'gen-lora': [4], 'head': [5]}
    assert groups == want, groups
    switches = [
        info(seed=s, balance=b, targets=['a', t]) for s in (1, 2) for b, t in ((1 > 0, 'b'),)
    ]
    switches += [info(seed=1, balance=False, targets=['a'])]
    assert list(by_method(list('abc'), switches)) == [
        'lora --balance --targets a,b',
        'lora --targets a',
    ]
    raises(UserError, by_method, ['a'], infos[:1], match='needs two runs or more of a method')
    raises(UserError, by_method, ['a', 'b'], infos[1:3], match='lora --r 8, lora --r 16')
    twice = [infos[0], info(seed=1, out='z')]
    raises(
        UserError, by_method, ['a', 'b'], twice, match='a and b have the same flags and --seed 1'
    )
    older = info(seed=3)  # has no --pool yet, and no --balance
    newer = [info(seed=s, pool=p, balance=False) for s, p in ((4, None), (5, 'mean'), (6, 0.0))]
    groups = by_method(list('abcd'), [older, *newer])
    assert groups == {'lora': [0, 1], 'lora --pool mean': [2], 'lora --pool 0.0': [3]}, groups
    elsewhere = [info(seed=None)] * 2  # folders from elsewhere do not say their seed
    assert list(by_method(['a', 'b'], elsewhere).values()) == [[0, 1]]


def test_eval_mean():
    """Means and intervals are those of the runs one by one; the test is compare_means of what they
    got right; all of it is in --json."""
    rng, y = np.random.default_rng(0), np.arange(200) % 2
    tables = [rng.normal(size=(200, 2)) + 2 * (i > 2) * np.eye(2)[y] for i in range(6)]
    with fake_world(['neg', 'pos'], y):
        runs = [
            fake_run(['neg', 'pos'], t, dict(seed=i % 3, r=8 if i < 3 else 16))
            for i, t in enumerate(tables)
        ]
        out = os.path.join(tmp(), 'numbers.json')
        text, _ = run_eval([*runs, '--mean', '--json', out])
        numbers, alone = read_json(out), os.path.join(tmp(), 'alone.json')
        each = [m['accuracy'] for m in numbers['runs']]
        first, other = numbers['methods']
        assert first['runs'] == runs[:3] and other['method'] == 'head --r 16'
        mean, half = mean_interval(each[3:])
        assert other['means']['accuracy'] == dict(mean=mean, half=half)
        assert set(first['means']) == {'accuracy', 'macro_f1', 'mcc', 'nll', 'ece'}
        right = np.array([t.astype(np.float32).argmax(1) == y for t in tables])
        assert numbers['method_comparisons'] == [compare_means(right[:3], right[3:])]
        assert f'{mean:.4f} +- {half:.4f}' in text and 'head --r 16 is better' in text, text
        assert 'McNemar' not in text and numbers['comparisons'] == []
        assert max(map(len, text[text.index('\nrun ') :].split('\n'))) <= 100, text
        run_eval([runs[0], '--json', alone])
        assert read_json(alone)['runs'][0]['accuracy'] == each[0]
        text, _ = run_eval([*runs[:4], '--mean'])
        assert 'one run, so no interval' in text and 'not tested' in text
        raises(UserError, run_eval, [*runs[2:4], '--mean'], match='--mean needs two runs or more')
    raises(
        UserError,
        run_eval,
        ['--preds', 'x', '--labels', 'y', '--mean'],
        match='--mean has no meaning with --preds',
    )


def test_the_table_of_means_fits():
    means = dict.fromkeys(
        ('accuracy', 'macro_f1', 'mcc', 'nll', 'ece'), dict(mean=-0.5, half=9.123)
    )
    methods = [dict(method='lora ' + '--flag x ' * 20, runs=[0, 1], means=means)] * 2
    text = means_table(methods, [dict(difference=-0.5, ci95=[-1, 1], p=0.5, test='Welch')])
    assert max(map(len, text.split('\n'))) <= 100, text
