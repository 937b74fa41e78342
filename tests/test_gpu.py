"""What runs on a GPU: tests that need one are skipped without it. That no step waits for a GPU is
also tested without one, on a stand-in."""

import contextlib
import copy
import importlib.util
import os

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import lib.device
import lib.fast
import lib.training
import lora
import train_cls
import train_gen
from lib import frozen
from lib.device import autocast, place
from lib.fast import speed_up
from lib.scoring import in_batches
from lib.tokens import Tokens
from lib.training import Log
from model import GPT, Config
from tests.helpers import (
    ALL,
    FLAGS,
    GEN,
    METHODS,
    SMALL,
    TINY,
    Stop,
    class_model,
    copied,
    far,
    formula_model,
    gen_run,
    generate,
    losses_of,
    over_base,
    patched,
    pretrained,
    ragged,
    raises,
    script,
    skip,
    stirred,
    tmp,
    topics,
    train,
)

META = torch.device('meta')  # tensors without values stand for those whose values are not there yet


# --- no step waits, seen without a GPU ---


class Waits(Exception):
    """A GPU would have been waited for."""


class NoWaiting(TorchDispatchMode):
    """Inside, what makes a program wait for its GPU raises Waits: reading a value, a result whose
    shape depends on values, a copy to or from the CPU that is not data.to_device's."""

    READS = '_local_scalar_dense item is_nonzero equal nonzero masked_select bincount'.split()
    READS += 'unique _unique _unique2 unique_dim unique_consecutive'.split()
    INDEXES = 'index index_put index_put_ _index_put_impl_ _unsafe_index'.split()

    def __init__(self):
        super().__init__()
        self.pinned = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        here = {t.device.type for t in tensors if t.dim()}  # a number may come from the CPU
        if name in self.READS and 'meta' in here | {t.device.type for t in tensors}:
            raise Waits(f'{func}: a value is read')
        if name in self.INDEXES and 'meta' in here:
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                raise Waits(f'{func}: indexed by a mask')
            if any(i.device.type == 'cpu' for i in indices):
                raise Waits(f'{func}: indexed from the CPU')
        if name == 'repeat_interleave' and not kwargs.get('output_size') and 'meta' in here:
            raise Waits(f'{func}: its length depends on values')
        target = [kwargs['device'].type] if kwargs.get('device') is not None else []
        if name in ('_to_copy', 'copy_') and not self.pinned:
            if len({t.device.type for t in tensors} | set(target)) > 1:
                raise Waits(f'{func}: a copy that is not pinned')
        return func(*args, **kwargs)


def onto_meta(model):
    """Every parameter of a model loses its values; what refers to it refers to it still."""
    for p in model.parameters():
        empty = torch.empty_like(p, device=META)
        torch.utils.swap_tensors(p, torch.nn.Parameter(empty, requires_grad=p.requires_grad))


def states_on_meta(self, net, model, tokens, max_length, *rest, on_gpu):
    """FrozenStates.__init__ that computes nothing."""
    lengths = np.minimum(tokens.lengths, max_length)
    self.pooled, self.device, self.on_gpu, self.path = net.pooled, META, on_gpu, ''
    self.rows = np.ones_like(lengths) if net.pooled else lengths
    self.starts = np.cumsum(self.rows) - self.rows
    n = int(self.rows.sum()) + on_gpu
    self.flat = torch.zeros(n, model.cfg.n_embd, device=META if on_gpu else 'cpu')


