"""Data sets, splits and batches.  `python data.py NAME` prints what a data set holds.

NAME is sst2, agnews, imdb, sms, demo (synthetic, needs no network), your own FILE.csv, FILE.tsv or
FILE.jsonl, or a folder with train.* and perhaps val.* and test.* of these kinds.  Files are looked
for in --data_dir or $NANOCLS_DATA, then in the cache ($NANOCLS_CACHE, or ~/.cache/nanocls), then
downloaded into the cache.  Only the cache is written to.
"""

from lib import start

start.script(__name__)

import collections
import os
import re
from dataclasses import dataclass

import numpy as np

from lib import cli, demo, flags, oddities, published, tables
from lib.files import UserError
from lib.report import counted
from lib.tables import GUESSED, Format
from lib.tokens import even_pieces, listed, tokenize, tokenizer

WINDOW = 100  # batches sorted by length together: 2.4 % padding on SST-2 at 16 (50: 4.4, 25: 8.1)


@dataclass
class Split:
    texts: list  # of str
    y: np.ndarray  # (n,) int64, index into Dataset.labels


@dataclass
class Dataset:
    name: str
    labels: list  # of str; the index is the class id
    train: Split
    val: Split
    test: Split
    notes: list  # of str: what was dropped or held out, and what is odd
    form: Format = GUESSED  # how the user's files were read


# a reader: data_dir -> {split: rows}, labels in order; a row is (text, label)
READERS = dict(sst2=published.sst2, agnews=published.agnews, imdb=published.imdb)
READERS.update(sms=published.sms, demo=demo.labelled)


def named(name):
    """A type for the parser: a name of READERS, which no file hides, or an absolute path."""
    return name if name in READERS else cli.absolute(name)


def options(args):
    """args, a dict of flags by name -> the arguments of load and load_texts."""
    same = {name: args[name] for name in ('data_dir', 'val', 'test', 'max_samples', 'balance')}
    return dict(same, seed=args['split_seed'], form=Format.of(args))


def read(name, data_dir, val, test, form, notes):
    """-> {split: rows}, labels in order or None, form with the columns that were read.  val, test:
    files that replace these splits"""
    if name in READERS:
        given = [flag for flag, value in form._replace(like=None)._asdict().items() if value]
        if given and not (val or test):
            raise UserError(f'--{given[0]} is for your own files; leave it out with {name}')
        rows, labels = READERS[name](data_dir)
        for part in rows.values():
            listed(text for text, _ in part)  # raises TypeError for what is no string
        rows = {split: [(t, str(label)) for t, label in part] for split, part in rows.items()}
        labels = labels and [str(label) for label in labels]
        if name == 'demo':
            notes.append('demo is synthetic text that this program makes')
    elif os.path.exists(name):
        (rows, form), labels = tables.read_own(name, form, notes), None
        notes.append(f'columns: {form.text_col!r} is the text, {form.label_col!r} the label')
    else:
        own = f'the path of a {", ".join(tables.KINDS)} file or of a folder of them'
        raise UserError(f'there is no data set {name!r}; choose {", ".join(READERS)}, or {own}')
    for split, path in (('val', val), ('test', test)):
        if path:
            rows[split] = tables.read_table(path, form, notes)[0]
    return rows, labels, form


def label_order(name, rows, labels, fewest):
    """-> the class names in order: `labels`, or those of train, sorted (numbers as numbers).
    Raises UserError if train lacks a class, or another split has a label that train lacks."""
    train = {label for _, label in rows['train']}
    numbers = all(re.fullmatch(r'[+-]?[0-9]{1,18}', label) for label in train)
    labels = list(labels or sorted(train, key=lambda x: (int(x), x) if numbers else x))
    if len(labels) > tables.MAX_CLASSES:
        why = f'there are {len(labels):,} different labels, {tables.MAX_CLASSES:,} is the most'
        raise UserError(f'{name}: {why}; name the column of the labels with --label_col')
    if unknown := train.difference(labels):  # of a reader
        why = f'a training row has the label {min(unknown)!r}, which its list of labels lacks'
        raise UserError(f'{name}: {why}')
    if len(train) < max(fewest, len(labels)):
        needed = 'at least two classes' if len(labels) < fewest else ', '.join(labels)
        why = f'the training rows have no label but {", ".join(sorted(train))}'
        raise UserError(f'{name}: {why}; {needed} are needed')
    for split in ('val', 'test'):
        for _, label in rows.get(split, ()):
            if label not in train:
                why = f'a {split} row has the label {label!r}, which no training row has'
                raise UserError(f'{name}: {why}; correct it, or add training rows of that label')
    return labels


