"""Text for people: what lib/metrics.py returns as tables of at most 100 columns, and numbers of
things. Called by eval.py and both train scripts; counted() by rooms as well."""

from numbers import Number

import numpy as np

SHOWN = 'n accuracy macro_f1 weighted_f1 mcc nll brier ece majority_accuracy coverage'.split()


def counted(n, noun):
    """'1 block', '2,000 rows', '3 classes'"""
    return f'{n:,} {noun}' + ('' if n == 1 else 'es' if noun.endswith('s') else 's')


def short(name, width):
    """name with its middle cut out if it is longer than width."""
    if len(name) <= width:
        return name
    return name[: (width - 1) // 2] + '..' + name[len(name) - (width - 2) // 2 :]


def listing(labels):
    """The first 20 labels, for a message."""
    more = f' and {len(labels) - 20} more' if len(labels) > 20 else ''
    return ', '.join(labels[:20]) + more


def report(m, labels):
    """metrics() as tables. Shows the ten largest errors if the confusion matrix does not fit."""
    cm, interval = np.array(m['confusion']), '[{:.4f}, {:.4f}]'.format(*m['ci95'])
    majority = f'majority class {m["majority_accuracy"]:.4f}'
    lines = [
        f'accuracy {m["accuracy"]:.4f} {interval}   {majority}   n {m["n"]:,}',
        'macro F1 {macro_f1:.4f}   weighted F1 {weighted_f1:.4f}   MCC {mcc:.4f}'.format(**m),
    ]
    if m['nll'] is not None:
        lines.append('NLL {nll:.4f} nats   Brier {brier:.4f}   ECE {ece:.4f}'.format(**m))
    if 'uncalibrated' in m:
        before = '(before calibration {nll:.4f}, {brier:.4f}, {ece:.4f})'
        lines[-1] += '   ' + before.format(**m['uncalibrated'])
    own = [f'{k} {v:.4g}' for k, v in m.items() if k not in SHOWN and isinstance(v, Number)]
    lines += ['   '.join(own)] if own else []  # of an edit of metrics()
    if cm.sum() < m['n']:
        lines.append(
            f'coverage {m["coverage"]:.4f}: {counted(m["n"] - cm.sum(), "text")} without a'
        )
        others = f'accuracy on the others {np.trace(cm) / max(cm.sum(), 1):.4f}'
        lines[-1] += f' label, counted as wrong; {others}'
    names = [short(label, 30) for label in labels]
    width = max(map(len, names + ['class']))
    lines += ['', f'{"class":{width}}  precision  recall      F1  support']
    row = '{precision:9.4f}  {recall:.4f}  {f1:.4f}  {support:7,}'
    per_class = m['per_class'].values()
    lines += [f'{name:{width}}  {row.format(**c)}' for name, c in zip(names, per_class)]
    cell, room = max(len(str(cm.max())), 3) + 1, 100 - width - 4  # 4: a number beside the name
    fits = len(labels) <= 20 and len(labels) * cell <= room
    lines += confusion_matrix(cm, names, cell, width, room) if fits else largest_errors(cm, names)
    return '\n'.join(lines)


def confusion_matrix(cm, names, cell, width, room):
    """cm (K, K) as lines: cells of at least `cell` columns, at most `room` columns in all, beside
    names of `width`. Numbers the columns if the names are too wide for them."""
    heads = names
    if len(names) * (max(map(len, names)) + 1) > room:
        heads = [f'#{i}' for i in range(len(names))]
        names = [f'{name:{width}} {head:>3}' for name, head in zip(names, heads)]
    cell, width = max([cell] + [len(head) + 1 for head in heads]), max(map(len, names))
    lines = ['', 'confusion matrix (rows: truth, columns: prediction)']
    lines += [' ' * width + ''.join(f'{head:>{cell}}' for head in heads)]
    cells = [''.join(f'{c:{cell}d}' for c in row) for row in cm]
    return lines + [f'{name:{width}}{row}' for name, row in zip(names, cells)]


def largest_errors(cm, names):
    """The ten largest cells of cm (K, K) off its diagonal, as lines."""
    errors = cm - np.diag(np.diag(cm))
    top = np.argsort(-errors, axis=None, kind='stable')[:10]
    pairs = zip(*np.unravel_index(top, errors.shape))
    lines = [f'{errors[i, j]:7,}  {names[i]} -> {names[j]}' for i, j in pairs if errors[i, j]]
    return ['', 'most frequent errors (texts, truth -> prediction)', *lines]


def side_by_side(names, results, tests):
    """One row per run, then each run against the first. tests: compare() of the first with each of
    the others, in order."""
    names = [short(name, 36) for name in names]
    width = max(map(len, names + ['majority class']))
    lines = [f'{"run":{width}}  accuracy [95 % interval]  macro F1      MCC      NLL     ECE']
    row = '{macro_f1:.4f}  {mcc:7.4f}  {nll:7.4f}  {ece:6.4f}'
    for name, m in zip(names, results):
        interval = '[{:.4f}, {:.4f}]'.format(*m['ci95'])
        lines.append(f'{name:{width}}    {m["accuracy"]:.4f} {interval}    {row.format(**m)}')
    lines.append(f'{"majority class":{width}}    {results[0]["majority_accuracy"]:.4f}')
    if tests:
        lines += ['', f"McNemar's test against {names[0]}, {counted(results[0]['n'], 'row')}"]
    return '\n'.join(lines + verdicts(names, tests))


def means_table(methods, tests):
    """Means over the runs of each method (lib/seeds.py), then each method against the first."""
    names = [short(m['method'], 60) for m in methods]
    heads = ('accuracy', 'macro F1', 'MCC', 'NLL', 'ECE')
    lines = ['', 'mean +- 95 % t interval over the seeds, on these rows']
    lines += [' ' * 4 + ''.join(f'{head:19}' for head in heads).rstrip()]
    for name, m in zip(names, methods):
        cells = []
        for x in m['means'].values():
            half = '' if x['half'] is None else f' +- {x["half"]:.4f}'
            cells.append(f'{x["mean"]:.4f}{half}')
        n = len(m['runs'])
        lines += [f'{name}: {n} runs' if n > 1 else f'{name}: one run, so no interval']
        lines += [' ' * 4 + ''.join(f'{cell:19}' for cell in cells).rstrip()]
    if tests:
        lines += ['', f'against {names[0]}']
    return '\n'.join(lines + verdicts(names, tests))


def verdicts(names, tests):
    """Each of names[1:] against the first, by its test: two lines each. None: not tested."""
    lines = []
    for name, t in zip(names[1:], tests):
        if t is None:
            lines.append(f'{name}: not tested, which takes at least two runs of each method')
            continue
        p = 'p < 0.0001' if t['p'] < 1e-4 else f'p = {t["p"]:.2g}'
        better = f'{name if t["difference"] > 0 else names[0]} is better'
        verdict = 'the difference is within noise' if t['p'] >= 0.05 else better
        interval, rows = '[{:+.4f}, {:+.4f}]'.format(*t['ci95']), ''
        if 'only_other_right' in t:
            gained = counted(t['only_other_right'], 'row')
            rows = f', {gained} gained, {t["only_first_right"]:,} lost'
        lines.append(f'{name}: accuracy {t["difference"]:+.4f} {interval}{rows}')
        lines.append(f'  {verdict} ({p}, {t["test"]})')
    if len(tests) > 1:
        bound = f'p < {0.05 / len(tests):.2g}'
        lines.append(f'({len(tests)} tests: with Bonferroni correction, significant at {bound})')
    return lines
