"""`eval.py RUN --html page.html`: one run as a page that needs no network and no other file.
Metrics with intervals, confusion matrix, training curves, reliability, and the most confident
errors explained word by word. Called by eval.py."""

import html
import os

import numpy as np

from lib import files
from lib.explain import LEGEND, explain, paragraph
from lib.files import UserError
from lib.intervals import bootstrap
from lib.metrics import metrics, reliability
from lib.plots import read_log
from lib.report import counted

ERRORS = 10  # explained on the page; each takes a forward pass per word
WIDTH, HEIGHT = 460, 280  # of a chart, pixels
LEFT, BOTTOM, TOP = 52, 40, 46  # room for its numbers and words, pixels
BLUE, RED = '#3b82c4', '#d0603f'  # readable on white and on black
STYLE = """:root { color-scheme: light dark }
body { font: 16px/1.6 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .15em .8em; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #8884 }
span { white-space: pre-wrap; border-radius: 3px } svg { max-width: 100% }
svg text { font: 12px sans-serif; fill: currentColor }"""


def write(path, run, source, texts, y, scored):
    """Write the page of an opened run. source: what was scored, for a person; texts and y (N,): its
    rows; scored: run_metrics() of them, in the order of run.labels."""
    (m, probs), name = scored, run.path
    heading = html.escape(f'{run.info["method"]}, {source}')
    series = read_log(os.path.join(name, 'log.jsonl'))
    body = [f'<h1>{html.escape(name)}</h1><p>{heading}</p>']
    body += [scores(m, probs, y, run.labels), classes(m), confusion(m, run.labels)]
    body += [curves(series), calibration(probs, y), errors(run, texts, y, probs)]
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(name)}'
    files.write_atomic(path, f'{head}</title>\n<style>{STYLE}</style>\n' + '\n'.join(body))


def table(head, rows):
    """HTML of a table; its cells are text, or (text, style)."""
    lines = ['<tr>' + ''.join(f'<th>{html.escape(cell)}</th>' for cell in head) + '</tr>']
    for row in rows:
        pairs = [cell if isinstance(cell, tuple) else (cell, '') for cell in row]
        cells = [f'<td style="{style}">{html.escape(str(cell))}</td>' for cell, style in pairs]
        lines.append(f'<tr>{"".join(cells)}</tr>')
    return '<table>' + '\n'.join(lines) + '</table>'


def scores(m, probs, y, labels):
    names = dict(macro_f1='macro F1', mcc='MCC', nll='NLL, nats', brier='Brier', ece='ECE')
    intervals = bootstrap(lambda rows: metrics(probs[rows], y[rows], labels), len(y), names)
    rows = [('accuracy', f'{m["accuracy"]:.4f}', '[{:.4f}, {:.4f}]'.format(*m['ci95']))]
    for key, (low, high) in intervals.items():
        rows.append((names[key], f'{m[key]:.4f}', f'[{low:.4f}, {high:.4f}]'))
    rows.append(('accuracy of the majority class', f'{m["majority_accuracy"]:.4f}', ''))
    note = '<p>Accuracy: Wilson interval; others: percentiles of 500 bootstrap samples.</p>'
    return table(['', f'n {m["n"]:,}', '95 % interval'], rows) + note


def classes(m):
    rows = []
    for label, c in m['per_class'].items():
        shown = (f'{c[key]:.4f}' for key in ('precision', 'recall', 'f1'))
        rows.append((label, *shown, f'{c["support"]:,}'))
    return '<h2>Classes</h2>' + table(['class', 'precision', 'recall', 'F1', 'support'], rows)


def confusion(m, labels):
    """Cells are coloured by their fraction of the row, so that rare classes show."""
    rows = []
    for label, counts in zip(labels, m['confusion']):
        total = max(sum(counts), 1)
        cells = [(f'{n:,}', f'background:rgba(59,130,196,{0.8 * n / total:.2f})') for n in counts]
        rows.append((label, *cells))
    return '<h2>Confusion matrix</h2>' + table(['truth \\ prediction', *labels], rows)


