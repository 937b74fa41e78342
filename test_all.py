"""All tests: `python test_all.py`, or `python test_all.py NAME ...` for those whose names hold one of the words. Longer, each on its own:
`--fuzz N [KIND ...]` reads N broken files of each kind, `--kills N` kills and resumes N runs of each method, `--parity gpt2 [STEPS]` trains on that
shape step for step beside transformers and peft (minutes).

Needs the four packages of requirements.txt and no network. Tests against real data run where $NANOCLS_DATA is set, tests against
transformers, peft, safetensors, scikit-learn and matplotlib where they are installed; what is skipped is printed with its reason."""
import builtins
import contextlib
import copy
import csv
import functools
import gzip
import hashlib
import http.server
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
import zipfile
from dataclasses import replace
from types import SimpleNamespace

ROOT = tempfile.mkdtemp(prefix='nanocls-test-')
os.environ['NANOCLS_CACHE'] = os.path.join(ROOT, 'cache')               # never the user's own
os.environ.setdefault('HF_HUB_OFFLINE', '1')                            # transformers must not ask the network either

import numpy as np
import torch

import bench
import data
import eval as evaluation                                               # not `eval`, which is Python's own
import lora
import model as gpt
import predict
import train_cls
import train_gen
from data import UserError
from model import GPT

gpt.NANO_STEPS = 800                                                    # half of what users get: enough to see that it learns


class Skip(Exception):
    """Raised by a test that cannot run here."""


class Stop(Exception):
    """Raised to end a script at a chosen place."""


def skip(reason):
    raise Skip(reason)


def stop_here(*a, **k):
    raise Stop


def tmp():
    """A fresh folder."""
    return tempfile.mkdtemp(dir=ROOT)


def raises(error, fn, *a, match='', **k):
    """fn(*a, **k) must raise `error` with `match` in its message, which is returned."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            fn(*a, **k)
    except error as e:
        assert match in str(e), f'{match!r} is not in {e!s}'
        assert '\n' not in str(e), 'more than one line'
        return str(e)
    raise AssertionError(f'no {error.__name__} from {fn.__name__}{a}')


@contextlib.contextmanager
def patched(owner, name, value):
    """owner.name is value inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def environment(**change):
    """Environment variables changed inside; None = not set."""
    before = {k: os.environ.get(k) for k in change}

    def put(values):
        for k, v in values.items():
            os.environ.pop(k, None) if v is None else os.environ.__setitem__(k, v)
    put(change)
    try:
        yield
    finally:
        put(before)


# --- data.py ---

@contextlib.contextmanager
def fresh_cache():
    folder = tmp()
    with environment(NANOCLS_CACHE=folder):
        yield folder


def real_data(*parts):
    """The folder of real data, or a visible skip."""
    folder = os.environ.get("NANOCLS_DATA")
    if not folder or not os.path.isdir(os.path.join(folder, *parts)):
        skip(f"$NANOCLS_DATA holds no {'/'.join(parts)}")
    return folder


def write(name, content, folder=None):
    path = os.path.join(folder or tmp(), name)
    with open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())
    return path


def table(n=20, labels=("no", "yes"), sep=","):
    return "text,label\n".replace(",", sep) + "".join(f"text number {i}{sep}{labels[i % len(labels)]}\n" for i in range(n))


def quiet(fn, *a, **kw):
    """fn's value, without its progress lines."""
    with contextlib.redirect_stderr(io.StringIO()):
        return fn(*a, **kw)


def rows_of(split, labels):
    return sorted((t, labels[y]) for t, y in zip(split.texts, split.y))


# --- data sets -------------------------------------------------------------------------------------------------------

def check_dataset(d, labels):
    assert d.labels == labels
    for s in (d.train, d.val, d.test):
        assert len(s.texts) == len(s.y) and s.y.dtype == np.int64 and all(isinstance(t, str) for t in s.texts)
        assert set(s.y.tolist()) == set(range(len(labels)))
    assert not set(d.val.texts) & set(d.train.texts), "a text in both val and train"


def test_sst2():
    real_data("sst2")
    d = data.load("sst2")
    check_dataset(d, ["negative", "positive"])
    assert np.bincount(d.test.y).tolist() == [428, 444]
    dropped = 67349 - len(d.train.y) - len(d.val.y)
    assert len(d.train.y) == 66349 and 0 <= dropped < 30 and f"{dropped} of them dropped" in d.notes[0], d.notes
    assert d.test.texts[0] == "it 's a charming and often affecting journey . " and d.labels[d.test.y[0]] == "positive"
    again, other = data.load("sst2"), data.load("sst2", seed=1, max_samples=100)
    assert again.val.texts == d.val.texts and again.train.texts == d.train.texts
    assert other.val.texts != d.val.texts and other.test.texts == d.test.texts
    assert np.bincount(other.train.y).tolist() == [100, 100]
    share = 37569 / 67349
    assert abs(d.val.y.mean() - share) < 0.01 and abs(d.train.y.mean() - share) < 0.01


def test_agnews():
    real_data("ag_news_csv")
    d = data.load("agnews")
    check_dataset(d, ["World", "Sports", "Business", "Sci/Tech"])
    assert np.bincount(d.test.y).tolist() == [1900] * 4
    assert len(d.val.y) in range(980, 1001)
    assert d.test.texts[0].startswith("Fears for T N pension after talks Unions representing workers at Turner")
    assert d.labels[d.test.y[0]] == "Business"


def test_imdb():
    real_data("imdb")
    with fresh_cache():
        d = data.load("imdb")
        check_dataset(d, ["negative", "positive"])
        assert np.bincount(d.test.y).tolist() == [12500, 12500] and len(d.train.y) == 24000 and 980 < len(d.val.y) <= 1000
        assert not any("<br />" in t for t in d.train.texts) and any("\n" in t for t in d.train.texts)
        assert any("test texts also stand in train" in n for n in d.notes)
        parsed = next(f for f in os.listdir(data.cached("imdb")) if f.endswith(".json"))
        again = data.load("imdb")
        assert again.train.texts == d.train.texts and again.val.texts == d.val.texts and (again.test.y == d.test.y).all()
        assert os.listdir(data.cached("imdb")) == [parsed]


def tiny_imdb(path, reviews=40):
    with tarfile.open(path, "w:gz") as tar:
        for split in ("train", "test"):
            for i in reversed(range(reviews)):  # not in the order of the names
                for kind in ("neg", "pos"):
                    raw = f"{split} review {i}<br /><br />it is {kind}".encode()
                    info = tarfile.TarInfo(f"aclImdb/{split}/{kind}/{i}_7.txt")
                    info.size = len(raw)
                    tar.addfile(info, io.BytesIO(raw))
        evil = tarfile.TarInfo("../../evil.txt")
        tar.addfile(evil)


def test_imdb_archive():
    folder = tmp()
    os.mkdir(os.path.join(folder, "imdb"))
    path = os.path.join(folder, "imdb", "aclImdb_v1.tar.gz")
    tiny_imdb(path)
    with fresh_cache() as cache, environment(NANOCLS_DATA=folder):
        d = data.load("imdb")
        assert len(d.test.y) == 80 and len(d.train.y) == 72 and len(d.val.y) == 8
        assert d.test.texts[0].endswith("0\n\nit is neg") and os.listdir(os.path.join(folder, "imdb")) == ["aclImdb_v1.tar.gz"]
        parsed = os.path.join(cache, "imdb", os.listdir(os.path.join(cache, "imdb"))[0])
        write(os.path.basename(parsed), '{"train": [["half', os.path.dirname(parsed))  # a broken cache file is made anew
        assert data.load("imdb").test.texts == d.test.texts
        with open(path, "rb") as f:
            whole = f.read()
        write("aclImdb_v1.tar.gz", whole[:len(whole) // 2], os.path.dirname(path))
        raises(UserError, data.load, "imdb", match="not the published archive")
        write("aclImdb_v1.tar.gz", b"<html>", os.path.dirname(path))
        raises(UserError, data.load, "imdb", match="not the published archive")


def test_sms():
    real_data("sms_spam")
    d = data.load("sms")
    check_dataset(d, ["ham", "spam"])
    assert sum(len(s.y) for s in (d.train, d.val, d.test)) == 5574 - 403 and any("403" in n for n in d.notes)
    assert (len(d.train.y), len(d.val.y), len(d.test.y)) == (3620, 517, 1034)  # 70 / 10 / 20
    shares = [s.y.mean() for s in (d.train, d.val, d.test)]
    assert max(shares) - min(shares) < 0.005, shares
    assert len({t for s in (d.train, d.val, d.test) for t in s.texts}) == 5171
    b = data.load("sms", balance=True)
    for s in (b.train, b.val, b.test):
        assert abs(s.y.mean() - 0.5) < 0.01
    assert any("balanced to 653 rows per class" in n for n in b.notes), b.notes


def test_published_files_are_checked_row_by_row():
    for name, rel, good, bad, where in (
            ("sst2", "sst2/train.tsv", "sentence\tlabel\n" + "fine \t1\nbad \t0\n" * 30, "no tab", "line 62"),
            ("sms", "sms_spam/SMSSpamCollection", "ham\thi\nspam\t\"win\n" * 30, "eggs\tx", "line 61"),
            ("agnews", "ag_news_csv/train.csv", '"1","a","b"\n' * 5, '"9","a","b"\n', "line 6")):
        folder = tmp()
        os.mkdir(os.path.join(folder, os.path.dirname(rel)))
        write(rel, good + bad, folder)
        with fresh_cache():
            e = raises(UserError, lambda: data.load(name, data_dir=folder), match=where)
        assert os.path.basename(rel) in str(e)


# --- a user's own files ----------------------------------------------------------------------------------------------

def test_own_csv_splits():
    text = table(200, ("no", "yes", "no", "no"))
    path = write("mine.csv", text)
    d = data.load(path)
    check_dataset(d, ["no", "yes"])
    assert [np.bincount(s.y).tolist() for s in (d.train, d.val, d.test)] == [[120, 40], [15, 5], [15, 5]]
    everything = sum((rows_of(s, d.labels) for s in (d.train, d.val, d.test)), [])
    assert sorted(everything) == sorted((f"text number {i}", ("no", "yes", "no", "no")[i % 4]) for i in range(200))
    assert data.load(path).test.texts == d.test.texts != data.load(path, seed=2).test.texts
    balanced = data.load(path, balance=True)
    assert sum(len(s.y) for s in (balanced.train, balanced.val, balanced.test)) == 100
    capped = data.load(path, max_samples=7)
    assert np.bincount(capped.train.y).tolist() == [7, 7] and capped.test.texts == d.test.texts
    doubled = data.load(write("mine.csv", text + "".join(text.splitlines(True)[1:])))
    assert any("200 exact duplicates dropped" in n for n in doubled.notes) and doubled.test.texts == d.test.texts


def test_own_val_and_test():
    folder = tmp()
    for name, at in (("train.csv", 0), ("dev.csv", 100), ("test.csv", 200)):
        write(name, "review,sentiment\n" + "".join(f"t{at + i},{'pn'[i % 2]}\n" for i in range(40)), folder)
    d = data.load(folder)
    assert d.labels == ["n", "p"] and len(d.train.y) == len(d.val.y) == len(d.test.y) == 40
    assert d.val.texts[0] == "t100" and d.test.texts[-1] == "t239" and d.train.texts == [f"t{i}" for i in range(40)]
    one = data.load(os.path.join(folder, "train.csv"), test=os.path.join(folder, "test.csv"))
    assert len(one.train.y) == 36 and len(one.val.y) == 4 and len(one.test.y) == 40
    os.remove(os.path.join(folder, "train.csv"))
    raises(UserError, data.load, folder, match="no train.csv")
    write("train.tsv", table(sep="\t"), folder)
    write("valid.csv", table(), folder)
    raises(UserError, data.load, folder, match="both")
    d = data.load("demo", test=write("t.csv", "text,label\nfine,positive\n"))
    assert d.test.texts == ["fine"] and d.test.y.tolist() == [1]


def test_csv_oddities():
    body = ('"one, with a comma",a\r\n"two ""quoted""",b\r\n"three\r\nin two lines",a\r\n"",b\r\n\r\nfünf \u2028 \x85,a\r\n'
            '"' + "x" * 1_000_000 + '",b\r\n')
    rows = data.read_table(write("odd.csv", b"\xef\xbb\xbf" + ("text,label\r\n" + body).encode()))[0]
    assert [t for t, _ in rows] == ["one, with a comma", 'two "quoted"', "three\r\nin two lines", "", "fünf \u2028 \x85",
                                    "x" * 1_000_000]
    assert [y for _, y in rows] == list("ababab")
    rows = data.read_table(write("odd.tsv", "label\ttext\n a \t\"one\ttab\"\nb\ttwo, no tab\n"))[0]
    assert rows == [("one\ttab", "a"), ("two, no tab", "b")]
    rows = data.read_table(write("ODD.JSONL", '{"text": "one\\u2028", "label": true}\n\n{"label": 3, "text": "half \\ud83d", "x": 1}\r\n'))[0]
    assert rows == [("one\u2028", "true"), ("half \ufffd", "3")]


def test_columns():
    def columns(header, rows, *asked):
        return data.read_table(write("c.csv", header + "\n" + "\n".join(rows) + "\n"), *asked)[1:]
    rows = ["first,a,1", "second,b,2", "third,a,3"]
    assert columns("Text,Label,id", rows) == ("Text", "Label")
    assert columns("sentence,kind,id", rows, None, "kind") == ("sentence", "kind")
    assert columns("q,kind,id", rows, "q", "kind") == ("q", "kind")
    assert columns("u,v", ["a,first", "b,second", "a,third"]) == ("v", "u")
    assert columns("u,v", ["first,a", "second,b", "third,a"]) == ("u", "v")
    assert columns("label,v", ["a,a", "b,b"]) == ("v", "label") and columns("v,review", ["a,a"]) == ("review", "v")
    path = write("c.csv", "q,kind,id\n" + "\n".join(rows))
    e = raises(UserError, data.read_table, path, match="--text_col")
    assert "'q', 'kind', 'id'" in str(e)
    e = raises(UserError, data.read_table, path, "body", match="no column 'body'")
    assert "'q', 'kind', 'id'" in str(e)
    raises(UserError, data.read_table, write("c.csv", "good film,pos\nbad film,neg\nnice film,pos\n"), match="no header")


def test_label_order():
    labels = lambda *names: data.load(write("l.csv", table(60, names))).labels
    assert labels("10", "9", "-1") == ["-1", "9", "10"] and labels("10", "9", "x") == ["10", "9", "x"]
    assert labels("b c", "Ä", "a") == ["a", "b c", "Ä"]


def test_own_file_errors():
    def bad(name, content, match, **kw):
        path = write(name, content)
        e = raises(UserError, lambda: data.load(path, **kw), match=match)
        assert "\n" not in str(e) and len(str(e)) < 400, e
    head = "text,label\nfine,a\n"
    bad("x.csv", "", "is empty")
    bad("x.csv", "text,label\n", "is empty")
    bad("x.jsonl", "\n\n", "is empty")
    bad("x.csv", head + "only one field\n", "line 3: the row has 1 field")
    bad("x.csv", head + "a, b,c\n", "line 3: the row has 3 fields")
    bad("x.csv", head + '"never closed,b\nmore,a\nmore,b\n', "line 3: the record that begins here")
    bad("x.csv", head + '"a"b,c\n', "line 3")
    bad("x.csv", head.encode() + b"caf\xe9,b\n", "line 3: byte 0xe9 is not UTF-8")
    bad("x.csv", b"\xff\xfet\x00e\x00", "line 1: byte 0xff")
    bad("x.csv", head + "good,\n", "line 3: the label")
    bad("x.jsonl", '{"text": "a", "label": "b"}\n{"text": "a", "lab', "line 2: not valid JSON")
    bad("x.jsonl", '{"text": "a", "label": "b"}\n["a", "b"]', "line 2: not a JSON object")
    bad("x.jsonl", '{"text": "a", "label": "b"}\n{"label": "b"}', "line 2: the text 'text' is missing")
    bad("x.jsonl", '{"text": 5, "label": "b"}', "line 1: the text")
    bad("x.jsonl", '{"text": "a", "label": 0.5}', "line 1: the label")
    bad("x.jsonl", '{"text": "a", "label": null}', "line 1: the label")
    bad("x.csv", table(30, ("a",)), "at least two classes")
    bad("x.csv", table(4), "too few")
    bad("x.csv", table(30, [str(i) for i in range(30)]), "too few")
    bad("x.txt", "hello", "expected a file that ends in")
    bad("x.csv", table(), "label 'maybe'", test=write("t.csv", "text,label\nperhaps,maybe\n"))
    bad("x.csv", table(), "no column 'text'", val=write("t.csv", "body,label\nperhaps,yes\n"))
    bad("x.csv", table(), "cannot read", val="/nowhere/v.csv")
    raises(UserError, data.load, "sst3", match="there is no data set")
    raises(UserError, lambda: data.load("demo", text_col="x"), match="--text_col")
    raises(UserError, lambda: data.load("sst2", data_dir="/nowhere"), match="--data_dir")


def test_rare_classes_stay_in_train():
    d = data.load(write("r.csv", table(100) + "single,rare\n"))
    assert "rare" in d.labels and d.labels.index("rare") in d.train.y


def test_streams():
    path = write("s.csv", 'id,text\n1,"a\nb"\n2,c\n')
    assert list(data.read_texts(path)) == ["a\nb", "c"]
    raises(UserError, lambda: list(data.read_texts(path, "body")), match="no column 'body'")
    assert list(data.read_texts(write("S.TSV", "anything\nx\ny\n"))) == ["x", "y"]
    assert list(data.read_texts(write("s.jsonl", '{"body": "x", "n": 1}\n{"body": "y"}\n'), "body")) == ["x", "y"]
    raises(UserError, lambda: list(data.read_texts(write("s.jsonl", '{"text": "x"}\n{"text": 1}\n'))), match="line 2")
    assert list(data.read_texts(write("s.txt", '\ufeffone, "two\n\nthree'))) == ['one, "two', "", "three"]
    raises(UserError, lambda: list(data.read_texts(write("s.txt", b"fine\ncaf\xe9\n"))), match="0xe9")
    raises(UserError, lambda: list(data.read_texts(os.path.join(tmp(), "none.txt"))), match="cannot read")


def test_cap():
    s = data.cap(data.load("demo").test, 20, 3)
    assert np.bincount(s.y).tolist() == [20, 20] and len(s.texts) == 40
    assert data.cap(s, 99, 1).texts == s.texts


# --- the demo --------------------------------------------------------------------------------------------------------

def test_demo():
    d = data.load("demo")
    check_dataset(d, ["negative", "positive"])
    for s, n in ((d.train, 4000), (d.val, 500), (d.test, 1000)):
        assert len(s.texts) == n == 2 * s.y.sum()
    assert len(set(d.train.texts + d.val.texts + d.test.texts)) == 5500, "a text twice"
    assert data.load("demo", seed=5).test.texts == d.test.texts
    unlabelled = data.demo_unlabelled()
    h = hashlib.sha256("\n".join(d.train.texts + d.val.texts + d.test.texts + unlabelled).encode()).hexdigest()
    assert h[:16] == "36d285e4700bf34e", h[:16]
    assert len(unlabelled) == 20000 and max(map(len, unlabelled)) < 128
    words = lambda texts: {w for t in texts for w in t.replace(",", "").split()}
    new = words(d.test.texts) - words(d.train.texts)
    assert {"radiant", "superb", "dismal", "awful"} <= new <= words(unlabelled)
    hang = sum(bool(words([t]) & {"radiant", "superb", "dismal", "awful"}) for t in d.test.texts)
    assert 30 < hang < 200, hang


def test_demo_is_not_solved_by_single_words():
    d = data.load("demo")
    words = sorted({w for t in d.train.texts for w in t.replace(",", "").split()})
    column = {w: i for i, w in enumerate(words)}

    def counts(texts):
        x = np.zeros((len(texts), len(words)))
        for i, t in enumerate(texts):
            for w in t.replace(",", "").split():
                if w in column:
                    x[i, column[w]] += 1
        return x
    x, y, w, b = counts(d.train.texts), d.train.y, np.zeros(len(words)), 0.0
    for _ in range(300):  # logistic regression by gradient descent
        g = 1 / (1 + np.exp(-(x @ w + b))) - y
        w -= 1.0 * (x.T @ g / len(y) + 1e-4 * w)
        b -= 1.0 * g.mean()
    accuracy = ((counts(d.test.texts) @ w + b > 0) == d.test.y).mean()
    assert 0.62 < accuracy < 0.82, accuracy


# --- tokenizer -------------------------------------------------------------------------------------------------------

def test_gpt2_tokenizer():
    folder = real_data("gpt2_bpe")
    enc = data.tokenizer("gpt2")
    assert enc.n_vocab == 50257 and enc.eot_token == 50256
    assert enc.encode_ordinary("Hello world, it's 2024!") == [15496, 995, 11, 340, 338, 48609, 0]
    with open(os.path.join(folder, "gpt2_bpe", "encoder.json"), encoding="utf-8") as f:
        assert len(json.load(f)) == enc.n_vocab
    bad = tmp()
    os.mkdir(os.path.join(bad, "gpt2_bpe"))
    for file in data.BPE_SHA256:
        write(f"gpt2_bpe/{file}", data.read_bytes(os.path.join(folder, "gpt2_bpe", file)), bad)
    data.tokenizer("gpt2", bad)
    with open(os.path.join(bad, "gpt2_bpe", "vocab.bpe"), "ab") as f:
        f.write(b"x y\n")
    raises(UserError, lambda: data.tokenizer("gpt2", bad), match="sha256")


def test_gpt2_tokenizer_equals_transformers():
    folder = real_data("gpt2_bpe")
    try:
        from transformers import GPT2TokenizerFast
    except ImportError:
        skip("transformers is not installed")
    vocab, merges = (os.path.join(folder, "gpt2_bpe", f) for f in ("encoder.json", "vocab.bpe"))
    try:
        theirs = GPT2TokenizerFast(vocab_file=vocab, merges_file=merges)
        if theirs("a b")["input_ids"] != [64, 275]:
            raise TypeError
    except TypeError:  # transformers 5 takes the contents
        lines = data.decode(data.read_bytes(merges), merges).split("\n")[1:-1]
        theirs = GPT2TokenizerFast(vocab=data.read_json(vocab), merges=[tuple(line.split()) for line in lines])
    texts = ["it's we'll 12ab  three   spaces\n\n\ttab ", "naïve café 東京 😀👩‍👩‍👧 \x00 \x85 \u2028", "", " ", "x" * 50, "’s 'S I'M"]
    for name in ("sst2", "sms", "agnews"):
        if os.path.isdir(os.path.join(folder, {"sms": "sms_spam", "agnews": "ag_news_csv"}.get(name, name))):
            texts += data.load(name).test.texts[::4]
    ours = data.tokenize(data.tokenizer("gpt2"), texts, cache=False)
    for text, ids, mine in zip(texts, theirs(texts)["input_ids"], ours):
        assert mine.tolist() == (ids or [50256]), text


def test_bytes_tokenizer():
    enc = data.tokenizer("bytes")
    assert enc.n_vocab == 257 and enc.eot_token == 256
    for text in ("plain", "naïve 東京 \x00\n", "<|endoftext|>", " " * 1000):
        assert bytes(enc.encode_ordinary(text)) == text.encode() and enc.decode(enc.encode_ordinary(text)) == text


def test_tokenize():
    enc = data.tokenizer("bytes")
    texts = ["ab", "", "<|endoftext|>", "half \ud83d pair", "\x00", "x" * 250_001, "word " * 50_000]
    t = data.tokenize(enc, texts, cache=False)
    assert len(t) == 7 and t.flat.dtype == np.uint16 and t.starts.dtype == t.lengths.dtype == np.int64
    assert t[0].tolist() == [97, 98] and t[1].tolist() == [256] and bytes(t[2].astype(np.uint8)) == b"<|endoftext|>"
    assert bytes(t[3].astype(np.uint8)).decode() == "half \ufffd pair" and t[4].tolist() == [0]
    assert t.lengths.tolist() == [2, 1, 13, 13, 1, 250_001, 250_000]
    assert len(data.tokenize(enc, [], cache=False)) == 0


def test_long_texts():
    real_data("gpt2_bpe")
    enc = data.tokenizer("gpt2")
    r = random.Random(0)
    words = "".join(r.choice(["word", " it's", "  two", "\n\nnext", " 42", "!?", " naïve"]) for _ in range(60_000))
    assert len(words) > 2 * data.LONG
    start = time.time()
    t = data.tokenize(enc, [words, "x" * 100_000, " " * 1_000_000, "é" * 1_000_000, "".join(r.choices("abcdefgh", k=100_000))],
                      cache=False)
    assert time.time() - start < 10
    assert t[0].tolist() == enc.encode_ordinary(words), "cutting changed the ids"
    assert len(t[2]) == 1_000_000


def test_token_cache():
    enc, texts = data.tokenizer("bytes"), ["one", "", "three \ud800"]
    with fresh_cache() as cache:
        first = data.tokenize(enc, texts)
        files = os.listdir(os.path.join(cache, "tokens"))
        assert len(files) == 1
        path = os.path.join(cache, "tokens", files[0])
        before = os.stat(path).st_mtime_ns
        again = data.tokenize(enc, texts)
        assert (again.flat == first.flat).all() and (again.starts == first.starts).all() and os.stat(path).st_mtime_ns == before
        whole = data.read_bytes(path)
        for broken in (b"", b"PK junk", whole[:-30], whole[:200] + b"\xff" * 9 + whole[209:]):
            write(files[0], broken, os.path.dirname(path))
            assert (data.tokenize(enc, texts).flat == first.flat).all()
            assert data.read_bytes(path) == whole
        data.tokenize(enc, ["one", "three", ""])
        data.tokenize(enc, ["onethree", "", ""])
        assert len(os.listdir(os.path.join(cache, "tokens"))) == 3, "the key must see where texts end"
    with environment(NANOCLS_CACHE=os.path.join(write("file", "x"), "cache")):
        raises(UserError, data.tokenize, enc, texts, match="$NANOCLS_CACHE")


# --- batches ---------------------------------------------------------------------------------------------------------

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
    same = lambda a, b: len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))
    plan = data.batches(lengths, 16, 7, 0)
    assert same(plan, data.batches(lengths, 16, 7, 0)) and same(plan, data.batches(lengths.tolist(), 16, 7, 0))
    assert not same(plan, data.batches(lengths, 16, 7, 1)) and not same(plan, data.batches(lengths, 16, 8, 0))
    assert padding(lengths, plan) < 0.05
    firsts = [lengths[b].mean() for b in plan]
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.5, "short batches first"
    assert same(data.batches(lengths, 16, -3, 0), data.batches(lengths, 16, -3, 0)) and data.batches(lengths[:0], 16, 0, 0) == []


def test_padding_on_sst2():
    real_data("sst2"), real_data("gpt2_bpe")
    d, enc = data.load("sst2"), data.tokenizer("gpt2")
    n = np.minimum(data.tokenize(enc, d.train.texts).lengths, 128)
    share = padding(n, data.batches(n, 16, 1337, 0))
    assert share < 0.03, share


def test_collate():
    t = data.Tokens(np.arange(12, dtype=np.uint16), np.array([0, 5, 6, 12]))
    ids, n = data.collate(t, [2, 0, 1], 4, "head", 99)
    assert ids.tolist() == [[6, 7, 8, 9], [0, 1, 2, 3], [5, 99, 99, 99]] and n.tolist() == [4, 4, 1]
    ids, n = data.collate(t, np.array([2, 0, 1]), 4, "tail", 99)
    assert ids.tolist() == [[8, 9, 10, 11], [1, 2, 3, 4], [5, 99, 99, 99]]
    ids, n = data.collate(t, [1, 0], 50, "tail", 0)
    assert ids.tolist() == [[5, 0, 0, 0, 0], [0, 1, 2, 3, 4]] and n.tolist() == [1, 5]
    assert str(ids.dtype) == str(n.dtype) == "torch.int64"


