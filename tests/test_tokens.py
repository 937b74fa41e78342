"""lib/tokens.py."""

import contextlib
import io
import json
import os
import random
import time

import numpy as np

import data
from lib.files import UserError, decode, read_bytes, read_json
from lib.tokens import BPE_SHA256, LONG, tokenize, tokenizer
from tests.helpers import environment, fresh_cache, raises, real_data, skip, tmp, write


def test_gpt2_tokenizer():
    folder = real_data('gpt2_bpe')
    enc = tokenizer('gpt2')
    assert enc.n_vocab == 50257 and enc.eot_token == 50256
    assert enc.encode_ordinary("Hello world, it's 2024!") == [15496, 995, 11, 340, 338, 48609, 0]
    with open(os.path.join(folder, 'gpt2_bpe', 'encoder.json'), encoding='utf-8') as f:
        assert len(json.load(f)) == enc.n_vocab
    bad = tmp()
    os.mkdir(os.path.join(bad, 'gpt2_bpe'))
    for file in BPE_SHA256:
        write(f'gpt2_bpe/{file}', read_bytes(os.path.join(folder, 'gpt2_bpe', file)), bad)
    tokenizer('gpt2', bad)
    with open(os.path.join(bad, 'gpt2_bpe', 'vocab.bpe'), 'ab') as f:
        f.write(b'x y\n')
    raises(UserError, lambda: tokenizer('gpt2', bad), match='sha256')


def test_gpt2_tokenizer_equals_transformers():
    folder = real_data('gpt2_bpe')
    try:
        from transformers import GPT2TokenizerFast
    except ImportError:
        skip('transformers is not installed')
    vocab, merges = (os.path.join(folder, 'gpt2_bpe', f) for f in ('encoder.json', 'vocab.bpe'))
    try:
        theirs = GPT2TokenizerFast(vocab_file=vocab, merges_file=merges)
        if theirs('a b')['input_ids'] != [64, 275]:
            raise TypeError
    except TypeError:  # transformers 5 takes the contents
        lines = decode(read_bytes(merges), merges).split('\n')[1:-1]
        theirs = GPT2TokenizerFast(
            vocab=read_json(vocab), merges=[tuple(line.split()) for line in lines]
        )
    texts = [
        "it's we'll 12ab  three   spaces\n\n\ttab ",
        'naïve café 東京 😀👩‍👩‍👧 \x00 \x85 \u2028',
        '',
        ' ',
        'x' * 50,
        "’s 'S I'M",
    ]
    for name in ('sst2', 'sms', 'agnews'):
        if os.path.isdir(
            os.path.join(folder, {'sms': 'sms_spam', 'agnews': 'ag_news_csv'}.get(name, name))
        ):
            texts += data.load(name).test.texts[::4]
    ours = tokenize(tokenizer('gpt2'), texts, cache=False)
    for text, ids, mine in zip(texts, theirs(texts)['input_ids'], ours):
        assert mine.tolist() == (ids or [50256]), text


def test_bytes_tokenizer():
    enc = tokenizer('bytes')
    assert enc.n_vocab == 257 and enc.eot_token == 256
    for text in ('plain', 'naïve 東京 \x00\n', '<|endoftext|>', ' ' * 1000):
        assert bytes(enc.encode_ordinary(text)) == text.encode()
        assert enc.decode(enc.encode_ordinary(text)) == text


def test_tokenize():
    enc = tokenizer('bytes')
    texts = ['ab', '', '<|endoftext|>', 'half \ud83d pair', '\x00', 'x' * 250_001, 'word ' * 50_000]
    t = tokenize(enc, texts, cache=False)
    assert len(t) == 7 and t.flat.dtype == np.uint16
    assert t.starts.dtype == t.lengths.dtype == np.int64
    assert t[0].tolist() == [97, 98] and t[1].tolist() == [256]
    assert bytes(t[2].astype(np.uint8)) == b'<|endoftext|>'
    assert bytes(t[3].astype(np.uint8)).decode() == 'half \ufffd pair' and t[4].tolist() == [0]
    assert t.lengths.tolist() == [2, 1, 13, 13, 1, 250_001, 250_000]
    assert len(tokenize(enc, [], cache=False)) == 0


def test_long_texts():
    real_data('gpt2_bpe')
    enc = tokenizer('gpt2')
    r = random.Random(0)
    words = ''.join(
        r.choice(['word', " it's", '  two', '\n\nnext', ' 42', '!?', ' naïve'])
        for _ in range(60_000)
    )
    assert len(words) > 2 * LONG
    start = time.time()
    t = tokenize(
        enc,
        [
            words,
            'x' * 100_000,
            ' ' * 1_000_000,
            'é' * 1_000_000,
            ''.join(r.choices('abcdefgh', k=100_000)),
        ],
        cache=False,
    )
    assert time.time() - start < 10
    assert t[0].tolist() == enc.encode_ordinary(words), 'cutting changed the ids'
    assert len(t[2]) == 1_000_000


def test_token_cache():
    enc, texts = tokenizer('bytes'), ['one', '', 'three \ud800']
    with fresh_cache() as cache:
        first = tokenize(enc, texts)
        files = os.listdir(os.path.join(cache, 'tokens'))
        assert len(files) == 1
        path = os.path.join(cache, 'tokens', files[0])
        before = os.stat(path).st_mtime_ns
        again = tokenize(enc, texts)
        assert (again.flat == first.flat).all() and (again.starts == first.starts).all()
        assert os.stat(path).st_mtime_ns == before
        whole = read_bytes(path)
        for broken in (b'', b'PK junk', whole[:-30], whole[:200] + b'\xff' * 9 + whole[209:]):
            write(files[0], broken, os.path.dirname(path))
            assert (tokenize(enc, texts).flat == first.flat).all()
            assert read_bytes(path) == whole
        tokenize(enc, ['one', 'three', ''])
        tokenize(enc, ['onethree', '', ''])
        assert len(os.listdir(os.path.join(cache, 'tokens'))) == 3, (
            'the key must see where texts end'
        )
    unwritable = os.path.join(write('file', 'x'), 'cache')
    err = io.StringIO()
    with environment(NANOCLS_CACHE=unwritable), contextlib.redirect_stderr(err):
        assert (tokenize(enc, texts).flat == first.flat).all()
        tokenize(enc, texts)  # is told once
    assert err.getvalue().count(f'note: the cache {unwritable} cannot be written') == 1
