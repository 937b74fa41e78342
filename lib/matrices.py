"""Products with frozen matrices on a CPU, packed once into the blocks that a kernel reads: by
oneDNN, on Intel's CPUs by MKL in float32. lib/fast.py chooses; lib/packed.py and
lib/vocabulary.py build on it."""

import functools
import math
import platform

import torch
import torch.nn.functional as F

from lib.device import bf16_pays, cpu_is_intels
from lib.tensors import give_back

PIECE = 65536  # numbers per thread that an element-wise formula handles at a time


class Packed:
    """A frozen matrix W (in, out) with bias (out,) or None, in bfloat16 and in the blocks that
    oneDNN's kernels read, as torch.compile packs the weights of an inference graph; with row-major
    weights every call repacks them, 20 % of its time."""

    dtype = torch.bfloat16
    slope = False  # does a forward pass keep the slope of GELU, or its argument?
    joins = True  # may W and the updates of K classes be one matrix? see FastLoRA.fold

    def __init__(self, W, bias=None, backward=True):
        """backward: keep W, to pack it for gradient() as well when one is asked for."""
        self.W = W if backward else None
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.blocks, self.backward_blocks = self.pack(W.t()), None
        give_back(W)

    def __deepcopy__(self, memo):  # oneDNN's blocks cannot be copied; a copied layer packs its own
        return self

    @classmethod
    def possible(cls, device, dtype):
        """Can this torch pack, and does it pay on this processor?"""
        ops = ('_reorder_linear_weight', '_linear_pointwise')
        fits = device.type == 'cpu' and dtype == cls.dtype and torch.backends.mkldnn.is_available()
        return fits and cls.pays() and all(hasattr(torch.ops.mkldnn, op) for op in ops)

    @staticmethod
    def pays():
        return bf16_pays()

    @classmethod
    def pack(cls, W):  # (out, in) -> opaque
        return torch.ops.mkldnn._reorder_linear_weight(W.detach().to(cls.dtype).contiguous())

    def product(self, x, gelu=False):
        """x (..., in) -> x W + b (..., out); gelu: GELU of it, applied before it is rounded."""
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, *after(gelu))

    def gradient(self, g):
        """Gradient of the product (..., out) -> of x (..., in)."""
        return torch.ops.mkldnn._linear_pointwise(g, self.transposed(), None, *after(False))

    def transposed(self):
        """-> W, packed for gradient()"""
        if self.backward_blocks is None:
            self.backward_blocks = self.pack(self.W)
            give_back(self.W)
        return self.backward_blocks

    @classmethod
    def gelu(cls, x):
        """GELU (tanh form) by oneDNN, two to three times as fast as torch's; torch reaches it only
        after a product, here one with the identity."""
        if x.shape[-1] % 16:
            return F.gelu(x, approximate='tanh')
        rows, ones = x.reshape(-1, 16), identity(cls.dtype)
        return torch.ops.mkldnn._linear_pointwise(rows, ones, None, *after(True)).view(x.shape)


def after(gelu):
    """What oneDNN computes after a product, as arguments of torch's operator."""
    return ('gelu', [], 'tanh') if gelu else ('none', [], '')


@functools.lru_cache(None)
def identity(dtype):
    return torch.ops.mkldnn._reorder_linear_weight(torch.eye(16, dtype=dtype))


def gelu_(x):
    """Overwrite x by its GELU (tanh form): x s with s = sigmoid(z) and z = 2 sqrt(2 / pi) (x +
    0.044715 x^3), in pieces that stay in cache. In float32 with AVX2, oneDNN's takes twice as long,
    and three to four times as part of a product."""
    a = 2 * math.sqrt(2 / math.pi)
    first, size = x.new_tensor(a), PIECE * torch.get_num_threads()
    z = x.new_empty(min(size, x.numel()))
    for X in x.view(-1).split(size):
        Z = z[: len(X)]
        X.mul_(torch.addcmul(first, X, X, value=0.044715 * a, out=Z).mul_(X).sigmoid_())
    return x