# --- downloads -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def server(files):
    """A web server on this machine; files: path -> bytes, or function(handler).  Yields (address, list of (path, Range))."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Range")))
            what = files.get(self.path)
            if what is None:
                self.send_error(404)
            elif callable(what):
                what(self)
            else:
                answer(self, what)
        do_HEAD = do_GET

        def log_message(self, *a):
            pass
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    try:
        socket.create_connection(s.server_address, timeout=5).close()
    except OSError as e:  # not even the loopback interface is up
        s.server_close()
        skip(f"no server can be reached on this machine: {e}")
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    try:
        with environment(no_proxy="127.0.0.1", NO_PROXY="127.0.0.1"):
            yield f"http://127.0.0.1:{s.server_port}", asked
    finally:
        s.shutdown()
        s.server_close()


def answer(h, body, ranges=True, stop=None, headers=()):
    """Send body, from where the client asked; stop: break the connection after so many bytes."""
    start = 0
    if ranges and h.headers.get("Range"):
        start = int(h.headers["Range"][6:].split("-")[0])
        h.send_response(206 if start < len(body) else 416)
        h.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}" if start < len(body) else f"bytes */{len(body)}")
    else:
        h.send_response(200)
    for k, v in headers:
        h.send_header(k, v)
    h.send_header("Content-Length", str(len(body) - start))
    h.end_headers()
    if h.command == "GET":
        h.wfile.write(body[start:][:stop])


BODY = bytes(range(256)) * 4000  # 1 MB
GOOD = dict(size=len(BODY), sha256=hashlib.sha256(BODY).hexdigest())


def get(urls, **checks):
    """Download into a fresh folder -> (bytes, what lies in the folder)."""
    dest = os.path.join(tmp(), "sub", "file")
    quiet(data.download, urls, dest, **checks)
    return data.read_bytes(dest), os.listdir(os.path.dirname(dest))


def test_download():
    def moved(h):
        h.send_response(302)
        h.send_header("Location", "/whole")
        h.send_header("Content-Length", "0")
        h.end_headers()
    with server({"/whole": BODY, "/moved": moved}) as (at, asked):
        for checks in ({}, GOOD, dict(md5=hashlib.md5(BODY).hexdigest())):
            assert get([at + "/whole"], **checks) == (BODY, ["file"])
        assert get([at + "/moved"], **GOOD) == (BODY, ["file"])
        assert get([at + "/lost", at + "/whole"], **GOOD) == (BODY, ["file"])
        assert get(["http://127.0.0.1:1/refused", at + "/whole"], **GOOD) == (BODY, ["file"])
        asked.clear()
        e = raises(data.Unavailable, get, [at + "/lost", at + "/lost2"], match="404 Not Found")
        assert "/lost:" in str(e) and "/lost2:" in str(e) and "--data_dir" in str(e) and "\n" not in str(e) and len(asked) == 2
        raises(data.Unavailable, lambda: get([at + "/whole"], sha256="0" * 64), match="checksum")
        raises(data.Unavailable, lambda: get([at + "/whole"], size=5), match="size")
        raises(data.Unavailable, get, ["http://127.0.0.1:1/refused"], match="no connection")


def test_download_resumes():
    cuts = []

    def cut(h):  # breaks off twice
        cuts.append(h.headers.get("Range"))
        answer(h, BODY, stop=300_000 if len(cuts) < 3 else None)

    def always_cut(h):
        answer(h, BODY, ranges=False, stop=300_000)
    with server({"/cut": cut, "/never": always_cut, "/whole": BODY, "/plain": lambda h: answer(h, BODY, ranges=False),
                 "/other": b"z" * len(BODY)}) as (at, asked):
        assert get([at + "/cut"], **GOOD) == (BODY, ["file"])
        assert cuts[0] is None and len(cuts) == 3 and all(c.startswith("bytes=") for c in cuts[1:])
        dest = os.path.join(tmp(), "file")
        raises(data.Unavailable, lambda: quiet(data.download, [at + "/never"], dest, **GOOD), match="broke off")
        assert os.listdir(os.path.dirname(dest)) == ["file.part"] and 0 < os.path.getsize(dest + ".part") <= 300_000
        assert get([at + "/never", at + "/whole"], **GOOD) == (BODY, ["file"])  # the second address goes on from the first
        for left, url, requests_made in ((BODY[:1000], "/whole", 1), (BODY[:1000], "/plain", 1), (b"junk" * 99, "/whole", 2),
                                         (BODY, "/whole", 1), (BODY + b"more", "/whole", 2), (BODY[:1000], "/other", 2)):
            dest = write("file.part", left)[:-5]
            asked.clear()
            if url == "/other":
                raises(data.Unavailable, lambda: quiet(data.download, [at + url], dest, **GOOD), match="checksum")
                assert not os.listdir(os.path.dirname(dest))
            else:
                quiet(data.download, [at + url], dest, **GOOD)
                assert data.read_bytes(dest) == BODY and os.listdir(os.path.dirname(dest)) == ["file"]
            assert len(asked) == requests_made and asked[0][1] == f"bytes={len(left)}-", (url, asked)


def test_download_from_bad_servers():
    """Whatever a server does: the file whole and checked, or one clear sentence and what came so far; the next try, at a good server, succeeds."""
    over, first = threading.Event(), BODY[:400_000]

    def told(status, *headers, body=b""):
        def reply(h):
            h.send_response(status)
            for k, v in headers:
                h.send_header(k, v)
            h.end_headers()
            with contextlib.suppress(OSError):  # the client may hang up
                h.wfile.write(body)
        return reply

    def stalls(h, n):
        h.send_response(206 if h.headers.get("Range") else 200)
        h.send_header("Content-Length", str(len(BODY) - (len(first) if h.headers.get("Range") else 0)))
        h.end_headers()
        h.wfile.write(BODY[:n])
        h.wfile.flush()
        over.wait(20)

    def endless(h):
        h.send_response(200)
        h.end_headers()
        with contextlib.suppress(OSError):
            while not over.is_set():
                h.wfile.write(BODY)
    to = lambda where: told(302, ("Location", where), ("Content-Length", "0"))
    size = ("Content-Length", str(len(BODY)))
    servers = {  # name: (server, words of the complaint, bytes kept of nothing, bytes kept of a first part)
        "stalls": (lambda h: stalls(h, 0), "timed out", 0, 400_000),
        "stalls-later": (lambda h: stalls(h, 0 if h.headers.get("Range") else 400_000), "timed out", 400_000, 400_000),
        "404": (told(404, size), "404", 0, 400_000), "416": (told(416, ("Content-Length", "0")), "", 0, 0),
        "429": (told(429, ("Retry-After", "7"), ("Content-Length", "0")), "429 Too Many Requests, try again in 7 s", 0, 400_000),
        "503": (told(503, ("Retry-After", "Mon, 01 Jan 2029 00:00:00 GMT")), "503", 0, 400_000),
        "loop": (to("/loop"), "redirects in a circle", 0, 400_000), "nowhere": (to("ftp://127.0.0.1/x"), "", 0, 400_000),
               "odd": (to("http://[::"), "", 0, 400_000),
        "refused": (to("http://127.0.0.1:1/x"), "no connection", 0, 400_000),
        "page": (lambda h: answer(h, b"<html>log in first</html>"), "wrong size or checksum", 0, 0),
        "other": (told(200, size, body=BODY[::-1]), "wrong size or checksum", 0, 0),
               "short": (lambda h: answer(h, BODY[:-1]), "wrong size or checksum", 0, 0),
        "long": (lambda h: answer(h, BODY + b"x"), "wrong size or checksum", 0, 0), "endless": (endless, "wrong size or checksum", 0, 0),
        "lies": (told(200, ("Content-Length", str(10 << 30)), body=BODY[:500_000]), "broke off", 500_000, 500_000),
               "empty": (told(200), "wrong size", 0, 0),
        "negative": (told(200, ("Content-Length", "-5"), body=BODY[:9]), "wrong size", 0, 0),
               "no-number": (told(200, ("Content-Length", "x"), body=BODY[:9]), "wrong size", 0, 0),
        "no-http": (lambda h: h.wfile.write(b"\0\1\2 hello\r\n\r\n"), "", 0, 400_000)}
    with server({"/good": BODY, **{"/" + name: it[0] for name, it in servers.items()}}) as (at, asked), patched(data, "TIMEOUT", (5, 0.3)):
        for name, (_, match, *kept) in servers.items():
            for start, left in zip((b"", first), kept):
                dest = write("file.part", start)[:-5]
                if not start:
                    os.remove(dest + ".part")
                asked.clear()
                e = raises(data.Unavailable, lambda: quiet(data.download, [f"{at}/{name}"], dest, **GOOD), match=match)
                assert f"/{name}: " in e and "--data_dir" in e and len(asked) < 35, (name, e, len(asked))
                there = os.path.getsize(dest + ".part") if os.path.exists(dest + ".part") else 0
                assert not os.path.exists(dest) and left - (1 << 16) < there <= left, (name, there)  # a block that did not come whole is lost
                asked.clear()
                quiet(data.download, [f"{at}/good"], dest, **GOOD)
                assert data.read_bytes(dest) == BODY and os.listdir(os.path.dirname(dest)) == ["file"]
                assert asked == [("/good", f"bytes={there}-" if there else None)], (name, asked)
        once = []

        def stalls_once(h):
            once.append(h.headers.get("Range"))
            stalls(h, 400_000) if len(once) == 1 else answer(h, BODY)
        with server({"/once": stalls_once}) as (at, _):
            assert get([at + "/once"], **GOOD) == (BODY, ["file"]) and once == [None, f"bytes={400_000 >> 16 << 16}-"]
        over.set()


def test_datasets_from_downloads():
    sms = "".join(f"{'ham' if i % 3 else 'spam'}\tmessage {i}\n" for i in range(60)).encode()

    def zipped(**members):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in members.items():
                z.writestr(name.replace("__", "/").replace("_tsv", ".tsv"), content)
        return buffer.getvalue()
    sst2 = "sentence\tlabel\n" + "".join(f"phrase {i} \t{i % 2}\n" for i in range(60))
    with server({"/bad.zip": b"<html>sorry</html>", "/sms.zip": zipped(readme="x", SMSSpamCollection=sms),
                 "/sst2.zip": zipped(**{"SST-2__train_tsv": sst2, "SST-2__dev_tsv": sst2})}) as (at, asked), \
            fresh_cache() as cache, environment(NANOCLS_DATA=None):
        got = quiet(data.file_or_member, "sms_spam/SMSSpamCollection", "sms_spam/x.zip", "SMSSpamCollection", None,
                    [at + "/bad.zip", at + "/sms.zip"], member="SMSSpamCollection", sha256=hashlib.sha256(sms).hexdigest())[0]
        assert got == sms and os.listdir(os.path.join(cache, "sms_spam")) == ["x.zip"]
        quiet(data.download, [at + "/sst2.zip"], os.path.join(cache, "sst2", "SST-2.zip"))
        d = data.load("sst2")
        assert len(d.test.y) == 60 and len(d.train.y) == 54
        write("sst2/SST-2.zip", b"PK no zip", cache)
        raises(UserError, data.load, "sst2", match="not the published zip")


def test_weights():
    def redirect(h):
        h.send_response(302)
        h.send_header("Location", "/blob")
        h.send_header("x-linked-size", str(len(BODY)))
        h.send_header("x-linked-etag", f'"{GOOD["sha256"]}"')
        h.send_header("Content-Length", "0")
        h.end_headers()
    home = tmp()
    here = dict(NANOCLS_DATA=None, HF_HUB_CACHE=None, HF_HOME=home)

    def nonsense(h):
        answer(h, BODY, headers=(("x-linked-size", "many"), ("x-linked-etag", '"no hash"')))
    with server({"/distilbert/distilgpt2/resolve/main/model.safetensors": redirect, "/blob": BODY,
                 "/openai-community/gpt2-large/resolve/main/model.safetensors": nonsense,
                 "/openai-community/gpt2/resolve/main/model.safetensors": BODY}) as (at, asked), fresh_cache() as cache:
        with environment(HF_ENDPOINT=at, **here):
            path = quiet(data.weights, "distilgpt2")
            assert path == os.path.join(cache, "models/distilgpt2/model.safetensors") and data.read_bytes(path) == BODY
            asked.clear()
            assert data.weights("distilgpt2") == path and not asked
            raises(data.Unavailable, lambda: quiet(data.weights, "gpt2"), match="size or checksum")
            raises(data.Unavailable, lambda: quiet(data.weights, "gpt2-xl"), match="404")
            raises(data.Unavailable, lambda: quiet(data.weights, "gpt2-large"), match="checksum")
            for folder in ("models--gpt2", "models--openai-community--gpt2"):
                snapshot = os.path.join(home, "hub", folder, "snapshots", "abc")
                os.makedirs(snapshot)
                path = write("model.safetensors", b"x", snapshot)
                assert data.weights("gpt2") == path
        own = tmp()
        os.makedirs(os.path.join(own, "models", "gpt2"))
        path = write("models/gpt2/model.safetensors", b"x", own)
        assert data.weights("gpt2", own) == path


# --- small files and the command line --------------------------------------------------------------------------------

def test_write_atomic():
    path = os.path.join(tmp(), "a", "b.json")
    data.write_json(path, {"ä": [1, 2.5, None]})
    assert data.read_json(path) == {"ä": [1, 2.5, None]}

    def dies(f):
        f.write(b"half")
        raise KeyboardInterrupt
    raises(KeyboardInterrupt, data.write_atomic, path, dies)
    assert data.read_json(path) == {"ä": [1, 2.5, None]} and os.listdir(os.path.dirname(path)) == ["b.json"]
    data.write_atomic(path, lambda f: f.write(b"[1"))
    raises(UserError, data.read_json, path, match="not valid JSON")
    raises(UserError, data.read_json, path + "x", match="cannot read")
    raises(UserError, data.write_atomic, os.path.join(path, "c"), "x", match="cannot write")


def test_find():
    folder, cache = tmp(), tmp()
    with environment(NANOCLS_CACHE=cache, NANOCLS_DATA=None):
        assert data.find("x/y.csv") is None
        os.mkdir(os.path.join(cache, "x")), os.mkdir(os.path.join(folder, "x"))
        in_cache = write("x/y.csv", b"", cache)
        assert data.find("x/y.csv") == data.find("x/y.csv", folder) == in_cache
        in_folder = write("x/y.csv", b"", folder)
        assert data.find("x/y.csv", folder) == in_folder and data.find("x/*.csv") == in_cache
        with environment(NANOCLS_DATA=folder):
            assert data.find("x/y.csv") == in_folder
        with environment(NANOCLS_DATA=os.path.join(folder, "none")):
            raises(UserError, data.find, "x", match="$NANOCLS_DATA")


def test_parser():
    p = data.Parser()
    p.add_argument("texts", nargs="*")
    p.add_argument("--max_steps", type=data.positive, default=5)
    p.add_argument("--flag", action="store_true")
    p.add_argument("--lr", type=data.above_zero)
    a, given = p.parse(["--max-steps", "7", "--lr=1e-3", "hello", "--", "--max-steps"])
    assert (a.max_steps, a.lr, a.texts, given) == (7, 1e-3, ["hello", "--max-steps"], {"max_steps", "lr", "texts"}), (a, given)
    assert p.parse([])[1] == set() and p.parse(["--max_steps=5"])[1] == {"max_steps"}
    raises(UserError, p.parse, ["--max-stepz", "3"], match="did you mean --max_steps?")
    raises(UserError, p.parse, ["--max", "3"], match="unrecognized")
    raises(UserError, p.parse, ["--max_steps", "0"], match="'0' is not a whole number above 0")
    raises(UserError, p.parse, ["--lr", "fast"], match="--lr")
    raises(UserError, p.parse, ["--lr", "nan"], match="--lr")


def test_cli_exit_codes():
    def run(code):
        done = subprocess.run([sys.executable, "-c", "import data\ndef main():\n " + code + "\ndata.cli(main)"], text=True,
                              capture_output=True, cwd=os.path.dirname(os.path.abspath(data.__file__)))
        return done.returncode, done.stderr.strip()
    assert run("return None") == (0, "") and run("return 3") == (3, "")
    assert run("raise data.Unavailable('no such thing; do this')") == (2, "error: no such thing; do this")
    assert run("raise KeyboardInterrupt") == (130, "interrupted")
    code, err = run("raise ValueError('bug')")
    assert code == 1 and "Traceback" in err
    read, written = os.pipe()
    os.close(read)  # nobody listens any more
    done = subprocess.run([sys.executable, "-c", "import data\ndata.cli(lambda: print('x' * 99999))"], stdout=written,
                          stderr=subprocess.PIPE, cwd=os.path.dirname(os.path.abspath(data.__file__)))
    os.close(written)
    assert (done.returncode, done.stderr) == (0, b""), done


def test_data_py_prints_a_summary():
    out = io.StringIO()
    with fresh_cache(), contextlib.redirect_stdout(out):
        data.main(["demo", "--max-length", "60", "--max_samples", "50"])
    text = out.getvalue()
    assert "negative" in text and "longer than 60" in text and "synthetic" in text and "1,000" in text and "100 %" in text
    assert text.count("'") >= 6, "three examples"


# --- eval.py ---
def run_eval(argv):
    """eval.main(argv) -> (stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        evaluation.main(argv)
    return out.getvalue(), err.getvalue()


def dump(value, lines=False):
    """value as a JSON file (one item per line with lines=True; str and bytes as they are) -> its path."""
    path = os.path.join(tmp(), "file.json")
    if lines:
        value = "\n".join(json.dumps(item) for item in value) + "\n"
    elif not isinstance(value, (str, bytes)):
        value = json.dumps(value)
    with open(path, "wb") as f:
        f.write(value if isinstance(value, bytes) else value.encode())
    return path


def close(a, b, tol=1e-12):
    return np.allclose(a, b, rtol=tol, atol=tol)


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
    m = evaluation.metrics(probs, [0, 0, 1, 1], ["neg", "pos"])              # predictions 0 0 1 0
    assert m["confusion"] == [[2, 0], [1, 1]] and m["n"] == 4 and m["accuracy"] == 0.75 and m["majority_accuracy"] == 0.5
    want = dict(neg=dict(precision=2 / 3, recall=1.0, f1=0.8, support=2),
                pos=dict(precision=1.0, recall=0.5, f1=2 / 3, support=2))
    for label in want:
        assert all(close(m["per_class"][label][key], want[label][key]) for key in want[label])
    assert close(m["macro_f1"], (0.8 + 2 / 3) / 2) and close(m["weighted_f1"], m["macro_f1"])
    assert close(m["mcc"], (2 * 1 - 0 * 1) / np.sqrt(3 * 1 * 2 * 2))         # (TP TN - FP FN) / sqrt(...)
    assert close(m["nll"], -(np.log(0.9) + np.log(0.6) + np.log(0.7) + np.log(0.2)) / 4)
    assert close(m["brier"], 2 * (0.1 ** 2 + 0.4 ** 2 + 0.3 ** 2 + 0.8 ** 2) / 4)
    assert close(m["ece"], (0.1 + 0.4 + 0.3 + 0.8) / 4)                      # four bins of one row each
    assert m["ci95"] == [0.25, 1.0]                                         # Binomial(4, 3/4): P(0) 0.4 %, P(1) 4.7 %
    assert m["coverage"] == 1.0
    json.dumps(m, allow_nan=False)


def test_metrics_corners():
    m = evaluation.metrics(np.array([[1.0, 0.0], [1.0, 0.0]]), [0, 1], ["a", "b"])
    assert np.isfinite(m["nll"]) and m["nll"] > 300 and m["brier"] == 1.0 and m["mcc"] == 0.0       # p = 0 is clipped
    m = evaluation.metrics(np.eye(2)[[0, 0, 0]], [0, 0, 0], ["a", "b"])      # one class in y, all right
    assert m["accuracy"] == 1 and m["ci95"] == [1, 1] and m["mcc"] == 0 and m["nll"] == 0 and m["macro_f1"] == 1
    m = evaluation.metrics(None, [0, 1, 1], ["a", "b"], pred=[0, 1, 0])
    assert m["nll"] is m["brier"] is m["ece"] is None and close(m["accuracy"], 2 / 3)
    m = evaluation.metrics(np.full((3, 2), 0.5), [0, 1, 1], ["a", "b"], pred=[-1, 1, -1])
    assert close(m["accuracy"], 1 / 3) and close(m["coverage"], 1 / 3) and m["confusion"] == [[0, 0], [0, 1]]
    assert m["per_class"]["b"]["support"] == 2 and m["per_class"]["b"]["recall"] == 0.5
    m = evaluation.metrics(None, [0, 1], ["a", "b"], pred=[-1, -1])          # nothing answered
    assert m["accuracy"] == m["mcc"] == m["macro_f1"] == 0


def test_metrics_equal_scikit_learn():
    try:
        from sklearn import metrics as sk
    except ImportError:
        skip("scikit-learn is not installed")
    for seed in range(5):
        probs, y = random_case(seed=seed)
        pred, labels = probs.argmax(1), list("abcde")
        m = evaluation.metrics(probs, y, labels)
        assert (pred != 3).all() and (y != 1).all()
        assert close(m["accuracy"], sk.accuracy_score(y, pred)) and close(m["mcc"], sk.matthews_corrcoef(y, pred))
        for key in ("macro", "weighted"):
            assert close(m[key + "_f1"], sk.f1_score(y, pred, average=key, zero_division=0))
        table = sk.precision_recall_fscore_support(y, pred, labels=range(5), zero_division=0)
        mine = [[c[key] for c in m["per_class"].values()] for key in ("precision", "recall", "f1", "support")]
        assert close(mine, table) and m["confusion"] == sk.confusion_matrix(y, pred, labels=range(5)).tolist()
        assert close(m["nll"], sk.log_loss(y, probs, labels=range(5)), 1e-9)
        two = evaluation.metrics(probs[:, :2] / probs[:, :2].sum(1, keepdims=True), y % 2, ["a", "b"])
        assert close(two["brier"], 2 * sk.brier_score_loss(y % 2, probs[:, 1] / probs[:, :2].sum(1)))
        silent = np.where(np.arange(len(y)) % 7 == 0, -1, pred)              # abstentions: a class of their own in the MCC
        assert close(evaluation.metrics(None, y, labels, pred=silent)["mcc"], sk.matthews_corrcoef(y, silent))


def test_ece():
    p = np.repeat([0.55, 0.75, 0.95], 200)
    probs = np.stack([p, 1 - p], 1)
    y = np.concatenate([np.arange(200) >= round(200 * q) for q in (0.55, 0.75, 0.95)]).astype(int)   # right as often as said
    assert close(evaluation.metrics(probs, y, ["a", "b"])["ece"], 0, 1e-9)
    sure = np.tile([0.99, 0.01], (1000, 1))                                  # says 99 %, is right in 70 %
    assert close(evaluation.metrics(sure, (np.arange(1000) >= 700).astype(int), ["a", "b"])["ece"], 0.29, 1e-9)
    count, top, right = evaluation.reliability(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 1]))
    assert count.sum() == 2 and count[14] == 1 and count[7] == 1 and top[14] == 1 and right[7] == 0


def test_mcnemar():
    def pair(a, b, rest=50):                                                 # a: only first right, b: only other right
        first = np.array([1] * a + [0] * b + [1] * rest, bool)
        other = np.array([0] * a + [1] * b + [1] * rest, bool)
        return evaluation.compare(first, other)
    t = pair(1, 9)
    assert close(t["p"], 2 * (1 + 10) / 1024) and t["test"] == "exact binomial"
    assert close(t["difference"], 8 / 60) and t["ci95"][0] < 8 / 60 < t["ci95"][1]
    assert (t["only_first_right"], t["only_other_right"]) == (1, 9)
    assert pair(0, 0)["p"] == 1 and pair(5, 5)["p"] == 1 and close(pair(0, 6)["p"], 2 / 64)
    t = pair(121, 59)   # a textbook example
    assert t["test"] == "chi-squared" and close(t["p"], 5.450e-6, 1e-3) and t["ci95"][1] < 0
    assert close(pair(40, 60)["p"], 0.0574, 1e-3)                            # chi2 = 19^2 / 100 = 3.61
    assert pair(30, 30)["p"] == 1                                            # the correction must not turn 0 into 1 / 60


def test_bootstrap_interval():
    rng, n, true, inside = np.random.default_rng(0), 200, 0.8, 0
    for i in range(300):                                                     # about 95 % of all intervals hold the truth
        y = (rng.random(n) >= true).astype(int)
        m = evaluation.metrics(None, y, ["a", "b"], seed=i, pred=np.zeros(n, int))
        inside += m["ci95"][0] <= true <= m["ci95"][1]
    assert 0.90 <= inside / 300 <= 0.985, inside
    half = 1.96 * np.sqrt(m["accuracy"] * (1 - m["accuracy"]) / n)
    assert close(m["ci95"], [m["accuracy"] - half, m["accuracy"] + half], 0.02)
    again = evaluation.metrics(None, y, ["a", "b"], seed=299, pred=np.zeros(n, int))
    assert again["ci95"] == m["ci95"]                                        # seeded


def test_report_fits():
    for k in (2, 5, 12, 20, 77):
        rng = np.random.default_rng(k)
        labels = [f"a rather long name of a class, number {i}" if k > 4 else f"class{i}" for i in range(k)]
        y = rng.integers(0, k, 3000)
        text = evaluation.report(evaluation.metrics(rng.dirichlet(np.ones(k), 3000), y, labels), labels)
        assert max(map(len, text.split("\n"))) <= 100, (k, max(map(len, text.split("\n"))))
        assert ("confusion matrix" in text) == (k <= 12) and "NLL" in text   # 20 columns do not fit beside 30 letters
    labels = [f"topic {i}" for i in range(20)]
    m = evaluation.metrics(None, np.arange(20), labels, pred=np.arange(20))
    assert "confusion matrix" in evaluation.report(m, labels)


def test_preds_and_labels():
    items = [dict(label="b", probs=dict(b=0.9, a=0.1)), dict(label="a", probs=dict(a=0.8, b=0.2)),
             dict(label="a", probs=dict(a=0.7, b=0.3))]
    truth = ["b", "a", "b"]
    for lines in (False, True):                                              # a list, or what predict.py --json writes
        preds = dump([dict(item, text="x") for item in items] if lines else items, lines)
        out = os.path.join(tmp(), "numbers.json")
        text, _ = run_eval(["--preds", preds, "--labels", dump(truth), "--json", out])
        numbers = data.read_json(out)
        m = numbers["runs"][0]
        assert numbers["labels"] == ["b", "a"]                               # the order of the first item's probs
        assert m["confusion"] == [[1, 1], [0, 1]] and close(m["nll"], -(np.log(0.9) + np.log(0.8) + np.log(0.3)) / 3)
        assert "accuracy 0.6667" in text and "NLL" in text and numbers["comparisons"] == []
    text, tables = run_eval(["--preds", dump(["b", None, "a"]), "--labels", dump(truth), "--json", "-"])
    m = json.loads(text)["runs"][0]                                          # stdout is JSON and nothing else
    assert m["nll"] is None and m["coverage"] == 2 / 3 and m["accuracy"] == 1 / 3
    assert "coverage 0.6667: 1 texts got no label" in tables and "accuracy on the others 0.5000" in tables
    text, _ = run_eval(["--preds", dump([dict(items[0], label=None)] + items[1:]), "--labels", dump(truth)])
    assert "coverage" in text and "NLL 0.5108" in text   # its probabilities still count


def test_preds_errors():
    p, truth = dict(a=0.5, b=0.5), ["a", "b"]
    good = dump([dict(label="a", probs=p), dict(label="b", probs=p)])

    def wrong(preds, labels, match):
        preds, labels = (x if isinstance(x, str) and os.path.exists(x) else dump(x) for x in (preds, labels))
        return raises(UserError, run_eval, ["--preds", preds, "--labels", labels], match=match)

    def probs(**p):
        return [dict(label="a", probs=dict(a=0.5, b=0.5)), dict(label="a", probs=p)]
    wrong(good, ["a"], "has 2 predictions but")
    wrong(good, ["a", "c"], "item 2: 'c' is not among the classes")
    wrong(["a", "c"], truth, "item 2: 'c' is not among the labels (a, b)")
    wrong([dict(label="a", probs=p), dict(label="c", probs=p)], truth, "item 2: 'c' is not among the labels")
    wrong([], truth, "is empty")
    wrong(good, [], "is empty")
    wrong("", truth, "is empty")
    wrong('["a", ', truth, "cannot be read as JSON")
    wrong("[" * 100000, truth, "cannot be read as JSON")
    wrong(b'["\xff"]', truth, "cannot be read as JSON")
    wrong(good, [0, 1], "item 1: 0 is not a label")
    wrong(["a", 1], truth, "item 2 has no \"label\"")
    wrong([dict(label="a"), dict(text="x")], truth, "item 2 has no \"label\"")
    wrong(probs(a=1.0), truth, "item 2: \"probs\" must give one probability to each of a, b")
    wrong(probs(a=0.5, b=0.3, c=0.2), truth, "item 2: \"probs\" must give one")
    wrong([dict(label="a", probs=p), "b"], truth, "in every item or in none")
    wrong(["b", dict(label="a", probs=p)], truth, "in every item or in none")
    wrong([dict(label="a", probs=[0.5, 0.5])] * 2, truth, "must give one probability")
    wrong(probs(a=0.5, b=0.6), truth, "sum to 1.1")
    wrong(probs(a=-0.5, b=1.5), truth, "from 0 to 1")
    wrong(probs(a=float("nan"), b=0.5), truth, "from 0 to 1")
    wrong(probs(a=10 ** 400, b=0.5), truth, "from 0 to 1")
    wrong(probs(a="0.5", b=0.5), truth, "from 0 to 1")
    both = ["--preds", good, "--labels", dump(truth)]
    missing = os.path.join(tmp(), "none.json")
    raises(UserError, run_eval, ["--preds", missing] + both[2:], match="none.json cannot be read")
    raises(UserError, run_eval, [], match="give either run folders or --preds")
    raises(UserError, run_eval, ["runs/x"] + both, match="not both")
    raises(UserError, run_eval, both[:2], match="--preds and --labels go together")
    raises(UserError, run_eval, ["runs/x"] + both[2:], match="--preds and --labels go together")
    for flag, value in dict(split="test", data="demo", val=good, test=good, text_col="t", label_col="l", data_dir=".",
                            device="cpu", dtype="fp32").items():
        raises(UserError, run_eval, both + ["--" + flag, value], match=f"--{flag} has no meaning with --preds")
    raises(UserError, run_eval, [tmp()], match="is not a run")
    raises(UserError, run_eval, ["runs/x", "--val", good], match="--val needs --data")
    raises(UserError, run_eval, ["runs/x", "--text_col", "t"], match="--text_col needs --data")
    raises(UserError, run_eval, ["runs/x", "--test", good, "--split", "val"], match="--split has no meaning")


def fake_run(labels, logits, data_args=None, log=()):
    """A run folder whose model is a table: text 'i' gets logits[i]."""
    path = tmp()
    args = dict(data="fake", seed=1, data_dir=None, val=None, test=None, text_col=None, label_col=None, max_samples=None,
                balance=False, quick=False, max_length=8, truncate="head")
    args.update(data_args or {})
    info = dict(labels=labels, method="head", kind="cls", model="nano", data="fake", seed=args["seed"], args=args, base={})
    data.write_json(os.path.join(path, "run.json"), info)
    data.write_json(os.path.join(path, "table.json"), np.asarray(logits).tolist())
    data.write_atomic(os.path.join(path, "log.jsonl"), "".join(json.dumps(row) + "\n" for row in log) + '{"step": 9, "lo')
    return path


@contextlib.contextmanager
def fake_world(labels, y, train=()):
    """data.load gives texts '0', '1', ... with these labels; lora.open_run opens fake_run's folders."""
    import lora
    calls = []

    def load(name, **kw):
        calls.append(dict(kw, name=name))
        split = SimpleNamespace(texts=[str(i) for i in range(len(y))], y=np.array(y))
        seen = SimpleNamespace(texts=list(train), y=np.zeros(len(train), int))
        return SimpleNamespace(name=name, labels=labels, train=seen, val=split, test=split, notes=[])

    def open_run(path, device="auto", dtype="auto"):
        info, table = (data.read_json(os.path.join(path, name)) for name in ("run.json", "table.json"))
        return SimpleNamespace(path=path, info=info, labels=info["labels"], device="cpu", dtype="torch.float32", reason="",
                               kind="cls", calibrated=lambda logits: logits,
                               logits=lambda texts, **kw: np.array([table[int(t)] for t in texts], np.float32))
    before = data.load, lora.open_run
    data.load, lora.open_run = load, open_run
    try:
        yield calls
    finally:
        data.load, lora.open_run = before


def test_runs_labels_by_name():
    y = np.array([0, 1, 1, 0, 1, 0])
    right = 4.0 * np.eye(2)[y]                   # logits that are always right
    with fake_world(["neg", "pos"], y, train=["0", "1", "x"]) as calls:
        a = fake_run(["neg", "pos"], right)
        text, _ = run_eval([a])
        assert "accuracy 1.0000" in text and data.read_json(os.path.join(a, "eval_results.json"))["n"] == 6
        assert calls[-1]["name"] == "fake" and calls[-1]["seed"] == 1 and calls[-1]["balance"] is False
        b = fake_run(["pos", "neg"], right[:, ::-1], dict(seed=2))           # the same model, classes in the other order
        out = os.path.join(tmp(), "numbers.json")
        text, _ = run_eval([a, b, "--json", out])
        numbers = data.read_json(out)
        assert [m["accuracy"] for m in numbers["runs"]] == [1, 1] and numbers["runs"][0]["nll"] == numbers["runs"][1]["nll"]
        assert numbers["comparisons"][0]["p"] == 1 and "the difference is within noise (p = 1" in text
        assert "trained on another split; 2 of these texts were in it" in text
        assert not os.path.exists(os.path.join(b, "eval_results.json"))
        c = fake_run(["neg", "pos"], -right)
        os.remove(os.path.join(a, "eval_results.json"))
        text, _ = run_eval([a, c, "--split", "val"])
        assert "is better (p = 0.031, exact binomial)" in text and "+0 rows" not in text and "0 rows gained, 6 lost" in text
        run_eval([a, "--data", "other"])
        assert calls[-1]["name"] == "other" and calls[-1]["seed"] == 1
        run_eval([a, "--test", "new.csv"])
        assert calls[-1]["name"] == calls[-1]["test"] == calls[-1]["val"] == "new.csv"
        assert not os.path.exists(os.path.join(a, "eval_results.json"))      # another data set or split leaves it alone
        d = fake_run(["neg", "neutral"], right)
        raises(UserError, run_eval, [a, d], match="compare runs with the same labels")
        raises(UserError, run_eval, [fake_run(["neg", "pos"], right * np.nan)], match="not finite")
        raises(UserError, run_eval, [d], match="does not know (pos; it knows neg, neutral)")
    with fake_world(["pos", "neg"], 1 - y):                                  # the data's order differs from the run's
        assert "accuracy 1.0000" in run_eval([a, "--data", "other"])[0]
    data.write_json(os.path.join(a, "run.json"), dict(labels=[], args={}))
    raises(UserError, run_eval, [a], match="is not one that")


def test_plots():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        skip("matplotlib is not installed")
    probs, y = random_case()
    labels, log = list("abcde"), [dict(step=i, loss=2 / (i + 1), lr=1e-3) for i in range(1, 9)]
    log += [dict(step=4, val_loss=0.6, val_accuracy=0.7), dict(step=8, val_loss=0.5, val_accuracy=0.8)]
    log += [dict(step=8, val_loss=0.4)]                                      # logged again after a resume
    with fake_world(labels, y):
        a, b = fake_run(labels, np.log(probs), log=log), fake_run(labels, 3 * np.log(probs), log=log)
        assert evaluation.read_log(os.path.join(a, "log.jsonl"))["val_loss"] == ((4, 8), (0.6, 0.4))
        for runs in ([a], [a, b]):
            out = os.path.join(tmp(), "plots")
            text, _ = run_eval(runs + ["--plot", out])
            assert sorted(os.listdir(out)) == ["confusion.png", "curves.png", "reliability.png"]
            assert text.count("wrote ") == 3
            for name in os.listdir(out):
                with open(os.path.join(out, name), "rb") as f:
                    assert f.read(8) == b"\x89PNG\r\n\x1a\n"
    out = tmp()
    argv = ["--preds", dump(["a", "b"]), "--labels", dump(["a", "b"]), "--plot"]
    run_eval(argv + [out])
    assert os.listdir(out) == ["confusion.png"]                              # no log, no probabilities
    raises(UserError, run_eval, argv + [dump("x")], match="cannot be made a folder")


def test_plot_without_matplotlib():
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "matplotlib"}
    sys.modules["matplotlib"] = None                                         # any import of it now fails
    try:
        argv = ["--preds", dump(["a"]), "--labels", dump(["a"])]
        raises(UserError, run_eval, argv + ["--plot", tmp()], match="pip install matplotlib")
        assert "accuracy 1.0000" in run_eval(argv)[0]                        # nothing else needs it
    finally:
        del sys.modules["matplotlib"]
        sys.modules.update(hidden)


# --- model.py ---

SMALL = gpt.Config(n_layer=3, n_head=4, n_embd=64, block_size=256, vocab_size=257)
METHODS = dict(lora=dict(r=4), head={}, last=dict(last=2), full={}, adapter=dict(bottleneck=8), prompt=dict(prompt=5))


def formula_model(cfg=SMALL, num_labels=3):
    """A GPT whose weights are a formula, the same on every machine and in every version of torch."""
    model = GPT(cfg, num_labels)
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 12.9898 + k) * 43758.5453
            noise = (2 * (wave - wave.floor()) - 1).view(p.shape)           # looks uniform in -1 .. 1
            p.copy_(1 + 0.1 * noise if '.ln_' in name and name.endswith('weight') or name == 'ln_f.weight' else 0.3 * noise)
    return model.eval()


def ragged(vocab, lengths=(7, 1, 30, 12), pad=None, extra=0, seed=0):
    """ids (B, max + extra) right-padded with `pad` (random ids when None), lengths (B,)."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab - 1, (len(lengths), max(lengths) + extra), generator=g)
    if pad is not None:
        for row, n in zip(ids, lengths):
            row[n:] = pad
    return ids, torch.tensor(lengths)


def far(a, b):
    """Largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def stirred(model, seed=0):
    """What training would have moved: every trainable tensor that starts at zero gets random values."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not p.any():
                p.normal_(0, 0.05, generator=g)
    return model.eval()




GOLDEN_CLASS = [[-0.1365244, -1.0958053, 1.6796055],
                [-1.3674160, -3.0564530, -0.6827729],
                [1.1845060, -1.4639315, 2.2462472],
                [0.2685358, -1.5401258, 0.3566168]]
GOLDEN_LM = [[0.0429622, 1.5568747, -0.5584779, -3.8660697],
                [-0.9938234, 0.9918339, -1.2921475, -2.3741940],
                [-0.5403783, 1.2652088, -0.6159189, -1.8866494],
                [-1.1541725, 1.2015047, -2.6051303, -3.4585470]]


def test_golden_logits():
    """Logits of the formula model, computed once by transformers 5.23 (GPT2ForSequenceClassification, GPT2LMHeadModel) in float32."""
    ids, lengths = ragged(257, pad=256)
    model = formula_model()
    with torch.no_grad():
        logits, lm = model.classify(ids, lengths), model.lm_logits(ids)
    assert far(logits, torch.tensor(GOLDEN_CLASS)) < 1e-5, logits
    assert far(lm[torch.arange(4), lengths - 1, :4], torch.tensor(GOLDEN_LM)) < 1e-5, lm[torch.arange(4), lengths - 1, :4]
    with patched(torch.nn.functional, 'gelu', lambda x, approximate, real=torch.nn.functional.gelu: real(x)), torch.no_grad():
        assert far(model.classify(ids, lengths), torch.tensor(GOLDEN_CLASS)) > 1e-4          # the exact GELU would be seen


def hf_models(folder, cfg, num_labels=3, seed=0):
    """Random GPT-2s of that shape written by transformers' save_pretrained -> (classifier, its folder, language model, its folder)."""
    try:
        from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
    except ImportError:
        skip('transformers is not installed')
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head,
                        num_labels=num_labels, pad_token_id=cfg.vocab_size - 1, bos_token_id=cfg.vocab_size - 1, eos_token_id=cfg.vocab_size - 1)
    out = []
    for cls, name in ((GPT2ForSequenceClassification, 'cls'), (GPT2LMHeadModel, 'lm')):
        model = cls(config).eval()
        model.save_pretrained(os.path.join(folder, name))
        out += [model, os.path.join(folder, name)]
    return out


def parity(cfg):
    hf_cls, cls_dir, hf_lm, lm_dir = hf_models(tmp(), cfg)
    ids, lengths = ragged(cfg.vocab_size, pad=cfg.vocab_size - 1)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        ours, theirs = GPT.load(cls_dir, num_labels=3).eval().classify(ids, lengths), hf_cls(ids, attention_mask=mask).logits
        assert far(ours, theirs) < 1e-5, far(ours, theirs)
        ours, theirs = GPT.load(lm_dir).eval().lm_logits(ids), hf_lm(ids, attention_mask=mask).logits
        real = mask.bool()
        assert far(ours[real], theirs[real]) < 1e-5, far(ours[real], theirs[real])


def test_parity_small():
    parity(SMALL)


def test_parity_gpt2_124m():
    parity(gpt.SHAPES['gpt2'])


def test_shapes():
    sizes = dict(gpt2=124_439_808, distilgpt2=81_912_576)
    sizes.update({'gpt2-medium': 354_823_168, 'gpt2-large': 774_030_080, 'gpt2-xl': 1_557_611_200})
    with torch.device('meta'):
        for name, n in sizes.items():
            assert sum(p.numel() for p in GPT(gpt.SHAPES[name]).parameters()) == n, name


def save_raw(folder, tensors, name='model.safetensors', config=True):
    os.makedirs(folder, exist_ok=True)
    if name.endswith('.bin'):
        torch.save(tensors, os.path.join(folder, name))
    else:
        gpt.save_safetensors(os.path.join(folder, name), tensors)
    if config:
        gpt.data.write_json(os.path.join(folder, 'config.json'),
                            dict(model_type='gpt2', vocab_size=257, n_positions=256, n_embd=64, n_layer=3, n_head=4))
    return folder


def test_load_every_style():
    model = formula_model()
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids, lengths = ragged(257, pad=256)
    want = model.classify(ids, lengths)
    prefixed = {n if n == 'score.weight' else 'transformer.' + n: t for n, t in plain.items()}
    masks = {**{f'h.{i}.attn.bias': torch.ones(1, 1, 4, 4) for i in range(3)}, 'h.0.attn.masked_bias': torch.tensor(-1e4)}
    tied = {'lm_head.weight': plain['wte.weight'].clone()}
    for tensors, name in ((plain, 'model.safetensors'), (prefixed, 'model.safetensors'), ({**plain, **masks, **tied}, 'model.safetensors'),
                          (prefixed, 'pytorch_model.bin')):
        got = GPT.load(save_raw(tmp(), tensors, name), num_labels=3).eval().classify(ids, lengths)
        assert torch.equal(got, want)
    half = GPT.load(save_raw(tmp(), {n: t.half() for n, t in plain.items()}), num_labels=3).eval()
    assert far(half.classify(ids, lengths), want) < 0.02 and half.wte.weight.dtype == torch.float32
    folder, names = tmp(), list(plain)
    for i, part in enumerate((names[:5], names[5:])):
        gpt.save_safetensors(os.path.join(folder, f'model-{i}.safetensors'), {n: plain[n] for n in part})
    data.write_json(os.path.join(folder, 'model.safetensors.index.json'), dict(weight_map={n: f'model-{int(i >= 5)}.safetensors' for i, n in enumerate(names)}))
    save_raw(folder, {}, 'unused.safetensors')
    assert torch.equal(GPT.load(folder, num_labels=3).eval().classify(ids, lengths), want)
    assert GPT.load(folder).cfg == SMALL and not hasattr(GPT.load(folder), 'score')


def test_load_refuses():
    plain = {n: p.detach().clone() for n, p in formula_model().named_parameters()}

    def load(change, **kw):
        tensors = dict(plain)
        change(tensors)
        return GPT.load(save_raw(tmp(), tensors), num_labels=3)
    raises(UserError, load, lambda t: t.pop('h.1.ln_2.bias'), match='h.1.ln_2.bias is missing')
    raises(UserError, load, lambda t: t.update(extra=torch.ones(2)), match='extra is unexpected')
    raises(UserError, load, lambda t: t.update({'h.0.attn.c_attn.weight': torch.ones(192, 64)}), match='(192, 64) where (64, 192) belongs')
    raises(UserError, load, lambda t: t.update({'lm_head.weight': torch.ones(257, 64)}), match='untied')
    raises(UserError, load, lambda t: t.update({'score.weight': torch.ones(2, 64)}), match='score.weight')
    raises(UserError, load, lambda t: t.pop('score.weight'), match='score.weight is missing')
    raises(UserError, GPT.load, tmp(), match='holds no model.safetensors')
    raises(UserError, GPT.load, os.path.join(tmp(), 'none'), match='no such folder')
    folder = save_raw(tmp(), plain, config=False)
    raises(UserError, GPT.load, folder, match='no config.json')
    for bad in (dict(model_type='bert'), dict(activation_function='relu'), dict(n_head=7), dict(n_layer='x')):
        save_raw(folder, plain)
        path = os.path.join(folder, 'config.json')
        data.write_json(path, {**data.read_json(path), **bad})
        raises(UserError, GPT.load, folder, match='config.json')
    with open(os.path.join(folder, 'pytorch_model.bin'), 'wb') as f:
        f.write(b'no checkpoint')
    os.remove(os.path.join(folder, 'model.safetensors'))
    raises(UserError, GPT.load, folder, match='pytorch_model.bin')


def test_bin_runs_no_code():
    folder, mark = save_raw(tmp(), {}), os.path.join(tmp(), 'ran')

    class Evil:
        def __reduce__(self):
            return open, (mark, 'w')
    torch.save({'wte.weight': Evil()}, os.path.join(folder, 'pytorch_model.bin'))
    os.remove(os.path.join(folder, 'model.safetensors'))
    raises(UserError, GPT.load, folder, match='without running code')
    assert not os.path.exists(mark)


def test_safetensors():
    path, g = os.path.join(tmp(), 'x.safetensors'), torch.Generator().manual_seed(0)
    tensors = dict(a=torch.randn(3, 5, generator=g), b=torch.arange(7, dtype=torch.int64), c=torch.tensor(2.5), d=torch.empty(0, 4),
                   e=torch.randn(3, generator=g).bfloat16(), f=torch.tensor([True, False, True]), g=torch.randn(4, 4, generator=g).t())
    gpt.save_safetensors(path, tensors)
    back = gpt.load_safetensors(path)
    assert list(back) == list(tensors) and all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())
    before = data.read_bytes(path)
    back['a'].zero_()
    assert data.read_bytes(path) == before                              # memory-mapped, but the file stays what it is
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        skip('safetensors is not installed (reader and writer were tested on each other)')
    theirs = load_file(path)
    assert all(torch.equal(theirs[n], t) for n, t in tensors.items())
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    assert all(torch.equal(gpt.load_safetensors(path)[n], t) for n, t in tensors.items())


def test_safetensors_broken():
    path = os.path.join(tmp(), 'x.safetensors')
    gpt.save_safetensors(path, dict(a=torch.ones(8), b=torch.ones(8)))
    good = data.read_bytes(path)
    n = struct.unpack('<Q', good[:8])[0]

    def header(**change):
        h = json.loads(good[8:8 + n])
        for key, value in change.items():
            h['a'][key] = value
        text = json.dumps(h).encode()
        return struct.pack('<Q', len(text)) + text + good[8 + n:]
    for raw in (b'', b'abc', good[:4], good[:20], good[:-1], good + b'x', struct.pack('<Q', 1 << 60) + good[8:], good[:8] + b'?' * n + good[8 + n:],
                header(dtype='F31'), header(shape=[9]), header(shape=[-8]), header(shape='x'), header(shape=[True] * 3), header(data_offsets=[4, 36]),
                header(data_offsets=[32, 64]), header(data_offsets=[0, 1 << 50], shape=[1 << 48]), struct.pack('<Q', 2) + b'[]', header(shape=[1 << 70])):
        with open(path, 'wb') as f:
            f.write(raw)
        raises(UserError, gpt.load_safetensors, path, match='safetensors')


def test_pad_invariance():
    """Six methods: a text alone, in a batch, and padded further with any id gives the same logits."""
    for cfg, lengths, extra in ((SMALL, (7, 1, 30, 12), 200), (gpt.SHAPES['distilgpt2'], (40, 3), 200)):
        base = GPT(cfg, 3).init_weights(torch.Generator().manual_seed(0))
        for method, options in METHODS.items():
            torch.manual_seed(0)
            model = copy.deepcopy(base)
            lora.adapt(model, method, **options)
            stirred(model)
            with torch.no_grad():
                ids, n = ragged(cfg.vocab_size, lengths)
                want = torch.cat([model(ids[i:i + 1, :k], n[i:i + 1]) for i, k in enumerate(lengths)])
                assert float((want[0] - want[1]).abs().max()) > 1e-3 * float(want.abs().max())       # the texts do differ
                for pad in (0, cfg.vocab_size - 1, None):
                    padded, n = ragged(cfg.vocab_size, lengths, pad, extra)
                    for i, k in enumerate(lengths):
                        padded[i, :k] = ids[i, :k]
                    assert far(model(padded, n), want) < 1e-5, (cfg, method, pad, far(model(padded, n), want))


def test_wrong_pooling_would_be_seen():
    """The test above can fail: pooling at -1 is far outside its tolerance."""
    model, (ids, lengths) = formula_model(), ragged(257, pad=256)
    with torch.no_grad():
        wrong = model.score(model.hidden(ids)[:, -1])
        assert far(wrong, model(ids, lengths)) > 0.05


def test_last_position_equals_the_whole():
    """The last block computes one position per text; the logits are those of computing them all, and so are the gradients."""
    model, (ids, lengths) = formula_model(), ragged(257, pad=256)
    grads = []
    for logits in (model(ids, lengths), model.score(model.hidden(ids)[torch.arange(4), lengths - 1])):
        model.zero_grad()
        logits.square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert far(model(ids, lengths), logits) < 1e-5
    assert all(float((grads[0][n] - g).abs().max()) <= 1e-4 * float(g.abs().max()) for n, g in grads[1].items())


