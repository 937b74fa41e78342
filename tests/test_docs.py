"""docs/: tables and pictures come from the numbers in docs/results/; the experiments."""

import contextlib
import glob
import json
import os
from types import SimpleNamespace

import numpy as np

import data
import train_cls
import train_gen
from docs import base, experiments, features, figures, tables
from lib.files import UserError, read_bytes, read_json
from lib.tokens import tokenizer
from tests.helpers import SCRATCH, TINY, environment, gen_run, patched, raises, script, tmp


def test_tables_are_those_of_the_files():
    marked = set()
    for path in tables.pages():
        with open(path, encoding='utf-8') as f:
            text = f.read()
        assert tables.filled(text) == text, f'{path}: python docs/tables.py'
        marked |= {m[2] for m in tables.MARKED.finditer(text)}
    assert marked == set(tables.TABLES), 'a table that no page shows'


def test_cells_of_tables():
    rows = [dict(method='a', seed=s, accuracy=v) for s, v in enumerate((0.5, 0.6, 0.7))]
    assert tables.cell(rows, method='a') == '60.0 ± 24.8'  # 4.303 * 10 / sqrt(3)
    assert tables.cell(rows[:2], method='a') == '50.0, 60.0'
    assert tables.cell(rows, method='b') == ''


def test_pictures_are_those_of_the_numbers():
    """Drawn again, they are the files in docs/; all are small, and shown somewhere."""
    out, shown = tmp(), ''.join(open(path, encoding='utf-8').read() for path in tables.pages())
    with patched(figures, 'DOCS', out):
        assert not script(figures.main, [])[0]
    drawn = sorted(glob.glob(os.path.join(out, '*.svg')))
    assert len(drawn) == 5
    for path in drawn:
        name = os.path.basename(path)
        where = os.path.join(tables.TOP, 'docs', name)
        assert read_bytes(path) == read_bytes(where), f'{name}: python docs/figures.py'
        assert os.path.getsize(path) < 100_000 and name in shown, name


def test_numbers_of_two_runs():
    """figures.py --runs takes from runs what its pictures show."""
    out, flags = tmp(), [*TINY, '--max_steps', '2']
    paths = [os.path.join(out, name) for name in ('cls', 'gen')]
    for main, path in zip((train_cls.main, train_gen.main), paths):
        assert not script(main, [*flags, '--lora', '--out', path])[0]
    found = figures.of_runs(*paths, paths[1])
    assert set(found['explained']) == {'discriminative', 'generative'}
    for kind, first in (('discriminative', []), ('generative', ['P(class)'])):
        words = [word for word, _ in found['explained'][kind]['words']]
        assert words[: len(first)] == first
        assert ''.join(words[len(first) :]).startswith(figures.TEXT)  # <|endoftext|> may follow
    for rule, bins in found['reliability'].items():
        assert sum(n for n, _, _ in bins) == 100 and 0 <= found['ece'][rule] <= 1


def test_rows_of_the_experiments():
    rows = experiments.Rows([f'text {i}' for i in range(400)], np.arange(400) % 2)
    few = experiments.per_class(rows, 8, 1)
    assert np.bincount(few.y).tolist() == [8, 8] and len(set(few.texts)) == 16
    assert experiments.per_class(rows, 8, 2).texts != few.texts
    assert len(experiments.per_class(rows, None, 1).y) == 400
    changed = experiments.flipped(rows, 0.2, 2, 1).y != rows.y
    assert changed.sum() == 80
    marked = [t.startswith('zebra ') for t in experiments.spurious(rows, 0.95, 1).texts]
    share = [np.mean(np.array(marked)[rows.y == c]) for c in (0, 1)]
    assert abs(share[0] - 0.05) < 0.05 and abs(share[1] - 0.95) < 0.05, share
    enc = tokenizer('bytes')
    long = experiments.Rows(['abcdefghij' * 20, 'a'], [0, 1])
    short = experiments.dropped(long, 0.5, enc, 0).texts
    assert 70 < len(short[0]) < 130 and short[1] == 'a'
    words = experiments.Rows(['good good', 'bad', 'bad bad', 'good'], [1, 0, 0, 1])
    assert experiments.naive_bayes(words, words, 2, enc) == 1
    assert experiments.naive_bayes(words, experiments.Rows(['bad'], [1]), 2, enc) == 0


def test_no_accuracy_is_counted_twice():
    rows = tables.results('experiments')['rows']
    keys = [tuple(v for k, v in r.items() if k not in ('accuracy', 'commit')) for r in rows]
    twice = {key for key in keys if keys.count(key) > 1}
    assert not twice, sorted(map(str, twice))


