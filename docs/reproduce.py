"""What nobody has measured here yet: pretrained GPT-2 on four data sets, each method, three seeds,
beside published figures. Needs the weights and the data, in the cache or from the network, and a
GPU or patience:

    python docs/reproduce.py                     all of it, to runs/reproduce
    python docs/reproduce.py --data sst2 sms     some of it
    python docs/reproduce.py --trial --out DIR   two steps of a small model: does it run?

Runs that are there are kept, and interrupted ones resumed, so it can be stopped at any time. The
table goes to results.md in the folder of the runs, the numbers to results.json."""

import os
import sys

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if TOP not in sys.path:
    sys.path.insert(0, TOP)

import subprocess

from lib import cli, files
from lib.files import UserError
from lib.intervals import mean_interval

# data | method | script and flags | published accuracy of GPT-2 small, %, and by whom
ROWS = """
sst2 | full | train_cls --full --lr 2e-5 --batch_size 32 --epochs 4 | 92.54 PavanNeerudu
sst2 | LoRA r 8 | train_cls --lora --r 8 --lr 2e-4 --epochs 2 | 91.63 jasonshao116
sst2 | adapter | train_cls --adapter --lr 1e-4 --epochs 2 | 92.55 jasonshao116
sst2 | prompt, 30 vectors | train_cls --prompt 30 --epochs 2 | 83.26 jasonshao116
sst2 | last 2 blocks | train_cls --last 2 --epochs 2 | -
sst2 | head | train_cls --head --epochs 2 | -
sst2 | generative, LoRA | train_gen --lora --epochs 2 | -
sst2 | generative, posterior steps | train_gen --lora --epochs 2 --posterior_steps 500 | -
sst2 | zero-shot | train_gen --zero_shot | -
sst2 | zero-shot, direct | train_gen --zero_shot --direct | -
imdb | full | train_cls --full --lr 5e-5 --epochs 1 --max_length 512 | 93.94 mnoukhov
imdb | last 2 | train_cls --last 2 --epochs 2 --max_length 256 --keep last | 92.36 varun-suresh
imdb | LoRA r 8 | train_cls --lora --epochs 2 --max_length 512 | -
imdb | generative, full | train_gen --full --epochs 2 --max_length 512 | 90.1 bigsnarfdude
imdb | generative, LoRA | train_gen --lora --epochs 2 --max_length 512 | -
imdb | zero-shot | train_gen --zero_shot --max_length 512 | -
imdb | zero-shot, direct | train_gen --zero_shot --direct --max_length 512 | 70.8 varun-suresh
agnews | full | train_cls --full --epochs 2 | - (fastText 92.5, BERT-base 94.5)
agnews | LoRA r 8 | train_cls --lora --epochs 2 | -
agnews | last 2 blocks | train_cls --last 2 --epochs 2 | -
agnews | generative, LoRA | train_gen --lora --epochs 2 | -
agnews | zero-shot | train_gen --zero_shot | -
sms | last block | train_cls --balance --last 1 --lr 5e-5 --batch_size 8 --epochs 5 | 98.33 rasbt
sms | full | train_cls --balance --full --lr 5e-5 --batch_size 8 --epochs 5 | 96.67 rasbt
sms | LoRA r 16 | train_cls --balance --lora --r 16 --epochs 5 | 96.67 rasbt
sms | head | train_cls --balance --head --epochs 5 | 72.0 rasbt
sms | generative, LoRA | train_gen --balance --lora --epochs 5 | -
sms | zero-shot | train_gen --balance --zero_shot | -
"""
ROWS = [[cell.strip() for cell in line.split('|')] for line in ROWS.strip().split('\n')]
TRIAL = '--scratch --n_layer 2 --n_head 2 --n_embd 32 --max_samples 8 --eval_samples 8'


def accuracy(script, flags, out):
    """Train a run, or go on with it, or read what it gave -> test accuracy in %."""
    results = os.path.join(out, 'eval_results.json')
    if not os.path.isfile(results):
        started = os.path.isfile(os.path.join(out, 'resume.pt'))
        flags = ['--resume'] if started else flags
        command = [sys.executable, os.path.join(TOP, f'{script}.py'), *flags, '--out', out]
        print(f'{script}.py', *command[2:], flush=True)
        code = subprocess.run(command).returncode
        if code:
            raise UserError(f'{script}.py ended with exit code {code}; the lines above say why')
    return 100 * files.read_json(results)['accuracy']


def small(flags):
    """Flags of --trial: a small model with random weights, and two steps."""
    flags = list(flags)
    if '--posterior_steps' in flags:
        flags[flags.index('--posterior_steps') + 1] = '1'
    if '--epochs' in flags:
        i = flags.index('--epochs')
        del flags[i : i + 2]
    steps = [] if '--zero_shot' in flags else ['--max_steps', '2']
    return [*flags, *TRIAL.split(), *steps]


def table(found):
    """{(data, method): accuracies of its runs, in %} -> Markdown"""
    lines = ['| data | method | flags | test accuracy, % | published |', '|---|---|---|---|---|']
    for data, method, command, published in ROWS:
        values = found.get((data, method))
        if values:
            mean, half = mean_interval(values)
            cell = ', '.join(f'{value:.2f}' for value in values)
            cell = cell if half is None else f'{mean:.2f} +- {half:.2f} ({cell})'
            lines.append(f'| {data} | {method} | `{command}` | {cell} | {published} |')
    return '\n'.join(lines) + '\n'


def main(argv=None):
    p, names = cli.Parser(description=__doc__, prog='reproduce.py'), sorted({r[0] for r in ROWS})
    add = p.add_argument
    add('--data', nargs='+', choices=names, default=names, help='data sets')
    add('--model', default='gpt2', help='as for train_cls.py')
    add('--seeds', nargs='+', type=int, default=[1337, 2, 3], help='one run for each')
    add('--out', default='runs/reproduce', metavar='DIR', help='folder of the runs')
    add('--trial', action='store_true', help='a small model, random weights, two steps, one seed')
    args, _ = p.parse(argv)
    found = {}
    for data, method, command, _ in [row for row in ROWS if row[0] in args.data]:
        script, *flags = command.split()
        trains = '--zero_shot' not in flags  # else the seed decides nothing
        for seed in args.seeds if trains and not args.trial else args.seeds[:1]:
            name = '-'.join([data, *method.replace(',', '').split(), str(seed)])
            run = os.path.join(os.path.abspath(args.out), name)
            own = ['--data', data, '--model', args.model]
            own += ['--seed', str(seed)] if trains else []
            own += small(flags) if args.trial else flags
            found.setdefault((data, method), []).append(accuracy(script, own, run))
        rows = [dict(data=d, method=m, accuracies=values) for (d, m), values in found.items()]
        files.write_json(os.path.join(args.out, 'results.json'), rows)
        files.write_atomic(os.path.join(args.out, 'results.md'), table(found))
    print(table(found), end='')


if __name__ == '__main__':
    cli.run(main)
