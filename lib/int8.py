"""--dtype int8 of eval.py and predict.py: the products of the blocks in 8-bit integers on a CPU.
Called by lib/runs.py.

Weights are rounded once, symmetrically, with a scale per output channel, LoRA added before; the
inputs of a product are rounded as they come, with a scale per row (token). Embeddings, attention,
LayerNorm, GELU, adapters and heads stay in float32, as do LoRA updates of several classes.

The kernel is oneDNN's, through torch.ops.onednn.qlinear_pointwise, which torch.compile emits for
quantized layers, so it is likely to stay. It is as fast as torch.ops.quantized.linear_dynamic or
faster, and needs none of the quantized tensors that torch has deprecated; torch._int_mm packs the
weights in every call. It has one scale for all rows: they are rounded here, and scaled after it."""

import functools
import sys

import torch

from lib import fast, ranks
from lib.blocks import FastBlock, fast_forward
from lib.files import UserError
from lib.matrices import gelu_
from lib.packed import FastConv1D, FastLoRA
from lib.report import counted
from lib.tensors import give_back
from lib.tokens import tokenize
from model import Conv1D

KERNELS = ('qlinear_prepack', 'qlinear_pointwise')  # of torch.ops.onednn
TINY = 1e-30  # a scale is never 0
GELU_LOW = -0.1705  # no value of GELU is lower
TOLERANCE = 0.005  # of log P(text): generative runs must stay within it
TEXTS = (  # compared in both precisions whenever a run is opened
    'a gorgeous, witty film that never forgets to be moving',
    'the plot is thin, the jokes are stale and nobody seems to care',
    'Shares fell three percent on Tuesday after the company cut its forecast for the year.',
    'The home side scored twice in the last ten minutes to reach the final.',
    'Congratulations! You have won a 500 pound prize. Call now to claim it.',
    'are you coming tonight? i can pick you up at eight',
    'Researchers have found a way to store more data in less space.',
    'not bad at all',
)


class Int8:
    """A frozen matrix W (in, out) with bias (out,) in int8. Takes the place of Packed
    (lib/matrices.py), but has no gradient."""

    dtype = torch.float32  # of what product() reads and returns
    low = None  # the lowest value that its input can have, if that is known
    slope, gelu = False, staticmethod(gelu_)
    joins = False  # the updates of K classes cannot share the scale of a row with W

    def __init__(self, W, bias=None, backward=False):
        first, last = activations()
        q, self.scales = rounded(W.detach().t().float())  # (out, in), (out,)
        give_back(W)
        sums = q.sum(1) * self.scales
        zero = (first + last) / 2 if self.low is None else first  # what 0, or low, is rounded to
        self.offset = sums * -zero
        self.bias = torch.zeros_like(sums) if bias is None else bias.detach().float()
        self.bias = self.bias if self.low is None else self.bias + self.low * sums
        self.blocks, self.zeros = pack(q), torch.zeros(len(q), dtype=torch.int64)

    def product(self, x, gelu=False):
        """x (..., in) -> x W + b (..., out) float32; gelu: GELU of it."""
        q, steps = self.quantize(x.reshape(-1, x.shape[-1]).float())
        y = multiply(q, self.blocks, self.scales, self.zeros, self.offset)  # (n, out)
        y = torch.addcmul(self.bias, y, steps, out=y)
        return (self.gelu(y) if gelu else y).view(*x.shape[:-1], -1)

    def quantize(self, rows):
        """rows (n, in) -> integers (n, in), their step (n, 1): of the whole range of 8 bits"""
        first, last = activations()
        top = rows.amax(1, keepdim=True)
        if self.low is None:
            top = torch.maximum(top, rows.amin(1, keepdim=True).neg_()).mul_(2)
        else:
            top = top.sub_(self.low)
        steps = top.clamp_min_(TINY).div_(last - first)
        inverse = steps.reciprocal()
        shift = (first + last) // 2 if self.low is None else first - self.low * inverse
        q = rows * inverse  # two passes: addcmul takes longer with a factor per row
        q = q.add_(shift - 128).round_().to(torch.int8)  # to uint8 it takes four times as long
        return q.view(torch.uint8).add_(128), steps  # modulo 256


class AfterGELU(Int8):
    """The same for an input that GELU made: nearly all of the range is for its positive values."""

    low = GELU_LOW


def rounded(W):
    """W (out, in) float32 -> int8 (out, in), the scale of each row (out,)"""
    scales = W.abs().amax(1).clamp_min_(TINY).div_(127)
    return (W / scales[:, None]).round_().to(torch.int8), scales


# --- the kernel ---


def pack(q):
    """int8 (out, in) -> the blocks that the kernel reads"""
    return torch.ops.onednn.qlinear_prepack(q.contiguous(), None)


