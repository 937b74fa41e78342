"""bench.py --gpu: all that a GPU has to show, in one command of ten minutes. Called by bench.py,
which it starts once for every row of its tables."""

import os
import statistics
import subprocess
import tempfile
import time
from collections import namedtuple

import torch

import data
from lib import cli, files, workload
from lib.files import UserError
from model import SHAPES

SECONDS = 600  # for everything
SPARE = 20  # seconds that a row needs at least
OURS, PEERS = 'nanocls', dict(half='Trainer + PEFT, --bf16', best='all settings')
TRAINED = ('lora', 'full', 'last', 'head')
TASKS = {**dict.fromkeys(TRAINED, ()), 'eval': ('--rows', '10000'), 'gen': ('--rows', '1000')}
VARIANTS = ('--cuda_graphs', '--compile')  # of train_cls.py
HEAD = 'nanocls|of matrix products|{half}|{best}|memory (of theirs)|SST-2 epoch'
# flags: of bench.py.  peers: do they run as well?
Case = namedtuple('Case', 'name flags peers')


class Row:
    """What was measured of a case: .turns, one dict of figures for each, and .why not all that was
    asked for."""

    def __init__(self, case):
        self.case = self.asked = case
        self.turns, self.seconds, self.why = [], 0.0, 'no time left'

    def median(self, *path):
        """Of a figure, given by its keys, over the turns; None if they do not have it."""
        values = []
        for value in self.turns:
            for key in path:
                value = value.get(key) or {}
            values += [value] if value else []
        return statistics.median(values) if values else None

    def lost(self):
        """Why peers have no figures in the last turn."""
        found = {PEERS[p]: self.turns[-1]['rows'].get(f'Hugging Face {p}', {}) for p in PEERS}
        return '; '.join(f'{name}: {f["missing"]}' for name, f in found.items() if 'missing' in f)

    def speed(self, side=OURS):
        """Texts per second."""
        name = side if side == OURS else f'Hugging Face {side}'
        return self.median('rows', name, 'examples_per_s')

    def memory(self):
        """Peak in MiB, and the ratio to that of the last peer that ran."""
        peak = self.median('rows', OURS, 'memory_mib')
        ratios = [self.median('memory_ratio', peer) for peer in PEERS]
        shares = [f' ({ratio:.2f})' for ratio in ratios if ratio]
        return f'{peak:,.0f} MiB{shares[-1] if shares else ""}'


def cases():
    """What is measured, the most important first."""
    found = [Case(task, ['--task', task, *flags], True) for task, flags in TASKS.items()]
    pairs = [(task, flag) for task in TRAINED for flag in VARIANTS]
    variants = [Case(f'{t} {flag}', ['--task', t, f'--extra={flag}'], False) for t, flag in pairs]
    batch = Case('lora, batch 256', ['--task', 'lora', '--batch_size', '256'], True)
    flags = ['--task', 'lora', '--length', '128', '--steps', '4']  # for the memory
    length = Case('lora, 128 tokens each', flags, True)
    first = 2 * len(VARIANTS)  # of two tasks
    return [*found, *variants[:first], batch, length, *variants[first:]]


def command_of(case, model):
    """-> flags of bench.py"""
    flags = ['--device', 'cuda', '--dtype', 'bf16', '--repeats', '1', '--model', model]
    return [*case.flags, *flags, *(['--against', 'hf', '--hf', *PEERS] if case.peers else [])]