@contextlib.contextmanager
def stand_in(states_on_gpu=True):
    """A GPU that nothing can be read from: both scripts train on it for three steps, in which
    nothing may wait for it. -> a list of the steps taken"""
    mode, steps, watched = NoWaiting(), [], contextlib.ExitStack()
    speed_up, to_device, seed, add = (
        lib.fast.speed_up,
        data.to_device,
        lib.training.seed_step,
        Log.add,
    )
    tensor = torch.tensor

    def faster(model, device, dtype, *args, **kwargs):
        speed_up(model, META, dtype, *args, **kwargs)
        onto_meta(model)

    def pinned(t, device):
        mode.pinned = True
        try:
            return to_device(t, device)
        finally:
            mode.pinned = False

    def from_values(*args, **kwargs):
        if torch.device(kwargs.get('device') or 'cpu').type == 'meta':
            raise Waits('torch.tensor: a copy that is not pinned')
        return tensor(*args, **kwargs)

    def begin(*args):
        seed(*args)
        watched.enter_context(mode)
        watched.enter_context(patched(torch, 'tensor', from_values))

    def end(log, step, *args):
        add(log, step, *args)
        watched.close()
        steps.append(step)
        if len(steps) == 3:
            raise Stop

    def states(*args):
        return states_on_meta(*args, on_gpu=states_on_gpu)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (lib.device, 'pick_device', lambda *a: (META, torch.float32, 'no values')),
            (lib.device, 'place', lambda model, *a: model),
            (lib.fast, 'speed_up', faster),
            (data, 'to_device', pinned),
            (lib.training, 'seed_step', begin),
            (Log, 'add', end),
            (torch, 'is_autocast_enabled', lambda kind: False),  # it does not know meta
            (torch, 'autocast', lambda *args, **kwargs: contextlib.nullcontext()),
            (frozen.FrozenStates, '__init__', states),
            (frozen.Feed, 'agrees', lambda *a: True),
            (train_gen.Phase, 'val_logprobs', lambda phase: np.zeros((len(phase.val), 1))),
        ):
            stack.enter_context(patched(owner, name, value))
        stack.callback(watched.close)
        yield steps


STEPS = '--epochs 2 --grad_accum 2 --batch_size 8 --log_every 1000 --eval_every 1000'.split()


def steps_of(main, *flags):
    """Three steps on the stand-in."""
    with stand_in() as steps:
        raises(Stop, script, main, flags)
    assert steps == [1, 2, 3], (flags, steps)


def test_no_step_waits_for_a_gpu_classifier():
    """Forward, backward, clipping, optimizer and log of every method of train_cls.py."""
    for method, flags in FLAGS.items():
        more = ['--class_weights', 'balanced', '--trunk_dropout', '0.1'] * (method != 'head')
        out = os.path.join(tmp(), 'run')
        steps_of(train_cls.main, *TINY, *flags, *STEPS, *more, '--out', out)


def test_no_step_waits_for_a_gpu_frozen_states():
    """Cached states are fed from the GPU, and copied there where it has no room for them."""
    for on_gpu in (True, False):
        for method in ('head', 'last'):
            used, real = [], frozen.FrozenStates.__call__

            def read(states, *args, used=used, real=real):
                used.append(states.on_gpu)
                return real(states, *args)

            flags = [*TINY, *FLAGS[method], *STEPS, '--out', os.path.join(tmp(), 'run')]
            with stand_in(on_gpu) as steps, patched(frozen.FrozenStates, '__call__', read):
                raises(Stop, script, train_cls.main, flags)
            assert steps == [1, 2, 3] and used == 6 * [on_gpu], (method, on_gpu, used)


def test_no_step_waits_for_a_gpu_generative():
    """The same for train_gen.py: a class alone, all classes, all texts."""
    for method in ('lora', 'full', 'prefix'):
        out = os.path.join(tmp(), 'run')
        steps_of(train_gen.main, *over_base(*GEN[method], *STEPS, '--out', out))
    out = os.path.join(tmp(), 'run')
    steps_of(train_gen.main, *TINY, '--pretrain', *STEPS, '--out', out)
    again = ['--resume', '--posterior_steps', '40', '--out', copied(gen_run('lora'))]
    steps_of(train_gen.main, *again)