def test_precision_choice():
    device, dtype, reason = gpt.pick_device('cpu')
    assert (dtype == torch.bfloat16) == gpt.cpu_has_bf16() and reason
    assert gpt.pick_device('cpu', 'fp32')[1] == torch.float32
    raises(UserError, gpt.pick_device, 'cpu', 'fp16', match='GPU')
    raises(UserError, gpt.pick_device, 'abacus', match='abacus')
    if not torch.cuda.is_available():
        raises(UserError, gpt.pick_device, 'cuda', match='cuda')


def test_bf16_autocast_is_close():
    """The bf16 path (frozen weights stored in bf16, trainable ones in float32) stays within bf16's rounding of the float32 path."""
    ids, n = ragged(257, pad=256)
    for method, options in METHODS.items():
        torch.manual_seed(0)
        model = formula_model()
        lora.adapt(model, method, **options)
        stirred(model)
        with torch.no_grad():
            want = model(ids, n)
        gpt.place(model, torch.device('cpu'), torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in lora.trainables(model).values())
        assert (method == 'full') != any(p.dtype == torch.bfloat16 for p in model.parameters())
        with torch.no_grad(), gpt.autocast(torch.device('cpu'), torch.bfloat16):
            got = model(ids, n)
        assert far(got.float(), want) < 0.05, (method, far(got.float(), want))
        state = model.float32_state()
        assert all(t.dtype == torch.float32 for t in state.values())
        if method == 'last':                                            # rounded weights come back as they were
            assert torch.equal(state['h.0.mlp.c_fc.weight'], formula_model().h[0].mlp.c_fc.weight)


def needs_packing():
    if not gpt.Packed.possible(torch.device('cpu'), torch.bfloat16):
        skip('this processor or this torch packs no bfloat16 weights')


def packed_layer(W, b):
    layer = gpt.Conv1D(*W.shape).requires_grad_(False)
    layer.weight.data, layer.bias.data, layer.packs = W.float(), b.float(), True
    return layer


def test_packed_product():
    """A packed product, its gradient and its GELU are no further from float64 than one rounding to bfloat16, at widths that no block divides."""
    needs_packing()
    torch.manual_seed(0)
    for n_in, n_out, rows in ((96, 33, (7,)), (70, 256, (3, 5)), (8, 8, (1,))):
        W, b, x = (torch.randn(*s, dtype=torch.bfloat16) for s in ((n_in, n_out), (n_out,), (*rows, n_in)))
        layer, exact = packed_layer(W, b), x.double() @ W.double() + b.double()
        x.requires_grad_()
        y = layer(x)
        g = torch.randn_like(y)
        y.backward(g)
        with torch.no_grad():
            z = layer(x, gelu=True)
        for got, want in ((y, exact), (x.grad, g.double() @ W.double().t()), (z, torch.nn.functional.gelu(exact, approximate='tanh'))):
            assert got.dtype == torch.bfloat16 and got.shape == want.shape
            assert ((got.double() - want).abs() <= want.abs() / 256 + 2e-3).all(), (n_in, n_out, far(got.double(), want))
    for gelu in (False, True):
        raises(AssertionError, layer.packed.product, x, gelu, match='autograd')


def test_packed_model_is_the_plain_one():
    """The same bfloat16 model with and without packing, LoRA folded in and not: both within rounding of float32, and alike in how far."""
    needs_packing()
    cpu, (ids, n) = torch.device('cpu'), ragged(257, pad=256)
    for classes in (0, 3):
        def reading(dtype, pack, freeze=True):
            torch.manual_seed(0)
            model = formula_model()
            lora.add_lora(model, 2, 4.0, 0.0, ['c_attn', 'c_fc', 'mlp.c_proj'], classes=classes)
            stirred(model)
            gpt.place(model.requires_grad_(not freeze) if freeze else model, cpu, dtype, pack=pack).eval()
            with torch.no_grad(), gpt.autocast(cpu, dtype):
                return model, model.hidden(ids).float()
        want = reading(torch.float32, True)[1]
        (plain, a), (packed, b), (open_, c) = reading(torch.bfloat16, False), reading(torch.bfloat16, True), reading(torch.bfloat16, True, freeze=False)
        errors = [float((h - want).abs().mean()) for h in (a, b, c)]
        assert max(errors) < 1.5 * errors[0] < 0.05 and min(errors) > 0, errors
        fc, proj = packed.h[0].mlp.c_fc, packed.h[0].attn.c_proj
        assert fc.folded is not None and fc.base.packed is None and proj.packed is not None     # each packed once, in one form
        assert open_.h[0].mlp.c_fc.folded is None and plain.h[0].attn.c_proj.packed is None
        assert torch.equal(packed.float32_state()['h.0.attn.c_proj.weight'], formula_model().h[0].attn.c_proj.weight)


def test_packed_lora_is_its_formula():
    """Values and all gradients, with dropout and without, of one update and of three, against float64 and the same mask."""
    needs_packing()
    for axis in ((), (3,)):
        for p in (0.0, 0.3):
            torch.manual_seed(0)
            x, A, B, g = (torch.randn(*axis, *s).to(torch.bfloat16).float() for s in ((7, 32), (4, 32), (48, 4), (7, 48)))
            W, b = torch.randn(32, 48), torch.randn(48)
            leaves = [t.double().requires_grad_() for t in (x, A, B)]
            mask = torch.ones_like(leaves[0])
            torch.manual_seed(5)
            mask.view(-1)[lora.dropped(x.numel(), p) if p else []] = 0
            exact = leaves[0] @ W.bfloat16().double() + b.bfloat16().double() + \
                (leaves[0] * mask / (1 - p)) @ leaves[1].transpose(-2, -1) @ leaves[2].transpose(-2, -1) * 0.5
            exact.backward(g.double())
            mine = [x.to(torch.bfloat16).requires_grad_(), A.requires_grad_(), B.requires_grad_()]
            layer = lora.LoRA(packed_layer(W, b), 4, 0.5, p, *axis)
            layer.A, layer.B = (torch.nn.Parameter(t) for t in mine[1:])
            mine[1:] = layer.weights
            torch.manual_seed(5)
            y = layer(mine[0])
            y.backward(g.to(torch.bfloat16))
            assert float((y - exact).detach().norm() / exact.detach().norm()) < 0.01, (axis, p)
            assert torch.equal(mine[0].detach(), x.to(torch.bfloat16))                       # not written over
            for name, t, want in zip('xAB', mine, leaves):
                assert t.grad.shape == want.shape and float((t.grad - want.grad).norm() / want.grad.norm()) < 0.01, (axis, p, name)
            assert (mask == 0).any() == (p > 0)


def test_block_as_one_node():
    """A block as one node of autograd gives what its modules give one by one: outputs, gradients of the input and of all that trains."""
    needs_packing()
    cpu, (ids, n) = torch.device('cpu'), ragged(257, pad=256)
    nodes, apply = [], gpt.Taped.apply

    def run(one, targets, classes, p):
        torch.manual_seed(0)
        model = formula_model().requires_grad_(False)
        if targets:
            lora.add_lora(model, 4, 8.0, p, targets, classes=classes)
        else:
            lora.add_prompt(model, 3, classes)
        stirred(model)
        gpt.place(model, cpu, torch.bfloat16).train()
        nodes.clear()
        for block in model.h:
            assert block.packs
            block.packs = one
        with patched(lora, 'dropped', lambda n, p, rng: torch.arange(int(1 / p), n, 3)), \
                patched(gpt.Taped, 'apply', lambda x, module, *weights: nodes.append(type(module)) or apply(x, module, *weights)), \
                gpt.autocast(cpu, torch.bfloat16):
            h = model.hidden(ids)
        (h * torch.linspace(-1, 1, h.numel()).view(h.shape)).sum().backward()
        return [h.detach()] + [w.grad for w in model.parameters() if w.requires_grad], list(nodes)
    for targets, classes, p in ((lora.TARGETS.split(','), 0, 0.0), (lora.TARGETS.split(','), 0, 0.25), (lora.TARGETS.split(','), 3, 0.25),
                                (['c_attn'], 0, 0.1), (['mlp.c_proj', 'c_fc'], 3, 0.0), (None, 0, 0.0), (None, 3, 0.0)):
        (a, whole), (b, parts) = run(True, targets, classes, p), run(False, targets, classes, p)
        assert set(whole) == {gpt.Block} and gpt.Block not in parts and len(parts) > len(whole)
        assert len(a) == len(b) == 1 + (2 * len(targets) * 3 if targets else 1), len(a)
        for x, y in zip(a, b):
            assert x.dtype == y.dtype and float(y.norm()) > 0 and far(x, y) <= 1e-5, (targets, classes, p, far(x, y))


def test_when_a_block_is_one_node():
    """Only where that says all: GPT-2's own dropout and LayerNorms that train need the modules, and LoRA's dropout is training's alone."""
    needs_packing()
    cpu, (ids, n) = torch.device('cpu'), ragged(257, pad=256)
    model = formula_model()
    lora.adapt(model, 'lora', r=4, dropout=0.5)
    stirred(model)
    model.h[1].ln_2.requires_grad_(True)
    gpt.place(model, cpu, torch.bfloat16)
    assert [block.packs for block in model.h] == [i != 1 for i in range(len(model.h))]

    def reading(train, p=0.0):
        model.train(train).set_dropout(p)
        with gpt.autocast(cpu, torch.bfloat16):
            return model.hidden(ids)
    assert torch.equal(reading(False), reading(False)) and not torch.equal(reading(True), reading(True))
    reading(False).sum().backward()
    assert model.h[1].ln_2.weight.grad.any() and model.h[0].ln_2.weight.grad is None
    for block in model.h:
        block.attn.c_attn.p = block.attn.c_proj.p = block.mlp.c_fc.p = block.mlp.c_proj.p = 0.0
    assert torch.equal(reading(True), reading(False))
    for block in model.h:
        block.mlp.resid_drop.register_forward_hook(lambda *_: seen.append(1))
    for p, times in ((0.5, len(model.h)), (0.0, 1)):                # the hook is met where the modules run: block 1's
        seen = []
        assert torch.equal(reading(True, p), reading(False)) == (p == 0) and len(seen) == times + 1, (p, seen)


def test_packing_trains_the_same():
    """One LoRA step in bfloat16, packed and not: the gradients agree within its rounding, and what is frozen has none."""
    needs_packing()
    cpu, (ids, n) = torch.device('cpu'), ragged(257, pad=256)

    def gradients(dtype, pack):
        torch.manual_seed(0)
        model = formula_model()
        lora.adapt(model, 'lora', r=4)
        stirred(model)
        gpt.place(model, cpu, dtype, pack=pack)
        with gpt.autocast(cpu, dtype):
            loss = torch.nn.functional.cross_entropy(model(ids, n).float(), torch.arange(len(ids)) % 2)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in lora.trainables(model).values()])
    want = gradients(torch.float32, False)
    plain, packed = ((gradients(torch.bfloat16, pack) - want).norm() / want.norm() for pack in (False, True))
    assert 0 < packed < 1.5 * plain < 0.1, (plain, packed)


def test_unloaded_weights_come_back():
    """What unload gives back to the system is no longer resident, and reads as before; a value that was changed stays changed."""
    if sys.platform != 'linux':
        skip('only Linux is asked to take memory back')
    path = os.path.join(tmp(), 'x.safetensors')
    gpt.save_safetensors(path, dict(x=torch.arange(16 << 20, dtype=torch.float32)))     # 64 MB
    x = gpt.load_safetensors(path)['x']

    def resident():
        return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20
    x[1000] = -1.0
    total, full = float(x.sum(dtype=torch.float64)), resident()
    gpt.unload(x)
    assert resident() < full - 40, (full, resident())
    assert x[1000] == -1 and float(x.sum(dtype=torch.float64)) == total
    y = torch.ones(1 << 20)
    gpt.unload(y)                                                       # no file's
    assert y.sum() == 1 << 20


def frozen_example(method, dtype=torch.float32, **options):
    """-> (model, data.Tokens of 40 texts, what FrozenStates and class_logits are called with besides)"""
    torch.manual_seed(0)
    model = formula_model()
    lora.adapt(model, method, **options)
    gpt.place(model, torch.device('cpu'), dtype)
    texts = [f'{i} {"word " * (i % 9)}' for i in range(40)]
    return model, data.tokenize(data.tokenizer('bytes'), texts, cache=False), (30, 'head', torch.device('cpu'), dtype)


def test_frozen_states_are_what_the_blocks_give():
    """Logits and gradients from the states that were kept equal those of the whole model, for every method that freezes the first blocks; the
    rows may come in any order and more than once; the next run finds the file and does not compute."""
    L = SMALL.n_layer
    for method, options, depth in (('head', {}, L), ('last', dict(last=1), L - 1), ('lora', dict(top=1), L - 1)):
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
            with fresh_cache():
                model, tokens, how = frozen_example(method, dtype, **options)
                assert model.frozen_depth() == depth
                states = gpt.FrozenStates(model, tokens, *how)
                want = torch.from_numpy(gpt.class_logits(model, tokens, *how))
                assert far(torch.from_numpy(gpt.class_logits(model, tokens, *how, states=states)), want) < limit, (method, dtype)
                index, grads = np.array([31, 2, 2, 17]), []
                ids, n = data.collate(tokens, index, 30, 'head', 256)
                for given in (None, states(index)):
                    model.zero_grad()
                    with gpt.autocast(torch.device('cpu'), dtype):
                        model(ids, n, states=given).float().logsumexp(1).sum().backward()
                    grads.append(torch.cat([p.grad.flatten() for p in lora.trainables(model).values() if p.grad is not None]))
                assert far(*grads) < limit * float(grads[0].abs().max()) + 1e-6 and grads[0].abs().max() > 0
                before, model.trunk = states(index), None           # computing again would fail
                assert torch.equal(gpt.FrozenStates(model, tokens, *how)(index), before) and before.dtype == torch.float32


def test_frozen_depth():
    """Nothing is kept where the first block, the embeddings or a prompt train, or GPT-2's own dropout is on."""
    for method, options in dict(METHODS, full={}, adapter={}).items():
        assert (frozen_example(method, **options)[0].frozen_depth() > 0) == (method in ('head', 'last')), method
    model = frozen_example('head')[0]
    model.set_dropout(0.1)
    assert model.frozen_depth() == 0


def test_frozen_states_are_named_after_what_they_come_from():
    """Another weight, text, length, side, depth or precision is another file; what trains is not looked at."""
    with fresh_cache():
        model, tokens, how = frozen_example('last', last=1)

        def name(model=model, tokens=tokens, how=how):
            gpt.FrozenStates(model, tokens, *how)
            return sorted(os.listdir(data.cached('frozen')))
        first = name()
        with torch.no_grad():
            model.score.weight.add_(1), model.h[-1].mlp.c_fc.weight.add_(1)
        assert name() == first and len(first) == 1
        for n, (what, change) in enumerate([('max_length', dict(how=(29, *how[1:]))), ('side', dict(how=(30, 'tail', *how[2:]))),
                                            ('text', dict(tokens=data.Tokens(tokens.flat[::-1].copy(), tokens.starts))),
                                            ('depth', dict(model=frozen_example('head')[0]))]):
            assert len(name(**change)) == n + 2, what
        with torch.no_grad():
            model.h[0].mlp.c_proj.bias[3] += 1e-3
        assert len(name()) == 6
        half, tokens, how = frozen_example('last', torch.bfloat16, last=1)
        assert len(name(half, tokens, how)) == 7


def test_frozen_states_are_limited():
    """Of the cache the files used longest ago go; without room on the disk training computes the blocks again, and says so."""
    with fresh_cache():
        for i, name in enumerate('abc'):
            os.utime(write(os.path.join('frozen', f'{name}.bin'), b'x' * 100, (os.makedirs(data.cached('frozen'), exist_ok=True), data.cache_dir())[1]), (i, i))
        with patched(gpt, 'FROZEN_BYTES', 350):
            gpt.make_room(data.cached('frozen'), 100)
        assert sorted(os.listdir(data.cached('frozen'))) == ['b.bin', 'c.bin']
        raises(UserError, gpt.make_room, data.cached('frozen'), 2**60, match='no room')
    flags = [*TINY[:-1], '--max_samples', '50', '--dtype', 'fp32', '--head', '--epochs', '2', '--lr', '1e-2']
    with fresh_cache(), patched(gpt.shutil, 'disk_usage', lambda path: SimpleNamespace(free=0)):
        out, text = train(*flags)
        assert 'again in every epoch' in text and not os.listdir(data.cached('frozen'))
    with fresh_cache():
        kept, text = train(*flags)
        assert 'again' not in text and len(os.listdir(data.cached('frozen'))) == 2           # of the training and the validation rows
        a, b = ([r['loss'] for r in records(folder) if 'loss' in r] for folder in (out, kept))
        assert len(a) > 1 and np.allclose(a, b, atol=1e-5), (a, b)


def test_embedding_rows():
    """Training the embedding rows of the ids that occur is training all of them; rows that do not occur stay bitwise; evaluation reads both."""
    torch.manual_seed(0)
    start = GPT(SMALL, 2).init_weights()
    ids, n, y = torch.randint(0, 100, (8, 12)), torch.randint(3, 13, (8,)), torch.arange(8) % 2
    ids[torch.arange(12) >= n[:, None]] = start.end
    models = [copy.deepcopy(start) for _ in range(2)]
    models[1].wte.train_rows_of(torch.cat((ids.flatten(), torch.tensor([start.end]))))
    for model in models:
        model.train()
        opt = gpt.make_optimizer(model, 1e-3, 0.1)
        for step in range(5):
            rows = torch.arange(8)[step % 2::2]                     # some rows have no gradient in a step, and move all the same
            torch.nn.functional.cross_entropy(model(ids[rows], n[rows]), y[rows]).backward()
            torch.nn.utils.clip_grad_norm_(lora.trainables(model).values(), 1.0)
            opt.step()
            opt.zero_grad()
    dense, few = models
    assert len(few.wte.rows) == len(ids.unique()) < 100 and 'wte.weight' not in lora.trainables(few)
    unseen = torch.tensor([i for i in range(257) if i not in ids])
    other = torch.randint(0, 257, (4, 12))
    with torch.no_grad():
        assert far(few.eval()(other, n[:4]), dense.eval()(other, n[:4])) < 1e-5
    a, b = dense.float32_state(), few.float32_state()
    assert a.keys() == b.keys() and max(far(a[k], b[k]) for k in a) < 1e-5
    assert far(b['wte.weight'], start.wte.weight.detach()) > 1e-4 and torch.equal(b['wte.weight'][unseen], start.wte.weight[unseen])


def test_optimizer_groups():
    model = GPT(SMALL, 2).init_weights()
    names = {p: n for n, p in model.named_parameters()}
    decayed = {names[p] for g in gpt.make_optimizer(model, 1e-3, 0.1).param_groups if g['weight_decay'] for p in g['params']}
    assert 'wte.weight' not in decayed and 'wpe.weight' not in decayed and not any('ln_' in n or n.endswith('bias') for n in decayed)
    assert len(decayed) == 4 * SMALL.n_layer + 1
    lora.adapt(model, 'prompt', prompt=3)
    opt = gpt.make_optimizer(model, 1e-3, 0.1)
    assert sum(len(g['params']) for g in opt.param_groups) == 2         # the prompt and the head, nothing frozen


def test_clipping_is_that_of_torch():
    for shift in (0.0, math.nan):
        for limit in (0.0, 1.0, 1e3):
            sets = []
            for clip in (gpt.clip_gradients, lambda params, limit: torch.nn.utils.clip_grad_norm_(params, limit or math.inf)):
                torch.manual_seed(1)
                params = [torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(2))]
                params[0].grad, params[1].grad = torch.randn(3, 4).t() + shift, torch.randn(5)       # one of other strides, and one without
                sets.append([clip({i: p for i, p in enumerate(params)}.values(), limit), *(p.grad for p in params[:2])])
                assert params[2].grad is None
            for a, b in zip(*sets):
                assert torch.allclose(a, b, rtol=1e-6, equal_nan=True), (shift, limit, a, b)
            assert math.isnan(shift) or (float(sets[0][1].norm()) < 1) == (limit == 1), 'the limit of 1 alone is below the norm'


def test_lr_schedule():
    at = [gpt.lr_at(s, 10, 1.0, 0.2, 'linear') for s in range(10)]
    assert np.allclose(at, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]), at
    assert [gpt.lr_at(s, 4, 2.0, 0.0, 'constant') for s in range(4)] == [2.0] * 4
    assert np.allclose([gpt.lr_at(s, 4, 1.0, 0.0, 'cosine') for s in range(4)], [1, 0.853553, 0.5, 0.146447])


# --- lora.py ---

def test_lora_is_its_formula():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    conv = gpt.Conv1D(8, 6)
    torch.nn.init.normal_(conv.weight), torch.nn.init.normal_(conv.bias)
    linear = torch.nn.Linear(8, 6)
    for base, w in ((conv, conv.weight), (linear, linear.weight.t())):
        m = lora.LoRA(base, r=2, scale=16 / 2, p=0.0)
        assert m.A.shape == (2, 8) and m.B.shape == (6, 2) and torch.equal(m(x), base(x))
        assert m.A.abs().max() <= 8 ** -0.5 and m.A.abs().max() > 0.5 * 8 ** -0.5
        torch.nn.init.normal_(m.B)
        assert torch.allclose(m(x), x @ w + base.bias + 8.0 * x @ m.A.t() @ m.B.t(), atol=1e-5)
        assert torch.allclose(x @ (w + (m.delta() if base is conv else m.delta().t())) + base.bias, m(x), atol=1e-5)


def test_lora_dropout_only_in_training():
    m = lora.LoRA(torch.nn.Linear(64, 4), 2, 1.0, 0.5)
    torch.nn.init.normal_(m.B)
    x = torch.randn(5, 64)
    assert not torch.equal(m.train()(x), m(x)) and torch.equal(m.eval()(x), m(x))


def test_evaluation_has_no_dropout():
    """In the middle of training: LoRA's and GPT-2's own dropout are off in an evaluation, and on again after it."""
    torch.manual_seed(0)
    model = formula_model()
    lora.adapt(model, 'lora', r=4, dropout=0.5)
    stirred(model)
    model.set_dropout(0.5)
    tokens = data.tokenize(data.tokenizer('bytes'), ['one', 'another text'], cache=False)
    want = [gpt.class_logits(model, tokens, 64, 'head', torch.device('cpu'), torch.float32) for _ in range(2)]
    model.train()
    assert np.array_equal(gpt.class_logits(model, tokens, 64, 'head', torch.device('cpu'), torch.float32), want[0]) and np.array_equal(*want)
    assert model.training and model.h[0].attn.c_attn.training
    ids, n = data.collate(tokens, [0, 1], 64, 'head', 256)
    assert not torch.equal(model(ids, n), model(ids, n))


def test_cpu_dropout_is_dropout():
    """The share dropped, the scale of what is kept, the same mask for the gradient, and no pattern between neighbours."""
    torch.manual_seed(0)
    x = torch.ones(1001, 997)
    for p in (0.05, 0.5):
        y = lora.dropout(x, p)
        kept = (y != 0).double()
        sigma = (p * (1 - p) / x.numel()) ** 0.5
        assert abs(float(kept.mean()) - (1 - p)) < 5 * sigma + 1e-5 and abs(float(y.double().mean()) - 1) < 1e-2
        assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)), rtol=1e-4)
        flat = kept.flatten() - (1 - p)
        for lag in range(1, 6):
            assert abs(float((flat[lag:] * flat[:-lag]).mean()) / (p * (1 - p))) < 5 / x.numel() ** 0.5, lag
    assert lora.dropout(torch.ones(3), 0.5).shape == (3,)
    x = torch.randn(50, 60).t().requires_grad_()
    y = lora.dropout(x, 0.3)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0) and torch.allclose(x.grad[y != 0], torch.tensor(1 / 0.7)) and torch.allclose(y, x * x.grad)
    first = [int(lora.dropped(4000, 0.01)[0]) for _ in range(4000)]          # geometric: P(the first is i) = p (1 - p)^i
    assert abs(np.mean(first) - 99) < 5 * 99.5 / 4000**0.5 and abs(np.mean(np.array(first) < 69) - 0.5) < 0.05
    assert 2 < len(lora.dropped(10**7, 1e-6)) < 30 and (lora.dropped(10**4, 0.99) < 10**4).all()


def test_trainable_count_gpt2():
    """The figure that PEFT prints for r 8 on all four matrices with two classes."""
    with torch.device('meta'):
        model = GPT(gpt.SHAPES['gpt2'], 2)
        names = lora.adapt(model, 'lora', r=8)
    assert len(names) == 48 and sum(p.numel() for p in lora.trainables(model).values()) == 1_181_184


def test_lora_targets():
    def wrapped(targets):
        return lora.add_lora(GPT(SMALL), 4, 8.0, 0.0, targets)
    assert wrapped(['c_attn']) == [f'h.{i}.attn.c_attn' for i in range(3)]
    assert len(wrapped(['c_proj'])) == 6 and wrapped(['h.1.mlp.c_fc']) == ['h.1.mlp.c_fc']
    assert len(wrapped(r'.*\.h\.[01]\.attn\.c_attn')) == 2
    message = raises(UserError, wrapped, ['c_attn', 'q_proj'], match="'q_proj' matches no layer")
    assert 'attn.c_attn' in message and 'mlp.c_proj' in message


def test_merge():
    ids, n = ragged(257, pad=256)
    torch.manual_seed(0)
    model = formula_model()
    before = model.float32_state()
    lora.adapt(model, 'lora', r=4)
    stirred(model)
    merged = GPT(SMALL, 3).eval()
    merged.load_state_dict(lora.merged_state(model))
    with torch.no_grad():
        assert far(merged(ids, n), model(ids, n)) < 1e-5
        assert far(merged(ids, n), formula_model()(ids, n)) > 1e-3
    assert torch.equal(model.h[0].mlp.c_fc.base.weight, before['h.0.mlp.c_fc.weight'])      # merging changed nothing
    lora.adapt(other := formula_model(), 'prompt', prompt=2)
    raises(UserError, lora.merged_state, other, match='cannot be merged')


def test_methods_train_what_they_say():
    want = dict(lora=12, head=0, last=2 * 12 + 2, full=36 + 4, adapter=6 * 4, prompt=1)     # tensors, besides the head
    for method, options in METHODS.items():
        model = formula_model()
        lora.adapt(model, method, **options)
        names = set(lora.trainables(model))
        assert 'score.weight' in names
        assert len(names) - 1 == (24 if method == 'lora' else want[method]), (method, len(names))
    raises(UserError, lora.adapt, formula_model(), 'last', 99, match='--last 99: this model has 3 blocks')
    raises(UserError, lora.add_prompt, formula_model(), 256, match='--prompt 256')


def test_peft_files_refused():
    torch.manual_seed(0)
    model, folder = formula_model(), tmp()
    lora.adapt(model, 'lora', r=4)
    lora.save_peft(folder, model, 'somewhere')
    path = os.path.join(folder, 'adapter_config.json')
    config = data.read_json(path)
    assert config['target_modules'] == ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'] and config['r'] == 4 and config['lora_alpha'] == 16
    for change, match in ((dict(r=8), 'where (8, 64) belongs'), (dict(use_dora=True), 'use_dora'), (dict(peft_type='IA3'), 'IA3'), (dict(bias='all'), 'bias'),
                          (dict(target_modules=['c_attn']), 'is unexpected'), (dict(r='many'), 'malformed')):
        data.write_json(path, {**config, **change})
        raises(UserError, lora.load_peft, folder, formula_model(), match=match)
    for key in ('r', 'lora_alpha', 'target_modules', 'peft_type'):      # PEFT's silent defaults: here an error
        data.write_json(path, {k: v for k, v in config.items() if k != key})
        raises(UserError, lora.load_peft, folder, formula_model(), match='adapter_config.json')
    data.write_json(path, config)
    weights = os.path.join(folder, 'adapter_model.safetensors')
    tensors = gpt.load_safetensors(weights)
    gpt.save_safetensors(weights, {n: t for n, t in tensors.items() if 'score' not in n})
    raises(UserError, lora.load_peft, folder, formula_model(), match='score.weight is missing')


# --- train_cls.py, eval.py and predict.py on the demo ---

TINY = ['--data', 'demo', '--scratch', '--n_layer', '2', '--n_head', '2', '--n_embd', '32', '--quick']
FLAGS = dict(lora=['--lora'], head=['--head'], last=['--last', '1'], full=['--full'], adapter=['--adapter', '--bottleneck', '4'], prompt=['--prompt', '3'])


def script(main, argv):
    """main(argv) with its output captured -> (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


def train(*argv, out=None):
    out = out or os.path.join(tmp(), 'run')
    code, text, _ = script(train_cls.main, [*argv, '--out', out])
    assert not code, code
    return out, text


@functools.lru_cache(None)
def tiny_run(method):
    """One small trained run per method, shared by the tests that only read it."""
    return train(*TINY, *FLAGS[method], '--dtype', 'fp32')[0]


def records(out):
    with open(os.path.join(out, 'log.jsonl'), encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def test_every_method_end_to_end():
    for method in METHODS:
        out = tiny_run(method)
        info, results = data.read_json(os.path.join(out, 'run.json')), data.read_json(os.path.join(out, 'eval_results.json'))
        assert (info['method'], info['labels'], info['data'], info['model'], info['seed']) == (method, ['negative', 'positive'], 'demo', 'nano', 1337)
        assert results['n'] == 200 and sum(map(sum, results['confusion'])) == 200
        assert any({'step', 'loss', 'lr', 'examples_per_s', 'tokens_per_s', 'pad_share'} == set(r) for r in records(out))
        assert {'val_loss', 'val_accuracy'} <= set(records(out)[-1])
        names = set(os.listdir(out))
        files = {'lora': {'adapter_config.json', 'adapter_model.safetensors', 'base'}, 'prompt': {'adapter_config.json', 'adapter_model.safetensors', 'base'},
                 'adapter': {'adapter.safetensors', 'base'}}.get(method, {'config.json', 'model.safetensors'})
        assert names == files | {'run.json', 'log.jsonl', 'eval_results.json', 'val_preds.json', 'val_labels.json'}, names
        again = script(evaluation.main, [out, '--json', '-', '--dtype', 'fp32'])[1]
        assert abs(json.loads(again)['runs'][0]['nll'] - results['nll']) < 1e-6                     # the same rows, the same weights
        code, text, _ = script(predict.main, [out, '--json', '--dtype', 'fp32', 'the song was warm', ''])
        rows = [json.loads(line) for line in text.splitlines()]
        assert [r['text'] for r in rows] == ['the song was warm', ''] and set(rows[0]['probs']) == {'negative', 'positive'}
        want = torch.from_numpy(lora.open_run(out, 'cpu', 'fp32').logits(['the song was warm', ''])).softmax(1)
        assert np.allclose([[r['probs'][name] for name in info['labels']] for r in rows], want, atol=2e-6)
        assert all(r['label'] == max(r['probs'], key=r['probs'].get) for r in rows)


def test_val_predictions_agree_with_the_log():
    out = tiny_run('full')
    preds, labels = (data.read_json(os.path.join(out, f'val_{x}.json')) for x in ('preds', 'labels'))
    last = [r for r in records(out) if 'val_accuracy' in r][-1]
    assert last['val_accuracy'] == np.mean([p['label'] == y for p, y in zip(preds, labels)])


def capture_on_cpu(graphs, places):
    """What Graphs.capture does, where there are no CUDA graphs: a replay computes again from the same places."""
    loss = graphs.once(*places)

    def replay():
        loss.copy_(graphs.once(*places))
    return replay, loss


@contextlib.contextmanager
def graphs_on_cpu():
    """--cuda_graphs on a CPU -> a list of the shapes of ids that are recorded."""
    shapes = []

    def capture(graphs, places):
        shapes.append(tuple(places[1].shape))                       # behind the share of the loss
        return capture_on_cpu(graphs, places)
    with patched(gpt, 'check_graphs', lambda *a: None), patched(gpt.Graphs, 'capture', capture):
        yield shapes


def losses_of(out):
    return [r['loss'] for r in records(out) if 'loss' in r]


def test_graphs_take_the_same_steps():
    """--cuda_graphs, with what a CPU has in place of a graph: the losses are those without it, each shape is recorded once."""
    for method, more in dict(lora=['--dropout', '0', '--grad_accum', '2', '--class_weights', 'balanced'], full=[], last=['--epochs', '2']).items():
        flags = [*TINY, *FLAGS[method], *more, '--dtype', 'fp32', '--lr', '1e-3', '--log_every', '1', '--batch_size', '6']
        with graphs_on_cpu() as shapes:
            a, b = losses_of(train(*flags, '--cuda_graphs')[0]), losses_of(train(*flags)[0])
        assert len(a) == len(b) > 10 and np.allclose(a, b, rtol=1e-4), (method, a, b)
        assert len(set(shapes)) == len(shapes) < len(a) and all(width % 8 == 0 for _, width in shapes), (method, shapes)
    flags = ['--data', topics(), '--model', pretrained(), '--dtype', 'fp32', *GEN['posterior'], '--dropout', '0', '--max_steps', '30', '--log_every', '1']
    with graphs_on_cpu():
        a, b = losses_of(generate(*flags, '--cuda_graphs')[0]), losses_of(generate(*flags)[0])
    assert len(a) == len(b) >= 30 and np.allclose(a, b, rtol=1e-4), (a, b)


def test_graphs_keep_gradients_and_random_numbers():
    """Recording leaves both as they were: in the step of a new shape the earlier parts' gradients are there already, and dropout's numbers are the seed's."""
    w, scaler = torch.nn.Parameter(torch.tensor(3.0)), torch.amp.GradScaler('cpu', enabled=False)
    with patched(gpt.Graphs, 'capture', capture_on_cpu):
        graphs = gpt.Graphs(lambda x: (w * x * torch.rand(())).sum(), [w], scaler)
        draws = []
        for shape in (2, 2, 3):
            torch.manual_seed(5)
            draws.append(float(graphs(torch.tensor(0.5), torch.ones(shape)) / shape / 1.5))
        assert draws[0] == draws[1] and abs(draws[0] - draws[2]) < 1e-6 and len(graphs.recorded) == 2
        assert abs(float(w.grad) - 0.5 * draws[0] * (2 + 2 + 3)) < 1e-5


def test_a_device_that_is_not_there_is_refused_before_data_is_read():
    def read(*args, **flags):
        raise AssertionError('data is read')
    with patched(data, 'load', read):
        for main in (train_cls.main, train_gen.main):
            raises(UserError, main, [*TINY, '--device', 'cuda:99'], match='cuda:99')
            raises(UserError, main, [*TINY, '--device', 'cpu', '--cuda_graphs'], match='needs a GPU')


def test_graphs_are_refused():
    for other in ('compile', 'gradient_checkpointing'):
        args = SimpleNamespace(**{**dict(cuda_graphs=True, compile=False, gradient_checkpointing=False), other: True})
        raises(UserError, gpt.check_graphs, args, torch.device('cuda'), match=f'--{other}')
        args.cuda_graphs = False
        gpt.check_graphs(args, torch.device('cuda'))


def test_graphs_on_a_gpu():
    if not torch.cuda.is_available():
        skip('no GPU')
    for method in ('lora', 'full'):
        flags = [*TINY, *FLAGS[method], '--dtype', 'fp32', '--lr', '1e-3', '--log_every', '1', '--batch_size', '6', *(['--dropout', '0'] * (method == 'lora'))]
        a, b = losses_of(train(*flags, '--cuda_graphs')[0]), losses_of(train(*flags)[0])
        assert len(a) == len(b) > 10 and np.allclose(a, b, rtol=1e-3), (method, a, b)
    flags = ['--data', topics(), '--model', pretrained(), '--dtype', 'fp32', *GEN['posterior'], '--dropout', '0', '--max_steps', '30', '--log_every', '1']
    a, b = losses_of(generate(*flags, '--cuda_graphs')[0]), losses_of(generate(*flags)[0])
    assert len(a) == len(b) >= 30 and np.allclose(a, b, rtol=1e-3), (a, b)


def test_gradient_checkpointing():
    """The same weights, bitwise, for every method, dropout included; and far fewer activations are kept."""
    for method, dtype in (*((method, 'fp32') for method in METHODS if method != 'head'), ('lora', 'bf16')):
        flags = [*TINY, *FLAGS[method], '--trunk_dropout', '0.1', '--max_steps', '4', '--lr', '1e-2', '--dtype', dtype]
        runs = [train(*flags, *more)[0] for more in ([], ['--gradient_checkpointing'])]
        a, b = ({name: data.sha256_file(os.path.join(out, name)) for name in os.listdir(out) if name.endswith('.safetensors')} for out in runs)
        assert a and a == b, (method, dtype)
    flags = ['--data', topics(), '--model', pretrained(), '--dtype', 'fp32', *GEN['posterior'], '--max_steps', '10']
    a, b = losses_of(generate(*flags, '--gradient_checkpointing')[0]), losses_of(generate(*flags)[0])
    assert a == b and len(a) > 1
    kept = []
    for recomputes in (False, True):
        model = GPT(replace(SMALL, n_layer=6), 2).init_weights().train()
        lora.adapt(model, 'lora', dropout=0.05)
        gpt.place(model, CPU, torch.bfloat16)
        model.recomputes, sizes = recomputes, {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.numel() * t.element_size()}) or t, lambda t: t):
            with gpt.autocast(CPU, torch.bfloat16):
                model(torch.randint(0, 256, (8, 32)), torch.full((8,), 32))
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.3 * kept[0], kept


def test_compile():
    """--compile takes the same steps, to rounding."""
    if not os.environ.get('NANOCLS_DATA'):
        skip('compiling takes 20 s: only with $NANOCLS_DATA')
    if not shutil.which(os.environ.get('CXX', 'g++')):
        skip('torch.compile needs a C++ compiler')
    flags = [*TINY, '--n_layer', '1', '--lora', '--dropout', '0', '--dtype', 'fp32', '--lr', '1e-2', '--max_steps', '6', '--log_every', '1']
    a, b = losses_of(train(*flags, '--compile')[0]), losses_of(train(*flags)[0])
    assert len(a) == len(b) == 6 and np.allclose(a, b, rtol=1e-4), (a, b)


def test_frozen_weights_stay_bitwise():
    """In float32 and in bf16, for each method: what is frozen is what it was, what trains has moved."""
    for dtype in ('fp32', 'bf16'):
        for method in METHODS:
            seen = {}
            def catch(model, device, dtype, real=gpt.place, **k):
                model = real(model, device, dtype, **k)
                seen.update(model=model, before={n: p.detach().clone() for n, p in model.named_parameters()})
                return model
            with patched(gpt, 'place', catch), patched(lora, 'open_run', stop_here):
                raises(Stop, train, *TINY, *FLAGS[method], '--dtype', dtype, '--max_steps', '5')
            params = dict(seen['model'].named_parameters())
            assert set(params) - set(seen['before']) == ({'wte.rows'} if method == 'full' else set())
            for n, before in seen['before'].items():
                moved, trains = not torch.equal(params[n], before), params[n].requires_grad
                assert moved == (trains or (method, n) == ('full', 'wte.weight')), (method, dtype, n, moved)        # some of whose rows train
                assert trains or params[n].grad is None


