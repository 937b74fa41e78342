"""Damaged files of every kind: `python test_all.py --fuzz N [KIND ...]`."""

import contextlib
import copy
import csv
import gzip
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import traceback
import warnings
import zipfile
from types import SimpleNamespace

import torch

import data
import eval as evaluation  # not `eval`, which is Python's own
import lib.download
import lora
import predict
from lib.files import UserError, cached, read_bytes, write_json
from lib.flags import resumed
from lib.peft import load_peft, save_peft
from lib.plots import read_log
from lib.prompts import prompts_of
from lib.resume import load_resume, restore, save_resume
from lib.rundata import own_data
from lib.runfolder import read_run, save
from lib.tables import Format, read_own, read_rows
from lib.tensors import load_bin, load_safetensors, save_safetensors
from lib.tokens import tokenize, tokenizer
from lib.training import Log
from model import GPT, Config
from tests.helpers import (
    ALL,
    environment,
    formula_model,
    gen_run,
    lm_logits,
    patched,
    ragged,
    save_hf,
    script,
    tiny_imdb,
    tiny_run,
    tmp,
    topics,
    tree,
    write,
)

ODD = """-1 0 1 3 0.5 -0.0 true false null [] {} "" "x" "1" [[]] [1,"a",null] {"a":{"b":[]}} [-1,2]
["x","x"] 2147483648 9223372036854775808 -9223372036854775809 1e308 1e999 -1e999 NaN "NaN" "*"
"../../evil" "/etc/passwd" "a\\nb" "\\u0000" "\\ud800" "(a*)*(.*.*)*!" """.split()
ODD += ['9' * 400, '9' * 5000, '[' * 900 + ']' * 900, '[' * 20000, '{"a": ' * 20000]
ODD += ['"' + 'x' * 70000 + '"', '[' + '7, ' * 3000 + '7]']
BITS = b'" "" , { } [ ] : \\ \\u - PK\x01\x02 ../ \xff \xef\xbb\xbf \xed\xa0\x80'.split(b' ')
BITS += b'\xc0\x80 \xf0\x9f\x98\x80 \x1b[2J \xe2\x80\xa8 \t \r \n \r\n \0'.split(b' ')
BITS += [b'9' * 400, b'\xff' * 8, b'\0' * 8, struct.pack('<q', 2**62), struct.pack('<i', -1)]


def damaged(rng, raw):
    """Bytes with one to four mistakes: flipped bits, replaced or inserted bytes, ranges that are
    deleted, doubled, repeated or swapped, a missing end."""
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
            raw[a : a + len(some)] = some
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
    """JSON in which one to four values are replaced by odd ones, deleted, swapped, doubled or
    renamed; in one case of four, damaged bytes instead."""
    if rng.random() < 0.25:
        return damaged(rng, raw)
    tree, put = [json.loads(raw)], {}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places, todo = [], [tree]
        while todo:
            x = todo.pop()
            places.append(x)
            todo += [
                y
                for y in (x.values() if isinstance(x, dict) else x)
                if isinstance(y, (dict, list)) and y
            ]
        x, z = rng.choice(places), rng.choice(places)
        key, other = (
            rng.choice(list(y) if isinstance(y, dict) else range(len(y))) if len(y) else None
            for y in (x, z)
        )
        kind, mark = rng.random(), f'odd value {len(put)}'
        if key is None or other is None:
            continue
        if kind < 0.7:
            put[mark], x[key] = rng.choice(ODD), mark
        elif kind < 0.8 and x is not tree:
            del x[key]
        elif (
            kind < 0.85
            and not isinstance(x[key], (dict, list))
            and not isinstance(z[other], (dict, list))
        ):
            x[key], z[other] = z[other], x[key]
        elif isinstance(x, list):
            x.append(copy.deepcopy(x[key]))
        else:
            x[rng.choice((mark, ' ', 'x' * 5000, key + '\n'))], put[mark] = (
                copy.deepcopy(x[key]),
                '"odd"',
            )
    text = json.dumps(tree)[1:-1]
    if (
        text.startswith('{') and rng.random() < 0.1
    ):  # a key that is there twice: the last one counts
        text = (
            text[:-1] + f', {json.dumps(rng.choice(list(tree[0]) or ["a"]))}: {rng.choice(ODD)}}}'
        )
    for mark, odd in put.items():
        text = text.replace(json.dumps(mark), odd, 1)
    return text.encode()


