"""lib/packed.py, lib/dropout.py, lib/blocks.py: each kernel against the plain layer, on every CPU
with plain products (Unpacked), and with packed ones where it can pack."""

import copy

import numpy as np
import torch
import torch.nn.functional as F

import lib.matrices
import lora
from lib import dropout
from lib.blocks import FastBlock, make_block, make_layer
from lib.device import autocast, cpu_is_intels, place
from lib.fast import speed_up
from lib.matrices import MKLPacked32, Packed, Packed32, packing
from lib.packed import GELU, FastConv1D, FastLoRA, Taped, ThinLoRA
from lib.vocabulary import NextLogprobs
from model import Conv1D
from tests.helpers import (
    ALL,
    CPU,
    SMALL,
    Unpacked,
    Unpacked32,
    far,
    formula_model,
    patched,
    ragged,
    raises,
    skip,
    stirred,
    tmp,
    write,
)

# what computes the products, its tolerance: of float64, of one rounding to bfloat16, of float32
KINDS = [(Unpacked, 1e-12), (Unpacked32, 1e-12)] + [(Packed, 1 / 128)] * Packed.possible(
    CPU, torch.bfloat16
)
KINDS += [(Packed32, 2e-6)] * Packed32.possible(CPU, torch.float32)
with patched(lib.matrices, 'cpu_is_intels', lambda: True):  # exact on other CPUs as well
    HAS_MKL = MKLPacked32.possible(CPU, torch.float32)
KINDS += [(MKLPacked32, 2e-6)] * HAS_MKL


def needs_packing():
    if not Packed.possible(CPU, torch.bfloat16):
        skip('this CPU has no bfloat16, or this torch does not pack weights')


def conv(n_in, n_out):
    layer = Conv1D(n_in, n_out).requires_grad_(False)
    layer.weight.data.normal_()
    layer.bias.data.normal_()
    layer.weight.data, layer.bias.data = (
        layer.weight.bfloat16().float(),
        layer.bias.bfloat16().float(),
    )
    return layer


def test_packed_product():
    """A product, its gradient and its GELU are no further from float64 than one rounding, at widths
    that no block of the kernel divides."""
    for matrix, tolerance in KINDS:
        torch.manual_seed(0)
        for n_in, n_out, rows in ((96, 33, (7,)), (70, 256, (3, 500)), (8, 8, (1,))):
            plain = conv(n_in, n_out)
            layer, x = FastConv1D(plain, matrix), torch.randn(*rows, n_in).bfloat16()
            W, b = plain.weight.double(), plain.bias.double()
            exact = x.double() @ W + b
            x = x.to(matrix.dtype).requires_grad_()
            y = layer(x)
            g = torch.randn(y.shape).bfloat16().to(matrix.dtype)
            y.backward(g)
            with torch.no_grad():
                z = layer(x, gelu=True)
            pairs = (
                (y, exact),
                (x.grad, g.double() @ W.t()),
                (z, F.gelu(exact, approximate='tanh')),
            )
            for got, want in pairs:
                assert got.dtype == matrix.dtype and got.shape == want.shape
                error = (got.double() - want).abs()
                limit = tolerance * want.abs().max()
                limit = want.abs() / 256 + 2e-3 if matrix is Packed else limit
                assert (error <= limit).all(), (matrix, n_in, n_out, float(error.max()))


def test_gelu_with_a_backward():
    for matrix, limit in KINDS:
        for width in (64, 7):
            x = torch.linspace(-4, 4, 5 * width).view(5, width).to(matrix.dtype)
            exact = x.double().requires_grad_()
            x.requires_grad_()
            y, want = Taped.apply(x, GELU(matrix), None), F.gelu(exact, approximate='tanh')
            y.sum().backward()
            want.sum().backward()
            assert far(y.double(), want) < limit and far(x.grad.double(), exact.grad) < limit