def test_accumulation_equals_the_big_batch():
    """Ragged lengths, class weights: 2 steps of 12 rows, whole and in parts of 5, 4 and 3 rows."""
    options = ['--class_weights', 'balanced', '--data', imbalanced(), '--model', 'nano', '--scratch', '--n_layer', '2', '--n_head', '2', '--n_embd', '32',
               '--full', '--dtype', 'fp32', '--max_steps', '2', '--lr', '1e-2', '--log_every', '1']
    whole, parts = train(*options, '--batch_size', '12')[0], train(*options, '--batch_size', '4', '--grad_accum', '3')[0]
    assert np.allclose([r['loss'] for r in records(whole) if 'loss' in r], [r['loss'] for r in records(parts) if 'loss' in r], rtol=1e-5)
    a, b = (gpt.load_safetensors(os.path.join(out, 'model.safetensors')) for out in (whole, parts))
    assert all(float((a[n] - b[n]).abs().max()) < 1e-4 for n in a), max(float((a[n] - b[n]).abs().max()) for n in a)


def imbalanced(n=60):
    """A small CSV of one class in four, with texts of very different lengths."""
    path, rng = os.path.join(tmp(), 'rows.csv'), random.Random(0)
    with open(path, 'w', newline='', encoding='utf-8') as f:
        w = csv.writer(f)
        w.writerow(['text', 'label'])
        for i in range(n):
            w.writerow([f'{"good" if i % 4 == 0 else "bad"} {i} ' * rng.randint(1, 9), 'rare' if i % 4 == 0 else 'common'])
    return path


def test_class_weights():
    path = imbalanced()
    for weights in ('none', 'balanced'):
        calls = []
        def catch(logits, target, weight=None, reduction='mean', real=torch.nn.functional.cross_entropy):
            calls.append(weight)
            return real(logits, target, weight=weight, reduction=reduction)
        with patched(torch.nn.functional, 'cross_entropy', catch):
            train('--data', path, '--model', 'nano', *TINY[2:-1], '--class_weights', weights, '--max_steps', '1')
        assert (calls[0] is None) == (weights == 'none')
        if calls[0] is not None:                                        # 36 common, 12 rare of 48 training rows
            assert torch.allclose(calls[0], torch.tensor([48 / (2 * 36), 48 / (2 * 12)])), calls[0]


def test_resume_is_bitwise():
    """Interrupted (Ctrl-C) mid-epoch and mid-accumulation, resumed: the weights of the run that was never interrupted."""
    for method in ('lora', 'full'):
        argv = [*TINY, *FLAGS[method], '--max_steps', '9', '--grad_accum', '2', '--batch_size', '8', '--eval_every', '4', '--dtype', 'fp32']
        whole, _ = train(*argv)
        out, real, calls = os.path.join(tmp(), 'run'), data.collate, []
        def interrupting(*a, **k):
            calls.append(1)
            if len(calls) == 11:                                        # in the first half of step 6
                os.kill(os.getpid(), signal.SIGINT)
            return real(*a, **k)
        with patched(data, 'collate', interrupting):
            code, text, err = script(train_cls.main, [*argv, '--out', out])
        assert code == 130 and '--resume --out' in err and os.path.exists(os.path.join(out, 'resume.pt'))
        raises(UserError, train_cls.main, ['--resume', '--out', out, '--lr', '5'], match='--lr')
        train('--resume', out=out)
        name = 'adapter_model.safetensors' if method == 'lora' else 'model.safetensors'
        assert data.read_bytes(os.path.join(out, name)) == data.read_bytes(os.path.join(whole, name)), method
        assert [r['step'] for r in records(out)] == [r['step'] for r in records(whole)]
        assert data.read_json(os.path.join(out, 'eval_results.json')) == data.read_json(os.path.join(whole, 'eval_results.json'))
        assert not os.path.exists(os.path.join(out, 'resume.pt'))


def test_same_seed_same_run():
    argv = [*TINY, '--lora', '--max_steps', '4']
    a, b, c = (data.read_bytes(os.path.join(train(*argv, '--seed', s)[0], 'adapter_model.safetensors')) for s in (1, 1, 2))
    assert a == b != c


def test_best_on_validation_is_saved():
    """With a rate that destroys the model after step 4, the saved weights are those of step 2 or 4."""
    with patched(gpt, 'lr_at', lambda step, *a: 1e-3 if step < 4 else 3.0):
        out, _ = train(*TINY, '--full', '--dtype', 'fp32', '--max_steps', '8', '--eval_every', '2')
    scores = [(r['val_accuracy'], -r['val_loss'], r['step']) for r in records(out) if 'val_loss' in r]
    best = max(scores, key=lambda s: s[:2])
    assert data.read_json(os.path.join(out, 'run.json'))['results']['step'] == best[2] and best[2] <= 4, scores


def test_not_finite_loss_stops():
    raises(UserError, train, *TINY, '--full', '--dtype', 'fp32', '--lr', '1e30', '--clip', '0', '--log_every', '1', '--warmup', '0', match='try a smaller --lr')


def hugging_face(*names):
    """Classes of transformers and PEFT by name, or a visible skip."""
    try:
        import peft
        import transformers
    except ImportError:
        skip('transformers or peft is not installed')
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = [getattr(peft, name, None) or getattr(transformers, name) for name in names]
    return found if len(found) > 1 else found[0]


def their_probs(theirs, enc, texts, end=256):
    """Probabilities (N, K) of a transformers or PEFT classifier, a text at a time; the empty text is one <|endoftext|>."""
    with torch.no_grad():
        return torch.cat([theirs(torch.tensor([enc.encode_ordinary(text) or [end]])).logits for text in texts]).softmax(1).numpy()


def probs_of(run, texts):
    return evaluation.softmax(run.logits(texts))


def assert_same(run, theirs, what):
    """An opened run and a model of transformers or PEFT: the same probabilities and the same label names."""
    gap = np.abs(probs_of(run, THEIR_TEXTS) - their_probs(theirs, run.enc, THEIR_TEXTS)).max()
    assert gap < 1e-5, (what, gap)
    assert theirs.config.id2label == dict(enumerate(run.labels)), (what, theirs.config.id2label, run.labels)


THEIR_TEXTS = ['the song was warm', 'not at all dull, but the garden felt messy', 'x', '']


def test_runs_open_in_transformers_and_peft():
    Classifier, AutoPeft, PeftModel = hugging_face('AutoModelForSequenceClassification', 'AutoPeftModelForSequenceClassification', 'PeftModel')
    for method in ('head', 'last', 'full', 'lora', 'prompt'):
        out = tiny_run(method)
        run = lora.open_run(out, 'cpu', 'fp32')
        assert run.labels == ['negative', 'positive']
        if method in ('lora', 'prompt'):
            assert_same(run, AutoPeft.from_pretrained(out).eval(), method)
            assert_same(run, PeftModel.from_pretrained(Classifier.from_pretrained(os.path.join(out, 'base')), out).eval(), method)
        else:
            assert_same(run, Classifier.from_pretrained(out).eval(), method)
            assert data.read_json(os.path.join(out, 'config.json'))['label2id'] == dict(negative=0, positive=1)


def test_label_names_over_a_base_that_stays_where_it_is():
    """A base that is not copied cannot know the run's classes: PEFT's users name them, as they must over openai-community/gpt2."""
    AutoPeft = hugging_face('AutoPeftModelForSequenceClassification')
    base = tmp()
    gpt.save_hf(base, formula_model(SMALL, 0))
    with patched(lora, 'SMALL_BASE', 0):
        out, _ = train('--data', three_classes(), '--model', base, '--lora', '--max_steps', '3', '--dtype', 'fp32')
    assert not os.path.exists(os.path.join(out, 'base'))
    assert data.read_json(os.path.join(out, 'adapter_config.json'))['base_model_name_or_path'] == base
    labels = data.read_json(os.path.join(out, 'run.json'))['labels']
    assert_same(lora.open_run(out, 'cpu', 'fp32'), AutoPeft.from_pretrained(out, id2label=dict(enumerate(labels)), pad_token_id=256).eval(), labels)
    copy, _ = train('--data', three_classes(), '--model', base, '--lora', '--max_steps', '3', '--dtype', 'fp32')       # the base is copied
    assert_same(lora.open_run(copy, 'cpu', 'fp32'), AutoPeft.from_pretrained(copy).eval(), labels)
    assert data.read_json(os.path.join(base, 'config.json')).get('id2label') is None                                    # the user's stays as it was


@functools.lru_cache(None)
def three_classes():
    return write('three.csv', table(90, ('news', 'spam', 'ham')))


# --- folders that transformers or PEFT wrote ---

@functools.lru_cache(None)
def their_folders():
    """(folder of a classifier with three classes, folder of a language model) as transformers saves them; random weights."""
    folder = tmp()
    hf_models(folder, SMALL)
    for name in ('cls', 'lm'):                                          # one that answers more than one third for everything
        path = os.path.join(folder, name, 'model.safetensors')
        tensors = gpt.load_safetensors(path)
        gpt.save_safetensors(path, {n: t * 5 if n.endswith(('wte.weight', 'score.weight')) else t.clone() for n, t in tensors.items()})
    return os.path.join(folder, 'cls'), os.path.join(folder, 'lm')


def their_adapter(kind='LoraConfig', half=False, names=None, base=None, **options):
    """A folder with an adapter that PEFT wrote over a transformers model; all that would start at zero is random."""
    Classifier, get_peft_model, Config = hugging_face('AutoModelForSequenceClassification', 'get_peft_model', kind)
    torch.manual_seed(0)
    classes = dict(id2label=dict(enumerate(names))) if names else dict(num_labels=3)
    model = Classifier.from_pretrained(base or their_folders()[1], pad_token_id=256, **classes)
    model = get_peft_model(model, Config(**{'task_type': 'SEQ_CLS', **options}))
    for n, p in model.named_parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.3)
    folder = tmp()
    (model.half() if half else model).save_pretrained(folder)
    return folder


LORA_OPTIONS = dict(
    plain=dict(r=4, target_modules=['c_attn'], fan_in_fan_out=True),
    alpha=dict(r=4, lora_alpha=23, target_modules=['c_attn', 'mlp.c_proj']),
    rslora=dict(r=8, lora_alpha=4, use_rslora=True, target_modules=['attn.c_proj', 'c_fc']),
    head=dict(r=2, target_modules=['c_attn'], modules_to_save=['score']),
    half=dict(r=2, target_modules=['c_fc'], half=True),
    expression=dict(r=2, target_modules=r'.*\.h\.[02]\.(attn\.c_attn|mlp\.c_fc)'),
    everything=dict(r=2, target_modules='all-linear'),
    spare=dict(r=2, target_modules=['c_attn', 'q_proj']),
    blocks=dict(r=2, target_modules=['c_proj'], layers_to_transform=[0, 2]),
    block=dict(r=2, target_modules=['c_attn'], layers_to_transform=0),
    untyped=dict(r=2, target_modules=['c_attn'], modules_to_save=['score'], task_type=None),
    start=dict(r=2, target_modules=['c_attn'], init_lora_weights='gaussian'),
)


def test_adapters_of_peft_open():
    AutoPeft, Classifier, PeftModel = hugging_face('AutoPeftModelForSequenceClassification', 'AutoModelForSequenceClassification', 'PeftModel')
    base = their_folders()[1]
    for what, options in [*LORA_OPTIONS.items(), ('prompt', dict(kind='PromptTuningConfig', num_virtual_tokens=5))]:
        folder = their_adapter(**options)
        run = lora.open_run(folder, 'cpu', 'fp32')
        theirs = PeftModel.from_pretrained(Classifier.from_pretrained(base, num_labels=3, pad_token_id=256), folder).eval()
        assert_same(run, theirs, what)
        assert run.labels == ['LABEL_0', 'LABEL_1', 'LABEL_2'] and run.args['max_length'] == 256 - 5 * (what == 'prompt')
        head = GPT.load(base, 3, new_head=True)                         # the adapter does something, so that it would be missed
        head.score.weight.data = run.model.score.weight.data
        without = gpt.class_logits(head, data.tokenize(run.enc, THEIR_TEXTS, cache=False), 200, 'head', torch.device('cpu'), torch.float32)
        assert np.abs(evaluation.softmax(without) - probs_of(run, THEIR_TEXTS)).max() > 1e-3, what
        if what == 'plain':                                             # the older file
            weights = gpt.load_safetensors(os.path.join(folder, 'adapter_model.safetensors'))
            torch.save({n: t.clone() for n, t in weights.items()}, os.path.join(folder, 'adapter_model.bin'))
            os.remove(os.path.join(folder, 'adapter_model.safetensors'))
            assert_same(lora.open_run(folder, 'cpu', 'fp32'), theirs, 'bin')


def test_classes_of_an_adapter():
    """Named by a config.json beside it, else by its base model's, else LABEL_i."""
    AutoPeft = hugging_face('AutoPeftModelForSequenceClassification')
    names = ['c', 'a', 'b']                                             # not in the order of the alphabet
    cls_dir = os.path.join(tmp(), 'cls')
    shutil.copytree(their_folders()[0], cls_dir)
    path = os.path.join(cls_dir, 'config.json')
    data.write_json(path, {**data.read_json(path), **gpt.class_names(names, 256)})
    folder = their_adapter(r=2, target_modules=['c_attn'], names=names, base=cls_dir)
    run = lora.open_run(folder, 'cpu', 'fp32')
    assert run.labels == names
    assert_same(run, AutoPeft.from_pretrained(folder).eval(), 'named by the base')
    data.write_json(os.path.join(folder, 'config.json'), dict(id2label={'2': 'z', '0': 'x', '1': 'y'}))
    assert lora.open_run(folder, 'cpu', 'fp32').labels == ['x', 'y', 'z']
    data.write_json(os.path.join(folder, 'config.json'), dict(id2label={'0': 'x', '1': 'y'}))
    raises(UserError, lora.open_run, folder, match='base_model.model.score.weight is (3, 64) where (2, 64) belongs')
    for bad in ({'0': 'x', '1': 'x', '2': 'z'}, {'0': 'x', '2': 'y', '3': 'z'}, {'0': 'x', '1': 5, '2': 'z'}, ['x', 'y', 'z'], {'a': 'x'}):
        data.write_json(os.path.join(folder, 'config.json'), dict(id2label=bad))
        raises(UserError, lora.open_run, folder, match='id2label must give')


def test_where_the_base_of_an_adapter_is():
    folder = their_adapter(r=2, target_modules=['c_attn'])
    want = probs_of(lora.open_run(folder, 'cpu', 'fp32'), THEIR_TEXTS)
    path = os.path.join(folder, 'adapter_config.json')
    config = data.read_json(path)
    beside = os.path.join(folder, 'gpt', 'small')
    shutil.copytree(their_folders()[1], beside)
    for name in ('gpt/small', beside):
        data.write_json(path, {**config, 'base_model_name_or_path': name})
        assert np.array_equal(probs_of(lora.open_run(folder, 'cpu', 'fp32'), THEIR_TEXTS), want), name
    for name in ('someone/gpt2-news', None, 5, ''):
        data.write_json(path, {**config, 'base_model_name_or_path': name})
        raises(UserError, lora.open_run, folder, match=f'base_model_name_or_path is {name!r}')
    os.rename(beside, os.path.join(folder, 'base'))                     # a run of ours that has lost its run.json
    assert np.array_equal(probs_of(lora.open_run(folder, 'cpu', 'fp32'), THEIR_TEXTS), want)
    assert lora.base_named('x', 'openai-community/gpt2') == lora.base_named('x', 'gpt2') == 'gpt2'
    assert lora.base_named('x', 'distilbert/distilgpt2') == 'distilgpt2'


def test_checkpoints_of_transformers_open():
    Classifier = hugging_face('AutoModelForSequenceClassification')
    origin = Classifier.from_pretrained(their_folders()[0]).eval()
    origin.config.id2label, origin.config.label2id = {0: 'news', 1: 'spam', 2: 'ham'}, dict(news=0, spam=1, ham=2)
    folders = {name: os.path.join(tmp(), name) for name in ('whole', 'shards', 'float16', 'bfloat16', 'bin', 'bin shards')}
    origin.save_pretrained(folders['whole'])
    origin.save_pretrained(folders['shards'], max_shard_size='100KB')
    assert sum(name.endswith('.safetensors') for name in os.listdir(folders['shards'])) > 3
    for name in ('float16', 'bfloat16'):
        copy.deepcopy(origin).to(getattr(torch, name)).save_pretrained(folders[name])
    state, config = origin.state_dict(), data.read_bytes(os.path.join(folders['whole'], 'config.json'))
    shards = {'pytorch_model-1.bin': list(state)[::2], 'pytorch_model-2.bin': list(state)[1::2]}
    for name in ('bin', 'bin shards'):
        os.makedirs(folders[name])
        write('config.json', config, folders[name])
    torch.save(state, os.path.join(folders['bin'], 'pytorch_model.bin'))
    for file, names in shards.items():
        torch.save({n: state[n].clone() for n in names}, os.path.join(folders['bin shards'], file))
    index = dict(metadata={}, weight_map={n: file for file, names in shards.items() for n in names})
    data.write_json(os.path.join(folders['bin shards'], 'pytorch_model.bin.index.json'), index)
    for name, folder in folders.items():
        run, theirs = lora.open_run(folder, 'cpu', 'fp32'), Classifier.from_pretrained(folder, dtype=torch.float32).eval()
        assert_same(run, theirs, name)
        assert run.labels == ['news', 'spam', 'ham'] and run.args['max_length'] == 256
    assert np.ptp(probs_of(run, THEIR_TEXTS), axis=0).max() > 0.01     # the texts get different answers
    first = sorted(os.listdir(folders['shards']))[1]                    # a shard that is not there
    os.remove(os.path.join(folders['shards'], first))
    raises(UserError, lora.open_run, folders['shards'], match=first)


def test_names_of_a_checkpoint():
    """transformers writes no id2label for two classes without names: LABEL_0, LABEL_1. A saved tokenizer says how long a text may be."""
    GPT2ForSequenceClassification, GPT2Config = hugging_face('GPT2ForSequenceClassification', 'GPT2Config')
    folder = tmp()
    shape = dict(vocab_size=257, n_positions=256, n_embd=64, n_layer=2, n_head=4, pad_token_id=256)
    GPT2ForSequenceClassification(GPT2Config(**shape)).save_pretrained(folder)
    run = lora.open_run(folder, 'cpu', 'fp32')
    assert run.labels == ['LABEL_0', 'LABEL_1'] and (run.args['max_length'], run.args['truncate']) == (256, 'head')
    for limit, side, want in ((10, 'left', (10, 'tail')), (10**30, 'right', (256, 'head')), (1e30, None, (256, 'head'))):
        data.write_json(os.path.join(folder, 'tokenizer_config.json'), dict(model_max_length=limit, truncation_side=side))
        args = lora.open_run(folder, 'cpu', 'fp32').args
        assert (args['max_length'], args['truncate']) == want
    path = os.path.join(folder, 'config.json')
    config = data.read_json(path)
    for change, match in ((dict(problem_type='multi_label_classification'), 'problem_type'), (dict(model_type='bert'), 'model_type'),
                          (dict(id2label={'0': 'a', '1': 'b', '2': 'c'}), 'score.weight is (2, 64) where (3, 64) belongs')):
        data.write_json(path, {**config, **change})
        raises(UserError, lora.open_run, folder, match=match)
    GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=1)).save_pretrained(folder)
    raises(UserError, lora.open_run, folder, match='score.weight has one row')


def test_folders_that_are_no_classifier():
    get_peft_model, LoraConfig, LM = hugging_face('get_peft_model', 'LoraConfig', 'AutoModelForCausalLM')
    lm = their_folders()[1]
    message = raises(UserError, lora.open_run, lm, match='is a language model, not a classifier')
    assert f'--model {lm}' in message
    folder = tmp()
    get_peft_model(LM.from_pretrained(lm), LoraConfig(task_type='CAUSAL_LM', target_modules=['c_attn'])).save_pretrained(folder)
    raises(UserError, lora.open_run, folder, match='its task_type is CAUSAL_LM')
    raises(UserError, lora.open_run, os.path.join(gen_run('lora'), 'animals'), match='its task_type is CAUSAL_LM')
    raises(UserError, lora.open_run, os.path.join(gen_run('full'), 'animals'), match='is a language model')
    for options, match in ((dict(use_dora=True), 'use_dora'), (dict(bias='all'), 'bias'), (dict(rank_pattern={'c_attn': 3}), 'rank_pattern'),
                           (dict(alpha_pattern={'c_attn': 3}), 'alpha_pattern'), (dict(init_lora_weights='pissa'), 'init_lora_weights'),
                           (dict(lora_bias=True), 'lora_bias'), (dict(exclude_modules=['h.0.attn.c_attn']), 'exclude_modules'),
                           (dict(modules_to_save=['score', 'ln_f']), 'ln_f.weight is unexpected')):
        raises(UserError, lora.open_run, their_adapter(**{**dict(r=2, target_modules=['c_attn']), **options}), match=match)
    folder = their_adapter(r=2, target_modules=['c_attn'], task_type=None)              # PEFT does not add the head by itself then
    raises(UserError, lora.open_run, folder, match='lacks base_model.model.score.weight: the adapter was saved without its class head')
    raises(UserError, lora.open_run, their_adapter('IA3Config', target_modules=['c_attn'], feedforward_modules=[]), match='IA3')
    folder = tmp()
    data.write_json(os.path.join(folder, 'config.json'), dict(model_type='gpt2'))
    raises(UserError, lora.open_run, folder, match='holds no model.safetensors')


def test_every_tensor_must_fit():
    """A missing, an extra and a misshapen tensor, in every kind of folder: an error that names it."""
    hugging_face('LoraConfig')
    kinds = {method: tiny_run(method) for method in METHODS}
    kinds.update({'generative lora': gen_run('lora'), 'generative full': gen_run('full'), 'generative prefix': gen_run('prefix')})
    kinds.update({'their classifier': their_folders()[0], 'their lora': their_adapter(r=2, target_modules=['c_attn']),
                  'their prompt': their_adapter('PromptTuningConfig', num_virtual_tokens=3)})
    for kind, folder in kinds.items():
        copied_to = os.path.join(tmp(), 'copy')
        shutil.copytree(folder, copied_to)
        inside = os.path.join(copied_to, 'numbers') if kind.startswith('generative') else copied_to
        path = next(os.path.join(inside, name) for name in sorted(os.listdir(inside)) if name.endswith('.safetensors'))
        tensors = {n: t.clone() for n, t in gpt.load_safetensors(path).items()}
        lora.open_run(copied_to, 'cpu', 'fp32')
        for name in (list(tensors)[0], list(tensors)[-1]):
            shown = name.replace('transformer.', '', 1) if name.startswith('transformer.') else name
            for change, what in (({}, 'lacks|is missing'), ({name: tensors[name][..., :-1]}, r'is \(.*\) where \(.*\) belongs')):
                gpt.save_safetensors(path, {**{n: t for n, t in tensors.items() if n != name}, **change})
                message = raises(UserError, lora.open_run, copied_to, 'cpu', 'fp32', match=shown)
                assert re.search(what, message), (kind, message)
        gpt.save_safetensors(path, {**tensors, 'one.more': torch.ones(2)})
        raises(UserError, lora.open_run, copied_to, 'cpu', 'fp32', match='one.more is unexpected')
        if kind in ('full', 'their classifier'):
            twice = next(n for n in tensors if n.startswith('transformer.'))
            gpt.save_safetensors(path, {**tensors, twice.replace('transformer.', ''): tensors[twice]})
            raises(UserError, lora.open_run, copied_to, 'cpu', 'fp32', match='stands twice')


def test_foreign_folders_in_the_scripts():
    cls_dir = os.path.join(tmp(), 'cls')
    shutil.copytree(their_folders()[0], cls_dir)
    before = tree(cls_dir)
    adapter = their_adapter(r=2, target_modules=['c_attn'])
    rows = [('text one', 'news'), ('two', 'spam'), ('3', 'ham'), ('', 'news')]
    test = write('rows.csv', 'text,label\n' + ''.join(f'{t},{y}\n' for t, y in rows))
    run = lora.open_run(adapter, 'cpu', 'fp32')
    want = probs_of(run, [t for t, _ in rows])
    lines = script(predict.main, [adapter, '--file', test, '--json', '--dtype', 'fp32'])[1].splitlines()
    got = [json.loads(line)['probs'] for line in lines]
    assert [list(p) for p in got] == [run.labels] * 4 and np.abs(np.array([list(p.values()) for p in got]) - want).max() < 1e-6
    assert script(predict.main, [cls_dir, '--dtype', 'fp32', '--explain', 'a text'])[1].startswith('LABEL_')
    for folder in (cls_dir, adapter):
        raises(UserError, run_eval, [folder], match='--data NAME')
        raises(UserError, run_eval, [folder, '--data', 'demo'], match='does not name its 3 classes, and demo has 2')
        truth = [['ham', 'news', 'spam'].index(y) for _, y in rows]     # the order that data.load gives the names
        code, text, _ = script(evaluation.main, [folder, '--test', test, '--dtype', 'fp32'])
        assert 'taken in the order of' in text and 'ham, news, spam' in text
        numbers = json.loads(script(evaluation.main, [folder, '--test', test, '--dtype', 'fp32', '--json', '-'])[1])
        p = probs_of(lora.open_run(folder, 'cpu', 'fp32'), [t for t, _ in rows])
        assert abs(numbers['runs'][0]['nll'] + np.log(p[range(4), truth]).mean()) < 1e-5 and numbers['labels'] == ['ham', 'news', 'spam']
    assert tree(cls_dir) == before                                      # nothing was written there
    data.write_json(os.path.join(adapter, 'config.json'), gpt.class_names(['spam', 'ham', 'news'], 256))              # by name now
    code, text, _ = script(evaluation.main, [adapter, '--test', test, '--dtype', 'fp32', '--json', '-'])
    truth = [['spam', 'ham', 'news'].index(y) for _, y in rows]
    assert abs(json.loads(text)['runs'][0]['nll'] + np.log(want[range(4), truth]).mean()) < 1e-5
    both = json.loads(script(evaluation.main, [adapter, cls_dir, '--test', test, '--dtype', 'fp32', '--json', '-'])[1])
    assert both['comparisons'] and sorted(both['labels']) == ['ham', 'news', 'spam']
    data.write_json(os.path.join(adapter, 'config.json'), gpt.class_names(['spam', 'egg', 'news'], 256))
    raises(UserError, run_eval, [adapter, '--test', test], match='ham')
    out, _ = train('--data', three_classes(), '--model', cls_dir, '--head', '--max_steps', '2')                        # as a base model
    assert lora.open_run(out).labels == ['ham', 'news', 'spam']
    raises(UserError, train, '--data', three_classes(), '--model', adapter, match='holds an adapter, not a whole model')


# --- predict.py --export ---

def test_export():
    for method in ('head', 'last', 'full', 'lora'):
        out, folder = tiny_run(method), os.path.join(tmp(), 'merged')
        os.makedirs(folder) if method == 'lora' else None               # an empty one will do
        before = tree(out)
        code, text, _ = script(predict.main, [out, '--export', folder])
        assert text == f'wrote {folder}\n' and tree(out) == before
        assert set(os.listdir(folder)) == {'config.json', 'model.safetensors', 'tokenizer_config.json'}
        texts = [*THEIR_TEXTS, 'the song was warm ' * 50]               # longer than --max_length
        run, merged = lora.open_run(out, 'cpu', 'fp32'), lora.open_run(folder, 'cpu', 'fp32')
        a, b = torch.from_numpy(run.logits(texts)), torch.from_numpy(merged.logits(texts))
        assert merged.labels == run.labels and far(b, a) < 1e-5, (method, far(b, a))
        assert not any(isinstance(m, lora.LoRA) for m in merged.model.modules())
        rows = [[json.loads(line) for line in script(predict.main, [at, '--json', '--dtype', 'fp32', *texts])[1].splitlines()] for at in (out, folder)]
        assert all(x['label'] == y['label'] and abs(x['probs']['positive'] - y['probs']['positive']) < 1e-5 for x, y in zip(*rows))
        raises(UserError, predict.main, [out, '--export', folder], match='is there already and not empty')
    file = write('file', 'x')
    raises(UserError, predict.main, [out, '--export', file], match='is there already')
    raises(UserError, predict.main, [out, '--export', out], match='is there already')
    raises(UserError, predict.main, [out, 'a text', '--export', 'x'], match='leave text out')
    raises(UserError, predict.main, [out, '--device', 'cpu', '--export', 'x'], match='leave device out')


def test_export_is_all_or_nothing():
    place = tmp()
    for run in ('adapter', 'prompt'):
        raises(UserError, predict.main, [tiny_run(run), '--export', os.path.join(place, 'x')], match='cannot be merged')
    raises(UserError, predict.main, [gen_run('prefix'), '--export', os.path.join(place, 'x')], match='cannot be merged')
    raises(UserError, predict.main, [gen_run('zero_shot'), '--export', os.path.join(place, 'x')], match='trained nothing')
    writes, out = [], gen_run('lora')

    def full(path, content, real=data.write_atomic):
        writes.append(path)
        if len(writes) == 5:
            raise UserError(f'cannot write {path}')
        real(path, content)
    with patched(data, 'write_atomic', full):
        raises(UserError, predict.main, [out, '--export', os.path.join(place, 'x')], match='cannot write')
    assert len(writes) == 5 and os.listdir(place) == []
    raises(UserError, predict.main, [tiny_run('full'), '--export', os.path.join(write('file', 'x', place), 'x')], match='cannot write')
    assert os.listdir(place) == ['file']


def test_exports_open_in_transformers():
    Classifier, LM = hugging_face('AutoModelForSequenceClassification', 'AutoModelForCausalLM')
    for method in ('head', 'last', 'full', 'lora'):
        folder = os.path.join(tmp(), 'merged')
        script(predict.main, [tiny_run(method), '--export', folder])
        assert_same(lora.open_run(tiny_run(method), 'cpu', 'fp32'), Classifier.from_pretrained(folder).eval(), method)
    for method in ('lora', 'full', 'posterior'):
        out, folder, run = gen_run(method), os.path.join(tmp(), 'merged'), opened(method)
        code, text, _ = script(predict.main, [out, '--export', folder])
        assert text.splitlines() == [f'wrote {os.path.join(folder, label)}' for label in run.labels]
        texts = ['cat dog bird', 'one']
        ours = run.logits(texts) - run.log_prior
        for c, label in enumerate(run.labels):
            theirs = LM.from_pretrained(os.path.join(folder, label)).eval()
            again = GPT.load(os.path.join(folder, label))               # as --model of the train scripts
            for text, mine in zip(texts, ours[:, c]):
                ids = torch.tensor([[256, *text.encode(), 256]])
                with torch.no_grad():
                    logits, same = theirs(ids).logits[0, :-1], again.eval().lm_logits(ids)[0, :-1]
                assert far(same, logits) < 1e-5
                assert abs(float(logits.log_softmax(1).gather(1, ids[0, 1:, None]).sum()) - mine) < 1e-5 * abs(mine), (method, label, text)


def test_export_brings_the_tokenizer():
    AutoTokenizer, pipeline = hugging_face('AutoTokenizer', 'pipeline')
    real_data('gpt2_bpe')
    out, _ = train('--data', 'demo', '--model', 'gpt2', '--scratch', '--n_layer', '1', '--n_head', '2', '--n_embd', '16', '--lora', '--max_steps', '3',
                   '--max_length', '20', '--truncate', 'tail', '--quick', '--dtype', 'fp32')
    folder = os.path.join(tmp(), 'merged')
    script(predict.main, [out, '--export', folder])
    run, theirs = lora.open_run(folder, 'cpu', 'fp32'), AutoTokenizer.from_pretrained(folder)
    texts = ['the song was warm', ' Größe \n\n naïve 日本', "it's 100 % <|end", 'a long text ' * 30]
    for text in texts:
        ids = theirs(text, truncation=True)['input_ids']
        assert ids == run.enc.encode_ordinary(text)[-20:] and theirs.decode(theirs(text)['input_ids']) == text
    assert run.args['max_length'] == 20 and run.args['truncate'] == 'tail'
    rows = pipeline('text-classification', folder, device='cpu')(texts, batch_size=2, truncation=True, top_k=None)
    want = probs_of(lora.open_run(out, 'cpu', 'fp32'), texts)
    got = [[{x['label']: x['score'] for x in row}[label] for label in run.labels] for row in rows]
    assert np.abs(np.array(got) - want).max() < 1e-5, (got, want)


def test_another_base_is_refused():
    out = os.path.join(tmp(), 'copy')
    shutil.copytree(tiny_run('lora'), out)
    path = os.path.join(out, 'base', 'model.safetensors')
    tensors = {n: t.clone() for n, t in gpt.load_safetensors(path).items()}
    tensors['transformer.wpe.weight'][0, 0] += 1
    gpt.save_safetensors(path, tensors)
    raises(UserError, lora.open_run, out, match='another base model')
    os.remove(path)
    raises(UserError, lora.open_run, out, match='holds no model.safetensors')
    os.remove(os.path.join(out, 'adapter_config.json'))
    os.remove(os.path.join(out, 'run.json'))
    raises(UserError, lora.open_run, out, match='run.json')


def test_lora_on_one_block():
    """A target that names one block's layer is saved under its full name: the short one would mean that layer in every block."""
    out, _ = train(*TINY, '--lora', '--targets', 'h.1.mlp.c_fc', '--max_steps', '2')
    assert data.read_json(os.path.join(out, 'adapter_config.json'))['target_modules'] == ['h.1.mlp.c_fc']
    model = lora.open_run(out, 'cpu', 'fp32').model
    assert [n for n, m in model.named_modules() if isinstance(m, lora.LoRA)] == ['h.1.mlp.c_fc']


def test_run_without_weights():
    for method, name in (('full', 'model.safetensors'), ('lora', 'adapter_model.safetensors'), ('adapter', 'adapter.safetensors')):
        out = os.path.join(tmp(), 'copy')
        shutil.copytree(tiny_run(method), out)
        os.remove(os.path.join(out, name))
        raises(UserError, lora.open_run, out, match=name)


def test_flags_that_make_no_sense():
    for argv, match in ((['--r', '0'], 'above 0'), (['--head', '--r', '4'], '--r does nothing without --lora'), (['--lora', '--head'], 'not allowed with'),
                        (['--n_layer', '2'], '--n_layer does nothing without --scratch'), (['--max-steps', '3', '--epochs', '1'], 'give one of them'),
                        (['--lorra'], 'did you mean --lora'), (['--dropout', '1.5'], '--dropout'), (['--lr', 'nan'], '--lr'), (['--resume'], '--out'),
                        (['--data', 'nowhere.csv'], 'nowhere.csv'), (['--targets', 'q_proj', *TINY], 'matches no layer'), (['--last', '99', *TINY], '--last 99'),
                        (['--top', '3', *TINY], '--top 3: this model has 2 blocks'), (['--full', '--top', '1', *TINY], '--top does nothing without --lora'),
                        (['--prompt', '300', *TINY], '--prompt 300'), (['--max_length', '999', *TINY], '--max_length 999'), (['--bottleneck', '4'], '--adapter'),
                        (['--n_head', '5', *TINY[:3]], 'not a multiple'), (['--resume', '--out', tmp()], 'no resume.pt'), (['--device', 'abacus', *TINY], 'abacus')):
        raises(UserError, train_cls.main, argv + (['--out', os.path.join(tmp(), 'x')] if '--out' not in argv and '--resume' not in argv else []), match=match)
    raises(UserError, train_cls.main, [*TINY, '--out', tiny_run('lora')], match='already holds a run')


def test_default_run_folder():
    """runs/DATA-METHOD in the working folder, numbered when it is taken."""
    here, folder = os.getcwd(), tmp()
    try:
        os.chdir(folder)
        for name in ('runs/demo-head', 'runs/demo-head-2', 'runs/demo-head-3'):
            code, text, _ = script(train_cls.main, [*TINY, '--head', '--max_steps', '1'])
            assert not code and os.path.isfile(os.path.join(name, 'run.json')) and f'saved in {name};' in text
        assert lora.free_folder('some/where/mine.csv', 'lora') == os.path.join('runs', 'mine-lora')
    finally:
        os.chdir(here)


def test_dash_and_underscore_are_the_same_flag():
    a, b = (records(train(*TINY, '--head', flag, '2')[0])[-1]['step'] for flag in ('--max-steps', '--max_steps'))
    assert a == b == 2


def test_fallback_to_the_demo():
    """Neither data nor model named, nothing to be had: the demo is trained. Named and not to be had: an error."""
    def unavailable(*a, **k):
        raise data.Unavailable('no network (simulated)')
    with patched(data, 'download', unavailable), environment(NANOCLS_DATA=None, HF_HOME=tmp()):
        out, text = train('--quick', '--max_steps', '2')
        assert 'built-in demo instead' in text and data.read_json(os.path.join(out, 'run.json'))['model'] == 'nano'
        raises(data.Unavailable, train, '--data', 'sst2', match='no network')
        raises(data.Unavailable, train, '--data', 'demo', '--model', 'gpt2', match='no network')


def test_demo_bag_of_words():
    """Logistic regression on word counts stays far below the language model on the demo; the figure is in the README."""
    ds = data.load('demo')
    words = sorted({w for t in ds.train.texts for w in re.findall('[a-z]+', t)})
    column = {w: i for i, w in enumerate(words)}

    def counts(texts):
        x = torch.zeros(len(texts), len(words) + 1)
        x[:, -1] = 1                                                    # the constant
        for row, t in zip(x, texts):
            for w in re.findall('[a-z]+', t):
                if w in column:
                    row[column[w]] += 1
        return x
    x, y, best = counts(ds.train.texts), torch.from_numpy(ds.train.y).double(), 0.0
    for decay in (1e-4, 1e-3, 1e-2):
        w = torch.zeros(x.shape[1], requires_grad=True)
        opt = torch.optim.LBFGS([w], max_iter=100)

        def loss():
            opt.zero_grad()
            value = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y.float()) + decay * w.square().sum()
            value.backward()
            return value
        opt.step(loss)
        best = max(best, float(((counts(ds.test.texts) @ w > 0).long().numpy() == ds.test.y).mean()))
    print(f'     demo, bag of words: {best:.3f}')
    assert 0.65 < best < 0.80, best


def test_demo_learns():
    """The language model `nano` and LoRA on top of it, both in fewer than the default steps; the README has the full run."""
    out, _ = train('--data', 'demo', '--max_steps', '400', '--eval_every', '400', '--log_every', '200')
    accuracy = data.read_json(os.path.join(out, 'eval_results.json'))['accuracy']
    assert accuracy > 0.9, accuracy


def test_predict_inputs():
    out = tiny_run('full')
    texts = ['the song was warm', 'it said "dull, and\nmessy"', '', 'x' * 5000, 'nul \x00 byte', 'the plot']
    folder = tmp()
    with open(os.path.join(folder, 'in.csv'), 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows([['id', 'text'], *enumerate(texts)])
    with open(os.path.join(folder, 'in.jsonl'), 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(dict(text=t)) + '\n' for t in texts)
    want = [json.loads(s) for s in script(predict.main, [out, '--json', '--dtype', 'fp32', *texts])[1].splitlines()]
    assert [r['text'] for r in want] == texts
    for name in ('in.csv', 'in.jsonl'):
        with patched(predict, 'CHUNK', 4):                              # several chunks
            script(predict.main, [out, '--json', '--dtype', 'fp32', '--file', os.path.join(folder, name), '--out', os.path.join(folder, 'out')])
        with open(os.path.join(folder, 'out'), encoding='utf-8') as f:
            got = [json.loads(line) for line in f]
        assert [(r['text'], r['label']) for r in got] == [(r['text'], r['label']) for r in want], name
        assert all(abs(a['probs'][k] - b['probs'][k]) < 1e-5 for a, b in zip(got, want) for k in a['probs'])
    with patched(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'one\n\nthree\xff'), encoding='utf-8')):
        lines = script(predict.main, [out])[1].splitlines()
    assert len(lines) == 3 and all(s.split('\t')[0] in ('negative', 'positive') for s in lines)
    rows = [json.loads(s) for s in script(predict.main, [out, '--json', '--threshold', '0.9999', *texts])[1].splitlines()]
    assert all(r['label'] is None for r in rows)
    for argv, match in (([out, 'x', '--file', 'y'], 'not both'), ([out, '--file', 'nowhere'], 'no such file'), ([tmp(), 'x'], 'run.json'),
                        ([out, 'x', '--threshold', '2'], '--threshold'), ([out, 'x', '--text_col', 'a'], '--file')):
        raises(UserError, predict.main, argv, match=match)