def test_evaluation_fills_a_gpu():
    """65,536 tokens at a time, padding included; on a CPU as many as stay in its cache."""
    tokens = Tokens(np.zeros(90000, np.uint16), np.arange(0, 90001, 30))
    for device, limit in ((META, 65536), (torch.device('cpu'), 3072)):  # 64 wide
        sizes = []

        def fn(ids, n, index, sizes=sizes):
            sizes.append(ids.numel())
            return torch.zeros(len(index), 1)

        in_batches(fn, GPT(SMALL), tokens, 64, 'first', device, torch.float32)
        assert limit - 30 < max(sizes) <= limit and sum(sizes) == 90000, sizes


def test_waiting_for_a_gpu_is_seen():
    """What would wait, in the model, in clipping or in the loop, does not go unseen."""
    embed, clip = GPT.embed, lib.training.clip_grad_norm_

    def in_embed(wait):
        def embed_and_wait(self, ids, *args):
            wait(ids) if ids.is_meta else None
            return embed(self, ids, *args)

        return patched(GPT, 'embed', embed_and_wait)

    def loud(params, limit):
        norm = clip(params, limit)
        return norm if norm <= limit else norm

    for change, why in (
        (in_embed(lambda ids: int(ids[0, 0])), 'a value is read'),
        (in_embed(lambda ids: bool((ids > 3).any())), 'a value is read'),
        (in_embed(lambda ids: ids.cpu()), 'not pinned'),
        (in_embed(lambda ids: ids[ids > 3]), 'by a mask'),
        (in_embed(lambda ids: ids.index_put_((ids > 3,), ids[0, 0])), 'by a mask'),
        (in_embed(lambda ids: ids.unique()), 'a value is read'),
        (in_embed(lambda ids: ids[torch.zeros(1, dtype=torch.int64)]), 'from the CPU'),
        (in_embed(lambda ids: torch.ones(3).to(ids.device)), 'not pinned'),
        (in_embed(lambda ids: torch.tensor([1, 2], device=ids.device)), 'not pinned'),
        (in_embed(lambda ids: ids[0].repeat_interleave(ids[0])), 'depends on values'),
        (patched(lib.training, 'clip_grad_norm_', loud), 'a value is read'),
    ):
        flags = [*TINY, '--full', *STEPS, '--out', os.path.join(tmp(), 'run')]
        with stand_in(), change:
            raises(Waits, script, train_cls.main, flags, match=why)


def test_frozen_weights_are_stored_as_they_are_multiplied():
    """place() on a GPU: autocast finds nothing to cast but what trains."""
    for method, options in METHODS.items():
        with META:
            model = GPT(SMALL, 3)
            lora.adapt(model, method, **options)
        place(model, META, torch.bfloat16)
        norms = [
            p for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()
        ]
        for name, p in model.named_parameters():
            exact = p.requires_grad or any(p is other for other in norms)
            assert p.dtype == (torch.float32 if exact else torch.bfloat16), (method, name)


# --- with a GPU ---


def gpu():
    """The GPU, or a visible skip."""
    if not torch.cuda.is_available():
        skip('no GPU')
    return torch.device('cuda')


CASES = ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.02))


def on_gpu(model, dtype, fast):
    """A copy of a model on the GPU."""
    # place() allows TF32 for the whole process, except with float32
    torch.set_float32_matmul_precision('highest')
    model = place(copy.deepcopy(model), gpu(), dtype)
    if fast:
        speed_up(model, gpu(), dtype)
    return model


def test_gpu_logits():
    """Logits of every method in every precision, plain and sped up, are those of the CPU."""
    gpu()
    ids, n = ragged(257)
    for method, options in METHODS.items():
        torch.manual_seed(0)
        model = formula_model()
        lora.adapt(model, method, **options)
        stirred(model)
        with torch.no_grad():
            want = model(ids, n)
            for dtype, limit in CASES:
                for fast in (False, True):
                    theirs = on_gpu(model, dtype, fast)
                    with autocast(gpu(), dtype):
                        got = theirs(ids.to(gpu()), n.to(gpu())).float().cpu()
                    assert far(got, want) < limit, (method, dtype, fast, far(got, want))


