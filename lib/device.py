"""Device and precision: what this machine has, and where the weights go. The scripts and
lib/runs.py call pick_device() and place()."""

import contextlib
import functools
import os
import platform

import torch
import torch.nn as nn

from lib import ranks
from lib.files import UserError
from lib.tensors import give_back

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32, int8=torch.int8)


def bf16_pays():
    """Is this CPU faster in bfloat16 than in float32? With AMX, or AVX512-BF16 of AMD's. Intel's
    AVX512-BF16 alone takes twice as long as float32 (docs/speed.md), emulation longer still."""
    has = lambda name: getattr(torch.cpu, f'_is_{name}_supported', bool)()  # noqa: E731
    return has('amx_tile') or (has('avx512_bf16') and not cpu_is_intels())


def cpuinfo(path):
    """What Linux says of its CPUs in /proc/cpuinfo; '' on other systems."""
    with contextlib.suppress(OSError), open(path) as f:
        return f.read()
    return ''


@functools.lru_cache(None)
def cpu_is_intels(path='/proc/cpuinfo'):
    """Did Intel make this CPU? MKL is fast on those alone."""
    if text := cpuinfo(path):
        return 'GenuineIntel' in text
    return 'AMD' not in platform.processor()  # Windows says AMD; macOS has Intel's, or no MKL


def pick_device(device='auto', dtype='auto'):
    """-> (torch.device, torch.dtype of the matmuls, the reason in words). Raises UserError for what
    this machine cannot do."""
    if device == 'auto':
        mps = torch.backends.mps.is_available()
        device = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    if device == 'cuda' and ranks.world_size() > 1:
        device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(device)
        torch.empty(1, device=device).item()  # not of 'meta', which holds no numbers
    except (RuntimeError, AssertionError, ImportError) as e:
        raise UserError(f'--device {device}: {str(e).splitlines()[0]}') from None
    if dtype != 'auto':
        if dtype == 'fp16' and device.type == 'cpu':
            raise UserError('--dtype fp16 needs a GPU; use bf16 or fp32 on a CPU')
        if dtype == 'int8' and device.type != 'cpu':
            raise UserError(f'--dtype int8 needs --device cpu; use bf16 or fp32 on {device}')
        return device, DTYPES[dtype], f'--dtype {dtype}'
    if device.type == 'cuda':
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return device, torch.bfloat16, 'this GPU multiplies bfloat16 natively'
        return device, torch.float16, 'this GPU has no native bfloat16; gradients are scaled'
    if device.type == 'cpu' and bf16_pays():
        return device, torch.bfloat16, 'this CPU is faster in bfloat16'
    if device.type == 'cpu':
        return device, torch.float32, 'this CPU is not faster in bfloat16'
    return device, torch.float32, f'the exact choice on {device.type}'


def autocast(device, dtype):
    """The context in which the model computes: torch.autocast, or nothing in float32 and in int8,
    where lib/int8.py rounds."""
    if dtype in (torch.float32, torch.int8):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def place(model, device, dtype):
    """Move a model to the device. What trains, LayerNorm and the prompt stay float32. Frozen
    weights are stored in the compute precision, since autocast would cast them in every step; on a
    CPU only the embeddings, since matrices stay memory-mapped there (lib/fast.py packs them)."""
    if device.type == 'cuda' and dtype != torch.float32:
        torch.set_float32_matmul_precision('high')  # TF32 for what autocast leaves in float32
    for m in model.modules():
        embedding, norm = isinstance(m, nn.Embedding), isinstance(m, nn.LayerNorm)
        rounded = embedding if device.type == 'cpu' else not norm
        for p in m.parameters(recurse=False):
            exact = p.requires_grad or p is model.prompt or not rounded
            before = p.data  # another object each time
            placed = before.to(device, torch.float32 if exact else dtype)
            if placed is not before:
                p.data = placed
                give_back(before)
        for name, b in m.named_buffers(recurse=False):  # of an edit: GPT-2 has none
            setattr(m, name, b.to(device))
    return model
