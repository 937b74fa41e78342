"""predict.py and lib/explain.py."""

import builtins
import contextlib
import csv
import gzip
import io
import json
import os
import re
import sys

import numpy as np
import torch

import data
import lib.explain
import predict
from lib.explain import words
from lib.files import UserError, read_bytes
from lib.runs import open_run
from lib.tokens import tokenizer
from model import GPT
from tests.helpers import (
    SCRATCH,
    TOPICS,
    environment,
    gen_run,
    opened,
    patched,
    probs_of,
    raises,
    real_data,
    script,
    tiny_run,
    tmp,
    topics,
    train,
    write,
)

MARKED = b'\xef\xbb\xbfone\n\nthree\xff'  # with a byte order mark


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def reconfigure(self, **how):
        self.how = how


def typing(*texts):
    """-> input(), at which these texts are typed, then Ctrl-D"""
    typed = list(texts)

    def type_next(prompt):
        if not typed:
            raise EOFError
        return typed.pop(0)

    return type_next


def test_predict_inputs():
    out = tiny_run('full')
    texts = [
        'the song was warm',
        'it said "dull, and\nmessy"',
        '',
        'x' * 5000,
        'nul \x00 byte',
        'the plot',
    ]
    folder = tmp()
    with open(os.path.join(folder, 'in.csv'), 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows([['id', 'text'], *enumerate(texts)])
    with open(os.path.join(folder, 'in.jsonl'), 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(dict(text=t)) + '\n' for t in texts)
    want = [
        json.loads(s)
        for s in script(predict.main, [out, '--json', '--dtype', 'fp32', *texts])[1].splitlines()
    ]
    assert [r['text'] for r in want] == texts
    for name in ('in.csv', 'in.jsonl'):
        with patched(predict, 'CHUNK', 4):  # several chunks
            file, to = os.path.join(folder, name), os.path.join(folder, 'out')
            flags = ['--json', '--dtype', 'fp32', '--file', file, '--out', to]
            script(predict.main, [out, *flags])
        with open(os.path.join(folder, 'out'), encoding='utf-8') as f:
            got = [json.loads(line) for line in f]
        pairs = [[(r['text'], r['label']) for r in rows] for rows in (got, want)]
        assert pairs[0] == pairs[1], name
        for a, b in zip(got, want):
            assert all(abs(a['probs'][k] - b['probs'][k]) < 1e-5 for k in a['probs'])
    with patched(sys, 'stdin', io.TextIOWrapper(io.BytesIO(MARKED), encoding='utf-8')):
        lines = script(predict.main, [out])[1].splitlines()
    assert lines[0].endswith('\tone') and len(lines) == 3
    assert all(s.split('\t')[0] in ('negative', 'positive') for s in lines)
    lines = script(predict.main, [out, '--json', '--threshold', '0.9999', *texts])[1].splitlines()
    rows = [json.loads(s) for s in lines]
    assert all(r['label'] is None for r in rows)
    for argv, match in (
        ([out, 'x', '--file', 'y'], 'not both'),
        ([out, '--file', 'nowhere'], 'no such file'),
        ([tmp(), 'x'], 'run.json'),
        ([out, 'x', '--threshold', '2'], '--threshold'),
        ([out, 'x', '--text_col', 'a'], '--file'),
    ):
        raises(UserError, predict.main, argv, match=match)


def test_a_text_cut_within_a_character():
    ids = list('привет'.encode())[1:]
    pieces = lib.explain.characters(tokenizer('bytes'), ids)
    assert pieces == [('\ufffd', 0, 1), *((c, 1 + 2 * i, 3 + 2 * i) for i, c in enumerate('ривет'))]


def test_explain_is_leave_one_out():
    out = tiny_run('full')
    run = open_run(out, 'cpu', 'fp32')
    second, pieces = lib.explain.explain(run, 'so dull')
    assert [t for t, _ in pieces] == ['so', ' dull']
    a, *others = run.logits(['so dull', ' dull', 'so'])
    best = int(a.argmax())
    assert second == run.labels[1 - best]
    for b, (_, number) in zip(others, pieces):
        assert abs(number - float((a[best] - a[1 - best]) - (b[best] - b[1 - best]))) < 1e-5
    assert len(lib.explain.explain(run, 'd')[1]) == 1
    limit = run.args['max_length']
    assert len(lib.explain.explain(run, 'x ' * 5000)[1]) == limit // 2 + 1  # the last: a space
    argv = [out, '--json', '--explain', '--dtype', 'fp32', 'so dull']
    row = json.loads(script(predict.main, argv)[1])
    assert np.allclose([v for _, v in row['explain']], [v for _, v in pieces], atol=1e-4)


def test_predict_on_a_terminal():
    """Without texts on a terminal: a prompt until the end of the input; --explain paints the
    tokens."""
    screen, typed, keys = Terminal(), typing('the song was warm'), Terminal()
    stdin, keyboard = patched(sys, 'stdin', keys), patched(builtins, 'input', typed)
    with stdin, keyboard, contextlib.redirect_stdout(screen):
        predict.main([tiny_run('full'), '--explain'])
    text = screen.getvalue()
    assert 'negative, positive' in text and '\tthe song was warm' in text
    assert keys.how['errors'] == 'replace'  # a byte that is not UTF-8 does not end it
    assert re.sub('\033[^m]*m', '', text).count('the song was warm') == 2 and '\033[48;5;' in text


def test_gen_explain():
    """First the prior, then one number per character; the sum is exactly the margin of the
    decision."""
    for method in ('lora', 'full', 'prefix', 'zero_shot'):
        run = opened(method)
        for text in ('cat dog bird', 'one', '', 'horse ' * 40, 'größe 中'):
            second, pieces = lib.explain.explain(run, text)
            scores = run.calibrated(run.logits([text]))[0]
            assert pieces[0][0] == 'P(class)', (method, text)
            assert second == run.labels[np.argsort(-scores)[1]]
            assert abs(sum(v for _, v in pieces) - np.ptp(scores)) < 1e-3, (method, text)
            room = run.args['max_length']
            assert ''.join(t for t, _ in pieces[1:]) == (
                text[:room] if len(text) > room else text + '<|endoftext|>'
            )
        run.rule = 'bayes'
        best, second = np.argsort(-run.logits(['cat'])[0])
        first = lib.explain.explain(run, 'cat')[1][0][1]
        assert abs(first - (run.log_prior[best] - run.log_prior[second])) < 1e-6
    terms = opened('lora').token_logprobs('cat dog')[1]
    assert terms.shape == (8, 2)
    assert np.allclose(
        terms.sum(0) + opened('lora').log_prior, opened('lora').logits(['cat dog'])[0], atol=1e-3
    )


def test_words():
    """Bytes and BPE pieces are joined to words, whole characters at least; every token is in one
    word, in order."""
    enc = tokenizer('bytes')

    def split(text, end=False):
        ids = list(text if isinstance(text, bytes) else text.encode()) + [256] * end
        found = words(enc, ids)
        assert [start for _, start, _ in found] == [0, *(stop for *_, stop in found)][:-1]
        assert found[-1][2] == len(ids)
        return [word for word, *_ in found]

    assert split('not  so dull, is it?') == ['not', '  so', ' dull', ',', ' is', ' it', '?']
    assert split("don't... 3 grüne a_b\n", True) == (
        ["don't", '...', ' 3', ' grüne', ' a_b', '\n', '<|endoftext|>']
    )
    assert split('e\u0301te\u0301 हिन्दी') == ['e\u0301te\u0301', ' हिन्दी']  # combining marks
    assert split('中文字') == ['中', '文', '字']
    assert split(b'a\xff\xfez')[0] == 'a' and '\ufffd' in ''.join(split(b'a\xff\xfez'))
    assert split('中'.encode()[:2]) == ['\ufffd']
    assert words(enc, [256]) == [('<|endoftext|>', 0, 1)]
    folder = real_data('gpt2_bpe')
    gpt2 = tokenizer('gpt2', folder)
    text = 'An unfathomably overlong anticlimax.'
    ids = gpt2.encode_ordinary(text)
    found = [word for word, *_ in words(gpt2, ids)]
    assert len(found) == 5 < len(ids) and found[1] == ' unfathomably' and ''.join(found) == text


def test_explain_names_the_runner_up():
    """On a line of its own; colours only for a terminal that wants them."""
    texts = [gen_run('lora'), '--explain', '--dtype', 'fp32', 'cat dog']
    label = script(predict.main, texts)[1].split('\t')[0]
    other = ({'animals', 'numbers'} - {label}).pop()
    for change, painted in (({}, True), (dict(NO_COLOR='1'), False), (dict(TERM='dumb'), False)):
        screen = Terminal()
        with environment(**{'NO_COLOR': None, 'TERM': 'xterm', **change}):
            with contextlib.redirect_stdout(screen):
                predict.main(texts)
        text = screen.getvalue()
        assert f'against {other}: ' in text and ('\033[' in text) == painted, (change, text)
    assert f'against {other}: ' in script(predict.main, texts)[1]


def test_gen_html():
    page = os.path.join(tmp(), 'page.html')
    code, text, _ = script(
        predict.main, [gen_run('lora'), '--explain', '--html', page, 'cat <script>&', 'one "two"']
    )
    html = read_bytes(page).decode()
    assert html.startswith('<!doctype html>') and html.count('<p><b>') == 2
    assert '<script' not in html and 'http' not in html and 'src=' not in html
    assert '> &lt;</span>' in html and '>&gt;&amp;</span>' in html and '>P(class)</span>' in html
    assert ' against ' in html
    assert len(text.splitlines()) == 2
    raises(
        UserError,
        predict.main,
        [gen_run('lora'), '--html', page, 'x'],
        match='--html does nothing without --explain',
    )
    lines = write('lines.txt', 'cat dog\n')
    for flags, match in (
        (['--out', 'out.csv.gz'], 'no .json or .gz'),
        (['--out', 'out.jsonl'], 'with --json'),
        (['--out', 'out.json', '--json'], '.jsonl'),
        (['--text_col', 'text'], 'a text per line'),
        (['--sep', ';'], 'a text per line'),
        (['--explain', '--html', lines], 'different files'),
    ):
        argv = [gen_run('lora'), '--file', lines, *flags]
        raises(UserError, predict.main, argv, match=match)


def test_gen_html_from_a_terminal():
    """With typed texts the page is written as well, or --html is refused; it is not ignored."""

    page = os.path.join(tmp(), 'page.html')
    with (
        patched(sys, 'stdin', Terminal()),
        patched(builtins, 'input', typing('cat dog')),
        contextlib.redirect_stdout(Terminal()),
    ):
        try:
            predict.main([gen_run('lora'), '--explain', '--html', page])
        except UserError:
            return
    assert b'>P(class)<' in read_bytes(page)


def test_gen_sample():
    def sample(*argv):
        return script(predict.main, [gen_run('lora'), '--dtype', 'fp32', '--sample', *argv])[1]

    a = sample('animals')
    assert a == sample('animals') != sample('animals', '--seed', '9') and a != sample('numbers')
    # the i-th is seed + i
    assert a.splitlines()[1:] == sample('animals', '--num', '2', '--seed', '1').splitlines()
    last = sample('animals', '--num', '2', '--seed', str(2**64 - 1))  # 0 follows
    assert last.endswith('\n' + sample('animals', '--num', '1'))
    cold, animals = ('--num', '4', '--temperature', '0.5'), '|'.join(TOPICS['animals'].split())
    words = [re.findall(animals, sample(label, *cold)) for label in ('animals', 'numbers')]
    assert len(words[0]) > 5 > len(words[1]), words
    sure = [sample('numbers', '--top_k', '1', '--num', '1', '--seed', s) for s in '12']
    assert sure[0] == sure[1]  # the likeliest token each time: nothing is left to chance
    for method in ('full', 'prefix', 'zero_shot'):
        run = opened(method)
        one, again, other = (run.sample('animals', 20, seed=seed) for seed in (1, 1, 2))
        assert one == again != other
    assert len(opened('lora').sample('animals', 3, seed=0)) <= 3
    with patched(torch, 'multinomial', lambda *a, **k: torch.tensor([97])):
        longest = [opened(m).sample('numbers', 10**6) for m in ('lora', 'prefix')]
    assert longest == ['a' * 95] * 2  # all positions
    run, only = opened('lora'), torch.full((257,), -1e9)
    only[98] = 0.0
    for cold in (1e-3, 1e-40):  # the likeliest token each time
        assert run.sample('animals', 5, cold, seed=1) == run.sample('animals', 5, 1.0, 1, seed=2)
    with patched(GPT, 'next_logits', lambda self, h: only.expand(len(h), -1)):  # an edit of it
        assert run.sample('animals', 3) == 'bbb'
    for argv, match in (
        (['--sample', 'plants'], 'plants'),
        (['--sample', 'animals', 'a text'], 'leave text out'),
        (['--num', '3', 'x'], 'without --sample'),
        (['--sample', 'animals', '--json'], 'leave json out'),
    ):
        raises(UserError, predict.main, [gen_run('lora'), *argv], match=match)


def test_gen_out_of_distribution():
    ds, out = data.load(topics()), gen_run('lora')

    def labels(texts, *flags):
        return [
            json.loads(line)['label']
            for line in script(predict.main, [out, '--json', '--dtype', 'fp32', *flags, *texts])[
                1
            ].splitlines()
        ]

    assert labels(['#@!%% 99 zzz', 'cat dog bird'], '--ood_quantile', '0.05') == [None, 'animals']
    assert None not in labels(['#@!%% 99 zzz'])
    for q in (0.25, 0.6):
        share = np.mean([label is None for label in labels(ds.val.texts, '--ood_quantile', str(q))])
        assert abs(share - q) < 1.5 / len(ds.val.texts), (q, share)
    assert None not in labels(ds.val.texts, '--ood_quantile', '0')
    for method in ('full', 'zero_shot'):
        out = gen_run(method)
        assert labels(['#@!%% 99 zzz'], '--ood_quantile', '0.02') == [None]
    for other, match in ((tiny_run('full'), 'discriminative'), (gen_run('direct'), '--direct')):
        for flags in (['--ood_quantile', '0.1', 'x'], ['--sample', 'animals']):
            raises(UserError, predict.main, [other, *flags], match=match)
    raises(UserError, predict.main, [gen_run('direct'), '--explain', 'x'], match='--direct')


def test_predict_a_table():
    """--out NAME.csv or .tsv: a header, the columns of the input as they were, then label,
    probability and P(class); all or nothing, in chunks."""
    out, folder = tiny_run('full'), tmp()
    run = open_run(out, 'cpu', 'fp32')
    texts = ['the song was warm', 'it said "dull,\nand messy"', '', 'plain; text']
    rows = [['7', t, 'x;y', 'old'] for t in texts] + [['8', texts[3], 'a\rb\nc', '']]
    texts += texts[3:]
    for kind, sep in (('csv', ';'), ('tsv', '\t'), ('csv.gz', ',')):
        source = os.path.join(folder, f'in.{kind}')
        opener = gzip.open if kind.endswith('gz') else open
        with opener(source, 'wt', newline='', encoding='utf-8') as f:
            csv.writer(f, delimiter=sep).writerows([['id', 'text', 'note', 'label'], *rows])
        for name, delimiter in (('to.csv', ','), ('to.TSV', '\t')):
            to = os.path.join(folder, name)
            with patched(predict, 'CHUNK', 3):
                script(predict.main, [out, '--file', source, '--out', to, '--dtype', 'fp32'])
            with open(to, newline='', encoding='utf-8') as f:
                head, *got = list(csv.reader(f, delimiter=delimiter))
            added = ['predicted_label', 'probability', *(f'P({x})' for x in run.labels)]
            assert head == ['id', 'text', 'note', 'label', *added]
            assert [row[:4] for row in got] == rows, (kind, name)
            for row, (label, p), probs in zip(got, run.predict(texts), probs_of(run, texts)):
                assert row[4] == label and abs(float(row[5]) - p) < 1e-5
                assert np.allclose([float(x) for x in row[6:]], probs, atol=1e-5)
    to = os.path.join(folder, 'typed.csv')
    argv = [out, '--out', to, '--threshold', '0.9999', 'a', 'b']
    assert f'wrote {to}' in script(predict.main, argv)[2]
    with open(to, newline='', encoding='utf-8') as f:
        head, *got = list(csv.reader(f))
    assert head[:3] == ['text', 'label', 'probability']
    assert [row[:2] for row in got] == [['a', ''], ['b', '']]
    for flags, match in ((['--json'], '--json has no place'), (['--explain'], '--explain has no')):
        raises(UserError, predict.main, [out, 'x', '--out', to, *flags], match=match)


def test_predict_says_what_it_took_for_a_header():
    """A file of one column without a header, and one that has a column twice."""
    out = tiny_run('full')
    for text, note in (
        ('great film\ngood\nbad\n', "note: 'great film' is read as the header, not as a text"),
        ('id,text,id\n1,good,2\n', "has the column 'id' twice; the last one is read"),
    ):
        path = write('in.csv', text)
        code, _, err = script(predict.main, [out, '--file', path])
        assert not code and note.removeprefix('note: ') in err, err


def test_predict_names_of_files():
    """A text that is the name of a file is refused, with the way out."""
    path = topics()
    advice = f'{path} is the name of a file, not a text: classify its rows with --file'
    raises(UserError, predict.main, [tiny_run('full'), path], match=advice)
    raises(UserError, predict.main, [tiny_run('full'), 'a text', path], match=advice)
    assert script(predict.main, [tiny_run('full'), 'nowhere.csv', 'x' * 9000])[1]


def test_predict_reads_files_as_the_run_did():
    """The run's columns, separator and encoding, where the file has them; typed ones win."""
    rows = [f'{i};{"grün" if i % 2 else "rot"} {i};title {i};{"ab"[i % 2]}' for i in range(40)]
    source = write('own.csv', 'id;body;title;kind\n'.encode('cp1252'))
    with open(source, 'ab') as f:
        f.write('\n'.join(rows).encode('cp1252'))
    flags = '--text_col body --label_col kind --encoding cp1252 --sep ; --max_steps 2'.split()
    out = train('--data', source, *SCRATCH, *flags)[0]

    def texts(path, *more):
        lines = script(predict.main, [out, '--file', path, '--json', *more])[1].splitlines()
        return [json.loads(line)['text'] for line in lines]

    assert texts(source) == [row.split(';')[1] for row in rows]
    assert texts(source, '--text_col', 'title') == [row.split(';')[2] for row in rows]
    other = write('other.csv', 'text,body2\ngrün,b\n')  # has other columns, and is UTF-8
    assert texts(other) == ['grün']
    raises(UserError, predict.main, [out, 'x', '--sep', ';'], match='without --file')
