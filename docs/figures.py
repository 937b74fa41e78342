"""The pictures of README.md and docs/, drawn from the numbers in docs/results/.

    python docs/figures.py                        draws docs/*.svg
    python docs/figures.py --runs CLS GEN OTHER   first takes the numbers of docs/results/runs.json
                                                  from runs that the commands in it trained

Nothing but SVG is written here, in colours that can be read on white and on black."""

import html
import os
import sys

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if TOP not in sys.path:
    sys.path.insert(0, TOP)

import numpy as np

from docs.tables import SIZES, accuracies, experiments, results, sets
from lib import cli, files
from lib.explain import explain
from lib.intervals import mean_interval
from lib.measure import machine
from lib.metrics import reliability, run_metrics
from lib.page import BLUE, RED
from lib.rundata import own_data
from lib.runs import open_run

DOCS = os.path.join(TOP, 'docs')
GREY, GREEN, OCHRE = '#7a828c', '#2f9e6e', '#b8862b'
LINES = {  # method: colour, dashes
    'naive Bayes': (GREEN, ''),
    'TF-IDF + logistic regression': (OCHRE, ''),
    'discriminative': (BLUE, ''),
    'discriminative, LoRA': (BLUE, '5 4'),
    'generative': (RED, ''),
    'generative, LoRA': (RED, '5 4'),
}
TITLES = dict(sms='SMS Spam', sst2='SST-2', agnews='AG News', imdb='IMDB')
SMALL = '--scratch --model gpt2 --n_layer 1 --n_head 1 --n_embd 64 --block_size 66 --max_length 64'
COMMANDS = [
    'python train_cls.py --data demo --lora --r 8',
    'python train_gen.py --data demo --lora --r 8',
    f'python train_gen.py --data sms --full --lr 2e-3 {SMALL} --max_steps 400',
]
TEXT = 'the music sounded warm, but the garden was not at all lovely'


class Picture:
    """An SVG of a width and a height in pixels, (0, 0) at the top left."""

    def __init__(self, width, height):
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        font = 'font-family="sans-serif" font-size="12"'
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>']

    def text(self, x, y, words, colour=GREY, anchor='start', weight='normal'):
        style = f'fill="{colour}" text-anchor="{anchor}" font-weight="{weight}"'
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(words)}</text>')

    def line(self, points, colour=GREY, dashes='', width=2.0):
        points = ' '.join(f'{x:.1f},{y:.1f}' for x, y in points)
        style = f'stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"'
        self.parts.append(f'<polyline points="{points}" fill="none" {style}/>')

    def box(self, x, y, width, height, colour, opacity=1.0):
        size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.parts.append(f'<rect {size} rx="2" fill="{colour}" fill-opacity="{opacity:.2f}"/>')

    def dot(self, x, y, radius, colour):
        where = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"'
        self.parts.append(f'<circle {where} fill="{colour}" fill-opacity="0.75"/>')

    def save(self, name):
        path = os.path.join(DOCS, name)
        files.write_atomic(path, '\n'.join(self.parts) + '\n</svg>\n')
        print(path)


class Axes:
    """A plot in a part of a picture: x from 0 to 1, y from low to high, by default in percent."""

    def __init__(self, picture, left, top, width, height, low, high=100):
        self.picture, self.left, self.top = picture, left, top
        self.width, self.height, self.low, self.high = width, height, low, high
        step = 1 if high < 20 else 20 if low < 50 else 10
        for value in np.arange(low, high + 1, step):
            _, y = self.at(0, value)
            picture.line([(left, y), (left + width, y)], width=0.4)
            picture.text(left - 6, y + 4, f'{value:.0f}', anchor='end')

    def at(self, x, value):
        y = self.top + self.height * (self.high - value) / (self.high - self.low)
        return self.left + self.width * x, y

    def title(self, words):
        self.picture.text(self.left, self.top - 10, words, weight='bold')


