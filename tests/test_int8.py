"""lib/int8.py: --dtype int8 of eval.py and predict.py."""

import contextlib
import io
import timeit

import numpy as np
import torch
import torch.nn.functional as F

import eval as evaluation
import lora
import predict
import train_cls
import train_gen
from lib import int8
from lib.device import pick_device, place
from lib.files import UserError
from lib.int8 import AfterGELU, Int8
from lib.packed import FastConv1D, FastLoRA
from lib.runs import open_run
from tests.helpers import (
    CPU,
    METHODS,
    SMALL,
    class_model,
    far,
    formula_model,
    gen_run,
    patched,
    ragged,
    raises,
    script,
    stirred,
    tiny_run,
)


@contextlib.contextmanager
def stand_in(multiply=None):
    """Inside, plain integer products take the place of the kernels, on any CPU."""

    def plain(q, W, scales, zeros, offset=None):
        y = (q.double() @ W.double().t()).float() * scales
        return y if offset is None else y + offset

    int8.activations.cache_clear()
    try:
        with patched(int8, 'pack', lambda q: q), patched(int8, 'multiply', multiply or plain):
            yield
    finally:
        int8.activations.cache_clear()


def saturating(q, W, scales, zeros, offset=None):
    """What a CPU without VNNI computes: it adds two products in 16 bits."""
    pairs = q.int()[:, None] * W.int()  # (n, out, in)
    y = pairs.unflatten(2, (-1, 2)).sum(3).clamp(-(2**15), 2**15 - 1).sum(2) * scales
    return y if offset is None else y + offset


@contextlib.contextmanager
def any_kernel():
    """Inside, the kernels, or their stand-in where the CPU has none."""
    try:
        int8.activations()
    except UserError:
        with stand_in():
            yield
    else:
        yield


def said(fn):
    """-> what fn() returns, what it writes to stderr"""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        value = fn()
    return value, err.getvalue()


def matrix(n_in=64, n_out=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n_in, n_out, generator=g), torch.randn(n_out, generator=g)


def test_int8_products():
    """x W + b of integers is what their definition says, and close to the exact one: with the
    kernels of this CPU, with plain products, and with 7 bits where 16-bit sums would overflow."""
    (W, b), x = matrix(), torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    contexts = dict(kernel=any_kernel(), plain=stand_in(), narrow=stand_in(saturating))
    for name, context in contexts.items():
        with context:
            first, last = int8.activations()
            assert name == 'kernel' or last == (127 if name == 'narrow' else 255)
            limit = 0.015 * 254 / (last - first)
            for kind, rows in ((Int8, x), (AfterGELU, F.gelu(x, approximate='tanh'))):
                m = kind(W, b)
                got, exact = m.product(rows), rows @ W + b
                assert got.shape == exact.shape and got.dtype == torch.float32
                assert far(got, exact) < limit, (name, kind, far(got, exact))
                q, steps = m.quantize(rows.reshape(-1, 64))
                assert q.dtype == torch.uint8  # of signed integers not every CPU has a kernel
                q = q.double()
                assert first <= q.min() and q.max() <= last and (q.amax(1) - q.amin(1)).min() > 60
                zero = (first + last) / 2 if kind is Int8 else first
                back = (q - zero) * steps.double() + (m.low or 0)  # as it is rounded
                weights = int8.rounded(W.t())
                weights = weights[0].double() * weights[1].double()[:, None]
                want = (back @ weights.t() + b).view(got.shape)
                assert far(got.double(), want) < 1e-5, (name, kind)
                after = F.gelu(want, approximate='tanh')
                assert far(m.product(rows, gelu=True).double(), after) < 0.01, (name, kind)


def test_int8_has_a_kernel():
    """A product in int8 is no loop over numbers, which would take a thousand times as long."""
    (W, b), x = matrix(512, 512), torch.randn(64, 512)
    with any_kernel():
        m = Int8(W, b)
        fns = lambda: m.product(x), lambda: x @ W
        quick, plain = (min(timeit.repeat(fn, number=1, repeat=3)) for fn in fns)
    assert quick < 20 * plain + 0.005, (quick, plain)


def test_int8_scales_rows_alone():
    """A row with large values does not coarsen the others; zeros stay zeros, NaN stays NaN."""
    W, b = matrix()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    with any_kernel():
        m = Int8(W, b)
        alone = m.product(x[:1])
        x[1] *= 1e4
        x[2] = 0
        x[3, 5] = float('nan')
        y = m.product(x)
    assert torch.equal(y[:1], alone) and torch.equal(y[2], b)
    assert y[3].isnan().all() and not y[:3].isnan().any()


def ready(method, options):
    torch.manual_seed(0)
    model = formula_model(SMALL, 3)
    lora.adapt(model, method, **options)
    return place(stirred(model).requires_grad_(False), CPU, torch.float32)


def test_int8_models():
    """Logits of every method are close to those of the plain model, all layers multiply in int8,
    and the names of the state stay as they are."""
    ids, n = ragged(257)
    with any_kernel(), torch.no_grad():
        for method, options in METHODS.items():
            model = ready(method, options)
            want, names = model.classify(ids, n), list(model.state_dict())
            (done, layers), text = said(lambda m=model: int8.attach(m, CPU))
            assert done == layers == 12 and not text, (method, done, layers, text)
            got = model.classify(ids, n)
            assert 1e-5 < far(got, want) < 0.06, (method, far(got, want))
            assert list(model.state_dict()) == names
            last = vars(model.h[0])['forward'].mlp.c_proj
            assert last.matrix is AfterGELU and isinstance(last, (FastConv1D, FastLoRA))


