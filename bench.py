"""Measure speed and memory on this machine, beside Hugging Face's Trainer + PEFT if installed.

    python bench.py --task lora --against hf      training; also full, last, head, adapter
    python bench.py --task eval --against hf      evaluation of a LoRA model
    python bench.py --task gen --against hf       generative scoring of AG News with four classes
    python bench.py --task predict --against hf   predict.py on a file, opening the run included
    python bench.py --task startup --against hf   seconds from the command line to one answer
    python bench.py --task lora --length 128 --steps 4      peak memory: every text has 128 tokens
    python bench.py --gpu             all that a GPU has to show, in ten minutes
    python bench.py --task curves --data sms --repeats 3      accuracy by number of rows, no speed

Both sides use random weights of GPT-2's shape, real texts (SST-2; gen: AG News), the same token
ids, rows and batch size. Our side is the scripts themselves. head and last are timed from the
second epoch on, on a subset that is read several times. --hf names the peers:
  default  TrainingArguments as they come: float32, GPT-2's dropout 0.1, random batches padded to
           their longest text
  half     the same with --bf16
  best     every setting that makes it fast: --dtype, dropout as ours, batches of like length,
           evaluation with weights in half precision
For gen, the peers are a float32 model per class that reads one text at a time; one in --dtype that
reads eight; one that reads eight of like length. For predict, they are a loop over batches of 16 in
the file's order; the same in --dtype; batches of like length. For startup, `default` is PEFT on top
of the base model, the others the merged model without PEFT; none loads a tokenizer.

The sides alternate, each in its own process. Figures are medians over blocks of steps after a
warm-up. Memory is the peak of the process (pages of a mapped file count once they are read), on
CUDA the peak of PyTorch's allocator. GFLOP/s counts the arithmetic that the real tokens need
(lib/measure.py); the percentage is relative to square matrix products in --dtype, measured in the
same run.
"""

from lib import start

start.script(__name__)

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import data
import lora
import predict
import train_cls
from lib import cli, device, files, measure, peers, runs, scoring, tokens, training, workload
from lib.files import UserError
from lib.flags import TARGETS
from lib.measure import CLASSES, flops, matmul_rate, peak_memory, timed
from lib.peers import PEERS, precision
from model import GPT, SHAPES

# Training steps of a timed block: data.WINDOW batches are sorted by length together, so a block has
# the padding of a long run. Trainer sorts 50 together: any 50 steps see all lengths.
STEPS = data.WINDOW
EPOCHS = 5  # of our training; the first warms up: frozen blocks run, kernels are made, memory grows
ROWS = dict(eval=3000, gen=96, predict=4000)  # default of --rows
METHODS = dict(lora='--lora', full='--full', last='--last 1', head='--head', adapter='--adapter')
HERE = os.path.dirname(os.path.abspath(__file__))
TEXT = 'a gorgeous, witty film'
SPEEDS = ('examples_per_s', 'tokens_per_s', 'pad_share')


# --- our side ---


class Done(Exception):
    """The last measured step has been logged."""


def ours(args, folder):
    """-> [speeds of a block of steps], lengths in tokens of the texts"""
    if args.task in METHODS:
        return ours_train(args, folder)
    batches, collate = [], data.collate

    def counting(*args, **kwargs):
        ids, n = collate(*args, **kwargs)
        batches.append((len(ids), int(n.sum()), ids.numel()))
        return ids, n

    data.collate = counting
    try:
        run, lengths = ours_predict(args) if args.task == 'predict' else ours_score(args, folder)
        return [timed(run, batches, args.device)], lengths
    finally:
        data.collate = collate


def ours_predict(args):
    """-> what is to be timed, lengths of the texts"""
    texts, answers = (os.path.join(args.shared, name) for name in ('texts.txt', 'answers'))
    command = [os.path.join(args.shared, 'run'), '--file', texts, '--out', answers]
    command += ['--device', args.device, '--dtype', args.dtype]
    return lambda: predict.main(command), workload.tokens_of(workload.texts_of(args)[0]).lengths


