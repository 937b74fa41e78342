"""The classes of a generative run: their folders, the calibration of all. Called by train_gen.py,
lib/genflags.py, lib/genrun.py and lib/runs.py."""

import json
import os
import re
import shutil

import numpy as np
import torch
import torch.nn.functional as F

from lib import cli, files
from lib.files import UserError
from lib.rundata import check, seen
from lib.tables import Format

# --- folders ---


def folder_names(labels, old):
    """{label: folder name}: the label, with characters that a file system may not take replaced;
    all are different even where case does not count. old: the names that exist."""
    names = dict(old)
    taken = {'base', 'prefix', 'posterior'} | {name.lower() for name in old.values()}
    for label in labels:
        if label not in names:
            stem = re.sub(r'[^\w-]+', '_', label).strip('_')[:60] or 'class'
            name, i = stem, 2
            while name.lower() in taken:
                name, i = f'{stem}-{i}', i + 1
            names[label] = name
            taken.add(name.lower())
    return {label: names[label] for label in labels}


def finished(out, folder):
    """Is that class trained to its end? Its class.json is written last."""
    return os.path.isfile(os.path.join(out, folder, 'class.json'))


def class_folder(path, info, label):
    """The folder of a class; checked to be trained to its end, and on the base model of the run."""
    folder = os.path.join(path, info['folders'][label])
    record = os.path.join(folder, 'class.json')
    if not os.path.isfile(record):
        advice = f'train it with: {cli.command("train_gen.py", "--resume", "--out", path)}'
        raise UserError(f'{path} lacks the class {label!r} (no {record}); {advice}')
    sha256, wanted = files.read_object(record).get('base'), info['base']['sha256']
    if sha256 != wanted:
        problem = f'was trained on another base model (sha256 {str(sha256)[:12]}...) than the rest'
        again = cli.command('train_gen.py', f'--class_id={label}', '--out', path)
        advice = f'train it again with: {again}'
        raise UserError(f'{folder} {problem} of the run ({str(wanted)[:12]}...); {advice}')
    return folder


def promote(done, out):
    """Move what a phase trained from its folder `done` to its place in the run: its folders, and
    its log lines, whose steps continue those of the run. A kill at any moment leaves a folder
    *.done, and promoting that again ends with the same run."""
    for name in sorted(os.listdir(done)):
        if os.path.isdir(os.path.join(done, name)):
            shutil.rmtree(os.path.join(out, name), ignore_errors=True)
            os.rename(os.path.join(done, name), os.path.join(out, name))
    log, merged = os.path.join(done, 'log.jsonl'), os.path.join(done, 'merged.jsonl')
    run_log = os.path.join(out, 'log.jsonl')
    if os.path.isfile(log):
        old, new = files.log_rows(run_log), files.log_rows(log)
        steps = old[-1]['step'] if old else 0
        rows = old + [{**row, 'step': steps + row['step']} for row in new]
        files.write_atomic(merged, ''.join(json.dumps(row) + '\n' for row in rows))
        os.remove(log)
    if os.path.isfile(merged):
        os.replace(merged, run_log)
    shutil.rmtree(done)


def had_posterior(out, folders):
    """Have all classes of a run, in these folders, had their posterior steps?"""
    records = [files.read_object(f'{out}/{f}/class.json') for f in folders if finished(out, f)]
    return len(records) == len(folders) and all('posterior_steps' in r for r in records)


def leaked(old, args, ds):
    """Notes for a finished run (old: its run.json) that gets a class from other data: how many of
    the rows that will judge it were trained on before. Raises UserError if its own data have
    changed."""
    if 'args' not in old:
        return []
    names = 'data split_seed val test max_samples balance quick eval_samples'.split()
    names += Format._fields[:-1]
    if all(old['args'][name] == getattr(args, name) for name in names):
        check(args.out, old.get('split'), ds, 'give the new rows as another file (--data FILE)')
        return []
    were = seen(args.out, ds.val.texts + ds.test.texts)
    if were is None:
        problem = 'the training rows of the other classes are not known'
        return [f'{problem}; if some of them are test rows now, the results are optimistic']
    if not were.any():
        return []
    count = f'{were.sum():,} of the validation and test texts'
    return [f'{count} were training rows of the other classes: the results may be optimistic']


# --- calibration ---


def calibrate(run, logits, y):
    """Fit tau and biases of an opened run to the logits (N, K) of its validation rows, of classes
    y (N,). -> what run.json says of them, for run.decide_by()

    tau and b of fit_calibration, unless they cost accuracy on these rows or a class has none; then
    the temperature of Bayes' rule as a whole, (log P(text | c) + log P(c)) / tau, which changes no
    decision."""
    prior, fitted = run.log_prior, 'tau and a bias per class'
    run.tau, run.bias = fit_calibration(logits - prior, prior, y)
    absent = len(np.unique(y)) < len(run.labels)  # a class of which nothing is known
    if absent or (run.calibrated(logits).argmax(1) == y).sum() < (logits.argmax(1) == y).sum():
        run.tau, _ = fit_calibration(logits, np.zeros_like(prior), y, biased=False)
        why = 'a class has no validation row' if absent else 'biases would cost accuracy'
        run.bias, fitted = prior / run.tau - prior, f'tau alone: {why}'
    bias = dict(zip(run.labels, run.bias.tolist()))
    return dict(rule='calibrated', calibration=dict(tau=run.tau, bias=bias, fitted=fitted))


def fit_calibration(logprobs, log_prior, y, biased=True):
    """Temperature scaling (Guo et al. 2017, arXiv 1706.04599) with a bias per class -> tau, b (K,)
    that minimise the mean of -log softmax(logprobs / tau + log_prior + b)[y] on validation rows,
    by L-BFGS in float64. A weak pull to tau = 1 and b = 0 keeps them finite on few rows. biased:
    False leaves b at 0."""
    x, prior = torch.tensor(logprobs).double(), torch.tensor(log_prior).double()
    y, a = torch.tensor(y), torch.zeros((), dtype=torch.float64, requires_grad=True)  # a = -log tau
    b = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    tolerances = dict(tolerance_grad=1e-9, tolerance_change=1e-12)
    trained = [a, b] if biased else [a]
    opt = torch.optim.LBFGS(trained, max_iter=500, line_search_fn='strong_wolfe', **tolerances)

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(x * a.exp() + prior + b, y) + 1e-4 * (a**2 + (b**2).sum())
        loss.backward()
        return loss

    opt.step(closure)
    return float(torch.exp(-a.detach())), b.detach().numpy()