def test_int8_merges_lora():
    """LoRA is added to the weights before they are rounded."""
    ids, n = ragged(257)
    with any_kernel(), torch.no_grad():
        model, merged = (ready('lora', METHODS['lora']) for _ in range(2))
        lora.merge(merged)
        for m in (model, merged):
            int8.attach(m, CPU)
        assert far(model.classify(ids, n), merged.classify(ids, n)) < 1e-5
        layer = vars(model.h[0])['forward'].attn.c_attn
        assert isinstance(layer.folded[0], Int8) and layer.base.packed is None


def test_int8_edited_layers_stay_plain():
    """Where a layer computes something else than in model.py, it is not replaced."""
    ids, n = ragged(257)
    model = ready('head', {})
    layer = model.h[1].mlp.c_fc
    layer.register_forward_hook(lambda module, args, y: y + 1)
    with any_kernel(), torch.no_grad():
        want = model.classify(ids, n)
        assert int8.attach(model, CPU) == (11, 12)
        assert far(model.classify(ids, n), want) < 0.06


def test_int8_log_probabilities():
    """log P of K classes is close to the plain model's; the updates of K classes stay in float32
    beside one rounded base."""
    ids, n = ragged(257)
    ends = torch.tensor([True, False, True, True])
    with any_kernel(), torch.no_grad():
        for kind in ('plain', 'lora', 'top', 'prompt'):
            model = class_model(kind)
            want = model.logprob(ids, n, ends)
            int8.attach(model, CPU)
            error = float((model.logprob(ids, n, ends) / want - 1).abs().max())
            assert 1e-7 < error < 0.02, (kind, error)


def test_int8_runs():
    """A discriminative run opened in int8: nearly the logits of float32, and one line that says how
    near."""
    texts = ['the song was warm', 'not at all dull, but the garden felt messy', '']
    with any_kernel():
        for method in ('lora', 'full'):
            path = tiny_run(method)
            run, text = said(lambda p=path: open_run(p, 'cpu', 'int8'))
            want = open_run(path, 'cpu', 'fp32').logits(texts)
            assert run.dtype == torch.int8 and run.reason == '--dtype int8'
            assert np.abs(run.logits(texts) - want).max() < 0.1 * np.abs(want).max()
            line = 'int8: 8 of 8 layers; 8 texts beside float32: logits differ by up to '
            assert text.startswith(line) and text.count('\n') == 1, text
            assert text.endswith('of 8 labels agree\n') and '% of the largest)' in text


def test_int8_generative_runs():
    """A generative run in int8: log P stays within the tolerance, or the run is refused."""
    with any_kernel():
        for method in ('lora', 'direct'):
            path, texts = gen_run(method), ['cat dog horse', 'one two', '']
            run, text = said(lambda p=path: open_run(p, 'cpu', 'int8'))
            assert 'log P differs by up to' in text and 'nats' in text, text
            exact = open_run(path, 'cpu', 'fp32')
            a, b = run.logits(texts) - run.log_prior, exact.logits(texts) - exact.log_prior
            assert np.allclose(a, b, rtol=0.02, atol=0.05), (method, a, b)
            if run.kind == 'gen' and not run.answers:
                run.sample(run.labels[0], 5)
        path = gen_run('lora')
        with patched(int8, 'TOLERANCE', 1e-9):
            e = raises(UserError, lambda: open_run(path, 'cpu', 'int8'))
        assert 'too coarse' in str(e) and 'nats' in str(e) and 'fp32' in str(e)


def test_int8_scripts():
    """predict.py and eval.py take --dtype int8; eval_results.json stays as it was."""
    path = tiny_run('full')
    with any_kernel():
        code, out, err = script(predict.main, [path, 'the song was warm', '--dtype', 'int8'])
        assert code == 0 and out.strip() and err.startswith('int8: '), err
        with open(f'{path}/eval_results.json', encoding='utf-8') as f:
            before = f.read()
        code, out, err = script(evaluation.main, [path, '--dtype', 'int8', '--windows'])
        assert code == 0 and '(cpu, int8: --dtype int8)' in out and err.startswith('int8: ')
        with open(f'{path}/eval_results.json', encoding='utf-8') as f:
            assert f.read() == before


def test_int8_is_refused():
    """In training, on a GPU, with --plain, and where the kernels are missing, fail or round."""
    path = tiny_run('full')

    def why(main, *argv):
        return str(raises(UserError, lambda: main([*argv, '--dtype', 'int8'])))

    for main in (train_cls.main, train_gen.main):
        assert 'int8 has no gradients' in why(main, '--data', 'demo')
    assert '--plain' in why(predict.main, path, 'x', '--plain')
    with patched(torch, 'empty', lambda *a, **k: torch.zeros(1)):  # a device that is there
        assert 'fp32 on meta' in str(raises(UserError, lambda: pick_device('meta', 'int8')))
    int8.activations.cache_clear()
    try:
        with patched(int8, 'KERNELS', ('qlinear_prepack', 'not_there')):
            assert 'no int8 kernels' in why(predict.main, path, 'x')
            assert 'not_there' in why(evaluation.main, path)

        def fails(*args):
            raise RuntimeError('no such primitive\nat line 3')

        with stand_in(fails):
            assert '(no such primitive)' in why(predict.main, path, 'x')
        with stand_in(lambda q, W, *rest: q.float() @ W.float().t() + 1):
            assert 'not exact' in why(predict.main, path, 'x')
        with any_kernel(), patched(int8, 'attach', lambda model, device: (0, 12)):
            assert 'none of its layers' in why(predict.main, path, 'x')
    finally:
        int8.activations.cache_clear()