def test_explain_is_leave_one_out():
    out = tiny_run('full')
    run = lora.open_run(out, 'cpu', 'fp32')
    pieces = predict.explain(run, 'so dull')
    assert ''.join(t for t, _ in pieces) == 'so dull'
    a, b = run.logits(['so dull', 'so dul'])
    best = int(a.argmax())
    assert abs(pieces[-1][1] - float((a[best] - a[1 - best]) - (b[best] - b[1 - best]))) < 1e-5
    assert len(predict.explain(run, 'd')) == 1 and len(predict.explain(run, 'x' * 5000)) == run.args['max_length']
    row = json.loads(script(predict.main, [out, '--json', '--explain', '--dtype', 'fp32', 'so dull'])[1])
    assert np.allclose([v for _, v in row['explain']], [v for _, v in pieces], atol=1e-4)


def test_predict_on_a_terminal():
    """Without texts on a terminal: a prompt, until the end of the input; --explain paints the tokens."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    typed, screen = iter(['the song was warm']), Terminal()

    def type_next(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError
    with patched(sys, 'stdin', Terminal()), patched(builtins, 'input', type_next), contextlib.redirect_stdout(screen):
        predict.main([tiny_run('full'), '--explain'])
    text = screen.getvalue()
    assert 'negative, positive' in text and '\tthe song was warm' in text
    assert re.sub('\033[^m]*m', '', text).count('the song was warm') == 2 and '\033[48;5;' in text


def test_ctrl_c_while_importing():
    # the handler is set because a shell that starts the tests in the background has SIGINT ignored in all its children
    code = ('import signal; signal.signal(signal.SIGINT, signal.default_int_handler); '
            'import data, os, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)')
    p = subprocess.run([sys.executable, '-c', code], cwd=os.path.dirname(os.path.abspath(__file__)), stderr=subprocess.PIPE, text=True)
    assert p.returncode in (-signal.SIGINT, 130) and p.stderr == 'interrupted\n', p


def test_scripts_end_as_they_should():
    """As a user runs them: exit codes, one sentence on stderr, no traceback."""
    here = os.path.dirname(os.path.abspath(__file__))
    for argv, code, match in ((['train_cls.py', '--bogus'], 2, 'error: '), (['eval.py', 'nowhere'], 2, 'nowhere'), (['predict.py', 'nowhere', 'x'], 2, 'nowhere'),
                              (['data.py', 'nowhere'], 2, 'nowhere'), (['bench.py', '--task', 'x'], 2, '--task'), (['train_cls.py', '--help'], 0, None),
                              (['train_gen.py', '--bogus'], 2, 'error: ')):
        p = subprocess.run([sys.executable, os.path.join(here, argv[0]), *argv[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp())
        assert p.returncode == code and 'Traceback' not in p.stderr, (argv, p.returncode, p.stderr)
        assert match is None or (match in p.stderr and len(p.stderr.strip().splitlines()) == 1), p.stderr


# --- generative classifiers ---

CPU = torch.device('cpu')
TOPICS = dict(animals='cat dog horse bird fish goose', colours='red green blue brown white pink', numbers='one two three four five six')
SHAPE = ['--model', 'nano', '--scratch', '--n_layer', '2', '--n_head', '2', '--n_embd', '32', '--block_size', '96', '--dtype', 'fp32']
GEN = dict(lora=['--lora', '--r', '4'], full=['--full'], prefix=['--prefix'], zero_shot=['--zero_shot'], direct=['--zero_shot', '--direct'],
           posterior=['--lora', '--r', '4', '--posterior_steps', '6'])


@functools.lru_cache(None)
def topics(labels=('animals', 'numbers'), sizes=(160, 80, 80)):
    """A csv whose classes use different words, in texts of 1 to 9 of them."""
    rng, rows = random.Random(0), ['text,label']
    for label, size in zip(labels, sizes):
        words, texts = TOPICS[label].split(), set()
        while len(texts) < size:
            texts.add(' '.join(rng.choice(words) for _ in range(rng.randint(2, 9) if texts else 1)))
        rows += [f'{text},{label}' for text in sorted(texts)]
    return write('topics.csv', '\n'.join(rows) + '\n')


def generate(*argv, out=None):
    """train_gen.py on those flags -> (run folder, what it printed)."""
    out = out or os.path.join(tmp(), 'run')
    code, text, _ = script(train_gen.main, [*argv, '--out', out])
    assert not code, code
    return out, text


@functools.lru_cache(None)
def pretrained():
    """A small language model that has read the topics: a run of --pretrain on a file of lines."""
    lines = [text for text, _ in data.read_table(topics(tuple(TOPICS)))[0]]
    return generate('--pretrain', '--data', write('lines.txt', '\n'.join(lines) + '\n'), *SHAPE, '--max_steps', '150', '--lr', '1e-2')[0]


@functools.lru_cache(None)
def gen_run(method):
    """One trained run per method over that model, shared by the tests that only read it."""
    steps = [] if 'zero' in GEN[method][0] else ['--max_steps', 120 if method == 'prefix' else 40, '--lr', '1e-2']
    return generate('--data', topics(), '--model', pretrained(), '--dtype', 'fp32', *GEN[method], *steps)[0]


def opened(method):
    return lora.open_run(gen_run(method), 'cpu', 'fp32')


def tree(folder):
    """{path in the folder: sha256} of all files."""
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    return {os.path.relpath(path, folder): data.sha256_file(path) for path in paths}


def class_model(kind, cfg=SMALL, classes=3):
    """A formula model with the given axis: plain, K LoRA updates or K prompts."""
    torch.manual_seed(3)                                                # classes that differ by half a nat and more
    model = formula_model(cfg, 0).requires_grad_(False)
    if kind in ('lora', 'top'):
        lora.add_lora(model, 4, 8.0, 0.1, lora.TARGETS.split(','), classes=classes, top=1 if kind == 'top' else None)
    if kind == 'prompt':
        lora.add_prompt(model, 2, classes=classes)
        model.prompt.data.mul_(3)                                       # so that the classes differ by more than a rounding
    return stirred(model)


def one_by_one(model, ids, whole, context=(), first=0):
    """log P(ids) as its definition says, in float64: one prefix at a time, a log-softmax over the vocabulary for the next token."""
    model, total = copy.deepcopy(model).double(), 0.0
    seen, rest = [model.end, *context, *ids[:first]], [*ids[first:]] + [model.end] * whole
    with torch.no_grad():
        for t in rest:
            total += float(model.lm_logits(torch.tensor([seen]))[0, -1].log_softmax(0)[t])
            seen.append(t)
    return total


TEXTS = ['', 'a', 'two words', 'exactly twelv', 'this one is far too long for twelve']


def test_gen_exact_score():
    """The first token stands behind <|endoftext|>; the last <|endoftext|> counts unless the text was cut; '' is <|endoftext|> alone."""
    model, enc = class_model('plain'), data.tokenizer('bytes')
    tokens = data.tokenize(enc, TEXTS, cache=False)
    for truncate in ('head', 'tail'):
        got = gpt.text_logprobs(model, tokens, 13, truncate, CPU, torch.float32)[:, 0]
        for i, text in enumerate(TEXTS):
            raw = list(text.encode())
            ids = raw[:13] if truncate == 'head' else raw[-13:]
            want = one_by_one(model, ids, len(raw) <= 13)
            assert abs(got[i] - want) < 1e-4, (truncate, text, got[i], want)
    assert abs(one_by_one(model, [], True) - one_by_one(model, [256], False)) < 1e-9    # the empty text's one id
    ids, n = ragged(257, pad=0)
    whole, context = torch.tensor([True, False, True, False]), (5, 9, 200)
    with torch.no_grad():
        got = model.logprob(ids, n, whole, context, first=torch.tensor([2, 0, 29, 4]))
        for row, k, w, f, value in zip(ids, n, whole, (2, 0, 29, 4), got):
            assert abs(one_by_one(model, row[:k].tolist(), bool(w), context, f) - float(value)) < 1e-4
        each = model.token_logprobs(ids, n, whole)
        assert each.shape == (4, 31) and torch.allclose(each.sum(1), model.logprob(ids, n, whole))
        assert each[1, 0] != 0 and not each[1, 1:].any() and each[2, 30] != 0 and not each[0, 8:].any() and not each[3, 12:].any()


def test_gen_score_equals_transformers():
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        skip('transformers is not installed')
    folder, model = tmp(), class_model('plain')
    gpt.save_hf(folder, model)
    theirs = GPT2LMHeadModel.from_pretrained(folder).double().eval()
    tokens = data.tokenize(data.tokenizer('bytes'), TEXTS, cache=False)
    got = gpt.text_logprobs(GPT.load(folder), tokens, 13, 'head', CPU, torch.float32)[:, 0]
    for i, ids in enumerate(tokens[i].tolist() for i in range(len(TEXTS))):
        line = [256, *ids] + [256] * (TEXTS[i] != '')
        line = torch.tensor([line[:1 + 13] if len(ids) > 13 else line])
        with torch.no_grad():
            want = theirs(line).logits[0, :-1].log_softmax(1).gather(1, line[0, 1:, None]).sum()
        assert abs(got[i] - float(want)) < 1e-4, (TEXTS[i], got[i], want)


def test_gen_score_is_of_the_text_alone():
    """Alone, in a batch of 64, in another order, padded by 100 of any id: plain, with K LoRA updates and with K prompts."""
    rng = random.Random(0)
    texts = [''.join(rng.choice('abc de') for _ in range(rng.randint(0, 40))) for _ in range(64)]
    tokens = data.tokenize(data.tokenizer('bytes'), texts, cache=False)
    order = rng.sample(range(64), 64)
    shuffled = data.tokenize(data.tokenizer('bytes'), [texts[i] for i in order], cache=False)
    for kind in ('plain', 'lora', 'prompt'):
        model = class_model(kind)
        score = functools.partial(gpt.text_logprobs, model, max_length=32, truncate='head', device=CPU, dtype=torch.float32)
        alone = score(tokens, batch_tokens=1)
        assert alone.shape == (64, 1 if kind == 'plain' else 3)
        assert kind == 'plain' or float(np.abs(alone[:, 0] - alone[:, 1]).max()) > 1
        assert np.abs(score(tokens, batch_tokens=10**6) - alone).max() < 1e-4, kind
        assert np.abs(score(shuffled) - alone[order]).max() < 1e-4, kind
        ids, n = data.collate(tokens, range(64), 32, 'head', 256)
        whole = gpt.ends_here(model, tokens, range(64), 32, CPU)
        for pad in (0, 256, None):
            far_padded = torch.randint(256, (64, ids.shape[1] + 100)) if pad is None else torch.full((64, ids.shape[1] + 100), pad)
            for row, mine, k in zip(far_padded, ids, n):
                row[:k] = mine[:k]
            with torch.no_grad():
                assert np.abs(model.logprob(far_padded, n, whole).view(64, -1).numpy() - alone).max() < 1e-4, (kind, pad)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most values that one tensor made inside has (.n), forward and backward."""
    n = 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.n = max(self.n, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_gen_chunks_of_the_vocabulary():
    """Values and gradients of next_logprobs are those of log_softmax, however many rows at a time; no tensor has a value per row and token."""
    torch.manual_seed(0)
    M, V, C = 23, 257, 16
    h, target, weights = torch.randn(M, C), torch.randint(V, (M,)), torch.randn(M)
    for trains in (False, True):
        results = []
        for rows, columns in ((None, None), (4, 100), (1000, 1000), (23, 64), (5, 257), (1, 1)):
            model = GPT(gpt.Config(1, 2, C, 8, V)).init_weights().requires_grad_(trains)
            torch.manual_seed(1)
            model.wte.weight.data.normal_()
            x = h.clone().requires_grad_()
            with patched(gpt, 'ROWS', rows), patched(gpt, 'COLUMNS', columns), Largest() as seen:
                out = model.next_logprobs(x, target) if rows else (x @ model.wte.weight.t()).log_softmax(1)[torch.arange(M), target]
                (out * weights).sum().backward()
            results.append([out.detach(), x.grad] + [model.wte.weight.grad] * trains)
            assert (seen.n >= M * V) == (rows in (None, 1000)), (rows, columns, seen.n, trains)
            assert model.wte.weight.grad is None or trains
        for other in results[1:]:
            assert all(float((a - b).abs().max()) < 1e-5 * max(1, float(b.abs().max())) for a, b in zip(other, results[0])), trains
    W = torch.randn(V, C, requires_grad=True)                           # only the vocabulary trains
    torch.nn.functional.log_softmax(h @ W.t(), 1)[torch.arange(M), target].sum().backward()
    want, W.grad = W.grad, None
    with patched(gpt, 'ROWS', 4), patched(gpt, 'COLUMNS', 60):
        gpt.NextLogprobs.apply(h, W, target).sum().backward()
    assert float((W.grad - want).abs().max()) < 1e-4


def test_gen_logits_of_all_positions():
    """On a GPU pads are projected, too, since counting the others would wait for it: the same numbers and gradients."""
    model, found = stirred(GPT(SMALL).init_weights()), []
    model.requires_grad_(False)
    lora.add_lora(model, 2, 4.0, 0.0, ['c_attn'], classes=3)
    stirred(model)
    ids, n = torch.randint(0, 256, (4, 9)), torch.tensor([9, 2, 1, 5])
    for model.gathers in (True, False):
        model.zero_grad()
        out = model.token_logprobs(ids, n, torch.tensor([True, False, True, False]), context=(7, 8), first=torch.tensor([0, 1, 0, 2]))
        out.sum().backward()
        found.append((out.detach(), *(p.grad for p in lora.trainables(model).values())))
    assert all(far(a, b) < 1e-5 for a, b in zip(*found)) and found[0][0].shape == (3, 4, 10) and (found[0][0] == 0).equal(found[1][0] == 0)
    assert gpt.place(model, CPU, torch.float32).gathers


def test_gen_bfloat16_of_the_vocabulary(packed=False):
    """In bfloat16 log p is as exact as rounded factors allow, though all logits lie near -100, where bfloat16 is 0.5 apart; gradients too."""
    torch.manual_seed(0)
    M, V, C = 400, 257, 64
    h, W = torch.randn(M, C), 0.4 * torch.randn(V, C)
    h[:, 0], W[:, 0] = 10.0, -10.0                                      # the offset that GPT-2's logits have in common
    target = torch.cat(((h @ W.t()).argmax(1)[:M // 2], torch.randint(V, (M // 2,))))   # likely tokens, then any
    for trains in (False, True)[:2 - packed]:
        x, w = h.bfloat16().requires_grad_(), W.bfloat16().requires_grad_(trains)
        out = gpt.NextLogprobs.apply(x, w, target, gpt.packed_vocabulary(w) if packed else None)
        out.sum().backward()
        exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, w))
        exact = (exact_x @ exact_w.t()).log_softmax(1)[torch.arange(M), target]
        exact.sum().backward()
        assert out.dtype == torch.float32 and float((exact_x.detach() @ exact_w.t()).max()) < -60 and float(out.detach().max()) < 1e-6
        assert float(((out - exact).abs() / (0.01 - exact)).max()) < 0.01                # of the log p itself, even where it is near 0
        assert float((out - exact).abs().mean()) < 0.005 and float((out - exact).mean().abs()) < 0.001
        for a, b in ((x.grad, exact_x.grad), (w.grad, exact_w.grad))[:1 + trains]:
            assert float((a - b).norm() / b.norm()) < 0.01, trains


def test_gen_packed_vocabulary():
    needs_packing()
    for columns in (4096, 100):
        with patched(gpt, 'COLUMNS', columns), patched(gpt, 'ROWS', 150):
            test_gen_bfloat16_of_the_vocabulary(packed=True)


def test_gen_logits_of_any_size():
    """Logits 500 apart overflow nothing: the sums are taken from the largest so far."""
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    W = torch.tensor([[0.0, 3.0], [500.0, -500.0], [-500.0, 0.0], [499.0, 0.0]])
    target = torch.tensor([0, 1])
    want = torch.log_softmax(h @ W.t(), 1)[torch.arange(2), target]
    for columns in (1, 2, 4):
        with patched(gpt, 'COLUMNS', columns):
            assert torch.allclose(gpt.NextLogprobs.apply(h, W, target), want, rtol=1e-6), columns


def test_gen_memory():
    """Scoring texts over GPT-2's vocabulary never holds more logits than it is allowed, let alone all of them."""
    model = GPT(gpt.Config(1, 2, 64, 256)).init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(50256, (16, 200))
    with torch.no_grad(), Largest() as seen:
        model.logprob(ids, torch.full((16,), 200), torch.ones(16, dtype=torch.bool))
    assert seen.n <= max(gpt.ROWS * gpt.COLUMNS, 50264 * 64) < 16 * 201 * 50257 / 4, seen.n


def test_gen_stacked_classes_equal_separate_models():
    """K adapters in one model give what K models with one adapter each give; `of` reads each text with one of the prompts. Blocks below the
    first adapter read each text once."""
    ids, n = ragged(257, pad=256)
    whole = torch.tensor([True, True, False, True])
    for kind in ('lora', 'prompt', 'top'):
        model, folders = class_model(kind), [tmp() for _ in range(3)]
        for i, folder in enumerate(folders):
            lora.save_peft(folder, model, 'somewhere', i)
        with torch.no_grad():
            separate = []
            for folder in folders:
                one = formula_model(SMALL, 0)
                lora.load_peft(folder, one)
                separate.append(one.eval().logprob(ids, n, whole))
            want, stacked = torch.stack(separate, 1), formula_model(SMALL, 0)
            lora.load_peft(folders, stacked, classes=3)
            rows = []
            for block in stacked.h:
                block.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(len(args[0])))
            got = stacked.eval().logprob(ids, n, whole)
            assert rows == [4 if kind == 'top' else 12] * (SMALL.n_layer - 1) + [12], (kind, rows)
            by_loss = stacked.logprob_by_loss(ids, n, whole)
            assert float((by_loss - want).abs().max()) < 1e-3, kind
            assert got.shape == (4, 3) and float(((got - want) / want).abs().max()) < 1e-5, kind
            assert float((want[:, 0] - want[:, 1]).abs().min()) > 0.1, want                          # or it would prove nothing
            if kind == 'prompt':
                of = torch.tensor([2, 0, 1, 2])
                assert torch.allclose(stacked.logprob(ids, n, whole, of=of), want.gather(1, of[:, None])[:, 0], rtol=1e-5)
        config = os.path.join(folders[1], 'adapter_config.json')
        data.write_json(config, {**data.read_json(config), **(dict(num_virtual_tokens=3) if kind == 'prompt' else dict(lora_alpha=99))})
        raises(UserError, lora.load_peft, folders, formula_model(SMALL, 0), classes=3, match='must agree')


def test_gen_every_method_end_to_end():
    for method in GEN:
        out = gen_run(method)
        info, results = (data.read_json(os.path.join(out, f'{name}.json')) for name in ('run', 'eval_results'))
        assert (info['kind'], info['labels'], info['data']) == ('gen', ['animals', 'numbers'], topics())
        assert (info['model'], info['seed']) == (pretrained(), 1337)
        assert info['method'] == dict(direct='zero_shot', posterior='lora').get(method, method)
        assert abs(sum(info['prior'].values()) - 1) < 1e-9 and set(info['calibration']) == {'tau', 'bias'} and info['calibration']['tau'] > 0
        assert ('likelihood_quantiles' in info) == (method != 'direct') and ('prompts' in info) == (method in ('zero_shot', 'direct'))
        names = {'run.json', 'eval_results.json', 'val_preds.json', 'val_labels.json'} | ({'base'} if method != 'full' else set())
        if 'zero' not in GEN[method][0]:
            names |= {'animals', 'numbers', 'log.jsonl'}
            files = {'config.json', 'model.safetensors'} if method == 'full' else {'adapter_config.json', 'adapter_model.safetensors'}
            assert all(set(os.listdir(os.path.join(out, label))) == files | {'class.json'} for label in info['labels'])
            steps = [r['step'] for r in records(out)]
            assert steps == sorted(steps) and steps[-1] == dict(posterior=46, prefix=120).get(method, 40)
            assert {'class', 'step', 'loss'} <= set(records(out)[0]) and [c for c in dict.fromkeys(r['class'] for r in records(out))] == (
                ['all classes'] if method == 'prefix' else info['labels'] + ['the posterior of all classes'] * (method == 'posterior'))
        assert set(os.listdir(out)) == names, (method, os.listdir(out))                             # no *.part, no resume.pt
        again = json.loads(script(evaluation.main, [out, '--json', '-', '--dtype', 'fp32'])[1])['runs'][0]
        assert again['accuracy'] == results['accuracy'] and abs(again['nll'] - results['nll']) < 1e-6
        assert set(again['uncalibrated']) == {'nll', 'brier', 'ece'}
        preds, y = (data.read_json(os.path.join(out, f'val_{x}.json')) for x in ('preds', 'labels'))
        assert np.mean([p['label'] == label for p, label in zip(preds, y)]) == info['results']['val_accuracy']
        texts = ['cat dog cat', '', 'two one', 'horse ' * 60]
        rows = [json.loads(line) for line in script(predict.main, [out, '--json', '--dtype', 'fp32', *texts])[1].splitlines()]
        run = opened(method)
        logits = run.logits(texts)
        assert [r['text'] for r in rows] == texts and all(abs(sum(r['probs'].values()) - 1) < 1e-9 for r in rows)
        assert np.allclose([[r['logprobs'][name] for name in run.labels] for r in rows], logits - run.log_prior, atol=1e-3)
        assert [r['label'] for r in rows] == [run.labels[c] for c in logits.argmax(1)] and ('nats_per_token' in rows[0]) == (method != 'direct')


def test_gen_learns():
    """Each method tells classes of different words apart, where the base alone cannot."""
    for method in ('lora', 'full', 'prefix', 'posterior'):
        results = data.read_json(os.path.join(gen_run(method), 'eval_results.json'))
        assert results['accuracy'] >= 0.9 > results['majority_accuracy'] + 0.1, (method, results)
        log = [r for r in records(gen_run(method)) if 'val_loss' in r and r['class'] == 'animals']
        assert not log or log[-1]['val_loss'] < 0.75 * records(pretrained())[-1]['val_loss'], log


def test_gen_loss_method_agrees():
    """--method loss, the usual computation, gives the numbers of the exact one, for every kind of run."""
    texts = ['cat dog', '', 'seven', 'horse fish ' * 30]
    for method in GEN:
        run = opened(method)
        want = run.logits(texts)
        run.method = 'loss'
        with patched(GPT, 'logprob', stop_here):                        # it is indeed another computation
            got = run.logits(texts)
        assert np.abs(got - want).max() < 1e-3, (method, got, want)
    code, text, _ = script(evaluation.main, [gen_run('lora'), '--method', 'loss', '--json', '-', '--dtype', 'fp32'])
    assert abs(json.loads(text)['runs'][0]['nll'] - data.read_json(os.path.join(gen_run('lora'), 'eval_results.json'))['nll']) < 1e-4
    raises(UserError, evaluation.main, [tiny_run('full'), '--method', 'loss'], match='discriminative')


def test_gen_bf16_is_close():
    texts = ['cat dog', 'one two three', 'horse fish ' * 30]
    for method in GEN:
        want, got = (lora.open_run(gen_run(method), 'cpu', dtype).logits(texts) for dtype in ('fp32', 'bf16'))
        assert 0 < np.abs(got - want).max() < 0.01 * np.abs(want).max(), (method, got, want)


def parser_of(parse):
    """{flag: what it accepts and what --help says of it} of a training script."""
    def catch(self, argv=None):
        raise Stop({a.dest: (a.default, a.help, a.choices, a.type, a.nargs, a.metavar, type(a)) for a in self._actions})
    with patched(data.Parser, 'parse', catch):
        try:
            parse([])
        except Stop as e:
            return e.args[0]


def test_gen_scripts_are_alike():
    """The loop of both training scripts is the same text, and a flag that both have is the same flag."""
    a, b = (inspect.getsource(module.main).split('# --- loop ---\n') for module in (train_cls, train_gen))
    assert len(a) == len(b) == 3 and len(a[1].splitlines()) > 30
    a, b = (textwrap.dedent(parts[1].rstrip(' ')) for parts in (a, b))
    assert a == b, next((x, y) for x, y in zip(a.splitlines(), b.splitlines()) if x != y)
    a, b = parser_of(train_cls.parse), parser_of(train_gen.parse)
    assert len(set(a) & set(b)) > 30
    for name in set(a) & set(b):
        assert a[name] == b[name], (name, a[name], b[name])


QUICKLY = ['--max_steps', '8', '--batch_size', '4', '--lr', '1e-2', '--eval_every', '2', '--trunk_dropout', '0.1', '--r', '4']


def over_base(*argv):
    """Flags of a short run on the topics over the small pretrained model."""
    return ['--data', topics(), '--model', pretrained(), '--dtype', 'fp32', *argv]


@functools.lru_cache(None)
def joint():
    """Two classes trained in one run, to compare others with; copy it before changing it."""
    return generate(*over_base(*QUICKLY))[0]


def copied(folder):
    out = os.path.join(tmp(), 'copy')
    shutil.copytree(folder, out)
    return out


def weights(out):
    """sha256 of every file of weights of a run."""
    return {name: digest for name, digest in tree(out).items() if name.endswith('.safetensors')}


def test_gen_class_by_class_equals_the_joint_run():
    out, text = generate(*over_base(*QUICKLY), '--class_id', '0')
    assert 'it lacks the classes numbers' in text and sorted(os.listdir(out)) == ['animals', 'base', 'log.jsonl', 'run.json']
    raises(UserError, lora.open_run, out, match="lacks the class 'numbers'")
    later = copied(out)
    generate('--class_id', 'numbers', out=out)                          # its flags are the run's
    assert weights(out) == weights(joint())
    assert data.read_json(os.path.join(out, 'eval_results.json')) == data.read_json(os.path.join(joint(), 'eval_results.json'))
    generate('--resume', out=later)                                     # trains what is lacking
    assert weights(later) == weights(joint()) and set(os.listdir(later)) == set(os.listdir(joint()))
    full, parts = generate(*over_base('--full', *QUICKLY[:-2]))[0], os.path.join(tmp(), 'parts')
    for c in ('numbers', 'animals'):
        generate(*over_base('--full', *QUICKLY[:-2]), '--class_id', c, out=parts)
    assert weights(parts) == weights(full) and len(weights(full)) == 2
    assert weights(generate(*over_base(*QUICKLY), '--trunk_dropout', '0')[0]) != weights(joint())     # there was dropout, of the same numbers


def test_gen_class_is_added():
    """A third class, first by name or not: the files of the others stay as they are, and the run has three."""
    out = copied(joint())
    before = tree(out)
    _, text = generate('--data', topics(('colours', 'numbers', 'animals')), '--class_id', 'colours', out=out)
    after = tree(out)
    assert all(after[name] == digest for name, digest in before.items() if name.split(os.sep)[0] in ('animals', 'numbers', 'base'))
    assert 'validation and test texts were training rows of the other classes' in text
    run = lora.open_run(out, 'cpu', 'fp32')
    assert run.labels == run.info['labels'] == ['animals', 'colours', 'numbers'] and run.logits(['red pink']).shape == (1, 3)
    assert data.read_json(os.path.join(out, 'eval_results.json'))['n'] == 32 and set(run.info['calibration']['bias']) == set(run.labels)
    old = lora.open_run(joint(), 'cpu', 'fp32')
    a, b = old.logits(['cat', 'two one']) - old.log_prior, run.logits(['cat', 'two one']) - run.log_prior
    assert np.allclose(a, b[:, [0, 2]], atol=1e-3)
    steps = [r['step'] for r in records(out)]
    assert steps == sorted(steps) and records(out)[-1]['class'] == 'colours'
    raises(UserError, train_gen.main, ['--data', topics(), '--class_id', '0', '--out', out], match="no rows of the class 'colours'")


def test_gen_two_classes_are_added():
    """One after the other: the run has all four in the end, by --class_id or by --resume."""
    path = write('four.csv', data.read_bytes(topics(tuple(TOPICS))).decode() + ''.join(f'{"x" * i},letters\n' for i in range(1, 40)))
    out = copied(joint())
    _, text = generate('--data', path, '--class_id', 'colours', out=out)
    assert 'it lacks the classes letters' in text
    assert lora.open_run(out, 'cpu', 'fp32').logits(['cat']).shape == (1, 2)        # the finished run still works
    other = copied(out)
    generate('--data', path, '--class_id', 'letters', out=out)
    assert lora.open_run(out, 'cpu', 'fp32').labels == ['animals', 'colours', 'letters', 'numbers']
    generate('--resume', out=other)                                     # as the message says
    assert lora.open_run(other, 'cpu', 'fp32').labels == ['animals', 'colours', 'letters', 'numbers']


def test_gen_class_is_replaced():
    out = copied(joint())
    before = tree(out)
    generate('--class_id', '1', '--max_steps', '14', '--lr', '3e-2', out=out)
    after = tree(out)
    assert {name.split(os.sep)[0] for name in after if after[name] != before.get(name)} - {'numbers'} <= {
        'run.json', 'log.jsonl', 'eval_results.json', 'val_preds.json', 'val_labels.json'}
    assert after[os.path.join('numbers', 'adapter_model.safetensors')] != before[os.path.join('numbers', 'adapter_model.safetensors')]
    assert records(out)[-1]['step'] == records(joint())[-1]['step'] + 5 and set(after) == set(before)


def test_gen_class_with_another_dropout():
    """Dropout is a matter of training: a class may have its own, or is refused; in no case does the run stop working."""
    out = copied(joint())
    try:
        generate('--class_id', '1', '--dropout', '0.3', out=out)
    except UserError:
        pass
    assert lora.open_run(out, 'cpu', 'fp32').logits(['cat']).shape == (1, 2)


def test_gen_class_takes_its_own_length():
    """--max_steps on a run that was trained by --epochs: the typed flag counts, not the run's."""
    out = generate(*over_base('--epochs', '0.2', '--batch_size', '4'))[0]
    before = records(out)[-1]['step']
    generate('--class_id', '1', '--max_steps', '30', out=out)
    assert records(out)[-1]['step'] - before == 10                      # its third of the rows


def test_gen_class_errors():
    out = copied(joint())
    for argv, match in ((['--r', '8'], '--r 8'), (['--targets', 'c_attn'], '--targets'), (['--top', '1'], '--top 1'), (['--max_length', '20'], '--max_length'),
                        (['--full'], '--full'), (['--model', 'nano'], '--model'), (['--posterior_steps', '3'], '--posterior_steps')):
        raises(UserError, train_gen.main, ['--class_id', '1', '--out', out, *argv], match=match)
    for c in ('2', 'plants', '-1', '1.0', ''):
        raises(UserError, train_gen.main, ['--class_id', c, '--out', out], match='no such class; ')
    assert tree(out) == tree(joint())
    raises(UserError, train_gen.main, [*over_base(), '--class_id', '0', '--out', tiny_run('full')], match='no generative run')
    raises(UserError, train_gen.main, ['--class_id', '0', '--out', gen_run('prefix')], match='no generative run of --lora or --full')
    raises(UserError, train_gen.main, ['--class_id', '0', '--out', pretrained()], match='is a language model')
    record = os.path.join(out, 'numbers', 'class.json')
    data.write_json(record, {**data.read_json(record), 'base': '0' * 64})
    for main, argv in ((predict.main, [out, 'x']), (evaluation.main, [out])):
        raises(UserError, main, argv, match='another base model')
    shutil.rmtree(os.path.join(out, 'numbers'))
    raises(UserError, predict.main, [out, 'x'], match="lacks the class 'numbers'")
    generate('--resume', out=out)
    assert weights(out) == weights(joint())
    path = os.path.join(out, 'base', 'model.safetensors')
    tensors = {n: t.clone() for n, t in gpt.load_safetensors(path).items()}
    tensors['transformer.wpe.weight'][0, 0] += 1
    gpt.save_safetensors(path, tensors)
    raises(UserError, lora.open_run, out, match='another base model')
    raises(UserError, train_gen.main, ['--class_id', '0', '--out', out], match='another base model')


@contextlib.contextmanager
def interrupted_at(call):
    """Ctrl-C in the middle of the call-th forward pass of training."""
    calls, real = [], GPT.logprob

    def logprob(self, *a, **k):
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGINT)
        return real(self, *a, **k)
    with patched(GPT, 'logprob', logprob):
        yield


def same_run(out, whole):
    """The same weights, predictions and steps, and nothing left over."""
    assert weights(out) == weights(whole)
    assert sorted(tree(out)) == sorted(tree(whole)), sorted(tree(out))
    for name in ('eval_results.json', 'val_preds.json'):
        if os.path.exists(os.path.join(whole, name)):
            assert data.read_json(os.path.join(out, name)) == data.read_json(os.path.join(whole, name)), name
    steps, wanted = ([(r['step'], r.get('class'), r.get('val_loss')) for r in records(x)] for x in (out, whole))
    assert steps == wanted, (steps, wanted)


def test_gen_resume_is_bitwise():
    """Interrupted in the second class, in the posterior phase, in a run of one phase; each forward pass is half a step."""
    halves = [*QUICKLY, '--grad_accum', '2']
    others = [*QUICKLY[:-2], '--grad_accum', '2']                       # without --r
    for argv, calls in ((['--lora', *halves], (3, 13)), (['--lora', *halves, '--posterior_steps', '4'], (21,)), (['--full', *others], (13,)),
                        (['--prefix', *others, '--posterior_steps', '4'], (7, 19)), (['--pretrain', *others], (7,))):
        whole = generate(*over_base(*argv))[0]
        for call in calls:
            out = os.path.join(tmp(), 'run')
            with interrupted_at(call):
                code, text, err = script(train_gen.main, [*over_base(*argv), '--out', out])
            assert code == 130 and f'--resume --out {out}' in err, (argv, code, err)
            assert [at for at in tree(out) if at.endswith('resume.pt')] != []
            raises(UserError, train_gen.main, ['--resume', '--out', out, '--lr', '5'], match='--lr')
            raises(UserError, train_gen.main, [*over_base(*argv), '--out', out], match='already holds a run')
            generate('--resume', out=out)
            same_run(out, whole)
            assert data.read_json(os.path.join(out, 'run.json'))['args']['lr'] == 1e-2


def test_gen_resume_while_a_class_is_added():
    out, whole = copied(joint()), copied(joint())
    argv = ['--data', topics(('colours', 'numbers', 'animals')), '--class_id', 'colours']
    generate(*argv, out=whole)
    with interrupted_at(2):
        assert script(train_gen.main, [*argv, '--out', out])[0] == 130
    assert lora.open_run(out, 'cpu', 'fp32').labels == ['animals', 'numbers']       # it works meanwhile
    generate('--resume', out=out)
    same_run(out, whole)
    assert lora.open_run(out, 'cpu', 'fp32').labels == ['animals', 'colours', 'numbers']


class Killed(BaseException):
    """What a kill leaves behind: nothing after it runs."""


@contextlib.contextmanager
def killed(owner, name, call, after=False):
    """The call-th call of owner.name inside is the last thing that happens, or (without after) no longer happens."""
    calls, real = [], getattr(owner, name)

    def fn(*a, **k):
        calls.append(1)
        if len(calls) != call:
            return real(*a, **k)
        if after:
            real(*a, **k)
        raise Killed
    with patched(owner, name, fn):
        yield


def test_gen_promote_survives_a_kill():
    """Killed before any of the renames that move what a phase made to its place, then resumed: the run of an undisturbed one."""
    for method in ('--lora', '--prefix'):
        argv = over_base(method, '--max_steps', '2', '--batch_size', '4', '--lr', '1e-2', '--posterior_steps', '1')
        whole, calls = generate(*argv)[0], 0
        while True:
            out = os.path.join(tmp(), 'run')
            try:
                with killed(os, 'rename', calls + 1):
                    script(train_gen.main, [*argv, '--out', out])
                break                                                   # there is no such rename any more
            except Killed:
                calls += 1
            generate('--resume', out=out)
            same_run(out, whole)
        assert calls >= 4, calls


def test_gen_promote_of_the_log_survives_a_kill():
    """Killed while the log's lines move, or the emptied folder goes: resumed, each line stands there once."""
    argv = over_base(*QUICKLY)
    for owner, name, call, after in (
            (os, 'remove', 1, False), (os, 'remove', 1, True), (os, 'remove', 2, True), (shutil, 'rmtree', 1, False), (shutil, 'rmtree', 2, False)):
        out = os.path.join(tmp(), 'run')
        with killed(owner, name, call, after), contextlib.suppress(Killed):
            script(train_gen.main, [*argv, '--out', out])
            raise AssertionError(f'{name} was not called {call} times')
        generate('--resume', out=out)
        same_run(out, joint())


def test_gen_prior():
    run = opened('lora')
    counts = np.bincount(data.load(topics()).train.y)
    assert run.info['prior'] == dict(zip(run.labels, (counts / counts.sum()).tolist())) and counts[0] > 1.5 * counts[1]
    tokens = data.tokenize(run.enc, ['cat', 'one two', ''], cache=False)
    pure = gpt.text_logprobs(run.passes[0][0], tokens, 128, 'head', CPU, torch.float32)
    assert np.allclose(run.logits_of(tokens), pure + np.log(counts / counts.sum()), atol=1e-4)
    out, _ = generate(*over_base(*QUICKLY), '--prior', 'uniform')
    assert weights(out) == weights(joint())                             # it plays no part in the likelihoods
    other = lora.open_run(out, 'cpu', 'fp32')
    assert list(other.info['prior'].values()) == [0.5, 0.5] and opened('zero_shot').info['prior'] == other.info['prior']
    mine = lora.open_run(joint(), 'cpu', 'fp32').logits_of(tokens)
    assert np.allclose(other.logits_of(tokens) - np.log(0.5), mine - np.log(counts / counts.sum()), atol=1e-4)