def load(
    name, seed=1337, data_dir=None, val=None, test=None,
    form=GUESSED, max_samples=None, balance=False, fewest=2,
):  # fmt: skip
    """Read a data set and split it -> Dataset.  val, test: files that replace these splits.
    form: how the user's files are read.  balance: drop training rows until all classes are as small
    as the smallest, before anything is held out.  A split that does not exist is held out from
    train, stratified, by seed (--split_seed).  max_samples: training rows kept per class.
    fewest: classes that train must have."""
    notes = []
    rows, labels, form = read(name, data_dir, val, test, form, notes)
    labels = label_order(name, rows, labels, fewest)
    notes += [] if name in READERS else oddities.notes(rows, labels)
    # RandomState: its streams are the same in all versions of numpy
    train, rng = rows['train'], np.random.RandomState(seed % 2**32)
    one_pool = 'test' not in rows
    if one_pool:
        train = list(dict.fromkeys(train))  # equal rows must not be on both sides of the split
        if dropped := len(rows['train']) - len(train):
            notes.append(f'{counted(dropped, "exact duplicate")} dropped')
    if balance:
        n, before = min(count(train, labels)), len(train)
        train = [train[i] for i in sample(train, labels, [n] * len(labels), rng)]
        notes.append(f'balanced to {counted(n, "row")} per class: {before - len(train):,} dropped')
    n = len(train)
    if one_pool:
        n_test = n // 5 if name == 'sms' else n // 10
        rows['test'], train = carve('test', train, n_test, labels, rng, notes)
    if 'val' not in rows:
        # at most 1,000 of a published train: +-2 % at 90 % accuracy, and quick to score
        n_val = min(n // 10, 1000) if name in READERS else n // 10
        rows['val'], train = carve('val', train, n_val, labels, rng, notes)
    if max_samples:
        train = [train[i] for i in sample(train, labels, [max_samples] * len(labels), rng)]
        notes.append(f'train cut to at most {counted(max_samples, "row")} per class')
    texts = {text for text, _ in train}
    for held in ('test', 'val'):
        notes += oddities.of_held_out(held, rows[held], texts, labels)
    ids = {label: i for i, label in enumerate(labels)}

    def split(part):
        y = [ids[label] for _, label in part]
        return Split([text for text, _ in part], np.array(y, np.int64))

    splits = split(train), split(rows['val']), split(rows['test'])
    return Dataset(name, labels, *splits, list(dict.fromkeys(notes)), form)


def load_texts(name, seed=1337, form=GUESSED, max_samples=None, **others):
    """Texts for a language model, labels unused -> (train texts, val texts, notes).  Arguments: as
    in load (the same seed keeps the same texts out of train).  The demo gives its unlabelled
    sentences, a file that is no table every line."""
    if not os.path.isfile(name) or tables.kind_of(name) in tables.KINDS:
        d = load(name, seed, form=form, max_samples=max_samples, **others)
        train = demo.unlabelled(max_samples or 20000) if name == 'demo' else d.train.texts
        return train, d.val.texts, d.notes
    unused = {**form._replace(encoding=None)._asdict(), **others, 'data_dir': None}
    if flag := next((flag for flag, value in unused.items() if value), None):
        raise UserError(f'--{flag} does nothing with {name}, which is read line by line')
    texts = list(dict.fromkeys(t for _, t in tables.read_rows(name, form) if t.strip()))
    order = np.random.RandomState(seed % 2**32).permutation(len(texts))
    n = min(len(texts) // 10, 1000)
    if not n:
        why = f'{name} has {len(texts)} different lines'
        raise UserError(f'{why}; at least 10 are needed, to keep one for validation')
    end = n + (max_samples or len(texts))
    train, val = ([texts[i] for i in sorted(part)] for part in (order[n:end], order[:n]))
    return train, val, [f'val: {counted(n, "line")}']


def count(rows, labels):
    """Rows per class."""
    found = collections.Counter(label for _, label in rows)
    return [found[label] for label in labels]


def sample(rows, labels, counts, rng):
    """Ascending indices of at most counts[c] rows of each class c, drawn by rng."""
    members = {label: [] for label in labels}
    for i, (_, label) in enumerate(rows):
        members[label].append(i)
    chosen = [rng.permutation(members[label])[:n] for label, n in zip(labels, counts)]
    return sorted(i for rows in chosen for i in rows)


def cap(split, n, seed):
    """A Split with at most n rows of each class (of several n, one for each), picked by seed."""
    rows, labels = list(zip(split.texts, split.y.tolist())), sorted(set(split.y.tolist()))
    counts, rng = np.broadcast_to(n, len(labels)), np.random.RandomState(seed % 2**32)
    kept = sample(rows, labels, counts, rng)
    return Split([split.texts[i] for i in kept], split.y[kept])


def carve(split, rows, n, labels, rng, notes):
    """Hold n rows out, stratified -> (held out, rest).  Takes at least one row of a class that has
    two or more, and leaves one."""
    have = np.array(count(rows, labels))
    wanted = np.diff(np.round(np.cumsum(have) * n / len(rows)), prepend=0).astype(int)  # sum is n
    taken = set(sample(rows, labels, np.minimum(np.maximum(wanted, 1), have - 1), rng))
    rest = [r for i, r in enumerate(rows) if i not in taken]
    texts = {text for text, _ in rest}
    kept = [rows[i] for i in sorted(taken) if rows[i][0] not in texts]
    if not kept:
        why = f'{len(rows)} rows in {len(labels)} classes are too few to hold {split} rows out'
        why += f' ({"; ".join(notes)})' if notes else ''
        raise UserError(f'{why}; add rows, or give --{split} FILE')
    note = f'{split}: {counted(len(taken), "row")} held out'
    if dropped := len(taken) - len(kept):
        note += f'; {dropped:,} of them dropped, as their text is also in train'
    notes.append(note)
    return kept, rest


def batches(lengths, batch_size, seed, epoch, tokens=None):
    """Length-bucketed batches of one epoch: list of index arrays.  Shuffles all rows, sorts windows
    of WINDOW batches by length, cuts them into batches, shuffles these.  A pure function; each row
    comes exactly once; only one batch may be smaller.

    lengths: (n,) tokens per row as they will be fed (cut to --max_length before).  tokens: cut into
    pieces of at most so many tokens, padding included, and batch_size pieces are a batch; epochs
    can then differ in their number of batches."""
    rng, lengths = np.random.RandomState([seed % 2**32, epoch]), np.asarray(lengths)
    order, plan, size = rng.permutation(len(lengths)), [], batch_size * WINDOW
    if tokens and len(order):
        size = max(1, int(size * tokens / lengths.mean()))
    for i in range(0, len(order), size):
        window = order[i : i + size]
        window = window[np.argsort(lengths[window], kind='stable')]
        starts = range(len(window)) if not tokens else even_pieces(lengths[window], tokens)
        plan += np.split(window, starts[batch_size::batch_size])
    return [plan[i] for i in rng.permutation(len(plan))]


def collate(tokens, index, max_length, keep, pad_id, device='cpu', multiple=1):
    """Rows index (B,) of tokens -> ids (B, T), lengths (B,), both int64, padded on the right;
    T <= max_length, a multiple of `multiple` if that fits.  keep: 'first' or 'last' tokens of a
    longer text."""
    import torch  # only now, so that `python data.py` does not wait for it

    assert keep in ('first', 'last'), keep
    cut = slice(max_length) if keep == 'first' else slice(-max_length, None)
    rows = [tokens[i][cut] for i in index]
    lengths = np.array([len(r) for r in rows], np.int64)
    width = min(-(-lengths.max() // multiple) * multiple, max_length)
    ids = np.full((len(rows), width), pad_id, np.int64)
    for i, r in enumerate(rows):
        ids[i, : len(r)] = r
    return tuple(to_device(torch.from_numpy(t), device) for t in (ids, lengths))


def to_device(t, device):
    """A CPU tensor on the device.  To CUDA from pinned memory: the copy does not wait for what the
    GPU still computes."""
    if str(device).startswith('cuda'):
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


def main(argv=None):
    does = 'Print what a data set holds: rows, classes, token lengths, three examples.'
    p = cli.Parser(description=does)
    own = f'{", ".join(READERS)}, or a {", ".join(tables.KINDS)} file, or a folder of them'
    p.add_argument('data', metavar='NAME', help=own)
    add = cli.group(p, 'data')
    add('--val', 'validation rows (default: those of the data set, or held out)', metavar='FILE')
    add('--test', 'test rows (default: those of the data set, or held out)', metavar='FILE')
    flags.table_flags(add)
    add('--max_length', 'count texts longer than N tokens', cli.positive, 128)
    add('--max_samples', 'keep N training rows per class (default: all)', cli.positive)
    add('--balance', 'drop rows until all classes are as small as the smallest', bool)
    add('--data_dir', 'search here before the cache (default: $NANOCLS_DATA)', metavar='DIR')
    add('--split_seed', 'random seed of the split', int, 1337)
    a, _ = p.parse(argv)
    d = load(a.data, **options(vars(a)))
    enc = tokenizer('bytes' if a.data == 'demo' else 'gpt2', a.data_dir)
    print(f'{d.name}: {len(d.labels)} classes, tokens of {enc.name}')
    for note in d.notes:
        print(f'  {note}')
    width = max(map(len, d.labels))
    print(f'\n{"rows":{width}} {"train":>8} {"val":>8} {"test":>8}')
    counts = [np.bincount(s.y, minlength=len(d.labels)) for s in (d.train, d.val, d.test)]
    for label, row in zip(d.labels + ['all'], zip(*[[*c, c.sum()] for c in counts])):
        print(f'{label:{width}} ' + ' '.join(f'{n:8,}' for n in row))
    quantiles = (0, 5, 25, 50, 75, 95, 99, 100)
    head = ''.join(f'{q:6} %' for q in quantiles)
    print(f'\n{"tokens":8}{head}{"mean":>8}   longer than {a.max_length}')
    for name, s in (('train', d.train), ('val', d.val), ('test', d.test)):
        n = tokenize(enc, s.texts).lengths
        row = ''.join(f'{x:8.0f}' for x in (*np.percentile(n, quantiles), n.mean()))
        print(f'{name:8}{row}   {100 * (n > a.max_length).mean():.1f} %')
    print()
    for i in np.linspace(0, len(d.train.y) - 1, 3).astype(int):
        text = d.train.texts[i]
        print(f'{d.labels[d.train.y[i]]}: {text[:200]!r}{"..." * (len(text) > 200)}')


if __name__ == '__main__':
    cli.run(main)
