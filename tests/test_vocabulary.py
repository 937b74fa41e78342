"""lib/vocabulary.py: log-probabilities of next tokens in pieces."""

import torch

import lib.vocabulary
from lib.fast import speed_up
from lib.matrices import Packed
from lib.vocabulary import COLUMNS, ROWS, FastVocabulary, NextLogprobs, packed_vocabulary
from model import GPT, PIECE, Config
from tests.helpers import CPU, Unpacked, far, formula_model, patched


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most values that one tensor made inside has (.n), forward and backward."""

    n = 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.n = max(self.n, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_gen_chunks_of_the_vocabulary():
    """Values and gradients of next_logprobs are those of log_softmax, however many rows at a time,
    whether backward computes the logits again or not; no tensor has a value per row and token."""
    torch.manual_seed(0)
    M, V, C = 23, 257, 16
    h, target, weights = torch.randn(M, C), torch.randint(V, (M,)), torch.randn(M)
    logits, calls = NextLogprobs.logits, []

    def counted(*args):
        calls.append(args)
        yield from logits(*args)

    for trains in (False, True):
        results = []
        sizes = ((None, None), (4, 100), (1000, 1000), (23, 64), (5, 257), (1, 1))
        for (rows, columns), kept in [
            *((s, 0) for s in sizes),
            ((4, 100), M * V),
            ((23, 64), M * V),
        ]:
            model = GPT(Config(1, 2, C, 8, V)).init_weights().requires_grad_(trains)
            torch.manual_seed(1)
            model.wte.weight.data.normal_()
            x = h.clone().requires_grad_()
            with (
                patched(lib.vocabulary, 'ROWS', rows),
                patched(lib.vocabulary, 'COLUMNS', columns),
                patched(lib.vocabulary, 'KEPT', kept),
                patched(NextLogprobs, 'logits', staticmethod(counted)),
                Largest() as seen,
            ):
                calls.clear()
                if rows:
                    out = NextLogprobs.apply(x, model.wte.weight, target)
                else:
                    out = (x @ model.wte.weight.t()).log_softmax(1)[torch.arange(M), target]
                (out * weights).sum().backward()
            results.append([out.detach(), x.grad] + [model.wte.weight.grad] * trains)
            assert (seen.n >= M * V) == (rows in (None, 1000)), (rows, columns, seen.n, trains)
            assert model.wte.weight.grad is None or trains
            pieces = -(-M // rows) if rows else 0
            assert len(calls) == pieces * (2 if trains and not kept else 1)
        for other in results[1:]:
            assert all(
                float((a - b).abs().max()) < 1e-5 * max(1, float(b.abs().max()))
                for a, b in zip(other, results[0])
            ), trains
    W = torch.randn(V, C, requires_grad=True)  # only the vocabulary trains
    torch.nn.functional.log_softmax(h @ W.t(), 1)[torch.arange(M), target].sum().backward()
    want, W.grad = W.grad, None
    with patched(lib.vocabulary, 'ROWS', 4), patched(lib.vocabulary, 'COLUMNS', 60):
        NextLogprobs.apply(h, W, target).sum().backward()
    assert float((W.grad - want).abs().max()) < 1e-4


def test_vocabulary_in_place_of_next_logprobs():
    """FastVocabulary gives GPT.next_logprobs's values and gradients, trained or frozen, and 0 where
    nothing is scored; gradients are those of plain float32."""
    torch.manual_seed(0)
    target, scored = torch.randint(257, (3, 9)), torch.rand(3, 9) < 0.6
    for trains in (False, True):
        results = []
        for fast in (False, True):
            model = formula_model().requires_grad_(trains)
            h = torch.sin(torch.arange(3 * 9 * 64.0)).view(3, 9, 64).requires_grad_()
            fn = FastVocabulary(model) if fast else model.next_logprobs
            out = fn(h, target, scored)
            out.sum().backward()
            results.append([out.detach(), h.grad] + [model.wte.weight.grad] * trains)
        assert all(far(a, b) < 1e-5 for a, b in zip(*results)), trains
        assert ((results[1][0] == 0) == ~scored).all()


def test_exponentials_are_kept_for_backward_alone():
    """None in an evaluation, and none after backward: a second one computes them again."""
    model, apply, trained = formula_model(), NextLogprobs.apply, []
    h, target, scored = torch.randn(2, 5, 64), torch.randint(257, (2, 5)), torch.ones(2, 5) > 0

    def spy(h, W, *rest):
        trained.append(W.requires_grad)
        return apply(h, W, *rest)

    with patched(NextLogprobs, 'apply', spy):
        with torch.no_grad():
            FastVocabulary(model)(h, target, scored)
        FastVocabulary(model)(h, target, scored)
    assert trained == [False, True]
    W = model.wte.weight
    out = NextLogprobs.apply(h[0], W, target[0])
    assert out.grad_fn.kept
    grads = [torch.autograd.grad(out.sum(), W, retain_graph=True)[0] for _ in range(2)]
    assert not out.grad_fn.kept and far(*grads) < 1e-5


def test_gen_bfloat16_of_the_vocabulary(matrix=None):
    """In bfloat16 log p is as exact as rounded factors allow, though all logits lie near -100,
    where bfloat16 is 0.5 apart; gradients too."""
    torch.manual_seed(0)
    M, V, C = 400, 257, 64
    h, W = torch.randn(M, C), 0.4 * torch.randn(V, C)
    h[:, 0], W[:, 0] = 10.0, -10.0  # the offset that GPT-2's logits have in common
    target = torch.cat(
        ((h @ W.t()).argmax(1)[: M // 2], torch.randint(V, (M // 2,)))
    )  # likely tokens, then any
    for trains in (False, True)[: 1 if matrix else 2]:
        x, w = h.bfloat16().requires_grad_(), W.bfloat16().requires_grad_(trains)
        out = NextLogprobs.apply(x, w, target, packed_vocabulary(w, matrix) if matrix else None)
        out.sum().backward()
        exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, w))
        exact = (exact_x @ exact_w.t()).log_softmax(1)[torch.arange(M), target]
        exact.sum().backward()
        out, exact = out.detach(), exact.detach()
        assert (
            out.dtype == torch.float32
            and float((exact_x.detach() @ exact_w.detach().t()).max()) < -60
        )
        assert float(out.max()) < 1e-6
        assert (
            float(((out - exact).abs() / (0.01 - exact)).max()) < 0.01
        )  # of the log p itself, even where it is near 0
        assert float((out - exact).abs().mean()) < 0.005
        assert float((out - exact).mean().abs()) < 0.001
        for a, b in ((x.grad, exact_x.grad), (w.grad, exact_w.grad))[: 1 + trains]:
            assert float((a - b).norm() / b.norm()) < 0.01, trains


class Rounded(Unpacked):
    """Packed, computed in float64 and rounded once: for CPUs that cannot pack."""

    def product(self, x, gelu=False):
        return super().product(x.double(), gelu).to(torch.bfloat16)


def test_gen_packed_vocabulary():
    """On every CPU, with a plain product where it cannot pack."""
    for matrix in [Rounded] + [Packed] * Packed.possible(CPU, torch.bfloat16):
        for columns in (4096, 100):
            with patched(lib.vocabulary, 'COLUMNS', columns), patched(lib.vocabulary, 'ROWS', 150):
                test_gen_bfloat16_of_the_vocabulary(matrix)


def test_gradient_of_the_vocabulary_is_summed_in_float32():
    """Over 13 pieces of GPT-2's vocabulary the gradient of h is no further from float64 than
    float32 sums of bfloat16 products: a sum in bfloat16 has three times that error."""
    torch.manual_seed(0)
    M, V, C = 64, 50257, 32
    h, W, target = torch.randn(M, C), 0.3 * torch.randn(V, C), torch.randint(V, (M,))
    x, w = h.bfloat16().requires_grad_(), W.bfloat16().requires_grad_()
    NextLogprobs.apply(x, w, target).sum().backward()
    exact = x.detach().double().requires_grad_()
    (exact @ w.detach().double().t()).log_softmax(1)[torch.arange(M), target].sum().backward()
    error = float((x.grad - exact.grad).norm() / exact.grad.norm())
    assert error < 0.0026, error  # summed in bfloat16: 0.006


def test_gen_logits_of_any_size():
    """Logits 500 apart overflow nothing: the sums are taken from the largest so far."""
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    W = torch.tensor([[0.0, 3.0], [500.0, -500.0], [-500.0, 0.0], [499.0, 0.0]])
    target = torch.tensor([0, 1])
    want = torch.log_softmax(h @ W.t(), 1)[torch.arange(2), target]
    for columns in (1, 2, 4):
        with patched(lib.vocabulary, 'COLUMNS', columns):
            assert torch.allclose(NextLogprobs.apply(h, W, target), want, rtol=1e-6), columns


def test_gen_memory():
    """Scoring texts over GPT-2's vocabulary never holds more logits than it is allowed, let alone
    all of them; neither does the plain model."""
    model = GPT(Config(1, 2, 64, 256)).init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(50256, (16, 200))
    for fast, limit in ((False, PIECE * 50257), (True, max(ROWS * COLUMNS, 50264 * 64))):
        if fast:
            speed_up(model, CPU, torch.float32)
        with torch.no_grad(), Largest() as seen:
            model.logprob(ids, torch.full((16,), 200), torch.ones(16, dtype=torch.bool))
        assert seen.n <= limit < 16 * 201 * 50257 / 4, (fast, seen.n)