def test_gen_calibration_is_fitted():
    """Known tau and biases are found again; few or separable rows give finite ones; the NLL falls."""
    rng = np.random.RandomState(0)
    prior = np.log([0.5, 0.3, 0.2]).astype(np.float32)

    def nll(x, y, tau=1.0, bias=0.0):
        return evaluation.metrics(evaluation.softmax(x / tau + prior + bias), y, ['a', 'b', 'c'])['nll']
    for tau, bias in ((12.0, (0.7, -0.2, -0.5)), (0.5, (0.0, 0.0, 0.0)), (1.0, (-1.0, 2.0, -1.0))):
        x = (-80 + 2 * tau * rng.randn(20000, 3)).astype(np.float32)
        p = evaluation.softmax(x / tau + prior + np.array(bias))
        y = (rng.rand(20000, 1) > p.cumsum(1)).sum(1)
        got, b = train_gen.fit_calibration(x, prior, y)
        assert abs(got / tau - 1) < 0.05 and np.abs(b - b.mean() - bias + np.mean(bias)).max() < 0.1, (tau, got, bias, b)
        assert nll(x, y, got, b) <= nll(x, y) + 1e-3 and (tau == 0.5 or nll(x, y, got, b) < nll(x, y) - 0.05)
    for x, y in (([[-300.0, -310, -305], [-200, -190, -220]], [0, 1]), ([[-300.0, -310, -305], [-200, -190, -220]], [1, 0]),
                 ([[-5.0, -9, -9]], [0]), (np.eye(3)[[0, 1, 2] * 9] * 50, [0, 1, 2] * 9)):
        x, y = np.array(x, np.float32), np.array(y)
        tau, b = train_gen.fit_calibration(x, prior, y)
        assert 0 < tau < np.inf and np.isfinite(b).all() and nll(x, y, tau, b) <= nll(x, y) + 1e-3, (x, y, tau, b)


def test_gen_decision_is_bayes_rule():
    """The predicted class is that of the uncalibrated logits, with --calibrated that of the calibrated probabilities, where these differ."""
    out = copied(gen_run('lora'))
    path = os.path.join(out, 'run.json')
    info = data.read_json(path)
    data.write_json(path, {**info, 'calibration': dict(tau=2.0, bias=dict(animals=0.0, numbers=500.0))})
    run = lora.open_run(out, 'cpu', 'fp32')
    logits = run.logits(['cat dog'])
    prior = np.log(list(info['prior'].values()))
    assert np.allclose(run.calibrated(logits), (logits - prior) / 2 + prior + [0, 500], atol=1e-3)
    answers = [json.loads(script(predict.main, [out, '--json', '--dtype', 'fp32', 'cat dog', *flag])[1]) for flag in ([], ['--calibrated'])]
    assert [a['label'] for a in answers] == ['animals', 'numbers'] and answers[0]['probs'] == answers[1]['probs']
    assert answers[0]['probs']['numbers'] > 0.99
    plain, calibrated = (json.loads(script(evaluation.main, [out, '--json', '-', '--dtype', 'fp32', *flag])[1])['runs'][0]
                         for flag in ([], ['--calibrated']))
    assert plain['accuracy'] == 1 and calibrated['accuracy'] < 0.5 and plain['nll'] == calibrated['nll'] > 100 and plain['uncalibrated']['nll'] < 0.1
    assert 'before calibration' in script(evaluation.main, [out, '--dtype', 'fp32'])[1]
    raises(UserError, evaluation.main, [tiny_run('full'), '--calibrated'], match='discriminative')
    raises(UserError, predict.main, [tiny_run('full'), '--calibrated', 'x'], match='discriminative')


def test_gen_posterior_steps():
    """Texts of shared words and one telling one, few steps: the validation accuracy does not fall by the posterior phase, the loss falls."""
    rng = random.Random(0)

    def text(label):
        words = [rng.choice('the of and to in it was for on with as by at'.split()) for _ in range(6)]
        words[rng.randrange(6)] = rng.choice((['red', 'pink'], ['dog', 'fish'])[label])
        return f'{" ".join(words)},{"ab"[label]}\n'
    train_file, val = ('text,label\n' + ''.join(text(i % 2) for i in range(n)) for n in (300, 200))
    argv = ['--data', write('t.csv', train_file), '--val', write('v.csv', val), '--model', pretrained(), '--dtype', 'fp32', '--lr', '1e-2',
            '--max_steps', '40']
    plain, sharp = (data.read_json(os.path.join(generate(*argv, *more)[0], 'run.json'))['results'] for more in ([], ['--posterior_steps', '40']))
    assert 0.5 <= plain['val_accuracy'] < 0.98, plain                   # there is something to gain
    assert sharp['val_accuracy'] >= plain['val_accuracy'] and sharp['val_loss'] < plain['val_loss'], (plain, sharp)
    losses = []
    for share in ('0', '0.9'):                                          # the share of the likelihood reaches the loss
        out, _ = generate(*over_base(*QUICKLY, '--posterior_steps', '1', '--likelihood_share', share))
        losses.append([r['loss'] for r in records(out) if 'loss' in r][-1])
    assert losses[1] > losses[0] + 0.1, losses


def test_gen_auc():
    s, y = np.array([3.0, 1, 2, 2, 0]), np.array([True, False, True, False, False])
    assert abs(train_gen.auc(s, y) - 5.5 / 6) < 1e-12                     # one pair of six is a tie
    assert abs(train_gen.auc(s, ~y) - 0.5 / 6) < 1e-12 and train_gen.auc(np.zeros(5), y) == 0.5
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        skip('scikit-learn is not installed (by hand it was tested)')
    rng = np.random.RandomState(0)
    for digits in (1, 9):
        s, y = rng.randn(500).round(digits).astype(np.float32), rng.rand(500) < 0.2
        assert abs(train_gen.auc(s, y) - roc_auc_score(y, s)) < 1e-9


def test_gen_explain():
    """The prior's share first, then one number per character; together exactly the margin of the decision."""
    for method in ('lora', 'full', 'prefix', 'zero_shot'):
        run = opened(method)
        for text in ('cat dog bird', 'one', '', 'horse ' * 40, 'größe 中'):
            pieces = predict.explain(run, text)
            logits = np.sort(run.logits([text])[0])
            assert pieces[0][0] == 'P(class)' and abs(sum(v for _, v in pieces) - (logits[-1] - logits[-2])) < 1e-3, (method, text)
            room = run.args['max_length']
            assert ''.join(t for t, _ in pieces[1:]) == (text[:room] if len(text) > room else text + '<|endoftext|>')
        best, second = np.argsort(-run.logits(['cat'])[0])
        assert abs(predict.explain(run, 'cat')[0][1] - (run.log_prior[best] - run.log_prior[second])) < 1e-6
    terms = opened('lora').token_logprobs('cat dog')[1]
    assert terms.shape == (8, 2) and np.allclose(terms.sum(0) + opened('lora').log_prior, opened('lora').logits(['cat dog'])[0], atol=1e-3)


def test_gen_readable():
    enc = data.tokenizer('bytes')
    ids = list('a中é'.encode()) + list(b'\xff\xfe') + [ord('z')]
    pieces = predict.readable(enc, ids, [float(2 ** i) for i in range(len(ids))])
    assert pieces[:3] == [('a', 1.0), ('中', 14.0), ('é', 48.0)] and sum(v for _, v in pieces) == 2 ** len(ids) - 1
    assert ''.join(t for t, _ in pieces[3:]).endswith('z') and '\ufffd' in pieces[3][0]
    assert predict.readable(enc, list('中'.encode())[:2], [1.0, 2.0]) == [('\ufffd', 3.0)]


def test_gen_html():
    page = os.path.join(tmp(), 'page.html')
    code, text, _ = script(predict.main, [gen_run('lora'), '--explain', '--html', page, 'cat <script>&', 'one "two"'])
    html = data.read_bytes(page).decode()
    assert html.startswith('<!doctype html>') and html.count('<p><b>') == 2 and '<script' not in html and 'http' not in html and 'src=' not in html
    assert '>&lt;</span>' in html and '>&amp;</span>' in html and '>P(class)</span>' in html and len(text.splitlines()) == 2
    raises(UserError, predict.main, [gen_run('lora'), '--html', page, 'x'], match='--html does nothing without --explain')


def test_gen_html_from_a_terminal():
    """With texts typed one by one the page is written, too, or --html is refused; it is not dropped in silence."""
    class Terminal(io.StringIO):
        isatty = lambda self: True

    def type_next(prompt, typed=iter(['cat dog'])):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError
    page = os.path.join(tmp(), 'page.html')
    with patched(sys, 'stdin', Terminal()), patched(builtins, 'input', type_next), contextlib.redirect_stdout(Terminal()):
        try:
            predict.main([gen_run('lora'), '--explain', '--html', page])
        except UserError:
            return
    assert b'>P(class)<' in data.read_bytes(page)


def test_gen_sample():
    def sample(*argv):
        return script(predict.main, [gen_run('lora'), '--dtype', 'fp32', '--sample', *argv])[1]
    a = sample('animals')
    assert a == sample('animals') != sample('animals', '--seed', '9') and a != sample('numbers')
    assert a.splitlines()[1:] == sample('animals', '--num', '2', '--seed', '1').splitlines()                     # the i-th is seed + i
    words = [re.findall('|'.join(TOPICS['animals'].split()), sample(label, '--num', '4', '--temperature', '0.5')) for label in ('animals', 'numbers')]
    assert len(words[0]) > 5 > len(words[1]), words
    sure = [sample('numbers', '--top_k', '1', '--num', '1', '--seed', s) for s in '12']
    assert sure[0] == sure[1]                                           # the likeliest token each time: nothing is left to chance
    for method in ('full', 'prefix', 'zero_shot'):
        run = opened(method)
        assert run.sample('animals', 20, seed=1) == run.sample('animals', 20, seed=1) != run.sample('animals', 20, seed=2)
    assert len(opened('lora').sample('animals', 3, seed=0)) <= 3
    with patched(torch, 'multinomial', lambda *a, **k: torch.tensor([97])):
        assert [opened(m).sample('numbers', 10**6) for m in ('lora', 'prefix')] == ['a' * 95] * 2    # all positions
    for argv, match in ((['--sample', 'plants'], 'plants'), (['--sample', 'animals', 'a text'], 'leave text out'),
                        (['--num', '3', 'x'], 'without --sample'), (['--sample', 'animals', '--json'], 'leave json out')):
        raises(UserError, predict.main, [gen_run('lora'), *argv], match=match)


def test_gen_out_of_distribution():
    ds, out = data.load(topics()), gen_run('lora')

    def labels(texts, *flags):
        return [json.loads(line)['label'] for line in script(predict.main, [out, '--json', '--dtype', 'fp32', *flags, *texts])[1].splitlines()]
    assert labels(['#@!%% 99 zzz', 'cat dog bird'], '--ood_quantile', '0.05') == [None, 'animals'] and None not in labels(['#@!%% 99 zzz'])
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


def test_gen_prompts():
    assert opened('zero_shot').info['prompts'] == dict(animals='animals:\n', numbers='numbers:\n')
    assert opened('direct').info['prompts'] == dict(animals='\nLabel: animals', numbers='\nLabel: numbers')
    for table in (train_gen.PROMPTS, train_gen.ANSWERS):                # the published data sets have good ones
        assert set(table) == {'sst2', 'agnews', 'imdb', 'sms'} and all(len(set(p.values())) == len(p) for p in table.values())
    for name in ('sst2', 'agnews', 'imdb', 'sms'):
        assert set(train_gen.PROMPTS[name]) == set(train_gen.ANSWERS[name])
    mine = dict(animals='cat dog\n', numbers='one two\n')
    out, _ = generate(*over_base('--zero_shot', '--prompts', write('p.json', json.dumps(mine))))
    run = lora.open_run(out, 'cpu', 'fp32')
    assert run.info['prompts'] == mine
    model = GPT.load(pretrained()).eval()
    want = [one_by_one(model, b'horse', True, list(mine[label].encode())) for label in run.labels]
    assert np.abs(run.logits(['horse'])[0] - run.log_prior - want).max() < 1e-3
    out = os.path.join(tmp(), 'none')
    for content, match in (('["a"]', 'JSON object'), ('{"animals": "x"}', "'numbers' is missing"), ('{', 'p.json'),
                           ('{"animals": 3, "numbers": "x"}', 'JSON object'), ('{"animals": "", "numbers": "y"}', 'JSON object'),
                           ('{"animals": "x", "numbers": "y", "plants": "z"}', "'plants' is no class")):
        raises(UserError, train_gen.main, [*over_base('--zero_shot', '--prompts', write('p.json', content), '--out', out)], match=match)
    assert not os.path.exists(out)


def test_gen_contextual_calibration():
    """--direct: log P(class's words | text), less the logarithm of the mean posterior behind texts that say nothing. Of a single such text the
    posterior is then uniform; of several, their posteriors before it are so on average."""
    run = opened('direct')
    model = GPT.load(pretrained()).eval()
    raw = [one_by_one(model, list(f'cat dog{prompt}'.encode()), False, first=7) for prompt in run.info['prompts'].values()]
    assert np.abs(run.logits(['cat dog'])[0] - run.log_prior + run.neutral - raw).max() < 1e-3
    p = np.array([evaluation.softmax((run.logits([t]) - run.log_prior + run.neutral).astype(float))[0] for t in lora.NEUTRAL])
    assert np.allclose(np.exp(run.neutral), p.mean(0), atol=1e-4) and np.ptp(run.neutral) > 0.01, run.neutral
    with patched(lora, 'NEUTRAL', ['N/A']):
        alone = opened('direct')
    of_one, of_three = (evaluation.softmax(r.logits(['N/A']))[0] for r in (alone, run))
    assert np.allclose(of_one, 0.5, atol=1e-4) and not np.allclose(of_three, 0.5, atol=1e-4)


def test_gen_pretrain():
    """A language model of a file of lines, for --model of both scripts; no classifier itself."""
    out = pretrained()
    info = data.read_json(os.path.join(out, 'run.json'))
    assert info['kind'] == 'lm' and info['labels'] == [] and set(os.listdir(out)) == {'run.json', 'config.json', 'model.safetensors', 'log.jsonl'}
    log = [r['val_loss'] for r in records(out) if 'val_loss' in r]
    assert log[-1] < 0.6 * log[0] and min(log) == info['results']['val_loss']
    flags = ('seed', 'data_dir', 'val', 'test', 'text_col', 'label_col', 'max_samples', 'balance')
    texts, val_texts, _ = data.load_texts(info['data'], **{name: info['args'][name] for name in flags})
    assert len(val_texts) == 32 and len(texts) == 288 and not set(texts) & set(val_texts)
    model, tokens = GPT.load(out), data.tokenize(data.tokenizer('bytes'), val_texts, cache=False)
    nats = -gpt.text_logprobs(model, tokens, 95, 'head', CPU, torch.float32).sum() / (tokens.lengths + 1).sum()
    assert abs(nats - min(log)) < 1e-4, (nats, log)                     # nats per token, <|endoftext|> counted
    cls, _ = train('--data', topics(), '--model', out, '--head', '--max_steps', '1')
    assert data.read_json(os.path.join(cls, 'run.json'))['base'] == dict(name=out, sha256=gpt.base_sha256(out))
    assert data.read_json(os.path.join(gen_run('lora'), 'run.json'))['base'] == dict(name=out, sha256=gpt.base_sha256(out))
    for main, argv in ((predict.main, [out, 'x']), (evaluation.main, [out]), (train_gen.main, ['--resume', '--out', out])):
        raises(UserError, main, argv, match='is a language model')
    raises(UserError, train_gen.main, ['--pretrain', '--data', topics(), '--model', 'nano', '--scratch', '--out', out], match='already holds a run')
    table, _ = generate('--pretrain', '--data', topics(), *SHAPE, '--max_steps', '2')               # a table's texts, its test rows left out
    assert data.read_json(os.path.join(table, 'run.json'))['rows'] == dict(train=192, val=24, test=0)
    raises(UserError, generate, '--pretrain', '--data', write('few.txt', 'one\ntwo\ntwo\n'), *SHAPE, match='at least 10')


class FakeTraining:
    """subprocess.Popen of nano_folder: makes a folder instead of training for a minute."""
    code, also, commands = 0, (), []

    def __init__(self, command, **kw):
        self.returncode, self.stdout = self.code, ['step 400/1600  loss 1\n', 'something else\n']
        self.commands.append(command)
        for folder in [command[-1]] * (self.code == 0) + list(self.also):
            shutil.copytree(pretrained(), folder)

    __enter__ = lambda self: self
    __exit__ = lambda self, *a: None


def test_gen_nano_is_made_once():
    model = pretrained()
    with fresh_cache() as cache, patched(subprocess, 'Popen', FakeTraining), patched(FakeTraining, 'commands', []):
        folder = os.path.join(cache, 'models', f'nano-{data.DEMO_VERSION}')
        code, text, _ = script(lambda argv: print(gpt.nano_folder()), [])
        assert text.splitlines()[-1] == folder and text.count('nano: step 400/1600') == 1 and 'something else' not in text
        command, = FakeTraining.commands
        assert command[0] == sys.executable and os.path.basename(command[1]) == 'train_gen.py' and os.path.isfile(command[1])
        args, given, _ = train_gen.parse(command[2:])
        assert (args.method, args.data, args.model, args.scratch) == ('pretrain', 'demo', 'nano', True) and args.max_steps == args.eval_every
        assert gpt.model_folder('nano') == folder and len(FakeTraining.commands) == 1             # kept
        assert tree(folder) == tree(model) and os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
        for code, error in ((2, UserError), (130, KeyboardInterrupt)):
            shutil.rmtree(os.path.join(cache, 'models'))
            with patched(FakeTraining, 'code', code):
                raises(error, gpt.nano_folder)
            assert os.listdir(os.path.join(cache, 'models')) == []      # nothing half made
        with patched(FakeTraining, 'also', [folder]), contextlib.redirect_stdout(io.StringIO()):                  # another process was faster
            assert gpt.nano_folder() == folder and tree(folder) == tree(model)
        assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]


def test_gen_files_open_in_transformers_and_peft():
    """Every class of a run, opened by the programs its files are for, gives our log P(text | class)."""
    try:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
    except ImportError:
        skip('transformers or peft is not installed')
    texts = ['cat dog bird', 'one', 'two three größe']
    for method in ('lora', 'full', 'prefix', 'posterior'):
        out, run = gen_run(method), opened(method)
        ours = run.logits(texts) - run.log_prior
        for c, label in enumerate(run.labels):
            folder = os.path.join(out, label)
            with contextlib.redirect_stderr(io.StringIO()):
                if method == 'full':
                    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
                else:
                    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(os.path.join(out, 'base')), folder).eval()
            for text, mine in zip(texts, ours[:, c]):
                ids = torch.tensor([[256, *text.encode(), 256]])
                with torch.no_grad():
                    logits = theirs(ids).logits[0, -ids.shape[1]:-1]    # without those of the prompt
                assert abs(float(logits.log_softmax(1).gather(1, ids[0, 1:, None]).sum()) - mine) < 1e-3, (method, label, text)
            if method != 'full':
                named = data.read_json(os.path.join(folder, 'adapter_config.json'))['base_model_name_or_path']
                assert os.path.isdir(named) and gpt.base_sha256(named) == gpt.base_sha256(os.path.join(out, 'base'))


def test_gen_bad_input():
    out, some = os.path.join(tmp(), 'run'), over_base()
    one = write('one.csv', 'text,label\n' + ''.join(f'text {i},a\n' for i in range(30)))
    for argv, match in (
            (['--data', one], 'at least two classes'), ([*some, '--class_id', 'plants'], 'no such class'),
            ([*some, '--class_id', '2'], '0 animals, 1 numbers'),
            ([*some, '--max_length', '96'], '--max_length 96 does not fit: the model has 96 positions'),
            ([*some, '--prefix', '--max_length', '95'], 'and 2 of them'), ([*some, '--zero_shot', '--max_length', '90'], '--max_length 90'),
            ([*some, '--full', '--posterior_steps', '3'], '--posterior_steps'),
            ([*some, '--zero_shot', '--posterior_steps', '3'], '--posterior_steps'), ([*some, '--prefix', '--class_id', '0'], '--class_id'),
            ([*some, '--zero_shot', '--class_id', '0'], '--class_id'), ([*some, '--pretrain', '--class_id', '0'], '--class_id'),
            ([*some, '--zero_shot', '--direct', '--prior', 'counts'], '--prior counts'), ([*some, '--pretrain', '--prior', 'counts'], '--prior'),
            ([*some, '--prompts', 'x.json'], '--prompts does nothing without --zero_shot'), ([*some, '--direct'], '--direct does nothing'),
            ([*some, '--likelihood_share', '0.5'], 'without --posterior_steps'), ([*some, '--posterior_lr', '1'], 'without --posterior_steps'),
            ([*some, '--full', '--r', '4'], '--r does nothing without --lora'), ([*some, '--prefix', '--targets', 'c_fc'], '--targets'),
            ([*some, '--zero_shot', '--lr', '1'], '--lr does nothing'), ([*some, '--zero_shot', '--epochs', '1'], '--epochs does nothing'),
            ([*some, '--n_layer', '2'], '--n_layer'), ([*some, '--lora', '--full'], 'not allowed with'), 
            ([*some, '--posterior_steps', '3', '--class_id', '0'], 'give one'), ([*some, '--zero_shot', '--prompts', 'nowhere.json'], 'nowhere.json'),
            ([*some, '--targets', 'q_proj'], 'matches no layer'),
            ([*some, '--device', 'abacus'], 'abacus'), (['--resume'], 'run.json'), ([*some[:2], '--model', 'nowhere'], 'nowhere')):
        raises(UserError, train_gen.main, [*argv, '--out', out], match=match)
        assert not os.path.exists(out), argv
    raises(UserError, train_gen.main, ['--resume'], match='--out')
    for there in (joint(), pretrained(), tiny_run('full')):
        before = tree(there)
        raises(UserError, train_gen.main, [*some, '--out', there], match='already holds a run')
        assert tree(there) == before
    raises(UserError, train_gen.main, ['--resume', '--out', tiny_run('full')], match='train_cls.py')
    raises(UserError, generate, *some, *QUICKLY, '--lr', '1e30', '--clip', '0', '--log_every', '1', '--warmup', '0', match='try a smaller --lr')


def test_gen_zero_shot_over_random_weights():
    """It needs no training and so knows nothing, but it is the same run when it is opened again, or it is refused."""
    out = os.path.join(tmp(), 'run')
    try:
        generate('--data', topics(), *SHAPE, '--zero_shot', out=out)
    except UserError as e:
        assert not os.path.exists(out), e                               # refused before anything is written
    else:
        assert lora.open_run(out, 'cpu', 'fp32').logits(['cat']).shape == (1, 2)


def test_gen_long_and_odd_texts():
    """Longer than the model's positions, empty, one character: the run trains, and only whole texts are scored with their end."""
    rows = ''.join(f'{"cat dog " * 30}{i},a\n{"one two " * 30}{i},b\n' for i in range(20)) + '"",a\nx,b\n'
    out, text = generate('--data', write('long.csv', 'text,label\n' + rows), *SHAPE, '--max_steps', '4')
    assert 'are longer than 95 tokens' in text and lora.read_run(out)['args']['max_length'] == 95
    run = lora.open_run(out, 'cpu', 'fp32')
    assert np.isfinite(run.logits(['', 'x', 'y' * 95, 'y' * 96])).all()
    assert [len(run.token_logprobs(t)[1]) for t in ('', 'x', 'y' * 95, 'y' * 96)] == [1, 2, 96, 95]


def test_gen_class_of_one_row():
    """It has no validation rows to choose its weights by, and the run works."""
    path = write('rare.csv', data.read_bytes(topics()).decode() + 'zzz,rare\n')
    for method in (['--lora'], ['--full'], ['--lora', '--posterior_steps', '2']):
        out, _ = generate('--data', path, '--model', pretrained(), '--dtype', 'fp32', '--max_steps', '4', *method)
        run = lora.open_run(out, 'cpu', 'fp32')
        assert run.labels == ['animals', 'numbers', 'rare'] and run.info['prior']['rare'] == 1 / 193 and np.isfinite(run.logits(['zzz'])).all()


def test_gen_zero_shot_over_another_base():
    base = copied(pretrained())
    out, _ = generate('--data', topics(), '--model', base, '--zero_shot')
    lora.open_run(out)
    gpt.save_hf(base, formula_model(SMALL, 0))
    lora.open_run(out)                                                  # a small base travels with the run
    gpt.save_hf(os.path.join(out, 'base'), formula_model(SMALL, 0))
    raises(UserError, lora.open_run, out, match='another base model')


def test_gen_frozen_base_stays_bitwise():
    for dtype in ('fp32', 'bf16'):
        seen, base = [], over_base()[:-1]                               # the base is made here, if no test has made it

        def catch(model, device, dtype, real=gpt.place, **k):
            model = real(model, device, dtype, **k)
            seen.append((model, {n: p.detach().clone() for n, p in model.named_parameters()}))
            return model
        with patched(gpt, 'place', catch), patched(lora, 'open_run', stop_here):
            raises(Stop, generate, *base, dtype, *QUICKLY, '--posterior_steps', '3')
        assert len(seen) == 3
        for model, before in seen:
            assert {n.rpartition('.')[2] for n in lora.trainables(model)} == {'A', 'B'}
            for n, p in model.named_parameters():
                assert torch.equal(p, before[n]) != p.requires_grad and (p.requires_grad or p.grad is None), (dtype, n)
            rounded = [n for n, p in model.named_parameters() if p.dtype == torch.bfloat16]
            assert ('wte.weight' in rounded) == bool(rounded) == (dtype == 'bf16')


