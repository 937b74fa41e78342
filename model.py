"""GPT-2 by hand, with the names and the weight layout of OpenAI's checkpoints, and what a training script needs around it:
safetensors in and out, device and precision, optimizer groups, learning-rate schedule, evaluation in padded batches."""
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import mmap
import os
import pickletools
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

import data
from data import UserError

# ------------------------------------------------------------------------------------------------------------- shapes

@dataclass
class Config:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int = 1024      # positions the model knows
    vocab_size: int = 50257     # GPT-2's tokens; 257 = bytes + <|endoftext|>, the demo's


SHAPES = {
    'gpt2': Config(12, 12, 768),            # 124M
    'gpt2-medium': Config(24, 16, 1024),    # 350M
    'gpt2-large': Config(36, 20, 1280),     # 774M
    'gpt2-xl': Config(48, 25, 1600),        # 1558M
    'distilgpt2': Config(6, 12, 768),       # 82M
    'nano': Config(4, 4, 128, 256, 257),    # 0.9M, bytes: made here for the demo, see nano_folder
}
HUB_NAMES = {name: f'{owner}/{name}' for name, owner in data.WEIGHTS.items()}
NANO_STEPS = 1600       # of its training; a minute or more on two cores
FROZEN_BYTES = 8 * 2**30        # of FrozenStates that the cache keeps; SST-2's are 1.3 GB, those of the head alone 0.2 GB
SPARE = 8               # columns of the product of logits besides the model's: one for the shift, and zeros to a width that kernels like
GRAPH_WIDTH = 8         # tokens; a batch that is recorded as a CUDA graph is as wide as a multiple of this
ROWS, COLUMNS = 512, 4096       # positions and tokens whose next-token logits are held at a time: 8 MB in float32

# -------------------------------------------------------------------------------------------------------------- model

class Packed:
    """A frozen matrix W (in, out), with bias (out,), in bfloat16 and in the blocks that oneDNN's kernels read, as torch.compile packs the weights
    of an inference graph; a product from rows makes those blocks anew each time, a fifth of its time."""

    def __init__(self, W, bias=None, keep=True):
        """keep: W, to pack it for the gradient, too, when one is asked for."""
        self.W, self.bias = W if keep else None, bias if bias is None else bias.detach().to(torch.bfloat16)
        self.there, self.back = self.pack(W.t()), None
        unload(W)

    @staticmethod
    def possible(device, dtype):
        """Can this torch pack, and does it pay on this processor?"""
        ops = torch.ops.mkldnn
        return (device.type == 'cpu' and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and cpu_has_bf16()
                and hasattr(ops, '_reorder_linear_weight') and hasattr(ops, '_linear_pointwise'))

    @staticmethod
    def pack(W):                                                    # (out, in) -> opaque
        return torch.ops.mkldnn._reorder_linear_weight(W.detach().to(torch.bfloat16).contiguous())

    def product(self, x, gelu=False):
        """x (..., in) bfloat16 -> x W + b (..., out) bfloat16; gelu: GELU of it (tanh form), applied before it is rounded."""
        assert not (torch.is_grad_enabled() and x.requires_grad), 'autograd does not see this product: Taped does'
        return torch.ops.mkldnn._linear_pointwise(x, self.there, self.bias, *(('gelu', [], 'tanh') if gelu else ('none', [], '')))

    def gradient(self, g):
        """Gradient of the product (..., out) -> of x (..., in)."""
        if self.back is None:
            self.back = self.pack(self.W)
            unload(self.W)
        return torch.ops.mkldnn._linear_pointwise(g, self.back, None, 'none', [], '')


class Tape(list):
    """What a forward pass leaves for the backward pass, which takes it from the end."""

    def take(self, n):
        taken = self[-n:]
        del self[-n:]
        return taken

    @functools.cached_property
    def rng(self):
        return generator()


def generator():
    """numpy's random numbers, seeded by torch's."""
    return np.random.Generator(np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_())))


class Taped(torch.autograd.Function):
    """One node of autograd for a module over packed products, up to a whole block of GPT-2: module.taped(x, tape) computes, and module.vjp(g, tape,
    need), the vector-Jacobian product, returns the gradients of x, if there is a need for it, and of the module's `weights` that train. Among
    products as short as a batch of sentences makes them, what torch does between a hundred small nodes takes a twentieth of a step."""

    @staticmethod
    def forward(ctx, x, module, *weights):
        tape, ctx.module = Tape(), module
        y = module.taped(x, tape)
        ctx.save_for_backward(*tape)
        return y

    @staticmethod
    def backward(ctx, g):
        dx, *rest = ctx.module.vjp(g, Tape(ctx.saved_tensors), ctx.needs_input_grad[0])
        return dx, None, *rest


class PackedGELU:
    """GELU (tanh form) of a bfloat16 tensor by oneDNN, three times as fast as torch's own. torch reaches it only behind a product: the identity's."""
    identity = None

    @staticmethod
    def taped(x, tape):
        tape.append(x)
        if x.shape[-1] % 16:
            return F.gelu(x, approximate='tanh')
        if PackedGELU.identity is None:
            PackedGELU.identity = Packed.pack(torch.eye(16))
        return torch.ops.mkldnn._linear_pointwise(x.view(-1, 16), PackedGELU.identity, None, 'gelu', [], 'tanh').view(x.shape)

    @staticmethod
    def vjp(g, tape, need):
        return torch.ops.aten.gelu_backward(g, *tape.take(1), approximate='tanh'),


def gelu_of(x, packed=False):
    """GELU in the tanh form. packed: x came out of a packed product."""
    return Taped.apply(x, PackedGELU) if packed else F.gelu(x, approximate='tanh')


