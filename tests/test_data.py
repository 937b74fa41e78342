"""data.py: data sets, splits, batches."""

import contextlib
import io
import os

import numpy as np

import data
import lib.files
from lib.files import UserError, cached, read_json
from lib.rundata import own_data
from lib.runs import open_run
from lib.tables import Format
from lib.tokens import Tokens, even_pieces, piece_starts, tokenize, tokenizer
from tests.helpers import (
    TINY,
    environment,
    fresh_cache,
    gen_run,
    raises,
    real_data,
    script,
    table,
    tiny_imdb,
    tmp,
    train,
    write,
)


def rows_of(split, labels):
    return sorted((t, labels[y]) for t, y in zip(split.texts, split.y))


def check_dataset(d, labels):
    assert d.labels == labels
    for s in (d.train, d.val, d.test):
        assert len(s.texts) == len(s.y) and s.y.dtype == np.int64
        assert all(isinstance(t, str) for t in s.texts)
        assert set(s.y.tolist()) == set(range(len(labels)))
    assert not set(d.val.texts) & set(d.train.texts), 'a text in both val and train'


def test_sst2():
    real_data('sst2')
    d = data.load('sst2')
    check_dataset(d, ['negative', 'positive'])
    assert np.bincount(d.test.y).tolist() == [428, 444]
    dropped = 67349 - len(d.train.y) - len(d.val.y)
    assert len(d.train.y) == 66349 and 0 <= dropped < 30, d.notes
    assert f'{dropped} of them dropped' in d.notes[0], d.notes
    assert d.test.texts[0] == "it 's a charming and often affecting journey . "
    assert d.labels[d.test.y[0]] == 'positive'
    again, other = data.load('sst2'), data.load('sst2', seed=1, max_samples=100)
    assert again.val.texts == d.val.texts and again.train.texts == d.train.texts
    assert other.val.texts != d.val.texts and other.test.texts == d.test.texts
    assert np.bincount(other.train.y).tolist() == [100, 100]
    share = 37569 / 67349
    assert abs(d.val.y.mean() - share) < 0.01 and abs(d.train.y.mean() - share) < 0.01


def test_agnews():
    real_data('ag_news_csv')
    d = data.load('agnews')
    check_dataset(d, ['World', 'Sports', 'Business', 'Sci/Tech'])
    assert np.bincount(d.test.y).tolist() == [1900] * 4
    assert len(d.val.y) in range(980, 1001)
    assert d.test.texts[0].startswith(
        'Fears for T N pension after talks Unions representing workers at Turner'
    )
    assert d.labels[d.test.y[0]] == 'Business'


def test_imdb():
    real_data('imdb')
    with fresh_cache():
        d = data.load('imdb')
        check_dataset(d, ['negative', 'positive'])
        assert np.bincount(d.test.y).tolist() == [12500, 12500] and len(d.train.y) == 24000
        assert 980 < len(d.val.y) <= 1000
        assert not any('<br />' in t for t in d.train.texts)
        assert any('\n' in t for t in d.train.texts)
        assert any('test texts also in train' in n for n in d.notes)
        parsed = next(f for f in os.listdir(cached('imdb')) if f.endswith('.json'))
        again = data.load('imdb')
        assert again.train.texts == d.train.texts and again.val.texts == d.val.texts
        assert (again.test.y == d.test.y).all()
        assert os.listdir(cached('imdb')) == [parsed]