def odd_safetensors(rng, raw):
    """A safetensors file with such a header, whose length mostly fits; or with damaged data, or
    damaged as bytes."""
    if rng.random() < 0.25:
        return damaged(rng, raw)
    n = struct.unpack('<Q', raw[:8])[0]
    header, body = raw[8 : 8 + n], raw[8 + n :]
    if rng.random() < 0.3:  # claims that agree with one another
        tree = json.loads(header)
        names = [name for name in tree if name != '__metadata__']
        for _ in range(rng.choice((1, 2))):
            one = tree[rng.choice(names)]
            what = rng.randrange(5)
            if what == 0:
                one['data_offsets'] = list(tree[rng.choice(names)]['data_offsets'])
            elif what == 1:
                one['shape'] = rng.choice(
                    (
                        [0, 2**62],
                        [2**40, 2**40, 0],
                        [2**62, 4],
                        [1] * 100,
                        ['ab' * 500, 10**7],
                        [2**63] * 500,
                        [[]],
                        [-1, -8],
                        [0] * 70,
                        [True],
                    )
                )
            elif what == 2:
                one['data_offsets'] = rng.choice(
                    ([0, 2**63], [-8, 0], [8, 0], [0, 0], [0.0, 8.0], [0, 1 << 40])
                )
            elif what == 3:
                one['dtype'] = rng.choice(('F64', 'F16', 'BF16', 'I8', 'BOOL', 'U8', 'I64'))
            else:
                one['shape'] = one['shape'][::-1] + [1]
        header = json.dumps(tree).encode()
    else:
        header = odd_json(rng, header)
    length = struct.pack(
        '<Q',
        len(header)
        if rng.random() < 0.8
        else rng.choice((0, 1, n + 1, len(header) + 5, 10**8, 2**63, 2**64 - 1)),
    )
    return length + header + (body if rng.random() < 0.7 else damaged(rng, body))


def odd_zip(rng, raw):
    """A zip packed again with members deleted, doubled, renamed, damaged, compressed another way,
    or declared to be 10 GB."""
    if rng.random() < 0.3:
        return damaged(rng, raw)
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(raw)) as old,
        zipfile.ZipFile(buffer, 'w') as new,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore')  # a name that is there twice
        for info in old.infolist():
            name, content, kind = info.filename, old.read(info), rng.randrange(14)
            if kind == 0:
                continue
            name = (
                rng.choice(
                    (
                        name,
                        '../' + name,
                        '/' + name,
                        'C:\\' + name,
                        name.replace('/', '\\'),
                        name + '/',
                        'é\0',
                        'x' * 60000,
                    )
                )
                if kind == 1
                else name
            )
            content = (
                damaged(rng, content)
                if kind in (2, 3, 4)
                else bytes(30_000_000)
                if kind == 5 and rng.random() < 0.1
                else content
            )
            way = rng.choice((0, 8, 8, 12, 14)) if kind > 6 else info.compress_type
            for _ in range(1 + (kind == 6)):
                new.writestr(zipfile.ZipInfo(name), content, way)
            if kind in (7, 8):
                new.infolist()[-1].file_size = rng.choice(
                    (10 << 30, 1 << 62, 0, 5, len(content) + 1)
                )
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
    """Limits the seconds and the memory inside, on systems that support it."""

    def ring(*a):
        raise Hang(f'not done after {seconds} s')

    limit = None
    if sys.platform == 'linux':
        import resource

        with open('/proc/self/statm') as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
        limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(
            resource.RLIMIT_AS,
            (now + extra if limit[1] < 0 else min(now + extra, limit[1]), limit[1]),
        )
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


def fuzz_csv(folder, sep=','):
    rows = [
        f'"text, with ""quotes"" {i}"{sep}{"ab"[i % 2]}{sep}{i}\n'
        if i % 3
        else f'plain ä text {i}{sep}"{"ab"[i % 2]}"{sep}{i}\r\n'
        for i in range(30)
    ]
    raw, name = (
        (f'text{sep}label{sep}n\n' + ''.join(rows)).encode(),
        'x.csv' if sep == ',' else 'x.tsv',
    )

    def case(rng):
        new, kind = damaged(rng, raw), rng.randrange(20)
        if kind == 0:
            new = raw.decode().encode(
                rng.choice(('utf-16', 'utf-16-le', 'utf-32', 'latin-1', 'utf-8-sig', 'cp1252'))
            )
        if kind == 1:
            new = new.replace(b'\n', rng.choice((b'\r', b'\n\n', b'\0', b'')))
        path = write(name, new, folder)
        return rng.choice(
            (
                lambda: data.load(path),
                lambda: data.load(path),
                lambda: list(read_rows(path)),
                lambda: data.load(path, form=Format('n', 'label')),
                lambda: read_own(folder),
            )
        )

    return case


def fuzz_tsv(folder):
    return fuzz_csv(folder, '\t')


