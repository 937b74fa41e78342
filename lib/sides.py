"""Which sides bench.py measures, in which precision, and how much of the work fits the time. Called
by bench.py."""

import importlib.util
import statistics
from collections import namedtuple

import numpy as np
import torch

from lib import device, measure, workload
from lib.files import UserError
from lib.measure import flops
from lib.peers import PEERS, precision
from lib.workload import METHODS
from model import SHAPES

Engine = namedtuple('Engine', 'tasks packages precisions')
ENGINES = dict(  # peers that are no part of Hugging Face; lib/onnxpeers.py runs them
    onnxruntime=Engine(('eval', 'predict'), ('onnx', 'onnxruntime'), ('fp32', 'int8')),
    openvino=Engine(('eval', 'predict'), ('onnx', 'openvino'), ('fp32', 'bf16')),
    ctranslate2=Engine(('gen',), ('ctranslate2', 'transformers'), ('fp32', 'int8')),
)
GROUPS = ('hf', *ENGINES, 'all')  # of --against
ORDER = ('fp32', 'bf16', 'int8')  # of the rows
# key: as --worker has it; missing: why the side cannot run, or ''
Side = namedtuple('Side', 'key name precision missing')

# Seconds of the slowest side per arithmetic that its rows need at the full rate of the products:
# warm-up, overhead of small batches and repeated epochs included. {task: (float32, bfloat16)}
COST = dict(eval=(6, 13), predict=(3, 7), gen=(2, 6))
TRAINING = (10, 15)
START = 12  # seconds of a turn before and after its work


def bf16_pays(name):
    """Is the device faster in bfloat16?"""
    return not name.startswith('cpu') or device.bf16_pays()


def is_ours(side):
    return side.key.startswith('nanocls')


def groups(args):
    """--against -> the groups that this task has. Raises UserError for one that it has not."""
    if 'all' in args.against:
        return ['hf', *(name for name in ENGINES if args.task in ENGINES[name].tasks)]
    for name in args.against:
        if name in ENGINES and args.task not in ENGINES[name].tasks:
            tasks = ' and '.join(ENGINES[name].tasks)
            raise UserError(f'--against {name} is for --task {tasks}')
    return list(dict.fromkeys(args.against))


def sides(args):
    """-> [Side], float32 first, and within a precision ours first."""
    several, found = len(args.dtypes) > 1, []
    if args.task == 'gen' and 'int8' in args.dtypes:  # which only an opened run has
        raise UserError('--dtype int8 is not for --task gen; eval and predict open a run')
    for dtype in args.dtypes:
        key = f'nanocls {dtype}'
        found.append(Side(key, key if several else 'nanocls', dtype, ''))
    for group in groups(args):
        if group == 'hf':
            peers = [] if args.task == 'adapter' else dict.fromkeys(args.hf)
            for peer in peers:
                dtype = precision(args, peer)
                found.append(Side(peer, f'Hugging Face {peer}', dtype, why_not_hf(args, peer)))
            continue
        for dtype in ENGINES[group].precisions:
            name = f'{group} {dtype}'
            found.append(Side(name, name, dtype, why_not(args, ENGINES[group], dtype)))
    found.sort(key=lambda side: ORDER.index(side.precision))
    if args.task == 'startup':
        found.append(Side('floor', 'import torch, numpy', 'fp32', ''))
    return found


def absent(packages):
    """-> why a peer cannot run: a package that is not installed, or ''"""
    gone = [name for name in packages if importlib.util.find_spec(name) is None]
    return f'{gone[0]} is not installed' if gone else ''


def why_not_hf(args, peer):
    """Why a peer of Hugging Face cannot run, or ''"""
    lora = args.task in ('lora', 'eval', 'startup')
    missing = absent(('transformers', 'peft') if lora else ('transformers',))
    if missing or bf16_pays(args.device):
        return missing
    dtype = precision(args, peer)
    # gen's `half` differs from `default` in its batches as well
    if dtype == 'bf16' or (peer == 'half' and args.task != 'gen' and not args.hf_dtype):
        return 'this CPU is not faster in bfloat16'
    return ''


def why_not(args, engine, dtype):
    """Why a peer that is no part of Hugging Face cannot run, or ''"""
    if args.device != 'cpu':
        return f'runs on a CPU here, not on {args.device}'
    if dtype == 'bf16' and not bf16_pays(args.device):
        return 'this CPU is not faster in bfloat16'
    return absent(engine.packages)


def rated(args, dtype):
    """The precision of the matrix products that a side in `dtype` is compared with."""
    return 'fp32' if dtype == 'fp32' or not bf16_pays(args.device) else 'bf16'


def fit(args, every):
    """Set args.rows, or args.steps of a task that trains, to what all sides can read args.repeats
    times in args.seconds, as far as the rate of matrix products tells."""
    if args.task == 'startup':
        return
    running = [side for side in every if not side.missing]
    precisions = ['fp32' if side.precision == 'int8' else side.precision for side in running]
    # as if int8 were float32, which is no faster
    kinds = {dtype: rated(args, dtype) for dtype in precisions}
    rates = {k: measure.matmul_rate(args.device, device.DTYPES[kind]) for k, kind in kinds.items()}
    trains = args.task in METHODS
    lengths, slow = sample(args), COST.get(args.task, TRAINING)
    each = flops(args.task, SHAPES[args.model], lengths, args.top) / len(lengths) / 1e9
    each *= args.batch_size if trains else 1
    one = sum(each * slow[dtype == 'bf16'] / rates[dtype] for dtype in precisions)
    left = args.seconds / args.repeats - START * len(running)
    name, least = ('steps', 4) if trains else ('rows', 16)
    setattr(args, name, int(min(getattr(args, name), max(least, left / one))))


def sample(args):
    """-> lengths in tokens of some of the texts"""
    if args.length:
        return np.array([args.length])
    texts = workload.agnews_texts(args) if args.task == 'gen' else workload.texts_of(args)[0]
    return workload.tokens_of(texts[:300]).lengths


def report(args, every, turns, missing, rates):
    """Print the table and the ratios -> the figures for --json. turns, missing, rates: as
    bench.py's take_turns() returns them."""
    rates = {dtype: statistics.median(found) for dtype, found in rates.items()}
    rated_by = {side.name: rates[rated(args, side.precision)] for side in every}
    rows = {
        side.name: dict(
            measure.row_of(turns[side.name], rated_by[side.name], missing[side.name]),
            precision=side.precision,
        )
        for side in every
    }
    reached = ', '.join(f'{rate:.0f} GFLOP/s in {dtype}' for dtype, rate in rates.items())
    print(f'\n{args.task}, {args.model}, {args.device}; matrix products reach {reached}')
    print('\n'.join(measure.line_of(name, row) for name, row in rows.items()))
    ours = [side for side in every if is_ours(side)]
    peers = {s.key: s.name for s in every if s.key != 'floor' and not is_ours(s)}
    ratios = [measure.ratios(rows, side.name, peers) for side in ours]
    flags = ('task', 'model', 'batch_size', 'length', 'device')
    result = {name: getattr(args, name) for name in flags}
    result.update(dtype=ours[0].precision if len(ours) == 1 else [s.precision for s in ours])
    result.update(hf_dtype={peer: precision(args, peer) for peer in peers if peer in PEERS})
    result.update(torch=torch.__version__, threads=torch.get_num_threads())
    return dict(result, matmul_gflops=rated_by[ours[0].name], rates=rates, rows=rows, **ratios[0])