def test_gen_accumulation_equals_the_big_batch():
    """2 steps of 12 rows of very different lengths, whole and in parts of 4: likelihood of all weights, of one vector, the posterior's loss."""
    some = ['--data', imbalanced(), '--model', 'nano', '--scratch', '--n_layer', '2', '--n_head', '2', '--n_embd', '32', '--dtype', 'fp32',
            '--lr', '1e-2', '--log_every', '1']
    for argv in (['--full', '--max_steps', '4'], ['--prefix', '--max_steps', '2'], ['--dropout', '0', '--max_steps', '4', '--posterior_steps', '2']):
        whole, parts = (generate(*some, *argv, '--batch_size', size, '--grad_accum', 12 // size)[0] for size in (12, 4))
        a, b = ([r['loss'] for r in records(out) if 'loss' in r] for out in (whole, parts))
        assert len(a) >= 2 and np.allclose(a, b, rtol=1e-5), (argv, a, b)
        for name in weights(whole):
            a, b = (gpt.load_safetensors(os.path.join(out, name)) for out in (whole, parts))
            assert all(float((a[n] - b[n]).abs().max()) < 1e-4 for n in a), (argv, name)


def test_gen_best_on_validation_is_saved():
    """With a rate that destroys a class after its step 4, the adapter that is kept is one of before; its numbers stand in class.json."""
    argv = over_base('--max_steps', '12', '--batch_size', '8', '--eval_every', '2')      # the base is made here, at its own rate
    with patched(gpt, 'lr_at', lambda step, *a: 1e-2 if step < 4 else 3.0):
        out, _ = generate(*argv)
    for label in ('animals', 'numbers'):
        log = [r for r in records(out) if r['class'] == label and 'val_loss' in r]
        start = min(r['step'] for r in log) - 2
        best = max(log, key=lambda r: (r['val_auc'], -r['val_loss']))
        results = data.read_json(os.path.join(out, label, 'class.json'))['results']
        assert results['step'] == best['step'] - start <= 4 and results['val_loss'] == best['val_loss'] < log[-1]['val_loss'], (results, log)


def test_gen_folder_names():
    labels = ['Sci/Tech', 'Sci_Tech', 'a/b', 'a_b', 'A_B', 'base', 'Base', 'posterior', 'prefix', '..', '.', '/', ' ', '-', '', 'x' * 200, 'x' * 199,
              'Äpfel', 'con.txt', 'a\\b', '../../etc', 'new\nline', 'class', 'class-2', 'tab\there', '中' * 200]
    names = train_gen.folder_names(labels, {})
    assert list(names) == labels and len({name.lower() for name in names.values()}) == len(labels)
    for label, name in names.items():
        assert re.fullmatch(r'[\w-]+', name) and len(f'{name}.part'.encode()) < 255, (label, name)
        assert name.lower() not in ('base', 'posterior', 'prefix')
        os.makedirs(os.path.join(tmp(), name))
    assert names['Sci/Tech'] == 'Sci_Tech' and names['Äpfel'] == 'Äpfel' and names['a_b'] != 'a_b'
    for new in ('a:b', 'BASE', 'aaa', 'X' * 200):
        more = train_gen.folder_names([new, *reversed(labels)], names)
        assert {label: more[label] for label in labels} == names and more[new].lower() not in {name.lower() for name in names.values()}
    labels = ['..', 'base', 'a/b']
    path = write('odd.csv', 'text,label\n' + ''.join(f'{w} {i},{label}\n' for i in range(12) for w, label in zip(('cat', 'one', 'red'), labels)))
    out, _ = generate('--data', path, '--model', pretrained(), '--dtype', 'fp32', '--max_steps', '3')
    run = lora.open_run(out, 'cpu', 'fp32')
    assert sorted(run.labels) == sorted(labels) and run.logits(['cat']).shape == (1, 3) and len(os.listdir(out)) == 4 + 5


def test_gen_fallback_to_the_demo():
    """Neither data nor model named, nothing to be had: the demo; of a zero_shot run, too."""
    def unavailable(*a, **k):
        raise data.Unavailable('no network (simulated)')
    nothing = environment(NANOCLS_DATA=None, HF_HOME=tmp())
    with fresh_cache(), patched(data, 'download', unavailable), patched(gpt, 'nano_folder', pretrained), nothing:
        for argv in (['--quick', '--max_steps', '2', '--max_length', '20'], ['--zero_shot', '--quick', '--max_length', '20']):
            out, text = generate(*argv)
            info = lora.read_run(out)
            assert 'built-in demo instead' in text and (info['model'], info['data']) == ('nano', 'demo')
        raises(data.Unavailable, generate, '--data', 'sst2', match='no network')


def test_gen_runs_beside_discriminative_ones():
    """eval.py compares both kinds on the same rows."""
    cls, _ = train('--data', topics(), '--model', pretrained(), '--dtype', 'fp32', '--full', '--lr', '1e-2', '--max_steps', '30')
    out = os.path.join(tmp(), 'numbers.json')
    text, _ = run_eval([cls, gen_run('lora'), gen_run('direct'), '--dtype', 'fp32', '--json', out])
    numbers = data.read_json(out)
    want = data.read_json(os.path.join(gen_run('lora'), 'eval_results.json'))['accuracy']
    assert len(numbers['runs']) == 3 and numbers['runs'][1]['accuracy'] == want
    assert 'uncalibrated' not in numbers['runs'][0] and "McNemar's test" in text
    assert evaluation.read_log(os.path.join(gen_run('lora'), 'log.jsonl'))['val_loss']




def test_gen_loss_is_what_it_says():
    """The first logged loss of a step that sees all rows: nats per token, <|endoftext|> counted; of the posterior phase the mean over the rows
    of its cross-entropy and, by --likelihood_share, of the nats per token of each."""
    argv = [*over_base(), '--r', '4', '--dropout', '0', '--batch_size', '300', '--max_steps', '3', '--log_every', '1']
    out, _ = generate(*argv, '--posterior_steps', '1', '--likelihood_share', '0.25')
    ds, plain = data.load(topics()), lora.open_run(generate(*argv)[0], 'cpu', 'fp32')
    tokens = data.tokenize(plain.enc, ds.train.texts, cache=False)
    base = gpt.text_logprobs(GPT.load(pretrained()), tokens, 95, 'head', CPU, torch.float32)[:, 0]
    losses = {r['class']: r['loss'] for r in reversed(records(out)) if 'loss' in r}                  # the first of each
    for c, label in enumerate(plain.labels):
        mine = ds.train.y == c
        assert abs(losses[label] + base[mine].sum() / (tokens.lengths + 1)[mine].sum()) < 1e-4, (label, losses)
    logits, rows = plain.logits_of(tokens), np.arange(len(tokens))
    own = (logits - plain.log_prior)[rows, ds.train.y] / (tokens.lengths + 1)
    entropy = -np.log(evaluation.softmax(logits)[rows, ds.train.y])
    assert abs(losses['the posterior of all classes'] - (0.75 * entropy.mean() - 0.25 * own.mean())) < 1e-4, losses


# --- runs that survive ---

KILLS = {'train_cls ' + method: (train_cls.main, [*TINY[:3], '--n_layer', '1', '--n_head', '2', '--n_embd', '16', '--max_samples', '30', *FLAGS[method]])
         for method in METHODS if method != 'last'}
KILLS['train_cls last'] = (train_cls.main, [*TINY[:3], '--n_layer', '2', '--n_head', '2', '--n_embd', '16', '--max_samples', '30', '--last', '1'])
KILLS.update({'train_gen ' + ' '.join(flags): (train_gen.main, ['--data', 'TOPICS', '--model', 'nano', '--scratch', '--n_layer', '1', '--n_head', '2',
                                                               '--n_embd', '16', '--block_size', '64', '--max_samples', '30', *flags])
              for flags in (['--lora', '--posterior_steps', '4'], ['--full'], ['--prefix'], ['--pretrain'])})


def in_a_child(fn, kill_at=0):
    """fn() in a forked process of one thread, which is killed (SIGKILL) in its kill_at-th function call; 0 = never.
    -> (exit status, {name: [first, last] call} of the moments in which it wrote files, its number of calls)."""
    read, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        with os.fdopen(read) as f:
            said = f.read()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(said or '[[], 0]')
    code = 70
    try:
        torch.set_num_threads(1)                                        # a forked process has lost the threads of OpenMP
        signal.alarm(120)
        calls, writing = [0], []

        def tick(frame, event, arg):
            if event in ('call', 'c_call'):
                calls[0] += 1
                if calls[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if event == 'call' and frame.f_code.co_name in ('write_atomic', 'promote', 'save_best', 'keep'):
                    writing.append(calls[0])
        with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            sys.setprofile(tick)
            try:
                code = fn() or 0
            except UserError as e:
                code, writing = 2, [str(e)]
            sys.setprofile(None)
        os.write(write_end, json.dumps([writing, calls[0]]).encode())
    finally:
        os._exit(code)


def kill_and_resume(name, kills, seed):
    """A run killed `kills` times, each time somewhere else (every other time while it writes files), and resumed until it is done, ends with the
    files of the run that was never killed. -> the number of kills that struck."""
    if not hasattr(os, 'fork'):
        skip('no fork here')
    main, flags = KILLS[name]
    rng, out = random.Random(f'{name} {seed}'), os.path.join(tmp(), 'run')
    flags = [topics() if f == 'TOPICS' else f for f in flags] + ['--batch_size', '4', '--grad_accum', '2', '--max_steps', '9', '--eval_every', '2', '--dtype', 'fp32']
    start, resume = (lambda: main([*flags, '--out', out])), (lambda: main(['--resume', '--out', out]))
    code, (writing, calls) = in_a_child(start)
    assert code == 0, (name, code, writing)

    def result():
        files, log = tree(out), [{k: v for k, v in r.items() if not k.endswith('_per_s')} for r in records(out)]
        del files['log.jsonl']
        return files, log
    want, struck = result(), 0
    for kill in range(kills):
        shutil.rmtree(out)
        code, killed_at = None, []
        for again in range(20):
            # the first attempt is killed, then every other resumption, ever later; then it may end
            at = 0 if again > 2 else rng.randrange(1, calls) if (kill + again) % 2 else rng.choice(writing) + rng.randrange(60)
            code, (said, _) = in_a_child(start if code is None else resume, at)
            if code == -signal.SIGKILL:
                struck += 1
                killed_at.append(at)
            elif code == 2:                                             # killed before there was anything to resume, or when all was done
                done = os.path.isfile(os.path.join(out, 'eval_results.json')) or ('pretrain' in name and 'language model' in said[0])
                assert done or 'no resume.pt' in said[0] or 'no run.json' in said[0], (name, seed, killed_at, said)
                if done:
                    break
                code = None
            else:
                assert code == 0, (name, seed, killed_at, code, said)
                break
        assert result() == want, (name, seed, killed_at, [k for k in set(want[0]) | set(result()[0]) if want[0].get(k) != result()[0].get(k)])
    return struck


def test_validation_rows_keep_their_labels():
    """Row by row, the validation predictions that a run writes are those of its own weights, on the split's own labels; in the rows' order."""
    out, _ = train(*TINY, '--full', '--dtype', 'fp32', '--max_steps', '2', '--eval_every', '2')      # one evaluation: what it saw is what was saved
    for folder in (out, gen_run('lora')):
        run = lora.open_run(folder, 'cpu', 'fp32')
        val = evaluation.own_data(run.info, None).val
        logits = run.logits(val.texts)
        preds, labels = (data.read_json(os.path.join(folder, f'val_{x}.json')) for x in ('preds', 'labels'))
        want = evaluation.softmax(run.calibrated(logits))
        assert labels == [run.labels[i] for i in val.y]
        assert np.allclose([[p['probs'][label] for label in run.labels] for p in preds], want, atol=1e-5), folder
        texts = [f'{"red cat " * i}one' for i in range(9)]                                            # of rising length: nothing is in this order by luck
        alone = np.concatenate([run.logits([text]) for text in texts])
        assert np.allclose(run.logits(texts), alone, atol=1e-3) and np.ptp(alone[:, 0]) > 0.01, folder


def test_opened_runs_do_not_train():
    for folder in (tiny_run('lora'), gen_run('lora'), gen_run('full')):
        run = lora.open_run(folder, 'cpu', 'fp32')
        models = [model for model, _ in run.passes] if run.kind == 'gen' else [run.model]
        assert not any(m.training for model in models for m in model.modules()) and not any(p.requires_grad for model in models for p in model.parameters())
        assert {m.scale for model in models for m in model.modules() if isinstance(m, lora.LoRA)} <= {16 / run.args['r']}


def test_shares_of_a_step():
    """Ranks share the rows of a step; one without a row takes one that counts nothing."""
    with patched(gpt, 'ranks', lambda: 3):
        for n in (7, 2, 1):
            shares = []
            for i in range(3):
                with patched(gpt, 'rank', lambda i=i: i):
                    shares.append(gpt.share_of(np.arange(n)))
            assert sorted(r for rows, counts in shares if counts for r in rows) == list(range(n))
            assert [counts for _, counts in shares] == [3.0] * min(n, 3) + [0.0] * (3 - min(n, 3)) and all(len(rows) for rows, _ in shares)


def test_killed_before_the_first_step():
    """From the moment a run has its folder there is something to go on with."""
    for main, flags, work in ((train_cls.main, [*TINY, '--max_steps', '2'], ''), (train_gen.main, ['--data', topics(), *SHAPE, '--max_steps', '4'], 'animals.part')):
        out = os.path.join(tmp(), 'run')
        with patched(gpt, 'seed_step', stop_here):
            raises(Stop, main, [*flags, '--out', out])
        assert gpt.load_resume(os.path.join(out, work))['step'] == 0
        assert not script(main, ['--resume', '--out', out])[0] and os.path.isfile(os.path.join(out, 'eval_results.json'))


def test_resume_state_is_checked():
    """What the fuzz found: an optimizer state that is a list, or of steps that never were, is one sentence and not a crash in the next step."""
    layer = torch.nn.Linear(2, 2)
    params = dict(layer.named_parameters())
    for change in ([], dict(step=torch.tensor(-1.0)), dict(step=torch.tensor(99.0)), dict(exp_avg=torch.zeros(3))):
        opt, scaler = torch.optim.AdamW(params.values()), torch.amp.GradScaler('cpu', enabled=False)
        sum(p.sum() for p in params.values()).backward()
        opt.step()
        state = opt.state_dict()['state']
        saved = dict(step=1, best=None, params={n: p.detach() for n, p in params.items()}, opt=dict(state=state), scaler=scaler.state_dict())
        assert gpt.restore(saved, params, torch.optim.AdamW(params.values()), scaler) == (1, None)
        state[0] = {**state[0], **change} if change else change
        raises(UserError, gpt.restore, saved, params, torch.optim.AdamW(params.values()), scaler, match='resume.pt')


def test_killed_runs_end_the_same():
    """kill -9 anywhere, --resume: bitwise the run that was never killed. python test_all.py --kills N does it N times per method."""
    for name in ('train_cls lora', 'train_cls full', 'train_gen --lora --posterior_steps 4'):
        assert kill_and_resume(name, 2, seed=0) > 0


def kill_long(n):
    """--kills N: as often as asked, for every method."""
    for name in KILLS:
        struck = kill_and_resume(name, n, seed=1)
        print(f'{name}: {n} runs, killed {struck} times, each ended bitwise as the one that was never killed', flush=True)


def test_loss_that_is_not_finite():
    """It names the step and the rows, saves nothing of it, and the checkpoint before it is as it was."""
    for main, flags in ((train_cls.main, [*TINY, '--full']), (train_gen.main, ['--data', topics(), *SHAPE, '--pretrain'])):
        out, real, seen = os.path.join(tmp(), 'run'), data.collate, []

        def note(tokens, index, *a, **k):
            if torch.is_grad_enabled():
                seen.append(sorted(index.tolist()))
            return real(tokens, index, *a, **k)
        spoil = dict(step=5)
        before = gpt.lr_at
        with patched(gpt, 'lr_at', lambda step, *a: math.nan if step == spoil['step'] else before(step, *a)), patched(data, 'collate', note):
            said = raises(UserError, main, [*flags, '--dtype', 'fp32', '--max_steps', '12', '--batch_size', '4', '--eval_every', '4', '--log_every', '3',
                                            '--out', out], match='at step 7')                       # the step after the one that spoilt the weights
        assert ', '.join(map(str, seen[6])) in said and '--lr' in said and '--resume' in said, (said, seen[6])
        assert gpt.load_resume(out)['step'] == 4 and all(torch.isfinite(p).all() for p in gpt.load_resume(out)['params'].values())
        code = script(main, ['--resume', '--out', out])[0]                                           # without the cause it goes on
        assert not code and records(out)[-1]['step'] == 12


def test_interrupt_after_a_loss_that_is_not_finite():
    """Ctrl-C before the next log line must not save what is spoilt."""
    out, before = os.path.join(tmp(), 'run'), gpt.lr_at

    def rate(step, *a):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return math.nan if step == 2 else before(step, *a)
    with patched(gpt, 'lr_at', rate), contextlib.redirect_stderr(io.StringIO()):
        raises(UserError, train_cls.main, [*TINY, '--full', '--dtype', 'fp32', '--max_steps', '9', '--eval_every', '9', '--out', out], match='at step 4')
    assert gpt.load_resume(out)['step'] == 0


def test_out_of_memory_names_a_batch_size():
    def full(*a, **k):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')
    for size, match in ((8, '--batch_size 4 --grad_accum 2'), (1, 'a smaller --max_length')):
        with patched(GPT, 'trunk', full):
            raises(UserError, train_cls.main, [*TINY, '--batch_size', str(size), '--out', os.path.join(tmp(), 'run')], match=match)


def test_out_of_memory_in_evaluation_takes_smaller_batches():
    """The results are those of the batches that did fit; a single text that does not is one sentence."""
    run, texts = lora.open_run(tiny_run('full'), 'cpu', 'fp32'), [f'{"very " * (i % 7)}good {i}' for i in range(40)]
    want, real = run.logits(texts), GPT.trunk
    for room in (100, 1):
        def small(self, ids, *a, room=room, **k):
            if ids.numel() > room:
                raise torch.OutOfMemoryError('out of memory')
            return real(self, ids, *a, **k)
        with patched(GPT, 'trunk', small):
            if room == 1:
                raises(UserError, run.logits, texts, match='a single text')
            else:
                assert np.allclose(run.logits(texts), want, atol=1e-5)


def test_two_runs_with_one_folder():
    """The second is refused as long as the first lives, even if that was killed and is resumed."""
    out, here = os.path.join(tmp(), 'run'), os.path.dirname(os.path.abspath(__file__))
    for name, work, flags in (('train_cls.py', out, [*TINY, '--out', out]),
                              ('train_gen.py', os.path.join(out, 'animals.part'), ['--data', topics(), *SHAPE, '--class_id', '0', '--out', out])):
        shutil.rmtree(out, ignore_errors=True)
        os.makedirs(work)
        code = f'import sys, data; data.claim({work!r}); print("held", flush=True); sys.stdin.read()'
        with subprocess.Popen([sys.executable, '-c', code], cwd=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
            assert p.stdout.readline() == 'held\n'
            main = train_cls.main if name == 'train_cls.py' else train_gen.main
            raises(UserError, main, [*flags, '--max_steps', '2'], match='in use by another process')
            p.kill()
        assert not script(main, [*flags, '--max_steps', '2'])[0]                                     # a dead process holds nothing


def test_classes_trained_by_several_processes_at_once():
    """--class_id K in three processes over one --out: the run of one process, and no log line lost."""
    here, labels = os.path.dirname(os.path.abspath(__file__)), ('animals', 'colours', 'numbers')
    flags = ['--data', topics(labels), '--model', pretrained(), '--dtype', 'fp32', '--max_steps', '24', '--device', 'cpu']
    whole, _ = generate(*flags)
    out = os.path.join(tmp(), 'run')
    ps = [subprocess.Popen([sys.executable, os.path.join(here, 'train_gen.py'), *flags, '--class_id', str(k), '--out', out], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}) for k in range(3)]
    said = [p.communicate()[0] for p in ps]
    assert [p.returncode for p in ps] == [0, 0, 0], said
    assert os.path.isfile(os.path.join(out, 'eval_results.json')) and 'calibration' in data.read_json(os.path.join(out, 'run.json')), said
    assert sorted(r['class'] for r in records(out)) == sorted(r['class'] for r in records(whole))
    a, b = (lora.open_run(folder, 'cpu', 'fp32').logits(['cat dog', 'red', 'two six one']) for folder in (out, whole))
    assert np.allclose(a, b, atol=1e-3), (a, b)


def test_several_interrupted_classes():
    """Processes with a class each, all killed: every --resume finishes one of them, the last one the run."""
    out, flags = os.path.join(tmp(), 'run'), ['--data', topics(), *SHAPE, '--max_steps', '4']
    for k in '01':
        with patched(gpt, 'seed_step', stop_here):
            raises(Stop, train_gen.main, [*flags, '--class_id', k, '--out', out])
    assert {'animals.part', 'numbers.part'} <= set(os.listdir(out))
    for there in ({'animals', 'numbers.part'}, {'animals', 'numbers', 'eval_results.json'}):
        generate('--resume', out=out)
        assert there <= set(os.listdir(out)), os.listdir(out)
    assert lora.open_run(out, 'cpu', 'fp32').logits(['cat']).shape == (1, 2)


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk: a file cannot grow beyond so many bytes."""
    import resource
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk():
    """A file that cannot be written whole is an error that names it, and what was there before stays."""
    if os.name != 'posix':
        skip('needs resource limits')
    folder = tmp()
    path = os.path.join(folder, 'x.json')
    data.write_json(path, dict(old=1))
    with files_of_at_most(1000):
        raises(UserError, data.write_json, path, ['new'] * 1000, match='cannot write')
        raises(UserError, gpt.save_safetensors, os.path.join(folder, 'm.safetensors'), dict(x=torch.zeros(1000)), match='m.safetensors')
        raises(UserError, gpt.save_resume, folder, SimpleNamespace(), 1, None, dict(x=torch.zeros(1000)), torch.optim.SGD([torch.zeros(1)]),
               torch.amp.GradScaler('cpu', enabled=False), match='resume.pt')
    assert os.listdir(folder) == ['x.json'] and data.read_json(path) == dict(old=1)
    out = os.path.join(tmp(), 'run')
    with files_of_at_most(20000):
        raises(UserError, train_cls.main, [*TINY, '--full', '--max_steps', '3', '--out', out], match='cannot write')
    assert not any(name.endswith(('.tmp', '.safetensors')) for name in os.listdir(out)), os.listdir(out)
    code = script(train_cls.main, ['--resume', '--out', out])[0]                                     # space was made
    assert not code and os.path.isfile(os.path.join(out, 'eval_results.json'))


def test_two_processes_download_one_file():
    """The second waits for the first and takes what that one has brought: one request, no mixed-up file."""
    content, served = random.Random(0).randbytes(300_000), []

    class Slowly(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            for at in range(0, len(content), 50_000):
                self.wfile.write(content[at:at + 50_000])
                time.sleep(0.2)

        def log_message(self, *a):
            pass
    try:
        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Slowly)
    except OSError as e:
        skip(f'no loopback ({e})')
    threading.Thread(target=server.serve_forever, daemon=True).start()
    dest, here = os.path.join(tmp(), 'file'), os.path.dirname(os.path.abspath(__file__))
    code = (f'import data; data.download(["http://127.0.0.1:{server.server_port}/file"], {dest!r}, size={len(content)}, '
            f'sha256={hashlib.sha256(content).hexdigest()!r})')
    env = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()}
    ps = [subprocess.Popen([sys.executable, '-c', code], cwd=here, stderr=subprocess.PIPE, text=True, env=env) for _ in range(3)]
    said = [p.communicate()[1] for p in ps]
    server.shutdown()
    server.server_close()
    if any('Network is unreachable' in s or 'no connection' in s for s in said) and not served:
        skip('no loopback')
    assert [p.returncode for p in ps] == [0, 0, 0], said
    assert len(served) == 1 and data.read_bytes(dest) == content and os.listdir(os.path.dirname(dest)) == ['file'], (served, os.listdir(os.path.dirname(dest)))


# --- several processes: torchrun ---

def torchrun(n, name, *argv, wait=True):
    """A script in n processes of one machine -> (exit code, stdout, stderr), or the running Popen."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), os.path.join(here, name), *map(str, argv)]
    try:
        with socket.create_server(('127.0.0.1', 0)) as s, socket.create_connection(s.getsockname(), 1):
            pass
    except OSError as e:
        skip(f'no loopback ({e})')
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    return p if not wait else (lambda said: (p.returncode, *said))(p.communicate(timeout=180))


def close_runs(a, b, weights=1e-5):
    """The losses and validation figures of two runs agree to 1e-5, their saved weights to `weights` of the largest."""
    logs = [[{k: v for k, v in r.items() if not k.endswith(('_per_s', 'lr', 'pad_share'))} for r in records(out)] for out in (a, b)]
    for x, y in zip(*logs, strict=True):
        assert x.keys() == y.keys() and all(v == y[k] if isinstance(v, (str, int)) else abs(v - y[k]) < 1e-5 for k, v in x.items()), (x, y)
    files = [path for path in tree(a) if path.endswith('.safetensors')]
    assert files == [path for path in tree(b) if path.endswith('.safetensors')]
    for path in files:
        x, y = (gpt.load_safetensors(os.path.join(out, path)) for out in (a, b))
        assert all(float((x[n] - y[n]).abs().max()) < weights * max(1, float(x[n].abs().max())) for n in x), path


def test_distributed_classifier():
    """3 processes: the run of one, with steps whose rows they cannot share evenly, one of which leaves two of them without a row; their
    evaluation and predict.py's file in order; one process prints. Then an interrupted run of 2 goes on in 1."""
    rows = table(43).splitlines()                                       # 7 steps an epoch of 6 rows, the last of 1
    own = [write('train.csv', '\n'.join(rows) + '\n'), '--val', write('val.csv', table(17)), '--test', write('test.csv', table(11))]
    flags = ['--data', *own, '--model', 'nano', '--scratch', '--n_layer', '2', '--n_head', '2', '--n_embd', '32', '--device', 'cpu', '--dtype', 'fp32',
             '--dropout', '0', '--batch_size', '3', '--grad_accum', '2', '--max_steps', '20', '--eval_every', '7', '--log_every', '1', '--lr', '3e-3']
    one, _ = train(*flags)
    out = os.path.join(tmp(), 'run')
    code, text, err = torchrun(3, 'train_cls.py', *flags, '--out', out)
    assert code == 0, err
    close_runs(one, out)
    assert text.count('step 20/20') == 2 and text.count('saved in') == 1, text                      # its loss and its validation, once
    lines = write('texts.txt', '\n'.join(f'{"very " * (i * 7 % 31)}number {i}' for i in range(50)) + '\n')
    want = script(predict.main, [one, '--file', lines, '--json', '--dtype', 'fp32', '--device', 'cpu'])[1].splitlines()
    code, text, err = torchrun(3, 'predict.py', out, '--file', lines, '--json', '--dtype', 'fp32', '--device', 'cpu')
    got = text.splitlines()
    assert code == 0 and len(got) == 50, err
    for a, b in zip(map(json.loads, want), map(json.loads, got)):
        assert a['text'] == b['text'] and all(abs(a['probs'][k] - b['probs'][k]) < 1e-5 for k in a['probs'])


def test_distributed_generative():
    """2 processes: classes one after another and the posterior, the run of one process."""
    flags = ['--data', topics(), '--model', pretrained(), '--device', 'cpu', '--dtype', 'fp32', '--dropout', '0', '--batch_size', '5', '--max_steps', '20',
             '--posterior_steps', '6', '--log_every', '1']
    one, _ = generate(*flags)
    out = os.path.join(tmp(), 'run')
    code, text, err = torchrun(2, 'train_gen.py', *flags, '--out', out)
    assert code == 0, err
    close_runs(one, out, weights=1e-4)                                    # Adam's first steps blow up what differs in tiny gradients
    a, b = (data.read_json(os.path.join(folder, 'eval_results.json')) for folder in (one, out))
    assert abs(a['nll'] - b['nll']) < 1e-4 and a['accuracy'] == b['accuracy']


def worker_pids(parent):
    """The processes that torchrun, process `parent`, has started, by rank."""
    if not os.path.isdir('/proc'):
        skip('no /proc here')
    found = {}
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/stat') as f:
                if int(f.read().rpartition(')')[2].split()[1]) != parent:
                    continue
            with open(f'/proc/{pid}/environ') as f:
                found[int(re.search(r'\0RANK=(\d+)', '\0' + f.read())[1])] = int(pid)
        except (OSError, TypeError):
            continue
    return found


def test_distributed_death_and_signal():
    """A rank that is killed ends the others within a minute; SIGTERM to torchrun saves. Both go on, in one process, to the run never stopped."""
    flags = [*TINY, '--full', '--device', 'cpu', '--dtype', 'fp32', '--batch_size', '8', '--max_steps', '80', '--eval_every', '40', '--log_every', '1']
    whole = None
    for how in ('kill', 'term'):
        out = os.path.join(tmp(), 'run')
        p = torchrun(2, 'train_cls.py', *flags, '--out', out, wait=False)
        while p.poll() is None and not (os.path.isfile(os.path.join(out, 'log.jsonl')) and len(records(out)) > 5):
            time.sleep(0.05)
        t0 = time.time()
        os.kill(worker_pids(p.pid)[1] if how == 'kill' else p.pid, signal.SIGKILL if how == 'kill' else signal.SIGTERM)
        _, err = p.communicate(timeout=60)
        assert p.returncode != 0 and time.time() - t0 < 60, (how, err)
        assert how == 'term' or 'rank 0 has lost another process' in err or 'SIGKILL' in err, err
        at = gpt.load_resume(out)['step']
        assert at < 80 and (how == 'kill' or at > 0), (how, at, err)
        train('--resume', out=out)
        whole = whole or train(*flags)[0]
        close_runs(whole, out)
# --- hostile and broken files ---

ODD = ['-1', '0', '1', '3', '0.5', '-0.0', 'true', 'false', 'null', '[]', '{}', '""', '"x"', '"1"', '[[]]', '[1, "a", null]', '{"a": {"b": []}}',
       '[-1, 2]',
       '["x", "x"]', str(2**31), str(2**63), str(-2**63 - 1), '1e308', '1e999', '-1e999', 'NaN', '"NaN"', '9' * 400, '9' * 5000,
       '[' * 900 + ']' * 900, '[' * 20000,
       '{"a": ' * 20000, '"../../evil"', '"/etc/passwd"', '"a\\nb"', '"\\u0000"', '"\\ud800"', '"' + 'x' * 70000 + '"', '"(a*)*(.*.*)*!"', '"*"',
       '[' + '7, ' * 3000 + '7]']
BITS = [b'"', b'""', b',', b'\t', b'\r', b'\n', b'\r\n', b'\0', b'\xff', b'\xef\xbb\xbf', b'\xed\xa0\x80', b'\xc0\x80', b'\xf0\x9f\x98\x80', b'{',
        b'}', b'[', b']', b':', b'\\',
        b'\\u', b'\x1b[2J', b'\xe2\x80\xa8', b'-', b'9' * 400, b'PK\x01\x02', b'../', b'\xff' * 8, b'\0' * 8, struct.pack('<q', 2**62),
        struct.pack('<i', -1)]


def damaged(rng, raw):
    """Bytes with one to four mistakes: bits flipped, bytes replaced or put in, ranges cut out, doubled, repeated or swapped, the end lost."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        a, b = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        b = rng.choice((b, min(b, a + 8)))
        kind = rng.randrange(10)
        if kind == 0 and a < len(raw):
            raw[a] ^= 1 << rng.randrange(8)
        elif kind == 1 and a < len(raw):
            raw[a] = rng.randrange(256)
        elif kind == 2:
            del raw[a:]
        elif kind == 3:
            raw[a:a] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
        elif kind == 4:
            raw[a:a] = rng.choice(BITS)
        elif kind == 5:
            some = rng.choice(BITS)
            raw[a:a + len(some)] = some
        elif kind == 6:
            del raw[a:b]
        elif kind == 7:
            raw[b:b] = raw[a:b]
        elif kind == 8:
            raw[a:a] = raw[a:b][:1000] * rng.choice((2, 50))
        else:
            c = rng.randrange(len(raw) + 1)
            part = raw[a:b]
            del raw[a:b]
            raw[c:c] = part
    return bytes(raw)


def odd_json(rng, raw):
    """JSON with one to four values replaced by odd ones, lost, swapped, doubled or renamed; once in four times damaged as bytes instead."""
    if rng.random() < 0.25:
        return damaged(rng, raw)
    tree, put = [json.loads(raw)], {}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places, todo = [], [tree]
        while todo:
            x = todo.pop()
            places.append(x)
            todo += [y for y in (x.values() if isinstance(x, dict) else x) if isinstance(y, (dict, list)) and y]
        x, z = rng.choice(places), rng.choice(places)
        key, other = (rng.choice(list(y) if isinstance(y, dict) else range(len(y))) if len(y) else None for y in (x, z))
        kind, mark = rng.random(), f'odd value {len(put)}'
        if key is None or other is None:
            continue
        if kind < 0.7:
            put[mark], x[key] = rng.choice(ODD), mark
        elif kind < 0.8 and x is not tree:
            del x[key]
        elif kind < 0.85 and not isinstance(x[key], (dict, list)) and not isinstance(z[other], (dict, list)):
            x[key], z[other] = z[other], x[key]
        elif isinstance(x, list):
            x.append(copy.deepcopy(x[key]))
        else:
            x[rng.choice((mark, ' ', 'x' * 5000, key + '\n'))], put[mark] = copy.deepcopy(x[key]), '"odd"'
    text = json.dumps(tree)[1:-1]
    if text.startswith('{') and rng.random() < 0.1:                         # a key that is there twice: the last one counts
        text = text[:-1] + f', {json.dumps(rng.choice(list(tree[0]) or ["a"]))}: {rng.choice(ODD)}}}'
    for mark, odd in put.items():
        text = text.replace(json.dumps(mark), odd, 1)
    return text.encode()


def odd_safetensors(rng, raw):
    """The same for the header of a safetensors file, whose length then mostly fits; or the data behind it damaged, or everything."""
    if rng.random() < 0.25:
        return damaged(rng, raw)
    n = struct.unpack('<Q', raw[:8])[0]
    header, body = raw[8:8 + n], raw[8 + n:]
    if rng.random() < 0.3:                                                  # claims that agree with one another
        tree = json.loads(header)
        names = [name for name in tree if name != '__metadata__']
        for _ in range(rng.choice((1, 2))):
            one = tree[rng.choice(names)]
            what = rng.randrange(5)
            if what == 0:
                one['data_offsets'] = list(tree[rng.choice(names)]['data_offsets'])
            elif what == 1:
                one['shape'] = rng.choice(([0, 2**62], [2**40, 2**40, 0], [2**62, 4], [1] * 100, ['ab' * 500, 10**7], [2**63] * 500, [[]], [-1, -8],
                                           [0] * 70, [True]))
            elif what == 2:
                one['data_offsets'] = rng.choice(([0, 2**63], [-8, 0], [8, 0], [0, 0], [0.0, 8.0], [0, 1 << 40]))
            elif what == 3:
                one['dtype'] = rng.choice(('F64', 'F16', 'BF16', 'I8', 'BOOL', 'U8', 'I64'))
            else:
                one['shape'] = one['shape'][::-1] + [1]
        header = json.dumps(tree).encode()
    else:
        header = odd_json(rng, header)
    length = struct.pack('<Q', len(header) if rng.random() < 0.8 else rng.choice((0, 1, n + 1, len(header) + 5, 10**8, 2**63, 2**64 - 1)))
    return length + header + (body if rng.random() < 0.7 else damaged(rng, body))


def odd_zip(rng, raw):
    """A zip packed again with members lost, doubled, renamed, damaged or compressed another way, or with a declared size of 10 GB."""
    if rng.random() < 0.3:
        return damaged(rng, raw)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, 'w') as new, warnings.catch_warnings():
        warnings.simplefilter('ignore')                                     # a name that is there twice
        for info in old.infolist():
            name, content, kind = info.filename, old.read(info), rng.randrange(14)
            if kind == 0:
                continue
            name = rng.choice((name, '../' + name, '/' + name, 'C:\\' + name, name.replace('/', '\\'), name + '/', 'é\0',
                               'x' * 60000)) if kind == 1 else name
            content = damaged(rng, content) if kind in (2, 3, 4) else bytes(30_000_000) if kind == 5 and rng.random() < 0.1 else content
            way = rng.choice((0, 8, 8, 12, 14)) if kind > 6 else info.compress_type
            for _ in range(1 + (kind == 6)):
                new.writestr(zipfile.ZipInfo(name), content, way)
            if kind in (7, 8):
                new.infolist()[-1].file_size = rng.choice((10 << 30, 1 << 62, 0, 5, len(content) + 1))
            if kind == 9:
                new.infolist()[-1].compress_size = rng.choice((10 << 30, 0, 5))
            if kind == 10:
                new.infolist()[-1].flag_bits |= rng.choice((1, 0x20, 0x40, 0x800))
    raw = buffer.getvalue()
    return damaged(rng, raw) if rng.random() < 0.2 else raw


class Hang(BaseException):
    """A case took longer than it may."""


@contextlib.contextmanager
def bounded(seconds=10, extra=512 << 20):
    """No more than so many seconds and bytes of memory inside, on systems that can be asked for that."""
    def ring(*a):
        raise Hang(f'not done after {seconds} s')
    limit = None
    if sys.platform == 'linux':
        import resource
        with open('/proc/self/statm') as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
        limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + extra if limit[1] < 0 else min(now + extra, limit[1]), limit[1]))
    if hasattr(signal, 'setitimer'):
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if hasattr(signal, 'setitimer'):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, limit)


# A kind of file: fuzz_KIND(folder) writes what a case needs around it and returns case(rng), which writes one mutation into that folder and
# returns what a user would do with it: a function that must return or raise UserError.

def fuzz_csv(folder, sep=','):
    rows = [f'"text, with ""quotes"" {i}"{sep}{"ab"[i % 2]}{sep}{i}\n' if i % 3 else f'plain ä text {i}{sep}"{"ab"[i % 2]}"{sep}{i}\r\n'
            for i in range(30)]
    raw, name = (f'text{sep}label{sep}n\n' + ''.join(rows)).encode(), 'x.csv' if sep == ',' else 'x.tsv'

    def case(rng):
        new, kind = damaged(rng, raw), rng.randrange(20)
        if kind == 0:
            new = raw.decode().encode(rng.choice(('utf-16', 'utf-16-le', 'utf-32', 'latin-1', 'utf-8-sig', 'cp1252')))
        if kind == 1:
            new = new.replace(b'\n', rng.choice((b'\r', b'\n\n', b'\0', b'')))
        path = write(name, new, folder)
        return rng.choice((lambda: data.load(path), lambda: data.load(path), lambda: list(data.read_texts(path)),
                           lambda: data.load(path, text_col='n', label_col='label'),
                           lambda: data.read_own(folder, None, None)))
    return case


def fuzz_tsv(folder):
    return fuzz_csv(folder, '\t')


def fuzz_jsonl(folder):
    lines = [json.dumps(dict(text=f'text ä {i}', label=i % 2 if i % 3 else bool(i % 2), more=[i, None])).encode() for i in range(30)]
    two = [json.dumps(dict(a=f'text {i}', b='xy'[i % 2])).encode() for i in range(30)]                   # columns that have to be guessed

    def case(rng):
        new = list(rng.choice((lines, lines, two)))
        for i in rng.sample(range(len(new)), rng.choice((1, 1, 3))):
            new[i] = odd_json(rng, new[i])
        new = b'\n'.join(new)
        path = write('x.jsonl', damaged(rng, new) if rng.random() < 0.2 else new, folder)
        return rng.choice((lambda: data.load(path), lambda: data.load(path), lambda: list(data.read_texts(path))))
    return case


def fuzz_published(folder):
    """The published data sets as plain files."""
    sets = dict(sst2=('sst2/train.tsv', 'sentence\tlabel\n' + 'fine \t1\nbad \t0\n' * 30),
                sms=('sms_spam/SMSSpamCollection', 'ham\thi\nspam\t"win\n' * 30),
                agnews=('ag_news_csv/train.csv', ''.join(f'"{1 + i % 4}","a {i}","it ""is"" b"\n' for i in range(60))))
    for rel, raw in [*sets.values(), ('sst2/dev.tsv', sets['sst2'][1]), ('ag_news_csv/test.csv', sets['agnews'][1])]:
        os.makedirs(os.path.join(folder, os.path.dirname(rel)), exist_ok=True)
        write(rel, raw, folder)

    def case(rng):
        name = rng.choice(list(sets))
        write(sets[name][0], damaged(rng, sets[name][1].encode()), folder)
        return lambda: data.load(name, data_dir=folder)
    return case


def fuzz_zip(folder):
    os.makedirs(os.path.join(folder, 'sms_spam'))
    os.makedirs(os.path.join(folder, 'sst2'))
    buffers = {}
    sms = ''.join(f'{"ham" if i % 3 else "spam"}\tmessage {i}\n' for i in range(60))
    sst2 = 'sentence\tlabel\n' + ''.join(f'phrase {i} \t{i % 2}\n' for i in range(60))
    for name, members in (('sms', {'readme': 'x', 'SMSSpamCollection': sms}), ('sst2', {'SST-2/train.tsv': sst2, 'SST-2/dev.tsv': sst2})):
        buffers[name] = io.BytesIO()
        with zipfile.ZipFile(buffers[name], 'w', zipfile.ZIP_DEFLATED) as z:
            for member, text in members.items():
                z.writestr(zipfile.ZipInfo(member), text, zipfile.ZIP_DEFLATED)      # a ZipInfo has no time of day: the same bytes every time

    def case(rng):
        name = rng.choice(('sms', 'sst2'))
        write(dict(sms='sms_spam/sms+spam+collection.zip', sst2='sst2/SST-2.zip')[name], odd_zip(rng, buffers[name].getvalue()), folder)
        return lambda: data.load(name, data_dir=folder)
    return case


def fuzz_tar(folder):
    os.makedirs(os.path.join(folder, 'imdb'))
    path = os.path.join(folder, 'imdb', 'aclImdb_v1.tar.gz')

    def packed(rng):
        """The archive with odd members among the reviews."""
        buffer, odd = io.BytesIO(), rng.random() < 0.7
        with tarfile.open(fileobj=buffer, mode='w', format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))) as tar:
            for i in range(24):
                raw = f'review {i}<br /><br />it is {i % 2}'.encode()
                info = tarfile.TarInfo(f'aclImdb/{"train" if i % 4 < 2 else "test"}/{"neg" if i % 2 else "pos"}/{i}_7.txt')
                info.size, kind = len(raw), rng.randrange(60) if odd else 99
                if kind == 0:
                    info.name = rng.choice(('../../' + info.name, '/' + info.name, info.name + '\n', 'x' * 90, ''))
                elif kind == 1:
                    info.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE,
                                            b'Z', tarfile.AREGTYPE))
                    info.linkname = rng.choice(('/etc/passwd', '../../x', info.name, ''))
                elif kind == 2:
                    raw = damaged(rng, raw)
                    info.size = len(raw)
                elif kind == 3 and tar.format == tarfile.PAX_FORMAT:
                    info.pax_headers = {rng.choice(('path', 'size', 'mtime', 'GNU.sparse.map', 'GNU.sparse.size', 'GNU.sparse.realsize',
                                                    'GNU.sparse.major', 'hdrcharset')):
                                        rng.choice(('-1', 'x', '', '10737418240', '1', '0,' * 99, '1e999', '../../x', 'BINARY'))}
                elif kind == 4:
                    info.size = rng.choice((10 << 30, 2**62, 0, len(raw) + 600)) if tar.format == tarfile.GNU_FORMAT else 7 << 30
                    tar.fileobj.write(info.tobuf(tar.format) + raw.ljust(512, b'\0'))
                    tar.offset += 1024
                    continue
                elif kind == 5:
                    info.type, info.size = rng.choice((tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE,
                                                       tarfile.XGLTYPE)), rng.choice((len(raw), 5 << 30))
                    tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT) + raw.ljust(512, b'\0'))
                    tar.offset += 1024
                    continue
                tar.addfile(info, io.BytesIO(raw))
        raw = buffer.getvalue()
        return gzip.compress(damaged(rng, raw) if rng.random() < 0.4 else raw, 1, mtime=0)

    def case(rng):
        raw = packed(rng)
        write(path, damaged(rng, raw) if rng.random() < 0.3 else raw)
        cache = data.cached('imdb')
        shutil.rmtree(cache, ignore_errors=True)
        if rng.random() < 0.2:                                              # what a first reading left in the cache
            write(path, good)
            data.load('imdb', data_dir=folder)
            parsed = os.path.join(cache, os.listdir(cache)[0])
            write(parsed, odd_json(rng, data.read_bytes(parsed)))

        def use():
            with patched(data, 'MAX_UNPACKED', 16 << 20):                   # for speed
                data.load('imdb', data_dir=folder)
        return use
    tiny_imdb(path, 12)
    good = gzip.compress(gzip.decompress(data.read_bytes(path)), 1, mtime=0)
    return case


def fuzz_tokens(folder):
    """The cache of token ids: whatever lies there, the ids are those of the texts, or at least ids."""
    enc, texts = data.tokenizer('bytes'), [f'text {i}' * i for i in range(9)]
    shutil.rmtree(data.cached('tokens'), ignore_errors=True)
    data.tokenize(enc, texts)
    path = os.path.join(data.cached('tokens'), os.listdir(data.cached('tokens'))[0])
    raw = data.read_bytes(path)

    def case(rng):
        write(path, odd_zip(rng, raw))

        def use():
            tokens = data.tokenize(enc, texts)
            assert len(tokens) == 9 and tokens.lengths.min() > 0 and tokens.flat.max() < enc.n_vocab and tokens.starts[-1] == len(tokens.flat)
        return use
    return case


def fuzz_safetensors(folder):
    path = os.path.join(folder, 'x.safetensors')
    gpt.save_safetensors(path,
                         dict(a=torch.ones(3, 5), b=torch.arange(7), c=torch.tensor(2.5), d=torch.empty(0, 4), e=torch.ones(3).bfloat16(),
                              f=torch.tensor([True, False])))
    raw = data.read_bytes(path)

    def case(rng):
        write(path, odd_safetensors(rng, raw))
        return lambda: [t.float().sum() for t in gpt.load_safetensors(path).values()]
    return case


FUZZED = gpt.Config(n_layer=1, n_head=2, n_embd=8, block_size=24, vocab_size=257)


def try_model(model):
    """What a user would do with a model that was loaded."""
    ids, lengths = ragged(model.cfg.vocab_size, (3, 1), pad=model.end)
    with torch.no_grad():
        return model.classify(ids[:, :model.cfg.block_size], lengths) if hasattr(model, 'score') else model.lm_logits(ids[:, :model.cfg.block_size])


def fuzz_model(folder):
    """A folder with config.json and model.safetensors, one of them odd, or both, or the config gone."""
    model = formula_model(FUZZED, 2)
    gpt.save_hf(folder, model, ['no', 'yes'], {**model.float32_state(), 'lm_head.weight': model.wte.weight.detach()})
    files = {name: data.read_bytes(os.path.join(folder, name)) for name in ('config.json', 'model.safetensors')}

    def case(rng):
        which = rng.random()
        write('config.json', odd_json(rng, files['config.json']) if which < 0.6 else files['config.json'], folder)
        write('model.safetensors', odd_safetensors(rng, files['model.safetensors']) if which > 0.5 else files['model.safetensors'], folder)
        if which > 0.95:
            os.remove(os.path.join(folder, 'config.json'))
        n = rng.choice((0, 2))
        return lambda: try_model(GPT.load(folder, num_labels=n))
    return case


def fuzz_index(folder):
    """Shards with their index."""
    gpt.save_hf(folder, formula_model(FUZZED, 0))
    tensors = {n: t.clone() for n, t in gpt.load_safetensors(os.path.join(folder, 'model.safetensors')).items()}
    os.remove(os.path.join(folder, 'model.safetensors'))
    for i in range(2):
        gpt.save_safetensors(os.path.join(folder, f'model-{i}.safetensors'), {n: t for j, (n, t) in enumerate(tensors.items()) if j % 2 == i})
    raw = json.dumps(dict(metadata=dict(total_size=1), weight_map={n: f'model-{j % 2}.safetensors' for j, n in enumerate(tensors)})).encode()

    def case(rng):
        write('model.safetensors.index.json', odd_json(rng, raw), folder)
        return lambda: try_model(GPT.load(folder))
    return case


class Payload:
    """What pickle would call when it is loaded."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def odd_pickle(rng, good, mark):
    """A checkpoint that would write the file `mark`, or with tensors that are none, or packed or damaged in some way."""
    calls = [(open, (mark, 'w')), (os.system, (f'touch {mark}',)), (exec, (f'open({mark!r}, "w")',)), (eval, (f'open({mark!r}, "w")',)),
             (os.mkdir, (mark,)),
             (subprocess.Popen, (['touch', mark],)), (shutil.copy, (__file__, mark)), (getattr, ("x", "join")), (torch.load, (mark,)),
             (bytearray, (10 << 30,))]
    rebuild, storage = torch._utils._rebuild_tensor_v2, torch.ones(4).untyped_storage()
    laughs = [[]]
    for _ in range(60):
        laughs = [laughs, laughs]
    odd = [laughs, torch.ones(1).expand(10**12), torch.ones(2, dtype=torch.int8).expand(10**9, 2), torch.ones(4).to_sparse(),
           torch.ones(4, dtype=torch.complex64), torch.empty(4, device='meta'),
           torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), torch.nn.Parameter(torch.ones(4)), torch.tensor('a'.encode()[0]), 'x', None,
           {}, [torch.ones(2)], torch.ones(0, 2**40)]
    kind, state = rng.randrange(8), dict(good)
    key = rng.choice(list(state))
    if kind < 3:
        call = Payload(*rng.choice(calls))
        state = rng.choice((call, {**state, key: call}, {'a': [call]}, [call]))
    elif kind < 5:
        state[rng.choice((key, key, 'new', 7, None, (1, 2)))] = rng.choice(odd)
    elif kind == 5:
        sizes = rng.choice((((2**40,), (0,)), ((-1,), (1,)), ((4,), (2**62,)), ((2, 2), (1,)), ((4,), (-1,)), (('a',), (1,)), ((2**63,), (1,))))
        state[key] = Payload(rebuild,
                             (torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True), rng.choice((0, -1, 2**40, 'a')),
                              *sizes, False, {}))
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=rng.random() < 0.8)
    raw, how = buffer.getvalue(), rng.random()
    return odd_zip(rng, raw) if raw[:2] == b'PK' and (how < 0.3 or kind > 5) else damaged(rng, raw) if how < 0.5 or kind > 5 else raw


def fuzz_bin(folder):
    model = formula_model(FUZZED, 0)
    gpt.save_hf(folder, model)
    os.remove(os.path.join(folder, 'model.safetensors'))
    state, mark = {n: t.clone() for n, t in model.float32_state().items()}, os.path.join(os.path.dirname(folder), 'mark')

    def case(rng):
        path = write('pytorch_model.bin', odd_pickle(rng, state, mark), folder)
        return rng.choice((lambda: try_model(GPT.load(folder)), lambda: [t.float().sum() for t in gpt.load_bin(path).values()]))
    return case


def fuzz_resume(folder):
    """resume.pt, with which a run goes on."""
    args = SimpleNamespace(out=folder, lr=1e-3, batch_size=16, targets=['c_attn'], data='demo', resume=False, epochs=None, method='lora')

    def fresh():
        model = torch.nn.Linear(3, 2)
        params = dict(model.named_parameters())
        return params, torch.optim.AdamW(params.values(), lr=0.1), torch.amp.GradScaler('cpu', enabled=False)
    params, opt, scaler = fresh()
    params['weight'].sum().backward()
    opt.step()
    gpt.save_resume(folder, args, 4, (0.5, -0.7), params, opt, scaler)
    state, mark = torch.load(os.path.join(folder, 'resume.pt'), weights_only=True), os.path.join(os.path.dirname(folder), 'mark')

    def case(rng):
        changed = copy.deepcopy(state)
        if rng.random() < 0.6:                                              # a value somewhere in it
            places, todo = [], [changed]
            while todo:
                x = todo.pop()
                places += [(x, k) for k in x]
                todo += [y for y in x.values() if isinstance(y, dict)]
            x, k = rng.choice(places)
            x[k] = rng.choice((-1, 0, 2**63, 1e308, float('nan'), None, [], {}, '', 'x', True, torch.ones(3), torch.ones(2, 3).double(), [1, 'a'],
                               (1,)))
            if rng.random() < 0.2:
                del x[k]
            buffer = io.BytesIO()
            torch.save(changed, buffer)
            write('resume.pt', buffer.getvalue(), folder)
        else:
            write('resume.pt', odd_pickle(rng, changed, mark), folder)

        def use():
            saved = gpt.load_resume(folder)
            lora.resumed(SimpleNamespace(**vars(args)), set(), saved['args'])
            new, opt, scaler = fresh()
            gpt.restore(saved, new, opt, scaler)
            new['weight'].sum().backward()
            opt.step()
        return use
    return case


