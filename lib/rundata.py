"""What a run was trained on: its data set read again and verified, hashes of its texts, and labels
matched by name. Called by eval.py, predict.py, both train scripts and other rooms.

train_texts.bin in a run folder holds little-endian 64-bit hashes: of the training, validation and
test rows, then of each training text, sorted."""

import hashlib
import os

import numpy as np

import data
from lib import files, folds
from lib.base import data_dir_of
from lib.files import UserError
from lib.report import listing
from lib.tables import Format

SPLITS = ('train', 'val', 'test')


def own_data(info, data_dir=None):
    """The data set of a run (info: its run.json), split by the same seed; of a --quick run the
    same few rows. Raises UserError if it cannot be read any more."""
    args = dict(info['args'], data_dir=data_dir_of(info, '', data_dir))
    try:
        ds = data.load(args['data'], **data.options(args))
    except UserError:
        if args['data'] in data.READERS or os.path.exists(args['data']):
            raise
        what = f'{args["data"]}, the training data of this run, is not there'
        advice = 'start from the folder it was trained in, or give its new path with --data'
        raise UserError(f'{what}: {advice}') from None
    return shorten(ds, args)


def shorten(ds, args):
    """Cut the splits that a run is scored on by its flags: --quick to 100 rows per class of val and
    test, --eval_samples N to N rows of val; --folds K tests on one of K folds. -> ds"""
    if args['quick']:
        ds.val, ds.test = (data.cap(split, 100, args['split_seed']) for split in (ds.val, ds.test))
    if args['eval_samples']:
        ds.val = some_rows(ds.val, args['eval_samples'], args['split_seed'])
    if args.get('folds'):
        ds = folds.fold(ds, args['fold'], args['folds'], args['split_seed'])
    return ds


def some_rows(split, n, seed):
    """A Split of at most n rows, drawn by seed: in the proportions of the classes, at least one row
    of each. Raises UserError if n is less than the number of classes."""
    classes, have = np.unique(split.y, return_counts=True)
    if n >= len(split.y):
        return split
    if n < len(classes):
        why = f'is less than the {len(classes)} classes of these rows'
        raise UserError(f'--eval_samples {n} {why}: give {len(classes)} or more')
    rest = np.cumsum(have - 1) * ((n - len(classes)) / (len(split.y) - len(classes)))
    counts = 1 + np.diff(np.round(rest), prepend=0).astype(int)  # sum is n
    return data.cap(split, counts, seed)


def form_of(info):
    """How a run's own files were read, with the columns that were used, guessed or not."""
    return Format.of({**info['args'], **(info.get('columns') or {})})


# --- is it the same split? which texts were trained on? ---


def hashed(parts):
    """-> a 64-bit number for a list of strings"""
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = part.encode('utf-8', 'surrogatepass')
        h.update(len(raw).to_bytes(8, 'little') + raw)
    return int.from_bytes(h.digest(), 'little')


def hashes(ds):
    """{split: hash of its texts and labels in order, 16 hexadecimal digits}"""
    splits = {name: getattr(ds, name) for name in SPLITS}
    rows = {name: [*s.texts, *(ds.labels[i] for i in s.y)] for name, s in splits.items()}
    return {name: f'{hashed(parts):016x}' for name, parts in rows.items()}


def text_hashes(texts):
    return np.array([hashed([text]) for text in texts], '<u8')


def stored(path):
    """-> {split: hash}, hashes of the training texts (n,), as record() wrote them; None, None if it
    did not."""
    file = os.path.join(path, 'train_texts.bin')
    if not os.path.isfile(file):
        return None, None
    raw = files.read_bytes(file)
    if len(raw) % 8 or len(raw) < 8 * len(SPLITS):
        advice = 'then nobody knows which texts the run was trained on'
        raise UserError(f'{file} is damaged; restore it, or remove it: {advice}')
    numbers = np.frombuffer(raw, '<u8')
    return {name: f'{int(x):016x}' for name, x in zip(SPLITS, numbers)}, numbers[len(SPLITS) :]