def test_imdb_archive():
    folder = tmp()
    os.mkdir(os.path.join(folder, 'imdb'))
    path = os.path.join(folder, 'imdb', 'aclImdb_v1.tar.gz')
    tiny_imdb(path)
    with fresh_cache() as cache, environment(NANOCLS_DATA=folder):
        d = data.load('imdb')
        assert len(d.test.y) == 80 and len(d.train.y) == 72 and len(d.val.y) == 8
        assert d.test.texts[0].endswith('0\n\nit is neg')
        assert os.listdir(os.path.join(folder, 'imdb')) == ['aclImdb_v1.tar.gz']
        parsed = os.path.join(cache, 'imdb', os.listdir(os.path.join(cache, 'imdb'))[0])
        # a broken cache file is rebuilt
        write(os.path.basename(parsed), '{"train": [["half', os.path.dirname(parsed))
        assert data.load('imdb').test.texts == d.test.texts
        with environment(NANOCLS_CACHE=os.path.join(path, 'cache')):  # which nobody can write
            lib.files.say_once.cache_clear()
            _, _, err = script(lambda _: check_dataset(data.load('imdb'), d.labels), [])
            assert err.count('note: ') == 1 and 'cannot be written' in err, err
        with open(path, 'rb') as f:
            whole = f.read()
        write('aclImdb_v1.tar.gz', whole[: len(whole) // 2], os.path.dirname(path))
        raises(UserError, data.load, 'imdb', match='not the published archive')
        write('aclImdb_v1.tar.gz', b'<html>', os.path.dirname(path))
        raises(UserError, data.load, 'imdb', match='not the published archive')


def test_sms():
    real_data('sms_spam')
    d = data.load('sms')
    check_dataset(d, ['ham', 'spam'])
    assert sum(len(s.y) for s in (d.train, d.val, d.test)) == 5574 - 403
    assert any('403' in n for n in d.notes)
    assert (len(d.train.y), len(d.val.y), len(d.test.y)) == (3620, 517, 1034)  # 70 / 10 / 20
    shares = [s.y.mean() for s in (d.train, d.val, d.test)]
    assert max(shares) - min(shares) < 0.005, shares
    assert len({t for s in (d.train, d.val, d.test) for t in s.texts}) == 5171
    b = data.load('sms', balance=True)
    for s in (b.train, b.val, b.test):
        assert abs(s.y.mean() - 0.5) < 0.01
    assert any('balanced to 653 rows per class' in n for n in b.notes), b.notes


def test_published_files_are_checked_row_by_row():
    sst2 = 'sentence\tlabel\n' + 'fine \t1\nbad \t0\n' * 30
    for name, rel, good, bad, where in (
        ('sst2', 'sst2/train.tsv', sst2, 'no tab', 'line 62'),
        ('sms', 'sms_spam/SMSSpamCollection', 'ham\thi\nspam\t"win\n' * 30, 'eggs\tx', 'line 61'),
        ('agnews', 'ag_news_csv/train.csv', '"1","a","b"\n' * 5, '"9","a","b"\n', 'line 6'),
    ):
        folder = tmp()
        os.mkdir(os.path.join(folder, os.path.dirname(rel)))
        write(rel, good + bad, folder)
        with fresh_cache():
            e = raises(UserError, lambda: data.load(name, data_dir=folder), match=where)
        assert os.path.basename(rel) in str(e)


def test_own_csv_splits():
    text = table(200, ('no', 'yes', 'no', 'no'))
    path = write('mine.csv', text)
    d = data.load(path)
    check_dataset(d, ['no', 'yes'])
    sizes = [np.bincount(s.y).tolist() for s in (d.train, d.val, d.test)]
    assert sizes == [[120, 40], [15, 5], [15, 5]]
    everything = sum((rows_of(s, d.labels) for s in (d.train, d.val, d.test)), [])
    assert sorted(everything) == sorted(
        (f'text number {i}', ('no', 'yes', 'no', 'no')[i % 4]) for i in range(200)
    )
    assert data.load(path).test.texts == d.test.texts != data.load(path, seed=2).test.texts
    balanced = data.load(path, balance=True)
    assert sum(len(s.y) for s in (balanced.train, balanced.val, balanced.test)) == 100
    capped = data.load(path, max_samples=7)
    assert np.bincount(capped.train.y).tolist() == [7, 7] and capped.test.texts == d.test.texts
    doubled = data.load(write('mine.csv', text + ''.join(text.splitlines(True)[1:])))
    assert any('200 exact duplicates dropped' in n for n in doubled.notes)
    assert doubled.test.texts == d.test.texts


def test_own_val_and_test():
    folder = tmp()
    for name, at in (('train.csv', 0), ('dev.csv', 100), ('test.csv', 200)):
        rows = ''.join(f't{at + i},{"pn"[i % 2]}\n' for i in range(40))
        write(name, 'review,sentiment\n' + rows, folder)
    d = data.load(folder)
    assert d.labels == ['n', 'p'] and len(d.train.y) == len(d.val.y) == len(d.test.y) == 40
    assert d.val.texts[0] == 't100' and d.test.texts[-1] == 't239'
    assert d.train.texts == [f't{i}' for i in range(40)]
    one = data.load(os.path.join(folder, 'train.csv'), test=os.path.join(folder, 'test.csv'))
    assert len(one.train.y) == 36 and len(one.val.y) == 4 and len(one.test.y) == 40
    os.remove(os.path.join(folder, 'train.csv'))
    raises(UserError, data.load, folder, match='no train.csv')
    write('train.tsv', table(sep='\t'), folder)
    write('valid.csv', table(), folder)
    raises(UserError, data.load, folder, match='both')
    d = data.load('demo', test=write('t.csv', 'text,label\nfine,positive\n'))
    assert d.test.texts == ['fine'] and d.test.y.tolist() == [1]


def test_label_order():
    def labels(*names):
        return data.load(write('l.csv', table(60, names))).labels

    assert labels('10', '9', '-1') == ['-1', '9', '10']
    assert labels('10', '9', 'x') == ['10', '9', 'x']
    assert labels('b c', 'Ä', 'a') == ['a', 'b c', 'Ä']


def test_own_file_errors():
    def bad(name, content, match, **kw):
        path = write(name, content)
        e = raises(UserError, lambda: data.load(path, **kw), match=match)
        assert '\n' not in str(e) and len(str(e)) < 400, e

    head = 'text,label\nfine,a\n'
    bad('x.csv', '', 'is empty')
    bad('x.csv', 'text,label\n', 'is empty')
    bad('x.jsonl', '\n\n', 'is empty')
    bad('x.csv', head + 'only one field\n', 'line 3: the row has 1 field')
    bad('x.csv', head + 'a, b,c\n', 'line 3: the row has 3 fields')
    bad('x.csv', head + '"never closed,b\nmore,a\nmore,b\n', 'line 3: the record that begins here')
    bad('x.csv', head + '"a"b,c\n', 'line 3')
    bad('x.csv', head.encode() + b'caf\xe9,b\n', 'line 3: byte 0xe9 is not UTF-8')
    bad('x.csv', b'\xff\xfet\x00e\x00', 'looks like UTF-16; give --encoding utf-16')
    bad('x.csv', head + 'good,\n', 'line 3: the label')
    bad('x.jsonl', '{"text": "a", "label": "b"}\n{"text": "a", "lab', 'line 2: not valid JSON')
    bad('x.jsonl', '{"text": "a", "label": "b"}\n["a", "b"]', 'line 2: not a JSON object')
    lacks = '{"text": "a", "label": "b"}\n{"label": "b"}'
    bad('x.jsonl', lacks, "line 2: the text 'text' is missing")
    bad('x.jsonl', '{"text": 5, "label": "b"}', 'line 1: the text')
    bad('x.jsonl', '{"text": "a", "label": 0.5}', 'line 1: the label')
    bad('x.jsonl', '{"text": "a", "label": null}', 'line 1: the label')
    bad('x.csv', table(30, ('a',)), 'at least two classes')
    bad('x.csv', table(4), 'too few')
    bad('x.csv', head + '"",a\n"",b\n' * 4, 'too few to hold val rows out (')
    bad('x.csv', head + '"",a\n"",b\n' * 4, '6 exact duplicates dropped')
    bad('x.csv', table(30, [str(i) for i in range(30)]), 'too few')
    bad('x.txt', 'hello', 'expected a .csv, .tsv or .jsonl file')
    bad('x.csv', table(), "label 'maybe'", test=write('t.csv', 'text,label\nperhaps,maybe\n'))
    bad('x.csv', table(), "no column 'text'", val=write('t.csv', 'body,label\nperhaps,yes\n'))
    bad('x.csv', table(), 'cannot read', val='/nowhere/v.csv')
    raises(UserError, data.load, 'sst3', match='there is no data set')
    raises(UserError, lambda: data.load('demo', form=Format('x')), match='--text_col')
    raises(UserError, lambda: data.load('sst2', data_dir='/nowhere'), match='--data_dir')


def test_rare_classes_stay_in_train():
    d = data.load(write('r.csv', table(100) + 'single,rare\n'))
    assert 'rare' in d.labels and d.labels.index('rare') in d.train.y


def test_cap():
    s = data.cap(data.load('demo').test, 20, 3)
    assert np.bincount(s.y).tolist() == [20, 20] and len(s.texts) == 40
    assert data.cap(s, 99, 1).texts == s.texts


def padding(lengths, plan):
    held = sum(len(b) * lengths[b].max() for b in plan)
    return 1 - lengths.sum() / held


def test_batches():
    lengths = np.random.RandomState(0).randint(1, 100, 1003)
    for size in (1, 16, 64, 5000):
        plan = data.batches(lengths, size, 7, 0)
        assert sorted(np.concatenate(plan).tolist()) == list(range(1003))
        assert all(b.dtype == np.int64 for b in plan) and len(plan) == -(-1003 // size)
        assert sum(len(b) != size for b in plan) <= 1

    def same(a, b):
        return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))

    plan = data.batches(lengths, 16, 7, 0)
    assert same(plan, data.batches(lengths, 16, 7, 0))
    assert same(plan, data.batches(lengths.tolist(), 16, 7, 0))
    assert not same(plan, data.batches(lengths, 16, 7, 1))
    assert not same(plan, data.batches(lengths, 16, 8, 0))
    assert padding(lengths, plan) < 0.05
    firsts = [lengths[b].mean() for b in plan]
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.5, 'short batches first'
    assert same(data.batches(lengths, 16, -3, 0), data.batches(lengths, 16, -3, 0))
    assert data.batches(lengths[:0], 16, 0, 0) == []


def test_batches_of_tokens():
    """--batch_tokens: every row once, no piece above the limit with its padding, none much smaller
    on average; a batch is so many pieces of like length, and they are found again in it."""
    lengths, limit = np.random.RandomState(0).randint(1, 100, 3003), 700
    plan = data.batches(lengths, 1, 7, 0, limit)
    assert sorted(np.concatenate(plan).tolist()) == list(range(3003))
    padded = [len(b) * lengths[b].max() for b in plan]
    assert max(padded) <= limit and min(padded) > 0.75 * limit, padded
    assert padding(lengths, plan) < 0.05
    whole = data.batches(lengths, 3, 7, 0, limit)
    assert sorted(np.concatenate(whole).tolist()) == list(range(3003))
    for batch in whole:
        n = np.sort(lengths[batch])
        pieces = np.split(n, piece_starts(n, limit)[1:])
        assert 1 <= len(pieces) <= 3 and all(len(p) * p[-1] <= limit for p in pieces)
    assert sum(len(piece_starts(np.sort(lengths[b]), limit)) < 3 for b in whole) <= 3
    n = np.sort(lengths[:100])
    assert len(even_pieces(n, limit)) == len(piece_starts(n, limit)) < 12
    again = data.batches(lengths.tolist(), 3, 7, 0, limit)
    assert all(map(np.array_equal, whole, again)) and len(whole) == len(again)
    assert not np.array_equal(whole[0], data.batches(lengths, 3, 7, 1, limit)[0])
    assert data.batches(lengths[:0], 1, 0, 0, limit) == []
    assert piece_starts(np.array([2, 9, 9]), 5) == [0, 1, 2]  # longer ones are alone


def test_padding_on_sst2():
    real_data('sst2'), real_data('gpt2_bpe')
    d, enc = data.load('sst2'), tokenizer('gpt2')
    n = np.minimum(tokenize(enc, d.train.texts).lengths, 128)
    share = padding(n, data.batches(n, 16, 1337, 0))
    assert share < 0.03, share


def test_collate():
    t = Tokens(np.arange(12, dtype=np.uint16), np.array([0, 5, 6, 12]))
    ids, n = data.collate(t, [2, 0, 1], 4, 'first', 99)
    assert ids.tolist() == [[6, 7, 8, 9], [0, 1, 2, 3], [5, 99, 99, 99]] and n.tolist() == [4, 4, 1]
    ids, n = data.collate(t, np.array([2, 0, 1]), 4, 'last', 99)
    assert ids.tolist() == [[8, 9, 10, 11], [1, 2, 3, 4], [5, 99, 99, 99]]
    ids, n = data.collate(t, [1, 0], 50, 'last', 0)
    assert ids.tolist() == [[5, 0, 0, 0, 0], [0, 1, 2, 3, 4]] and n.tolist() == [1, 5]
    assert str(ids.dtype) == str(n.dtype) == 'torch.int64'


def test_data_py_prints_a_summary():
    out = io.StringIO()
    with fresh_cache(), contextlib.redirect_stdout(out):
        data.main(['demo', '--max-length', '60', '--max_samples', '50'])
    text = out.getvalue()
    assert 'negative' in text and 'longer than 60' in text and 'synthetic' in text
    assert '1,000' in text and '100 %' in text
    assert text.count("'") >= 6, 'three examples'


def test_validation_rows_keep_their_labels():
    """The validation predictions that a run writes are, row by row, those of its own weights and
    the split's own labels."""
    # one evaluation: what it saw is what was saved
    out, _ = train(*TINY, *'--full --dtype fp32 --max_steps 2 --eval_every 2'.split())
    for folder in (out, gen_run('lora')):
        run = open_run(folder, 'cpu', 'fp32')
        val = own_data(run.info, None).val
        logits = run.logits(val.texts)
        preds, labels = (
            read_json(os.path.join(folder, f'val_{x}.json')) for x in ('preds', 'labels')
        )
        want = run.probs(logits)
        assert labels == [run.labels[i] for i in val.y]
        assert np.allclose(
            [[p['probs'][label] for label in run.labels] for p in preds], want, atol=1e-5
        ), folder
        # of rising length, so that no order is right by luck
        texts = [f'{"red cat " * i}one' for i in range(9)]
        alone = np.concatenate([run.logits([text]) for text in texts])
        assert np.allclose(run.logits(texts), alone, atol=1e-3), folder
        assert np.ptp(alone[:, 0]) > 0.01, folder
