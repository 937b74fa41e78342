"""Comparison of the plain code with the faster code that lib/fast.py puts into its place, and
with what merging makes of LoRA: values and gradients, in float64, on copies of a block or layer.
Costs a fraction of a second."""

import contextlib
import copy
import threading

import torch
import torch.nn as nn
import torch.nn.functional as F

import lora
from lib import dropout
from lib.tensors import give_back
from lora import LoRA

TOLERANCE = 1e-7  # of the largest value
LOCK = threading.RLock()  # the comparisons replace functions of torch for a moment


def check_module(module, make, matrix):
    """Compare make(module, matrix) with the module, in training and in evaluation. Like all checks
    here -> '' if both are equal to rounding, else how they differ, in words."""
    twin = double(module)
    stir(twin)
    x = wave(2 * classes_of(twin), 5, width_of(twin))

    def probe(forward):
        y = x.clone().requires_grad_()
        values = measure(lambda: forward(y), [y, *trainables(twin)])
        with torch.no_grad():
            return [*values, *measure(lambda: forward(x), [])]

    def pairs():
        with torch.enable_grad(), regular_dropout():
            for training in (True, False):
                twin.train(training)
                yield probe(twin), probe(make(twin, matrix))

    return difference(pairs())


def check_merge(model):
    """'' if LoRA layers compute what merging makes of them, else the difference in words: lora.py
    may have been edited."""
    layers = [m for m in model.modules() if isinstance(m, LoRA)]
    if not layers:
        return ''
    kinds = {(type(m), type(m.base), m.A.shape[-2:], m.B.shape[-2:]): m for m in layers}

    def pairs():
        for m in kinds.values():
            twin = double(m).eval()
            for name in 'AB':  # of one class; not as trained, since an update can be tiny
                t = wave(*getattr(m, name).shape[-2:])
                setattr(twin, name, nn.Parameter(t, requires_grad=False))
            x = wave(2, 64, twin.A.shape[1])
            box = nn.ModuleDict(dict(layer=twin))
            want = twin(x)
            lora.merge(box)
            yield [want], [box.layer(x)]

    with torch.no_grad():
        return difference(pairs(), 1e-5)


def difference(pairs, tolerance=TOLERANCE):
    """pairs of (values, values) -> '' if they are equal to rounding, else how they differ."""
    try:
        with LOCK:
            error = max(distance(a, b) for want, got in pairs for a, b in zip(want, got))
    except Exception as e:  # of edited code: it may need more than a small copy has
        return f'{type(e).__name__}: {e}'
    return '' if error <= tolerance else f'relative difference {error:.1g}'


def distance(a, b):
    """Largest difference of two tensors in shares of the largest value; None counts as zeros."""
    if a is None or b is None:
        other = a if b is None else b
        return 0.0 if other is None or not other.any() else float('inf')
    scale = max(float(a.abs().max()), 1e-30)
    return float((a - b).abs().max()) / scale if a.shape == b.shape else float('inf')


def measure(fn, inputs):
    """fn() -> [its value, the gradients of the inputs]. Random numbers are the same every time."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)  # the CPU's alone: that of a GPU goes on
        y = fn()
        grads = [None] * len(inputs)
        if y.requires_grad and inputs:
            grads = torch.autograd.grad((y * wave(*y.shape)).sum(), inputs, allow_unused=True)
    return [y.detach(), *grads]


# --- small copies ---


def double(module):
    """A copy of a module on the CPU, in float64, without faster parts."""
    twin = copy.deepcopy(module).cpu().double()
    for p in module.parameters():
        give_back(p)
    for m in twin.modules():
        vars(m).pop('forward', None)
    return twin


def stir(module):
    """Fill weights that are constant, as LoRA's B: what follows zeros would not show, nor would a
    factor of 1 that an edit added."""
    for p in module.parameters():
        if (p == p.flatten()[:1]).all():
            p.data.copy_(0.1 * wave(*p.shape))


def wave(*shape):
    """Numbers without a pattern, float64."""
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(n, dtype=torch.float64) ** 2 * 0.7 + 1).view(shape)


def trainables(module):
    return [p for p in module.parameters() if p.requires_grad]


def width_of(module):
    """Width of what a Block, Conv1D or LoRA reads."""
    if hasattr(module, 'ln_1'):
        return module.ln_1.normalized_shape[0]
    return module.A.shape[-1] if isinstance(module, LoRA) else module.weight.shape[0]


def classes_of(module):
    """Number of class slices of its LoRA, 1 without."""
    slices = [len(m.A) for m in module.modules() if isinstance(m, LoRA) and m.A.dim() == 3]
    return slices[0] if slices else 1


@contextlib.contextmanager
def regular_dropout():
    """Inside, plain and faster dropout drop the same values: every third."""

    def plain(x, p=0.5, training=True, inplace=False):
        if not training or not p:
            return x
        kept = torch.arange(x.numel()).remainder(3).view(x.shape) > 0
        return x * kept / (1 - p)

    every_third = patched(dropout, 'dropped', lambda n, p, rng=None: torch.arange(0, n, 3))
    with patched(F, 'dropout', plain), every_third:
        yield


@contextlib.contextmanager
def patched(module, name, value):
    """Inside, the module has another value under this name."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
