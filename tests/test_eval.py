"""eval.py, lib/metrics.py, lib/report.py, lib/plots.py, lib/predictions.py."""

import contextlib
import json
import os
import sys
from types import SimpleNamespace

import numpy as np

import data
import lib.device
import lib.metrics
import lib.report
import lib.runs
from lib import rundata
from lib.files import UserError, read_json, write_atomic, write_json
from lib.metrics import reliability
from lib.plots import calibration, curves, read_log
from lib.rundata import some_rows
from tests.helpers import (
    SHAPE,
    TINY,
    close,
    copied,
    dump,
    generate,
    patched,
    raises,
    run_eval,
    skip,
    tiny_run,
    tmp,
    topics,
    train,
    write,
)


def test_rows_of_one_class_alone():
    """--test FILE scores all its rows, also if they are of one class."""
    rows = write('one.csv', 'text,label\n' + 'a warm song,positive\n' + 'a dull tale,positive\n')
    text, _ = run_eval([tiny_run('head'), '--test', rows])
    assert 'n 2' in text and 'accuracy' in text


def random_case(n=500, k=5, seed=0):
    """(probs, y) with class 1 without rows and class 3 never predicted."""
    rng = np.random.default_rng(seed)
    y = rng.choice([0, 2, 3, 4], n, p=[0.5, 0.2, 0.2, 0.1])
    logits = rng.normal(size=(n, k)) + 1.5 * np.eye(k)[y]
    logits[:, 3] = -9
    probs = np.exp(logits)
    return probs / probs.sum(1, keepdims=True), y


def test_metrics_by_hand():
    probs = [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]]
    m = lib.metrics.metrics(probs, [0, 0, 1, 1], ['neg', 'pos'])  # predictions 0 0 1 0
    assert m['confusion'] == [[2, 0], [1, 1]] and m['n'] == 4 and m['accuracy'] == 0.75
    assert m['majority_accuracy'] == 0.5
    want = dict(
        neg=dict(precision=2 / 3, recall=1.0, f1=0.8, support=2),
        pos=dict(precision=1.0, recall=0.5, f1=2 / 3, support=2),
    )
    for label in want:
        assert all(close(m['per_class'][label][key], want[label][key]) for key in want[label])
    assert close(m['macro_f1'], (0.8 + 2 / 3) / 2) and close(m['weighted_f1'], m['macro_f1'])
    assert close(m['mcc'], (2 * 1 - 0 * 1) / np.sqrt(3 * 1 * 2 * 2))  # (TP TN - FP FN) / sqrt(...)
    assert close(m['nll'], -(np.log(0.9) + np.log(0.6) + np.log(0.7) + np.log(0.2)) / 4)
    assert close(m['brier'], 2 * (0.1**2 + 0.4**2 + 0.3**2 + 0.8**2) / 4)
    assert close(m['ece'], (0.1 + 0.4 + 0.3 + 0.8) / 4)  # four bins of one row each
    assert close(m['ci95'], [0.3006418, 0.9544127], 1e-6)  # Wilson
    assert m['coverage'] == 1.0
    json.dumps(m, allow_nan=False)


def test_metrics_corners():
    m = lib.metrics.metrics(np.array([[1.0, 0.0], [1.0, 0.0]]), [0, 1], ['a', 'b'])
    assert (
        np.isfinite(m['nll']) and m['nll'] > 300 and m['brier'] == 1.0 and m['mcc'] == 0.0
    )  # p = 0 is clipped
    m = lib.metrics.metrics(
        np.eye(2)[[0, 0, 0]], [0, 0, 0], ['a', 'b']
    )  # one class in y, all right
    assert m['accuracy'] == 1 and m['ci95'][0] < 0.5 and m['mcc'] == 0 and m['nll'] == 0
    assert m['macro_f1'] == 1
    m = lib.metrics.metrics(None, [0, 1, 1], ['a', 'b'], pred=[0, 1, 0])
    assert m['nll'] is m['brier'] is m['ece'] is None and close(m['accuracy'], 2 / 3)
    m = lib.metrics.metrics(np.full((3, 2), 0.5), [0, 1, 1], ['a', 'b'], pred=[-1, 1, -1])
    assert close(m['accuracy'], 1 / 3) and close(m['coverage'], 1 / 3)
    assert m['confusion'] == [[0, 0], [0, 1]]
    assert m['per_class']['b']['support'] == 2 and m['per_class']['b']['recall'] == 0.5
    m = lib.metrics.metrics(None, [0, 1], ['a', 'b'], pred=[-1, -1])  # nothing answered
    assert m['accuracy'] == m['mcc'] == m['macro_f1'] == 0