def chart(title, xlabel, xlim, ylim, lines, dots):
    """SVG of lines [(name, colour, xs, ys)] and of dots [(colour, x, y, radius in pixels)]."""

    def at(x, y):
        x = LEFT + (x - xlim[0]) / ((xlim[1] - xlim[0]) or 1) * (WIDTH - LEFT - 10)
        y = HEIGHT - BOTTOM - (y - ylim[0]) / ((ylim[1] - ylim[0]) or 1) * (HEIGHT - BOTTOM - TOP)
        return f'{x:.1f}', f'{y:.1f}'

    def text(x, y, words, anchor, fill=''):
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{fill}>{html.escape(words)}</text>'

    out = [f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    out.append(text(WIDTH // 2, 14, title, 'middle'))
    for i in range(5):
        x, y = (lim[0] + i / 4 * (lim[1] - lim[0]) for lim in (xlim, ylim))
        column, row = at(x, y)
        out.append(f'<path d="M{LEFT} {row}H{WIDTH - 10}" stroke="#8884"/>')
        out.append(text(LEFT - 6, row, f'{y:.3g}', 'end'))
        number = f'{x:,.3g}' if x < 10 else f'{x:,.0f}'
        out.append(text(column, HEIGHT - BOTTOM + 16, number, 'middle'))
    out.append(text(WIDTH // 2, HEIGHT - 4, xlabel, 'middle'))
    for i, (name, colour, xs, ys) in enumerate(lines):
        points = ' '.join(','.join(at(*point)) for point in zip(xs, ys))
        style = f'fill="none" stroke="{colour}" stroke-width="1.5"'
        out.append(f'<polyline points="{points}" {style}/>')
        out.append(text(LEFT + 8 + 130 * i, 32, name, 'start', f' style="fill:{colour}"'))
    for colour, x, y, radius in dots:
        x, y = at(x, y)
        style = f'fill="{colour}" fill-opacity=".7"'
        out.append(f'<circle cx="{x}" cy="{y}" r="{radius:.1f}" {style}/>')
    return '\n'.join(out) + '</svg>'


def curves(series):
    """Loss and accuracy by step: series of lib/plots.read_log, {} without a log."""
    out = []
    found = dict(loss=('loss', 'val_loss'), accuracy=('train_accuracy', 'val_accuracy', 'val_auc'))
    for title, keys in found.items():
        shown = {key: series[key] for key in keys if key in series}
        if not shown:
            continue
        lines = []
        for key, (steps, values) in shown.items():
            side = 'validation' if key.startswith('val') else 'training'
            name = 'validation, area under ROC' if key == 'val_auc' else side
            lines.append((name, RED if side == 'validation' else BLUE, steps, values))
        every = [v for _, _, _, values in lines for v in values]
        low, high = (0, max(every)) if title == 'loss' else (min(every), 1)
        last = max(max(steps) for _, _, steps, _ in lines)
        dots = [(RED, x, v, 2.5) for _, c, *xy in lines if c == RED for x, v in zip(*xy)]
        out.append(chart(title, 'step', (0, last), (low, high), lines, dots))
    return '<h2>Training</h2>' + '\n'.join(out) if out else ''


def calibration(probs, y):
    """Accuracy by the probability of the predicted class; a dot's area: how many texts."""
    count, mean, accuracy = reliability(probs, y)
    rows, least = np.flatnonzero(count), 1 / probs.shape[1]
    radius = 2 + 10 * np.sqrt(count / count.max())
    dots = [(BLUE, mean[i], accuracy[i], radius[i]) for i in rows]
    perfect = [('perfect calibration', '#888', (least, 1), (least, 1))]
    x, title = 'probability of the predicted class', 'accuracy by probability'
    return '<h2>Reliability</h2>' + chart(title, x, (least, 1), (0, 1), perfect, dots)


def errors(run, texts, y, probs):
    """The wrong predictions of the highest probability, explained."""
    pred = probs.argmax(1)
    wrong = np.flatnonzero(pred != y)
    wrong = wrong[np.argsort(-probs[wrong].max(1), kind='stable')]
    note = LEGEND if len(wrong) else ''
    if run.answers:
        note = 'A --direct run scores the class after the text: no word has a number.'
    count = f'{counted(len(wrong), "text")} of {len(y):,} wrong. {note}'
    out = [f'<h2>Most confident errors</h2><p>{count}</p>']
    for i in wrong[:ERRORS]:
        record = dict(label=run.labels[pred[i]], probs=dict(zip(run.labels, probs[i])))
        if run.answers:
            record.update(runner_up=run.labels[y[i]], explain=[(texts[i], 0.0)])
        else:
            try:
                record['runner_up'], record['explain'] = explain(run, texts[i], pred[i])
            except UserError as e:
                return '\n'.join([*out, f'<p>{html.escape(str(e))}</p>'])
        out.append(f'<hr>Truth: <b>{html.escape(run.labels[y[i]])}</b>{paragraph(record)}')
    return '\n'.join(out)