def multiply(q, blocks, scales, zeros, offset=None):
    """Integers q (n, in) times packed weights (out, in), times their scales, plus offset (out,)
    -> (n, out) float32"""
    args = (1.0, 0, blocks, scales, zeros, offset, 1.0, 0, torch.float32, 'none', [], '')
    return torch.ops.onednn.qlinear_pointwise(q, *args)


@functools.lru_cache(None)
def activations():
    """How inputs are rounded -> the first and the last integer. 8 bits where the kernel adds
    products exactly; CPUs without VNNI add pairs of them in 16 bits, which is exact for 7 bits.
    Without sign: for signed inputs oneDNN has kernels only where there is AMX, elsewhere a loop of
    4,000 times the time. Raises UserError where there is no kernel."""
    if missing := [name for name in KERNELS if not hasattr(torch.ops.onednn, name)]:
        where = f'torch.ops.onednn.{missing[0]}'
        raise UserError(f'this torch has no int8 kernels ({where}): use --dtype fp32')
    W = torch.full((16, 64), 127, dtype=torch.int8)
    W[8:] = -127
    for first, last in ((1, 255), (1, 127)):
        q = torch.full((16, 64), last, dtype=torch.uint8)
        q[8:] = first
        q[:, ::3] = 5
        ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int64)
        try:
            y = multiply(q, pack(W), ones, zeros)
        except RuntimeError as e:
            problem = str(e).splitlines()[0]
            raise UserError(f'int8 products fail here ({problem}): use --dtype fp32') from None
        if torch.equal(y, (q.float() @ W.float().t())):
            return first, last
    raise UserError('int8 products are not exact on this processor: use --dtype fp32')


# --- a run ---


def check(plain):
    """Raise UserError, before anything is loaded, where a run cannot be opened in int8."""
    if plain:
        raise UserError('--dtype int8 is one of the faster kernels that --plain leaves out')
    activations()


@torch.no_grad()
def quantize(run):
    """Compute an opened run (float32, plain, LoRA not merged) in int8 from now on. Compares both on
    TEXTS and says how far they are apart. Raises UserError if a generative run is too far."""
    tokens = tokenize(run.enc, TEXTS, cache=False)
    before, labels = scores(run, tokens)
    models = {id(model): model for model, _ in getattr(run, 'passes', [(run.model, ())])}
    done, layers = map(sum, zip(*(attach(model, run.device) for model in models.values())))
    if not done:
        raise UserError(f'{run.path}: none of its layers can be computed in int8')
    run.dtype = torch.int8
    after, new_labels = scores(run, tokens)
    error, share = abs(after - before).max(), (abs(after - before) / abs(before)).max()
    if run.kind == 'cls':
        share = error / abs(before).max()
        far = f'logits differ by up to {error:.2g} ({share:.1%} of the largest)'
    else:
        far = f'log P differs by up to {error:.2g} nats ({share:.2%} of it)'
    if run.kind == 'gen' and not share <= TOLERANCE:
        text = f'{far}, more than {TOLERANCE:.1%}: use bf16 or fp32'
        raise UserError(f'--dtype int8 is too coarse for {run.path}: {text}')
    if ranks.rank() == 0:
        what = f'int8: {done} of {counted(layers, "layer")}; {counted(len(TEXTS), "text")} beside'
        text = f'{what} float32: {far}, {(new_labels == labels).sum()} of {len(TEXTS)} labels agree'
        print(text, file=sys.stderr)
    return run


def scores(run, tokens):
    """Logits (N, K), or log P of text or answer in nats, which run.calibrated() does not change;
    and the predicted class of each text (N,)."""
    logits = run.logits_of(tokens)
    labels = run.probs(logits).argmax(1)
    if run.kind == 'gen':
        logits = logits - run.log_prior + (run.neutral if run.answers else 0)
    return logits, labels


def attach(model, device):
    """Let the blocks of a model multiply in int8 -> number of layers that do, of all"""
    fast.speed_up(model, device, torch.float32, matrix=Int8)
    for block in model.h:
        quick = fast_forward(block)
        last = quick.mlp.c_proj if isinstance(quick, FastBlock) else None
        if isinstance(last, (FastConv1D, FastLoRA)):
            last.matrix = AfterGELU
        if isinstance(last, FastLoRA):
            last.base.matrix = AfterGELU
    modules = [m for block in model.h for m in block.modules()]
    return len(set(map(id, in_int8(modules)))), sum(isinstance(m, Conv1D) for m in modules)


def in_int8(modules):
    """Yield the Conv1D of each product in int8 that speed_up put into the place of a forward."""
    for quick in map(fast_forward, modules):
        for layer in quick.layers if isinstance(quick, FastBlock) else [quick]:
            if isinstance(layer, (FastConv1D, FastLoRA)):
                yield layer.conv if isinstance(layer, FastConv1D) else layer.lora.base