def gelu_slope(x):
    """-> GELU of x and its slope: x s and s + s (1 - s) x z', as gelu_ has s and z. Together they
    cost what torch's gelu_backward costs, which computes tanh again."""
    x, a = x.contiguous(), 2 * math.sqrt(2 / math.pi)
    y, slope, first = torch.empty_like(x), torch.empty_like(x), x.new_tensor(a)
    size = PIECE * torch.get_num_threads()
    z, s = x.new_empty(2, min(size, x.numel()))
    for X, Y, D in zip(*(t.view(-1).split(size) for t in (x, y, slope))):
        Z, S = z[: len(X)], s[: len(X)]
        torch.addcmul(first, X, X, value=0.044715 * a, out=Z).mul_(X)
        torch.sigmoid(Z, out=S)
        torch.mul(X, S, out=Y)
        torch.add(Z, X, alpha=-2 * a / 3, out=D)  # x z' / 3
        torch.addcmul(S, S, S, value=-1, out=Z)
        torch.addcmul(S, Z, D, value=3, out=D)
    return y, slope


class Packed32(Packed):
    """The same in float32, without loss: for CPUs that are not faster in bfloat16."""

    dtype, slope = torch.float32, True
    gelu, gelu_slope = staticmethod(gelu_), staticmethod(gelu_slope)

    def product(self, x, gelu=False):
        y = super().product(x)
        return self.gelu(y) if gelu else y

    @staticmethod
    def pays():
        return platform.machine().lower() in ('x86_64', 'amd64')  # measured on no other


class MKLPacked32(Packed32):
    """The same by MKL, which is faster than oneDNN on Intel's CPUs alone: on AMD's Zen 3 it takes
    1.0 to 1.6 times as long."""

    def __init__(self, W, bias=None, backward=True):
        super().__init__(W, bias, backward)
        # the operator asks for W as well, and reads its shape
        self.shape = torch.empty(()).expand(W.shape[1], W.shape[0])

    @staticmethod
    def pays():
        ops = ('_mkl_reorder_linear_weight', '_mkl_linear')
        known = all(hasattr(torch.ops.mkl, op) for op in ops)
        return torch.backends.mkl.is_available() and cpu_is_intels() and known and mkl_packs()

    @staticmethod
    def pack(W):  # (out, in) -> opaque; blocks for products of 512 rows, right for any
        return torch.ops.mkl._mkl_reorder_linear_weight(W.detach().float().contiguous(), 512)

    def product(self, x, gelu=False):
        y = multiply(x, self.blocks, self.shape, self.bias)
        return self.gelu(y) if gelu else y

    def gradient(self, g):
        return multiply(g, self.transposed(), self.shape.t(), None)


@functools.lru_cache(None)
def mkl_packs():
    """Does MKL compute products of any number of rows with blocks that it made for others? Its
    manual does not forbid it; tried once."""
    W, b = torch.linspace(-1, 1, 96 * 520).sin().view(96, 520), torch.linspace(-1, 1, 520)
    packed, x = MKLPacked32(W, b), torch.linspace(-3, 3, 1100 * 96).cos().view(1100, 96)
    errors = [packed.product(x[:n]) - torch.addmm(b, x[:n], W) for n in (1, 33, 1100)]
    return all(float(e.abs().max()) < 1e-4 for e in errors)


def multiply(x, blocks, shape, bias):
    rows = x.numel() // x.shape[-1]  # any other number would make it ignore the blocks
    return torch.ops.mkl._mkl_linear(x, blocks, shape, bias, rows)


def packing(device, dtype):
    """-> the class of packed matrices for products in this precision, or None."""
    kinds = (Packed, MKLPacked32, Packed32)
    return next((kind for kind in kinds if kind.possible(device, dtype)), None)