class Conv1D(nn.Module):
    """y = x W + b with W stored (in, out), as in OpenAI's checkpoints; nn.Linear stores (out, in)."""
    weights = ()                                                    # what trains in taped(), beside x

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.packs, self.packed = False, None                       # packs: place() allows it, and the first product does it

    def pack(self):
        """-> Packed, made once."""
        self.packed = self.packed or Packed(self.weight, self.bias)
        return self.packed

    def forward(self, x, gelu=False):                               # (..., in) -> (..., out); gelu: GELU of it
        if self.packs and not (torch.is_grad_enabled() and x.requires_grad):
            return self.pack().product(x.to(torch.bfloat16), gelu)
        y = Taped.apply(x.to(torch.bfloat16), self) if self.packs else F.linear(x, self.weight.t(), self.bias)
        return gelu_of(y, self.packs) if gelu else y

    def taped(self, x, tape, own=False):                            # own: nobody else holds x, it may be written over
        return self.pack().product(x)

    def vjp(self, g, tape, need):
        return self.packed.gradient(g) if need else None,


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = Conv1D(cfg.n_embd, 3 * cfg.n_embd)
        self.c_proj = Conv1D(cfg.n_embd, cfg.n_embd)
        self.dropout = 0.0                                          # GPT.set_dropout
        self.resid_drop = nn.Dropout(0.0)

    def forward(self, x, last=None):                                # (B, T, C) -> the same, or with last (B,) positions -> (B, 1, C)
        B, T, C = x.shape
        qkv = self.c_attn(x)
        if x.device.type == 'cpu':                                  # the CPU kernel takes twice as long in bfloat16, and its backward six times
            qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
        q, k, v = qkv.split(C, dim=2)                               # (B, T, C) each
        mask = None
        if last is not None:                                        # only one position of each text asks; it sees all up to itself
            q = q[torch.arange(B, device=x.device), last].unsqueeze(1)                              # (B, 1, C)
            mask = (torch.arange(T, device=x.device) <= last[:, None])[:, None, None]               # (B, 1, 1, T)
        q, k, v = (t.reshape(B, -1, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))    # (B, H, T or 1, C/H)
        with torch.autocast(x.device.type, enabled=False):           # else autocast would round q, k, v again
            # Causal, and pads stand on the right: no real token can see a pad, so no padding mask is needed.
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=self.dropout if self.training else 0.0)
        return self.resid_drop(self.c_proj(y.transpose(1, 2).reshape(B, -1, C)))

    def taped(self, x, tape):                                       # (B, T, C) bfloat16 -> the same
        qkv = self.c_attn.taped(x, tape, own=True).float().view(*x.shape[:2], 3, self.n_head, -1)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))        # (B, H, T, C/H)
        y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        tape += q, k, v, y, logsumexp
        return self.c_proj.taped(y.transpose(1, 2).reshape(x.shape).to(torch.bfloat16), tape, own=True)

    def vjp(self, g, tape, need):
        g, *last = self.c_proj.vjp(g, tape, True)
        kept = tape.take(5)
        B, H, T, D = kept[0].shape
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(g.float().view(B, T, H, D).transpose(1, 2), *kept, 0.0, True)
        d = torch.empty(B, T, 3, H, D, dtype=torch.bfloat16)
        for i, grad in enumerate(grads):                            # of q, k and v, rounded on the way to where they lie
            d[:, :, i] = grad.transpose(1, 2)
        dx, *first = self.c_attn.vjp(d.view(B, T, -1), tape, need)
        return dx, *first, *last


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Conv1D(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = Conv1D(4 * cfg.n_embd, cfg.n_embd)
        self.resid_drop = nn.Dropout(0.0)

    def forward(self, x):
        # The tanh form of GELU is the one GPT-2 was trained with; the exact one is 1e-3 off in the logits.
        return self.resid_drop(self.c_proj(self.c_fc(x, gelu=True)))

    def taped(self, x, tape):                                       # (..., C) bfloat16 -> the same
        return self.c_proj.taped(PackedGELU.taped(self.c_fc.taped(x, tape, own=True), tape), tape, own=True)

    def vjp(self, g, tape, need):
        g, *last = self.c_proj.vjp(g, tape, True)
        dx, *first = self.c_fc.vjp(*PackedGELU.vjp(g, tape, True), tape, need)
        return dx, *first, *last


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, eps=1e-5)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, eps=1e-5)
        self.mlp = MLP(cfg)
        self.packs = False                                          # place() allows it to be one node: taped() and vjp(), not the modules' forward()

    def forward(self, x, last=None):
        """x (B, T, C) -> (B, T, C); or with last (B,), one position of each text -> (B, 1, C), all that a classifier needs of the last block."""
        if last is None and self.packs and torch.is_grad_enabled() and not (self.training and self.attn.dropout):
            weights = [w for layer in self.layers() for w in layer.weights]
            if x.requires_grad or weights:
                return Taped.apply(x, self, *weights)
        h = self.attn(self.ln_1(x), last)
        x = (x if last is None else x[torch.arange(len(x), device=x.device), last].unsqueeze(1)) + h
        return x + self.mlp(self.ln_2(x))

    def layers(self):
        return self.attn.c_attn, self.attn.c_proj, self.mlp.c_fc, self.mlp.c_proj

    def taped(self, x, tape):
        x = x + self.attn.taped(self.norm(self.ln_1, x, tape), tape)
        return x + self.mlp.taped(self.norm(self.ln_2, x, tape), tape)

    def vjp(self, g, tape, need):
        d, *last = self.mlp.vjp(g.to(torch.bfloat16), tape, True)
        g = self.norm_vjp(self.ln_2, d, tape).add_(g)
        d, *first = self.attn.vjp(g.to(torch.bfloat16), tape, need)
        return self.norm_vjp(self.ln_1, d, tape).add_(g) if need else None, *first, *last

    @staticmethod
    def norm(ln, x, tape):                                          # (B, T, C) float32 -> bfloat16
        y, mean, rstd = torch.native_layer_norm(x, ln.normalized_shape, ln.weight, ln.bias, ln.eps)
        tape += x, mean, rstd
        return y.to(torch.bfloat16)

    @staticmethod
    def norm_vjp(ln, g, tape):
        kept = tape.take(3)
        return torch.ops.aten.native_layer_norm_backward(g.float(), kept[0], ln.normalized_shape, *kept[1:], ln.weight, ln.bias, (True, False, False))[0]