def test_lora_layers_are_their_formula():
    """Values and all gradients, with dropout and without, of one update and of three, of the packed
    layer and of the one around a plain layer, against LoRA.forward with the same mask."""
    for axis in ((), (3,)):
        for p in (0.0, 0.3):
            for matrix, limit in [*KINDS, (None, 1e-5)]:
                torch.manual_seed(0)
                plain = lora.LoRA(conv(32, 48), 4, 0.5, p, *axis)
                plain.B.data.normal_()
                fast = copy.deepcopy(plain)
                plain = plain.double()
                x, g = torch.randn(*axis, 7, 32).bfloat16(), torch.randn(*axis, 7, 48).bfloat16()
                layer = make_layer(fast, matrix)
                assert type(layer) is (FastLoRA if matrix else ThinLoRA)
                a, b = x.double().requires_grad_(), x.to(matrix.dtype if matrix else torch.float32)
                b.requires_grad_()
                with patched(dropout, 'dropped', lambda n, p, rng=None: torch.arange(1, n, 3)):
                    with patched(F, 'dropout', third):
                        want = plain(a)
                    got = layer(b)
                want.backward(g.double())
                got.backward(g.to(got.dtype))
                pairs = [(got, want), (b.grad, a.grad)]
                pairs += [(fast.A.grad, plain.A.grad), (fast.B.grad, plain.B.grad)]
                for mine, exact in pairs:
                    assert mine.shape == exact.shape
                    mine, exact = mine.detach().double(), exact.detach()
                    error = float((mine - exact).norm() / exact.norm())
                    bound = max(limit, 1e-6, 0.01 * (matrix is Packed))
                    assert error < bound, (axis, p, matrix, error)
                assert torch.equal(b.detach(), x.to(b.dtype)), 'the input was overwritten'


def test_a_scale_that_is_another_in_the_next_pass():
    """Backward uses that of its forward pass, as autograd does (a loss of two passes)."""
    torch.manual_seed(0)
    layer, grads = lora.LoRA(conv(32, 48), 4, 0.5, 0.0), []
    layer.B.data.normal_()
    x = torch.randn(7, 32, dtype=torch.float64)
    layer.double()
    for net in (layer, FastLoRA(layer, Unpacked)):
        layer.zero_grad()
        layer.scale = 0.5
        first = net(x)
        layer.scale = 2.0
        (first.sin() + net(x).cos()).sum().backward()
        grads.append(torch.cat([layer.A.grad.flatten(), layer.B.grad.flatten()]))
    assert far(*grads) < 1e-12


def test_gradients_of_gradients_are_refused():
    """The hand-written backward passes give none: an error, where a number would be wrong."""
    layer = lora.LoRA(conv(32, 48), 4, 0.5, 0.0)
    layer.B.data.normal_()
    W, target = torch.randn(50, 32, requires_grad=True), torch.arange(7)
    for fn in (FastLoRA(layer, Unpacked32), lambda x: NextLogprobs.apply(x, W, target, None)):
        x = torch.randn(7, 32, requires_grad=True)
        (g,) = torch.autograd.grad(fn(x).square().sum(), x, create_graph=True)
        raises(RuntimeError, g.square().sum().backward, match='twice')


def third(x, p=0.5, training=True, inplace=False):
    """Dropout of every third value, from the second on."""
    if not training or not p:
        return x
    mask = torch.arange(x.numel()).remainder(3).ne(1).view(x.shape)
    return x * mask / (1 - p)


def test_lora_folded_into_the_product():
    """While nothing trains, LoRA is part of one packed product, for one class and for several; a
    new one if its scale is another, or its weights are, unseen by autograd (a running average)."""
    for matrix, limit in KINDS:
        for classes, r in ((0, 2), (3, 2)):
            torch.manual_seed(0)
            layer = lora.LoRA(conv(128, 160), r, 0.5, 0.1, classes).requires_grad_(False).eval()
            layer.B.normal_()
            fast, x = FastLoRA(layer, matrix), torch.randn(6, 5, 128).to(matrix.dtype)
            for gelu in (False, True):
                want = layer.double()(x.double())
                want = F.gelu(want, approximate='tanh') if gelu else want
                with torch.no_grad():
                    got = FastLoRA(layer.float(), matrix)(x, gelu)
                    assert (fast(x).shape == got.shape) and fast.folded is not None
                assert far(got.double(), want) < max(limit, 2e-6), (matrix, classes, gelu)
            assert fast.base.packed is None, 'packed twice'
            for change in (lambda: setattr(layer, 'scale', 2.0), lambda: layer.B.data.mul_(0.5)):
                change()
                with torch.no_grad():
                    assert torch.equal(fast(x), FastLoRA(layer, matrix)(x)), (matrix, classes)


