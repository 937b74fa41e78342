"""Score trained runs: metrics, run against run, calibration, plots.

    python eval.py runs/sst2                   the test split of the run's own data
    python eval.py runs/lora runs/head         side by side on the same rows, with McNemar's test
    python eval.py runs/lora runs/gen-lora     discriminative or generative: which is better here?
    python eval.py runs/a* runs/b* --mean      over seeds: mean +- interval, method against method
    python eval.py runs/sst2 --test new.csv    every row of another labelled file
    python eval.py --preds preds.json --labels labels.json    the predictions of any program

A single run on the test split of its own data also updates RUN/eval_results.json, unless
--eval_samples, --rule, --windows, --device, --dtype or --plain is given.
"""

from lib import start

start.script(__name__)

import os
import sys

from lib import cli, files, flags
from lib.files import UserError
from lib.intervals import compare
from lib.metrics import metrics, run_metrics
from lib.plots import check_plots, plot, read_log
from lib.predictions import read_preds
from lib.report import counted, means_table, report, side_by_side
from lib.seeds import by_method, by_seed

# score() imports what needs torch: --preds runs without it
READING = ('text_col', 'label_col', 'sep', 'encoding', 'drop_unlabelled')  # tables.Format
LOADING = ('data', 'split', 'val', 'test', *READING, 'data_dir', 'base', 'allow_seen')
SCORING = ('eval_samples', 'rule', 'windows', 'device', 'dtype', 'plain')


def parse(argv):
    p = cli.Parser(prog='eval.py', description=__doc__)
    p.add_argument('run', nargs='*', metavar='RUN', help='run folders; the first is the baseline')
    add = cli.group(p, 'instead of a run')
    text = 'a JSON list, or a value per line, of labels or {label, probs}; label null = no answer'
    add('--preds', text + ' (wrong)', metavar='FILE')
    add('--labels', 'true labels for --preds, strings in the same order', metavar='FILE')
    add = cli.group(p, 'data')
    add('--data', "data set name, file or folder (default: the first run's own)", metavar='NAME')
    add('--split', 'which split to score', ('test', 'val', 'train'), 'test')
    add('--eval_samples', 'score N of its rows, stratified (default: all)', cli.positive)
    add('--val', 'validation rows for --data', metavar='FILE')
    add('--test', 'test rows for --data; alone: score every row of FILE', metavar='FILE')
    flags.table_flags(add, '--data or --test')
    text = 'compare runs although one was trained on texts that are scored'
    add('--allow_seen', text, bool)
    add = cli.group(p, 'several seeds')
    add('--mean', 'runs that differ in --seed alone are one method: means, methods compared', bool)
    add = cli.group(p, 'output')
    add('--plot', 'write curves and matrices there as PNG (needs matplotlib)', metavar='DIR')
    text = 'write a page of one run there: metrics, curves, its worst errors explained'
    add('--html', text, metavar='FILE')
    add('--json', 'write all numbers there; - = stdout, tables to stderr', metavar='FILE')
    flags.opening_flags(p)
    args, given = p.parse(argv)
    check(args, given)
    return args, given


def check(args, given):
    """Raise UserError for flags that do not fit together, before anything is loaded."""
    if bool(args.run) == bool(args.preds):
        raise UserError('give either run folders or --preds with --labels, and not both')
    if bool(args.preds) != bool(args.labels):
        raise UserError('--preds and --labels go together: a file of predictions, one of labels')
    for flag in (*LOADING, *SCORING, 'mean'):
        if args.preds and flag in given:
            raise UserError(f'--{flag} has no meaning with --preds, which loads nothing: remove it')
    for flag in ('val', *READING):
        if flag in given and not (args.data or args.test and flag != 'val'):
            raise UserError(f"--{flag} needs --data or --test: the run's data has its own flags")
    if args.allow_seen and len(args.run) < 2:
        raise UserError('--allow_seen is for runs that are compared: name several')
    if args.test and not args.data and 'split' in given:
        raise UserError('--split has no meaning with --test alone, which scores all rows')
    if args.html and (len(args.run) != 1 or args.windows):
        raise UserError('--html writes the page of one run, without --windows')
    if args.plot:
        check_plots(args.plot)