class NextLogprobs(torch.autograd.Function):
    """h (M, C), W (V, C) of one dtype, target (M,) -> (M,) float32 log softmax(h W^T)[target]. Neither direction ever holds (M, V): the logits
    of ROWS positions and COLUMNS tokens at a time stay in the cache, where they become exponentials in place; sums are rescaled when a larger
    logit comes (Milakov and Gimelshein 2018, arXiv 1805.02867). While W is frozen the gradient of h, W[target] - softmax(h W^T) W, is taken
    as long as they are there; to train W they are computed again. packed: Packed of W^T in such pieces, with a row of ones below."""

    @staticmethod
    def forward(ctx, h, W, target, packed=None):
        now = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        out, grad, tops, totals = h.new_empty(len(h), dtype=torch.float32), torch.empty_like(h) if now else None, [], []
        for piece, part, shift, rest in NextLogprobs.pieces(h, W, target):
            top, total, mean = torch.zeros_like(rest), torch.zeros_like(rest), torch.zeros_like(part, dtype=torch.float32)
            for columns, x in NextLogprobs.logits(part, W, shift, packed):
                higher = torch.maximum(top, x.amax(1, keepdim=True))
                shrink, top = (top - higher).exp_(), higher
                e = x.sub_(top).exp_()
                total = total * shrink + e.sum(1, keepdim=True)
                if now:
                    e = e.to(h.dtype)
                    mean = mean.mul_(shrink).add_(e @ W[columns])
            out[piece] = (rest - top - total.log()).squeeze(1)
            if now:
                grad[piece] = W[target[piece]] - mean / total
            tops.append(top), totals.append(total)
        ctx.save_for_backward(*([grad] if now else [h, W, target, torch.cat(tops), torch.cat(totals)]))
        return out

    @staticmethod
    def pieces(h, W, target):
        """Yields slice, h there (m, C), shift (m, 1), and what shift lacks to the target's logit (m, 1) float32.
        GPT-2's logits lie near -100, where a product in bfloat16 comes out 0.5 apart. Softmax does not see a shift: with the target's logit
        subtracted within the product, before it is rounded, the target's error is none and another token's at most 1/256 of its distance."""
        rows = ROWS * (1 if h.device.type == 'cpu' else 8)          # a GPU is given more at a time
        for at in range(0, len(h), rows):
            piece = slice(at, at + rows)
            exact = (h[piece].float() * W[target[piece]].float()).sum(1, keepdim=True)
            shift = exact.to(h.dtype)
            yield piece, h[piece], shift, exact - shift.float()

    @staticmethod
    def logits(h, W, shift, packed):
        """Yields slice of the vocabulary, h W^T - shift there in float32."""
        size = COLUMNS * (1 if h.device.type == 'cpu' else 4)
        for at in range(0, len(W), size):
            columns = slice(at, at + size)
            if packed is None:
                x = torch.addmm(-shift, h, W[columns].t())
            else:
                x = packed[columns.start // COLUMNS].product(torch.cat((h, -shift, h.new_zeros(len(h), SPARE - 1)), 1))
            yield columns, x.float()

    @staticmethod
    def backward(ctx, g):                                           # g (M,)
        if len(ctx.saved_tensors) == 1:
            grad, = ctx.saved_tensors
            return g[:, None].to(grad.dtype) * grad, None, None, None
        h, W, target, tops, totals = ctx.saved_tensors
        dh, dW = W[target] * g[:, None].to(h.dtype), torch.zeros_like(W, dtype=torch.float32)
        dW.index_add_(0, target, h.float() * g[:, None])
        for piece, part, shift, _ in NextLogprobs.pieces(h, W, target):
            for columns, x in NextLogprobs.logits(part, W, shift, None):
                e = x.sub_(tops[piece]).exp_().mul_(-g[piece, None] / totals[piece]).to(h.dtype)
                dh[piece] += e @ W[columns]
                dW[columns] += e.t() @ part
        return dh, dW.to(W.dtype), None, None


class Embedding(nn.Embedding):
    """nn.Embedding, but no weights are drawn: code for that, on the meta device, makes torch import a second's worth of its compiler."""

    def __init__(self, n, width):
        super().__init__(n, width, _weight=torch.empty(n, width))
        self.register_parameter('rows', None)

    def train_rows_of(self, ids):
        """From here on only the rows of these ids (n,) train, as the parameter `rows` (u, C): no other ever has a gradient, and AdamW leaves what has
        none, and is not decayed, as it is. A text has few of the vocabulary's 50,257 rows, which are a third of GPT-2 124M."""
        self.weight.requires_grad_(False)
        self.ids = torch.unique(ids).to(self.weight.device)
        self.place = torch.full((len(self.weight),), -1, device=self.weight.device)
        self.place[self.ids] = torch.arange(len(self.ids), device=self.weight.device)
        self.rows = nn.Parameter(self.weight.detach()[self.ids])

    def settle(self):
        """Put the rows that train into the weight."""
        if self.rows is not None:
            self.weight.data[self.ids] = self.rows.detach()

    def train(self, mode=True):
        if not mode:
            self.settle()                                           # an evaluation meets other ids
        return super().train(mode)

    def forward(self, ids):
        return super().forward(ids) if self.rows is None or not self.training else F.embedding(self.place[ids], self.rows)


class Head(nn.Linear):
    def reset_parameters(self):
        """No weights of its own, as wte and wpe."""


def packed_vocabulary(W):
    """wte (V, C) -> what NextLogprobs takes as packed: COLUMNS of W^T each, ones below, by which the shift enters the product, and zeros."""
    W = torch.cat((W.detach().t(), W.new_ones(1, len(W)), W.new_zeros(SPARE - 1, len(W))))
    return [Packed(W[:, at:at + COLUMNS], keep=False) for at in range(0, W.shape[1], COLUMNS)]


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). With num_labels > 0 it has a class head `score`, linear and without bias as in transformers'
    GPT2ForSequenceClassification. The language-model head is tied to wte. Weights come from load() or init_weights()."""

    def __init__(self, cfg, num_labels=0):
        super().__init__()
        self.cfg = cfg
        self.wte, self.wpe = (Embedding(n, cfg.n_embd) for n in (cfg.vocab_size, cfg.block_size))
        self.drop = nn.Dropout(0.0)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, eps=1e-5)
        if num_labels:
            self.score = Head(cfg.n_embd, num_labels, bias=False)
        self.register_parameter('prompt', None)                     # (N, C) learned vectors in front of every text: lora.add_prompt
        self.classes = 0                                            # K: every text is read K times, by the K slices of prompt or LoRA
        self.split = 0                                              # the first block where the K readings differ; they share those below it
        self.packs, self.vocabulary = False, None                   # as of Conv1D: the packed wte^T that logits come from
        self.masters = {}                                           # float32 originals of weights that place() stored in half precision
        self.recomputes = False                                     # gradient checkpointing: blocks keep nothing and run again in the backward pass
        self.gathers = True                                         # logits of real tokens alone; a GPU would wait until their number is known

    @property
    def end(self):
        """Id of <|endoftext|>: the last of the vocabulary, here as in OpenAI's. No text holds it, so it serves as the pad id."""
        return self.cfg.vocab_size - 1

    def trunk(self, ids, lengths=None, of=None, states=None, upto=None):
        """ids (B, T) int64 -> states before the last LayerNorm (B, N + T, C), N = number of prompt vectors (0 without). With lengths (B,),
        only those of each text's last token, (B, 1, C): the last block then leaves out three quarters of its work. Of a model with K classes
        (K B, N + T, C), class by class; or with of (B,), which class's prompt stands in front of each text, (B, N + T, C).
        upto: stop after so many blocks. states: what came out when that was frozen_depth(), to go on from there."""
        copies = self.classes if of is None else 0
        x = self.embed(ids, of, copies) if states is None else states
        recomputes = self.recomputes and torch.is_grad_enabled()
        last = None if lengths is None else x.shape[1] - ids.shape[1] + lengths - 1     # (B,) the prompt shifts positions
        for i in range(0 if states is None else self.frozen_depth(), len(self.h) if upto is None else upto):
            if copies and i == self.split > 0:
                x = x.repeat(copies, 1, 1)
            at = last if i == len(self.h) - 1 else None
            x = torch.utils.checkpoint.checkpoint(self.h[i], x, at, use_reentrant=False) if recomputes else self.h[i](x, at)
        return x

    def embed(self, ids, of, copies):
        """What trunk's first block reads."""
        x = self.wte(ids).float()                                   # (B, T, C); the residual stream is float32 in every precision
        if copies and self.split == 0:
            x = x.repeat(copies, 1, 1)
        if self.prompt is not None:
            prompt = self.prompt.expand(len(ids), -1, -1) if not self.classes else (             # (N, C), or of a model with classes (K, N, C)
                self.prompt[of] if of is not None else self.prompt.repeat_interleave(len(ids), 0))
            x = torch.cat((prompt, x), dim=1)
        assert x.shape[1] <= self.cfg.block_size, 'callers cut texts to the block size'
        return self.drop(x + self.wpe.weight[:x.shape[1]])

    def frozen_depth(self):
        """How many blocks, from the first, give the same for a text in every step: nothing trains in them or below, and nothing is dropped."""
        if self.prompt is not None or self.drop.p or self.wte.weight.requires_grad or self.wpe.weight.requires_grad:
            return 0
        trains = [any(p.requires_grad for p in block.parameters()) for block in self.h]
        return trains.index(True) if True in trains else len(self.h)

    def hidden(self, ids, of=None):
        """ids (B, T) int64, right-padded -> final states (B, T, C), prompt positions left out. States after a text's end are those of pads.
        Of a model with K classes (K B, T, C), class by class, unless `of` (B,) names one for each text."""
        x = self.ln_f(self.trunk(ids, of=of))
        return x[:, x.shape[1] - ids.shape[1]:]

    def lm_logits(self, ids):
        """ids (B, T) int64 -> next-token logits (B, T, V), of a model with K classes (K B, T, V); float32 in every precision, since they lie
        near -100, where bfloat16 is 0.5 apart."""
        h = self.hidden(ids)
        with torch.autocast(h.device.type, enabled=False):
            dtype = torch.promote_types(h.dtype, torch.float32)
            return F.linear(h.to(dtype), self.wte.weight.to(dtype))

    def token_logprobs(self, ids, lengths, whole, context=(), first=None, of=None):
        """log p of every token of every text under this language model, in nats.

        ids (B, T) int64 right-padded, lengths (B,) int64 >= 1 as from data.collate. whole (B,) bool: the text ends where its ids end, so the
        <|endoftext|> after it is scored, too. context: ids between the leading <|endoftext|> and the text, a prompt that is not scored.
        first (B,) int64: the first token that is scored, 0 without. of (B,) int64: score each text under that class's prompt alone.
        -> (B, T + 1) float32, or (K, B, T + 1) of a model with K classes: column t is log p(token t | <|endoftext|>, context, tokens before t),
        column lengths[b] that of the final <|endoftext|>, and 0 stands where nothing is scored."""
        B, T = ids.shape
        target = F.pad(ids, (0, 1))                                 # (B, T + 1)
        target[torch.arange(B, device=ids.device), lengths] = self.end
        column = torch.arange(T + 1, device=ids.device)
        scored = column < (lengths + whole)[:, None]
        if first is not None:
            scored &= column >= first[:, None]
        start = [ids.new_full((B, 1), token) for token in (self.end, *context)]
        x = torch.cat((*start, ids), 1)
        k = self.classes if of is None else 0                       # how often each text is read
        if k:
            target, scored = (t.repeat(k, 1) for t in (target, scored))
        h = self.hidden(x, of)[:, len(context):]                        # (K B, T + 1, C)
        if self.gathers:
            out = torch.zeros(scored.shape, device=ids.device)
            out[scored] = self.next_logprobs(h[scored], target[scored])
        else:
            out = self.next_logprobs(h.flatten(0, 1), target.flatten()).view(scored.shape).where(scored, 0.0)
        return out.view(k, B, T + 1) if k else out

    def next_logprobs(self, h, target):
        """h (M, C) final states, target (M,) int64 -> (M,) float32 log softmax(h wte^T)[target]. The product is one of autocast's precision."""
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        with torch.autocast(kind, enabled=False):
            if self.packs and self.vocabulary is None:
                self.vocabulary = packed_vocabulary(self.wte.weight)
            return NextLogprobs.apply(h.to(dtype), self.wte.weight.to(dtype), target, self.vocabulary)

    def logprob(self, ids, lengths, whole, context=(), first=None, of=None):
        """log P(text) in nats: the sum of token_logprobs -> (B,) float32, or (B, K) of a model with K classes."""
        return self.token_logprobs(ids, lengths, whole, context, first, of).sum(-1).t()

    def logprob_by_loss(self, ids, lengths, whole, context=(), first=None):
        """The same, as most scripts compute it: one text and one class at a time, mean loss over all logits times the number of tokens.
        Here to check the other by; needs memory for every logit of a text."""
        rows = []
        for b, n in enumerate(lengths.tolist()):
            x = torch.cat((torch.tensor([self.end, *context], device=ids.device), ids[b, :n]))[None]         # (1, 1 + P + n)
            start = 1 + len(context) + (int(first[b]) if first is not None else 0)
            y = F.pad(x, (0, 1), value=self.end)[0, start:None if whole[b] else -1]                          # what is scored
            logits = self.lm_logits(x)[:, start - 1:start - 1 + len(y)]
            rows.append(torch.stack([-F.cross_entropy(one, y) * len(y) for one in logits]))
        return torch.stack(rows) if self.classes else torch.cat(rows)

    def classify(self, ids, lengths, states=None):
        """ids (B, T) int64 right-padded, lengths (B,) int64 >= 1 -> logits (B, K), read at each text's last real token: by its length,
        never by looking for pad ids, so the logits of a text do not depend on what it was padded with or how far. states: FrozenStates'."""
        return self.score(self.ln_f(self.trunk(ids, lengths, states=states).squeeze(1)))

    def forward(self, ids, lengths, read='classify', **more):
        """One of the methods above by its name: DistributedDataParallel prepares its exchange in forward, so the training loop goes through it."""
        return getattr(self, read)(ids, lengths, **more)

    def set_dropout(self, p):
        """GPT-2's own dropout (embedding, attention, residual), share of values dropped in training."""
        for m in self.modules():
            if isinstance(m, Attention):
                m.dropout = p
            if isinstance(m, (Attention, MLP)):
                m.resid_drop.p = p
        self.drop.p = p

    def init_weights(self, generator=None):
        """Random weights as GPT-2 was started: normal 0.02, residual projections divided by sqrt(2 L), biases 0."""
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif '.ln_' in name or name.startswith('ln_'):
                nn.init.ones_(p)
            else:
                std = 0.02 / math.sqrt(2 * self.cfg.n_layer) if name.endswith('c_proj.weight') else 0.02
                nn.init.normal_(p, 0.0, std, generator=generator)
        return self

    @classmethod
    def load(cls, where, num_labels=0, new_head=False, data_dir=None):
        """A model from a published name ('gpt2', ...), 'nano', or a folder with model.safetensors (sharded too) or pytorch_model.bin.

        num_labels: rows of the class head, 0 = none; new_head: a fresh head (normal 0.02) even if the file has one.
        Float32 weights are memory-mapped: loading costs no more than reading them, when they are read.
        Raises UserError when a tensor is missing, unexpected or of another shape (all are listed); never loads a part in silence."""
        folder = model_folder(where, data_dir)
        tensors = folder_tensors(folder)
        if 'lm_head.weight' in tensors:                             # some tools store the tied head a second time
            head = tensors.pop('lm_head.weight')
            if not torch.equal(head, tensors.get('wte.weight', head)):
                raise UserError(f'{folder}: lm_head.weight differs from wte.weight, but GPT-2 ties them; nanocls cannot load an untied head')
        if new_head or not num_labels:
            tensors.pop('score.weight', None)
        cfg = read_config(folder, tensors, where)
        with torch.device('meta'):
            model = cls(cfg, num_labels)
        if num_labels and new_head:
            tensors['score.weight'] = torch.empty(num_labels, cfg.n_embd).normal_(0.0, 0.02)
        check_tensors(tensors, {n: p.shape for n, p in model.named_parameters()}, f'{folder} does not hold a GPT-2 of {cfg}')
        model.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=True, assign=True)
        for p in model.parameters():                                # assign=True takes over the flag of the plain tensors
            p.requires_grad_(True)
        return model

    def float32_state(self):
        """{name: float32 CPU tensor} of the plain GPT-2 weights; those that place() rounded come back as they were loaded."""
        self.wte.settle()
        return {n: self.masters[n] if n in self.masters else p.detach().float().cpu() for n, p in self.named_parameters() if n != 'wte.rows'}