def test_metrics_equal_scikit_learn():
    try:
        from sklearn import metrics as sk
        from sklearn.calibration import calibration_curve
    except ImportError:
        skip('scikit-learn is not installed')
    for seed in range(5):
        probs, y = random_case(seed=seed)
        pred, labels = probs.argmax(1), list('abcde')
        m = lib.metrics.metrics(probs, y, labels)
        assert (pred != 3).all() and (y != 1).all()
        assert close(m['accuracy'], sk.accuracy_score(y, pred))
        assert close(m['mcc'], sk.matthews_corrcoef(y, pred))
        for key in ('macro', 'weighted'):
            assert close(m[key + '_f1'], sk.f1_score(y, pred, average=key, zero_division=0))
        table = sk.precision_recall_fscore_support(y, pred, labels=range(5), zero_division=0)
        mine = [
            [c[key] for c in m['per_class'].values()]
            for key in ('precision', 'recall', 'f1', 'support')
        ]
        assert close(mine, table)
        assert m['confusion'] == sk.confusion_matrix(y, pred, labels=range(5)).tolist()
        assert close(m['nll'], sk.log_loss(y, probs, labels=range(5)), 1e-9)
        two = lib.metrics.metrics(
            probs[:, :2] / probs[:, :2].sum(1, keepdims=True), y % 2, ['a', 'b']
        )
        assert close(
            two['brier'], 2 * sk.brier_score_loss(y % 2, probs[:, 1] / probs[:, :2].sum(1))
        )
        count, mean, accuracy = reliability(probs, y)  # both of the bins that hold rows
        theirs = calibration_curve(pred == y, probs.max(1), n_bins=15)
        assert close(accuracy[count > 0], theirs[0]) and close(mean[count > 0], theirs[1])
        gaps = abs(theirs[0] - theirs[1]) * count[count > 0]
        assert close(m['ece'], gaps.sum() / len(y))
        silent = np.where(
            np.arange(len(y)) % 7 == 0, -1, pred
        )  # abstentions: a class of their own in the MCC
        assert close(
            lib.metrics.metrics(None, y, labels, pred=silent)['mcc'],
            sk.matthews_corrcoef(y, silent),
        )


def test_ece():
    p = np.repeat([0.55, 0.75, 0.95], 200)
    probs = np.stack([p, 1 - p], 1)
    y = np.concatenate([np.arange(200) >= round(200 * q) for q in (0.55, 0.75, 0.95)]).astype(
        int
    )  # right as often as said
    assert close(lib.metrics.metrics(probs, y, ['a', 'b'])['ece'], 0, 1e-9)
    sure = np.tile([0.99, 0.01], (1000, 1))  # says 99 %, is right in 70 %
    assert close(
        lib.metrics.metrics(sure, (np.arange(1000) >= 700).astype(int), ['a', 'b'])['ece'],
        0.29,
        1e-9,
    )
    count, top, right = reliability(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 1]))
    assert count.sum() == 2 and count[14] == 1 and count[7] == 1 and top[14] == 1 and right[7] == 0


def test_report_fits():
    for k in (2, 5, 12, 20, 77):
        rng = np.random.default_rng(k)
        labels = [
            f'a rather long name of a class, number {i}' if k > 4 else f'class{i}' for i in range(k)
        ]
        y = rng.integers(0, k, 3000)
        text = lib.report.report(
            lib.metrics.metrics(rng.dirichlet(np.ones(k), 3000), y, labels), labels
        )
        assert max(map(len, text.split('\n'))) <= 100, (k, max(map(len, text.split('\n'))))
        assert ('confusion matrix' in text) == (
            k <= 12
        ) and 'NLL' in text  # 20 columns do not fit beside 30 letters
    labels = [f'topic {i}' for i in range(20)]
    m = lib.metrics.metrics(None, np.arange(20), labels, pred=np.arange(20))
    assert 'confusion matrix' in lib.report.report(m, labels)


