"""--init RUN: train_cls.py goes on from a finished run, its head included, on new data. Called by
train_cls.py."""

import os

import torch

from lib import flags, rundata, runfolder
from lib.base import base_of
from lib.files import UserError
from lib.report import counted, listing
from model import SHAPES

METHODS = flags.METHODS['cls']
ALIKE = ('r', 'alpha', 'targets', 'top', 'bottleneck', 'pool')  # part of the model, as METHODS are
READING = ('dropout', 'max_length', 'keep', 'lr')  # those of the run, unless typed
OTHER = ('model', 'scratch', 'n_layer', 'n_head', 'n_embd', 'block_size')


def inherit(args, given):
    """Flags that were not typed are those of the run; those that make its model must be."""
    path, info = args.init, runfolder.read_run(args.init)
    old, method = info['args'], info['method']
    if info['kind'] == 'gen':
        raise UserError(f'--init {path}: this run is generative; name one of train_cls.py')
    if 'data' not in given:
        raise UserError(f'--init {path} needs --data: the rows to train on')
    for name in given & {*OTHER}:
        raise UserError(f'--{name} cannot be combined with --init, which goes on with a model')
    flags.check_saved(args, old, f'{path}/run.json', 'restore the file, or train again')
    if given & {*METHODS} and args.method != method:
        why = f'{path} was trained with --{method}; leave the flag out, or use --model'
        raise UserError(f'--{args.method}: {why}')
    for name in (*ALIKE, *METHODS, *READING):
        if name not in given:
            setattr(args, name, old[name])
        elif name in (*ALIKE, 'last', 'prompt') and getattr(args, name) != old[name]:
            why = f'{path} has {old[name]}, and --init goes on with its model; leave the flag out'
            raise UserError(f'--{name} {getattr(args, name)}: {why}')
    args.method, args.model = method, os.path.abspath(path)
    if method in ('lora', 'adapter', 'prompt'):
        base, name = base_of(path, info, args.data_dir), info['base']['name']
        kept = os.path.isdir(os.path.join(path, 'base'))
        args.model = name if name in SHAPES and not kept else os.path.abspath(base)
    given.add('model')


def start_from(model, args, ds):
    """Give a fresh model, to which the method was added, the weights of the run args.init, if it is
    given. A label of ds that the run does not have keeps its fresh row of the head. Adds notes to
    ds.notes."""
    if not args.init:
        return
    path, info = args.init, runfolder.read_run(args.init)
    source, old = runfolder.load_cls(path, info, args.data_dir), info['labels']
    theirs = source.state_dict()
    head = {n for n in theirs if n.startswith('score.')}
    by_label = {'score.weight'} <= head <= {'score.weight', 'score.bias'}  # a row each
    if not by_label and ds.labels != old:
        why = 'its head, edited, has no row per label; the data must have the labels of that run'
        raise UserError(f'--init {path}: {why}: {listing(old)}')
    rows = [(i, old.index(label)) for i, label in enumerate(ds.labels) if label in old]
    with torch.no_grad():
        for name, t in model.state_dict().items():  # also buffers, and what an edit froze
            if by_label and name in head:
                for i, j in rows:
                    t[i] = theirs[name][j]
            elif not torch.equal(t, theirs[name]):
                t.copy_(theirs[name])
    new = [label for label in ds.labels if label not in old]
    gone = [label for label in old if label not in ds.labels]
    ds.notes += [f'new in the head: {listing(new)}'] * bool(new)
    ds.notes += [f'dropped from the head, as no row has it: {listing(gone)}'] * bool(gone)
    seen = rundata.seen(path, ds.test.texts)
    if seen is not None and seen.any():
        texts = counted(int(seen.sum()), 'test text')
        ds.notes.append(f'{path} was trained on {texts}: the results may be optimistic')