def ours_score(args, folder):
    """-> what is to be timed for eval and gen, lengths of the texts. The model is warm."""
    how = runs.How(*device.pick_device(args.device, args.dtype), data_dir=None, plain=False)
    if args.task == 'gen':  # one base model and one LoRA per class
        texts, score = workload.agnews_texts(args), scoring.text_logprobs
        model = GPT.from_pretrained(folder)
        lora.add_lora(model, 8, 16.0, 0.0, TARGETS.split(','), classes=CLASSES, top=args.top)
    else:
        texts, score = workload.texts_of(args)[0], scoring.class_logits
        model = GPT.from_pretrained(folder, num_labels=2, new_head=True)
        lora.adapt(model, 'lora', r=8, alpha=16.0, targets=TARGETS.split(','))
    runs.prepare(model, how)
    rows = workload.tokens_of(texts, args.length)
    run = lambda: score(model, rows, 1024, 'first', how.device, how.dtype)  # noqa: E731
    run()
    return run, rows.lengths


def ours_train(args, folder):
    """Run train_cls.py until its last step is logged, without the evaluation and the final test
    after it. Every epoch but the first is a block."""
    train = workload.training_rows(args, workload.per_class(args))
    epoch = math.ceil(len(train.y) / args.batch_size)
    steps, blocks, log = epoch * EPOCHS, [], training.Log

    class Watched(log):
        def write(self, *args, **record):
            super().write(*args, **record)
            if 'loss' in record:
                blocks.append(record)
                if record['step'] == steps:
                    raise Done

    if args.length:
        command = ['--data', workload.texts_csv(args), '--max_length', str(args.length)]
    else:  # one epoch = --steps steps, so every block has texts of the same lengths
        command = ['--data', 'sst2', '--max_samples', str(workload.per_class(args))]
    command += ['--batch_size', str(args.batch_size), *METHODS[args.task].split()]
    command += ['--max_steps', str(steps), '--log_every', str(epoch), '--eval_every', '1000000']
    command += ['--device', args.device, '--dtype', args.dtype, *args.extra.split()]
    command += ['--model', folder]
    training.Log = Watched
    try:
        with tempfile.TemporaryDirectory() as tmp:
            train_cls.main([*command, '--out', os.path.join(tmp, 'run')])
        raise UserError(f'train_cls.py ended without logging step {steps}')
    except Done:
        pass
    finally:
        training.Log = log
    blocks = [{name: r[name] for name in SPEEDS} for r in blocks if r['step'] > epoch]
    return blocks, workload.tokens_of(train.texts, args.length).lengths


# --- turns ---


def worker(args):
    """One turn of a side, in the process that main starts for it. Prints a line of JSON: speeds of
    the blocks, peak memory in MiB, and the mean arithmetic per token."""
    folder = workload.base_folder(args.model)
    side = args.worker
    blocks, lengths = ours(args, folder) if side == 'nanocls' else peers.theirs(args, folder, side)
    memory = peak_memory(args.device)
    per_token = flops(args.task, SHAPES[args.model], lengths, args.top) / float(lengths.sum())
    print(json.dumps(dict(blocks=blocks, memory=memory, flops_per_token=per_token)))


def checked(command, what):
    """What a command prints. Raises UserError if it fails."""
    p = subprocess.run(command, capture_output=True, text=True)
    if p.returncode:
        raise UserError(f'{what} failed: {" ".join(p.stderr.split())[-500:]}')
    return p.stdout


def python(script, *flags):
    """The command that runs one of the scripts."""
    return [sys.executable, os.path.join(HERE, script), *flags]


