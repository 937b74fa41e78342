"""Lines that a training run shows, and facts that it records. Called by both train scripts."""

import platform
import re

import numpy as np
import torch


def versions():
    """Versions for run.json."""
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)


def describe(args, ds, train, cfg, place, notes=()):
    """Lines about data, model and device: rows per class, notes, how many texts are cut. train:
    Tokens of the training texts; place: what pick_device returned."""
    device, dtype, reason = place
    counts = np.bincount(ds.train.y, minlength=len(ds.labels))
    rows = ', '.join(f'{label} {n}' for label, n in zip(ds.labels, counts))
    longer = 100 * np.mean(train.lengths > args.max_length)
    return [
        f'{args.data}: {rows} training rows; {len(ds.val.y)} validation, {len(ds.test.y)} test',
        *(f'  {note}' for note in (*ds.notes, *notes)),
        f'{longer:.1f} % of the training texts are longer than {args.max_length} tokens; of these '
        f'the {args.keep} {args.max_length} are read',
        f'{args.model}{" (random weights)" if args.scratch else ""}: {cfg}',
        f'{device}, matmuls in {str(dtype)[6:]}: {reason}',
    ]


def flags(args, names):
    """Values of these flags, as `, name value, ...`."""
    return ''.join(f', {name} {getattr(args, name)}' for name in sorted(names))


def example(text):
    """The start of a text, safe between the quotes of a shell."""
    return re.sub(r'[^\w\s.,-]', '', text[:60])
