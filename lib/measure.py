"""The measures of bench.py: arithmetic, time and memory. Called by bench.py, lib/onnxpeers.py,
lib/peers.py and lib/sides.py."""

import contextlib
import platform
import re
import statistics
import sys
import time

import numpy as np
import torch

from lib.device import cpuinfo

CLASSES = 4  # of --task gen
SETS = 'avx2 fma avx512f avx_vnni avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16'
SETS = f'{SETS} asimd asimddp sve sve2 i8mm bf16'.split()  # as /proc/cpuinfo has them; x86, ARM


def flops(task, cfg, lengths, top=None):
    """Floating-point operations that texts with these numbers of tokens (n,) need.

    Forward takes 2 per weight of a block (12 C^2) and token, and 4 C per pair of a token and one
    that it attends to, itself included. A classifier reads the last token only: its last block
    needs keys and values of all tokens, but query, projection and MLP of one. Backward through a
    block costs the forward once for the gradient of the activations and once more for that of the
    weights; that of attention's products is twice the forward. So per weight: head, eval, predict
    2; lora, adapter 4; full 6; last 2, and 6 in the last block. gen scores all tokens after
    <|endoftext|> and the one at the end, with the vocabulary projection 2 C V each, CLASSES times;
    the blocks below the last `top` run once for all classes.
    Not counted: embeddings, LayerNorm, the class head, what LoRA and adapters add, and that nothing
    below the first update needs a gradient. head and last count as without the cache of frozen
    blocks."""
    n, C, L = np.asarray(lengths, np.float64), cfg.n_embd, cfg.n_layer
    if task == 'gen':
        n = n + 1
        block = 24 * C**2 * n + 2 * C * n * (n + 1)
        own = min(top or L, L)  # blocks that run once per class
        blocks = block * (L - own + own * CLASSES)
        return float((blocks + 2 * C * cfg.vocab_size * n * CLASSES).sum())
    # of a whole block; 1 + ... + n pairs
    weights, attention = 24 * C**2 * n, 2 * C * n * (n + 1)
    last_weights, last_attention = 4 * C**2 * n + 20 * C**2, 4 * C * n
    passes = dict(lora=(2, 2), adapter=(2, 2), full=(3, 3), last=(1, 3))
    times, last_times = passes.get(task, (1, 1))
    pairs = {1: 1, 2: 3, 3: 3}  # attention has no weights: its backward is complete or absent
    below = times * weights + pairs[times] * attention
    last = last_times * last_weights + pairs[last_times] * last_attention
    return float(((L - 1) * below + last).sum())


def machine():
    """-> this CPU, its instruction sets and torch's version, in words"""
    name, sets = cpu()
    return f'{name} ({", ".join(sets)}), torch {torch.__version__.split("+")[0]}'


def cpu(path='/proc/cpuinfo'):
    """-> name of this CPU, those of its instruction sets that decide how fast products are"""
    text = cpuinfo(path)
    name = re.search(r'^model name\s*: (.+)', text, re.M)
    flags = re.search(r'^(?:flags|Features)\s*: (.+)', text, re.M)
    have = flags[1].split() if flags else torch.backends.cpu.get_cpu_capability().lower().split()
    name = name[1] if name else platform.processor() or platform.machine()
    return name, [s for s in SETS if s in have]


def synchronize(device):
    """Wait until a GPU has finished, so that the clock counts its work."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def matmul_rate(device, dtype, size=None):
    """GFLOP/s of square matrix products: the median of seven, after two to warm up."""
    size = size or (8192 if torch.device(device).type == 'cuda' else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(9):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e9


def peak_memory(device):
    """Peak memory of this process in MiB; on CUDA that of the GPU's memory."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError), open('/proc/self/status') as f:
        # not ru_maxrss: on Linux it includes the process that started this one
        line = re.search(r'VmHWM:\s*(\d+) kB', f.read())
        if line:
            return int(line[1]) / 2**10
    import resource  # not on Windows

    unit = 2**20 if sys.platform == 'darwin' else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def block_of(batches, seconds):
    """Batches [(rows, real tokens, tokens with pads)] and the seconds they took -> the speeds of
    this block of steps, named as in log.jsonl."""
    rows, real, padded = (sum(column) for column in zip(*batches))
    return dict(
        examples_per_s=rows / seconds, tokens_per_s=real / seconds, pad_share=1 - real / padded
    )


def timed(run, batches, device):
    """Time run(), which appends its batches to the list `batches` -> its block, see block_of."""
    batches.clear()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return block_of(batches, time.perf_counter() - start)


# --- figures ---


def row_of(turns, rate, missing):
    """The turns of a side -> its figures: medians over all blocks, quartiles of the speed, the
    largest peak of memory. rate: GFLOP/s of matrix products.  missing: why there are none."""
    if missing:
        return dict(missing=missing)
    blocks = [b for t in turns for b in t['blocks']]
    row = {name: statistics.median(b[name] for b in blocks) for name in blocks[0]}
    first = next(iter(row))  # examples_per_s, or seconds
    quartiles = np.percentile([b[first] for b in blocks], [25, 75]).tolist()
    row.update(middle_half=quartiles, blocks=len(blocks))
    if 'memory' in turns[0]:
        row['memory_mib'] = max(t['memory'] for t in turns)
        row['gflops'] = row['tokens_per_s'] * turns[0]['flops_per_token'] / 1e9
        row['share_of_matmul'] = row['gflops'] / rate
    return row


def line_of(name, row):
    """A row for the terminal."""
    if 'missing' in row:
        return f'{name:>22}  not measured: {row["missing"]}'
    low, high = row['middle_half']
    middle = f'(middle half of {row["blocks"]}: {low:.4g} to {high:.4g})'
    if 'seconds' in row:
        return f'{name:>22}  {row["seconds"]:.2f} s  {middle}'
    speed = f'{row["examples_per_s"]:8.1f} examples/s  {middle}  {row["tokens_per_s"]:.0f} tokens/s'
    used = f'padding {100 * row["pad_share"]:.1f} %  {row["memory_mib"]:.0f} MiB'
    rate = f'{row["gflops"]:.1f} GFLOP/s = {100 * row["share_of_matmul"]:.0f} %'
    return f'{name:>22}  {speed}  {used}  {rate}'


def ratios(rows, name, peers):
    """Print how many times as fast as each peer our row is, and how much of its memory it takes
    -> the same for --json. peers: {key: name of its row}"""
    speed, memory, mine = {}, {}, rows[name]
    for key, peer in peers.items():
        other, text = rows[peer], ''
        if 'missing' in mine or 'missing' in other:
            continue
        if 'seconds' in mine:
            speed[key] = other['seconds'] / mine['seconds']
        else:  # tokens: in training, each side reads other texts of the data set
            speed[key] = mine['tokens_per_s'] / other['tokens_per_s']
            memory[key] = mine['memory_mib'] / other['memory_mib']
            text = f', {memory[key]:.2f} times the memory'
        who = '' if name == 'nanocls' else f'{name} '
        print(f'{who}against {key}: {speed[key]:.2f} times as fast{text}')
    return dict(ratio=speed, memory_ratio=memory)