# ---------------------------------------------------------------------------------------------------- files of a model

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
          'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool}
DTYPE_NAMES = {v: k for k, v in DTYPES.items()}
PICKLED = re.compile(r'torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict')      # all that tensors need


def load_safetensors(path):
    """{name: tensor} of a safetensors file, memory-mapped copy-on-write (changing a tensor never changes the file).
    Raises UserError if the header does not describe exactly the bytes that follow it."""
    def broken(why):
        return UserError(f'{path} is not a whole safetensors file ({why}); delete it and fetch or train it again')
    try:
        with open(path, 'rb') as f:
            size = os.fstat(f.fileno()).st_size
            n = struct.unpack('<Q', f.read(8))[0] if size >= 8 else -1
            if not 2 <= n <= min(size - 8, 100_000_000):            # the format's own limit on a header
                raise broken('its header length is wrong')
            header = json.loads(f.read(n))
            raw = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    except (ValueError, RecursionError):
        raise broken('its header is not JSON')
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}')
    if not isinstance(header, dict):
        raise broken('its header is no object')
    header.pop('__metadata__', None)
    MAPPED.append((torch.frombuffer(raw, dtype=torch.uint8).data_ptr(), size))
    tensors, spans = {}, []
    for name, info in header.items():
        try:
            dtype, shape, (start, end) = DTYPES[info['dtype']], info['shape'], info['data_offsets']
            sane = len(shape) <= 64 and all(type(v) is int and 0 <= v < 2**48 for v in [*shape, start, end])
        except (KeyError, TypeError, ValueError):
            raise broken(f'entry {name!r} is malformed or of an unknown dtype')
        item = torch.empty(0, dtype=dtype).element_size()
        count = math.prod(shape) if sane else -1                    # not before: the product of what is no number can be endless
        if not sane or end - start != count * item or end > size - 8 - n:
            raise broken(f'entry {name!r} does not fit the file')
        spans.append((start, end))
        if not count:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        offset = 8 + n + start
        t = torch.frombuffer(raw, dtype=torch.uint8, count=end - start, offset=offset)
        tensors[name] = (t.view(dtype) if offset % item == 0 else t.clone().view(dtype)).view(shape)
    spans.sort()
    if any(a[1] != b[0] for a, b in zip([(0, 0)] + spans, spans + [(size - 8 - n, 0)])):
        raise broken('its tensors overlap or leave holes')
    return tensors


MAPPED = []             # (address, bytes) of the files that load_safetensors has mapped


def unload(t):
    """Give back the memory of a tensor that is mapped from a file and not needed for now: Linux reads the file again if it is. Changed values stay
    (MADV_PAGEOUT, not MADV_DONTNEED). Elsewhere, and for other tensors, nothing happens."""
    start, end = t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()
    if sys.platform != 'linux' or not any(at <= start and end <= at + size for at, size in MAPPED):
        return
    page = mmap.PAGESIZE
    start, end = -(-start // page) * page, end // page * page
    if start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 21)


def save_safetensors(path, tensors):
    """Write {name: tensor} as safetensors, whole or not at all (temporary file, then rename)."""
    header, at = {'__metadata__': {'format': 'pt'}}, 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {'dtype': DTYPE_NAMES[t.dtype], 'shape': list(t.shape), 'data_offsets': [at, at + size]}
        at += size
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)                                 # so that the tensors are aligned in the file

    def write(f):
        f.write(struct.pack('<Q', len(text)) + text)
        for t in tensors.values():
            if t.numel():
                f.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    data.write_atomic(path, write)


def check_tensors(tensors, shapes, complaint):
    """UserError, `complaint` and what is wrong, unless `tensors` has exactly the names and shapes of `shapes` {name: shape}."""
    bad = [f'{n} is missing' for n in shapes if n not in tensors] + [f'{n} is unexpected' for n in tensors if n not in shapes]
    bad += [f'{n} is {tuple(tensors[n].shape)} where {tuple(s)} belongs' for n, s in shapes.items() if n in tensors and tensors[n].shape != s]
    if bad:
        raise UserError(f'{complaint}: ' + '; '.join(bad[:8]) + (f'; and {len(bad) - 8} more' if len(bad) > 8 else ''))


def load_pickle(path, advice, mapped):
    """What torch.save wrote; weights_only, so no code of the file is ever run. Every tensor in it is as large as it claims."""
    try:
        with zipfile.ZipFile(path) as z:                            # torch.save never compresses: what is larger than the file is a trap
            if sum(max(info.file_size, info.compress_size) for info in z.infolist()) > os.path.getsize(path):
                raise ValueError('it claims to hold more than its size')
            if not mapped and z.testzip():                          # torch does not look at the checksums
                raise ValueError('damaged')
            for info in z.infolist():                               # weights_only would still let bytearray take 10 GB
                if info.filename.endswith('.pkl') and (info.file_size > data.MAX_MEMBER or not all(
                        PICKLED.fullmatch(arg) for op, arg, _ in pickletools.genops(z.read(info)) if op.name == 'GLOBAL')):
                    raise ValueError('it names more than tensors')
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
        todo, seen = [saved], set()
        while todo:
            x = todo.pop()
            if id(x) in seen:
                continue
            seen.add(id(x))
            if isinstance(x, torch.Tensor):
                if x.layout != torch.strided or x.is_quantized or x.device.type != 'cpu' or x.dtype not in DTYPE_NAMES:
                    raise TypeError('a tensor of a strange kind')
                if x.numel() * x.element_size() > x.untyped_storage().nbytes():          # one value repeated 10^12 times fits into any file
                    raise ValueError('a tensor that repeats itself')
            todo += x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror or e}')
    except Exception as e:                                          # torch raises half a dozen types for files that are no checkpoint
        raise UserError(f'{path} is not a checkpoint that can be read without running code from it ({type(e).__name__}); {advice}')
    return saved