def fuzz_own(folder):
    """Tables with any separator, encoding and header, packed or not, read by flags that fit them
    or not."""
    seps, encodings = [*',;|~', '\t'], ['utf-8', 'utf-8-sig', 'cp1252', 'utf-16', 'utf-16-be']
    headers = ['text', 'label', 'n'], ['', 'text', 'label'], ['title', 'body', 'label']
    headers += ['text', 'text', 'label'], ['title,body', 'body', 'y'], ['u', 'v', ''], ['', '', '']
    labels = [['a', 'b'], ['a', 'A ', ''], ['nan', 'b'], ['0.5', '1', '2'], ['a', 'b', ' ', 'None']]

    def form(rng, sep, encoding, header):
        """Mostly flags that fit the file."""

        def pick(right, *wrong):
            return right if rng.random() < 0.9 else rng.choice(wrong)

        columns = pick(None, 'text', 'title,body', 'label', 'n,text', ' ', 'column 1', ',')
        label = pick(None, 'label', 'y', 'n', '')
        if rng.random() < 0.3:
            columns, label = ','.join(header[:-1]), header[-1]
        sep = pick(rng.choice((None, sep)) if sep != '~' else sep, *seps)
        encoding = pick(encoding, None, *encodings, 'latin-1', 'hex', 'utf-7', 'utf-32')
        return Format(columns, label, sep, encoding, rng.random() < 0.7)

    def case(rng):
        sep, encoding, end = (
            rng.choice(seps),
            rng.choice(encodings),
            rng.choice(('\n', '\r\n', '\r')),
        )
        header, names = rng.choice(headers), rng.choice(labels)
        rows = [header] + [
            [
                rng.choice((f'té{sep}xt {i}', f'"x" {i}', '', f'plain {i}', f'a{end}b'))
                for _ in header
            ]
            for i in range(rng.choice((3, 40, 40, 40)))
        ]
        for i, row in enumerate(rows[1:]):
            row[rng.choice((-1, -1, -1, -1, 0))] = names[i % len(names)]
        out = io.StringIO(newline='')
        out.write(rng.choice(('', '', '', f'sep={sep}{end}', f'"sep={sep}"{end}')))
        csv.writer(out, delimiter=sep, lineterminator=end).writerows(rows)
        raw, packed = out.getvalue().encode(encoding), rng.random() < 0.3
        raw = damaged(rng, raw) if rng.random() < 0.5 else raw
        raw = gzip.compress(raw, 1) if packed else raw
        raw = damaged(rng, raw) if packed and rng.random() < 0.3 else raw
        name = rng.choice(['x.csv', 'x.tsv'] * 5 + ['x.txt', 'x.jsonl']) + '.gz' * packed
        path, asked = write(name, raw, folder), form(rng, sep, encoding, header)
        like = asked._replace(like=form(rng, sep, encoding, header))
        return rng.choice(
            (
                lambda: data.load(path, form=asked),
                lambda: data.load(path, form=like),
                lambda: data.load(path, val=path, test=path, form=asked),
                lambda: data.load_texts(path, form=asked),
                lambda: list(read_rows(path, asked)),
                lambda: list(read_rows(path, like)),
            )
        )

    return case


def fuzz_jsonl(folder):
    lines = [
        json.dumps(
            dict(text=f'text ä {i}', label=i % 2 if i % 3 else bool(i % 2), more=[i, None])
        ).encode()
        for i in range(30)
    ]
    two = [
        json.dumps(dict(a=f'text {i}', b='xy'[i % 2])).encode() for i in range(30)
    ]  # columns that have to be guessed

    def case(rng):
        new = list(rng.choice((lines, lines, two)))
        for i in rng.sample(range(len(new)), rng.choice((1, 1, 3))):
            new[i] = odd_json(rng, new[i])
        new = b'\n'.join(new)
        path = write('x.jsonl', damaged(rng, new) if rng.random() < 0.2 else new, folder)
        return rng.choice(
            (lambda: data.load(path), lambda: data.load(path), lambda: list(read_rows(path)))
        )

    return case


