"""Cross-validation: which training rows a fold holds out. Called by lib/rundata.py and
lib/repeat.py."""

from dataclasses import replace

import numpy as np

from lib.files import UserError


def folds(split, k, seed):
    """The fold, 0 .. k - 1, of each row of a data.Split -> (n,) int64. Stratified: a class has as
    many rows in every fold as in any other, or one more, as far as that goes: rows with the same
    text are in one fold. Picked by seed. Raises UserError if a class has fewer than k texts."""
    texts = {}
    for i, text in enumerate(split.texts):
        texts.setdefault(text, []).append(i)
    groups, y = list(texts.values()), split.y.tolist()
    few = min(np.bincount([y[rows[0]] for rows in groups], minlength=max(y) + 1))
    if few < k:
        why = f'the smallest class has {few} different training texts'
        raise UserError(f'--folds {k}: {why}, and each fold needs one; ask for fewer folds')
    order = np.random.RandomState(seed % 2**32).permutation(len(groups))
    of, have, total = np.empty(len(y), np.int64), {}, [0] * k
    for rows in sorted((groups[i] for i in order), key=len, reverse=True):
        mine = have.setdefault(y[rows[0]], [0] * k)  # rows of this class in each fold
        i = min(range(k), key=lambda i: (mine[i], total[i]))
        mine[i], total[i], of[rows] = mine[i] + len(rows), total[i] + len(rows), i
    return of


def fold(ds, i, k, seed):
    """The data.Dataset of fold i of k: its rows are the test rows, the rest of the training rows
    train, the validation rows stay."""
    out = folds(ds.train, k, seed) == i

    def part(mask):
        texts = [text for text, chosen in zip(ds.train.texts, mask) if chosen]
        return replace(ds.train, texts=texts, y=ds.train.y[mask])

    note = f'fold {i + 1} of {k}: {out.sum():,} training rows are held out, as the test rows'
    return replace(ds, train=part(~out), test=part(out), notes=[*ds.notes, note])
