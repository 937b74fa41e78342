"""lib/fast.py, lib/shipped.py: a model that was sped up computes what it computed, and edits of
model.py and lora.py take effect."""

import contextlib
import io

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from lib.blocks import FastBlock, FastMLP, make_block
from lib.device import autocast, place
from lib.fast import speed_up
from lib.packed import ThinLoRA
from lora import LoRA
from model import GPT, MLP, Attention, Block, Conv1D
from tests.helpers import (
    ALL,
    CPU,
    METHODS,
    SMALL,
    TINY,
    far,
    formula_model,
    fresh_cache,
    patched,
    ragged,
    records,
    stirred,
    train,
)

DTYPES = ((torch.float32, 1e-5), (torch.bfloat16, 0.05))


def ready(method, dtype, fast, classes=0, **options):
    """A model that was adapted and placed -> (model, what speed_up says)"""
    torch.manual_seed(0)
    model = formula_model(SMALL, 0 if classes else 3)
    if classes:
        model.requires_grad_(False)
        lora.add_lora(model, 4, 8.0, 0.0, ALL, classes=classes, top=options.get('top'))
    else:
        lora.adapt(model, method, **options)
    place(stirred(model), CPU, dtype).train()
    said = io.StringIO()
    if fast:
        with contextlib.redirect_stderr(said):
            speed_up(model, CPU, dtype)
    return model, said.getvalue()


def outcome(model, dtype, y):
    """-> [the value of y(model), the gradients of what trains]"""
    with autocast(CPU, dtype):
        out = y(model).float()
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = {n: p.grad for n, p in lora.trainables(model).items()}
    return out.detach(), grads


def test_speed_up_computes_the_same():
    """Logits and all gradients of every method, log P and its gradients of K classes: plain and
    sped up agree to rounding; the names of the state stay as they are."""
    ids, n = ragged(257)
    ends = torch.tensor([True, False, True, True])
    cases = [(m, 0, o, lambda model: model.classify(ids, n)) for m, o in METHODS.items()]
    for options in ({}, dict(top=1)):
        cases.append(('lora', 3, options, lambda model: model.logprob(ids, n, ends)))
    for dtype, limit in DTYPES:
        for method, classes, options, y in cases:
            (a, _), (b, said) = (ready(method, dtype, f, classes, **options) for f in (False, True))
            assert not said and isinstance(vars(b.h[-1]).get('forward'), FastBlock), said
            (want, grads), (got, mine) = outcome(a, dtype, y), outcome(b, dtype, y)
            assert far(got, want) < limit, (method, dtype, far(got, want))
            assert mine.keys() == grads.keys()
            for name, g in grads.items():
                if g is not None and g.any():
                    error = float((mine[name] - g).norm() / g.norm())
                    assert error < (limit if dtype == torch.float32 else 0.1), (method, name, error)
            assert list(b.state_dict()) == list(a.state_dict())


def counting(name, widths):
    """Inside, the number of tokens that a method of FastMLP reads is appended to widths."""
    before = getattr(FastMLP, name)

    def method(self, x, *tape):
        widths.append(x[..., 0].numel())
        return before(self, x, *tape)

    return patched(FastMLP, name, method)


def test_evaluation_computes_no_pads():
    """Logits of a padded batch without gradients, of every method: those of the plain model, though
    only real tokens reach the MLPs, and of the last block one per text."""
    ids, n = ragged(257)
    for dtype, limit in DTYPES:
        for method, options in METHODS.items():
            a, b = (ready(method, dtype, fast, 0, **options)[0].eval() for fast in (False, True))
            widths, real = [], n.sum() + len(n) * (0 if b.prompt is None else len(b.prompt))
            with torch.no_grad(), autocast(CPU, dtype), counting('__call__', widths):
                want, got = a.classify(ids, n).float(), b.classify(ids, n).float()
            assert far(got, want) < limit, (method, dtype, far(got, want))
            assert widths == [*[real] * (len(b.h) - 1), len(n)], (method, widths, real)


def test_training_computes_no_pads():
    """Blocks that are one node of autograd, and others: their products read real tokens alone, and
    of the last block one per text. (That values and gradients are right is another test.)"""
    ids, n = ragged(257)
    for method, dropout in (('lora', 0.0), ('lora', 0.1), ('full', 0.0)):
        model = ready(method, torch.float32, True, 0, **METHODS[method])[0]
        model.set_dropout(dropout)
        widths = []
        with counting('taped', widths), counting('__call__', widths):
            model.classify(ids, n).sum().backward()
        assert widths == [*[n.sum()] * (len(model.h) - 1), len(n)], (method, dropout, widths)


