"""A block of GPT-2 computed faster: callables that take the place of a module's forward, with the
same weights. lib/fast.py puts them into a model where they compute what the plain code computes."""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.packed import GELU, FastConv1D, FastLoRA, Taped, ThinLoRA, frozen, wide
from lora import Adapter, LoRA
from model import MLP, Attention, Block, Conv1D

FLASH = '_scaled_dot_product_flash_attention_for_cpu'


def make_layer(layer, matrix):
    """-> what computes a Conv1D or LoRA faster, or None."""
    if changed(layer):
        return None
    if type(layer) is Conv1D and matrix and frozen(layer):
        return FastConv1D(layer, matrix)
    if type(layer) is LoRA:
        base = layer.base
        packs = matrix and type(base) is Conv1D and frozen(base) and not changed(base)
        return FastLoRA(layer, matrix) if packs else ThinLoRA(layer)
    return None


def make_block(block, matrix):
    """-> what computes a Block faster, or None where its parts are not those of model.py."""
    attn = block.attn.sub if type(block.attn) is Adapter else block.attn
    mlp = block.mlp.sub if type(block.mlp) is Adapter else block.mlp
    ours = type(block) is Block and type(attn) is Attention and type(mlp) is MLP
    if not ours or any(map(changed, block.modules())):
        return None
    norms, drops = (block.ln_1, block.ln_2), (attn.attn_drop, attn.resid_drop, mlp.resid_drop)
    of_torch = [type(m) is nn.LayerNorm for m in norms] + [type(m) is nn.Dropout for m in drops]
    return FastBlock(block, attn, mlp, matrix) if all(of_torch) else None


def changed(module):
    """Does an instance compute something else than its class says?"""
    return 'forward' in vars(module) or has_hooks(module)


def has_hooks(module):
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def hooked(modules):
    """Has one of them a hook, or torch one for all?"""
    return nn.modules.module._has_any_global_hook() or any(map(has_hooks, modules))


def fast_forward(module):
    """What speed_up put into the place of a module's forward, or None."""
    forward = vars(module).get('forward')
    return forward.args[0] if isinstance(forward, partial) else forward  # lib/training.wrap_blocks


class Rows:
    """Where the rows (n, C) of real tokens are in a batch (B, T, C) that is padded on the right.
    lengths (B,)"""

    def __init__(self, lengths, T):
        self.real = torch.arange(T, device=lengths.device) < lengths[:, None]  # (B, T)
        self.index = self.real.flatten().nonzero().squeeze(1)
        self.place = self.real.flatten().cumsum(0) - 1
        self.last = lengths.cumsum(0) - 1  # (B,) row of each text's last token

    def spread(self, x, zero=False):
        """(n, C) -> (B, T, C); pads are copies of the row before, which is faster, or zero."""
        x = x.index_select(0, self.place).view(*self.real.shape, -1)
        return x.mul_(self.real[..., None]) if zero else x

    def gather(self, x):
        """(B, T, C) -> (n, C)"""
        return x.flatten(0, 1).index_select(0, self.index)  # its backward is fast


class FastAttention:
    def __init__(self, attn, matrix):
        self.attn = attn
        self.c_attn, self.c_proj = (make_layer(m, matrix) or m for m in (attn.c_attn, attn.c_proj))

    def __call__(self, x, last=None, rows=None):
        """x (B, T, C), or (n, C) with rows -> the same; with last (B,) positions -> (B, 1, C),
        those alone."""
        qkv = self.c_attn(x)
        if x.device.type == 'cpu':  # in bfloat16 its kernel takes twice as long, backward six times
            qkv = qkv.to(wide(qkv.dtype))
        qkv = rows.spread(qkv) if rows else qkv
        B, T, C = *qkv.shape[:2], x.shape[-1]
        q, k, v = qkv.split(C, dim=2)
        mask = None
        if last is not None:  # one query per text, which sees all up to itself
            q = q[torch.arange(B, device=x.device), last].unsqueeze(1)  # (B, 1, C)
            mask = (torch.arange(T, device=x.device) <= last[:, None])[:, None, None]
        H = self.attn.n_head
        q, k, v = (t.reshape(B, -1, H, C // H).transpose(1, 2) for t in (q, k, v))
        p = self.attn.attn_drop.p if self.attn.training else 0.0
        with torch.autocast(x.device.type, enabled=False):  # else it would round q, k, v again
            y = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, -1, C)
        y = rows.gather(y) if rows and last is None else y
        return self.attn.resid_drop(self.c_proj(y))

    def taped(self, x, tape):  # (B, T, C), or (n, C) without pads -> the same
        qkv, pads = self.c_attn.taped(x, tape, own=True).to(wide(x.dtype)), tape.rows
        qkv = pads.spread(qkv) if pads else qkv
        q, k, v = qkv.view(*qkv.shape[:2], 3, self.attn.n_head, -1).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, C/H)
        y, logsumexp = getattr(torch.ops.aten, FLASH)(q, k, v, 0.0, True)
        tape += q, k, v, y, logsumexp
        rows = y.transpose(1, 2).reshape(*qkv.shape[:2], -1)
        rows = (pads.gather(rows) if pads else rows).to(x.dtype)
        copied = pads or rows.dtype != y.dtype
        return self.c_proj.taped(rows, tape, own=copied)

    def vjp(self, g, tape, need):
        g, *last = self.c_proj.vjp(g, tape, True)
        kept, dtype, pads = tape.take(5), g.dtype, tape.rows
        B, H, T, D = kept[0].shape
        g = pads.spread(g, zero=True) if pads else g
        g = g.to(wide(dtype)).view(B, T, H, D).transpose(1, 2)
        grads = getattr(torch.ops.aten, FLASH + '_backward')(g, *kept, 0.0, True)
        d = torch.empty(B, T, 3, H, D, dtype=dtype)
        for i, grad in enumerate(grads):  # of q, k, v: rounded on the way to their place
            d[:, :, i] = grad.transpose(1, 2)
        d = d.view(B, T, -1)
        dx, *first = self.c_attn.vjp(pads.gather(d) if pads else d, tape, need)
        return dx, *first, *last