def fuzz_adapter(folder):
    """A PEFT folder: LoRA or prompt vectors."""
    files = {}
    for method in ('lora', 'prompt'):
        model = formula_model(FUZZED, 2)
        lora.adapt(model, method, r=2, prompt=3)
        lora.save_peft(folder, model, 'somewhere')
        files[method] = {name: data.read_bytes(os.path.join(folder, name)) for name in ('adapter_config.json', 'adapter_model.safetensors')}

    def case(rng):
        mine, which = files[rng.choice(('lora', 'lora', 'prompt'))], rng.random()
        write('adapter_config.json', odd_json(rng, mine['adapter_config.json']) if which < 0.8 else mine['adapter_config.json'], folder)
        write('adapter_model.safetensors',
              odd_safetensors(rng, mine['adapter_model.safetensors']) if which > 0.75 else mine['adapter_model.safetensors'], folder)

        def use():
            model = formula_model(FUZZED, 2)
            lora.load_peft(folder, model)
            assert torch.isfinite(try_model(model)).all()
        return use if which < 0.75 else lambda: lora.load_peft(folder, formula_model(FUZZED, 2))
    return case


def fuzz_run(folder):
    """A run folder of every method, with an odd run.json, or class.json, or any other of its files."""
    runs = {}
    for run in [tiny_run(m) for m in ('lora', 'adapter', 'prompt', 'full')] + [gen_run(m) for m in ('lora', 'prefix', 'zero_shot', 'direct')]:
        there = shutil.copytree(run, os.path.join(folder, str(len(runs))), ignore=shutil.ignore_patterns('eval_results.json', 'val_*'))
        runs[there] = {path: data.read_bytes(path) for path in sorted(os.path.join(there, name) for name in tree(there))}

    def case(rng):
        there = rng.choice(list(runs))
        files, record = runs[there], os.path.join(there, 'run.json')
        path = record if rng.random() < 0.7 else rng.choice(list(files))
        odd = odd_json if path.endswith('.json') else odd_safetensors if path.endswith('.safetensors') else damaged
        if rng.random() < 0.02:
            os.remove(path)
        else:
            write(path, odd(rng, files[path]))
        flags = rng.choice(([], ['--json'], ['--explain'], ['--calibrated', '--json'], ['--ood_quantile', '0.2']))
        what = rng.randrange(4)

        def use():
            try:
                if what:
                    script(predict.main, [there, '--device', 'cpu', '--dtype', 'fp32', *flags, 'a text that is classified', ''])
                else:
                    info = lora.read_run(there)
                    rows = topics() if info['args']['data'] == 'demo' else info['args']['data']
                    evaluation.own_data({**info, 'args': {**info['args'], 'data': rows}}, None)
                    if os.path.isfile(os.path.join(there, 'log.jsonl')):
                        evaluation.read_log(os.path.join(there, 'log.jsonl'))
            finally:
                if os.path.isfile(path) and data.read_bytes(path) != files[path] or not os.path.exists(path):
                    write(path, files[path])
        return use
    return case


def fuzz_foreign(folder):
    """Folders without run.json, as transformers and PEFT write them."""
    folders = {}
    for method in ('full', 'lora', 'prompt'):
        there, model = os.path.join(folder, method), formula_model(FUZZED, 2)
        lora.adapt(model, method, r=2, prompt=3)
        lora.save_weights(there, model, method, ['no', 'yes'], os.path.join(folder, 'full'))
        data.write_json(os.path.join(there, 'tokenizer_config.json'), dict(model_max_length=16, truncation_side='left'))
        folders[there] = {path: data.read_bytes(path) for path in (os.path.join(there, name) for name in sorted(tree(there)))}

    def case(rng):
        there = rng.choice(list(folders))
        files = folders[there]
        path = rng.choice(list(files))
        write(path, odd_json(rng, files[path]) if path.endswith('.json') else odd_safetensors(rng, files[path]))

        def use():
            try:
                script(predict.main, [there, '--device', 'cpu', '--dtype', 'fp32', 'a text that is classified', ''])
            finally:
                write(path, files[path])
        return use
    return case


def fuzz_log(folder):
    """log.jsonl, which --resume goes on writing and --plot draws."""
    lines = [json.dumps(dict(step=i, loss=0.5, lr=1e-3, val_loss=0.4, val_accuracy=0.5)).encode() for i in range(12)]

    def case(rng):
        new = list(lines)
        for i in rng.sample(range(len(new)), rng.choice((1, 1, 3))):
            new[i] = odd_json(rng, new[i])
        path = write('log.jsonl', b'\n'.join(new) + b'\n', folder)

        def plot():
            for steps, values in evaluation.read_log(path).values():
                assert all(type(v) in (int, float) for v in (*steps, *values))
        return rng.choice((plot, lambda: gpt.Log(folder, 20, resumed_at=6)))
    return case


def fuzz_preds(folder):
    """Predictions and labels for eval.py."""
    preds = [dict(label='ab'[i % 2], probs=dict(a=0.25, b=0.75)) for i in range(20)]
    files = dict(preds=json.dumps(preds).encode(), labels=json.dumps(['ab'[i % 3 == 0] for i in range(20)]).encode(),
                 lines=b'\n'.join(json.dumps(p).encode() for p in preds))

    def case(rng):
        name, which = rng.choice(('preds', 'lines')), rng.random()
        if name == 'preds':
            new = odd_json(rng, files[name])
        else:
            new = b'\n'.join(odd_json(rng, x) if rng.random() < 0.1 else x for x in files[name].split(b'\n'))
        argv = ['--preds', write('preds.json', new if which < 0.7 else files[name], folder),
                '--labels', write('labels.json', odd_json(rng, files['labels']) if which > 0.6 else files['labels'], folder), '--json',
                os.path.join(folder, 'numbers.json')]
        return lambda: script(evaluation.main, argv)
    return case


def fuzz_prompts(folder):
    raw, labels = json.dumps(dict(animals='cat dog\n', numbers='one\ntwo')).encode(), ['animals', 'numbers']

    def case(rng):
        args = SimpleNamespace(prompts=write('p.json', odd_json(rng, raw), folder), direct=False, data='x')
        return lambda: [data.tokenizer('bytes').encode_ordinary(p) for p in train_gen.prompts_of(args, labels).values()]
    return case


def fuzz(kind, n):
    """The mutations 0 to n - 1 of one kind, the same every time -> (number refused, number accepted, [what is wrong with which]).
    Each must be accepted or refused with a UserError, in time, in little memory, without a trace outside of its folder."""
    box, here = tmp(), os.getcwd()
    case_folder, cache = (os.path.join(box, name) for name in ('case', 'cache'))
    os.makedirs(case_folder), os.makedirs(cache), os.makedirs(os.path.join(box, 'cwd'))
    refused, accepted, broken = 0, 0, []
    with environment(NANOCLS_CACHE=cache), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.manual_seed(0)
        case = globals()[f'fuzz_{kind}'](case_folder)
        os.chdir(os.path.join(box, 'cwd'))
        try:
            for number in range(n):
                use = case(random.Random(f'{kind} {number}'))
                try:
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), bounded():
                        use()
                    accepted += 1
                except UserError as e:
                    refused += 1
                    if isinstance(e.__context__, MemoryError):
                        broken.append(f'fuzz {kind} {number}: MemoryError behind {str(e)[:150]!r}')
                except (Exception, Hang) as e:
                    where = [f'{os.path.basename(f.filename)}:{f.lineno}' for f in traceback.extract_tb(e.__traceback__)]
                    broken.append(f'fuzz {kind} {number}: {type(e).__name__} {str(e)[:150]!r} at {" ".join(where[2:])}')
                left = sorted(os.listdir(box)), os.listdir('.')
                if left != (['cache', 'case', 'cwd'], []):
                    broken.append(f'fuzz {kind} {number}: files were written outside of the folder: {left}')
                    break
        finally:
            os.chdir(here)
    return refused, accepted, broken


def kinds():
    """Names of the functions above, each of which is a kind of file."""
    return [name[5:] for name in globals() if name.startswith('fuzz_')]


def test_fuzz():
    """Some mutations of each kind; `python test_all.py --fuzz N` makes N, and `--fuzz N KIND` of one kind."""
    broken = [line for kind in kinds() for line in fuzz(kind, 50)[2]]
    assert not broken, '\n'.join(broken)


def test_hostile_files():
    """What mutations hardly meet: files made to take years, or all memory, or another place."""
    folder = tmp()
    with bounded(), patched(lora, 'REGEX_SECONDS', 1):
        # a rank, a prompt, a bottleneck that no file holds; a regular expression that takes years; numbers that are none
        model = formula_model(FUZZED, 2)
        lora.adapt(model, 'lora', r=2)
        lora.save_peft(folder, model, 'somewhere')
        path = os.path.join(folder, 'adapter_config.json')
        config = data.read_json(path)
        for change, match in ((dict(r=9_999_999), 'where (9999999, 8) belongs'), (dict(r=2**63), 'r is malformed'), (dict(r=True), 'r is malformed'),
                              (dict(r=2.5), 'malformed'),
                              (dict(lora_alpha=float('nan')), 'lora_alpha is malformed'), (dict(lora_dropout=1.0), 'lora_dropout'),
                              (dict(target_modules=[1]), 'target_modules'),
                              (dict(target_modules='(.*.*)*!'), 'takes too long'), (dict(target_modules='('), 'no regular expression'),
                              (dict(target_modules=[]), 'target_modules')):
            data.write_json(path, {**config, **change})
            raises(UserError, lora.load_peft, folder, formula_model(FUZZED, 2), match=match)
        data.write_json(path, {**config, 'target_modules': r'.*\.(c_attn|c_proj|c_fc)'})
        lora.load_peft(folder, formula_model(FUZZED, 2))
        state = torch.get_rng_state()
        lora.load_peft(folder, formula_model(FUZZED, 2))
        once = torch.get_rng_state()
        torch.set_rng_state(state)
        lora.add_lora(formula_model(FUZZED, 2), **lora.peft_config(folder))
        assert torch.equal(once, torch.get_rng_state())                     # trying it without memory draws no random numbers
    with bounded():
        # one value that claims to be 10^12 of them; a checkpoint in a zip that unpacks to more than it is
        path = os.path.join(folder, 'pytorch_model.bin')
        torch.save({'a': torch.ones(1).expand(10**12)}, path)
        raises(UserError, gpt.load_bin, path, match='without running code')
        torch.save({'a': torch.ones(3), 'b': torch.ones(3)}, path)
        assert list(gpt.load_bin(path)) == ['a', 'b']
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(path + '2', 'w', zipfile.ZIP_DEFLATED) as new:
            for info in old.infolist():
                new.writestr(info.filename, old.read(info) + bytes(10**6))
        raises(UserError, gpt.load_bin, path + '2', match='without running code')
        # safetensors: the product of what is no number
        for shape in (['x' * 10_000, 2**40], [2**40] * 10**6, [0] * 100):
            text = json.dumps(dict(a=dict(dtype='F32', shape=shape, data_offsets=[0, 0]))).encode()
            raises(UserError, gpt.load_safetensors, write('x.safetensors', struct.pack('<Q', len(text)) + text), match='safetensors')
    with bounded(extra=64 << 20), patched(data, 'MAX_MEMBER', 2 << 20), patched(data, 'MAX_UNPACKED', 8 << 20):
        # archives
        for size, told, way, match in ((3 << 20, 3 << 20, zipfile.ZIP_DEFLATED, 'of at most'), (100 << 20, 1 << 20, zipfile.ZIP_DEFLATED, 'Bad CRC'),
                                       (1 << 20, 1 << 20, zipfile.ZIP_BZIP2, 'compression'), (5, 10 << 30, zipfile.ZIP_STORED, 'of at most')):
            path = os.path.join(folder, 'x.zip')
            with zipfile.ZipFile(path, 'w', way) as z:
                with z.open('../SMSSpamCollection', 'w') as f:
                    for _ in range(max(1, size >> 20)):
                        f.write(bytes(min(size, 1 << 20)))
                z.infolist()[0].file_size = told
            raises(UserError, data.zip_member, path, 'SMSSpamCollection', match=match)
        os.mkdir(os.path.join(folder, 'imdb'))
        for size, content in ((10 << 30, b''), (2**62, b''), (20 << 20, bytes(1 << 20))):
            header = tarfile.TarInfo('aclImdb/train/neg/1_1.txt')
            header.size = size
            with gzip.open(os.path.join(folder, 'imdb', 'aclImdb_v1.tar.gz'), 'wb', 1) as f, fresh_cache():
                f.write(header.tobuf(tarfile.GNU_FORMAT))
                for _ in range(20 if content else 0):
                    f.write(content)
                f.close()
                raises(UserError, data.load, 'imdb', data_dir=folder, match='not the published archive')
        # a label column with a label per row
        raises(UserError, data.load, write('x.csv', 'text,label\n' + ''.join(f't{i},l{i}\n' for i in range(6000))), match='--label_col')
        many = dump([f'l{i}' for i in range(6000)])
        raises(UserError, run_eval, ['--preds', many, '--labels', many], match='can be told apart')
    # what a file calls its tensors must not drive the terminal, nor fill it
    model = formula_model(FUZZED, 0)
    gpt.save_hf(folder, model, state={**model.float32_state(), '\033[2Jevil\n' + 'x' * 9000: torch.ones(1)})
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        raises(SystemExit, data.cli, lambda: GPT.load(folder))
    told = err.getvalue()
    assert told.startswith('error: ') and '\\x1b[2Jevil\\n' in told and told[:-1].isprintable() and len(told) < 2100


def all_fuzz(n, chosen):
    """`python test_all.py --fuzz N [KIND ...]` -> exit code."""
    wrong = 0
    for kind in chosen or kinds():
        start = time.time()
        refused, accepted, broken = fuzz(kind, n)
        wrong += len(broken)
        for line in [*broken, f'fuzz {kind}: {n} mutations, {refused} refused, {accepted} accepted, {len(broken)} broken, {time.time() - start:.1f} s']:
            print(line, flush=True)
    shutil.rmtree(ROOT, ignore_errors=True)
    return 1 if wrong else 0
# --- step for step with transformers and peft ---

def curve_rows(cfg):
    """A folder with train.csv, val.csv and test.csv of two equal classes: random letters for the bytes, SST-2's texts for GPT-2's own vocabulary."""
    if cfg.vocab_size == 257:                                               # labels that nothing tells, so that the loss stays up
        rng = random.Random(0)
        texts = [''.join(rng.choice('etaoin shrdlu') for _ in range(rng.randint(2, 40))) for i in range(106)]
        rows = [(f'{text} {i}', 'ab'[i % 2]) for i, text in enumerate(texts)]
    else:
        real_data('sst2')
        ds = data.load('sst2', max_samples=128)
        negative, positive = ([(text, ds.labels[c]) for text, y in zip(ds.train.texts, ds.train.y) if y == c] for c in range(2))
        rows = [row for pair in zip(negative, positive) for row in pair]
    folder = tmp()
    for name, part in (('train', rows[:-16]), ('val', rows[-16:-8]), ('test', rows[-8:])):
        with open(os.path.join(folder, name + '.csv'), 'w', newline='', encoding='utf-8') as f:
            csv.writer(f).writerows([('text', 'label'), *part])
    return folder


def curve_base(cfg):
    """The folder of a base model as GPT-2 was started, but no vector of it at 0 or 1, and matrices that do as much at any width as at 768."""
    g, model, folder = torch.Generator().manual_seed(0), GPT(cfg), tmp()
    with torch.no_grad():
        for name, p in model.init_weights(g).named_parameters():
            if p.dim() == 1:
                p.add_(torch.empty_like(p).normal_(0, 0.1, generator=g))
            elif name.startswith('h.'):
                p.mul_((768 / cfg.n_embd) ** 0.5)
    gpt.save_hf(folder, model)
    return folder


def our_curve(kind, method, rows, base, rate, steps, batch_size, max_length):
    """The script itself -> its loss and its rate in every step, what trains as it began, the file of what it became."""
    begun = {}

    def catch(model, *where, real=gpt.place, **k):
        begun.update({} if begun else {n: p.detach().clone() for n, p in lora.trainables(model).items()})
        return real(model, *where, **k)
    argv = ['--data', rows, '--model', base, f'--{method}', '--lr', rate, '--max_length', max_length, '--batch_size', batch_size, '--seed', '7',
            '--weight_decay', '0.1', '--warmup', '0.2', '--device', 'cpu', '--dtype', 'fp32', '--log_every', '1', '--eval_every', 10 * steps]
    argv += ['--dropout', '0'] if method == 'lora' else []
    with patched(gpt, 'place', catch):
        if kind == 'cls':
            out = saved = train(*argv, '--max_steps', steps)[0]
        else:                                                               # two equal classes share the steps
            out = generate(*argv, '--max_steps', 2 * steps, '--class_id', '0')[0]
            saved = os.path.join(out, data.read_json(os.path.join(out, 'run.json'))['labels'][0])
    log = [r for r in records(out) if 'loss' in r]
    file = 'adapter_model.safetensors' if method == 'lora' else 'model.safetensors'
    return [r['loss'] for r in log], [r['lr'] for r in log], begun, os.path.join(saved, file)


def their_curve(kind, method, rows, base, rate, steps, batch_size, max_length, begun):
    """The same run as one would write it with transformers, peft and torch, from the same head and the same A
    -> losses, rates, {name in the file: tensor} before and after."""
    import transformers
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    transformers.logging.set_verbosity_error()                              # not that the head is new
    zero = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    with contextlib.redirect_stderr(io.StringIO()):
        if kind == 'cls':
            model = transformers.GPT2ForSequenceClassification.from_pretrained(base, num_labels=2, **zero)
        else:
            model = transformers.GPT2LMHeadModel.from_pretrained(base, **zero)
        end = model.config.pad_token_id = model.config.vocab_size - 1
        if method == 'lora':
            model = get_peft_model(model, LoraConfig(task_type='SEQ_CLS' if kind == 'cls' else 'CAUSAL_LM', r=8, lora_alpha=16, lora_dropout=0.0,
                                                     fan_in_fan_out=True, target_modules=['c_attn', 'attn.c_proj', 'c_fc', 'mlp.c_proj']))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(begun) and sum(p.numel() for p in trained.values()) == sum(p.numel() for p in begun.values())
    with torch.no_grad():                                                   # what is drawn at random
        for n, p in trained.items():
            if 'lora_A' in n:
                p.copy_(begun[re.sub(r'.*transformer\.(.*)\.lora_A.*', r'\1.A', n)])
            elif 'score' in n:
                p.copy_(begun['score.weight'])

    def state():
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False) if method == 'lora' else dict(model.named_parameters())
        return {n: t.detach().clone() for n, t in tensors.items()}
    before = state()
    plain = [n for n in trained if n.endswith('bias') or '.ln_' in n or '.wte' in n or '.wpe' in n]
    opt = torch.optim.AdamW([dict(params=[p for n, p in trained.items() if n not in plain], weight_decay=0.1),
                             dict(params=[trained[n] for n in plain], weight_decay=0.0)], lr=rate)
    warm = -(-steps // 5)                                                   # a fifth, rounded up
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: (s + 1) / warm if s < warm else (steps - s) / (steps - warm))

    enc, ds = data.tokenizer('bytes' if end == 256 else 'gpt2'), data.load(rows)
    mine = [i for i, c in enumerate(ds.train.y) if kind == 'cls' or c == 0]
    whole = [enc.encode_ordinary(ds.train.texts[i]) for i in mine]
    ids = [text[:max_length] for text in whole]
    lengths = [len(text) for text in ids]
    if kind == 'gen':                                                       # <|endoftext|> in front, and behind a text that was not cut
        ids = [[end, *text] + [end] * (len(text) == len(uncut)) for text, uncut in zip(ids, whole)]
    plan = [batch for epoch in range(steps) for batch in data.batches(lengths, batch_size, 7, epoch)][:steps]
    losses, rates = [], []
    model.train()
    for batch in plan:
        T = max(len(ids[i]) for i in batch)
        x = torch.tensor([ids[i] + [end] * (T - len(ids[i])) for i in batch])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (T - len(ids[i])) for i in batch])
        labels = torch.tensor([ds.train.y[mine[i]] for i in batch]) if kind == 'cls' else x.masked_fill(mask == 0, -100)
        loss = model(input_ids=x, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        losses, rates = losses + [loss.item()], rates + schedule.get_last_lr()[:1]
        opt.step()
        schedule.step()
        opt.zero_grad()
    return losses, rates, before, state()


def curve_differences(kind, method, cfg, rate, steps=50, batch_size=8, max_length=32):
    """-> the largest relative difference between our run and theirs, of the losses, of the rates, and of the way each tensor went; our losses."""
    try:
        import peft, transformers
    except ImportError:
        skip('transformers or peft is not installed')
    same = kind, method, curve_rows(cfg), curve_base(cfg), rate, steps, batch_size, max_length
    losses, rates, begun, path = our_curve(*same)
    their_losses, their_rates, before, after = their_curve(*same, begun)
    ours, ways = gpt.load_safetensors(path), []
    assert len(losses) == len(their_losses) == steps and ours.keys() == after.keys()
    for n in after:
        a, b, start = ours[n], after[n], before[n]
        if n.endswith('c_attn.bias'):                                       # what all keys share drops out of the softmax: its gradient is rounding
            keys = torch.arange(len(a)) // cfg.n_embd == 1                  # alone, of which AdamW makes steps of full size
            a, b, start = a[~keys], b[~keys], start[~keys]
        ways.append(float((a - b).norm() / (b - start).norm()))
    loss, lr = (float(np.max(np.abs(np.divide(a, b) - 1))) for a, b in ((losses, their_losses), (rates, their_rates)))
    return loss, lr, max(ways), losses


def check_curves(kind):
    """The same batches and weights, dropout 0, float32: 50 steps of the script are 50 steps of transformers, peft and torch's AdamW."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                # for matrices this small two that wait for each other are slower
    try:
        for method, rate in (('full', 1e-3), ('lora', 3e-3)):               # so large that the weights go far
            loss, lr, way, losses = curve_differences(kind, method, SMALL, rate)
            assert loss < 1e-4 and lr < 1e-9 and way < 2e-4, (method, loss, lr, way)
            assert max(losses) - min(losses) > 0.02 * max(losses), (method, losses)     # it trains
    finally:
        torch.set_num_threads(threads)


def test_cls_loss_curve_equals_transformers():
    check_curves('cls')


def test_gen_loss_curve_equals_transformers():
    check_curves('gen')


def print_curves(name='gpt2', steps=50):
    """`--parity`: those two tests on a published shape with random weights, at the rates that are the defaults."""
    for kind in ('cls', 'gen'):
        for method in ('full', 'lora'):
            t = time.time()
            loss, lr, way, losses = curve_differences(kind, method, gpt.SHAPES[name], lora.LR[method], steps, 4, 64)
            print(f'train_{kind}.py --{method}, {name}, {steps} steps, loss {losses[0]:.4f} .. {losses[-1]:.4f}; largest relative difference: '
                  f'loss {loss:.1e}, rate {lr:.1e}, way of a tensor {way:.1e}; {time.time() - t:.0f} s', flush=True)


# --- bench.py ---

@contextlib.contextmanager
def little_world():
    """A cache and data sets of a few rows under the published names, and a little GPT-2 under one of its names. -> the data folder"""
    folder = tmp()
    shutil.copytree(os.path.join(real_data('gpt2_bpe'), 'gpt2_bpe'), os.path.join(folder, 'gpt2_bpe'))
    line = dict(sst2='a {1} film {0}\t{2}\n', sms_spam='{3}\tcall {1} {0}\n', ag_news_csv='"{4}","{1} {0}","news"\n')
    for name, file, n in (('sst2', 'train.tsv', 60), ('sst2', 'dev.tsv', 8), ('sms_spam', 'SMSSpamCollection', 80), ('ag_news_csv', 'train.csv', 80),
                          ('ag_news_csv', 'test.csv', 40)):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        words = ('dull', 'fine', 'red', 'blue')[:4 if name == 'ag_news_csv' else 2]                     # each tells its class
        rows = [line[name].format(f'{file} {i}', words[i % len(words)], i % 2, ('ham', 'spam')[i % 2], 1 + i % 4) for i in range(n)]
        write(os.path.join(name, file), ''.join(rows), folder)
    with fresh_cache(), environment(NANOCLS_DATA=folder), patched(gpt, 'SHAPES', {**gpt.SHAPES, 'distilgpt2': gpt.Config(2, 2, 32)}):
        yield folder


def in_this_process(command, **kw):
    """subprocess.run of bench.py, without the seconds that an interpreter needs for torch."""
    if command[1] == '-c':
        if command[2] == bench.ANSWER:
            with patched(sys, 'argv', command[2:]):
                text = script(lambda code: exec(code[0], {}), [command[2]])[1]
            assert len(json.loads(text)[0]) == 2, text
        return SimpleNamespace(returncode=0, stdout='', stderr='')
    main = {'bench.py': bench, 'train_cls.py': train_cls, 'predict.py': predict}[os.path.basename(command[1])].main
    assert command[0] == sys.executable and os.path.isabs(command[1])
    code, out, err = script(main, command[2:])
    return SimpleNamespace(returncode=code or 0, stdout=out, stderr=err)


LITTLE = ['--model', 'distilgpt2', '--device', 'cpu', '--dtype', 'fp32', '--batch_size', '2', '--repeats', '1']


def bench_of(task, *flags):
    """bench.py on a little shape -> (what it printed, the figures it wrote)"""
    path = os.path.join(tmp(), 'figures.json')
    text = script(bench.main, ['--task', task, *LITTLE, *flags, '--json', path])[1]
    found = data.read_json(path)
    assert (found['task'], found['model'], found['dtype'], found['matmul_gflops']) == (task, 'distilgpt2', 'fp32', 50.0)
    return text, found


@contextlib.contextmanager
def little_bench():
    """Where bench.py can be run without waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                # for matrices this small two that wait for each other are slower
    try:
        with little_world(), patched(subprocess, 'run', in_this_process), patched(data, 'tokenizer', functools.cache(data.tokenizer)):
            with patched(bench, 'matmul_rate', lambda *a: 50.0):
                yield
    finally:
        torch.set_num_threads(threads)


def test_bench_ours():
    """Every task alone: figures that belong together, no leftovers."""
    before = gpt.Log, data.collate
    with little_bench():
        for task, *flags in (['lora'], ['full'], ['last'], ['head'], ['adapter', '--against', 'hf'], ['eval', '--rows', '20'],
                             ['predict', '--rows', '20'], ['gen', '--rows', '6', '--top', '1'], ['startup']):
            flags += ['--steps', '6'] if task in bench.METHODS else []
            text, found = bench_of(task, *flags)
            row = found['rows']['nanocls']
            assert found['ratio'] == {} and ('no peer' in text) == (task == 'adapter'), (task, text)
            if task == 'startup':
                assert row['seconds'] > 0 and list(found['rows']) == ['nanocls', 'import torch, numpy'] and 'import torch, numpy' in text
                continue
            assert row['blocks'] == (bench.EPOCHS - 1 if task in bench.METHODS else 1), (task, row)
            assert 1 < row['tokens_per_s'] / row['examples_per_s'] < 12 and 0 <= row['pad_share'] < 0.5 and row['memory_mib'] > 50, (task, row)
            assert row['share_of_matmul'] == row['gflops'] / 50 and f'{row["examples_per_s"]:.1f} examples/s' in text, (task, row, text)
        assert len(os.listdir(os.path.join(data.cache_dir(), 'bench'))) == 1                # one base for all
    assert (gpt.Log, data.collate) == before


def test_bench_leaves_the_first_epoch_out():
    """Blocks are whole epochs but the first, of as many rows as the steps take; nothing is evaluated. --extra reaches train_cls.py."""
    records = []

    def main(argv):
        args = train_cls.parse(argv)[0]
        assert args.gradient_checkpointing == (args.method == 'lora')
        data.make_folder(args.out)
        log = gpt.Log(args.out, args.max_steps)
        for step in range(args.log_every, args.max_steps + 1, args.log_every):
            records.append((args.max_samples, args.max_steps, args.log_every, step))
            log(step=step, loss=1.0, lr=0.1, examples_per_s=float(step), tokens_per_s=10.0 * step, pad_share=0.25)
        raise AssertionError('the evaluation')
    with little_bench(), patched(train_cls, 'main', main):
        epochs = bench.EPOCHS
        for task in ('lora', 'head'):
            records.clear()
            row = bench_of(task, '--steps', '5', *(['--extra=--gradient_checkpointing'] * (task == 'lora')))[1]['rows']['nanocls']
            assert records == [(5, 5 * epochs, 5, 5 * i) for i in range(1, epochs + 1)], records
            assert row['blocks'] == epochs - 1 and row['examples_per_s'] == 5 * (epochs + 2) / 2 and row['pad_share'] == 0.25, row
    with little_bench(), patched(train_cls, 'main', lambda argv: None):
        raises(UserError, bench.main, ['--task', 'lora', *LITTLE, '--steps', '5'], match=f'without logging step {5 * epochs}')


def test_bench_takes_turns():
    """Both peers of every task on a little shape: figures of all sides, and the ratios."""
    try:
        import peft, transformers
    except ImportError:
        skip('transformers or peft is not installed')
    transformers.logging.set_verbosity_error()
    names = ['nanocls', *(f'Hugging Face {peer}' for peer in bench.PEERS)]
    with little_bench():
        for task, *flags in (['lora'], ['full'], ['last'], ['head'], ['eval', '--rows', '20'], ['predict', '--rows', '20'], ['gen', '--rows', '6'],
                             ['startup']):
            flags += ['--steps', '6'] if task in bench.METHODS else []
            text, found = bench_of(task, *flags, '--against', 'hf')
            rows = found['rows']
            assert [name for name in rows if name != 'import torch, numpy'] == names, (task, list(rows))
            for peer in bench.PEERS:
                mine, row = rows['nanocls'], rows[f'Hugging Face {peer}']
                ratio = row['seconds'] / mine['seconds'] if task == 'startup' else mine['tokens_per_s'] / row['tokens_per_s']
                assert found['ratio'][peer] == ratio and f'against {peer}: {ratio:.2f} times as fast' in text, (task, text)
                if task != 'startup':
                    assert found['memory_ratio'][peer] == mine['memory_mib'] / row['memory_mib'] and row['gflops'] > 0, (task, row)
                if task in ('eval', 'gen', 'predict'):                                      # the same texts
                    assert abs(row['tokens_per_s'] / row['examples_per_s'] - mine['tokens_per_s'] / mine['examples_per_s']) < 2.01, (task, rows)


def test_bench_peers_batches():
    """default pads random batches, best those of like length; dropout and precision are as the names promise."""
    try:
        import transformers
    except ImportError:
        skip('transformers is not installed')
    transformers.logging.set_verbosity_error()
    seen, init = [], transformers.Trainer.__init__

    def watched(self, model, args, **k):
        seen.append((args.train_sampling_strategy, args.bf16, model.config.resid_pdrop, args.per_device_train_batch_size))
        init(self, model, args, **k)
    with little_bench(), patched(transformers.Trainer, '__init__', watched):
        rows = ''.join(f'{"fine " * (1 + 37 * i % 40)}film {i}\t{i % 2}\n' for i in range(240))
        write(os.path.join('sst2', 'train.tsv'), rows, os.environ['NANOCLS_DATA'])
        found = bench_of('head', '--steps', '20', '--dtype', 'fp32', '--against', 'hf', '--batch_size', '4')[1]['rows']
        assert seen == [('random', False, 0.1, 4), ('random', False, 0.1, 4), ('group_by_length', False, 0.0, 4)], seen
        default, best = (found[f'Hugging Face {peer}']['pad_share'] for peer in ('default', 'best'))
        assert default > 0.25 > 2 * best, (default, best)
    args = SimpleNamespace(hf_dtype=None, dtype='bf16')
    assert [bench.precision(args, peer) for peer in bench.PEERS] == ['fp32', 'bf16', 'bf16']
    assert bench.precision(SimpleNamespace(hf_dtype='bf16', dtype='fp32'), 'default') == 'bf16'


def test_bench_length():
    """All texts have exactly so many tokens, on both sides; one step is enough."""
    with little_bench():
        write(os.path.join('sst2', 'train.tsv'), ''.join(f'a fine film {i} \t{i % 2}\n' for i in range(300)), os.environ['NANOCLS_DATA'])
        for task, steps in (('lora', 1), ('last', 3)):
            row = bench_of(task, '--steps', str(steps), '--length', '16')[1]['rows']['nanocls']
            assert row['pad_share'] == 0 and abs(row['tokens_per_s'] / row['examples_per_s'] - 16) < 1e-6, row
        texts = bench.texts_of_length(50, 20)
        enc = data.tokenizer('gpt2')
        assert len(set(texts)) == 20 and {len(enc.encode_ordinary(text)) for text in texts} == {50}
        raises(UserError, bench.texts_of_length, 16, 1000, match='lower it')
        for flags, words in ((['--task', 'gen', '--length', '16'], '--length does nothing'), (['--length', '2000'], 'positions'),
                             (['--rows', '5'], '--rows does nothing')):
            raises(UserError, bench.main, LITTLE + flags, match=words)
    with little_world(), patched(subprocess, 'run', lambda *a, **k: SimpleNamespace(returncode=2, stdout='', stderr='error:\nno luck')):
        raises(UserError, bench.main, LITTLE, match='nanocls failed: error: no luck')


def test_bench_flops():
    """The formula against torch's own count of a forward pass, and the tasks against one another."""
    from torch.utils.flop_counter import FlopCounterMode
    cfg = gpt.Config(3, 4, 32, 64, 300)
    model = gpt.GPT(cfg, 2).init_weights()

    def counted(n, run):
        """Without attention, whose kernel is counted whole, though half of it is masked."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(torch.zeros(1, n, dtype=torch.long), torch.tensor([n]))
        return sum(c for op, c in counter.get_flop_counts()['Global'].items() if 'attention' not in str(op))
    C, L = cfg.n_embd, cfg.n_layer
    for n in (1, 7, 40):
        pairs = 4 * C * ((L - 1) * n * (n + 1) / 2 + n)                     # 2 for the score and 2 for the sum, each C
        head = 2 * C * 2
        queries = 2 * C * C * (n - 1)                                       # made and thrown away: not needed
        assert bench.flops('head', cfg, [n]) == counted(n, model.classify) - head - queries + pairs, n
        T = n + 1                                                           # <|endoftext|> in front; that behind is a target alone
        scored = counted(T, lambda ids, lengths: model.next_logprobs(model.hidden(ids)[0], ids[0])) + 4 * C * L * T * (T + 1) / 2
        assert bench.flops('gen', cfg, [n]) == bench.CLASSES * scored, n
        assert bench.flops('gen', cfg, [n], top=3) == bench.flops('gen', cfg, [n]) > bench.flops('gen', cfg, [n], top=1)
        shared = (24 * C * C * T + 2 * C * T * (T + 1)) * (L - 1) * (bench.CLASSES - 1)
        assert bench.flops('gen', cfg, [n]) - bench.flops('gen', cfg, [n], top=1) == shared, n
        forward = bench.flops('eval', cfg, [n])
        assert forward == bench.flops('head', cfg, [n]) == bench.flops('predict', cfg, [n])
        assert bench.flops('full', cfg, [n]) == 3 * forward
        assert bench.flops('lora', cfg, [n]) == 2 * forward + pairs == bench.flops('adapter', cfg, [n])
        block = 4 * C * C * n + 20 * C * C + 4 * C * n
        assert bench.flops('last', cfg, [n]) == forward + 2 * block, n
    assert bench.flops('lora', cfg, [7, 40]) == bench.flops('lora', cfg, [7]) + bench.flops('lora', cfg, [40])
    assert bench.matmul_rate('cpu', torch.float32, 64) > 0.01


def test_bench_memory():
    """The peak is that of the process, and stays after what was held is gone."""
    code = ('import bench\nbefore = bench.peak_memory("cpu")\nx = bench.torch.ones(100 * 2**18)\ndel x\n'
            'print(before, bench.peak_memory("cpu"))')
    before, after = map(float, subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, check=True,
                                              cwd=os.path.dirname(bench.__file__)).stdout.split())
    assert before < 2000 and 90 < after - before < 150, (before, after)


def test_bench_curves():
    """Which scripts it would run, with flags that they know; which accuracy stands in which column."""
    ran = []

    def run(command, **kw):
        name, flags = os.path.basename(command[1]), command[2:]
        out = flags[flags.index('--out') + 1]
        if '--resume' in flags:
            kind = 'posterior'
            assert out in [made for _, _, made in ran] and '--posterior_steps' in flags
        else:
            args = (train_cls if name == 'train_cls.py' else train_gen).parse(flags)[0]
            kind = 'base' if args.method == 'pretrain' else name
            assert kind == 'base' or args.model == ran[0][2], 'all over the one base'
            data.make_folder(out)
        ran.append((kind, flags, out))
        if kind != 'base':
            accuracy = {'train_cls.py': 0.75, 'train_gen.py': 0.5, 'posterior': 0.25}[kind]
            data.write_json(os.path.join(out, 'eval_results.json'), dict(accuracy=accuracy))
        return SimpleNamespace(returncode=0, stdout='')
    with little_world(), patched(subprocess, 'run', run):
        for name in ('agnews', 'sms'):
            ran.clear()
            path = os.path.join(tmp(), 'rows.json')
            text = script(bench.main, ['--task', 'curves', '--data', name, '--repeats', '1', '--json', path])[1]
            assert [kind for kind, _, _ in ran] == ['base'] + 3 * ['train_cls.py', 'train_gen.py', 'posterior']
            rows = data.read_json(path)
            assert [r['size'] for r in rows] == [100, 1000, 'all'] and rows[0]['rows'] == dict(agnews=72, sms=56)[name], rows
            assert all((r['naive_bayes'], r['discriminative'], r['generative'], r['posterior']) == (1, 0.75, 0.5, 0.25) for r in rows), rows
            assert 'all rows per class: naive_bayes 100.00 +- nan, discriminative 75.00 +- nan, generative 50.00' in text, text
    with little_world(), patched(subprocess, 'run', lambda *a, **k: SimpleNamespace(returncode=2, stdout='error: no')):
        raises(UserError, bench.main, ['--task', 'curves', '--data', 'sms'], match='train_gen.py --pretrain')


# --- runner ---

def main(words):
    if words[:1] == ['--kills']:
        kill_long(int(words[1]))
        shutil.rmtree(ROOT, ignore_errors=True)
        return 0
    if words[:1] == ['--fuzz']:
        if not (len(words) > 1 and words[1].isdecimal() and set(words[2:]) <= set(kinds())):
            print(f'usage: python test_all.py --fuzz N [KIND ...]; the kinds are {", ".join(kinds())}')
            return 2
        return all_fuzz(int(words[1]), words[2:])
    if words[:1] == ['--parity']:
        print_curves(*words[1:2], *map(int, words[2:]))
        shutil.rmtree(ROOT, ignore_errors=True)
        return 0
    tests = {n: f for n, f in globals().items() if n.startswith('test_') and (not words or any(w in n for w in words))}
    passed, failed, skipped, start = 0, [], 0, time.time()
    for name, test in tests.items():
        t = time.time()
        try:
            test()
            passed, what = passed + 1, 'ok  '
        except Skip as e:
            skipped, what = skipped + 1, f'skip ({e})'
        except Exception:
            failed.append(name)
            what = 'FAIL'
            traceback.print_exc()
        print(f'{what} {name} {time.time() - t:.1f} s', flush=True)
    shutil.rmtree(ROOT, ignore_errors=True)
    print(f'{time.time() - start:.0f} s' + (f'; failed: {", ".join(failed)}' if failed else ''))
    print(f'{passed} passed, {len(failed)} failed, {skipped} skipped')
    return 1 if failed or not passed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
