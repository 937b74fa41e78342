"""Several runs of one command: --seeds N trains with N seeds, --folds K cross-validates and names
training rows whose label is doubtful. Called by both training scripts."""

import csv
import io
import os
import sys

import numpy as np

import data
from lib import cli, files, ranks, resume, rundata, runfolder, runs
from lib.base import data_dir_of
from lib.files import UserError
from lib.folds import folds
from lib.intervals import mean_interval
from lib.metrics import softmax

SHOWN = dict(accuracy='accuracy', macro_f1='macro F1')
OWN = {'out', 'resume', 'seed', 'seeds', 'fold', 'lora'}  # runs differ in them; lora: the default
COLUMNS = 'row text label probability likelier_label likelier_probability'.split()


def several_runs(main, args, given, argv):
    """Call main, of which args, given and argv are the flags, once per seed or fold; finished runs
    are kept, and an interrupted one is resumed.
    -> dict(out, runs: what main returned, mean: {metric: {mean, half}}), or an exit code"""
    argv, out = list(sys.argv[1:] if argv is None else argv), args.out
    if not out:  # the same for the same command, so that it can go on
        out = runfolder.first_folder(args.data, 'gen-' * hasattr(args, 'pretrain') + args.method)
    if getattr(args, 'folds', None):
        name = f'{args.folds} folds'
        plan = {os.path.join(out, f'fold{i + 1}'): f'--fold {i}' for i in range(args.folds)}
    else:
        name = f'{args.seeds} seeds'
        seeds = range(args.seed, args.seed + args.seeds)
        plan = {f'{out}-seed{seed}': f'--seeds 1 --seed {seed}' for seed in seeds}
    found = []
    for number, (path, more) in enumerate(plan.items(), 1):
        print(f'\n--- {path} ({number} of {len(plan)}) ---', flush=True)
        state = ranks.from_rank_zero(lambda path=path: state_of(path, args, given))
        if isinstance(state, dict):
            print('trained before', flush=True)
        else:
            flags = ['--resume'] if state == 'interrupted' else [*argv, *more.split()]
            state = main([*flags, '--out', path])
        if cli.exit_code(state):
            print('run the same command again to go on with the others', file=sys.stderr)
            return state
        found.append(state)
    trained_on = sorted({runfolder.read_run(run['out'])['args']['data'] for run in found})
    if len(trained_on) > 1:
        why = f'these runs are of different data ({", ".join(trained_on)})'
        raise UserError(f'{why}: name --data, and another --out')
    means = {key: mean_interval([run['test'][key] for run in found])._asdict() for key in SHOWN}
    cells = [f'{SHOWN[key]} {x["mean"]:.4f} +- {x["half"]:.4f}' for key, x in means.items()]
    print(f'\n{name}: test {", ".join(cells)} (mean, 95 % t interval)')
    if getattr(args, 'folds', None):
        suspects(args, out, list(plan))
    else:
        print(f'compare:\n  {cli.command("eval.py", *plan, "--mean")}')
    return dict(out=out, runs=found, mean=means)


def state_of(path, args, given):
    """-> what main returned of a finished run, 'interrupted', or None if there is none. Raises
    UserError if it was trained with other flags."""
    if work := resume.interrupted_in(path):
        saved = resume.load_resume(work)['args']
    elif os.path.exists(os.path.join(path, 'run.json')):
        info = runfolder.read_run(path)
        saved = info.get('pending', info['args'])
    else:
        return None
    aside = OWN | (set() if 'max_length' in given else {'max_length'})
    if not given & {'data', 'model'} and saved.get('data') == 'demo':  # it stood in
        aside |= {'data', 'model', 'lr', 'max_steps', 'dtype'} - given
    for name, value in vars(args).items():
        if name not in aside and saved.get(name, value) != value:
            why = f'{path} was trained with --{name} {saved[name]}, not {value}'
            raise UserError(f'{why}; give the same flags, or another --out')
    results = os.path.join(path, 'eval_results.json')
    if work or not os.path.exists(results):
        return 'interrupted'
    rundata.check(path, info['split'], rundata.own_data(info, args.data_dir), 'name another --out')
    return dict(out=path, val=info['results'], test=files.read_object(results))


def out_of_fold(args, paths):
    """Runs of --folds -> run.json of the first, the training rows, and probabilities (N, K) of each
    by the run that did not train on it."""
    info = runfolder.read_run(paths[0])
    info['args']['folds'] = None
    ds = rundata.own_data(info, args.data_dir)
    of = folds(ds.train, args.folds, args.split_seed)
    probs = np.empty((len(ds.train.y), len(ds.labels)))
    for i, path in enumerate(paths):
        rows = np.flatnonzero(of == i)
        opened = runs.open_run(path, args.device, args.dtype, args.data_dir, args.plain)
        probs[rows] = softmax(opened.logits([ds.train.texts[r] for r in rows]))
    return info, ds, probs


def suspects(args, out, paths):
    """Write suspects.csv: the training rows whose label is not the likeliest under the run that did
    not train on them, least likely label first. row: 1 is the first labelled row of the file."""
    info, ds, probs = out_of_fold(args, paths)
    of_run, form, where = info['args'], rundata.form_of(info), data_dir_of(info, '', args.data_dir)
    read = data.read(of_run['data'], where, of_run['val'], of_run['test'], form, [])[0]
    numbers = {row: i for i, row in reversed([*enumerate(read['train'], 1)])}
    rows, y, best = np.arange(len(probs)), ds.train.y, probs.argmax(1)
    own = probs[rows, y]
    order = [i for i in np.argsort(own, kind='stable') if best[i] != y[i]]
    content = io.StringIO(newline='')
    table = csv.writer(content)
    table.writerow(COLUMNS)
    for i in order:
        pair = (ds.labels[y[i]], f'{own[i]:.6f}', ds.labels[best[i]], f'{probs[i, best[i]]:.6f}')
        text = ds.train.texts[i]
        table.writerow([numbers[text, pair[0]], text, *pair])
    path = os.path.join(out, 'suspects.csv')
    files.write_atomic(path, content.getvalue())
    print(f'{path}: {len(order):,} training rows with a doubtful label, most doubtful first')
