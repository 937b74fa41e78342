"""PNGs for `eval.py --plot DIR`: training curves, confusion matrix, reliability (matplotlib)."""

import io
import math
import os

import numpy as np

from lib import files
from lib.files import UserError
from lib.metrics import divide, reliability
from lib.report import short


def figure(width, height):
    """An empty figure of that many inches; no window opens."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('--plot needs matplotlib: pip install matplotlib') from None
    return Figure(figsize=(width, height), layout='constrained')


def plain(text):
    """For matplotlib, to which $...$ is a formula."""
    return text.replace('$', r'\$')


def check_plots(folder):
    """Raise UserError without matplotlib, or where `folder` cannot be made: before the work."""
    figure(1, 1)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        problem = f'cannot be made a folder ({e.strerror})'
        raise UserError(f'--plot {folder} {problem}: give the name of a folder') from None


def whole_numbers(n=9):
    """At most so many ticks, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(n, integer=True, min_n_ticks=1)


def read_log(path):
    """log.jsonl -> {key: (steps, values)}, {} without one. The last line counts for a step that was
    logged again after a resume."""
    series = {}
    for row in files.log_rows(path):
        for key in ('loss', 'train_accuracy', 'val_loss', 'val_accuracy', 'val_auc'):
            if type(row.get(key)) in (int, float):
                series.setdefault(key, {})[row['step']] = row[key]
    return {key: tuple(zip(*sorted(points.items()))) for key, points in series.items()}


def plot(folder, names, labels, y, every, results, logs):
    """Write curves.png (if there are logs), confusion.png and reliability.png (if there are
    probabilities) -> their paths. every: probs (N, K) or None of each run; y (N,) class ids;
    results: metrics() of each run; logs: read_log() of each run, {} without one."""
    names, figures = [plain(short(name, 28)) for name in names], {}
    ticks = [plain(short(label, 18)) for label in labels]
    if any(logs):
        figures['curves.png'] = curves(names, logs)
    figures['confusion.png'] = confusion(names, ticks, results)
    if every[0] is not None:
        figures['reliability.png'] = calibration(names, y, every, results)
    for name, fig in figures.items():
        png = io.BytesIO()
        # tight: square axes can stick out of the figure
        fig.savefig(png, dpi=150, format='png', bbox_inches='tight')
        files.write_atomic(os.path.join(folder, name), png.getvalue())
    return [os.path.join(folder, name) for name in figures]


def curves(names, logs):
    """Loss and accuracy by step, one colour per run."""
    fig = figure(10, 4)
    left, right = fig.subplots(1, 2)
    for i, (name, log) in enumerate(zip(names, logs)):
        left.plot([], [], color=f'C{i}', label=name)  # the legend's line, whatever the log holds
        for ax, pale, keys in (
            (left, 'loss', ('val_loss',)),
            (right, 'train_accuracy', ('val_accuracy', 'val_auc')),
        ):
            if pale in log:
                ax.plot(*log[pale], color=f'C{i}', alpha=0.4, lw=1)
            for key in log.keys() & set(keys):
                ax.plot(*log[key], color=f'C{i}', marker='o', ms=4)
    unit, score = 'nats per text', 'accuracy'
    if any('val_auc' in log for log in logs):  # classes of a generative run, in sequence
        unit, score = unit + ' (class: per token)', score + ' (class: area under ROC)'
    left.set(xlabel='step', ylabel=unit, title='loss (pale: training, dots: validation)')
    trained = any('train_accuracy' in log for log in logs)
    title = 'accuracy (pale: training, dots: validation)' if trained else 'validation accuracy'
    right.set(xlabel='step', ylabel=score, title=title)
    if left.get_ylim()[0] < 0:  # a margin below a loss near 0
        left.set_ylim(bottom=0)
    shown = [y for line in right.lines for y in line.get_ydata()]
    low = math.floor(min(shown, default=0) * 10) / 10  # a tenth: an axis of 0.995 to 1 misleads
    right.set_ylim(min(low, 0.9), 1.005)
    for ax in (left, right):
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(whole_numbers())
        ax.grid(alpha=0.3)
    fig.legend(loc='outside lower center', fontsize=8, ncols=3)
    return fig


def confusion(names, ticks, results):
    """A confusion matrix per run, coloured by row fractions so that rare classes show."""
    k, columns, lines = len(ticks), min(3, len(names)), -(-len(names) // 3)
    side = min(0.4 * k + 3, 14)  # inches
    fig = figure(columns * side, lines * side)
    axes = fig.subplots(lines, columns, squeeze=False).ravel()
    for ax, name, m in zip(axes, names, results):
        cm = np.array(m['confusion'])  # (K, K)
        fraction = divide(cm, cm.sum(1, keepdims=True))
        ax.imshow(fraction, cmap='Blues', vmin=0, vmax=1)
        ax.set(xlabel='prediction', ylabel='truth', title=f'{name}\naccuracy {m["accuracy"]:.4f}')
        if k <= 40:
            ax.set_xticks(range(k), ticks, rotation=45, ha='right', rotation_mode='anchor')
            ax.set_yticks(range(k), ticks)
        for i, j in np.ndindex(k, k) if k <= 20 else ():
            color = 'k' if fraction[i, j] < 0.6 else 'w'
            ax.text(j, i, cm[i, j], ha='center', va='center', fontsize=8, color=color)
    for ax in axes[len(names) :]:
        ax.remove()
    return fig


def calibration(names, y, every, results):
    """Accuracy by the probability of the predicted class, above the number of texts in each bin. It
    sets the area of a dot; the line leaves out bins of a single text."""
    fig = figure(5, 6.5)
    top, low = fig.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color='0.6', ls='--', lw=1, label='perfect calibration')
    for i, (name, probs, m) in enumerate(zip(names, every, results)):
        count, mean, accuracy = reliability(probs, y)
        label = f'{name}, ECE {m["ece"]:.3f}'
        top.plot(mean[count > 1], accuracy[count > 1], color=f'C{i}', label=label, lw=1)
        area = 8 + 150 * count / count.max()  # points^2
        rows = count > 0
        top.scatter(mean[rows], accuracy[rows], area[rows], color=f'C{i}', alpha=0.7, zorder=3)
        low.stairs(count, np.linspace(0, 1, len(count) + 1), color=f'C{i}', lw=1.5)
    least = 1 / every[0].shape[1]  # of the most probable of K classes
    top.set(ylabel='accuracy', xlim=(least - 0.05, 1.03), ylim=(-0.03, 1.03), title='reliability')
    low.set(xlabel='probability of the predicted class', ylabel='texts', ylim=(0, None))
    low.yaxis.set_major_locator(whole_numbers(4))
    top.grid(alpha=0.3)
    low.grid(alpha=0.3)
    fig.legend(loc='outside lower center', fontsize=8)
    return fig