def load_bin(path):
    """{name: tensor} of a pytorch_model.bin."""
    tensors = load_pickle(path, 'save it again as model.safetensors', mapped=True)
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in tensors.items()):
        raise UserError(f'{path} does not hold a plain dictionary of tensors')
    return tensors


def model_folder(where, data_dir=None):
    """The folder that holds the weights of a published name (downloaded if need be), 'nano' (made if need be), or a folder itself."""
    if where == 'nano':
        return nano_folder()
    if where in HUB_NAMES and not os.path.isdir(where):
        return os.path.dirname(data.weights(where, data_dir))
    if not os.path.isdir(where):
        raise UserError(f'--model {where}: no such folder, and not one of {", ".join(SHAPES)}')
    return where


def weight_files(folder):
    """Paths of the file or shards that hold a folder's weights."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        if os.path.isfile(os.path.join(folder, name)):
            return [os.path.join(folder, name)]
        index = os.path.join(folder, name + '.index.json')
        if os.path.isfile(index):
            weight_map = data.read_object(index).get('weight_map')
            names = list(weight_map.values()) if isinstance(weight_map, dict) else []
            shards = sorted(set(names)) if all(isinstance(s, str) for s in names) else names
            for s in shards:
                if not isinstance(s, str) or os.path.basename(s) != s or not os.path.isfile(os.path.join(folder, s)):
                    raise UserError(f'{index} names {s!r}, which is not a file of that folder')
            if shards:
                return [os.path.join(folder, s) for s in shards]
    if os.path.isfile(os.path.join(folder, 'adapter_config.json')):
        raise UserError(f'{folder} holds an adapter, not a whole model; name its base model here, or export the adapter merged first')
    raise UserError(f'{folder} holds no model.safetensors (or its shards with an index) and no pytorch_model.bin')


def folder_tensors(folder):
    """{name without "transformer.": tensor} of a folder's weight files, without GPT-2's mask buffers, which are no weights.
    UserError for a name that stands there twice."""
    tensors = {}
    for path in weight_files(folder):
        for name, t in (load_safetensors(path) if path.endswith('.safetensors') else load_bin(path)).items():
            name = name[len('transformer.'):] if name.startswith('transformer.') else name
            if name in tensors:
                raise UserError(f'{path}: {name} stands twice in the weights of that folder; keep one of them')
            if not name.endswith(('.attn.bias', '.attn.masked_bias')):
                tensors[name] = t
    return tensors


def base_sha256(folder):
    """One sha256 (hex) over the weight files of a folder, in order."""
    sums = [data.sha256_file(path) for path in weight_files(folder)]
    return sums[0] if len(sums) == 1 else hashlib.sha256(''.join(sums).encode()).hexdigest()


def read_config(folder, tensors, where):
    """Config from config.json; without one, from a published name or from tensor shapes that match a published model."""
    path = os.path.join(folder, 'config.json')
    if not os.path.isfile(path):
        layers = {n.split('.')[1] for n in tensors if n.startswith('h.')}
        width = next(iter(tensors['wte.weight'].shape[1:]), 0) if 'wte.weight' in tensors else 0
        for name, cfg in SHAPES.items():
            if where == name or (where not in SHAPES and (cfg.n_layer, cfg.n_embd) == (len(layers), width)):
                return cfg
        raise UserError(f'{folder} has no config.json, and its {len(layers)} layers of width {width} match no published GPT-2, '
                        'so the number of heads is unknown; put the config.json beside the weights')
    c = data.read_object(path)
    for key, value in dict(model_type='gpt2', activation_function='gelu_new', layer_norm_epsilon=1e-5, n_inner=None, scale_attn_weights=True,
                           scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, tie_word_embeddings=True).items():
        if c.get(key, value) != value and not (key == 'n_inner' and type(c.get('n_embd')) is int and c[key] == 4 * c['n_embd']):
            raise UserError(f'{path}: {key} is {c[key]!r}, but this model is GPT-2, where it is {value!r}')
    try:
        sizes = [c['n_layer'], c['n_head'], c['n_embd'], c.get('n_positions', c.get('n_ctx')), c['vocab_size']]
    except KeyError as e:
        raise UserError(f'{path} lacks {e}')
    if not all(type(s) is int and 0 < s < 10**7 for s in sizes) or sizes[2] % sizes[1] or sizes[0] > 1000:
        raise UserError(f'{path}: the sizes of the model make no sense: (n_layer, n_head, n_embd, n_positions, vocab_size) = {tuple(sizes)}')
    return Config(*sizes)


def class_names(labels, end):
    """What the config.json of a classifier says besides: its classes, and the pad id, without which transformers reads no batch."""
    return dict(pad_token_id=end, id2label={str(i): s for i, s in enumerate(labels)}, label2id={s: i for i, s in enumerate(labels)})


def save_hf(folder, model, labels=None, state=None):
    """Write config.json and model.safetensors as transformers expects them: GPT2ForSequenceClassification with the class names when
    labels are given, GPT2LMHeadModel otherwise. state: {name: tensor} to write instead of the model's own (a merged one, say)."""
    cfg = model.cfg
    config = dict(model_type='gpt2', architectures=['GPT2ForSequenceClassification' if labels else 'GPT2LMHeadModel'],
                  vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head,
                  activation_function='gelu_new', layer_norm_epsilon=1e-5, bos_token_id=model.end, eos_token_id=model.end)
    if labels:
        config.update(class_names(labels, model.end))
    state = state or model.float32_state()
    save_safetensors(os.path.join(folder, 'model.safetensors'),
                     {n if n == 'score.weight' else 'transformer.' + n: t for n, t in state.items()})
    data.write_json(os.path.join(folder, 'config.json'), config)


# -------------------------------------------------------------------------------------------------- device and precision

def cpu_has_bf16():
    """Does this processor multiply bfloat16 natively (AVX512-BF16 or AMX)? Emulated bf16 is slower than float32."""
    checks = (getattr(torch.cpu, '_is_avx512_bf16_supported', None), getattr(torch.cpu, '_is_amx_tile_supported', None))
    return any(check is not None and check() for check in checks)


def keep_freed_memory():
    """glibc hands freed blocks of a megabyte back to the system, and the next layer's activations then cost page faults: a fifth of the
    time of an evaluation and of full fine-tuning. Where there is a glibc, ask it to keep them. Other systems are left as they are."""
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
    except (OSError, AttributeError):
        return
    mallopt(-4, 0)                                                  # M_MMAP_MAX: no block is a mapping of its own, which free() would give back
    mallopt(-1, (1 << 31) - 1)                                      # M_TRIM_THRESHOLD, bytes: free memory the heap may keep


def pick_device(device='auto', dtype='auto'):
    """-> (torch.device, torch.dtype of the matrix products, the reason in words). Raises UserError for what this machine cannot do."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if device == 'cuda' and ranks() > 1:
        device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'--device {device}: {str(e).splitlines()[0]}')
    if dtype != 'auto':
        if dtype == 'fp16' and device.type == 'cpu':
            raise UserError('--dtype fp16 needs a GPU; use bf16 or fp32 on a CPU')
        return device, dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[dtype], 'as asked'
    if device.type == 'cuda':
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return device, torch.bfloat16, 'this GPU multiplies bfloat16 natively'
        return device, torch.float16, 'this GPU has no native bfloat16; gradients are scaled'
    if device.type == 'cpu' and cpu_has_bf16():
        return device, torch.bfloat16, 'this CPU multiplies bfloat16 natively'
    return device, torch.float32, 'no native bfloat16 here' if device.type == 'cpu' else 'the exact choice on ' + device.type


def autocast(device, dtype):
    """The context in which the model computes: torch.autocast, or nothing in float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def place(model, device, dtype, pack=True):
    """Move a model to the device. Frozen matrices and embeddings are stored in the compute precision (autocast would cast them in every
    step); what trains, LayerNorm's few vectors and the prompt stay float32. The float32 originals of rounded
    weights are kept in model.masters: they are still mapped from the file, so they cost no memory until they are saved.
    Where Packed.possible, and unless pack is false (torch.compile wants plain weights), frozen matrices stay as they are, and the first
    product packs a copy: what is frozen must not be changed after that."""
    keep = {p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()} | {model.prompt}
    if device.type == 'cpu':
        keep_freed_memory()                                         # not before: what reading the data needed for a while is handed back
    if device.type == 'cuda' and dtype != torch.float32:
        torch.set_float32_matmul_precision('high')                  # TF32 for what autocast leaves in float32
    model.gathers = device.type != 'cuda'
    pack = pack and Packed.possible(device, dtype)
    model.packs = pack and not model.wte.weight.requires_grad
    for m in model.modules():
        if isinstance(m, Conv1D):
            m.packs = pack and not m.weight.requires_grad and not m.bias.requires_grad
            keep |= {m.weight, m.bias} if m.packs else set()
    for block in model.h:
        plain = isinstance(block.attn, Attention) and isinstance(block.mlp, MLP)        # no Adapter
        norms = [*block.ln_1.parameters(), *block.ln_2.parameters()]
        block.packs = (plain and all(layer.packs for layer in block.layers()) and not any(p.requires_grad for p in norms)
                       and hasattr(torch.ops.aten, '_scaled_dot_product_flash_attention_for_cpu'))
    for name, p in model.named_parameters():
        if dtype != torch.float32 and not p.requires_grad and p not in keep:
            model.masters[name] = p.data
            p.data = p.data.to(device, dtype)
            unload(model.masters[name])
        else:
            p.data = p.data.to(device)
    return model


