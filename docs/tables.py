"""The tables of docs/ whose numbers are in docs/results/: `python docs/tables.py` writes them to
their places, between `<!-- table NAME -->` and `<!-- end -->`; a test compares both."""

import glob
import os
import re
import sys

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if TOP not in sys.path:
    sys.path.insert(0, TOP)

from lib import cli, files
from lib.intervals import mean_interval

RESULTS = os.path.join(TOP, 'docs', 'results')
SMALL, LARGE = '1x64', '6x384'  # layers x width
NAMES = dict(sms='SMS', sst2='SST-2', agnews='AG News', imdb='IMDB')
METHODS = (
    'naive Bayes',
    'TF-IDF + logistic regression',
    *('discriminative', 'discriminative, lr 3e-4', 'generative'),
    *('discriminative, LoRA', 'generative, LoRA', 'generative, LoRA, posterior'),
)
BOTH = 'discriminative', 'generative'
SIZES = 8, 32, 128, 512, 'all'  # rows per class
MARKED = re.compile(r'(<!-- table (\w+) -->\n).*?(<!-- end -->)', re.S)


def experiments(shape=SMALL):
    """The accuracies of docs/experiments.py with models of a shape."""
    return [row for row in results('experiments')['rows'] if row['shape'] == shape]


def results(name):
    return files.read_json(os.path.join(RESULTS, f'{name}.json'))


def markdown(head, rows, right=0):
    """Lines of a table; columns from number `right` on are aligned to the right."""
    rule = ['---' if i < right else '---:' for i in range(len(head))]
    return ''.join(f'| {" | ".join(map(str, cells))} |\n' for cells in (head, rule, *rows))


def accuracies(rows, **key):
    """-> accuracies of the rows with this key in percent, one per seed"""
    return [100 * r['accuracy'] for r in rows if all(r.get(k) == v for k, v in key.items())]


def cell(rows, **key):
    """Mean over seeds and its 95 % interval (Student's t), in percent; one or two seeds as they
    are; empty if not measured."""
    found = accuracies(rows, **key)
    if len(found) < 3:
        return ', '.join(f'{value:.1f}' for value in found)
    mean, half = mean_interval(found)
    return f'{mean:.1f} ± {half:.1f}'


def sets(rows):
    return [name for name in NAMES if any(r['data'] == name for r in rows)]


def rows_per_class(shape=SMALL):
    rows = [r for r in experiments(shape) if r['experiment'] == 'rows']
    methods, lines = [m for m in METHODS if any(r['method'] == m for r in rows)], []
    for name in sets(rows):
        for size in SIZES:
            cells = [cell(rows, data=name, condition=size, method=m) for m in methods]
            lines += [(NAMES[name], size, *cells)] if any(cells) else []
    return markdown(('data', 'rows per class', *methods), lines, 1)


def larger():
    return rows_per_class(LARGE)


def larger_tests():
    """What the larger models of 512 rows per class do on other rows, and with unclean ones."""
    head = '40 % of the labels flipped', 'spurious token turned round', 'predicted'
    head += ('at 90 : 10', 'prior moved', '50 % of the tokens dropped')
    values = 0.4, 'turned', 'turned, predicted', 'as trained', 'moved', 0.5
    return conditions(None, head, values, LARGE)


def conditions(experiment, head, values, shape=SMALL):
    """A line per data set and method, a column per condition of an experiment, or of all."""
    every = experiments(shape)
    rows = [r for r in every if r['experiment'] == (experiment or r['experiment'])]
    lines = []
    for name in sets(rows):
        for method in BOTH:
            cells = [cell(rows, data=name, method=method, condition=v) for v in values]
            if experiment == 'noise':  # no label flipped: among the rows of the first experiment
                clean = dict(experiment='rows', condition=512)
                cells.insert(0, cell(every, data=name, method=method, **clean))
            lines += [(NAMES[name], method, *cells)] if any(cells) else []
    return markdown(('data', 'classifier', *head), lines, 2)


def noise():
    return conditions('noise', ('no label flipped', '20 %', '40 %'), (0.2, 0.4))


def spurious():
    head = 'test as in training', 'turned round', 'turned round, predicted without the token'
    return conditions('spurious', head, ('same', 'turned', 'turned, predicted'))


def prior():
    head = 'test at 90 : 10, prior of the training rows', 'prior moved'
    return conditions('prior', head, ('as trained', 'moved'))


def drop():
    return conditions('drop', ('all tokens', '10 % dropped', '30 %', '50 %'), (0.0, 0.1, 0.3, 0.5))


def accuracy():
    rows = results('accuracy')['rows']
    keys = 'data', 'trains', 'command', 'accuracy', 'time'
    head = 'data (test rows)', 'what trains', 'command', 'test accuracy, %', 'time'
    return markdown(head, [[row.get(key, '') for key in keys] for row in rows], 9)


def summary():
    """The table of README.md: some rows of the one above, in short."""
    lines = [row['short'] for row in results('accuracy')['rows'] if 'short' in row]
    return markdown(('test rows of', 'model', 'accuracy, %'), lines, 9)


def base():
    """What the base model of docs/base.py is worth: a line per data set, a column per method."""
    rows = results('base')['rows']
    methods = list(dict.fromkeys(r['method'] for r in rows))
    lines = []
    for name in sets(rows):
        found = {r['method']: r for r in rows if r['data'] == name}
        lines.append((NAMES[name], *(measured(found.get(method)) for method in methods)))
    return markdown(('data', *methods), lines, 1)


def measured(row):
    """Accuracy in percent, its 95 % interval, minutes for training and test; empty without one."""
    if not row:
        return ''
    low, high = (100 * bound for bound in row['ci95'])
    accuracy = f'{100 * row["accuracy"]:.1f} [{low:.1f}, {high:.1f}]'
    return f'{accuracy}, {row["minutes"]:.0f} min' if row['minutes'] >= 1 else accuracy


TABLES = dict(rows_per_class=rows_per_class, noise=noise, spurious=spurious, prior=prior)
TABLES.update(drop=drop, accuracy=accuracy, base=base, summary=summary)
TABLES.update(larger=larger, larger_tests=larger_tests)


def filled(text):
    """text with the present numbers in all of its marked tables."""
    return MARKED.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def pages():
    return [os.path.join(TOP, 'README.md'), *sorted(glob.glob(os.path.join(TOP, 'docs', '*.md')))]


def main(argv=None):
    cli.Parser(description=__doc__, prog='tables.py').parse(argv)
    for path in pages():
        with open(path, encoding='utf-8') as f:
            text = f.read()
        if filled(text) != text:
            files.write_atomic(path, filled(text))
            print(path)


if __name__ == '__main__':
    cli.run(main)