EDITS = {
    'MLP.forward': (
        MLP,
        'forward',
        lambda self, x: self.resid_drop(self.c_proj(F.gelu(self.c_fc(x)))),  # the exact GELU
    ),
    'Block.forward': (
        Block,
        'forward',
        lambda self, x: x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x)),  # in parallel
    ),
    'Attention.forward': (
        Attention,
        'forward',
        lambda self, x, before=Attention.forward: 0.99 * before(self, x),
    ),
    'LoRA.forward': (
        LoRA,
        'forward',
        lambda self, x: self.base(x) + torch.tanh(x @ self.A.mT) * self.scale @ self.B.mT,
    ),
    'GPT.pool': (GPT, 'pool', lambda self, x, lengths: x[:, 0]),  # the first token
    'GPT.classify': (
        GPT,
        'classify',
        lambda self, ids, n, before=GPT.classify: before(self, ids, n) / 2,
    ),
}


def test_an_edit_takes_effect():
    """After an edit of a class the sped-up model computes what the edited plain model computes, in
    training and in evaluation, in float32 and bfloat16; it says in one line what runs plain."""
    ids, n = ragged(257)
    options = dict(METHODS['lora'])
    unedited = [
        outcome(ready('lora', d, True, **options)[0], d, lambda m: m(ids, n)) for d, _ in DTYPES
    ]
    for name, edit in EDITS.items():
        with patched(*edit):
            for (dtype, limit), before in zip(DTYPES, unedited):
                (a, _), (b, said) = (ready('lora', dtype, f, **options) for f in (False, True))
                part = name.split('.')[0].replace('MLP', 'Block').replace('Attention', 'Block')
                assert said.count('\n') == 1 and part in said, (name, said)
                want, got = (outcome(m, dtype, lambda m: m(ids, n)) for m in (a, b))
                assert far(got[0], want[0]) < limit, (name, dtype)
                for key, g in want[1].items():
                    error = float((got[1][key] - g).norm() / g.norm())
                    assert error < (limit if dtype == torch.float32 else 0.1), (name, key, error)
                if dtype == torch.float32:
                    moved = max(
                        float((got[1][k] - g).norm() / g.norm()) for k, g in before[1].items()
                    )
                    assert moved > 1e-4, (name, 'the edit changed nothing')
                with torch.no_grad(), autocast(CPU, dtype):
                    a.eval(), b.eval()
                    assert far(b(ids, n).float(), a(ids, n).float()) < limit, (name, dtype)


def test_edits_that_few_numbers_would_not_show():
    """Of long texts, of one block, of some steps, of one layer among many: a comparison on a few
    random numbers cannot find them. They take effect in a model that was sped up."""
    torch.manual_seed(0)
    ids, n = torch.randint(0, 256, (2, 40)), torch.tensor([40, 33])
    skips = []

    def window(self, x):
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2)
        )
        i = torch.arange(T)
        near = (i[:, None] >= i) & (i[:, None] - i < 16)
        y = F.scaled_dot_product_attention(q, k, v, near)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

    def drop(self, x, before=Block.forward):
        skips.append(self.training and torch.rand(()) < 0.5)
        return x if skips[-1] else before(self, x)

    def one(self, x, before=MLP.forward):
        return before(self, x) * (0.5 if next(self.c_fc.parameters())[0, 0] > 0 else 1)

    def skip(self, ids, y=None):
        x = self.embed(ids)
        for i, block in enumerate(self.h):
            x = block(x) if i else x
        return self.ln_f(x)

    for edit in (
        (Attention, 'forward', window),
        (Block, 'forward', drop),
        (MLP, 'forward', one),
        (GPT, 'hidden', skip),
    ):
        before = ready('lora', torch.float32, True, **METHODS['lora'])[0].eval()(ids, n)
        with patched(*edit):
            models = [ready('lora', torch.float32, f, **METHODS['lora'])[0] for f in (False, True)]
            trained = []
            for model in models:
                torch.manual_seed(0)
                trained.append(model.train()(ids, n))
            assert far(trained[1], trained[0]) < 1e-5, edit
            want, got = (model.eval()(ids, n) for model in models)
        assert far(got, want) < 1e-5, edit
        assert far(got, before) > 1e-4 or edit[2] is drop, edit
    assert sum(skips) > 1, 'no block was skipped in training'


def test_a_hook_that_is_registered_later_is_called():
    ids, n = ragged(257)
    model = ready('head', torch.float32, True)[0].eval()
    want, seen = model(ids, n), []
    hook = model.h[1].mlp.c_fc.register_forward_hook(lambda m, x, y: seen.append(y.shape))
    got = model(ids, n)
    assert seen == [(*ids.shape, 4 * model.cfg.n_embd)] and far(got, want) < 1e-5
    hook.remove()
    assert torch.equal(model(ids, n), want) and len(seen) == 1


