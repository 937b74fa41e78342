"""A base model of our own, made on two CPU cores, and what it is worth.

    python docs/base.py

A language model of 6 blocks of width 384 reads the training texts of IMDB, AG News and SST-2,
without their labels and without any test text; then each data set is learned on top of it. The
same shape from random weights and TF-IDF with logistic regression stand beside it. Accuracies,
times and losses go to docs/results/base.json as they come; what it holds is not computed again."""

import os
import sys
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if TOP not in sys.path:
    sys.path.insert(0, TOP)

import data
import train_cls
import train_gen
from docs.experiments import finished, linear, write_texts
from lib import cli, files
from lib.files import UserError
from lib.intervals import wilson
from lib.measure import machine

SHAPE = '--scratch --model gpt2 --n_layer 6 --n_head 6 --n_embd 384 --block_size 256'
PRETRAIN = f'--pretrain {SHAPE} --max_length 255 --batch_tokens 4096 --lr 1.5e-3 --schedule cosine'
PRETRAIN += ' --weight_decay 0.1 --max_steps 1150 --eval_every 230 --log_every 50'
SETS = dict(
    imdb='--max_length 255 --keep last --batch_size 16',
    agnews='--max_length 128 --batch_size 32',
    sst2='--max_length 64 --batch_size 64',
)
FULL, LORA, SCRATCH = '--full --lr 3e-4', '--lora --r 16 --lr 2e-3', '--full --lr 5e-4'
TFIDF = 'TF-IDF + logistic regression'
METHODS = {  # flags; epochs of IMDB and of the others: its texts are long
    'full': (FULL, 1, 2),
    'LoRA': (LORA, 1, 2),
    'generative, LoRA': (LORA, 1, 1),
    'full, from random weights': (SCRATCH, 1, 2),
    TFIDF: ('', 0, 0),
}


class Book:
    """The file of the numbers."""

    def __init__(self, path):
        self.path = path
        self.found = files.read_json(path) if os.path.isfile(path) else dict(rows=[])
        self.found.update(command='python docs/base.py', machine=machine())

    def save(self):
        files.write_json(self.path, self.found)

    def note(self, **row):
        self.found['rows'].append(row)
        self.save()
        print(*row.values(), flush=True)

    def has(self, **key):
        return any(key.items() <= row.items() for row in self.found['rows'])


def base_model(book, folder):
    """-> folder of the language model, trained if it is not there"""
    base, texts = os.path.join(folder, 'base'), os.path.join(folder, 'texts.txt')
    if not os.path.isfile(os.path.join(base, 'run.json')):
        write_texts(texts, [text for name in SETS for text in data.load(name).train.texts])
        began = time.time()
        finished(train_gen.main([*PRETRAIN.split(), '--data', texts, '--out', base]))
        minutes = round((time.time() - began) / 60)
        found = dict(command=f'train_gen.py {PRETRAIN}', minutes=minutes, **losses(base))
        book.found['base'] = found
        book.save()
    return base


def losses(base):
    """-> {key: [[step, nats per token], ...]} of the training and of the validation texts."""
    rows, keys = files.log_rows(os.path.join(base, 'log.jsonl')), ('loss', 'val_loss')
    return {key: [[r['step'], round(r[key], 4)] for r in rows if key in r] for key in keys}


def learn(name, method, base):
    """Train one classifier -> its command, test accuracy, the accuracy's 95 % interval."""
    if method == TFIDF:
        ds = data.load(name)
        accuracy, n = linear(ds.train, ds.test), len(ds.test.y)
        if accuracy is None:
            raise UserError(f'{TFIDF} needs scikit-learn: install it, or leave it out (--methods)')
        return 'docs/base.py', accuracy, wilson(round(accuracy * n), n)
    script = train_gen if 'generative' in method else train_cls
    model = SHAPE.split() if 'random' in method else ['--model', base]
    flags, *epochs = METHODS[method]
    argv = ['--data', name, *flags.split(), '--epochs', str(epochs[name != 'imdb'])]
    argv += SETS[name].split()
    out = '-'.join((base, name, *method.replace(',', '').split()))
    test = finished(script.main([*argv, *model, '--out', out]))['test']
    return ' '.join([f'{script.__name__}.py', *argv, *model]), test['accuracy'], test['ci95']


def main(argv=None):
    p = cli.Parser(description=__doc__, prog='base.py')
    results = os.path.join(TOP, 'docs', 'results', 'base.json')
    add = p.add_argument
    add('--data', nargs='+', choices=SETS, default=list(SETS), help='data sets to learn')
    add('--methods', nargs='+', choices=METHODS, default=list(METHODS), help='ways to learn them')
    add('--out', default=os.path.join('runs', 'own'), metavar='DIR', help='where the models go')
    add('--json', default=results, metavar='FILE', help='where the numbers are, and go to')
    args, _ = p.parse(argv)
    book = Book(args.json)
    base = base_model(book, args.out)
    for method in args.methods:
        for name in args.data:
            key = dict(data=name, method=method)
            if not book.has(**key):
                began = time.time()
                command, accuracy, ci95 = learn(name, method, base)
                minutes = round((time.time() - began) / 60, 1)
                found = dict(accuracy=round(accuracy, 4), ci95=ci95, minutes=minutes)
                book.note(**key, **found, command=command)


if __name__ == '__main__':
    cli.run(main)