def fuzz_published(folder):
    """The published data sets as plain files."""
    sets = dict(
        sst2=('sst2/train.tsv', 'sentence\tlabel\n' + 'fine \t1\nbad \t0\n' * 30),
        sms=('sms_spam/SMSSpamCollection', 'ham\thi\nspam\t"win\n' * 30),
        agnews=(
            'ag_news_csv/train.csv',
            ''.join(f'"{1 + i % 4}","a {i}","it ""is"" b"\n' for i in range(60)),
        ),
    )
    for rel, raw in [
        *sets.values(),
        ('sst2/dev.tsv', sets['sst2'][1]),
        ('ag_news_csv/test.csv', sets['agnews'][1]),
    ]:
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
    for name, members in (
        ('sms', {'readme': 'x', 'SMSSpamCollection': sms}),
        ('sst2', {'SST-2/train.tsv': sst2, 'SST-2/dev.tsv': sst2}),
    ):
        buffers[name] = io.BytesIO()
        with zipfile.ZipFile(buffers[name], 'w', zipfile.ZIP_DEFLATED) as z:
            for member, text in members.items():
                z.writestr(
                    zipfile.ZipInfo(member), text, zipfile.ZIP_DEFLATED
                )  # a ZipInfo has no time of day: the same bytes every time

    def case(rng):
        name = rng.choice(('sms', 'sst2'))
        write(
            dict(sms='sms_spam/sms+spam+collection.zip', sst2='sst2/SST-2.zip')[name],
            odd_zip(rng, buffers[name].getvalue()),
            folder,
        )
        return lambda: data.load(name, data_dir=folder)

    return case


TAR_TYPES = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b'Z']
TAR_TYPES += [tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.AREGTYPE]
PAX_HEADERS = 'path size mtime GNU.sparse.map GNU.sparse.size GNU.sparse.realsize'.split()
PAX_HEADERS += ['GNU.sparse.major', 'hdrcharset']
PAX_VALUES = ['-1', 'x', '', '10737418240', '1', '0,' * 99, '1e999', '../../x', 'BINARY']


def fuzz_tar(folder):
    os.makedirs(os.path.join(folder, 'imdb'))
    path = os.path.join(folder, 'imdb', 'aclImdb_v1.tar.gz')

    def packed(rng):
        """The archive with odd members among the reviews."""
        buffer, odd = io.BytesIO(), rng.random() < 0.7
        with tarfile.open(
            fileobj=buffer,
            mode='w',
            format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)),
        ) as tar:
            for i in range(24):
                raw = f'review {i}<br /><br />it is {i % 2}'.encode()
                split, label = 'train' if i % 4 < 2 else 'test', 'neg' if i % 2 else 'pos'
                info = tarfile.TarInfo(f'aclImdb/{split}/{label}/{i}_7.txt')
                info.size, kind = len(raw), rng.randrange(60) if odd else 99
                if kind == 0:
                    info.name = rng.choice(
                        ('../../' + info.name, '/' + info.name, info.name + '\n', 'x' * 90, '')
                    )
                elif kind == 1:
                    info.type = rng.choice(TAR_TYPES)
                    info.linkname = rng.choice(('/etc/passwd', '../../x', info.name, ''))
                elif kind == 2:
                    raw = damaged(rng, raw)
                    info.size = len(raw)
                elif kind == 3 and tar.format == tarfile.PAX_FORMAT:
                    info.pax_headers = {rng.choice(PAX_HEADERS): rng.choice(PAX_VALUES)}
                elif kind == 4:
                    info.size = (
                        rng.choice((10 << 30, 2**62, 0, len(raw) + 600))
                        if tar.format == tarfile.GNU_FORMAT
                        else 7 << 30
                    )
                    tar.fileobj.write(info.tobuf(tar.format) + raw.ljust(512, b'\0'))
                    tar.offset += 1024
                    continue
                elif kind == 5:
                    info.type, info.size = (
                        rng.choice(
                            (
                                tarfile.GNUTYPE_LONGNAME,
                                tarfile.GNUTYPE_LONGLINK,
                                tarfile.GNUTYPE_SPARSE,
                                tarfile.XHDTYPE,
                                tarfile.XGLTYPE,
                            )
                        ),
                        rng.choice((len(raw), 5 << 30)),
                    )
                    tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT) + raw.ljust(512, b'\0'))
                    tar.offset += 1024
                    continue
                tar.addfile(info, io.BytesIO(raw))
        raw = buffer.getvalue()
        return gzip.compress(damaged(rng, raw) if rng.random() < 0.4 else raw, 1, mtime=0)

    def case(rng):
        raw = packed(rng)
        write(path, damaged(rng, raw) if rng.random() < 0.3 else raw)
        cache = cached('imdb')
        shutil.rmtree(cache, ignore_errors=True)
        if rng.random() < 0.2:  # what a first reading left in the cache
            write(path, good)
            data.load('imdb', data_dir=folder)
            parsed = os.path.join(cache, os.listdir(cache)[0])
            write(parsed, odd_json(rng, read_bytes(parsed)))

        def use():
            with patched(lib.download, 'MAX_UNPACKED', 16 << 20):  # for speed
                data.load('imdb', data_dir=folder)

        return use

    tiny_imdb(path, 12)
    good = gzip.compress(gzip.decompress(read_bytes(path)), 1, mtime=0)
    return case


