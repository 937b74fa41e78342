"""Lines that a training run shows, and facts that it records. Called by both train scripts."""

import os
import textwrap

import numpy as np

from lib import cli
from lib.report import counted
from lib.textfiles import KINDS, kind_of
from lib.tokens import cut_note


def describe(args, ds, train, cfg, place):
    """Lines about data, model and device: rows per class, notes, how many texts are cut. train:
    Tokens of the training texts; place: what pick_device returned."""
    device, dtype, reason = place
    counts = np.bincount(ds.train.y, minlength=len(ds.labels))
    rows = ', '.join(f'{label} {n}' for label, n in zip(ds.labels, counts))
    longer, limit = 100 * np.mean(train.lengths > args.max_length), args.max_length
    cut = f'{longer:.1f} % of the training texts are longer than {counted(limit, "token")}; '
    cut += f'of these the {args.keep} {limit} are read'
    return [
        f'{args.data}: {rows} training rows; {len(ds.val.y)} validation, {len(ds.test.y)} test',
        *(f'  {note}' for note in ds.notes),
        *[cut] * bool(longer),
        *(f'  {note}' for note in cut_note(train.lengths, args.max_length)),
        f'{args.model}{" (random weights)" if args.scratch else ""}: {cfg}',
        f'{device}, matmuls in {str(dtype)[6:]}: {reason}',
    ]


def best(args, score, done, max_steps):
    """The best score (its last number: minus its step), and where the training ended early."""
    by = ' by --patience' if args.patience else ''
    ended = f', ended{by} at step {done} of {max_steps}' if done < max_steps else ''
    value = -score[0] if args.select == 'nll' else score[0]
    return f'best on validation: {args.select} {value:.4f} (step {-score[-1]}{ended})'


def flags(args, names):
    """Values of these flags, as `, name value, ...`."""
    return ''.join(f', {name} {getattr(args, name)}' for name in sorted(names))


def suggestions(out, text, label=None):
    """Commands to try on a finished run, as lines. text: one of its test texts, of which the start
    is shown; label: a class, if the run can explain itself and write texts."""
    start = ''.join(c for c in ' '.join(text.split()) if c.isprintable())
    start = textwrap.shorten(start, 60, placeholder='') or start[:60]  # or one long word
    words = ['--'] * start.startswith('-') + [start]
    lines = [cli.command('predict.py', out, *['--explain'] * (label is not None), *words)]
    if label is not None:
        lines.append(cli.command('predict.py', out, f'--sample={label}'))
    return '\n  '.join([f'saved in {out}; try:', *lines, cli.command('eval.py', out)])


def pretrained(args, best):
    """The same for a run of --pretrain. best: its score, log p per token, or None."""
    score = '' if best is None else f'best on validation: {-best:.4f} nats per token; '
    lines = os.path.isfile(args.data) and kind_of(args.data) not in KINDS  # without labels
    data = 'FILE.csv' if lines else args.data
    command = cli.command('train_cls.py', '--model', args.out, '--data', data)
    return f'{score}saved in {args.out}; try:\n  {command}'