def test_preds_and_labels():
    items = [
        dict(label='b', probs=dict(b=0.9, a=0.1)),
        dict(label='a', probs=dict(a=0.8, b=0.2)),
        dict(label='a', probs=dict(a=0.7, b=0.3)),
    ]
    truth = ['b', 'a', 'b']
    for lines in (False, True):  # a list, or what predict.py --json writes
        preds = dump([dict(item, text='x') for item in items] if lines else items, lines)
        out = os.path.join(tmp(), 'numbers.json')
        text, _ = run_eval(['--preds', preds, '--labels', dump(truth), '--json', out])
        numbers = read_json(out)
        m = numbers['runs'][0]
        assert numbers['labels'] == ['b', 'a']  # the order of the first item's probs
        assert m['confusion'] == [[1, 1], [0, 1]]
        assert close(m['nll'], -(np.log(0.9) + np.log(0.8) + np.log(0.3)) / 3)
        assert 'accuracy 0.6667' in text and 'NLL' in text and numbers['comparisons'] == []
    text, tables = run_eval(
        ['--preds', dump(['b', None, 'a']), '--labels', dump(truth), '--json', '-']
    )
    m = json.loads(text)['runs'][0]  # stdout is JSON and nothing else
    assert m['nll'] is None and m['coverage'] == 2 / 3 and m['accuracy'] == 1 / 3
    assert 'coverage 0.6667: 1 text without a label, counted as wrong' in tables
    assert 'accuracy on the others 0.5000' in tables
    text, _ = run_eval(
        ['--preds', dump([dict(items[0], label=None)] + items[1:]), '--labels', dump(truth)]
    )
    assert 'coverage' in text and 'NLL 0.5108' in text  # its probabilities still count


def test_preds_errors():
    p, truth = dict(a=0.5, b=0.5), ['a', 'b']
    good = dump([dict(label='a', probs=p), dict(label='b', probs=p)])

    def wrong(preds, labels, match):
        preds, labels = (
            x if isinstance(x, str) and os.path.exists(x) else dump(x) for x in (preds, labels)
        )
        return raises(UserError, run_eval, ['--preds', preds, '--labels', labels], match=match)

    def probs(**p):
        return [dict(label='a', probs=dict(a=0.5, b=0.5)), dict(label='a', probs=p)]

    wrong(good, ['a'], 'has 2 predictions but')
    wrong(good, ['a', 'c'], "item 2: 'c' is not among the classes")
    wrong(['a', 'c'], truth, "item 2: 'c' is not among the labels (a, b)")
    wrong(
        [dict(label='a', probs=p), dict(label='c', probs=p)],
        truth,
        "item 2: 'c' is not among the labels",
    )
    wrong([], truth, 'is empty')
    wrong(good, [], 'is empty')
    wrong('', truth, 'is empty')
    wrong('["a", ', truth, 'cannot be read as JSON')
    wrong('[' * 100000, truth, 'cannot be read as JSON')
    wrong(b'["\xff"]', truth, 'cannot be read as JSON')
    wrong(good, [0, 1], 'item 1: 0 is not a label')
    wrong(['a', 1], truth, 'item 2 has no "label"')
    wrong([dict(label='a'), dict(text='x')], truth, 'item 2 has no "label"')
    wrong(probs(a=1.0), truth, 'item 2: "probs" must give one probability to each of a, b')
    wrong(probs(a=0.5, b=0.3, c=0.2), truth, 'item 2: "probs" must give one')
    wrong([dict(label='a', probs=p), 'b'], truth, 'in every item or in none')
    wrong(['b', dict(label='a', probs=p)], truth, 'in every item or in none')
    wrong([dict(label='a', probs=[0.5, 0.5])] * 2, truth, 'must give one probability')
    wrong(probs(a=0.5, b=0.6), truth, 'sum to 1.1')
    wrong(probs(a=-0.5, b=1.5), truth, 'from 0 to 1')
    wrong(probs(a=float('nan'), b=0.5), truth, 'from 0 to 1')
    wrong(probs(a=10**400, b=0.5), truth, 'from 0 to 1')
    wrong(probs(a='0.5', b=0.5), truth, 'from 0 to 1')
    both = ['--preds', good, '--labels', dump(truth)]
    missing = os.path.join(tmp(), 'none.json')
    raises(UserError, run_eval, ['--preds', missing] + both[2:], match='none.json cannot be read')
    raises(UserError, run_eval, [], match='give either run folders or --preds')
    raises(UserError, run_eval, ['runs/x'] + both, match='not both')
    raises(UserError, run_eval, both[:2], match='--preds and --labels go together')
    raises(UserError, run_eval, ['runs/x'] + both[2:], match='--preds and --labels go together')
    for flag, value in dict(
        split='test',
        data='demo',
        val=good,
        test=good,
        text_col='t',
        label_col='l',
        data_dir='.',
        device='cpu',
        dtype='fp32',
    ).items():
        raises(
            UserError,
            run_eval,
            both + ['--' + flag, value],
            match=f'--{flag} has no meaning with --preds',
        )
    raises(UserError, run_eval, [tmp()], match='is not a run')
    raises(UserError, run_eval, ['runs/x', '--val', good], match='--val needs --data')
    raises(UserError, run_eval, ['runs/x', '--text_col', 't'], match='--text_col needs --data')
    raises(
        UserError,
        run_eval,
        ['runs/x', '--test', good, '--split', 'val'],
        match='--split has no meaning',
    )
    raises(
        UserError, run_eval, ['runs/x', '--html', 'x.html', '--windows'], match='without --windows'
    )


