"""All tests: `python test_all.py`, or `python test_all.py NAME ...` for those whose names hold one of the words.

Needs the four packages of requirements.txt and no network. Tests against real data run where $NANOCLS_DATA is set, tests against
transformers, peft, safetensors, scikit-learn and matplotlib where they are installed; what is skipped is printed with its reason."""
import builtins
import contextlib
import copy
import csv
import functools
import hashlib
import http.server
import io
import json
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
import threading
import time
import traceback
import zipfile
from types import SimpleNamespace

ROOT = tempfile.mkdtemp(prefix='nanocls-test-')
os.environ['NANOCLS_CACHE'] = os.path.join(ROOT, 'cache')               # never the user's own
os.environ.setdefault('HF_HUB_OFFLINE', '1')                            # transformers must not ask the network either

import numpy as np
import torch

import data
import eval as evaluation                                               # not `eval`, which is Python's own
import lora
import model as gpt
import predict
import train_cls
from data import UserError
from model import GPT


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
    with open(path, encoding="utf-8", newline="") as f:
        assert list(data.stream_csv(f, path, ",")) == ["a\nb", "c"]
    with open(path, encoding="utf-8", newline="") as f:
        raises(UserError, list, data.stream_csv(f, path, ",", "body"), match="no column 'body'")
    assert list(data.stream_csv(io.StringIO("anything\nx\ny\n"), "s", ",")) == ["x", "y"]
    assert list(data.stream_jsonl(io.StringIO('{"body": "x", "n": 1}\n{"body": "y"}\n'), "s", "body")) == ["x", "y"]
    raises(UserError, list, data.stream_jsonl(io.StringIO('{"text": "x"}\n{"text": 1}\n'), "s"), match="line 2")


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
    with server({"/distilbert/distilgpt2/resolve/main/model.safetensors": redirect, "/blob": BODY,
                 "/openai-community/gpt2/resolve/main/model.safetensors": BODY}) as (at, asked), fresh_cache() as cache:
        with environment(HF_ENDPOINT=at, **here):
            path = quiet(data.weights, "distilgpt2")
            assert path == os.path.join(cache, "models/distilgpt2/model.safetensors") and data.read_bytes(path) == BODY
            asked.clear()
            assert data.weights("distilgpt2") == path and not asked
            raises(data.Unavailable, lambda: quiet(data.weights, "gpt2"), match="size or checksum")
            raises(data.Unavailable, lambda: quiet(data.weights, "gpt2-xl"), match="404")
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
    info = dict(labels=labels, method="head", kind="cls", model="nano", data="fake", seed=args["seed"], args=args)
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
    raises(UserError, run_eval, [a], match="no labels")


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
    for cfg, lengths, extra in ((SMALL, (7, 1, 30, 12), 200), (gpt.SHAPES['gpt2'], (40, 3), 200)):
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


def test_optimizer_groups():
    model = GPT(SMALL, 2).init_weights()
    names = {p: n for n, p in model.named_parameters()}
    decayed = {names[p] for g in gpt.make_optimizer(model, 1e-3, 0.1).param_groups if g['weight_decay'] for p in g['params']}
    assert 'wte.weight' not in decayed and 'wpe.weight' not in decayed and not any('ln_' in n or n.endswith('bias') for n in decayed)
    assert len(decayed) == 4 * SMALL.n_layer + 1
    lora.adapt(model, 'prompt', prompt=3)
    opt = gpt.make_optimizer(model, 1e-3, 0.1)
    assert sum(len(g['params']) for g in opt.param_groups) == 2         # the prompt and the head, nothing frozen


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
    """The share dropped, the scale of what is kept, and no pattern between neighbours (four of them share a draw)."""
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


def test_frozen_weights_stay_bitwise():
    """In float32 and in bf16, for each method: what is frozen is what it was, what trains has moved."""
    for dtype in ('fp32', 'bf16'):
        for method in METHODS:
            seen = {}
            def catch(model, device, dtype, real=gpt.place):
                model = real(model, device, dtype)
                seen.update(model=model, before={n: p.detach().clone() for n, p in model.named_parameters()})
                return model
            with patched(gpt, 'place', catch), patched(lora, 'open_run', stop_here):
                raises(Stop, train, *TINY, *FLAGS[method], '--dtype', dtype, '--max_steps', '5')
            for n, p in seen['model'].named_parameters():
                moved = not torch.equal(p, seen['before'][n])
                assert moved == p.requires_grad, (method, dtype, n, moved)
                assert p.requires_grad or p.grad is None


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


def test_runs_open_in_transformers_and_peft():
    try:
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification
    except ImportError:
        skip('transformers or peft is not installed')
    texts = ['the song was warm', 'not at all dull, but the garden felt messy', 'x']
    for method in ('head', 'last', 'full', 'lora', 'prompt'):
        out = tiny_run(method)
        run = lora.open_run(out, 'cpu', 'fp32')
        if method in ('lora', 'prompt'):
            base = AutoModelForSequenceClassification.from_pretrained(os.path.join(out, 'base'), num_labels=2, pad_token_id=256)
            theirs = PeftModel.from_pretrained(base, out).eval()
        else:
            theirs = AutoModelForSequenceClassification.from_pretrained(out).eval()
            assert theirs.config.id2label == dict(enumerate(run.labels))
        ours = torch.from_numpy(run.logits(texts))
        for text, row in zip(texts, ours):
            with torch.no_grad():
                logits = theirs(torch.tensor([run.enc.encode_ordinary(text)])).logits
            assert float((logits[0] - row).abs().max()) < 1e-5 * float(row.abs().max()) + 1e-7, (method, logits, row)


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
    """The language model `nano` and LoRA on top of it, in fewer than the default steps; the README has the full run."""
    out, _ = train('--data', 'demo', '--max_steps', '600', '--eval_every', '600', '--log_every', '200')
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
    code = 'import data, os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)'
    p = subprocess.run([sys.executable, '-c', code], cwd=os.path.dirname(os.path.abspath(__file__)), stderr=subprocess.PIPE, text=True)
    assert p.returncode in (-signal.SIGINT, 130) and p.stderr == 'interrupted\n', p


def test_scripts_end_as_they_should():
    """As a user runs them: exit codes, one sentence on stderr, no traceback."""
    here = os.path.dirname(os.path.abspath(__file__))
    for argv, code, match in ((['train_cls.py', '--bogus'], 2, 'error: '), (['eval.py', 'nowhere'], 2, 'nowhere'), (['predict.py', 'nowhere', 'x'], 2, 'nowhere'),
                              (['data.py', 'nowhere'], 2, 'nowhere'), (['bench.py', '--task', 'x'], 2, '--task'), (['train_cls.py', '--help'], 0, None)):
        p = subprocess.run([sys.executable, os.path.join(here, argv[0]), *argv[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp())
        assert p.returncode == code and 'Traceback' not in p.stderr, (argv, p.returncode, p.stderr)
        assert match is None or (match in p.stderr and len(p.stderr.strip().splitlines()) == 1), p.stderr


# --- runner ---

def main(words):
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