def load(args, infos):
    """-> the data set to score, by the flags; by default the first run's own."""
    import data
    from lib import rundata
    from lib.base import data_dir_of
    from lib.tables import Format

    first = infos[0]['args']
    if not (first['data'] or args.data or args.test):
        advice = 'name it with --data NAME, or score every row of a labelled file with --test FILE'
        raise UserError(f'{args.run[0]} was not trained here and has no data of its own: {advice}')
    kw = dict(form=Format.of(vars(args), like=rundata.form_of(infos[0])))
    kw['data_dir'] = data_dir_of(infos[0], '', args.data_dir)
    if args.data:  # moved or not: balanced as in training, else test could hold training rows
        same = os.path.basename(args.data) == os.path.basename(first['data'] or '')
        kw.update(balance=first['balance'] and same, seed=first['split_seed'])
        ds = data.load(args.data, val=args.val, test=args.test, **kw)
    elif args.test:  # three times: no rows are split off
        ds = data.load(args.test, val=args.test, test=args.test, fewest=1, **kw)
    else:
        ds = rundata.own_data(infos[0], args.data_dir)
        hint = 'score its rows as other data (--test FILE)'
        rundata.check(args.run[0], infos[0].get('split'), ds, hint)
    if not len(getattr(ds, args.split).y):
        raise UserError(f'--split {args.split} of {ds.name} has no rows: choose another split')
    if args.eval_samples:
        rows = rundata.some_rows(getattr(ds, args.split), args.eval_samples, first['split_seed'])
        setattr(ds, args.split, rows)
    return ds


def score(args, out):
    """Every run on the same rows
    -> data set, label names, y (N,), run_metrics() of each run, by_method() if --mean."""
    from lib import page, rundata, runs
    from lib.runfolder import info_of

    infos = [info_of(path, args.base) for path in args.run]
    groups = by_method(args.run, infos) if args.mean else None
    ds = load(args, infos)
    split, first = getattr(ds, args.split), infos[0]
    texts, y = split.texts, rundata.match_labels(args.run, infos, ds, split.y, out)
    every, overlaps = [], [rundata.overlap(*pair, args, ds) for pair in zip(args.run, infos)]
    overlaps[0][:0] = ds.notes if args.data else []
    for path, info, overlap in zip(args.run, infos, overlaps):
        run = runs.open_to_score(path, info, args)
        run.labels = info['labels']
        rows, place = counted(len(y), 'text'), f'{run.device}, {str(run.dtype)[6:]}: {run.reason}'
        print(f'{path}: {info["method"]}, {ds.name} {args.split}, {rows} ({place})', file=out)
        if args.rule and run.kind != 'gen':
            raise UserError(f'{path} is a discriminative run: --rule is for generative ones')
        run.rule, run.windows = args.rule or run.rule, args.windows
        for note in overlap + run.notes(texts):
            print(f'  {note}', file=out)
        logits = run.logits(texts, progress=True, cache=True)  # (N, K)
        every.append(run_metrics(run, logits, y, first['labels']))
    if args.html:
        page.write(args.html, run, f'{ds.name} {args.split}', texts, y, every[0])
        print(f'wrote {args.html}', file=out)
    return ds, first['labels'], y, every, groups


def main(argv=None):
    """-> what --json writes"""
    args, given = parse(argv)
    out = sys.stderr if args.json == '-' else sys.stdout
    if args.preds:
        labels, y, probs, pred = read_preds(args.preds, args.labels)
        names, tests = [args.preds], []
        results, probs = [metrics(probs, y, labels, pred=pred)], [probs]
        source = dict(data=args.labels, split=None)
    else:
        ds, labels, y, scored, groups = score(args, out)
        names, (results, probs) = args.run, zip(*scored)
        right = [p.argmax(1) == y for p in probs]
        tests = [] if groups else [compare(right[0], other) for other in right[1:]]
        source = dict(data=ds.name, split=args.split)
    several = len(names) > 1
    print(side_by_side(names, results, tests) if several else report(results[0], labels), file=out)
    if args.mean:
        methods, method_tests = by_seed(groups, names, results, right)
        print(means_table(methods, method_tests), file=out)
        source.update(methods=methods, method_comparisons=method_tests)

    if len(args.run) == 1 and args.split == 'test' and not given & {'data', 'test', *SCORING}:
        from lib.runfolder import update_results

        update_results(args.run[0], results[0])
    if args.plot:
        logs = [read_log(os.path.join(run, 'log.jsonl')) for run in args.run]
        for path in plot(args.plot, names, labels, y, probs, results, logs):
            print(f'wrote {path}', file=out)
    comparisons = [dict(t, run=name, against=names[0]) for name, t in zip(names[1:], tests)]
    scores = [dict(m, run=name) for name, m in zip(names, results)]
    numbers = dict(source, labels=labels, runs=scores, comparisons=comparisons)
    if args.json == '-':
        print(files.as_json(numbers, indent=2))
    elif args.json:
        files.write_json(args.json, numbers)
    return numbers


if __name__ == '__main__':
    if 'RANK' in os.environ:
        from lib import ranks

        main = ranks.under_torchrun(main)
    cli.run(main)