def test_block_as_one_node():
    """A block as one node of autograd gives what its layers give one by one and what the plain
    block gives: output, gradients of the input and of all that trains; adapters, trained
    LayerNorms and GPT-2's own dropout need the layers."""
    for matrix, limit in KINDS:
        for targets, classes, p in (
            (ALL, 0, 0.0),
            (ALL, 0, 0.25),
            (ALL, 3, 0.25),
            (['c_attn'], 0, 0.1),
            (['mlp.c_proj', 'c_fc'], 3, 0.0),
            ([], 0, 0.0),
        ):
            torch.manual_seed(0)
            model = formula_model().requires_grad_(False)
            if targets:
                lora.add_lora(model, 4, 8.0, p, targets, classes=classes)
            block = stirred(model).h[1].train()
            x = torch.randn(6, 9, 64)
            results = []
            for kind in ('node', 'layers', 'plain'):
                twin = copy.deepcopy(block)
                twin = twin if issubclass(matrix, Packed) and kind != 'plain' else twin.double()
                forward = twin
                if kind != 'plain':
                    forward = make_block(twin, matrix)
                    assert forward.one_node
                    forward.one_node = kind == 'node'
                y = x.to(next(twin.parameters()).dtype, copy=True).requires_grad_()
                with patched(dropout, 'dropped', lambda n, p, rng=None: torch.arange(1, n, 3)):
                    with patched(F, 'dropout', third):
                        half = matrix is Packed and kind != 'plain'
                        with autocast(CPU, torch.bfloat16 if half else torch.float32):
                            out = forward(y)
                (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
                grads = [q.grad for q in twin.parameters() if q.requires_grad]
                assert len(grads) == 2 * len(targets)
                results.append([out.detach(), y.grad, *grads])
            for a, b in zip(results[0], results[1]):
                assert far(a, b) <= (1e-5 if matrix is Packed else limit), (targets, classes, p)
            for a, b in zip(results[0], results[2]):
                assert float(b.norm()) > 0 and far(a.double(), b) < 30 * limit, (
                    targets,
                    classes,
                    p,
                )


def test_when_a_block_is_one_node():
    model = formula_model()
    lora.adapt(model, 'lora', targets=ALL, r=4, dropout=0.5)
    assert make_block(model.h[0], Unpacked).one_node and not make_block(model.h[0], None).one_node
    model.h[1].ln_2.requires_grad_(True)
    assert not make_block(model.h[1], Unpacked).one_node
    model.h[2].mlp.register_forward_hook(lambda *_: None)
    assert make_block(model.h[2], Unpacked) is None, 'a hook would not be called'
    other = formula_model()
    lora.adapt(other, 'adapter', bottleneck=4)
    assert not make_block(other.h[0], Unpacked).one_node
    other.h[1].mlp = torch.nn.Identity()
    assert make_block(other.h[1], Unpacked) is None
    model.set_dropout(0.3)
    block, x = make_block(model.h[0].train(), None), torch.randn(2, 5, 64)
    assert block.drops() and not torch.equal(block(x), block(x))
    model.h[0].eval()
    assert not block.drops() and torch.equal(block(x), block(x))


def test_packed_model_is_the_plain_one():
    """The same bfloat16 model plain and sped up, LoRA folded in and not: all within rounding of
    float32, and alike in how far."""
    needs_packing()
    ids, n = ragged(257, pad=256)
    for classes in (0, 3):

        def reading(dtype, fast, freeze=True, classes=classes):
            torch.manual_seed(0)
            model = formula_model()
            model.requires_grad_(False)
            lora.add_lora(model, 2, 4.0, 0.0, ['c_attn', 'c_fc', 'mlp.c_proj'], classes=classes)
            stirred(model)
            if freeze:
                model.requires_grad_(False)
            place(model, CPU, dtype).eval()
            if fast:
                speed_up(model, CPU, dtype)
            with torch.no_grad(), autocast(CPU, dtype):
                return model, model.hidden(ids).float()

        want = reading(torch.float32, False)[1]
        runs = [reading(torch.bfloat16, *flags) for flags in ((False,), (True,), (True, False))]
        errors = [float((h - want).abs().mean()) for _, h in runs]
        assert max(errors) < 1.5 * errors[0] < 0.05 and min(errors) > 0, errors
        packed, trained = (vars(model.h[0])['forward'] for model, _ in runs[1:])
        assert packed.mlp.c_fc.folded is not None and packed.mlp.c_fc.base.packed is None
        assert packed.attn.c_proj.packed is not None and trained.mlp.c_fc.folded is None
        weight = runs[1][0].state_dict()['h.0.attn.c_proj.weight']
        assert torch.equal(weight, formula_model().h[0].attn.c_proj.weight)


def test_which_matrices_pack():
    """bfloat16 by oneDNN where it is faster; float32 by MKL on Intel's CPUs, on others by oneDNN;
    nothing on a GPU, in float16 or with a torch that lacks the operators."""
    half = Packed if hasattr(torch.ops.mkldnn, '_linear_pointwise') else None
    for fast in (True, False):
        with patched(lib.matrices, 'bf16_pays', lambda fast=fast: fast):
            kinds = [packing(CPU, d) for d in (torch.bfloat16, torch.float16)]
            assert kinds == [half if fast else None, None]
            assert packing(torch.device('cuda'), torch.float32) is None
    other = Packed32 if Packed32.possible(CPU, torch.float32) else None
    for intels in (True, False):
        with patched(lib.matrices, 'cpu_is_intels', lambda intels=intels: intels):
            assert packing(CPU, torch.float32) is (MKLPacked32 if intels and HAS_MKL else other)
            with patched(torch.backends.mkl, 'is_available', lambda: False):
                assert packing(CPU, torch.float32) is other
            with patched(torch.backends.mkldnn, 'is_available', lambda: False):
                assert packing(CPU, torch.bfloat16) is packing(CPU, torch.float32) is None
    for maker in ('GenuineIntel', 'AuthenticAMD'):
        path = write('cpuinfo', f'processor : 0\nvendor_id : {maker}\n', tmp())
        assert cpu_is_intels(path) == (maker == 'GenuineIntel')
    if HAS_MKL:  # blocks that fit no other number of rows
        again, right = lib.matrices.mkl_packs.__wrapped__, lib.matrices.multiply
        wrong = lambda x, *rest: right(x, *rest) + (len(x) == 33)  # noqa: E731
        assert again()
        with patched(lib.matrices, 'multiply', wrong):
            assert not again()


def test_slope_of_gelu():
    """GELU and its slope in float32, in one piece and in several: as exact as torch's own, also
    where x is large."""
    x = torch.cat((torch.linspace(-6, 6, 4001), torch.tensor([-1e4, -50.0, 50.0, 1e4])))
    exact = x.double().requires_grad_()
    want = F.gelu(exact, approximate='tanh')
    want.sum().backward()
    want = want.detach()
    for size in (lib.matrices.PIECE, 100):
        with patched(lib.matrices, 'PIECE', size):
            y, slope = lib.matrices.gelu_slope(x.view(5, -1))
        assert y.shape == slope.shape == (5, len(x) // 5)
        for got, exactly in ((y.flatten(), want), (slope.flatten(), exact.grad)):
            assert float((got - exactly).abs()[:-4].max()) < 3e-6
            assert torch.allclose(got[-4:].double(), exactly[-4:], atol=1e-6)


def test_float32_stays_exact():
    """A float32 model plain and sped up, trained LoRA and folded LoRA: 1e-5 of the largest logit,
    in a batch and alone; the blocks are packed and one node of autograd."""
    if not packing(CPU, torch.float32):
        skip('this torch does not pack float32')
    ids, n = ragged(257, pad=256)
    for classes in (0, 3):
        for trains in (True, False):

            def ready(fast, classes=classes, trains=trains):
                torch.manual_seed(0)
                model = formula_model(SMALL, 0 if classes else 3)
                model.requires_grad_(False)
                lora.add_lora(model, 4, 8.0, 0.0, ALL, classes=classes)
                stirred(model).requires_grad_(trains).eval()
                for name, p in model.named_parameters():
                    p.requires_grad_(trains and name.endswith(('.A', '.B')))
                place(model, CPU, torch.float32)
                if fast:
                    speed_up(model, CPU, torch.float32)
                return model

            a, b = ready(False), ready(True)
            kept = [p.clone() for p in b.parameters()]
            for rows in [slice(0, len(ids)), *(slice(i, i + 1) for i in range(len(ids)))]:
                part = ids[rows, : int(n[rows].max())]
                with torch.set_grad_enabled(trains):
                    x, y = (m.hidden(part) for m in (b, a))
                assert x.dtype == torch.float32 and far(x, y) < 1e-5, (classes, trains, far(x, y))
            block = vars(b.h[1])['forward']
            assert block.one_node and block.attn.c_attn.matrix is packing(CPU, torch.float32)
            assert (block.mlp.c_fc.folded is None) == trains
            assert all(torch.equal(p, q) for p, q in zip(kept, b.parameters()))


def test_packing_trains_the_same():
    """One LoRA step in bfloat16, packed and not: the gradients agree within its rounding."""
    needs_packing()
    ids, n = ragged(257, pad=256)

    def gradients(dtype, fast):
        torch.manual_seed(0)
        model = formula_model()
        lora.adapt(model, 'lora', targets=ALL, r=4)
        place(stirred(model), CPU, dtype)
        if fast:
            speed_up(model, CPU, dtype)
            assert all(isinstance(vars(b)['forward'], FastBlock) for b in model.h)
        with autocast(CPU, dtype):
            loss = F.cross_entropy(model(ids, n).float(), torch.arange(len(ids)) % 2)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in lora.trainables(model).values()])

    want = gradients(torch.float32, False)
    kinds = ((torch.bfloat16, False), (torch.bfloat16, True))
    plain, packed = ((gradients(*kind) - want).norm() / want.norm() for kind in kinds)
    assert 0 < packed < 1.5 * plain < 0.1, (plain, packed)


