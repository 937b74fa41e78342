"""lib/repeat.py and lib/folds.py: several seeds, cross-validation, doubtful labels."""

import contextlib
import csv
import glob
import io
import os
import shutil
import signal

import numpy as np
import torch

import data
import train_cls
import train_gen
from lib.files import UserError, read_json
from lib.folds import fold, folds
from lib.metrics import softmax
from lib.repeat import out_of_fold
from lib.runs import open_run
from tests.helpers import (
    QUICKLY,
    over_base,
    patched,
    raises,
    run_eval,
    script,
    skip,
    tmp,
    topics,
    tree,
)

SHAPE = '--model nano --scratch --n_layer 1 --n_head 2 --n_embd 32 --dtype fp32'.split()
SHAPE += '--max_samples 40 --max_steps 4 --batch_size 8 --lr 1e-2'.split()
SMALL = [*SHAPE, '--data', topics()]


def split(counts, copies=()):
    """A Split with counts[c] texts of each class c; copies: (text number, how often more)."""
    texts = [f'text {i}' for i in range(sum(counts))]
    y = np.repeat(np.arange(len(counts)), counts)
    for i, n in copies:
        texts, y = texts + [texts[i]] * n, np.append(y, [y[i]] * n)
    return data.Split(texts, y)


def test_folds_are_stratified():
    """Each row is in one fold; class counts of the folds differ by at most one, as scikit-learn's
    StratifiedKFold has them, and so do the sizes; one text stays in one fold."""
    for counts, k in (((10, 23), 5), ((7, 7, 7), 3), ((50, 3), 3)):
        rows = split(counts)
        of = folds(rows, k, 1)
        table = np.array([np.bincount(rows.y[of == i], minlength=len(counts)) for i in range(k)])
        assert np.ptp(table, axis=0).max() <= 1 and np.ptp(table.sum(1)) <= 1, table
        assert (of == folds(rows, k, 1)).all() and (of != folds(rows, k, 2)).any()
    rows = split((40, 40), [(3, 2), (3, 1), (50, 1), (7, 1)])
    of = folds(rows, 4, 1)
    places = {}
    for text, i in zip(rows.texts, of):
        places.setdefault(text, set()).add(i)
    assert all(len(found) == 1 for found in places.values())
    table = np.array([np.bincount(rows.y[of == i], minlength=2) for i in range(4)])
    assert np.ptp(table, axis=0).max() <= 1, table
    match = 'the smallest class has 2 different training texts'
    raises(UserError, folds, split((9, 2)), 3, 1, match=match)
    ds = data.Dataset('x', ['a', 'b'], rows, split((2, 2)), split((1, 1)), [], data.GUESSED)
    parts = [fold(ds, i, 4, 1) for i in range(4)]
    assert sorted(t for part in parts for t in part.test.texts) == sorted(rows.texts)
    for part in parts:
        assert not set(part.test.texts) & set(part.train.texts) and part.val is ds.val


def test_folds_against_scikit_learn():
    """The same number of rows of each class in the folds, whatever their order."""
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError:
        skip('scikit-learn is not installed')
    rng = np.random.RandomState(0)
    for k in (2, 3, 5, 10):
        rows = split(rng.randint(k, 60, size=4))
        of = folds(rows, k, 1)
        theirs = [test for _, test in StratifiedKFold(k, shuffle=True).split(rows.y, rows.y)]
        for c in range(4):
            want = sorted(int((rows.y[test] == c).sum()) for test in theirs)
            assert sorted(np.bincount(of[rows.y == c], minlength=k)) == want, (k, c)


def test_folds_by_hand():
    """The probabilities of the rows a fold holds out are those of a run on files that a slow loop
    here makes of the same folds; suspects.csv lists the rows they contradict."""
    out = os.path.join(tmp(), 'cv')
    found = script(train_cls.main, [*SMALL, '--folds', '2', '--out', out])
    assert found[0] == 0 and '2 folds: test accuracy' in found[1], found
    args, _, _ = train_cls.parse([*SMALL, '--folds', '2'])
    paths = [os.path.join(out, f'fold{i}') for i in (1, 2)]
    _, ds, probs = out_of_fold(args, paths)
    of, by_hand, accuracies = folds(ds.train, 2, 1337), np.full(probs.shape, np.nan), []
    for i in range(2):
        folder = tmp()
        parts = dict(train=of != i, test=of == i)
        for name, mask in parts.items():
            rows = [(t, ds.labels[y]) for t, y, m in zip(ds.train.texts, ds.train.y, mask) if m]
            table(folder, name, rows)
        table(folder, 'val', [(t, ds.labels[y]) for t, y in zip(ds.val.texts, ds.val.y)])
        flags = [
            *SMALL[2:],
            '--data',
            folder,
            '--model',
            'nano',
            '--out',
            os.path.join(folder, 'r'),
        ]
        assert script(train_cls.main, flags)[0] == 0
        run, rows = open_run(os.path.join(folder, 'r'), 'cpu', 'fp32'), np.flatnonzero(of == i)
        for row in rows:  # one at a time
            by_hand[row] = softmax(run.logits([ds.train.texts[row]]))[0]
        accuracies.append((by_hand[rows].argmax(1) == ds.train.y[rows]).mean())
        kept = read_json(os.path.join(paths[i], 'eval_results.json'))
        assert kept['accuracy'] == accuracies[-1] and kept['n'] == len(rows)
        scored = run_eval([paths[i]])[0]  # the run knows its fold
        assert f'n {len(rows)}' in scored, scored
    assert np.abs(by_hand - probs).max() < 1e-5
    with open(os.path.join(out, 'suspects.csv'), encoding='utf-8', newline='') as f:
        suspects = list(csv.DictReader(f))
    with open(topics(), encoding='utf-8') as f:
        lines = f.read().split('\n')
    wrong = by_hand.argmax(1) != ds.train.y
    assert len(suspects) == wrong.sum() > 0
    own = [float(s['probability']) for s in suspects]
    assert own == sorted(own)
    for s in suspects:
        assert lines[int(s['row'])] == f'{s["text"]},{s["label"]}'
        i = ds.train.texts.index(s['text'])
        assert wrong[i]
        assert s['label'] == ds.labels[ds.train.y[i]]
        assert s['likelier_label'] == ds.labels[by_hand[i].argmax()]
        assert abs(float(s['likelier_probability']) - by_hand[i].max()) < 1e-5
        assert abs(float(s['probability']) - by_hand[i, ds.train.y[i]]) < 1e-5


