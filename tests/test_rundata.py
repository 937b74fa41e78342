"""lib/rundata.py: is it the data that a run was trained on, and which texts were they?"""

import os
import random

import numpy as np

import data
import lib.training
import train_cls
import train_gen
from lib import rundata
from lib.files import UserError, read_json, write_json
from lib.runfolder import read_run
from tests.helpers import (
    SCRATCH,
    SHAPE,
    Stop,
    generate,
    patched,
    raises,
    run_eval,
    script,
    stop_here,
    table,
    tmp,
    train,
    write,
)

SHORT = [*SCRATCH, '--head', '--max_steps', '1', '--batch_size', '4', '--dtype', 'fp32']


def shuffled(path, seed=0):
    """The same rows in another order, in the same file. -> what it held before"""
    with open(path, encoding='utf-8') as f:
        before = f.read()
    head, *rows = before.splitlines(True)
    random.Random(seed).shuffle(rows)
    write(path, head + ''.join(rows))
    return before


def test_hashes():
    ds = data.load(write('h.csv', table(60)))
    same = rundata.hashes(ds)
    assert set(same) == {'train', 'val', 'test'} and all(len(h) == 16 for h in same.values())
    for split in same:
        s = getattr(ds, split)
        s.texts[:2] = s.texts[1::-1]
        changed = rundata.hashes(ds)
        assert {k for k in same if same[k] != changed[k]} == {split}  # the order of the texts
        s.texts[:2] = s.texts[1::-1]
        s.y[0] = 1 - s.y[0]
        changed = rundata.hashes(ds)
        assert {k for k in same if same[k] != changed[k]} == {split}  # the label of one
        s.y[0] = 1 - s.y[0]
    assert rundata.hashes(ds) == same
    ds.labels = ds.labels[::-1]  # names count, not their order
    for split in same:
        getattr(ds, split).y = 1 - getattr(ds, split).y
    assert rundata.hashes(ds) == same
    assert rundata.hashed(['ab', 'c']) != rundata.hashed(['a', 'bc'])


def test_a_changed_split_is_refused():
    """The same rows in another order were scored without a word: 10 of 40 test texts were training
    rows."""
    path = write('rows.csv', table(120))
    here = os.getcwd()
    os.chdir(os.path.dirname(path))
    try:
        out, _ = train('--data', 'rows.csv', *SHORT)
    finally:
        os.chdir(here)
    info, ds = read_json(os.path.join(out, 'run.json')), data.load(path)
    assert info['data'] == info['args']['data'] == path  # absolute
    assert info['split'] == rundata.hashes(ds)
    assert info['columns'] == dict(text_col='text', label_col='label')
    assert os.path.getsize(os.path.join(out, 'train_texts.bin')) == 8 * (3 + len(ds.train.texts))
    assert rundata.seen(out, ds.train.texts).all() and not rundata.seen(out, ds.test.texts).any()
    run_eval([out])
    results = os.path.join(out, 'eval_results.json')
    before = shuffled(path)
    os.remove(results)
    e = raises(UserError, run_eval, [out], match='has changed: its train and val and test rows')
    assert path in str(e) and '--test FILE' in str(e) and not os.path.exists(results)
    text, _ = run_eval([out, '--test', path])
    assert 'trained on 96 of these 120 texts' in text
    write(path, before.replace('number 3,yes', 'number 3,no'))  # one label
    raises(UserError, run_eval, [out], match='has changed')
    write(path, before)
    run_eval([out])
    assert os.path.exists(results)


def test_resume_over_changed_data_is_refused():
    for main, flags in (
        (train_cls.main, [*SCRATCH, '--head']),
        (train_gen.main, SHAPE),
        (train_gen.main, [*SHAPE, '--pretrain']),
    ):
        path, out = write('rows.csv', table(120)), os.path.join(tmp(), 'run')
        argv = ['--data', path, *flags, '--max_steps', '2', '--batch_size', '4', '--out', out]
        with patched(lib.training, 'seed_step', stop_here):
            raises(Stop, main, argv)
        before = shuffled(path)
        e = raises(UserError, script, main, ['--resume', '--out', out], match='has changed')
        assert 'restore it' in str(e)
        write(path, before)
        assert not script(main, ['--resume', '--out', out])[0]


def test_a_class_of_changed_data_is_refused():
    path = write('rows.csv', table(120))
    flags = [*SHAPE, '--max_steps', '2', '--batch_size', '4']
    out, _ = generate('--data', path, *flags)
    before = shuffled(path)
    again = ['--class_id', '0', '--out', out]
    e = raises(UserError, script, train_gen.main, again, match='has changed')
    assert '--data FILE' in str(e)
    head, *rows = before.splitlines(True)
    other = write('other.csv', head + ''.join(reversed(rows)))
    _, text = generate('--class_id', '0', '--data', other, out=out)
    assert 'were training rows of the other classes' in text
    # from now on the run has seen the texts of both files
    texts = data.load(write('old.csv', before)).train.texts
    assert rundata.seen(out, texts).all()
    assert rundata.seen(out, data.load(other).train.texts).all()
    run_eval([out])


