"""Experiment: test accuracy by number of labelled rows per class. The table of docs/results.md:

    python docs/curves.py --data agnews --repeats 3        or: python bench.py --task curves ...

Compares naive Bayes, the discriminative classifier, and the generative one without and with
posterior steps, on the same rows and test rows, for several seeds. The base model is a small GPT,
trained here from random weights on the training texts without their labels."""

import json
import math
import os
import subprocess
import sys
import tempfile

import numpy as np

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if TOP not in sys.path:
    sys.path.insert(0, TOP)

import data
from lib import cli, files, tokens
from lib.files import UserError
from lib.intervals import mean_interval
from lib.workload import write_rows

SHAPE = '--scratch --n_layer 2 --n_head 4 --n_embd 128 --block_size 128'.split()
METHODS = ('naive_bayes', 'discriminative', 'generative', 'posterior')


def naive_bayes(ds, enc):
    """Test accuracy of multinomial naive Bayes with add-one smoothing over the same tokens."""
    counts = np.ones((len(ds.labels), enc.n_vocab))  # (K, V)
    train, test = tokens.tokenize(enc, ds.train.texts), tokens.tokenize(enc, ds.test.texts)
    for i, c in enumerate(ds.train.y):
        np.add.at(counts[c], train[i], 1)
    log_p = np.log(counts / counts.sum(1, keepdims=True))
    log_prior = np.log(np.bincount(ds.train.y) / len(ds.train.y))
    pred = np.array([(log_p[:, test[i]].sum(1) + log_prior).argmax() for i in range(len(test))])
    return float((pred == ds.test.y).mean())


def train(script, name, out, *flags):
    """Run a training script -> accuracy on the test rows, None if it tests nothing."""
    command = [sys.executable, os.path.join(TOP, script), *flags, '--out', out]
    if '--resume' not in flags:
        command += ['--data', name, '--max_length', '24', '--eval_every', '100000']
        command += ['--log_every', '1000']
    p = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if p.returncode:
        raise UserError(f'{script} {" ".join(flags)} failed: {p.stdout[-500:]}')
    results = os.path.join(out, 'eval_results.json')
    return files.read_json(results)['accuracy'] if os.path.isfile(results) else None


def test_file(name, folder):
    """A file with 250 test rows of each class of AG News, to save time -> its path. None for SMS,
    whose test rows are split off by the seed."""
    if name != 'agnews':
        return None
    ds, path = data.load(name), os.path.join(folder, 'test.csv')
    classes = range(len(ds.labels))
    rows = np.sort(np.concatenate([np.flatnonzero(ds.test.y == c)[:250] for c in classes]))
    labels = [ds.labels[ds.test.y[i]] for i in rows]
    write_rows(path, [ds.test.texts[i] for i in rows], labels)
    return path


def curves(name, seeds, base=None):
    """Print and return the accuracies, one row per size and seed."""
    enc, rows, given = tokens.tokenizer('gpt2'), [], base
    with tempfile.TemporaryDirectory() as tmp:
        test = test_file(name, tmp)
        for seed in seeds:
            # one base model per split, since it must not have read the test texts
            if not given and (seed == seeds[0] or not test):
                base = os.path.join(tmp, f'base-{seed}')
                flags = ['--batch_size', '32', '--lr', '2e-3', '--seed', str(seed)]
                flags += ['--split_seed', str(seed)]
                flags += ['--epochs', '2' if test else '3']
                train('train_gen.py', name, base, '--pretrain', *SHAPE, *flags)
            for size, epochs in ((100, 10), (1000, 3), (None, 1 if name == 'agnews' else 3)):
                flags = ['--model', base, '--seed', str(seed), '--lora', '--lr', '3e-3']
                flags += ['--epochs', str(epochs), *(['--test', test] if test else [])]
                flags += ['--max_samples', str(size)] if size else []
                flags += ['--split_seed', str(seed)]
                ds = data.load(name, seed, test=test, max_samples=size)
                cls, gen = (os.path.join(tmp, f'{k}-{size}-{seed}') for k in ('cls', 'gen'))
                accuracies = [
                    naive_bayes(ds, enc),
                    train('train_cls.py', name, cls, *flags),
                    train('train_gen.py', name, gen, *flags),
                    train('train_gen.py', name, gen, '--resume', '--posterior_steps', '100'),
                ]
                row = dict(size=size or 'all', rows=len(ds.train.y), seed=seed)
                rows.append({**row, **dict(zip(METHODS, accuracies))})
                print(json.dumps(rows[-1]), flush=True)
    for size in (100, 1000, 'all'):
        found = {m: [100 * r[m] for r in rows if r['size'] == size] for m in METHODS}
        means = {m: mean_interval(x) for m, x in found.items()}  # 95 %, Student's t
        cells = [f'{m} {mean:.2f} +- {half or math.nan:.2f}' for m, (mean, half) in means.items()]
        print(f'{size} rows per class: ' + ', '.join(cells))
    return rows


def run(args):
    """args.data, .seed, .repeats, .base, .json; called by bench.py as well."""
    rows = curves(args.data, range(args.seed, args.seed + args.repeats), args.base)
    if args.json:
        files.write_json(args.json, rows)


def main(argv=None):
    p = cli.Parser(description=__doc__, prog='curves.py')
    add = p.add_argument
    add('--data', choices=('agnews', 'sms'), default='agnews', help='data set')
    add('--seed', type=int, default=1, help='first seed')
    add('--repeats', type=cli.positive, default=2, help='number of seeds')
    add('--base', metavar='DIR', help='base model (default: train one)')
    add('--json', metavar='FILE', help='write the accuracies to FILE')
    run(p.parse(argv)[0])


if __name__ == '__main__':
    cli.run(main)