def measure(flags, seconds):
    """bench.py with these flags -> the figures that it writes. Raises UserError if it fails or
    takes longer."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'figures.json')
        command = workload.python('bench.py', *flags, '--json', path)
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            said = p.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            p.terminate()  # bench.py then ends its worker as well
            try:
                p.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                p.kill()
            raise UserError(f'not done within {seconds:.0f} s') from None
        if p.returncode:
            raise UserError(' '.join(said.split())[-300:] or f'exit code {p.returncode}')
        return files.read_json(path)


def take_turns(rows, model, deadline):
    """Measure all rows, then those with peers again while there is time for it."""
    waiting = list(rows)
    while waiting:
        row = waiting.pop(0)
        start = time.monotonic()
        if deadline - start < max(SPARE, 1.2 * row.seconds):
            continue
        try:
            row.turns.append(measure(command_of(row.case, model), deadline - start))
            waiting += [row] if row.case.peers else []
            said = f'turn {len(row.turns)}, {row.speed():,.1f} examples/s in the median'
            row.why = row.lost() if row.case == row.asked else row.why
        except UserError as e:
            row.why = said = str(e)
            if row.case.peers and not row.turns:  # a peer may be missing: ours alone
                row.case = row.case._replace(peers=False)
                waiting.insert(0, row)
        row.seconds = time.monotonic() - start
        print(f'{row.case.name}: {said} ({row.seconds:.0f} s)', flush=True)


def tables(rows, epoch_rows):
    """The rows of the README, as lines. epoch_rows: training rows of SST-2."""
    names = HEAD.format(**{peer: f'x {name}' for peer, name in PEERS.items()}).split('|')
    lines = [f'| | {" | ".join(names)} |', '|---|' + '---:|' * len(names)]
    for row in rows:
        if not row.asked.peers or not row.turns:
            continue
        share = row.median('rows', OURS, 'share_of_matmul')
        cells = [f'{row.speed():,.0f} examples/s', f'{100 * share:.0f} %']
        for peer in PEERS:
            ratio, theirs = row.median('ratio', peer), row.speed(peer)
            cells.append(f'**{ratio:.2f}** x {theirs:,.0f}' if ratio else '')
        trains = row.case.flags[1] in TRAINED and '--length' not in row.case.flags
        cells += [row.memory(), f'{epoch_rows / row.speed():,.0f} s' if trains else '']
        lines.append(f'| {row.case.name} | {" | ".join(cells)} |')
    lines += ['', f'| | as it is | {" | ".join(VARIANTS)} |', '|---|' + '---:|' * 3]
    of = {row.case.name: row for row in rows}
    for task in TRAINED:
        three = [of[task], *(of[f'{task} {flag}'] for flag in VARIANTS)]
        cells = [
            f'{row.speed():,.0f} examples/s, {row.memory().split(" (")[0]}' if row.turns else ''
            for row in three
        ]
        lines.append(f'| {task} | {" | ".join(cells)} |')
    return [*lines, *(f'{row.case.name}: {row.why}' for row in rows if row.why)]


def main(argv):
    start = time.monotonic()
    p = cli.Parser(prog='bench.py', description=__doc__)
    add, shapes = cli.group(p, 'everything, on a GPU'), tuple(n for n in SHAPES if n != 'nano')
    add('--gpu', 'LoRA, full, last, head, eval and gen beside Trainer + PEFT in bfloat16', bool)
    add('--model', 'shape of the model; weights are random', shapes, 'gpt2')
    add('--json', 'write the figures to FILE', metavar='FILE')
    args, _ = p.parse(argv)
    if not torch.cuda.is_available():
        raise UserError('--gpu needs a GPU, and torch sees none here')
    epoch_rows = len(data.load('sst2').train.y)
    workload.base_folder(args.model)
    rows = [Row(case) for case in cases()]
    take_turns(rows, args.model, start + SECONDS)
    name = f'{torch.cuda.get_device_name()}, torch {torch.__version__}'
    rates = [turn['matmul_gflops'] for row in rows for turn in row.turns]
    rate = f'{statistics.median(rates) / 1000:,.0f} TFLOP/s' if rates else 'not measured'
    turns = max(len(row.turns) for row in rows)
    print(f'\n{args.model}, bfloat16, {name}; matrix products: {rate}; up to {turns} turns')
    print('\n'.join(tables(rows, epoch_rows)))
    print(f'{time.monotonic() - start:.0f} s in all')
    if args.json:
        figures = {row.case.name: dict(turns=row.turns, why=row.why) for row in rows}
        files.write_json(args.json, dict(gpu=name, model=args.model, rows=figures))
    return None if rates else 1