class FastMLP:
    def __init__(self, mlp, matrix):
        self.mlp = mlp
        self.c_fc, self.c_proj = (make_layer(m, matrix) or m for m in (mlp.c_fc, mlp.c_proj))
        self.gelu = GELU(matrix)

    def __call__(self, x):
        packed = isinstance(self.c_fc, (FastConv1D, FastLoRA))
        x = self.c_fc(x, gelu=True) if packed else F.gelu(self.c_fc(x), approximate='tanh')
        return self.mlp.resid_drop(self.c_proj(x))

    def taped(self, x, tape):  # (B, T, C) -> the same
        x = self.gelu.taped(self.c_fc.taped(x, tape, own=True), tape)
        return self.c_proj.taped(x, tape, own=True)

    def vjp(self, g, tape, need):
        g, *last = self.c_proj.vjp(g, tape, True)
        dx, *first = self.c_fc.vjp(*self.gelu.vjp(g, tape, True, own=True), tape, need)
        return dx, *first, *last


class FastBlock:
    """A Block, its adapters included. If its four layers are packed and its LayerNorms frozen,
    it is one node of autograd."""

    def __init__(self, block, attn, mlp, matrix):
        self.block, self.attn, self.mlp = block, FastAttention(attn, matrix), FastMLP(mlp, matrix)
        self.inside = list(block.modules())
        self.frozen = [p for p in block.parameters() if not p.requires_grad]
        self.layers = (self.attn.c_attn, self.attn.c_proj, self.mlp.c_fc, self.mlp.c_proj)
        self.one_node = (
            all(isinstance(layer, (FastConv1D, FastLoRA)) for layer in self.layers)
            and (attn is block.attn and mlp is block.mlp)  # no adapters
            and all(map(frozen, (block.ln_1, block.ln_2)))
            and hasattr(torch.ops.aten, FLASH)
        )

    def __call__(self, x, last=None, rows=None):
        """x (B, T, C), or (n, C) with rows -> the same; with last (B,), one position of each text
        -> (B, 1, C): all that a classifier needs of the last block, a quarter of its work."""
        if self.touched():
            return type(self.block).forward(self.block, x)
        if last is None and self.one_node and torch.is_grad_enabled() and not self.drops():
            weights = [w for layer in self.layers for w in layer.weights]
            if x.requires_grad or weights:
                return Taped.apply(x, self, rows, *weights)
        block = self.block
        h = adapted(block.attn, self.attn(block.ln_1(x), last, rows))
        if last is not None:
            x = x[rows.last] if rows else x[torch.arange(len(x), device=x.device), last]
            x = x.unsqueeze(1)
        x = x + h
        return x + adapted(block.mlp, self.mlp(block.ln_2(x)))

    def touched(self):
        """Has the block got hooks or other parts, begun to train more, or been compiled since?"""
        if torch.compiler.is_compiling() or self.block._compiled_call_impl:
            return True
        inside = [*self.block.modules()]
        other = inside != self.inside or any(map(changed, inside[1:])) or hooked(inside[:1])
        return other or any(p.requires_grad for p in self.frozen)

    def drops(self):
        """Does GPT-2's own dropout drop anything?"""
        attn, mlp = self.attn.attn, self.mlp.mlp
        p = max(attn.attn_drop.p, attn.resid_drop.p, mlp.resid_drop.p)
        return self.block.training and p > 0

    def taped(self, x, tape):
        dtype = self.attn.c_attn.matrix.dtype
        x = x + self.attn.taped(self.norm(self.block.ln_1, x, tape).to(dtype), tape)
        return x + self.mlp.taped(self.norm(self.block.ln_2, x, tape).to(dtype), tape)

    def vjp(self, g, tape, need):
        dtype = self.attn.c_attn.matrix.dtype
        d, *last = self.mlp.vjp(g.to(dtype), tape, True)
        g = self.norm_vjp(self.block.ln_2, d, tape).add_(g)
        d, *first = self.attn.vjp(g.to(dtype), tape, need)
        dx = self.norm_vjp(self.block.ln_1, d, tape).add_(g) if need else None
        return dx, *first, *last

    @staticmethod
    def norm(ln, x, tape):  # (B, T, C)
        y, mean, rstd = torch.native_layer_norm(x, ln.normalized_shape, ln.weight, ln.bias, ln.eps)
        tape += x, mean, rstd
        return y

    @staticmethod
    def norm_vjp(ln, g, tape):
        x, mean, rstd = tape.take(3)
        args = (ln.normalized_shape, mean, rstd, ln.weight, ln.bias, (True, False, False))
        return torch.ops.aten.native_layer_norm_backward(g.to(x.dtype), x, *args)[0]


def adapted(module, h):
    """h, through the bottleneck of an Adapter if the module is one."""
    if type(module) is not Adapter:
        return h
    return h + module.up(F.gelu(module.down(h), approximate='tanh'))