def fake_run(labels, logits, data_args=None, log=(), trained=()):
    """A run folder whose model is a table: text 'i' gets logits[i]. trained: texts it has seen."""
    path = tmp()
    args = dict.fromkeys(('data_dir', 'val', 'test', 'text_col', 'label_col', 'max_samples'))
    args.update(data='fake', seed=1, balance=False, quick=False, max_length=8, keep='first')
    args.update(dict.fromkeys(('sep', 'encoding', 'eval_samples', 'folds', 'fold')), pool='last')
    args.update(drop_unlabelled=False, plain=False, **(data_args or {}))
    args.setdefault('split_seed', args['seed'])
    info = dict(labels=labels, method='head', kind='cls', model='nano', data='fake', base={})
    write_json(os.path.join(path, 'run.json'), dict(info, seed=args['seed'], args=args))
    write_json(os.path.join(path, 'table.json'), np.asarray(logits).tolist())
    hashes = [0] * len(rundata.SPLITS) + [*rundata.text_hashes(trained)]
    write_atomic(os.path.join(path, 'train_texts.bin'), np.array(hashes, '<u8').tobytes())
    lines = ''.join(json.dumps(row) + '\n' for row in log)
    write_atomic(os.path.join(path, 'log.jsonl'), lines + '{"step": 9, "lo')
    return path


@contextlib.contextmanager
def fake_world(labels, y, train=()):
    """data.load gives texts '0', '1', ... with these labels; open_run opens fake_run's folders."""
    calls = []

    def load(name, **kw):
        calls.append(dict(kw, name=name))
        split = SimpleNamespace(texts=[str(i) for i in range(len(y))], y=np.array(y))
        seen = SimpleNamespace(texts=list(train), y=np.zeros(len(train), int))
        splits = dict(train=seen, val=split, test=split)
        return SimpleNamespace(name=name, labels=labels, notes=[], **splits)

    def open_run(path, *how):
        info, table = (read_json(os.path.join(path, name)) for name in ('run.json', 'table.json'))
        run = SimpleNamespace(path=path, info=info, labels=info['labels'], kind='cls')
        run.device, run.dtype, run.reason = 'cpu', 'torch.float32', ''
        run.rule, run.probs = None, lib.metrics.softmax
        run.notes = lambda texts: []
        run.logits = lambda texts, **kw: np.array([table[int(t)] for t in texts], np.float32)
        return run

    with patched(data, 'load', load), patched(lib.runs, 'open_run', open_run):
        yield calls