def record(path, ds, saved=None, earlier=()):
    """Write the hashes of a run that begins -> what run.json says of its data. saved: state of a
    run to resume, which is verified instead. earlier: runs that this one goes on from; their
    training texts count as its own."""
    split = hashes(ds)
    if saved:
        check(path, stored(path)[0], ds, 'start a new run with another --out')
    else:
        texts = text_hashes(ds.train.texts)
        for theirs in (stored(run)[1] for run in earlier):
            texts = texts if theirs is None else np.append(texts, theirs)
        head = np.array([int(x, 16) for x in split.values()], '<u8')
        content = np.concatenate([head, np.unique(texts)]).astype('<u8').tobytes()
        files.write_atomic(os.path.join(path, 'train_texts.bin'), content)
    columns = dict(text_col=ds.form.text_col, label_col=ds.form.label_col)
    rows = {name: len(getattr(ds, name).y) for name in SPLITS}
    return dict(split=split, columns=columns, rows=rows)


def check(path, split, ds, hint):
    """Raise UserError if a split of the run in `path` is not what `split` says (None: unknown).
    hint: the way out."""
    if changed := [name for name, value in hashes(ds).items() if split and split[name] != value]:
        rows = f'its {" and ".join(changed)} rows are not those that {path} was trained with'
        raise UserError(f'{ds.name}, or data.py, has changed: {rows}; restore it, or {hint}')


def seen(path, texts):
    """Which of these texts the run in `path` was trained on -> (n,) bool; None if the run keeps no
    record."""
    known = stored(path)[1]
    return None if known is None else np.isin(text_hashes(texts), known)


def overlap(path, info, args, ds):
    """[a note] on how many of the texts that eval.py (args: its flags) scores a run was trained on;
    [] where they are the run's own. Raises UserError if runs are compared, this one was trained
    on such texts, and ds does not have these in both train and test itself."""
    if not info['args']['data']:
        return ['not trained here: it may have seen these texts in training']
    compared = len(args.run) > 1
    if not (compared or args.data or args.test):
        return []
    texts = getattr(ds, args.split).texts
    were = seen(path, texts)
    if were is None:
        return ['trained on an unknown number of these texts']
    if compared and args.split != 'train' and not args.allow_seen:
        own = set(ds.train.texts) if args.data or not args.test else ()
        if unfair := sum(hit and text not in own for hit, text in zip(were, texts)):
            what = f'{path} was trained on {unfair:,} of these {len(texts):,} texts of {ds.name}'
            advice = 'score texts that are new to all (--test FILE), or add --allow_seen'
            raise UserError(f'{what}: train the runs with the same --split_seed, {advice}')
    return [f'trained on {were.sum():,} of these {len(texts):,} texts']


def match_labels(paths, infos, ds, y, out):
    """y (N,), class ids of the data set ds -> ids in the order of the first run's labels. Gives
    runs without class names those of ds. Raises UserError if the labels are not the same."""
    for path, info in zip(paths, infos):
        k = len(info['labels'])
        unnamed = info['labels'] == [f'LABEL_{i}' for i in range(k)]
        if unnamed and not set(ds.labels) <= set(info['labels']):
            if k != len(ds.labels):
                theirs = f'{ds.name} has {len(ds.labels)} ({listing(ds.labels)})'
                advice = 'write their names into id2label in its config.json'
                raise UserError(f'{path} does not name its {k} classes, and {theirs}: {advice}')
            print(f'{path} does not name its classes; taken in the order of ', end='', file=out)
            print(f'{ds.name}: {listing(ds.labels)}', file=out)
            info['labels'] = ds.labels
    labels = infos[0]['labels']
    for path, info in zip(paths, infos):
        if sorted(info['labels']) != sorted(labels):
            other = f'{path} has the labels {listing(info["labels"])}, {paths[0]} has'
            raise UserError(f'{other} {listing(labels)}: compare runs with the same labels')
    if unknown := sorted({ds.labels[i] for i in np.unique(y)} - set(labels)):
        what = f'{ds.name} has labels that {paths[0]} does not know ({listing(unknown)}; it knows'
        raise UserError(f'{what} {listing(labels)}): rename them in the data, or train a run on it')
    return np.array([labels.index(name) if name in labels else -1 for name in ds.labels])[y]
