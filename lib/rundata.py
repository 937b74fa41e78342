"""Data to score runs on: what a run was trained on, read again, and labels matched by name.
Called by eval.py and lib/classes.py."""

import os

import numpy as np

import data
from lib.base import data_dir_of
from lib.files import UserError
from lib.report import listing


def own_data(info, data_dir=None):
    """The data set of a run (info: its run.json), split by the same seed; of a --quick run the
    same few rows. Raises UserError if it cannot be read any more."""
    args = info['args']
    names = ('seed', 'val', 'test', 'text_col', 'label_col', 'max_samples', 'balance')
    flags = {name: args[name] for name in names}
    try:
        ds = data.load(args['data'], data_dir=data_dir_of(info, '', data_dir), **flags)
    except UserError:
        if args['data'] in data.READERS or os.path.exists(args['data']):
            raise
        raise UserError(
            f'{args["data"]}, the training data of this run, is not there: start from the folder '
            'it was trained in, or give its new path with --data'
        ) from None
    if args['quick']:
        ds.val, ds.test = (data.cap(split, 100, args['seed']) for split in (ds.val, ds.test))
    return ds


def match_labels(paths, infos, ds, y, out):
    """y (N,), class ids of the data set ds -> ids in the order of the first run's labels. Gives
    runs without class names those of ds. Raises UserError if the labels are not the same."""
    for path, info in zip(paths, infos):
        k = len(info['labels'])
        unnamed = info['labels'] == [f'LABEL_{i}' for i in range(k)]
        if unnamed and not set(ds.labels) <= set(info['labels']):
            if k != len(ds.labels):
                raise UserError(
                    f'{path} does not name its {k} classes, and {ds.name} has {len(ds.labels)} '
                    f'({listing(ds.labels)}): write their names into id2label in its config.json'
                )
            print(f'{path} does not name its classes; taken in the order of ', end='', file=out)
            print(f'{ds.name}: {listing(ds.labels)}', file=out)
            info['labels'] = ds.labels
    labels = infos[0]['labels']
    for path, info in zip(paths, infos):
        if sorted(info['labels']) != sorted(labels):
            raise UserError(
                f'{path} has the labels {listing(info["labels"])}, {paths[0]} has '
                f'{listing(labels)}: compare runs with the same labels'
            )
    unknown = sorted({ds.labels[i] for i in np.unique(y)} - set(labels))
    if unknown:
        raise UserError(
            f'{ds.name} has labels that {paths[0]} does not know ({listing(unknown)}; it knows '
            f'{listing(labels)}): rename them in the data, or train a run on it'
        )
    return np.array([labels.index(name) if name in labels else -1 for name in ds.labels])[y]