# ---------------------------------------------------------------------------------------------- optimizer and schedule

def make_optimizer(model, lr, weight_decay):
    """AdamW over what trains, fused where there is one. Biases, LayerNorm, embeddings and prompt vectors are not decayed."""
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()} | {model.prompt}
    train = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in train if p.dim() >= 2 and p not in embeddings]
    rest = [p for p in train if p.dim() < 2 or p in embeddings]
    groups = [dict(params=ps, weight_decay=wd) for ps, wd in ((decay, weight_decay), (rest, 0.0)) if ps]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=train[0].device.type in ('cuda', 'cpu'))


def clip_gradients(params, limit):
    """torch.nn.utils.clip_grad_norm_ (Pascanu et al. 2013, arXiv 1211.5063): gradients whose norm together is beyond `limit` are scaled down to it;
    0 = no limit -> that norm (). A CPU takes two thirds as long for dot products as for torch's norms, and need not multiply by 1; a GPU would
    have to be waited for to know."""
    limit, grads = limit or math.inf, [p.grad for p in params if p.grad is not None]
    if any(g.device.type != 'cpu' for g in grads):
        return torch.nn.utils.clip_grad_norm_(params, limit)
    norm = torch.stack([g.dot(g) for g in map(torch.flatten, grads)]).sum().sqrt()
    if not norm <= limit:                                           # NaN, too: it spreads, as torch has it
        torch._foreach_mul_(grads, limit / (norm + 1e-6))
    return norm


def lr_at(step, max_steps, lr, warmup, schedule):
    """Learning rate of a step (0 is the first): linear warm-up over `warmup` (share of all steps), then linear or cosine to 0, or constant."""
    n = math.ceil(warmup * max_steps)
    if step < n:
        return lr * (step + 1) / n
    x = (step - n) / max(1, max_steps - n)                          # 0 .. 1
    return lr * {'linear': 1 - x, 'cosine': 0.5 * (1 + math.cos(math.pi * x)), 'constant': 1.0}[schedule]