def test_runs_labels_by_name():
    y = np.array([0, 1, 1, 0, 1, 0])
    right = 4.0 * np.eye(2)[y]  # logits that are always right
    with fake_world(['neg', 'pos'], y, train=['0', '1', 'x']) as calls:
        a = fake_run(['neg', 'pos'], right, trained=['0', '1', 'x'])
        text, _ = run_eval([a])
        assert 'accuracy 1.0000' in text
        assert read_json(os.path.join(a, 'eval_results.json'))['n'] == 6
        assert calls[-1]['name'] == 'fake' and calls[-1]['seed'] == 1
        assert calls[-1]['balance'] is False
        # the same model, classes in the other order
        b = fake_run(['pos', 'neg'], right[:, ::-1], dict(seed=2))
        out = os.path.join(tmp(), 'numbers.json')
        text, _ = run_eval([a, b, '--json', out])
        numbers = read_json(out)
        assert [m['accuracy'] for m in numbers['runs']] == [1, 1]
        assert numbers['runs'][0]['nll'] == numbers['runs'][1]['nll']
        assert numbers['comparisons'][0]['p'] == 1
        assert 'the difference is within noise (p = 1' in text
        assert 'trained on 2 of these 6 texts' in text
        assert not os.path.exists(os.path.join(b, 'eval_results.json'))
        c = fake_run(['neg', 'pos'], -right)
        os.remove(os.path.join(a, 'eval_results.json'))
        text, _ = run_eval([a, c, '--split', 'val'])
        assert 'is better (p = 0.031, exact binomial)' in text and '+0 rows' not in text
        assert '0 rows gained, 6 lost' in text
        run_eval([a, '--data', 'other'])
        assert calls[-1]['name'] == 'other' and calls[-1]['seed'] == 1
        run_eval([a, '--test', 'new.csv'])
        assert calls[-1]['name'] == calls[-1]['test'] == calls[-1]['val'] == 'new.csv'
        for flags in (['--device', 'cpu'], ['--dtype', 'fp32'], ['--plain']):
            run_eval([a, *flags])
        # another data set, split or way of scoring leaves it alone
        assert not os.path.exists(os.path.join(a, 'eval_results.json'))
        d = fake_run(['neg', 'neutral'], right)
        raises(UserError, run_eval, [a, d], match='compare runs with the same labels')
        raises(UserError, run_eval, [d], match='does not know (pos; it knows neg, neutral)')
    with fake_world(['pos', 'neg'], 1 - y):  # the data's order differs from the run's
        assert 'accuracy 1.0000' in run_eval([a, '--data', 'other'])[0]
    write_json(os.path.join(a, 'run.json'), dict(labels=[], args={}))
    raises(UserError, run_eval, [a], match='is not one that')


def test_plots():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        skip('matplotlib is not installed')
    probs, y = random_case()
    labels, log = list('abcde'), [dict(step=i, loss=2 / (i + 1), lr=1e-3) for i in range(1, 9)]
    for step in (4, 8):
        log.append(dict(step=step, val_loss=0.7 - step / 40, val_accuracy=0.6 + step / 40))
    log += [dict(step=8, val_loss=0.4)]  # logged again after a resume
    with fake_world(labels, y):
        a, b = (fake_run(labels, k * np.log(probs), log=log) for k in (1, 3))
        assert read_log(os.path.join(a, 'log.jsonl'))['val_loss'] == ((4, 8), (0.6, 0.4))
        for runs in ([a], [a, b]):
            out = os.path.join(tmp(), 'plots')
            text, _ = run_eval(runs + ['--plot', out])
            assert sorted(os.listdir(out)) == ['confusion.png', 'curves.png', 'reliability.png']
            assert text.count('wrote ') == 3
            for name in os.listdir(out):
                with open(os.path.join(out, name), 'rb') as f:
                    assert f.read(8) == b'\x89PNG\r\n\x1a\n'
    out = tmp()
    argv = ['--preds', dump(['a', 'b']), '--labels', dump(['a', 'b']), '--plot']
    run_eval(argv + [out])
    assert os.listdir(out) == ['confusion.png']  # no log, no probabilities
    raises(UserError, run_eval, argv + [dump('x')], match='cannot be made a folder')