def test_an_edit_of_dropout_takes_effect():
    """LoRA without its dropout, and an added parameter that trains."""
    ids, n = ragged(257)

    def without(self, x):
        return self.base(x) + x @ self.A.mT * self.scale @ self.B.mT

    with patched(LoRA, 'forward', without):
        for dtype, limit in DTYPES:
            models = [
                ready('lora', dtype, f, r=4, targets=ALL, dropout=0.5)[0] for f in (False, True)
            ]
            want, got = (outcome(m, dtype, lambda m: m(ids, n)) for m in models)
            assert far(got[0], want[0]) < limit, dtype

    class Magnitude(LoRA):
        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            self.m = torch.nn.Parameter(torch.ones(self.B.shape[-2]))

        def forward(self, x):
            return super().forward(x) * self.m

    with patched(lora, 'LoRA', Magnitude):
        model, _ = ready('lora', torch.float32, True, r=4, targets=ALL)
        assert outcome(model, torch.float32, lambda m: m(ids, n))[1]['h.1.mlp.c_fc.m'].any()


def test_other_parts_stay_plain():
    """Hooks, other classes and replaced layers are not bypassed."""
    ids, n = ragged(257)
    calls = []
    torch.manual_seed(0)
    model = formula_model()
    lora.adapt(model, 'head')
    model.h[0].mlp.c_fc.register_forward_hook(lambda *_: calls.append(1))
    model.h[1].mlp = torch.nn.Sequential(torch.nn.Linear(64, 64))
    place(model, CPU, torch.float32)
    speed_up(model, CPU, torch.float32)
    model(ids, n)
    assert calls and 'forward' not in vars(model.h[0]) and 'forward' not in vars(model.h[1])
    assert isinstance(vars(model.h[2])['forward'], FastBlock)
    model.h[2].attn.resid_drop = torch.nn.Tanh()
    assert make_block(model.h[2], None) is None


def other_ids(before):
    """A method of GPT that reads other tokens in training, as where some are dropped."""
    return lambda self, ids, n: before(self, (ids + 1) % 256 if self.training else ids, n)


def test_edits_in_training_and_in_a_second_run():
    """The scripts: an edit changes the loss of training and of evaluation as --plain says, and
    again in a second run over the same cache of frozen states."""
    flags = [
        *TINY[:-1],
        *'--max_samples 20 --dtype fp32 --epochs 3 --lr 1e-2 --log_every 1'.split(),
    ]

    def losses(*more):
        out, _ = train(*flags, *more)
        return [r.get('loss', r.get('val_loss')) for r in records(out)]

    def close(a, b):
        return all(abs(x - y) < 1e-4 * abs(y) for x, y in zip(a, b)) and len(a) == len(b)

    with fresh_cache():
        for method in (['--last', '1'], ['--head']):
            first = losses(*method)
            assert close(losses(*method), first)  # from the cache
            of_ids = [
                (GPT, name, other_ids(getattr(GPT, name))) for name in ('classify', 'forward')
            ]
            for edit in (EDITS['Block.forward'], EDITS['GPT.pool'], *of_ids):
                with patched(*edit):
                    fast, plain = losses(*method), losses(*method, '--plain')
                assert close(fast, plain), (method, edit, fast, plain)
                assert not close(fast, first), (method, edit)
            assert close(losses(*method), first)


def test_scale_of_lora_is_part_of_the_copy_of_b():
    """Where B is cast, one kernel scales and casts it, and one its gradient; in float32 the product
    is scaled as in lora.py, bitwise."""
    for classes in (0, 3):
        torch.manual_seed(0)
        layer = LoRA(Conv1D(16, 24).requires_grad_(False), 4, 1.7, 0.0, classes)
        for p in layer.parameters():
            p.data.normal_()
        fast, x = ThinLoRA(layer), torch.randn(6, 16)
        a = x.view(*[classes] * bool(classes), -1, 16) @ layer.A.mT * 1.7
        if not classes:
            assert torch.equal(fast(x), torch.addmm(layer.base(x), a, layer.B.t()))
        else:
            want = torch.baddbmm(layer.base(x).view(3, -1, 24), a, layer.B.mT)
            assert torch.equal(fast(x), want.view(6, 24))
        grads, ops = [], []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, ops=ops):
                ops.append(func.overloadpacket.__name__)
                return func(*args, **(kwargs or {}))

        for forward in (layer, fast):
            layer.zero_grad()
            ops.clear()
            with Watch(), autocast(CPU, torch.bfloat16):
                y = forward(x)
                y.sum().backward()
            grads.append([y.detach().float(), layer.A.grad, layer.B.grad])
        assert all(far(got, want) < 0.02 for got, want in zip(*grads)), classes
        assert ops.count('mul') == 2, ops