# ----------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def in_batches(fn, model, tokens, max_length, truncate, device, dtype, batch_tokens=None, progress=False, copies=1):
    """fn(ids (B, T), lengths (B,), index (B,)) -> (B, K) on every text of `tokens` (data.Tokens) -> (N, K) float32 numpy in their order.
    Texts are run longest first (an out-of-memory comes at once, and neighbours have nearly the same length: hardly any padding), as many
    at a time as fit `batch_tokens` padded tokens, each `copies` times. The model is in evaluation mode meanwhile."""
    batch_tokens = batch_tokens or (512 * min(copies, 3) if device.type == 'cpu' else 65536)       # a CPU's cache; what fills a GPU
    lengths = np.minimum(tokens.lengths, max_length)
    whole = np.argsort(-lengths, kind='stable')
    order = whole[rank()::ranks()]                                  # this process's texts
    was_training = model.training
    model.eval()
    parts, at = [], 0
    while at < len(order):
        index = order[at:at + max(1, batch_tokens // (copies * int(lengths[order[at]])))]
        ids, n = data.collate(tokens, index, max_length, truncate, model.end, device)
        try:
            with autocast(device, dtype):
                parts.append(fn(ids, n, index).float())
        except torch.OutOfMemoryError:
            if len(index) == 1:
                raise UserError(f'out of memory with a single text of {int(n[0])} tokens; try a smaller --max_length or another --device') from None
            batch_tokens //= 2                                      # the results do not depend on it
            continue
        at += len(index)
        if progress and rank() == 0 and sys.stderr.isatty():
            print(f'\r{at:,} of {len(order):,} texts ', end='\n' if at == len(order) else '', file=sys.stderr, flush=True)
    model.train(was_training)
    mine = torch.cat(parts).cpu().numpy() if parts else None
    found = [mine]
    if ranks() > 1:
        found = [None] * ranks()
        torch.distributed.all_gather_object(found, mine)
    out = np.empty((len(whole), found[0].shape[1]), np.float32)
    for i, logits in enumerate(found):
        if logits is not None:
            out[whole[i::ranks()]] = logits
    return out


def class_logits(model, tokens, max_length, truncate, device, dtype, batch_tokens=None, progress=False, states=None):
    """Logits (N, K) float32 of every text of `tokens` (data.Tokens), in their order. states: their FrozenStates."""
    return in_batches(lambda ids, n, index: model(ids, n, states=states and states(index)), model, tokens, max_length, truncate, device, dtype,
                      batch_tokens, progress)


class FrozenStates:
    """What comes out of the blocks that do not train, of every text, computed once; every later epoch starts there. states(index (B,)) is
    (B, T, C) float32, padded with zeros, T >= width; or where no block trains (B, 1, C), of each text's last token, all that the head reads.
    They lie in a file of the cache, in the compute precision ((B, 1, C) in float32), and are mapped from there: memory need not hold them. The file is
    named after texts and weights, so the next run over the same finds it; older ones are removed beyond FROZEN_BYTES."""

    def __init__(self, model, tokens, max_length, truncate, device, dtype):
        depth, lengths = model.frozen_depth(), np.minimum(tokens.lengths, max_length)
        self.pooled = pooled = depth == len(model.h)
        self.device, self.rows = device, np.ones_like(lengths) if pooled else lengths
        order = np.argsort(-lengths, kind='stable')                 # that of in_batches
        self.starts = np.empty_like(lengths)
        self.starts[order] = np.cumsum(self.rows[order]) - self.rows[order]
        kind, n, C = torch.float32 if pooled else dtype, int(self.rows.sum()), model.cfg.n_embd
        path = data.cached(f'frozen/{self.key(model, tokens, max_length, truncate, depth, kind)}.bin')
        size = n * C * torch.empty(0, dtype=kind).element_size()

        def compute(f):
            def keep(ids, lengths, index):
                x = model.trunk(ids, lengths if pooled else None, upto=depth).to(kind).cpu()
                for row, count in zip(x, self.rows[index]):
                    f.write(row[:count].contiguous().view(torch.uint8).numpy())
                return x.new_zeros(len(index), 0)
            in_batches(keep, model, tokens, max_length, truncate, device, dtype, progress=True)
        if not os.path.isfile(path) or os.path.getsize(path) != size:
            make_room(os.path.dirname(path), size)
            data.write_atomic(path, compute)
        os.utime(path)                                              # the one used last
        self.flat = torch.from_file(path, size=n * C, dtype=kind).view(n, C)

    @staticmethod
    def key(model, tokens, *settings):
        h = hashlib.sha256(f'1 {model.cfg} {settings}'.encode())    # 1: the version of this class
        for name, p in model.named_parameters():
            if name.startswith('w') or name.startswith('h.') and int(name.split('.')[1]) < settings[-2]:
                h.update(model.masters.get(name, p).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
                unload(model.masters.get(name, p))
        h.update(tokens.flat)
        h.update(tokens.starts)
        return h.hexdigest()[:32]

    def __call__(self, index, width=0):
        parts = [self.flat[at:at + n] for at, n in zip(self.starts[index], self.rows[index])]
        x = nn.utils.rnn.pad_sequence(parts, batch_first=True).to(self.device, torch.float32)
        return x if self.pooled else F.pad(x, (0, 0, 0, max(0, width - x.shape[1])))


def make_room(folder, size):
    """Remove the files of a cache folder that were used longest ago until `size` bytes more are within FROZEN_BYTES. Raises UserError if the
    disk has less than twice the room."""
    data.make_folder(folder)
    files = sorted((os.path.join(folder, name) for name in os.listdir(folder) if name.endswith('.bin')), key=os.path.getmtime)
    left = sum(map(os.path.getsize, files))
    for path in files:
        if left + size > FROZEN_BYTES:
            left -= os.path.getsize(path)
            os.remove(path)
    if 2 * size > shutil.disk_usage(folder).free:
        raise UserError(f'{folder} has no room for {size / 2**30:.1f} GB')


def text_logprobs(model, tokens, max_length, truncate, device, dtype, context=(), method='exact', batch_tokens=None, progress=False):
    """log P(text) (N, 1), or (N, K) of a model with K classes, float32 nats, of every text of `tokens` (data.Tokens), in their order.
    method: 'exact', or 'loss' (GPT.logprob_by_loss)."""
    k = model.classes or 1
    logprob = dict(exact=model.logprob, loss=model.logprob_by_loss)[method]

    def fn(ids, n, index):
        return logprob(ids, n, ends_here(model, tokens, index, max_length, device), context).view(len(ids), k)
    return in_batches(fn, model, tokens, max_length, truncate, device, dtype, batch_tokens, progress, k)


def answer_logprobs(model, tokens, max_length, truncate, device, dtype, answer, method='exact', progress=False):
    """log P(answer | text) (N, 1) float32 nats: the ids `answer` stand behind every text of `tokens` and are what is scored."""
    logprob = dict(exact=model.logprob, loss=model.logprob_by_loss)[method]

    def fn(ids, n, index):
        rows = torch.cat((ids, ids.new_zeros(len(ids), len(answer))), 1)
        at = n[:, None] + torch.arange(len(answer), device=device)                                           # (B, A) where the answer goes
        rows.scatter_(1, at, torch.tensor(answer, device=device).expand(len(ids), -1))
        return logprob(rows, n + len(answer), torch.zeros_like(n, dtype=torch.bool), first=n)[:, None]
    return in_batches(fn, model, tokens, max_length, truncate, device, dtype, progress=progress)


def ends_here(model, tokens, index, max_length, device):
    """Which of the rows index (B,) are scored with the <|endoftext|> behind them -> (B,) bool: those that were not cut. The empty text is one
    <|endoftext|> already: its probability is that of ending at once."""
    return torch.tensor([len(tokens[i]) <= max_length and tokens[i][0] != model.end for i in index], device=device)


def scored_lengths(model, tokens, max_length):
    """How many tokens of each text are scored, its <|endoftext|> included -> (N,) int64 numpy."""
    return np.minimum(tokens.lengths, max_length) + ends_here(model, tokens, range(len(tokens)), max_length, 'cpu').numpy()


# -------------------------------------------------------------------------------------------------- several processes

def under_torchrun(main):
    """main, run as one of the processes that torchrun started, if it did: they share out each batch and each evaluation (gloo on CPUs, nccl
    between GPUs). Only rank 0 prints and writes. One that dies ends the others: their next exchange fails, and torchrun stops them."""
    def run():
        if not {'RANK', 'WORLD_SIZE', 'MASTER_ADDR'} <= set(os.environ):
            return main()
        here = int(os.environ.get('LOCAL_RANK', 0))
        gpu = torch.cuda.is_available() and torch.cuda.device_count() > here
        if gpu:
            torch.cuda.set_device(here)
        store, me, n = next(torch.distributed.rendezvous('env://'))
        torch.distributed.init_process_group('cpu:gloo,cuda:nccl' if gpu else 'gloo', store=store, rank=me, world_size=n)
        data.WRITES = me == 0
        if me:
            sys.stdout = open(os.devnull, 'w')
        try:
            code = main() or 0
            for left in ('done', 'gone'):                           # a connection that closes early can break the others' last exchange, so
                store.add(left, 1)                                  # none leaves before all are done, and the store's host is the last
                while store.add(left, 0) < n and (left == 'done' or me == 0):
                    time.sleep(0.05)
        except KeyboardInterrupt:
            code = 130
        except (UserError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and not re.search('gloo|nccl|connection (closed|reset)|broken pipe', str(e), re.I):
                raise
            lost = f'rank {me} has lost another process of this run, whose own error says why ({str(e).splitlines()[0][:200]})'
            time.sleep(3 if me or isinstance(e, RuntimeError) else 0)       # the first to err is heard first; then torchrun stops the others
            print(f'error: {e if isinstance(e, UserError) else lost}', file=sys.stderr)
            code = 2
        sys.stdout.flush()
        os._exit(code)                                              # the threads of gloo and nccl may abort a process that ends by itself
    return run


def ranks():
    """How many processes share this run."""
    return torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def rank():
    """The number of this process among them; 0 is the first, which prints and writes."""
    return torch.distributed.get_rank() if ranks() > 1 else 0


def across_ranks(t):
    """A tensor -> the sum of all ranks' tensors. They meet on the CPU, so that none waits for its GPU who has not to."""
    if ranks() > 1:
        t = t.cpu()
        torch.distributed.all_reduce(t)
    return t


def meet():
    """Wait until all ranks are here: what rank 0 has written is there for the others."""
    across_ranks(torch.zeros(1))


def any_rank(flag):
    """Is it true of any rank? Then all of them stop at the same step."""
    return bool(flag) if ranks() == 1 else bool(across_ranks(torch.tensor([float(bool(flag))])))


def from_rank_zero(fn):
    """fn(), computed by rank 0 alone, in all ranks; after it they are at the same place."""
    if ranks() == 1:
        return fn()
    box = [fn() if rank() == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def first_of_machine():
    """Inside is first one process of each machine, then the others, which find what that one has downloaded."""
    waits = ranks() > 1 and os.environ.get('LOCAL_RANK', '0') != '0'
    if waits:
        meet()
    yield
    if not waits:
        meet()


def wrap(model):
    """What the training loop calls: the model, or its DistributedDataParallel, which averages the ranks' gradients as they come."""
    if ranks() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[model.wte.weight.device] if model.wte.weight.device.type == 'cuda' else None)


def exchange(net, last):
    """The context of a backward pass: ranks exchange their gradients in the last one of a step."""
    return contextlib.nullcontext() if last or ranks() == 1 else net.no_sync()


def share_of(rows):
    """The rows (sorted by length) of a step -> this rank's, and what their loss counts: DistributedDataParallel averages over the ranks, and
    the step is a sum. A rank that would have none takes one that counts nothing, since all must meet in the backward pass."""
    mine = rows[rank()::ranks()]
    return (mine, float(ranks())) if len(mine) else (rows[:1], 0.0)


# ------------------------------------------------------------------------------------------- what a training run keeps

@contextlib.contextmanager
def finish_step_on_interrupt():
    """Ctrl-C or SIGTERM inside: the list it gives becomes true, and the loop ends after the step it is in. A second Ctrl-C ends at once;
    not under torchrun, which passes on each signal that its processes have seen already."""
    caught = []

    def note(signum, frame):
        if caught and ranks() == 1:
            raise KeyboardInterrupt
        if caught:
            return
        caught.append(signum)
        print('\ninterrupted: finishing this step, then saving (once more to end at once without saving)', file=sys.stderr)
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def advice_on_memory(args):
    """Inside, out of memory is a UserError that names the batch size to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not isinstance(e, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(e):
            raise
        smaller = (f'--batch_size {args.batch_size // 2} --grad_accum {2 * args.grad_accum}, which take the same steps' if args.batch_size > 1
                   else 'a smaller --max_length')
        again = '' if args.gradient_checkpointing or args.method == 'head' else ', or --gradient_checkpointing'
        raise UserError(f'out of memory at --batch_size {args.batch_size} and --max_length {args.max_length}: try {smaller}{again}') from None


def mean_finite(losses, step, plan_of, lr, out):
    """Mean of the losses (tensors of one value) of the steps up to `step`, all ranks' shares added. Raises UserError if one is not finite, with
    the rows of that step, plan_of(step) -> (rows,): a single text can do it."""
    values = across_ranks(torch.stack(losses).detach().cpu().double()).tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            bad = step - len(values) + i + 1
            rows = np.sort(plan_of(bad)).tolist()
            shown = ', '.join(map(str, rows[:32])) + ', ...' * (len(rows) > 32)
            raise UserError(f'the loss or its gradient is not finite at step {bad} ({value}), made of the training rows {shown} (0 is the first): '
                            f'try a smaller --lr than {lr:g}, or --dtype fp32, or look at these texts; {out} keeps the last checkpoint, and '
                            '--resume goes on from it')
    return sum(values) / len(values)


def save_resume(out, args, step, best, params, opt, scaler):
    """Write out/resume.pt: all that the rest of the run depends on, in types that weights_only loads. Batches and dropout are pure functions of
    seed and step, and the best weights lie in the run folder already. Before the first step there is nothing yet but the flags."""
    state = dict(args=dict(vars(args)), step=step, best=best)
    if step:
        state.update(params={n: p.detach() for n, p in params.items()}, opt=opt.state_dict(), scaler=scaler.state_dict())
    data.write_atomic(os.path.join(out, 'resume.pt'), lambda f: torch.save(state, f))


def load_resume(out):
    """The state that save_resume wrote."""
    path = os.path.join(out, 'resume.pt')
    if not os.path.isfile(path):
        raise UserError(f'--resume: {out} holds no interrupted run (no resume.pt)')
    saved = load_pickle(path, 'remove it and start the run again', mapped=False)
    if not isinstance(saved, dict) or not isinstance(saved.get('args'), dict) or type(saved.get('step')) is not int or saved['step'] < 0:
        raise UserError(f'{path} is not what a training script writes; remove it and start the run again')
    return saved


def restore(saved, params, opt, scaler):
    """Put a saved state back -> (steps done, best score so far)."""
    try:
        if saved['step']:
            with torch.no_grad():
                for n, p in params.items():
                    p.copy_(saved['params'][n])
            opt.load_state_dict(dict(state=saved['opt']['state'], param_groups=opt.state_dict()['param_groups']))      # the settings are the flags'
            for p in params.values():
                state = opt.state.get(p, {})
                if state != {} and {k: t.shape for k, t in state.items()} != dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape):
                    raise ValueError('a state of another shape')
                if state and not 0 <= float(state['step']) <= saved['step']:         # fewer where float16 has skipped some
                    raise ValueError('a state of other steps')
            scaler.load_state_dict(saved['scaler'])
        if saved['best'] is not None and not all(type(v) in (int, float) for v in [*saved['best']]):
            raise ValueError('a score that is no number')
        return saved['step'], saved['best']
    except Exception as e:                                          # torch raises half a dozen types for what does not fit
        raise UserError(f'resume.pt does not fit this run ({type(e).__name__}); remove it and start the run again')


def seed_step(seed, step):
    """Dropout of a step is a pure function of seed, step and rank, so that a run that is resumed goes on as if it had never stopped."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f'{seed} {step} {rank()}'.encode()).digest()[:7], 'little'))


def check_graphs(args, device):
    """UserError where --cuda_graphs cannot be had."""
    if args.cuda_graphs and device.type != 'cuda':
        raise UserError(f'--cuda_graphs needs a GPU, and this run is on {device}')
    others = {'--compile': args.compile, '--gradient_checkpointing': args.gradient_checkpointing, 'several processes': ranks() > 1}
    for name, there in others.items():
        if args.cuda_graphs and there:
            raise UserError(f'--cuda_graphs does not go with {name}')


class Graphs:
    """graphs(share, *batch) does what `loss = fn(*batch) * share; loss.backward()` does, and gives the loss. For each shape of the batch that is
    recorded once as a CUDA graph and then replayed: a step of a small model is a thousand kernels of some microseconds, which a GPU runs faster
    than Python can launch them. Recorded is what happens to memory at fixed places, so inputs are copied there, gradients are added to those
    that are there (zero_grad must not drop them), and nothing in fn may wait for the GPU."""

    def __init__(self, fn, params, scaler):
        self.fn, self.params, self.scaler, self.recorded, self.pool = fn, list(params), scaler, {}, None
        for p in self.params:
            p.grad = torch.zeros_like(p)

    def __call__(self, *inputs):                                    # tensors
        shapes = tuple(t.shape for t in inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = self.record([t.clone() for t in inputs])
        places, replay, loss = self.recorded[shapes]
        for place, t in zip(places, inputs):
            place.copy_(t)
        replay()
        return loss

    def once(self, share, *batch):
        loss = self.fn(*batch) * share
        self.scaler.scale(loss).backward()
        return loss.detach()

    def record(self, places):
        """-> (places of the inputs, what to call when they are there, place of the loss). Gradients and random numbers stay as they are."""
        before = [p.grad.clone() for p in self.params]
        with torch.random.fork_rng([t.device for t in places[:1] if t.is_cuda]):
            replay, loss = self.capture(places)
        for p, g in zip(self.params, before):
            p.grad.copy_(g)
        return places, replay, loss

    def capture(self, places):
        """-> (replay, place of the loss). Before it, as PyTorch's notes on CUDA semantics ask, some passes on another stream, which choose kernels
        and make workspaces."""
        here, aside, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.once(*places)
        here.wait_stream(aside)
        with torch.cuda.graph(graph, pool=self.pool):               # one pool: of all shapes one runs at a time
            loss = self.once(*places)
        self.pool = graph.pool()
        return graph.replay, loss


class Log:
    """log.jsonl of a run and what the terminal shows of it: one line that is rewritten on a terminal, plain lines in a pipe."""

    def __init__(self, out, max_steps, resumed_at=0, extra=None):
        self.extra = extra or {}                                    # what every line says besides
        self.path, self.max_steps, self.tty = os.path.join(out, 'log.jsonl'), max_steps, sys.stdout.isatty()
        lines = []
        if resumed_at and os.path.isfile(self.path):                # lines of steps that will be done again are dropped
            with open(self.path, encoding='utf-8', errors='replace') as f:
                lines = [line for line in f if line.endswith('\n') and (data.log_row(line) or {}).get('step', resumed_at + 1) <= resumed_at]
        data.write_atomic(self.path, ''.join(lines))

    def __call__(self, seconds_per_step=0.0, **record):
        try:
            with open(self.path if data.WRITES else os.devnull, 'a', encoding='utf-8') as f:
                f.write(json.dumps({**record, **self.extra}) + '\n')
        except OSError as e:
            raise data.cannot_write(self.path, e) from None
        text = f'step {record["step"]}/{self.max_steps}  '
        if 'loss' in record:
            left = (self.max_steps - record['step']) * seconds_per_step
            text += (f'loss {record["loss"]:.4f}  lr {record["lr"]:.1e}  {record["examples_per_s"]:.1f} examples/s  '
                     f'{record["tokens_per_s"]:.0f} tokens/s  padding {100 * record["pad_share"]:.1f} %  '
                     f'{int(left // 60)}:{int(left % 60):02d} left')
        else:
            text += '  '.join(f'{k} {v:.4f}' for k, v in record.items() if k != 'step')
        passing = self.tty and 'loss' in record
        print(('\r\033[K' if self.tty else '') + text, end='' if passing else '\n', flush=True)


# ------------------------------------------------------------------------------------------------------ models by name

def nano_folder():
    """The folder of `nano`, the demo's language model: trained with train_gen.py --pretrain on the demo's unlabelled sentences the first time
    it is needed, then kept in the cache. In a process of its own, so that the run that needs it keeps its seed and its state."""
    folder = os.path.join(data.cache_dir(), 'models', f'nano-{data.DEMO_VERSION}')
    if os.path.isdir(folder):
        return folder
    print(f'nano: training the demo\'s language model once (kept in {folder})', flush=True)
    data.make_folder(os.path.dirname(folder))
    with tempfile.TemporaryDirectory(dir=os.path.dirname(folder)) as made:
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train_gen.py')
        flags = '--pretrain --data demo --model nano --scratch --batch_size 16 --lr 3e-3 --schedule cosine --seed 0 --log_every 400'
        steps = ['--max_steps', str(NANO_STEPS), '--eval_every', str(NANO_STEPS)]
        command = [sys.executable, script, *flags.split(), *steps, '--out', os.path.join(made, 'nano')]
        alone = {name: v for name, v in os.environ.items() if name not in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR')}      # not one of torchrun's
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=alone) as p:
            for line in p.stdout:
                if line.startswith('step'):
                    print(f'nano: {line}', end='', flush=True)
        if p.returncode == 130:
            raise KeyboardInterrupt
        if p.returncode:
            raise UserError('nano, the demo\'s language model, could not be trained; the lines above say why')
        try:
            os.rename(os.path.join(made, 'nano'), folder)
        except OSError:                                             # another process was faster
            if not os.path.isdir(folder):
                raise
    return folder


def build_model(args, num_labels=0):
    """The base model of a training run, with a fresh head of num_labels rows: loaded, or with random weights of the shape asked for."""
    torch.manual_seed(args.seed)
    if not args.scratch:
        return GPT.load(args.model, num_labels, new_head=True, data_dir=args.data_dir)
    if args.model not in SHAPES:
        raise UserError(f'--scratch needs a shape by name ({", ".join(SHAPES)}), not {args.model}')
    sizes = {k: getattr(args, k) for k in ('n_layer', 'n_head', 'n_embd', 'block_size') if getattr(args, k)}
    cfg = replace(SHAPES[args.model], **sizes)
    if cfg.n_embd % cfg.n_head:
        raise UserError(f'--n_embd {cfg.n_embd} is not a multiple of --n_head {cfg.n_head}')
    return GPT(cfg, num_labels).init_weights()