def prepare(args, folder):
    """Write what the sides share into args.shared: texts.csv for --length; a run and a file of
    texts for predict and startup."""
    place = lambda name: os.path.join(args.shared, name)  # noqa: E731
    if args.length:
        # all texts have one length, so a short epoch is as good as a long one
        steps = args.steps if args.task in ('head', 'last') else min(args.steps, 4)
        rows = args.rows or args.batch_size * steps
        n = max(rows, 20)
        while n - 2 * (n // 10) < rows:  # a tenth each becomes validation and test rows
            n += 1
        labels = ['negative', 'positive'] * (n // 2) + ['negative'] * (n % 2)
        texts = workload.texts_of_length(args.length, n)
        workload.write_rows(workload.texts_csv(args), texts, labels)
    if args.task in ('predict', 'startup'):
        ds = data.load('sst2', max_samples=20)
        workload.write_rows(place('few.csv'), ds.train.texts, [ds.labels[c] for c in ds.train.y])
        flags = ['--data', place('few.csv'), '--model', folder, '--lora', '--max_steps', '1']
        flags += ['--device', args.device, '--dtype', args.dtype, '--out', place('run')]
        checked(python('train_cls.py', *flags), 'training a run')
        if args.against:
            command = python('predict.py', place('run'), '--export', place('exported'))
            checked(command, 'exporting the run')
    if args.task == 'predict':
        with open(place('texts.txt'), 'w', encoding='utf-8') as f:
            f.writelines(' '.join(text.split()) + '\n' for text in workload.texts_of(args)[0])


def startup(args, folder, side):
    """Seconds that a new process needs to answer one text -> as from a worker."""
    run = os.path.join(args.shared, 'run')
    if side == 'nanocls':
        command = python('predict.py', run, TEXT, '--device', args.device, '--dtype', args.dtype)
    elif side == 'floor':
        command = [sys.executable, '-c', 'import torch, numpy']
    else:
        exported = os.path.join(args.shared, 'exported')
        where = [folder, run] if side == 'default' else [exported, '']
        dtype = str(device.DTYPES[precision(args, side)]).replace('torch.', '')
        ids = json.dumps(tokens.tokenizer('gpt2').encode_ordinary(TEXT))
        command = [sys.executable, '-c', peers.ANSWER, *where, args.device, dtype, ids]
    start = time.perf_counter()
    checked(command, side)
    return dict(blocks=[dict(seconds=time.perf_counter() - start)])


def parse(argv):
    p = cli.Parser(description=__doc__, prog='bench.py')
    add, positive, dtypes = cli.group(p, 'what to measure'), cli.positive, ('bf16', 'fp32')
    tasks = (*METHODS, 'eval', 'gen', 'startup', 'predict', 'curves')
    rows = ', '.join(f'{task} {n}' for task, n in ROWS.items())
    gpu = 'cuda' if torch.cuda.is_available() else 'cpu'
    add('--task', 'what to measure', tasks, 'lora')
    add('--steps', 'training steps per block; 4 do for memory', positive, STEPS)
    add('--repeats', 'turns per side; for curves, number of seeds', positive, 2)
    add('--json', 'write the figures to FILE', metavar='FILE')
    add = cli.group(p, 'peers')
    add('--against', 'run the peers; needs transformers, for LoRA also PEFT', ('hf',))
    add('--hf', 'which peers (default: all)', tuple(PEERS), list(PEERS), nargs='+')
    text = 'of the peers (default: fp32 of `default`, --dtype of the others)'
    add('--hf_dtype', text, dtypes)
    add = cli.group(p, 'model and texts')
    shapes = tuple(name for name in SHAPES if name != 'nano')
    add('--model', 'shape of the model; weights are random', shapes, 'gpt2')
    add('--top', 'LoRA in the last M blocks only, for gen (default: all)', positive, metavar='M')
    add('--extra', 'flags of train_cls.py, as --extra=--plain', default='', metavar='FLAGS')
    add('--base', 'base model, for curves (default: train one)', metavar='DIR')
    add('--batch_size', 'rows per step, and per batch of Trainer', positive, 16)
    add('--rows', f'number of texts (default: {rows})', positive)
    add('--split', 'texts of SST-2, for eval and predict', ('train', 'validation'), 'train')
    text = 'texts of N tokens, for training and eval (default: as they are)'
    add('--length', text, positive)
    add('--data', 'data set, for curves', ('agnews', 'sms'), 'agnews')
    add('--seed', 'first seed, for curves', int, 1)
    add = cli.group(p, 'system')
    add('--device', 'cpu or cuda', default=gpu, metavar='NAME')
    add('--dtype', 'matmul precision (default: bf16 where it is native)', dtypes)
    add('--worker', '(internal: take one turn of this side)', metavar='SIDE')
    add('--shared', '(internal: folder that the sides share)', metavar='DIR')
    args, _ = p.parse(argv)
    if not args.dtype:
        native = not args.device.startswith('cpu') or device.cpu_has_bf16()
        args.dtype = 'bf16' if native else 'fp32'
    return args


def check(args):
    """Refuse flags that would do nothing or do not fit."""
    positions = SHAPES[args.model].block_size
    if args.length and args.task not in (*METHODS, 'eval'):
        raise UserError(f'--length does nothing with --task {args.task}')
    if args.length and args.length > positions:
        raise UserError(f'--length {args.length} does not fit: the model has {positions} positions')
    if args.rows and args.task not in ROWS:
        way_out = '; --steps sets how many rows are read' if args.task in METHODS else ''
        raise UserError(f'--rows does nothing with --task {args.task}{way_out}')
    args.rows = args.rows or ROWS.get(args.task)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if '--gpu' in argv:
        from lib import gpubench

        return gpubench.main(argv)
    args = parse(argv)
    if args.task == 'curves':
        from docs import curves

        return curves.run(args)
    check(args)
    if args.worker:
        return worker(args)

    folder = workload.base_folder(args.model)
    peers_run = list(dict.fromkeys(args.hf)) if args.against else []
    if peers_run and args.task == 'adapter':
        print('PEFT has no Houlsby adapters: there is no peer')
        peers_run = []
    sides = ['nanocls', *peers_run, *(['floor'] if args.task == 'startup' else [])]
    names = {side: f'Hugging Face {side}' for side in sides}
    names.update(nanocls='nanocls', floor='import torch, numpy')
    turns, rates = {side: [] for side in sides}, []
    with tempfile.TemporaryDirectory() as args.shared:
        prepare(args, folder)
        if args.task == 'startup':  # the first time, the files come from the disk
            for side in sides:
                startup(args, folder, side)
        for turn in range(args.repeats):  # alternating, so that other load hits all sides alike
            rates.append(matmul_rate(args.device, device.DTYPES[args.dtype]))
            for side in sides:
                if args.task == 'startup':
                    turns[side].append(startup(args, folder, side))
                else:
                    flags = [*argv, '--worker', side, '--shared', args.shared]
                    out = checked(python('bench.py', *flags), names[side])
                    turns[side].append(json.loads(out.splitlines()[-1]))
                row = measure.row_of(turns[side][-1:], rates[-1])
                print(f'turn {turn + 1}, {measure.line_of(names[side], row).strip()}', flush=True)
    rate = statistics.median(rates)
    rows = {names[side]: measure.row_of(turns[side], rate) for side in sides}
    setting = f'{args.task}, {args.model}, {args.device}, {args.dtype}'
    print(f'\n{setting}; matrix products reach {rate:.0f} GFLOP/s')
    print('\n'.join(measure.line_of(name, row) for name, row in rows.items()))
    flags = ('task', 'model', 'batch_size', 'length', 'device', 'dtype')
    result = {name: getattr(args, name) for name in flags}
    result.update(hf_dtype={peer: precision(args, peer) for peer in peers_run})
    result.update(torch=torch.__version__, threads=torch.get_num_threads())
    result.update(matmul_gflops=rate, rows=rows, **measure.ratios(rows, peers_run))
    if args.json:
        files.write_json(args.json, result)


if __name__ == '__main__':
    # SIGTERM raises, so that subprocess.run also ends the worker
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cli.run(main)