def test_gpu_logprobs():
    """log P of every kind of generative model, and its gradients."""
    gpu()
    ids, n = ragged(257)
    ends = torch.tensor([True, False, True, True])
    for kind in ('lora', 'top', 'prompt', 'plain'):
        model = class_model(kind, classes=0 if kind == 'plain' else 3).requires_grad_(True)
        want = model.logprob(ids, n, ends)
        want.sum().backward()
        for dtype, limit in CASES:
            for fast in (False, True):
                theirs = on_gpu(model, dtype, fast)
                theirs.zero_grad()
                with autocast(gpu(), dtype):
                    got = theirs.logprob(*(t.to(gpu()) for t in (ids, n, ends)))
                got.sum().backward()
                assert far(got.detach().cpu(), want) < limit, (kind, dtype, fast)
                a, b = theirs.h[1].mlp, model.h[1].mlp
                pairs = [(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters())]
                assert all(far(p.float().cpu(), q) < 10 * limit for p, q in pairs), (kind, dtype)


def test_gpu_steps():
    """Losses of the first steps of every method, in bfloat16, in float16 with a GradScaler, and in
    float32, are those of the CPU."""
    gpu()
    steps = '--max_steps 6 --log_every 1 --eval_every 6'.split()
    texts = ['--data', topics(), '--model', pretrained()]
    runs = [(train, [*TINY, *flags]) for flags in FLAGS.values()]
    runs += [(generate, [*texts, *GEN[method]]) for method in ('lora', 'full', 'prefix')]
    for run, flags in runs:
        flags = [*flags, *steps, *['--dropout', '0'] * ('--lora' in flags)]
        want = losses_of(run(*flags, '--device', 'cpu', '--dtype', 'fp32')[0])
        for dtype, limit in (('fp32', 1e-3), ('bf16', 0.05), ('fp16', 0.05)):
            got = losses_of(run(*flags, '--device', 'cuda', '--dtype', dtype)[0])
            assert len(got) == len(want) >= 6
            assert np.allclose(got, want, rtol=limit), (flags, dtype, got, want)


LOSSES = '--dtype fp32 --lr 1e-3 --log_every 1 --batch_size 6 --device cuda'.split()


def test_gpu_graphs():
    """--cuda_graphs: the same losses."""
    gpu()
    for method in FLAGS:
        flags = [*TINY, *FLAGS[method], *LOSSES, *['--dropout', '0'] * (method == 'lora')]
        flags += ['--epochs', '2'] * (method in ('head', 'last'))
        a, b = losses_of(train(*flags, '--cuda_graphs')[0]), losses_of(train(*flags)[0])
        assert len(a) == len(b) > 10 and np.allclose(a, b, rtol=1e-3), (method, a, b)
    flags = over_base(*GEN['posterior'], *'--dropout 0 --max_steps 30 --log_every 1'.split())
    flags += ['--device', 'cuda']
    a, b = losses_of(generate(*flags, '--cuda_graphs')[0]), losses_of(generate(*flags)[0])
    assert len(a) == len(b) >= 30 and np.allclose(a, b, rtol=1e-3), (a, b)


def test_gpu_compile():
    """--compile: the same losses."""
    gpu()
    if importlib.util.find_spec('triton') is None:
        skip('no triton, which torch.compile needs on a GPU')
    for method in ('lora', 'full'):
        flags = [*TINY, *FLAGS[method], *LOSSES, *['--dropout', '0'] * (method == 'lora')]
        a, b = losses_of(train(*flags, '--compile')[0]), losses_of(train(*flags)[0])
        assert len(a) == len(b) > 10 and np.allclose(a, b, rtol=1e-3), (method, a, b)