def test_plots_show_how_much_is_behind_a_dot():
    """Reliability: the area of a dot grows with its texts, no line runs through bins of one text,
    and the counts below are whole."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        skip('matplotlib is not installed')
    top = np.array([0.55] + [0.65] * 4 + [0.95] * 20)
    probs, y = np.stack([top, 1 - top], 1), np.zeros(25, int)
    y[:2] = 1
    upper, lower = calibration(['run'], y, [probs], [dict(ece=0.1)]).axes[:2]
    dots = upper.collections[0]
    assert np.allclose(dots.get_offsets(), [(0.55, 0), (0.65, 0.75), (0.95, 1)])
    areas = dots.get_sizes()
    assert areas[0] < areas[1] < areas[2] and areas[2] > 4 * areas[1], areas
    line = upper.lines[1]
    assert np.allclose(line.get_xdata(), [0.65, 0.95]), line.get_xdata()
    assert upper.get_xlim()[0] < 0.5 < upper.get_xlim()[1] and upper.get_ylim()[1] > 1
    assert all(tick == int(tick) for tick in lower.get_yticks()), lower.get_yticks()


def test_curves_have_sensible_axes():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        skip('matplotlib is not installed')
    log = dict(loss=((1, 2, 3), (0.5, 0.1, 0.0)), train_accuracy=((1, 2, 3), (0.9, 0.99, 1.0)))
    log.update(val_loss=((3,), (0.2,)), val_accuracy=((3,), (0.999,)))
    left, right = curves(['run'], [log]).axes
    assert left.get_xlim()[0] == right.get_xlim()[0] == left.get_ylim()[0] == 0
    assert all(t == int(t) for ax in (left, right) for t in ax.get_xticks())
    assert right.get_ylim()[0] == 0.9 and 1 < right.get_ylim()[1] < 1.02
    assert [list(line.get_ydata()) for line in right.lines] == [[0.9, 0.99, 1.0], [0.999]]
    assert 'training' in right.get_title()
    del log['train_accuracy']
    right = curves(['run'], [log]).axes[1]
    assert right.get_title() == 'validation accuracy' and right.get_ylim()[0] == 0.9
    out = tiny_run('head')
    assert read_log(os.path.join(out, 'log.jsonl'))['val_accuracy']
    path = write('log.jsonl', '{"step": 20, "loss": 0.5, "train_accuracy": 0.75}\n')
    assert read_log(path)['train_accuracy'] == ((20,), (0.75,))


def test_plot_without_matplotlib():
    names = [name for name in sys.modules if name.split('.')[0] == 'matplotlib']
    hidden = {name: sys.modules.pop(name) for name in names}
    sys.modules['matplotlib'] = None  # any import of it now fails
    try:
        argv = ['--preds', dump(['a']), '--labels', dump(['a'])]
        raises(UserError, run_eval, argv + ['--plot', tmp()], match='pip install matplotlib')
        assert 'accuracy 1.0000' in run_eval(argv)[0]  # nothing else needs it
    finally:
        del sys.modules['matplotlib']
        sys.modules.update(hidden)


def test_run_that_cannot_be_written():
    """Its report is printed; that eval_results.json is not written is one note."""
    run = copied(tiny_run('head'))
    want, _ = run_eval([run])
    path = os.path.join(run, 'eval_results.json')
    os.remove(path)
    os.mkdir(path)  # root may write into any folder, but not over this one
    text, err = run_eval([run])
    assert text == want and 'accuracy' in text
    notes = [line for line in err.splitlines() if line.startswith('note: ')]
    assert len(notes) == 1 and f'{path} cannot be written' in notes[0], err


def test_some_rows():
    """--eval_samples: N rows in the proportions of the classes, one of each at least, the same ones
    each time."""
    y = np.array([0] * 700 + [1] * 280 + [2] * 18 + [4] * 2)
    split = data.Split([str(i) for i in range(1000)], y)
    for n in (4, 5, 37, 100, 999):
        some = some_rows(split, n, 1)
        counts = np.bincount(some.y, minlength=5)
        assert len(some.y) == n and counts[3] == 0 and (counts[[0, 1, 2, 4]] >= 1).all(), counts
        assert (counts <= np.bincount(y)).all() and abs(counts[0] - 0.7 * n) <= 2.1, (n, counts)
        assert (y[[int(t) for t in some.texts]] == some.y).all()
        assert some.texts == sorted(set(some.texts), key=int)
        assert some.texts == some_rows(split, n, 1).texts
    assert some_rows(split, 100, 1).texts != some_rows(split, 100, 2).texts
    assert some_rows(split, 1000, 1) is split and some_rows(split, 10**6, 1) is split
    raises(UserError, some_rows, split, 3, 1, match='--eval_samples 3 is less than the 4 classes')


def test_eval_samples():
    """eval.py --eval_samples N scores N rows and leaves eval_results.json alone; a run keeps its
    own N, validates on them, and is tested on all."""
    y = np.arange(90) % 3
    with fake_world(['a', 'b', 'c'], y):
        run = fake_run(['a', 'b', 'c'], np.eye(3)[y])
        text, _ = run_eval([run, '--eval_samples', '12'])
        assert ', 12 texts' in text and 'accuracy 1.0000' in text, text
        assert not os.path.exists(os.path.join(run, 'eval_results.json'))
        raises(UserError, run_eval, [run, '--eval_samples', '2'], match='2 is less than the 3')
        for wrong in ('0', '-3', '1.5', 'many'):
            raises(UserError, run_eval, [run, '--eval_samples', wrong], match='above 0')
    both = ['--preds', 'x', '--labels', 'y', '--eval_samples', '9']
    raises(UserError, run_eval, both, match='--eval_samples has no meaning with --preds')
    flags = [*TINY, '--head', '--max_steps', '2', '--eval_samples', '20']
    out, text = train(*flags)
    assert '20 validation, 100 test' in text, text
    assert len(read_json(os.path.join(out, 'val_preds.json'))) == 20
    info = read_json(os.path.join(out, 'run.json'))
    assert info['args']['eval_samples'] == info['rows']['val'] == 20
    assert read_json(os.path.join(out, 'eval_results.json'))['n'] == 100
    scored = run_eval([out, '--split', 'val', '--dtype', 'fp32'])[0]
    assert ', 20 texts' in scored, scored  # the same rows
    raises(UserError, train, *flags[:-1], '1', match='--eval_samples 1 is less than the 2 classes')
    out = generate('--data', topics(), *SHAPE, '--full', '--max_steps', 2, '--eval_samples', 6)[0]
    assert len(read_json(os.path.join(out, 'val_preds.json'))) == 6
    assert read_json(os.path.join(out, 'eval_results.json'))['n'] > 6


def test_precision_of_the_final_test():
    """eval.py scores a float32 run in float32, whatever the machine prefers, and does not write
    over results of another precision."""
    run = copied(tiny_run('head'))  # of --dtype fp32
    path = os.path.join(run, 'eval_results.json')
    want = read_json(path)
    assert want['dtype'] == 'float32'
    with patched(lib.device, 'bf16_pays', lambda: True):
        text, err = run_eval([run])
        assert 'cpu, float32' in text and read_json(path) == want and 'note' not in err
        run_eval([run, '--dtype', 'bf16'])
        assert read_json(path) == want
        write_json(path, {k: v for k, v in want.items() if k != 'dtype'})  # of an older run
        run_eval([run])
        assert read_json(path) == want
        write_json(path, dict(want, dtype='float16', accuracy=0.1234))
        text, err = run_eval([run])
        assert 'cpu, bfloat16' in text and 'keeps the results of float16' in err, err
        assert read_json(path)['accuracy'] == 0.1234
