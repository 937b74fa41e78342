"""Measure speed and memory on this machine, beside the peers that are installed.

    python bench.py --task lora --against hf      training; also full, last, head, adapter
    python bench.py --task eval --against all     evaluation of a LoRA model
    python bench.py --task gen --against all      generative scoring of AG News with four classes
    python bench.py --task predict --against all  predict.py on a file, opening the run included
    python bench.py --task startup --against hf   seconds from the command line to one answer
    python bench.py --task eval --against onnxruntime --dtype fp32 int8      ours in two precisions
    python bench.py --task lora --length 128 --steps 4      peak memory: every text has 128 tokens
    python bench.py --gpu             all that a GPU has to show, in ten minutes

Both sides use random weights of GPT-2's shape, real texts (SST-2; gen: AG News), the same token
ids, rows and batch size. Our side is the scripts themselves. head and last are timed from the
second epoch on, on a subset that is read several times. The peers, with --against hf (--hf):
  default  TrainingArguments as they come: float32, GPT-2's dropout 0.1, random batches padded to
           their longest text
  half     the same with --bf16
  best     every setting that makes it fast: --dtype, dropout as ours, batches of like length,
           evaluation with weights in half precision
For gen, the peers are a float32 model per class that reads one text at a time; one in --dtype that
reads eight; one that reads eight of like length. For predict, they are a loop over batches of 16 in
the file's order; the same in --dtype; batches of like length. For startup, `default` is PEFT on top
of the base model, the others the merged model without PEFT; none loads a tokenizer.
For eval and predict, onnxruntime (float32; int8 by quantize_dynamic) and openvino (float32; bf16)
read an export of the classifier, in batches like ours. For gen, ctranslate2 has a language model
per class (float32; int8). They run on a CPU. A peer that cannot run is a row that says why.

The sides alternate, each in its own process; float32 comes first. Texts or steps are reduced so
that a table takes at most --minutes. Figures are medians over blocks of steps after a warm-up.
Memory is the peak of the process (pages of a mapped file count once they are read), on
CUDA the peak of PyTorch's allocator. GFLOP/s counts the arithmetic that the real tokens need
(lib/measure.py); the percentage is relative to square matrix products in the precision of the row
(of int8: in the faster of bf16 and fp32), measured in the same run.
"""

from lib import start

start.script(__name__)

import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import time

import torch

import data
import lora
import predict
import train_cls
from lib import (
    cli,
    device,
    files,
    measure,
    onnxpeers,
    peers,
    runs,
    scoring,
    tokens,
    training,
    workload,
)
from lib import sides as plan
from lib.files import UserError
from lib.flags import TARGETS
from lib.measure import CLASSES, flops, peak_memory, timed
from lib.peers import PEERS, precision
from lib.workload import METHODS, ROWS, checked, python
from model import GPT, SHAPES

# Training steps of a timed block: data.WINDOW batches are sorted by length together, so a block has
# the padding of a long run. Trainer sorts 50 together: any 50 steps see all lengths.
STEPS = data.WINDOW
EPOCHS = 5  # of our training; the first warms up: frozen blocks run, kernels are made, memory grows
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
    if args.task == 'gen':  # one base model and one LoRA per class
        how = runs.How(*device.pick_device(args.device, args.dtype), data_dir=None, plain=False)
        model = GPT.from_pretrained(folder)
        lora.add_lora(model, 8, 16.0, 0.0, TARGETS.split(','), classes=CLASSES, top=args.top)
        runs.prepare(model, how)
        rows, where = workload.tokens_of(workload.agnews_texts(args)), (how.device, how.dtype)
        run = lambda: scoring.text_logprobs(model, rows, 1024, 'first', *where)  # noqa: E731
    else:
        opened = runs.open_run(os.path.join(args.shared, 'run'), args.device, args.dtype)
        rows = workload.tokens_of(workload.texts_of(args)[0], args.length)
        run = lambda: opened.logits_of(rows)  # noqa: E731
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
    folder, side = workload.base_folder(args.model), args.worker
    engine, _, dtype = side.partition(' ')
    if engine == 'nanocls':
        args.dtype = dtype
        blocks, lengths = ours(args, folder)
    else:
        room = onnxpeers if engine in plan.ENGINES else peers
        blocks, lengths = room.theirs(args, folder, side)
    memory = peak_memory(args.device)
    per_token = flops(args.task, SHAPES[args.model], lengths, args.top) / float(lengths.sum())
    print(json.dumps(dict(blocks=blocks, memory=memory, flops_per_token=per_token)))


