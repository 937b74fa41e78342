"""Layers on packed matrices (lib/matrices.py): Conv1D, GELU and LoRA, each with a hand-written
backward. lib/fast.py puts them into a model."""

import functools

import torch
import torch.nn.functional as F

from lib import dropout
from lib.tensors import give_back, stamp

# --- one node of autograd ---


class Tape(list):
    """Tensors that a forward pass leaves for the backward pass, which takes them from the end.
    rows: where the tokens are if pads were left out (lib/blocks.py, Rows), else None."""

    def __init__(self, tensors=(), rows=None):
        super().__init__(tensors)
        self.rows = rows

    def take(self, n):
        taken = self[-n:]
        del self[-n:]
        return taken

    @functools.cached_property
    def rng(self):
        return dropout.generator()


class Taped(torch.autograd.Function):
    """One node of autograd for a part of the model, up to a whole block: part.taped(x, tape)
    computes; part.vjp(g, tape, need) returns the gradients of x (None if there is no need) and of
    the weights. The autograd overhead of ~100 small nodes is 5 % of a step."""

    @staticmethod
    def forward(ctx, x, part, rows, *weights):
        tape, ctx.part, ctx.rows = Tape(rows=rows), part, rows
        y = part.taped(x, tape)
        ctx.save_for_backward(*tape)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # an error for a gradient of gradients
    def backward(ctx, g):
        tape = Tape(ctx.saved_tensors, ctx.rows)
        dx, *rest = ctx.part.vjp(g, tape, ctx.needs_input_grad[0])
        return dx, None, None, *rest


def wide(dtype):
    """The precision of sums and of the residual stream: float32, or float64 in a test."""
    return torch.promote_types(dtype, torch.float32)


class GELU:
    """GELU (tanh form) with a backward, of the output of a packed product."""

    def __init__(self, matrix):
        self.matrix = matrix

    def taped(self, x, tape):
        y, kept = self.matrix.gelu_slope(x) if self.matrix.slope else (self.matrix.gelu(x), x)
        tape.append(kept)
        return y

    def vjp(self, g, tape, need, own=False):  # own: g may be overwritten
        kept = tape.take(1)[0]
        if self.matrix.slope:
            return (g.mul_(kept) if own else g * kept,)
        return (torch.ops.aten.gelu_backward(g, kept, approximate='tanh'),)


# --- layers: callables that take the place of a module's forward ---


def frozen(module):
    return not any(p.requires_grad for p in module.parameters())