def test_split_seed():
    path = write('rows.csv', table(120))
    runs = [train('--data', path, *SHORT, '--seed', s)[0] for s in ('1', '2')]
    moved, _ = train('--data', path, *SHORT, '--split_seed', '2')
    splits = [read_json(os.path.join(run, 'run.json'))['split'] for run in (*runs, moved)]
    assert splits[0] == splits[1] != splits[2]
    assert splits[2] == rundata.hashes(data.load(path, seed=2))
    text, _ = run_eval(runs)
    assert text.count('trained on 0 of these 12 texts') == 2
    n = len(set(data.load(path).test.texts) & set(data.load(path, seed=2).train.texts))
    assert n > 3
    e = raises(UserError, run_eval, [runs[0], moved], match=f'was trained on {n} of these 12 texts')
    assert moved in str(e) and '--allow_seen' in str(e)
    text, _ = run_eval([runs[0], moved, '--allow_seen'])
    assert f'trained on {n} of these 12 texts' in text
    run_eval([*runs, '--split', 'train'])  # asked for
    raises(UserError, run_eval, [*runs, '--test', path], match='was trained on 96 of these 120')
    new = write('new.csv', 'text,label\nnever seen,yes\ntext number 1,no\n')
    assert 'trained on ' in run_eval([runs[0], '--test', new])[0]


def test_all_choices_of_rows_follow_split_seed():
    path = write('rows.csv', table(400, ('a', 'b', 'b')))
    own = ['--balance', '--max_samples', '20', '--quick']
    runs = [
        train('--data', path, *SHORT, *own, '--seed', seed, '--split_seed', split)[0]
        for seed, split in (('1', '1'), ('2', '1'), ('1', '2'))
    ]
    a, b, c = (read_json(os.path.join(run, 'run.json'))['split'] for run in runs)
    assert a == b and all(a[name] != c[name] for name in a)
    assert rundata.hashes(rundata.own_data(read_run(runs[2]))) == c


def test_runs_without_a_record_of_their_texts():
    """Nothing is verified, and how many texts were trained on is unknown."""
    path = write('rows.csv', table(120))
    out, _ = train('--data', path, *SHORT)
    info = read_json(os.path.join(out, 'run.json'))
    write_json(os.path.join(out, 'run.json'), {k: v for k, v in info.items() if k != 'split'})
    os.remove(os.path.join(out, 'train_texts.bin'))
    assert rundata.seen(out, ['x']) is None
    shuffled(path)
    run_eval([out])  # cannot be noticed
    text, _ = run_eval([out, '--test', write('copy.csv', table(120))])
    assert 'trained on an unknown number of these texts' in text


def test_the_runs_own_columns_are_remembered():
    rows = [f'note {i};text {i};{"yn"[i % 2]};x' for i in range(60)]
    raw = '\n'.join(['note;body é;kind;label', *rows]).encode('cp1252')
    path = write('own.csv', raw)
    columns = ['--text_col', 'body é,note', '--label_col', 'kind', '--encoding', 'cp1252']
    out, _ = train('--data', path, *columns, *SHORT)
    run_eval([out])  # its own, as it was read
    new = write('new.csv', 'kind,label,note,body é\ny,a,n,t\nn,b,m,s\n')
    text, _ = run_eval([out, '--test', new])
    assert '2 texts' in text
    info = read_run(out)
    assert rundata.form_of(info)[:4] == ('body é,note', 'kind', None, 'cp1252')
    other = write('new.csv', 'text,label\nfine,y\nbad,n\n')
    assert '2 texts' in run_eval([out, '--test', other])[0]
    other = write('new.csv', 'note|z|kind|t\nfine|0|y|a\nbad|1|n|\n')
    typed = ['--test', other, '--text_col', 'z', '--label_col', 't', '--sep', '|']
    raises(UserError, run_eval, [out, *typed], match='--drop_unlabelled')
    raises(UserError, run_eval, [out, *typed, '--drop_unlabelled'], match='does not know (a;')


def test_damaged_record():
    path = write('rows.csv', table(120))
    out, _ = train('--data', path, *SHORT)
    record = os.path.join(out, 'train_texts.bin')
    with open(record, 'rb') as f:
        raw = f.read()
    for bad in (raw[:-1], raw[:16], b''):
        write(record, bad)
        raises(UserError, run_eval, [out, '--test', path], match='train_texts.bin is damaged')
    write(record, raw)
    numbers = np.frombuffer(raw, '<u8')
    assert (np.sort(numbers[3:]) == numbers[3:]).all()