def curves(rows):
    """Accuracy by training rows per class, a panel per data set; bars are the 95 % intervals of
    the means over seeds (Student's t)."""
    rows = [row for row in rows if row['experiment'] == 'rows']
    names = sets(rows)
    p = Picture(300 * len(names) + 10, 330)
    for i, (method, (colour, dashes)) in enumerate(LINES.items()):
        x, y = 40 + 215 * (i // 2), 16 + 18 * (i % 2)
        p.line([(x, y - 4), (x + 24, y - 4)], colour, dashes)
        p.text(x + 30, y, method, colour)
    for i, name in enumerate(names):
        lowest = min(row['accuracy'] for row in rows if row['data'] == name)
        axes = Axes(p, 300 * i + 40, 76, 250, 200, 20 * np.floor(5 * lowest))
        axes.title(f'{TITLES[name]}, test accuracy in %')
        for j, size in enumerate(SIZES):
            p.text(axes.at(0.04 + 0.23 * j, 0)[0], 296, str(size), anchor='middle')
        p.text(axes.at(0.5, 0)[0], 318, 'training rows per class', anchor='middle')
        for method, (colour, dashes) in LINES.items():
            points = []
            for j, size in enumerate(SIZES):
                found = accuracies(rows, data=name, method=method, condition=size)
                if found:
                    mean, half = mean_interval(found)
                    points.append(axes.at(0.04 + 0.23 * j, mean))
                    half = half if len(found) > 2 else 0  # of two seeds it says nothing
                    ends = (max(axes.low, mean - half), min(100, mean + half))
                    p.line([axes.at(0.04 + 0.23 * j, e) for e in ends], colour, width=0.7)
                    p.dot(*points[-1], 2.5, colour)
            p.line(points, colour, dashes)
    p.save('curves.svg')


def calibration(found):
    """Accuracy by predicted probability, without tau and b_c and with them; areas are numbers of
    texts."""
    p = Picture(640, 330)
    for i, (name, title) in enumerate(dict(bayes="Bayes' rule", calibrated='tau, b_c').items()):
        bins, low = found['reliability'][name], 100 / found['classes']
        axes = Axes(p, 320 * i + 40, 50, 260, 220, 0)
        axes.title(f'{title}: ECE {found["ece"][name]:.3f}')
        p.line([axes.at(0, low), axes.at(1, 100)], dashes='4 4', width=1)
        for x, words in ((0, f'{low:.0f}'), (1, '100')):
            p.text(axes.at(x, 0)[0], 288, words, anchor='middle')
        p.text(axes.at(0.5, 0)[0], 312, 'probability of the predicted class, %', anchor='middle')
        most = max(n for n, _, _ in bins)
        for n, probability, accuracy in bins:
            x = (100 * probability - low) / (100 - low)
            p.dot(*axes.at(x, 100 * accuracy), 2 + 10 * (n / most) ** 0.5, (RED, BLUE)[i])
    p.text(40, 20, 'accuracy in %, ' + found['calibrated'])
    p.save('reliability.svg')


def explained(found):
    """What every word of a text does for the decision: a bar per word, for both classifiers."""
    kinds = dict(discriminative='leaving the word out lowers the lead by (logits)')
    kinds['generative'] = 'log P(word | class) - log P(word | other class), nats'
    rows = max(len(e['words']) for e in found['explained'].values())
    p = Picture(760, 70 + 22 * rows)
    for i, (kind, what) in enumerate(kinds.items()):
        e, left = found['explained'][kind], 380 * i
        p.text(left + 10, 16, f'{kind}: {e["label"]} ({100 * e["probability"]:.0f} %)', BLUE)
        p.text(left + 10, 36, what)
        scale = 90 / max(abs(value) for _, value in e['words'])
        for j, (word, value) in enumerate(e['words']):
            y, length = 62 + 22 * j, abs(value) * scale
            p.text(left + 80, y, word.strip(), anchor='end')
            start = left + 220 - (length if value < 0 else 0)
            p.box(start, y - 11, length, 14, BLUE if value > 0 else RED, 0.8)
            end = left + 220 + (length + 5 if value > 0 else -length - 5)
            p.text(end, y, f'{value:+.2f}', anchor='start' if value > 0 else 'end')
    p.save('explained.svg')


def speed(found):
    """Bars of what was measured beside each other, a group per task."""
    groups = found['groups']
    p, y = Picture(720, 20 + sum(34 + 22 * len(g['values']) for g in groups)), 20
    for group in groups:
        p.text(10, y, f'{group["what"]}, {group["unit"]}', weight='bold')
        scale = 340 / max(group['values'].values())
        for name, value in group['values'].items():
            y += 22
            ours = name.startswith('nanocls')
            p.text(250, y, name, BLUE if ours else GREY, 'end')
            p.box(258, y - 12, scale * value, 15, BLUE if ours else GREY, 0.85)
            p.text(264 + scale * value, y, f'{value:,.4g}')
        y += 34
    p.save('speed.svg')


def loss(found):
    """Loss of our own base model by steps: the mean since the last point on training texts, and on
    validation texts."""
    p, last = Picture(520, 290), found['val_loss'][-1][0]
    values = [value for key in ('loss', 'val_loss') for _, value in found[key]]
    axes = Axes(p, 40, 40, 450, 190, np.floor(min(values)), np.ceil(max(values)))
    axes.title('nats per token')
    for key, colour, words, x in (
        ('loss', GREY, 'training texts', 300),
        ('val_loss', RED, 'validation texts', 400),
    ):
        points = [axes.at(step / last, value) for step, value in found[key]]
        p.line(points, colour)
        p.text(x, 30, words, colour)
        for point in points:
            p.dot(*point, 2.5, colour)
    for step, _ in [(0, 0), *found['val_loss']]:
        p.text(axes.at(step / last, 0)[0], 250, f'{step:,}', anchor='middle')
    p.text(axes.at(0.5, 0)[0], 274, 'steps of at most 4,096 tokens', anchor='middle')
    p.save('loss.svg')


def of_runs(cls, gen, other):
    """Two runs that explain TEXT, a generative run that shows its calibration -> the numbers of
    explained() and calibration(), as a dict."""
    found = dict(commands=COMMANDS, machine=machine(), text=TEXT)
    found.update(reliability={}, ece={}, explained={})
    for kind, path in dict(discriminative=cls, generative=gen).items():
        run = open_run(path)
        words = [(word, round(float(value), 3)) for word, value in explain(run, TEXT)[1]]
        probs = run.probs(run.logits([TEXT]))[0]
        label, probability = run.labels[int(probs.argmax())], round(float(probs.max()), 4)
        found['explained'][kind] = dict(label=label, probability=probability, words=words)
    run = open_run(other)
    ds = own_data(run.info)
    logits, y = run.logits(ds.test.texts), ds.test.y
    found.update(
        classes=len(run.labels), calibrated=f'generative run on {ds.name}, {len(y):,} texts'
    )
    for run.rule in ('bayes', 'calibrated'):
        m, probs = run_metrics(run, logits, y, ds.labels)
        count, mean, accuracy = reliability(probs, y)
        bins = zip(count.tolist(), mean.round(4).tolist(), accuracy.round(4).tolist())
        found['reliability'][run.rule] = [row for row in bins if row[0]]
        found['ece'][run.rule] = round(m['ece'], 4)
    return found


def main(argv=None):
    p = cli.Parser(description=__doc__, prog='figures.py')
    runs = dict(nargs=3, metavar=('CLS', 'GEN', 'OTHER'))
    p.add_argument('--runs', **runs, help='a classifier and a generative run on the demo, another')
    args, _ = p.parse(argv)
    if args.runs:
        files.write_json(os.path.join(DOCS, 'results', 'runs.json'), of_runs(*args.runs))
    found = results('runs')
    curves(experiments())
    calibration(found)
    explained(found)
    speed(results('speed'))
    loss(results('base')['base'])


if __name__ == '__main__':
    cli.run(main)