def startup(args, folder, side):
    """Seconds that a new process needs to answer one text -> as from a worker."""
    run = os.path.join(args.shared, 'run')
    if side.startswith('nanocls'):
        dtype = side.partition(' ')[2]
        command = python('predict.py', run, TEXT, '--device', args.device, '--dtype', dtype)
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
    tasks = (*METHODS, 'eval', 'gen', 'startup', 'predict')
    rows = ', '.join(f'{task} {n}' for task, n in ROWS.items())
    gpu = 'cuda' if torch.cuda.is_available() else 'cpu'
    add('--task', 'what to measure', tasks, 'lora')
    add('--steps', 'training steps per block; 4 do for memory', positive, STEPS)
    add('--repeats', 'turns per side (default: 2)', positive)
    text = 'reduce texts or steps, then turns, to take at most so long (default: 15)'
    add('--minutes', text, cli.above_zero)
    add('--quick', 'a trial: one turn, 3 minutes', bool)
    add('--json', 'write the figures to FILE', metavar='FILE')
    add = cli.group(p, 'peers')
    add('--against', 'run these peers (all: those of the task)', plan.GROUPS, [], nargs='+')
    add('--hf', 'which peers of hf (default: all)', tuple(PEERS), list(PEERS), nargs='+')
    text = 'of the peers (default: fp32 of `default`, --dtype of the others)'
    add('--hf_dtype', text, dtypes)
    add = cli.group(p, 'model and texts')
    shapes = tuple(name for name in SHAPES if name != 'nano')
    add('--model', 'shape of the model; weights are random', shapes, 'gpt2')
    add('--top', 'LoRA in the last M blocks only, for gen (default: all)', positive, metavar='M')
    add('--extra', 'flags of train_cls.py, as --extra=--plain', default='', metavar='FLAGS')
    add('--batch_size', 'rows per step, and per batch of Trainer', positive, 16)
    add('--rows', f'number of texts (default: {rows})', positive)
    add('--split', 'texts of SST-2, for eval and predict', ('train', 'validation'), 'train')
    text = 'texts of N tokens, for training and eval (default: as they are)'
    add('--length', text, positive)
    add = cli.group(p, 'system')
    add('--device', 'cpu or cuda', default=gpu, metavar='NAME')
    text = 'our matmul precision, or several (default: bf16 where it is faster)'
    add('--dtype', text, (*dtypes, 'int8'), nargs='+')
    add('--worker', '(internal: take one turn of this side)', metavar='SIDE')
    add('--shared', '(internal: folder that the sides share)', metavar='DIR')
    args, args.given = p.parse(argv)
    args.repeats = args.repeats or (1 if args.quick else 2)
    fast = plan.bf16_pays(args.device)
    args.dtypes = list(dict.fromkeys(args.dtype or ['bf16' if fast else 'fp32']))
    args.dtypes.sort(key=plan.ORDER.index)
    half = 'bf16' in args.dtypes or ('int8' in args.dtypes and fast)
    args.dtype = 'bf16' if half else 'fp32'  # of peers, and of what all sides share
    return args