def fuzz_tokens(folder):
    """The cache of token ids: whatever it holds, the result is token ids."""
    enc, texts = tokenizer('bytes'), [f'text {i}' * i for i in range(9)]
    shutil.rmtree(cached('tokens'), ignore_errors=True)
    tokenize(enc, texts)
    path = os.path.join(cached('tokens'), os.listdir(cached('tokens'))[0])
    raw = read_bytes(path)

    def case(rng):
        write(path, odd_zip(rng, raw))

        def use():
            tokens = tokenize(enc, texts)
            assert len(tokens) == 9 and tokens.lengths.min() > 0 and tokens.flat.max() < enc.n_vocab
            assert tokens.starts[-1] == len(tokens.flat)

        return use

    return case


def fuzz_safetensors(folder):
    path = os.path.join(folder, 'x.safetensors')
    save_safetensors(
        path,
        dict(
            a=torch.ones(3, 5),
            b=torch.arange(7),
            c=torch.tensor(2.5),
            d=torch.empty(0, 4),
            e=torch.ones(3).bfloat16(),
            f=torch.tensor([True, False]),
        ),
    )
    raw = read_bytes(path)

    def case(rng):
        write(path, odd_safetensors(rng, raw))
        return lambda: [t.float().sum() for t in load_safetensors(path).values()]

    return case


FUZZED = Config(n_layer=1, n_head=2, n_embd=8, block_size=24, vocab_size=257)


def try_model(model):
    """What a user would do with a model that was loaded."""
    ids, lengths = ragged(model.cfg.vocab_size, (3, 1), pad=model.end)
    with torch.no_grad():
        return (
            model.classify(ids[:, : model.cfg.block_size], lengths)
            if hasattr(model, 'score')
            else lm_logits(model, ids[:, : model.cfg.block_size])
        )


def fuzz_model(folder):
    """A folder with config.json and model.safetensors, either or both odd, or without the
    config."""
    model = formula_model(FUZZED, 2)
    save_hf(
        folder,
        model,
        ['no', 'yes'],
        {**model.state_dict(), 'lm_head.weight': model.wte.weight.detach()},
    )
    files = {
        name: read_bytes(os.path.join(folder, name))
        for name in ('config.json', 'model.safetensors')
    }

    def case(rng):
        which = rng.random()
        write(
            'config.json',
            odd_json(rng, files['config.json']) if which < 0.6 else files['config.json'],
            folder,
        )
        write(
            'model.safetensors',
            odd_safetensors(rng, files['model.safetensors'])
            if which > 0.5
            else files['model.safetensors'],
            folder,
        )
        if which > 0.95:
            os.remove(os.path.join(folder, 'config.json'))
        n = rng.choice((0, 2))
        return lambda: try_model(GPT.from_pretrained(folder, num_labels=n))

    return case


def fuzz_index(folder):
    """Shards with their index."""
    save_hf(folder, formula_model(FUZZED, 0))
    tensors = {
        n: t.clone() for n, t in load_safetensors(os.path.join(folder, 'model.safetensors')).items()
    }
    os.remove(os.path.join(folder, 'model.safetensors'))
    for i in range(2):
        save_safetensors(
            os.path.join(folder, f'model-{i}.safetensors'),
            {n: t for j, (n, t) in enumerate(tensors.items()) if j % 2 == i},
        )
    raw = json.dumps(
        dict(
            metadata=dict(total_size=1),
            weight_map={n: f'model-{j % 2}.safetensors' for j, n in enumerate(tensors)},
        )
    ).encode()

    def case(rng):
        write('model.safetensors.index.json', odd_json(rng, raw), folder)
        return lambda: try_model(GPT.from_pretrained(folder))

    return case