def table(folder, name, rows):
    with open(os.path.join(folder, f'{name}.csv'), 'w', encoding='utf-8', newline='') as f:
        csv.writer(f).writerows([('text', 'label'), *rows])


def test_runs_of_other_data_are_not_kept():
    """A label was corrected: the folds that are there were trained on the old one, and their test
    rows are training rows of the new split."""
    rows = [(f'{w} number {i}', w) for i in range(30) for w in ('no', 'yes')]
    folder, out = tmp(), os.path.join(tmp(), 'cv')
    flags = [*SHAPE, '--data', os.path.join(folder, 'train.csv'), '--out', out]
    for more in (['--folds', '2'], ['--seeds', '2']):
        table(folder, 'train', rows)
        assert script(train_cls.main, [*flags, *more])[0] == 0
        table(folder, 'train', [(rows[0][0], 'yes'), *rows[1:]])
        raises(UserError, train_cls.main, [*flags, *more], match='name another --out')


def test_seeds():
    """--seeds N: the runs of N commands, their mean, and a command that eval.py takes; the same
    command again keeps what is finished and trains what is missing."""
    out = os.path.join(tmp(), 'run')
    flags = [*SMALL, '--seed', '5', '--out', out]
    code, text, _ = script(train_cls.main, [*flags, '--seeds', '2'])
    assert code == 0 and 'eval.py' in text and '--mean' in text
    assert sorted(glob.glob(out + '*')) == [f'{out}-seed5', f'{out}-seed6']
    alone = os.path.join(tmp(), 'run')
    assert script(train_cls.main, [*SMALL, '--seed', '6', '--out', alone])[0] == 0
    mine, theirs = tree(f'{out}-seed6'), tree(alone)
    assert mine['adapter_model.safetensors'] == theirs['adapter_model.safetensors']
    before = {path: tree(path) for path in (f'{out}-seed5', f'{out}-seed6')}
    with contextlib.redirect_stdout(io.StringIO()):
        found = train_cls.main([*flags, '--lora', '--seeds', '3'])  # the default method, typed
    assert before == {path: tree(path) for path in before}
    tests = [read_json(f'{out}-seed{s}/eval_results.json') for s in (5, 6, 7)]
    assert [r['test'] for r in found['runs']] == tests
    mean = np.mean([m['accuracy'] for m in tests])
    assert abs(found['mean']['accuracy']['mean'] - mean) < 1e-12
    scored = run_eval([*(r['out'] for r in found['runs']), '--mean', '--dtype', 'fp32'])[0]
    assert f'{mean:.4f} +- ' in scored, scored
    raises(UserError, train_cls.main, [*flags, '--seeds', '2', '--clip', '2'], match='--clip 1.0')
    without = [*SHAPE, '--seed', '5', '--seeds', '4', '--out', out]  # --data forgotten: SST-2
    raises(UserError, train_cls.main, without, match='was trained with --')
    raises(UserError, train_cls.main, [*flags, '--seeds', '2', '--folds', '2'], match='--folds')


def test_seeds_go_on_after_an_interrupt():
    """Ctrl-C in the second of three runs: the same command resumes it and trains the third."""
    for main, flags in ((train_cls.main, SMALL), (train_gen.main, over_base(*QUICKLY))):
        out, calls, real = os.path.join(tmp(), 'run'), [], data.collate
        whole = f'{out}-whole'
        assert script(main, [*flags, '--seed', '1338', '--out', whole])[0] == 0

        def interrupting(*a, **k):
            training = torch.is_grad_enabled()
            if training and os.path.isdir(f'{out}-seed1338'):  # noqa: B023
                calls.append(1)  # noqa: B023
                if len(calls) == 3:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGINT)
            return real(*a, **k)  # noqa: B023

        with patched(data, 'collate', interrupting):
            code, text, err = script(main, [*flags, '--seeds', '3', '--out', out])
        assert code == 130 and 'run the same command again' in err, (code, err)
        assert not os.path.exists(f'{out}-seed1339')
        code, text, err = script(main, [*flags, '--seeds', '3', '--out', out])
        assert code == 0 and text.count('trained before') == 1 and '3 seeds' in text, (text, err)
        found, wanted = tree(f'{out}-seed1338'), tree(whole)
        kept = [name for name in wanted if name.endswith('.safetensors')]
        assert kept and all(found[name] == wanted[name] for name in kept)
        shutil.rmtree(whole)