def test_cpu_dropout_is_dropout():
    """The share dropped, the scale of what is kept, the same mask for the gradient, and no pattern
    between neighbours."""
    torch.manual_seed(0)
    x = torch.ones(1001, 997)
    for p in (0.05, 0.5):
        y = dropout.dropout(x, p)
        kept = (y != 0).double()
        sigma = (p * (1 - p) / x.numel()) ** 0.5
        assert abs(float(kept.mean()) - (1 - p)) < 5 * sigma + 1e-5
        assert abs(float(y.double().mean()) - 1) < 1e-2
        assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)), rtol=1e-4)
        flat = kept.flatten() - (1 - p)
        for lag in range(1, 6):
            correlation = float((flat[lag:] * flat[:-lag]).mean()) / (p * (1 - p))
            assert abs(correlation) < 5 / x.numel() ** 0.5, lag
    assert dropout.dropout(torch.ones(3), 0.5).shape == (3,)
    x = torch.randn(50, 60).t().requires_grad_()
    y = dropout.dropout(x, 0.3)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)
    assert torch.allclose(x.grad[y != 0], torch.tensor(1 / 0.7)) and torch.allclose(y, x * x.grad)
    # geometric: P(the first is i) = p (1 - p)^i
    first = [int(dropout.dropped(4000, 0.01)[0]) for _ in range(4000)]
    assert abs(np.mean(first) - 99) < 5 * 99.5 / 4000**0.5
    assert abs(np.mean(np.array(first) < 69) - 0.5) < 0.05
    assert 2 < len(dropout.dropped(10**7, 1e-6)) < 30
    assert (dropout.dropped(10**4, 0.99) < 10**4).all()
