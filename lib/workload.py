"""What bench.py measures on: a base model with random weights, and real texts. Both sides read the
same files and the same token ids. Called by bench.py and its rooms.

args: bench.py's flags; args.shared is the folder of one run that all its processes read."""

import csv
import math
import os
import subprocess
import sys

import numpy as np
import torch

import data
from lib import checkpoints, cli, files, tokens
from lib.files import UserError
from model import GPT, SHAPES

METHODS = dict(lora='--lora', full='--full', last='--last 1', head='--head', adapter='--adapter')
ROWS = dict(eval=3000, gen=96, predict=4000)  # default of --rows


def base_folder(name):
    """Folder with random weights of a published shape, which both sides load; made once, kept in
    the cache. All matrices are cut from one array of random numbers, to need no more memory than
    the largest one."""
    folder = files.cached(f'bench/{name}')
    if not os.path.isfile(os.path.join(folder, 'config.json')):
        with torch.device('meta'):
            shapes = {n: p.shape for n, p in GPT(SHAPES[name]).named_parameters()}
        spare = 10_000  # numbers by which the cuts can differ
        size = max(shape.numel() for shape in shapes.values()) + spare
        noise = torch.randn(size, generator=torch.Generator().manual_seed(0)).mul_(0.02)
        state = {}
        for i, (n, shape) in enumerate(shapes.items()):
            fill = torch.zeros if n.endswith('bias') else torch.ones if 'ln_' in n else None
            start = 997 * i % spare
            cut = noise[start : start + shape.numel()].view(shape)
            state[n] = fill(shape) if fill else cut
        checkpoints.save_hf(folder, SHAPES[name], state)
    return folder


def texts_csv(args):
    """The file with the texts of --length."""
    return os.path.join(args.shared, 'texts.csv')


def per_class(args):
    """Rows per class of an epoch of --steps steps. SST-2 has two classes."""
    return math.ceil(args.steps * args.batch_size / 2)


def training_rows(args, max_samples=None):
    """-> data.Split of the training rows."""
    if args.length:
        return data.load(texts_csv(args)).train
    return data.load('sst2', max_samples=max_samples).train


def texts_of(args):
    """-> (texts, labels (n,)) to evaluate or to predict."""
    ds = data.load(texts_csv(args) if args.length else 'sst2')
    split = ds.test if args.split == 'validation' else ds.train  # SST-2's dev set is our test split
    return split.texts[: args.rows], split.y[: args.rows]


def agnews_texts(args):
    """The first test texts, for gen."""
    return data.load('agnews').test.texts[: args.rows]


def tokens_of(texts, max_length=None):
    """-> Tokens of the texts, each cut to its first max_length (128) tokens."""
    every = tokens.tokenize(tokens.tokenizer('gpt2'), texts)
    rows = [ids[: max_length or 128] for ids in every]
    return tokens.Tokens(np.concatenate(rows), np.cumsum([0] + [len(r) for r in rows]))


def write_rows(path, texts, labels):
    """Write a .csv with texts and labels."""
    with open(path, 'w', encoding='utf-8', newline='') as f:
        csv.writer(f).writerows([('text', 'label'), *zip(texts, labels)])


def texts_of_length(n, count):
    """`count` different texts of exactly n tokens, cut from all of SST-2 in one string."""
    enc = tokens.tokenizer('gpt2')
    joined = ' '.join(' '.join(data.load('sst2').train.texts).split())
    ids = tokens.tokenize(enc, [joined]).flat
    texts, start = {}, 0
    while len(texts) < count and start + n <= len(ids):
        text = ' '.join(enc.decode(ids[start : start + n].tolist(), errors='replace').split())
        fits = len(enc.encode_ordinary(text)) == n  # a word that is cut can give other tokens
        if fits:
            texts[text] = True
        start += n if fits else 1
    if len(texts) < count:
        raise UserError(
            f'--length {n}: SST-2 gives only {len(texts)} of {count} texts; '
            'lower it, or --batch_size or --rows'
        )
    return list(texts)


# --- what the sides share ---


def checked(command, what, seconds=None):
    """What a command prints. Raises UserError if it fails or takes longer than that."""
    try:
        p = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f'{what} did not end within {seconds:.0f} s') from None
    if p.returncode:
        raise UserError(f'{what} failed: {" ".join(p.stderr.split())[-500:]}')
    return p.stdout


def python(script, *flags):
    """The command that runs one of the scripts."""
    return [sys.executable, os.path.join(cli.TOP, script), *flags]


def prepare(args, folder):
    """Write what the sides share into args.shared: texts.csv for --length; a run for eval, predict
    and startup; a file of texts for predict."""
    place = lambda name: os.path.join(args.shared, name)  # noqa: E731
    if args.length:
        # all texts have one length, so a short epoch is as good as a long one
        steps = args.steps if args.task in ('head', 'last') else min(args.steps, 4)
        rows = args.rows or args.batch_size * steps
        n = max(rows, 20)
        while n - 2 * (n // 10) < rows:  # a tenth each becomes validation and test rows
            n += 1
        labels = ['negative', 'positive'] * (n // 2) + ['negative'] * (n % 2)
        write_rows(texts_csv(args), texts_of_length(args.length, n), labels)
    if args.task in ('eval', 'predict', 'startup'):
        ds = data.load('sst2', max_samples=20)
        write_rows(place('few.csv'), ds.train.texts, [ds.labels[c] for c in ds.train.y])
        flags = ['--data', place('few.csv'), '--model', folder, '--lora', '--max_steps', '1']
        flags += ['--max_length', str(args.length or 128), '--out', place('run')]
        flags += ['--device', args.device, '--dtype', args.dtype]
        checked(python('train_cls.py', *flags), 'training a run')
        if args.against and args.task != 'eval':
            command = python('predict.py', place('run'), '--export', place('exported'))
            checked(command, 'exporting the run')
    if args.task == 'predict':
        with open(place('texts.txt'), 'w', encoding='utf-8') as f:
            f.writelines(' '.join(text.split()) + '\n' for text in texts_of(args)[0])