def check(args):
    """Refuse flags that would do nothing or do not fit. Sets what no flag gave."""
    positions = SHAPES[args.model].block_size
    tasks = dict(length=(*METHODS, 'eval'), rows=ROWS, steps=METHODS, extra=METHODS)
    tasks.update(top=('gen',), split=('eval', 'predict'))
    for flag in sorted(args.given & tasks.keys()):
        if args.task not in tasks[flag]:
            fits = ', '.join(tasks[flag])
            raise UserError(f'--{flag} does nothing with --task {args.task}: it is for {fits}')
    for flag in sorted(args.given & {'hf', 'hf_dtype'}):
        if not {'hf', 'all'} & {*args.against}:
            raise UserError(f'--{flag} does nothing without --against hf')
    if args.length and args.length > positions:
        raise UserError(f'--length {args.length} does not fit: the model has {positions} positions')
    free = {'repeats', 'minutes', 'quick'} & args.given == {'repeats'}  # as asked
    args.seconds = math.inf if free else 60 * (args.minutes or (3 if args.quick else 15))
    args.fits = not {'rows', 'steps'} & args.given and args.seconds < math.inf
    args.rows = args.rows or ROWS.get(args.task)


def turn_of(args, argv, folder, side, seconds):
    """One turn of a side -> as from a worker. Raises UserError if it fails or takes too long."""
    if args.task == 'startup':
        return startup(args, folder, side.key)
    flags = [*argv, '--worker', side.key, '--shared', args.shared]
    flags += [f'--steps={args.steps}'] if args.task in METHODS else [f'--rows={args.rows}']
    out = checked(python('bench.py', *flags), side.name, seconds)
    return json.loads(out.splitlines()[-1])


def take_turns(args, argv, folder, every, start):
    """Run the sides alternately -> {name of a side: its turns}, {name: why it has none},
    {precision: [GFLOP/s of matrix products]}. start: when the whole run began."""
    turns, missing = {side.name: [] for side in every}, {s.name: s.missing for s in every}
    rates = {plan.rated(args, side.precision): [] for side in every}
    ours = [side.name for side in every if plan.is_ours(side)]
    for turn in range(args.repeats):  # alternating, so that other load hits all sides alike
        began = time.perf_counter()
        for dtype, found in rates.items():
            found.append(measure.matmul_rate(args.device, device.DTYPES[dtype]))
        for side in every:
            left = max(30, args.seconds - (time.perf_counter() - start))
            try:
                if not missing[side.name]:
                    limit = None if side.name in ours or left == math.inf else left
                    turns[side.name].append(turn_of(args, argv, folder, side, limit))
            except UserError as e:
                missing[side.name] = str(e)
                if all(missing[name] for name in ours):
                    raise
            rate = rates[plan.rated(args, side.precision)][-1]
            row = measure.row_of(turns[side.name][-1:], rate, missing[side.name])
            print(f'turn {turn + 1}, {measure.line_of(side.name, row).strip()}', flush=True)
        now = time.perf_counter()
        if turn + 1 < args.repeats and now - start + (now - began) > args.seconds:
            print(f'the time is up after turn {turn + 1} of {args.repeats}')
            break
    return turns, missing, rates


def main(argv=None):
    argv, start = list(sys.argv[1:] if argv is None else argv), time.perf_counter()
    if '--gpu' in argv:
        from lib import gpubench

        return gpubench.main(argv)
    args = parse(argv)
    check(args)
    if args.worker:
        return worker(args)

    cpu, sets = measure.cpu()
    print(f'{cpu} ({", ".join(sets)}), {torch.get_num_threads()} threads', flush=True)
    if {'hf', 'all'} & {*args.against} and args.task == 'adapter':
        print('PEFT has no Houlsby adapters: there is no peer')
    folder, every = workload.base_folder(args.model), plan.sides(args)
    if args.fits:
        plan.fit(args, every)
    with tempfile.TemporaryDirectory() as args.shared:
        workload.prepare(args, folder)
        if args.task == 'startup':  # the first time, the files come from the disk
            for side in every:
                with contextlib.suppress(UserError):  # its turn says so
                    startup(args, folder, side.key)
        found = take_turns(args, argv, folder, every, start)
    result = plan.report(args, every, *found)
    if args.json:
        files.write_json(args.json, dict(result, cpu=cpu, instructions=sets))


if __name__ == '__main__':
    # SIGTERM raises, so that subprocess.run also ends the worker
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cli.run(main)