class FastConv1D:
    """Conv1D that is frozen. matrix: a class of lib/matrices.py."""

    weights = ()  # what trains, besides x

    def __init__(self, conv, matrix):
        self.conv, self.matrix, self.gelu, self.packed = conv, matrix, GELU(matrix), None
        self.of = None  # what it was made of

    def pack(self):
        """-> Packed, made when it is first needed, and again if the weights have changed."""
        now = stamp(self.conv.weight, self.conv.bias)
        if self.of != now:
            self.packed, self.of = self.matrix(self.conv.weight, self.conv.bias), now
        return self.packed

    def __call__(self, x, gelu=False):  # (..., in) -> (..., out); gelu: GELU of it
        if torch.compiler.is_compiling() or not frozen(self.conv):  # it began to train
            return type(self.conv).forward(self.conv, x)
        x = x.to(self.matrix.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.pack().product(x, gelu)
        y = Taped.apply(x, self, None)
        return Taped.apply(y, self.gelu, None) if gelu else y

    def taped(self, x, tape, own=False):  # own: nobody else holds x, it may be overwritten
        return self.pack().product(x)

    def vjp(self, g, tape, need):
        return (self.packed.gradient(g) if need else None,)


def narrow(x, W):
    """x W^T, where W has few rows. In float32 its transpose, W x^T, takes half the time."""
    return x @ W.mT if x.dtype == torch.bfloat16 else (W @ x.mT).mT


class FastLoRA:
    """LoRA on top of a packed Conv1D."""

    def __init__(self, lora, matrix):
        self.lora, self.matrix, self.gelu = lora, matrix, GELU(matrix)
        self.base, self.folded, self.of = FastConv1D(lora.base, matrix), None, None

    @property
    def weights(self):
        return self.lora.A, self.lora.B

    def __call__(self, x, gelu=False):
        if torch.compiler.is_compiling() or not frozen(self.lora.base):
            return type(self.lora).forward(self.lora, x)
        x = x.to(self.matrix.dtype)
        if self.folds(x, gelu):
            return self.fold(x, gelu)
        y = Taped.apply(x, self, None, *self.weights)
        if gelu and not torch.is_grad_enabled():
            return self.matrix.gelu(y)
        return Taped.apply(y, self.gelu, None) if gelu else y

    def folds(self, x, gelu):
        """Is fold() to be used? While nothing trains, and for K classes if their updates are thin
        enough for it to pay."""
        lora, (A, B) = self.lora, self.weights
        trains = A.requires_grad or B.requires_grad or (lora.training and lora.p)
        thin = A.shape[:-1].numel() <= A.shape[-1] // (4 if gelu else 16)  # K r
        folds = A.dim() == 2 or thin and self.matrix.joins
        return folds and not trains and not (torch.is_grad_enabled() and x.requires_grad)

    def fold(self, x, gelu):
        """The layer as one packed product, GELU included. One update: W + scale (B A)^T, summed in
        float32 and rounded once. K classes: x W + (x A^T) B^T is (x, x A^T) times W on top of B^T;
        below W are all classes' B^T, and a row has zeros for those of the others."""
        (A, B), conv = self.weights, self.lora.base
        k, r, n_in = len(A) if A.dim() == 3 else 0, *A.shape[-2:]
        sums = A.sum().item(), B.sum().item()  # an average written past autograd leaves no stamp
        now = [*stamp(conv.weight, conv.bias, A, B), self.lora.scale, *sums]
        if self.of != now:
            W, down, mask = conv.weight.detach(), None, None
            if k:
                W = torch.cat((W, B.transpose(1, 2).flatten(0, 1).to(W.dtype)))  # (in + K r, out)
                down = (A * self.lora.scale).reshape(-1, n_in).t()  # (in, K r)
                down = down.to(self.matrix.dtype)
                mask = torch.eye(k, dtype=self.matrix.dtype).repeat_interleave(r, 1)[:, None]
            else:
                W = W + self.lora.delta()
            folded = self.matrix(W, conv.bias, backward=False), down, mask
            give_back(conv.weight)
            self.folded, self.of = folded, now
        matrix, down, mask = self.folded
        if k:
            rows = torch.empty(x.numel() // n_in, n_in + k * r, dtype=self.matrix.dtype)
            rows[:, :n_in] = x.reshape(-1, n_in)
            thin = (rows[:, :n_in] @ down).view(k, -1, k * r) * mask
            rows[:, n_in:] = thin.view(-1, k * r)
            x = rows.view(*x.shape[:-1], -1)
        return matrix.product(x, gelu)

    def taped(self, x, tape, own=False):  # scale and dropout's 1 / (1 - p) are part of A
        p = self.lora.p if self.lora.training else 0.0
        rows = x.reshape(*self.lora.A.shape[:-2], -1, x.shape[-1])
        y, positions, kept = self.base.pack().product(rows), None, rows
        if p:
            positions = dropout.dropped(x.numel(), p, tape.rng)
            kept = rows if own else rows.clone(memory_format=torch.contiguous_format)
            kept.view(-1).index_fill_(0, positions, 0)
        factor = torch.as_tensor(self.lora.scale / (1 - p), dtype=torch.float64)
        A = (self.lora.A * factor).to(x.dtype)
        B = self.lora.B.to(x.dtype)
        a = narrow(kept, A)
        tape += kept, a, A, B, positions, factor
        y = y.addmm_(a, B.t()) if y.dim() == 2 else y.baddbmm_(a, B.mT)
        return y.view(*x.shape[:-1], -1)

    def vjp(self, g, tape, need):
        kept, a, A, B, positions, factor = tape.take(6)
        rows = g.reshape(*self.lora.A.shape[:-2], -1, g.shape[-1])
        da, dx = narrow(rows, B.mT.contiguous()), None
        dA = (da.mT @ kept).to(wide(g.dtype)).mul_(factor)
        # contiguous: else it is copied twice
        dB = (a.mT @ rows).mT.to(wide(g.dtype), memory_format=torch.contiguous_format)
        if need:
            dx = self.base.packed.gradient(rows)
            flat = dx.view(-1)  # what was dropped gets nothing from the update
            without = None if positions is None else flat.take(positions)
            dx = dx.addmm_(da, A) if dx.dim() == 2 else dx.baddbmm_(da, A)
            if positions is not None:
                flat.scatter_(0, positions, without)
            dx = dx.view(*g.shape[:-1], -1)
        return dx, dA, dB


class Scaled(torch.autograd.Function):
    """scale * B in the precision of the products: one kernel in each direction, where a cast and a
    product are two. For a GPU that runs kernels faster than Python launches them."""

    @staticmethod
    def forward(ctx, B, scale, dtype):
        ctx.scale, ctx.dtype = scale, B.dtype
        return torch.mul(B, scale, out=torch.empty_like(B, dtype=dtype))

    @staticmethod
    def backward(ctx, g):
        return torch.mul(g, ctx.scale, out=torch.empty_like(g, dtype=ctx.dtype)), None, None


class ThinLoRA:
    """LoRA around a layer that is not packed: the sum costs no pass of its own, dropout on a CPU is
    drawn by its gaps, and where B is cast, the scale is part of the copy."""

    def __init__(self, lora):
        self.lora = lora

    def __call__(self, x):
        if torch.compiler.is_compiling():
            return type(self.lora).forward(self.lora, x)
        A, B, scale = self.lora.A, self.lora.B, self.lora.scale
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # rounded once, before the mask
        y = self.lora.base(x)
        x = x.to(y.dtype)
        if self.lora.p and self.lora.training:
            x = dropout.dropout(x, self.lora.p)
        if B.dtype != y.dtype:
            B, scale = Scaled.apply(B, scale, y.dtype), None
        rows = x.reshape(*A.shape[:-2], -1, x.shape[-1])  # (n, in), or (K, n / K, in)
        a = F.linear(rows, A) if A.dim() == 2 else torch.bmm(rows, A.mT.to(x.dtype))
        a = a if scale is None else a * scale
        add = torch.addmm if A.dim() == 2 else torch.baddbmm
        return add(y.reshape(*a.shape[:-1], -1), a, B.mT).view(y.shape)