def test_gpu_is_not_waited_for():
    """From the seed of a step to its last operation nothing synchronizes: inputs are copied from
    pinned memory, and no value is read."""
    gpu()
    seed, add, steps = lib.training.seed_step, Log.add, []

    def begin(*a):
        seed(*a)
        torch.cuda.set_sync_debug_mode('error' if a[1] > 1 else 'default')  # after the warm-up

    def end(*a):
        torch.cuda.set_sync_debug_mode('default')
        steps.append(a[1])
        add(*a)

    texts = ['--data', topics(), '--model', pretrained()]
    for dtype in ('bf16', 'fp16'):
        more = ['--device', 'cuda', '--grad_accum', '2', '--dtype', dtype]
        runs = [(train, [*TINY, *FLAGS[method], '--epochs', '2']) for method in METHODS]
        runs += [
            (generate, [*texts, *GEN[method], '--max_steps', '30']) for method in ('lora', 'full')
        ]
        runs += [(generate, [*texts, *GEN['posterior'], '--max_steps', '30'])]
        runs += [(train, [*TINY, '--lora', '--batch_tokens', '1000', '--epochs', '2'])]
        try:
            for run, flags in runs:
                with patched(lib.training, 'seed_step', begin), patched(Log, 'add', end):
                    run(*flags, *more)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert len(steps) > 100


def test_gpu_casts_no_frozen_weight():
    """A forward pass finds frozen weights in the precision in which they are multiplied."""
    gpu()
    ids, n = (t.to(gpu()) for t in ragged(257))
    model = formula_model()
    lora.adapt(model, 'lora', r=4, targets=ALL)
    model, cast = on_gpu(model, torch.bfloat16, True), []
    frozen_ones = [p for p in model.parameters() if not p.requires_grad and p.dim() > 1]
    places = {p.untyped_storage().data_ptr() for p in frozen_ones}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == '_to_copy':
                cast.append(args[0].untyped_storage().data_ptr())
            return func(*args, **(kwargs or {}))

    with Casts(), autocast(gpu(), torch.bfloat16):
        model(ids, n)
    assert cast and not places & set(cast)


def test_gpu_holds_frozen_states():
    """The states of frozen blocks are on the GPU, and give the losses of the CPU."""
    gpu()
    places, real = [], frozen.FrozenStates.__call__

    def read(states, *args):
        places.append(states.flat.device.type)
        return real(states, *args)

    for method in ('head', 'last'):
        flags = [*TINY, *FLAGS[method], *'--epochs 2 --log_every 1 --dtype fp32'.split()]
        want = losses_of(train(*flags, '--device', 'cpu')[0])
        with patched(frozen.FrozenStates, '__call__', read):
            got = losses_of(train(*flags, '--device', 'cuda')[0])
        assert np.allclose(got, want, rtol=1e-3), (method, got, want)
    assert set(places) == {'cuda'}


def test_gpu_memory():
    """Frozen weights take two bytes each, and (texts, tokens, vocabulary) is never held."""
    gpu()
    model = GPT(Config(2, 4, 256)).init_weights().requires_grad_(False)
    lora.add_lora(model, 8, 16.0, 0.0, ALL)
    before = torch.cuda.memory_allocated()
    model = on_gpu(model, torch.bfloat16, True)
    trains, total = lora.count(model).values()
    assert torch.cuda.memory_allocated() - before < 1.1 * (4 * trains + 2 * total) + 2**21
    ids, n = torch.randint(50000, (128, 127), device=gpu()), torch.full((128,), 127, device=gpu())
    torch.cuda.reset_peak_memory_stats()
    with autocast(gpu(), torch.bfloat16):
        model.logprob(ids, n, torch.ones_like(n, dtype=torch.bool)).sum().backward()
    logits = 128 * 128 * 50257 * 4
    assert torch.cuda.max_memory_allocated() - before < logits / 2
