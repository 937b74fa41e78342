"""What bench.py measures on: a base model with random weights, and real texts. Both sides read
the same files and the same token ids. Called by bench.py, lib/peers.py and docs/curves.py.

args: bench.py's flags; args.shared is the folder of one run that all its processes read."""

import csv
import math
import os

import numpy as np
import torch

import data
from lib import checkpoints, files, tokens
from lib.files import UserError
from model import GPT, SHAPES


def base_folder(name):
    """Folder with random weights of a published shape, which both sides load; made once, kept in
    the cache. All matrices are cut from one array of random numbers, to need no more memory than
    the largest one."""
    folder = os.path.join(files.cache_dir(), 'bench', name)
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
        os.makedirs(folder, exist_ok=True)
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
    rows = [every[i][: max_length or 128] for i in range(len(every))]
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
