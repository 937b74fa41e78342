"""Predictions in files: what both train scripts leave in a run folder, and what `eval.py --preds
FILE --labels FILE` scores, whatever program wrote it. Called by eval.py and both train scripts."""

import json
import os

import numpy as np

from lib import files
from lib.files import UserError
from lib.report import counted, listing
from lib.tables import MAX_CLASSES


def write_predictions(out, probs, y, labels):
    """Write val_preds.json and val_labels.json to the run folder `out`, in the format of --preds
    and --labels. probs (N, K); y (N,) class ids. The most probable class is the prediction."""
    rows = [dict(label=labels[p.argmax()], probs=dict(zip(labels, p.tolist()))) for p in probs]
    files.write_json(os.path.join(out, 'val_preds.json'), rows)
    files.write_json(os.path.join(out, 'val_labels.json'), [labels[c] for c in y])


def unlike_saved(run, texts):
    """[a sentence] if an opened run gives its first validation texts other probabilities than
    training wrote to val_preds.json: a script changed the model in a way that is not saved."""
    rows = files.read_json(os.path.join(run.path, 'val_preds.json'))[:8]
    want = np.array([list(row['probs'].values()) for row in rows])
    apart = np.abs(run.probs(run.logits(texts[: len(rows)])) - want).max()
    if apart < (0.005 if str(run.dtype) == 'torch.float32' else 0.1):
        return []
    text = f'opened, {run.path} gives validation texts other probabilities than in training'
    why = 'edit model.py or lora.py, not the model in the script, and draw random numbers into a'
    return [f'note: {text} (by {apart:.2f}): {why} parameter, unless logits depend on the batch']


def read_items(path):
    """The items of a JSON list, or of a file with one JSON value per line (predict.py --json)."""
    try:
        with open(path, encoding='utf-8-sig') as f:
            text = f.read()
        if text.lstrip().startswith('['):
            items = json.loads(text)
        else:
            items = [json.loads(line) for line in text.split('\n') if line.strip()]
    except (OSError, ValueError, RecursionError) as e:  # a wrong encoding is a ValueError
        way_out = 'give a UTF-8 file with one list, or one value per line'
        raise UserError(f'{path} cannot be read as JSON ({e}): {way_out}') from None
    if not items:
        raise UserError(f'{path} is empty: it needs one item per text')
    return items


def read_preds(preds_path, labels_path):
    """-> label names, y (N,), probs (N, K) or None, pred (N,) with -1 where the label is null.

    The classes are those of the first item's probs, in that order; without probs, the sorted
    labels of labels_path."""
    truth, items = read_items(labels_path), read_items(preds_path)
    items = [item if isinstance(item, dict) else {'label': item} for item in items]
    if len(items) != len(truth):
        counts = f'has {counted(len(items), "prediction")} but {labels_path} has '
        counts += counted(len(truth), 'label')
        raise UserError(f'{preds_path} {counts}: both need one item per text, in the same order')
    first = items[0].get('probs')
    labels = list(first) if isinstance(first, dict) and first else sorted(set(map(str, truth)))
    if len(labels) > MAX_CLASSES:
        count = f'{len(labels):,} different labels, more than the {MAX_CLASSES:,} supported'
        path = labels_path if first is None else preds_path
        raise UserError(f'{path} has {count}: are these the labels?')
    ids, names = {label: i for i, label in enumerate(labels)}, listing(labels)
    for i, label in enumerate(truth, 1):
        if not isinstance(label, str):
            problem = f'{json.dumps(label)[:60]} is not a label: write a string in quotes'
            raise UserError(f'{labels_path}, item {i}: {problem}')
        if label not in ids:
            problem = f'{label!r} is not among the classes of {preds_path} ({names})'
            raise UserError(f'{labels_path}, item {i}: {problem}: make the names agree')
    pred, rows = [], []
    for i, item in enumerate(items, 1):
        where, label, p = f'{preds_path}, item {i}', item.get('label', 0), item.get('probs')
        if label is not None and not isinstance(label, str):
            raise UserError(f'{where} has no "label": add a string, or null for no answer')
        if label is not None and label not in ids:
            raise UserError(f'{where}: {label!r} is not among the labels ({names}): rename it')
        pred.append(-1 if label is None else ids[label])
        if p is not None or first is not None:
            rows.append(probabilities(where, p if first is not None else None, labels))
    y = np.array([ids[label] for label in truth])
    return labels, y, np.array(rows, float) if rows else None, np.array(pred)


def probabilities(where, p, labels):
    """The probs of an item ({label: number}; None: it must have none) as a row in the order of
    labels."""
    if not isinstance(p, dict) or set(p) != set(labels):
        rule = f'must give one probability to each of {listing(labels)}, in every item or in none'
        raise UserError(f'{where}: "probs" {rule}')
    row = [p[name] for name in labels]
    if not all(isinstance(v, (int, float)) and 0 <= v <= 1.01 for v in row):  # refuses NaN
        values = json.dumps(p)[:80]
        raise UserError(f'{where}: "probs" holds {values}: each value must be from 0 to 1')
    if abs(sum(row) - 1) > 0.01:  # room for values rounded to a few digits
        raise UserError(f'{where}: "probs" sum to {sum(row):.4g}: probabilities must sum to 1')
    return row