class Payload:
    """What pickle would call when it is loaded."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def odd_pickle(rng, good, mark):
    """A checkpoint that would write the file `mark` if its code ran, or that holds what is no
    tensor, or that is packed oddly or damaged."""
    calls = [
        (open, (mark, 'w')),
        (os.system, (f'touch {mark}',)),
        (exec, (f'open({mark!r}, "w")',)),
        (eval, (f'open({mark!r}, "w")',)),
        (os.mkdir, (mark,)),
        (subprocess.Popen, (['touch', mark],)),
        (shutil.copy, (__file__, mark)),
        (getattr, ('x', 'join')),
        (torch.load, (mark,)),
        (bytearray, (10 << 30,)),
    ]
    rebuild, storage = torch._utils._rebuild_tensor_v2, torch.ones(4).untyped_storage()
    laughs = [[]]
    for _ in range(60):
        laughs = [laughs, laughs]
    odd = [
        laughs,
        torch.ones(1).expand(10**12),
        torch.ones(2, dtype=torch.int8).expand(10**9, 2),
        torch.ones(4).to_sparse(),
        torch.ones(4, dtype=torch.complex64),
        torch.empty(4, device='meta'),
        torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        torch.nn.Parameter(torch.ones(4)),
        torch.tensor(b'a'[0]),
        'x',
        None,
        {},
        [torch.ones(2)],
        torch.ones(0, 2**40),
    ]
    kind, state = rng.randrange(8), dict(good)
    key = rng.choice(list(state))
    if kind < 3:
        call = Payload(*rng.choice(calls))
        state = rng.choice((call, {**state, key: call}, {'a': [call]}, [call]))
    elif kind < 5:
        state[rng.choice((key, key, 'new', 7, None, (1, 2)))] = rng.choice(odd)
    elif kind == 5:
        sizes = rng.choice(
            (
                ((2**40,), (0,)),
                ((-1,), (1,)),
                ((4,), (2**62,)),
                ((2, 2), (1,)),
                ((4,), (-1,)),
                (('a',), (1,)),
                ((2**63,), (1,)),
            )
        )
        state[key] = Payload(
            rebuild,
            (
                torch.storage.TypedStorage(
                    wrap_storage=storage, dtype=torch.float32, _internal=True
                ),
                rng.choice((0, -1, 2**40, 'a')),
                *sizes,
                False,
                {},
            ),
        )
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=rng.random() < 0.8)
    raw, how = buffer.getvalue(), rng.random()
    return (
        odd_zip(rng, raw)
        if raw[:2] == b'PK' and (how < 0.3 or kind > 5)
        else damaged(rng, raw)
        if how < 0.5 or kind > 5
        else raw
    )


def fuzz_bin(folder):
    model = formula_model(FUZZED, 0)
    save_hf(folder, model)
    os.remove(os.path.join(folder, 'model.safetensors'))
    state, mark = (
        {n: t.clone() for n, t in model.state_dict().items()},
        os.path.join(os.path.dirname(folder), 'mark'),
    )

    def case(rng):
        path = write('pytorch_model.bin', odd_pickle(rng, state, mark), folder)
        return rng.choice(
            (
                lambda: try_model(GPT.from_pretrained(folder)),
                lambda: [t.float().sum() for t in load_bin(path).values()],
            )
        )

    return case


def fuzz_resume(folder):
    """resume.pt, from which a run continues."""
    args = SimpleNamespace(
        out=folder,
        lr=1e-3,
        batch_size=16,
        targets=['c_attn'],
        data='demo',
        resume=False,
        epochs=None,
        method='lora',
    )

    def fresh():
        model = torch.nn.Linear(3, 2)
        opt = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, opt, torch.amp.GradScaler('cpu', enabled=False)

    model, opt, scaler = fresh()
    model.weight.sum().backward()
    opt.step()
    save_resume(folder, args, 4, (0.5, -0.7), model, opt, scaler)
    state, mark = (
        torch.load(os.path.join(folder, 'resume.pt'), weights_only=True),
        os.path.join(os.path.dirname(folder), 'mark'),
    )

    def case(rng):
        changed = copy.deepcopy(state)
        if rng.random() < 0.6:  # a value somewhere in it
            places, todo = [], [changed]
            while todo:
                x = todo.pop()
                places += [(x, k) for k in x]
                todo += [y for y in x.values() if isinstance(y, dict)]
            x, k = rng.choice(places)
            x[k] = rng.choice(
                (
                    -1,
                    0,
                    2**63,
                    1e308,
                    float('nan'),
                    None,
                    [],
                    {},
                    '',
                    'x',
                    True,
                    torch.ones(3),
                    torch.ones(2, 3).double(),
                    [1, 'a'],
                    (1,),
                )
            )
            if rng.random() < 0.2:
                del x[k]
            buffer = io.BytesIO()
            torch.save(changed, buffer)
            write('resume.pt', buffer.getvalue(), folder)
        else:
            write('resume.pt', odd_pickle(rng, changed, mark), folder)

        def use():
            saved = load_resume(folder)
            resumed(SimpleNamespace(**vars(args)), set(), saved['args'])
            new, opt, scaler = fresh()
            restore(saved, new, opt, scaler)
            new.weight.sum().backward()
            opt.step()

        return use

    return case


def fuzz_adapter(folder):
    """A PEFT folder: LoRA or prompt vectors."""
    files = {}
    for method in ('lora', 'prompt'):
        model = formula_model(FUZZED, 2)
        lora.adapt(model, method, r=2, prompt=3, targets=ALL)
        save_peft(folder, model, 'somewhere')
        files[method] = {
            name: read_bytes(os.path.join(folder, name))
            for name in ('adapter_config.json', 'adapter_model.safetensors')
        }

    def case(rng):
        mine, which = files[rng.choice(('lora', 'lora', 'prompt'))], rng.random()
        write(
            'adapter_config.json',
            odd_json(rng, mine['adapter_config.json'])
            if which < 0.8
            else mine['adapter_config.json'],
            folder,
        )
        write(
            'adapter_model.safetensors',
            odd_safetensors(rng, mine['adapter_model.safetensors'])
            if which > 0.75
            else mine['adapter_model.safetensors'],
            folder,
        )

        def use():
            model = formula_model(FUZZED, 2)
            load_peft(folder, model)
            assert torch.isfinite(try_model(model)).all()

        return use if which < 0.75 else lambda: load_peft(folder, formula_model(FUZZED, 2))

    return case


def fuzz_run(folder):
    """A run folder of every method, with an odd run.json, or class.json, or any other of its
    files."""
    runs = {}
    for run in [tiny_run(m) for m in ('lora', 'adapter', 'prompt', 'full')] + [
        gen_run(m) for m in ('lora', 'prefix', 'zero_shot', 'direct')
    ]:
        there = shutil.copytree(
            run,
            os.path.join(folder, str(len(runs))),
            ignore=shutil.ignore_patterns('eval_results.json', 'val_*'),
        )
        runs[there] = {
            path: read_bytes(path)
            for path in sorted(os.path.join(there, name) for name in tree(there))
        }

    def case(rng):
        there = rng.choice(list(runs))
        files, record = runs[there], os.path.join(there, 'run.json')
        path = record if rng.random() < 0.7 else rng.choice(list(files))
        odd = (
            odd_json
            if path.endswith('.json')
            else odd_safetensors
            if path.endswith('.safetensors')
            else damaged
        )
        if rng.random() < 0.02:
            os.remove(path)
        else:
            write(path, odd(rng, files[path]))
        flags = rng.choice(
            (
                [],
                ['--json'],
                ['--explain'],
                ['--rule', 'bayes', '--json'],
                ['--ood_quantile', '0.2'],
            )
        )
        what = rng.randrange(4)

        def use():
            try:
                if what:
                    script(
                        predict.main,
                        [
                            there,
                            *'--device cpu --dtype fp32'.split(),
                            *flags,
                            'a text that is classified',
                            '',
                        ],
                    )
                else:
                    info = read_run(there)
                    rows = topics() if info['args']['data'] == 'demo' else info['args']['data']
                    own_data({**info, 'args': {**info['args'], 'data': rows}}, None)
                    if os.path.isfile(os.path.join(there, 'log.jsonl')):
                        read_log(os.path.join(there, 'log.jsonl'))
            finally:
                if (
                    os.path.isfile(path)
                    and read_bytes(path) != files[path]
                    or not os.path.exists(path)
                ):
                    write(path, files[path])

        return use

    return case


def fuzz_foreign(folder):
    """Folders without run.json, as transformers and PEFT write them."""
    folders = {}
    for method in ('full', 'lora', 'prompt'):
        there, model = os.path.join(folder, method), formula_model(FUZZED, 2)
        lora.adapt(model, method, r=2, prompt=3, targets=ALL)
        base = dict(name=os.path.join(folder, 'full'))
        save(there, model, dict(method=method, labels=['no', 'yes'], base=base), {}, {})
        os.remove(os.path.join(there, 'run.json'))
        write_json(
            os.path.join(there, 'tokenizer_config.json'),
            dict(model_max_length=16, truncation_side='left'),
        )
        folders[there] = {
            path: read_bytes(path)
            for path in (os.path.join(there, name) for name in sorted(tree(there)))
        }

    def case(rng):
        there = rng.choice(list(folders))
        files = folders[there]
        path = rng.choice(list(files))
        write(
            path,
            odd_json(rng, files[path])
            if path.endswith('.json')
            else odd_safetensors(rng, files[path]),
        )

        def use():
            try:
                script(
                    predict.main,
                    [there, '--device', 'cpu', '--dtype', 'fp32', 'a text that is classified', ''],
                )
            finally:
                write(path, files[path])

        return use

    return case


def fuzz_log(folder):
    """log.jsonl, which --resume appends to and --plot draws."""
    lines = [
        json.dumps(dict(step=i, loss=0.5, lr=1e-3, val_loss=0.4, val_accuracy=0.5)).encode()
        for i in range(12)
    ]

    def case(rng):
        new = list(lines)
        for i in rng.sample(range(len(new)), rng.choice((1, 1, 3))):
            new[i] = odd_json(rng, new[i])
        path = write('log.jsonl', b'\n'.join(new) + b'\n', folder)

        def plot():
            for steps, values in read_log(path).values():
                assert all(type(v) in (int, float) for v in (*steps, *values))

        return rng.choice((plot, lambda: Log(folder, SimpleNamespace(max_steps=20), [], 6)))

    return case


def fuzz_preds(folder):
    """Predictions and labels for eval.py."""
    preds = [dict(label='ab'[i % 2], probs=dict(a=0.25, b=0.75)) for i in range(20)]
    files = dict(
        preds=json.dumps(preds).encode(),
        labels=json.dumps(['ab'[i % 3 == 0] for i in range(20)]).encode(),
        lines=b'\n'.join(json.dumps(p).encode() for p in preds),
    )

    def case(rng):
        name, which = rng.choice(('preds', 'lines')), rng.random()
        if name == 'preds':
            new = odd_json(rng, files[name])
        else:
            new = b'\n'.join(
                odd_json(rng, x) if rng.random() < 0.1 else x for x in files[name].split(b'\n')
            )
        argv = [
            '--preds',
            write('preds.json', new if which < 0.7 else files[name], folder),
            '--labels',
            write(
                'labels.json',
                odd_json(rng, files['labels']) if which > 0.6 else files['labels'],
                folder,
            ),
            '--json',
            os.path.join(folder, 'numbers.json'),
        ]
        return lambda: script(evaluation.main, argv)

    return case


def fuzz_prompts(folder):
    raw, labels = (
        json.dumps(dict(animals='cat dog\n', numbers='one\ntwo')).encode(),
        ['animals', 'numbers'],
    )

    def case(rng):
        args = SimpleNamespace(
            prompts=write('p.json', odd_json(rng, raw), folder), direct=False, data='x'
        )
        return lambda: [
            tokenizer('bytes').encode_ordinary(p) for p in prompts_of(args, labels).values()
        ]

    return case


def trial(use):
    """-> ('accepted' or 'refused', None), or ('broken', what went wrong)"""
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet[0], quiet[1], bounded():
            use()
        return 'accepted', None
    except UserError as e:
        if isinstance(e.__context__, MemoryError):
            return 'broken', f'MemoryError behind {str(e)[:150]!r}'
        return 'refused', None
    except (Exception, Hang) as e:
        frames = traceback.extract_tb(e.__traceback__)[2:]
        where = ' '.join(f'{os.path.basename(f.filename)}:{f.lineno}' for f in frames)
        return 'broken', f'{type(e).__name__} {str(e)[:150]!r} at {where}'


def fuzz(kind, n):
    """The mutations 0 to n - 1 of one kind, the same every time -> (number refused, number
    accepted, [what is wrong with which]). Each must be accepted or refused with a UserError, in
    time, in little memory, and leave nothing outside of its folder."""
    box, here, count = tmp(), os.getcwd(), dict(refused=0, accepted=0, broken=0)
    folder, cache, cwd = (os.path.join(box, name) for name in ('case', 'cache', 'cwd'))
    os.makedirs(folder), os.makedirs(cache), os.makedirs(cwd)
    wrong = []
    with environment(NANOCLS_CACHE=cache), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.manual_seed(0)
        case = globals()[f'fuzz_{kind}'](folder)
        os.chdir(cwd)
        try:
            for number in range(n):
                outcome, why = trial(case(random.Random(f'{kind} {number}')))
                count[outcome] += 1
                left = sorted(os.listdir(box)), os.listdir('.')
                if left != (['cache', 'case', 'cwd'], []):
                    why = f'files were written outside of the folder: {left}'
                wrong += [f'fuzz {kind} {number}: {why}'] if why else []
                if why and 'outside' in why:
                    break
        finally:
            os.chdir(here)
    return count['refused'], count['accepted'], wrong


def kinds():
    """Names of the functions above, each of which is a kind of file."""
    return [name[5:] for name in globals() if name.startswith('fuzz_')]


def main(words):
    """`python test_all.py --fuzz N [KIND ...]` -> exit code."""
    if not (words and words[0].isdecimal() and set(words[1:]) <= set(kinds())):
        print(f'usage: python test_all.py --fuzz N [KIND ...]; the kinds are {", ".join(kinds())}')
        return 2
    n, wrong = int(words[0]), 0
    for kind in words[1:] or kinds():
        start = time.time()
        refused, accepted, broken = fuzz(kind, n)
        wrong += len(broken)
        counts = f'{refused} refused, {accepted} accepted, {len(broken)} broken'
        line = f'fuzz {kind}: {n} mutations, {counts}, {time.time() - start:.1f} s'
        print('\n'.join([*broken, line]), flush=True)
    return 1 if wrong else 0