def test_experiments_fill_their_file():
    """Which accuracies the experiments note, and that a second call computes none of them."""
    path, fitted = os.path.join(tmp(), 'rows.json'), []

    def fit(self, method, train, steps, seed):
        fitted.append((method, len(train.y), steps))
        return SimpleNamespace(labels=few.labels[::-1], logits=margins)

    def probs(self, run, rows):
        return np.tile([0.25, 0.75], (len(rows.y), 1)), float((rows.y == 1).mean())

    def margins(texts):  # 3.1 nats for class 1 in nine of ten texts, else 2: columns are reversed
        return np.array([[2 + 1.1 * (i // 2 % 10 > 0), 0] for i in range(len(texts))])

    few = data.load(TINY[1])
    world = [(data, 'load', lambda name: few), (experiments, 'tokenizer', lambda name: ENC)]
    world += [(experiments.Study, 'fit', fit), (experiments.Study, 'probs', probs)]
    world += [(experiments, 'linear', lambda train, test: None)]
    argv = ['--data', 'sst2', '--seeds', '1', '--json', path]
    with contextlib.ExitStack() as stack:
        for where in world:
            stack.enter_context(patched(*where))
        text = script(experiments.main, argv)[1]
        runs = len(fitted)
        again = script(experiments.main, argv)[1]
    assert len(fitted) == runs == 5 * 5 + 2 * 3 and not again
    rows = read_json(path)['rows']
    assert len(text.splitlines()) == len(rows) == len({json.dumps(r) for r in rows})
    generative = [r for r in rows if r['method'] == 'generative']
    # right: of class 1, 95 % of the 90 % above ln 19 = 2.94 nats, and 5 % of all; of class 0, 5 %
    # of the 10 % above -2.94
    (predicted,) = [r['accuracy'] for r in generative if 'predicted' in str(r['condition'])]
    share = (few.test.y == 1).mean()
    want = share * (0.95 * 0.9 + 0.05) + (1 - share) * 0.05 * 0.1
    assert abs(predicted - want) < 1e-3, (predicted, want)
    kinds = {(r['experiment'], r['condition']) for r in generative}
    assert kinds == {
        *(('rows', n) for n in (8, 32, 128, 512, 'all')),
        *(('noise', share) for share in (0.2, 0.4)),
        *(('spurious', kind) for kind in ('same', 'turned', 'turned, predicted')),
        *(('prior', kind) for kind in ('as trained', 'moved')),
        *(('drop', share) for share in (0.0, 0.1, 0.3, 0.5)),
    }
    assert not any(r['experiment'] == 'drop' for r in rows if 'LoRA' in r['method'])


def test_ctrl_c_ends_the_experiments():
    """A language model whose training was interrupted is not taken for a whole one."""
    cache, few = tmp(), data.load(TINY[1])
    with (
        environment(NANOCLS_CACHE=cache),
        patched(data, 'load', lambda name: few),
        patched(experiments, 'tokenizer', lambda name: ENC),
        patched(train_gen, 'main', lambda argv: 130),
    ):
        study = experiments.Study('sst2', (1, 64), os.path.join(cache, 'rows.json'), tmp())
        raises(SystemExit, study.language_model, match='130')
        assert not os.path.exists(os.path.join(cache, 'experiments'))
        argv = ['--out', tmp(), '--json', os.path.join(cache, 'base.json')]
        raises(SystemExit, base.main, argv, match='130')


def test_own_base_model_and_what_it_is_worth():
    """docs/base.py notes the loss of the language model and an accuracy per data set and method;
    a second call computes nothing."""
    out, few = tmp(), data.load(TINY[1])
    argv = ['--out', out, '--json', os.path.join(out, 'base.json'), '--data', 'sst2']
    short = ' '.join([*SCRATCH, '--max_steps 2 --log_every 1'])
    world = [(data, 'load', lambda *a, **k: few), (base, 'linear', lambda train, test: 0.75)]
    world += [(base, 'PRETRAIN', f'--pretrain {short}'), (base, 'SHAPE', ' '.join(SCRATCH))]
    world += [(base, 'SETS', dict(sst2='--max_length 16 --eval_samples 20'))]
    with contextlib.ExitStack() as stack:
        for where in world:
            stack.enter_context(patched(*where))
        assert not script(base.main, argv)[0]
        found = read_json(argv[3])
        assert not script(base.main, argv)[1]
        stack.enter_context(patched(base, 'linear', lambda train, test: None))
        again = [*argv[:2], '--json', os.path.join(out, 'again.json'), '--data', 'sst2']
        raises(UserError, base.main, [*again, '--methods', base.TFIDF], match='scikit-learn')
    assert [step for step, _ in found['base']['loss']] == [1, 2] and found['base']['val_loss']
    assert [row['method'] for row in found['rows']] == list(base.METHODS)
    for row in found['rows']:
        low, high = row['ci95']
        assert low < row['accuracy'] < high or row['accuracy'] in (0, 1), row
        assert ('--model' in row['command']) == (row['method'] != base.TFIDF)
    assert found['rows'][-1]['accuracy'] == 0.75


def test_features_of_a_generative_run():
    """Logistic regression finds the class that Bayes' rule gets wrong on one side; the script
    prints a line for each of the three rules."""
    rng = np.random.RandomState(0)
    y = rng.randint(0, 2, 200)
    x = np.stack([-90 + 3 * y + rng.randn(200), -80 - 3 * y + rng.randn(200)], 1)  # class 1 leads
    probs = features.regression(x, y, 2)(x)
    assert (x.argmax(1) == y).mean() < 0.6 < 0.97 < (probs.argmax(1) == y).mean()
    assert np.allclose(probs.sum(1), 1)
    text = script(features.main, [gen_run('lora')])[1]
    assert len(text.splitlines()) == 3 and 'regression' in text


def test_flags_of_the_experiments():
    """The scripts know them."""
    for main, flags in experiments.METHODS.values():
        if '--resume' not in flags:
            args = main.parse([*flags.split(), '--max_steps', '9'])[0]
            assert args.method == flags.split()[0][2:]


ENC = tokenizer('bytes')
