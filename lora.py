"""What trains and what stays frozen: LoRA on GPT-2's Conv1D and on nn.Linear, Houlsby adapters, prompt tuning, head, last K blocks, full;
PEFT's files in and out; what the training scripts share of their flags; and open_run, which gives back a trained run ready to classify."""
import argparse
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import model as gpt
from data import UserError
from model import GPT, Conv1D

METHODS = dict(cls=('lora', 'head', 'last', 'full', 'adapter', 'prompt'), gen=('lora', 'full', 'prefix', 'zero_shot'))
# where published recipes for pretrained GPT-2 start; random weights need larger steps
LR = dict(lora=1e-3, head=1e-3, last=1e-4, full=3e-5, adapter=1e-3, prompt=3e-2, prefix=3e-5, pretrain=3e-5)
LR_SCRATCH = 3e-4
LR_NANO = dict(cls=3e-3, gen=6e-3)                  # LoRA on the demo's small model
LR_HELP = 'peak learning rate; without it ' + ', '.join(f'{m} {rate:g}' for m, rate in [
    *LR.items(), ('with --scratch', LR_SCRATCH), ('LoRA on nano', LR_NANO['cls']), ('of train_gen.py', LR_NANO['gen'])])
TARGETS = 'c_attn,attn.c_proj,c_fc,mlp.c_proj'      # every matrix of a block; beats attention alone at the same number of parameters
REGEX_SECONDS = 5                                   # for PEFT's target_modules; usual ones take 0.1, of which Python's start is most
SMALL_BASE = 20_000_000                             # bytes; a base model below this travels inside the run folder

# ------------------------------------------------------------------------------------------------------------ wrappers

def dropped(n, p, rng=None):
    """Which of n values a dropout of share p drops -> positions, int64, ascending. On CPUs bernoulli_ draws a number per value, one after
    another, and took a quarter of a training step. The distances between dropped values are geometric, so one draw per dropped value does:
    the floor of log(u) / log(1 - p), u uniform. rng: numpy's generator; without, one that torch's seeds."""
    rng, at, last = rng or gpt.generator(), [], -1
    while last < n:                                                 # nearly always once
        u = rng.random(int(n * p + 6 * math.sqrt(n * p)) + 16, np.float32)
        gaps = (np.log(1 - u) * (1 / math.log1p(-p))).astype(np.int64) + 1              # 1 - u: u can be 0
        at.append(last + np.cumsum(gaps))
        last = at[-1][-1]
    at = np.concatenate(at) if len(at) > 1 else at[0]
    return torch.from_numpy(at[:np.searchsorted(at, n)])


class Dropout(torch.autograd.Function):
    """F.dropout(x, p) in training, for CPUs."""

    @staticmethod
    def forward(ctx, x, p):
        at = dropped(x.numel(), p)
        ctx.p = p
        ctx.save_for_backward(at)
        return Dropout.masked(x, p, at)

    @staticmethod
    def backward(ctx, g):
        return Dropout.masked(g, ctx.p, *ctx.saved_tensors), None

    @staticmethod
    def masked(x, p, at):
        return (x.reshape(-1) * (1 / (1 - p))).index_fill_(0, at, 0).view(x.shape)


def dropout(x, p):
    """F.dropout(x, p) in training."""
    return Dropout.apply(x, p) if x.device.type == 'cpu' else F.dropout(x, p)


class LoRA(nn.Module):
    """y = base(x) + (alpha / r) dropout(x) A^T B^T around a frozen layer (Hu et al. 2021, arXiv 2106.09685).

    A (r, in) starts uniform within 1/sqrt(in), B (out, r) at zero, so training starts from the base model. The product B A is never
    formed in forward: two thin matrix products cost r (in + out) per token instead of in x out.

    With classes K > 0 there are K updates, A (K, r, in) and B (K, out, r), and the rows of x are K equal parts, one for each of them."""

    def __init__(self, base, r, scale, p, classes=0):
        super().__init__()
        n_in, n_out = base.weight.shape if isinstance(base, Conv1D) else base.weight.shape[::-1]    # Conv1D stores (in, out)
        self.base, self.scale, self.p = base, scale, p              # p: dropout
        axis = (classes,) if classes else ()
        self.A = nn.Parameter(torch.empty(*axis, r, n_in).uniform_(-1 / math.sqrt(n_in), 1 / math.sqrt(n_in)))
        self.B = nn.Parameter(torch.zeros(*axis, n_out, r))
        self.folded = None

    @property
    def packs(self):
        return getattr(self.base, 'packs', False)

    @property
    def weights(self):
        return self.A, self.B

    def forward(self, x, gelu=False):                               # (..., in) -> (..., out); gelu: GELU of it
        if self.folds(x, gelu):
            return self.fold(x, gelu)
        y = self.updated(x)
        return gpt.gelu_of(y, self.packs) if gelu else y

    def folds(self, x, gelu):
        """Is fold() to be used? While nothing trains, where oneDNN packs weights, and of K classes if their updates are thin enough for it to pay."""
        frozen = not (self.A.requires_grad or self.B.requires_grad or (self.training and self.p) or torch.is_grad_enabled() and x.requires_grad)
        thin = self.A.dim() == 2 or len(self.A) * self.A.shape[1] <= self.A.shape[2] // (4 if gelu else 16)
        return frozen and thin and self.packs

    def fold(self, x, gelu):
        """The layer as one product with packed weights, and GELU within it. One update: W + scale (B A)^T, summed in float32 and rounded once, no
        further from float32 than W x + ... rounded apart; the weights themselves stay as they are. Of K classes: x W + (x A^T) B^T is
        (x, x A^T) times W on top of B^T; below W stand all classes' B^T, and a row has zeros for those of the others."""
        k, r, n_in = len(self.A) if self.A.dim() == 3 else 0, *self.A.shape[-2:]
        if self.folded is None:
            W = self.base.weight.detach()
            W = torch.cat((W, self.B.transpose(1, 2).flatten(0, 1))) if k else W + self.delta()          # (in + K r, out)
            self.folded = gpt.Packed(W, self.base.bias, keep=False)
            gpt.unload(self.base.weight)
            if k:
                self.down = (self.A * self.scale).reshape(-1, n_in).t().to(torch.bfloat16)               # (in, K r)
                self.own = torch.eye(k, dtype=torch.bfloat16).repeat_interleave(r, 1)[:, None]         # (K, 1, K r): which of them are a class's
        if k:
            wide = torch.empty(*x.shape[:-1], n_in + k * r, dtype=torch.bfloat16)
            wide[..., :n_in] = x
            rows = wide.view(-1, n_in + k * r)
            rows[:, n_in:] = ((rows[:, :n_in] @ self.down).view(k, -1, k * r) * self.own).view(-1, k * r)
            x = wide
        return self.folded.product(x.to(torch.bfloat16), gelu)

    def updated(self, x):                                           # (..., in) -> (..., out)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))       # rounded once, before the mask
        if self.packs:
            return gpt.Taped.apply(x.to(torch.bfloat16), self, *self.weights)
        p, axis = self.p if self.training else 0.0, self.A.shape[:-2]                   # axis: (), or (K,): x is K slices of B T rows
        y = self.base(x)
        x = x.to(y.dtype)
        if p:
            x = dropout(x, p)
        if axis:
            a = torch.bmm(x.reshape(*axis, -1, x.shape[-1]), self.A.transpose(1, 2).to(x.dtype)) * self.scale                  # (K, B T, r)
            return torch.baddbmm(y.view(*axis, -1, y.shape[-1]), a, self.B.transpose(1, 2).to(y.dtype)).view(y.shape)
        a = F.linear(x, self.A) * self.scale                        # (..., r)
        return torch.addmm(y.flatten(0, -2), a.flatten(0, -2), self.B.t()).view(y.shape)            # the sum costs no pass of its own

    def taped(self, x, tape, own=False):                            # (..., in) bfloat16 -> (..., out); the scale and dropout's 1 / (1 - p) are A's
        p = self.p if self.training else 0.0
        rows = x.reshape(*self.A.shape[:-2], -1, x.shape[-1])
        y, at, kept = self.base.pack().product(rows), None, rows
        if p:
            at, kept = dropped(x.numel(), p, tape.rng), rows if own else rows.clone(memory_format=torch.contiguous_format)
            kept.view(-1).index_fill_(0, at, 0)
        A, B = (self.A * (self.scale / (1 - p))).to(x.dtype), self.B.to(x.dtype)
        a = kept @ A.transpose(-2, -1)
        tape += kept, a, A, B, at
        y = y.addmm_(a, B.t()) if y.dim() == 2 else y.baddbmm_(a, B.transpose(-2, -1))
        return y.view(*x.shape[:-1], -1)

    def vjp(self, g, tape, need):
        kept, a, A, B, at = tape.take(5)
        rows = g.reshape(*self.A.shape[:-2], -1, g.shape[-1])
        da, dx = rows @ B, None
        dA = (da.transpose(-2, -1) @ kept).float().mul_(self.scale if at is None else self.scale / (1 - self.p))
        dB = (a.transpose(-2, -1) @ rows).transpose(-2, -1).to(torch.float32, memory_format=torch.contiguous_format)     # else copied twice
        if need:
            dx, through = self.base.packed.gradient(rows), da @ A
            dx += through if at is None else through.view(-1).index_fill_(0, at, 0).view(kept.shape)
            dx = dx.view(*g.shape[:-1], -1)
        return dx, dA, dB

    def delta(self, at=None):
        """scale * B A in float32, in the layout of the base weight. at: which class, of K."""
        A, B = (t.detach().float() if at is None else t.detach()[at].float() for t in (self.A, self.B))
        d = self.scale * (B @ A)                                    # (out, in)
        return (d.t() if isinstance(self.base, Conv1D) else d).cpu()


class Adapter(nn.Module):
    """Bottleneck after a sublayer, before its residual sum: h + up(gelu(down(h))) with h = sub(x) (Houlsby et al. 2019, arXiv 1902.00751).
    `up` starts at zero, so training starts from the base model."""

    def __init__(self, sub, n_embd, bottleneck):
        super().__init__()
        self.sub, self.down, self.up = sub, nn.Linear(n_embd, bottleneck), nn.Linear(bottleneck, n_embd)
        nn.init.normal_(self.down.weight, 0.0, 0.02)
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def forward(self, *args):
        h = self.sub(*args)
        return h + self.up(F.gelu(self.down(h), approximate='tanh'))


WRAPPER = re.compile(r'\.(base|sub)\.')                             # what wrapping adds to a weight's name


def add_lora(model, r, alpha, dropout, targets, rslora=False, classes=0, top=None, layers=None, spare=False):
    """Wrap every Conv1D / nn.Linear of the blocks whose name is, or ends with, one of `targets` (PEFT's rule), or matches it as a regular
    expression if `targets` is a string. Scale alpha / r, or alpha / sqrt(r) with rslora. classes: K updates in one layer, of a
    model that reads every text K times; 0 = one. top: in the last so many blocks alone; layers: in the blocks of these numbers alone.
    -> names wrapped. Raises UserError for a target that matches nothing, listing what there is; spare: only where all of them do."""
    if (top or 0) > model.cfg.n_layer:
        raise UserError(f'--top {top}: this model has {model.cfg.n_layer} blocks')
    found = {f'h.{i}.{n}': m for i, block in enumerate(model.h) if (not top or i >= len(model.h) - top) and (layers is None or i in layers)
             for n, m in block.named_modules() if isinstance(m, (Conv1D, nn.Linear))}
    if isinstance(targets, str):
        hits = {targets: matching(targets, found)}
    else:
        hits = {t: [n for n in found if n == t or n.endswith('.' + t) or n == t.replace('transformer.', '', 1)] for t in targets}
    for t, names in hits.items():
        if not names and not (spare and any(hits.values())):
            there = sorted({n.split('.', 2)[2] for n in found})
            raise UserError(f'--targets: {t!r} matches no layer of this model; there are {", ".join(there)}')
    chosen = {n for names in hits.values() for n in names}
    names = [n for n in found if n in chosen]                       # in the model's order
    for n in names:
        parent, _, child = n.rpartition('.')
        setattr(model.get_submodule(parent), child, LoRA(found[n], r, alpha / (math.sqrt(r) if rslora else r), dropout, classes))
    model.classes, model.split = classes, min(int(n.split('.')[1]) for n in names)
    return names


def matching(pattern, layers):
    """Which of the names a regular expression matches, with or without 'transformer.' in front. Some expressions would take years: the
    search is a process of its own, which can be ended."""
    code = ('import json, re, sys\npattern, names = json.load(sys.stdin)\n'
            'json.dump([n for n in names if re.fullmatch(pattern, "transformer." + n) or re.fullmatch(pattern, n)], sys.stdout)')
    try:
        p = subprocess.run([sys.executable, '-I', '-c', code], input=json.dumps([pattern, list(layers)]), capture_output=True, text=True,
                           timeout=REGEX_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f'target_modules: the regular expression {pattern!r} takes too long; write it in another way, or list the names')
    if p.returncode:
        raise UserError(f'target_modules: {pattern!r} is no regular expression ({p.stderr.strip().rpartition(chr(10))[2]})')
    return json.loads(p.stdout)


def add_adapters(model, bottleneck):
    """Wrap the attention and the MLP of every block with an Adapter of that many hidden units. -> names wrapped."""
    for block in model.h:
        block.attn = Adapter(block.attn, model.cfg.n_embd, bottleneck)
        block.mlp = Adapter(block.mlp, model.cfg.n_embd, bottleneck)
    return [n for n, m in model.named_modules() if isinstance(m, Adapter)]


def add_prompt(model, n, classes=0):
    """n learned vectors in front of every text (Lester et al. 2021, arXiv 2104.08691), started at the embeddings of n random tokens.
    classes: K such prompts (K, n, C), of a model that reads every text K times; 0 = one (n, C)."""
    if not 0 < n < model.cfg.block_size:
        raise UserError(f'--prompt {n}: this model has {model.cfg.block_size} positions, and a text needs at least one of them')
    shape = (classes, n) if classes else (n,)
    model.prompt = nn.Parameter(model.wte.weight.detach()[torch.randint(model.cfg.vocab_size, shape)].float().clone())
    model.classes = classes


def adapt(model, method, last=0, r=8, alpha=16.0, dropout=0.0, targets=TARGETS.split(','), bottleneck=64, prompt=0, top=None):
    """Make `model` ready for a method: freeze what is frozen, add what is added. -> names of the wrapped modules."""
    wrapped = []
    model.requires_grad_(method in ('full', 'pretrain', 'prefix'))  # what is added below trains
    if method == 'lora':
        wrapped = add_lora(model, r, alpha, dropout, targets, top=top)
    elif method == 'adapter':
        wrapped = add_adapters(model, bottleneck)
    elif method == 'prompt':
        add_prompt(model, prompt)
    elif method == 'last':
        if not 0 < last <= model.cfg.n_layer:
            raise UserError(f'--last {last}: this model has {model.cfg.n_layer} blocks')
        for m in (*model.h[-last:], model.ln_f):
            m.requires_grad_(True)
    if hasattr(model, 'score'):
        model.score.requires_grad_(True)
    return wrapped


def trainables(model):
    """{name: parameter} of what trains."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def count(model):
    """-> (parameters that train, all parameters)."""
    return sum(p.numel() for p in trainables(model).values()), sum(p.numel() for p in model.parameters())


def describe(model, wrapped):
    """Lines that say what was wrapped and how many parameters train."""
    train, total = count(model)
    rows = Counter()
    for n in wrapped:
        m = model.get_submodule(n)
        what = f'LoRA {tuple(m.A.shape)} x {tuple(m.B.shape)}' if isinstance(m, LoRA) else f'adapter of {m.down.out_features} units'
        rows[f'h.*.{n.split(".", 2)[2]:<12} {what}'] += 1
    return [f'  {k} times {line}' for line, k in rows.items()] + [f'training {train:,} of {total:,} parameters ({100 * train / total:.2f} %)']


def merged_state(model, at=None):
    """{name: float32 tensor} of the plain GPT-2 with every LoRA product added to its float32 base weight. at: which class's, of a model with
    classes. An explicit verb: training and evaluation never change a weight (LoRA.fold adds to a packed copy). Adapters and prompt vectors
    have no merged form: UserError."""
    if model.prompt is not None or any(isinstance(m, Adapter) for m in model.modules()):
        raise UserError('adapters and prompt vectors are extra computation and cannot be merged into GPT-2; only --lora can')
    state = model.float32_state()
    for name, m in model.named_modules():
        if isinstance(m, LoRA):
            state[name + '.base.weight'] = state[name + '.base.weight'] + m.delta(at)
            del state[name + '.A'], state[name + '.B']
    return {WRAPPER.sub('.', n): t for n, t in state.items()}


# --------------------------------------------------------------------------------------------------------- PEFT's files

PREFIX = 'base_model.model.transformer.'


def save_peft(folder, model, base_name, at=None):
    """Write a model's LoRA or prompt vectors, with its head if it has one, as PEFT's adapter_config.json and adapter_model.safetensors.
    at: which class, of a model with classes."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRA)}
    config = dict(task_type='SEQ_CLS' if hasattr(model, 'score') else 'CAUSAL_LM', base_model_name_or_path=base_name, inference_mode=True)
    if model.prompt is None:
        m = next(iter(layers.values()))
        targets = sorted({n.split('.', 2)[2] for n in layers})      # names below a block: c_proj alone would mean two layers
        if len(layers) < len(targets) * model.cfg.n_layer:          # not in every block: full names
            targets = list(layers)
        r = m.A.shape[-2]
        config.update(peft_type='LORA', r=r, lora_alpha=m.scale * r, lora_dropout=m.p, bias='none', fan_in_fan_out=True,
                      target_modules=targets, modules_to_save=['score'] if hasattr(model, 'score') else None)
    else:
        cfg = model.cfg
        config.update(peft_type='PROMPT_TUNING', num_virtual_tokens=model.prompt.shape[-2], token_dim=cfg.n_embd, num_layers=cfg.n_layer,
                      num_attention_heads=cfg.n_head, num_transformer_submodules=1)
    params = dict(model.named_parameters())
    tensors = {there: params[here].detach().float() for there, here in peft_names(model).items()}
    if at is not None:
        tensors = {n: t[at] for n, t in tensors.items()}
    gpt.save_safetensors(os.path.join(folder, 'adapter_model.safetensors'), tensors)
    data.write_json(os.path.join(folder, 'adapter_config.json'), config)


def peft_names(model):
    """{name in PEFT's file: name in the model} of a model's LoRA or prompt, and of its head."""
    if model.prompt is None:
        names = {f'{PREFIX}{n}.lora_{k}.weight': f'{n}.{k}' for n, m in model.named_modules() if isinstance(m, LoRA) for k in 'AB'}
        head = 'base_model.model.score.weight'
    else:
        names, head = {'prompt_embeddings': 'prompt'}, 'base_model.score.weight'
    return {**names, head: 'score.weight'} if hasattr(model, 'score') else names


def load_peft(folder, model, classes=0):
    """Add the adapter of a PEFT folder to `model` (a fresh GPT) and fill it. Every tensor must find its place and every place its tensor.
    classes: K; `folder` is then a list of K folders, whose adapters must be of one kind and shape."""
    folders = folder if classes else [folder]
    configs = [peft_config(one) for one in folders]
    for one, config in zip(folders, configs):
        differ = [key for key in config if key != 'dropout' and config[key] != configs[0].get(key)]
        if differ:
            raise UserError(f'{one}: {differ[0]} is {config[differ[0]]}, but {configs[0].get(differ[0])} in {folders[0]}; '
                            'the adapters of one classifier must agree')

    def add_all(model):
        if 'r' in configs[0]:
            add_lora(model, **configs[0], classes=classes, spare=True)  # PEFT skips targets that match nothing; the tensors must fit anyway
        else:
            add_prompt(model, **configs[0], classes=classes)

    def fill_all(model):
        for i, one in enumerate(folders):
            fill(model, adapter_tensors(one), peft_names(model), one, i if classes else None)
    add_filled(model, add_all, fill_all)


def add_filled(model, add, fill):
    """add(model), then fill(model), both tried before on a model without memory: a file that claims to be huge must not be given that much."""
    with torch.device('meta'):
        outline = GPT(model.cfg, model.score.out_features if hasattr(model, 'score') else 0).requires_grad_(False)
        add(outline)
    fill(outline)
    add(model)
    fill(model)


def adapter_tensors(folder):
    """{name: tensor} of a PEFT folder; versions before 0.7 wrote a .bin."""
    path = os.path.join(folder, 'adapter_model.bin')
    if os.path.isfile(path) and not os.path.isfile(os.path.join(folder, 'adapter_model.safetensors')):
        return gpt.load_bin(path)
    return gpt.load_safetensors(os.path.join(folder, 'adapter_model.safetensors'))


# fields of a LoraConfig that are honoured here, or that say nothing about what the adapter computes; any other that is set is refused
PEFT_FIELDS = set('''peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules lora_alpha
    lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights layers_to_transform layers_pattern megatron_core
    qalora_group_size ensure_weight_tying'''.split())


def peft_config(folder):
    """adapter_config.json of a PEFT folder -> the arguments of add_lora or add_prompt. UserError for what nanocls does not support."""
    path = os.path.join(folder, 'adapter_config.json')
    c = data.read_object(path)
    kind = c.get('peft_type')

    def field(key, kinds, holds=lambda v: True, default=None):
        value = c.get(key, default)
        if type(value) not in kinds or not holds(value):
            raise UserError(f'{path}: the field {key} is {"malformed: " + repr(value) if key in c else "missing"}; restore the file')
        return value
    if kind == 'PROMPT_TUNING':
        return dict(n=field('num_virtual_tokens', [int], lambda n: 0 < n < 10**7))
    if kind != 'LORA':
        raise UserError(f'{path}: peft_type is {kind!r}; LORA and PROMPT_TUNING are supported')
    for key, value in c.items():
        if value and key not in PEFT_FIELDS:
            raise UserError(f'{path}: {key} is set, which nanocls does not support')
    start = c.get('init_lora_weights')
    if isinstance(start, str) and start not in ('gaussian', 'orthogonal', 'eva'):
        raise UserError(f'{path}: init_lora_weights is {start!r}, which changes the base model; merge the adapter into it with PEFT first')
    if c.get('bias', 'none') != 'none':
        raise UserError(f'{path}: bias is {c["bias"]!r}; only "none" is supported')
    targets = field('target_modules', [str, list], lambda t: t and all(isinstance(one, str) for one in t))    # in any order, or a regular expression
    layers = field('layers_to_transform', [int, list, type(None)], lambda x: not isinstance(x, list) or all(type(i) is int for i in x))
    return dict(r=field('r', [int], lambda r: 0 < r < 10**7), alpha=float(field('lora_alpha', [int, float], lambda a: abs(a) < 1e6)),
                dropout=float(field('lora_dropout', [int, float], lambda p: 0 <= p < 1, 0.0)),
                targets=targets if isinstance(targets, str) else sorted(targets), rslora=bool(field('use_rslora', [bool, type(None)])),
                layers=[layers] if isinstance(layers, int) else layers or None)


def fill(model, tensors, names, folder, at=None):
    """Copy tensors {name in file: tensor} into the parameters {name in file: name in model}, or into the slice `at` of each.
    UserError lists all that does not fit."""
    params = {n: p.detach() if at is None else p.detach()[at] for n, p in model.named_parameters() if n in names.values()}
    gpt.check_tensors(tensors, {n: params[p].shape for n, p in names.items()}, f'{folder} does not fit this model')
    for n, p in names.items():
        params[p].copy_(tensors[n])


# ------------------------------------------------------------------------------------------- flags of the training scripts

def settle(args, given, needs):
    """Fill in what the flags leave open, after refusing those that would do nothing. given: the names that were typed;
    needs: {name: (the flag without which it does nothing, whether that one is there)}, beyond what both scripts need."""
    needs = {**dict.fromkeys(('r', 'alpha', 'dropout', 'targets', 'top'), ('--lora', args.method == 'lora')),
             **dict.fromkeys(('n_layer', 'n_head', 'n_embd', 'block_size'), ('--scratch', args.scratch)), **needs}
    for name, (flag, present) in needs.items():
        if name in given and not present:
            raise UserError(f'--{name} does nothing without {flag}')
    if {'max_steps', 'epochs'} <= given:
        raise UserError('--max_steps and --epochs both set the length of the run; give one of them')
    if args.quick:
        args.max_samples = args.max_samples or 100
        args.epochs = args.epochs or (None if 'max_steps' in given else 1.0)
    if args.data == 'demo' and 'model' not in given:
        args.model = 'nano'
    if args.model == 'nano' and 'data' not in given:
        args.data = 'demo'
    args.lr = args.lr or default_lr(args)
    args.targets = [t.strip() for t in args.targets.split(',')]


def default_lr(args):
    if args.scratch:
        return LR_SCRATCH
    if (args.model, args.method) == ('nano', 'lora'):
        return LR_NANO['gen' if hasattr(args, 'pretrain') else 'cls']
    return LR.get(args.method)


def strange_flags(args, saved):
    """Names of the flags in `saved`, from a file, whose values are of no type that the parsed flags `args` can have."""
    def fits(name, value):
        mine = getattr(args, name, None)
        if name == 'targets':
            return isinstance(value, str) or isinstance(value, list) and all(isinstance(t, str) for t in value)
        if name == 'method':
            return value in (*METHODS['cls'], *METHODS['gen'], 'pretrain')
        return value is None or isinstance(value, (str, int, float) if mine is None else (int, float) if type(mine) in (int, float) else type(mine))
    return [name for name, value in saved.items() if not fits(name, value)] if isinstance(saved, dict) else ['args']


def resumed(args, given, saved):
    """The flags of an interrupted run (a dictionary), its folder as it is called now. A flag that was typed and differs is refused."""
    strange = [name for name in vars(args) if name not in saved]
    if strange:
        raise UserError(f'{args.out} was not started by this script and version (its flags lack --{strange[0]}); go on with the one that did')
    strange = strange_flags(args, saved)
    if strange:
        raise UserError(f'{args.out} is damaged: its flag --{strange[0]} is malformed; start the run again')
    for name in given - {'resume', 'out'}:
        if getattr(args, name) != saved[name]:
            raise UserError(f'--{name} {getattr(args, name)} differs from the interrupted run\'s {saved[name]}; a resumed run keeps its flags')
    return argparse.Namespace(**{**saved, 'out': args.out})


def or_demo(get, args, given, insist):
    """get(), and if what it needs cannot be downloaded and the user named neither data nor model: the demo instead, said in a box."""
    try:
        return get()
    except data.Unavailable as e:
        if insist or given & {'data', 'model'}:
            raise
        print(f'+{"-" * 98}\n' + textwrap.indent(textwrap.fill(
            f'{e}. This run uses the built-in demo instead: synthetic sentences, and `nano`, a small language model that is trained on '
            'them here. Name --data or --model to insist on them.', 97), '| ') + f'\n+{"-" * 98}', flush=True)
    args.data, args.model = 'demo', 'nano'
    if 'lr' not in given:
        args.lr = default_lr(args)
    return get()


# ----------------------------------------------------------------------------------------------------------- run folders

def free_folder(name, method):
    """runs/NAME-METHOD, numbered if it is taken."""
    stem = os.path.splitext(os.path.basename(os.path.normpath(name)))[0] or 'data'
    first = os.path.join('runs', f'{stem}-{method}')
    numbered = (f'{first}-{i}' for i in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if not os.path.exists(path))


def base_info(args, out, model, labels=None):
    """What run.json says of the base model, and the base itself where the run would be lost without it: a random one (--scratch) that
    stays frozen is written to out/base, a small one is copied there. labels go into its config.json: PEFT asks the base for the names."""
    base = os.path.join(out, 'base')
    stays = args.method in ('lora', 'adapter', 'prompt', 'zero_shot')    # the other methods save every weight
    if args.scratch:
        if stays:
            frozen = {WRAPPER.sub('.', n): t for n, t in model.float32_state().items() if n not in trainables(model)}
            data.make_folder(base)
            gpt.save_hf(base, model, labels, frozen)
        return dict(name=f'{args.model} --scratch', sha256=gpt.base_sha256(base) if stays else None)
    folder = gpt.model_folder(args.model, args.data_dir)
    files = gpt.weight_files(folder)
    if stays and args.model not in gpt.HUB_NAMES and sum(map(os.path.getsize, files)) < SMALL_BASE:
        for path in [*files, *(os.path.join(folder, f) for f in ('config.json', 'model.safetensors.index.json', 'pytorch_model.bin.index.json'))]:
            if os.path.isfile(path):
                data.write_atomic(os.path.join(base, os.path.basename(path)), data.read_bytes(path))
        config = os.path.join(base, 'config.json')
        if labels and os.path.isfile(config):
            data.write_json(config, {**data.read_json(config), **gpt.class_names(labels, model.end)})
    name = args.model if args.model in gpt.SHAPES else os.path.abspath(args.model)
    return dict(name=name, sha256=gpt.base_sha256(folder))


def peft_base(out, info):
    """What adapter_config.json calls the base model of a run: the folder that travels with it, or a name that PEFT can resolve."""
    base, name = os.path.join(os.path.abspath(out), 'base'), info['base']['name']
    return base if os.path.isdir(base) else gpt.HUB_NAMES.get(name, name)


def save_weights(folder, model, method, labels, base_name):
    """Write what a method of train_cls.py trained, in the format other programs load: HF folder, PEFT folder, or adapter.safetensors."""
    if method in ('lora', 'prompt'):
        save_peft(folder, model, base_name)
    elif method == 'adapter':
        gpt.save_safetensors(os.path.join(folder, 'adapter.safetensors'), {n: p.detach() for n, p in trainables(model).items()})
    else:
        gpt.save_hf(folder, model, labels)


class Run:
    """A trained classifier, ready for texts: .info (run.json), .kind, .labels, .args (all training flags), .model, .enc, .device, .dtype, .reason."""

    kind = 'cls'
    answers = None

    def __init__(self, path, info, model, device, dtype, reason, front=0):
        """front: positions that stand in front of a text, or behind it, besides the model's own prompt vectors."""
        room = model.cfg.block_size - front - (0 if model.prompt is None else model.prompt.shape[-2])
        if info['args']['max_length'] > room:
            raise UserError(f'{path}/run.json: max_length {info["args"]["max_length"]} does not fit, the model has room for {room} tokens of a text')
        self.path, self.info, self.labels, self.args = path, info, info['labels'], info['args']
        self.device, self.dtype, self.reason = device, dtype, reason
        self.model = gpt.place(model.requires_grad_(False), device, dtype).eval()
        self.enc = data.tokenizer(tokenizer_name(model), self.args['data_dir'])

    def logits(self, texts, progress=False, cache=False):
        """texts: list of str -> logits (N, K) float32 numpy, in the order of the texts; the largest is the predicted class.
        cache=True keeps their token ids on disk."""
        return self.logits_of(data.tokenize(self.enc, texts, cache=cache), progress)

    def logits_of(self, tokens, progress=False):
        """The same for data.Tokens."""
        return gpt.class_logits(self.model, tokens, self.args['max_length'], self.args['truncate'], self.device, self.dtype, progress=progress)

    def calibrated(self, logits):
        """Logits (N, K) -> those whose softmax is the probability of the classes: a discriminative run's own."""
        return logits


class GenRun(Run):
    """A generative classifier: logits = log P(text | class) + log P(class), in nats, and its calibration.

    .passes: pairs (model, context) that are run over the texts one after another, and whose columns together are the classes: one model with
    a class axis (lora, prefix), one model per class (full), one model behind each class's prompt (zero_shot). With .answers, {class: ids},
    the classes' words behind the text are scored instead, and .neutral (K,) is subtracted, their log P behind texts that say nothing."""

    kind = 'gen'

    def __init__(self, path, info, passes, answers, device, dtype, reason):
        front = 1 + max(map(len, [context for _, context in passes] + list((answers or {}).values())))
        super().__init__(path, info, passes[0][0], device, dtype, reason, front)
        for model, _ in passes[1:]:
            if model is not self.model:
                gpt.place(model.requires_grad_(False), device, dtype).eval()
        self.passes, self.method = passes, 'exact'
        self.log_prior = np.log([info['prior'][label] for label in self.labels], dtype=np.float32)
        c = info.get('calibration') or dict(tau=1.0, bias=dict.fromkeys(self.labels, 0.0))
        self.tau, self.bias = c['tau'], np.array([c['bias'][label] for label in self.labels], np.float32)
        self.answers = answers
        if answers:                                                 # contextual calibration (Zhao et al. 2021, arXiv 2102.09690)
            self.neutral = np.zeros(len(self.labels), np.float32)
            neutral = self.logprobs_of(data.tokenize(self.enc, NEUTRAL, cache=False))
            p = np.exp(neutral - np.logaddexp.reduce(neutral, axis=1, keepdims=True))                        # (texts, K)
            self.neutral = np.log(p.mean(0))

    def logprobs_of(self, tokens, progress=False):
        """data.Tokens -> log P(text | class) (N, K) float32 numpy, nats; with .answers, log P(class's words | text) - .neutral."""
        where = (tokens, self.args['max_length'], self.args['truncate'], self.device, self.dtype)
        if self.answers:
            return np.concatenate([gpt.answer_logprobs(self.model, *where, self.answers[label], self.method, progress)
                                   for label in self.labels], axis=1) - self.neutral
        return np.concatenate([gpt.text_logprobs(model, *where, context, self.method, progress=progress) for model, context in self.passes], axis=1)

    def logits_of(self, tokens, progress=False):
        """data.Tokens -> log P(text | class) + log P(class), (N, K): Bayes' rule without its constant."""
        return self.logprobs_of(tokens, progress) + self.log_prior

    def calibrated(self, logits):
        """Logits (N, K) -> log P(text | class) / tau + log P(class) + b_class, whose softmax is calibrated on the validation rows."""
        return (logits - self.log_prior) / self.tau + self.log_prior + self.bias

    def nats_per_token(self, tokens, logits):
        """Mean over its tokens of a text's log-likelihood under the mixture of all classes (N,): how much it is like the training texts."""
        return np.logaddexp.reduce(logits, axis=1) / gpt.scored_lengths(self.model, tokens, self.args['max_length'])

    def likelihood_quantile(self, q):
        """The nats_per_token below which the share q of the validation texts lies."""
        if not self.info.get('likelihood_quantiles'):
            raise UserError(f'{self.path} holds no likelihoods to compare with; end its training: python train_gen.py --resume --out {self.path}')
        return float(np.interp(q, np.linspace(0, 1, 101), self.info['likelihood_quantiles']))

    @torch.no_grad()
    def token_logprobs(self, text):
        """text -> (its tokens as ids, <|endoftext|> last where that is scored; log p of each under each class (n, K) float32 nats)."""
        tokens = data.tokenize(self.enc, [text], cache=False)
        ids, n = data.collate(tokens, [0], self.args['max_length'], self.args['truncate'], self.model.end, self.device)
        whole = gpt.ends_here(self.model, tokens, [0], self.args['max_length'], self.device)
        columns = []
        for model, context in self.passes:
            with gpt.autocast(self.device, self.dtype):
                columns.append(model.token_logprobs(ids, n, whole, context).view(model.classes or 1, -1))            # (K, n + 1)
        out = torch.cat(columns).t()[:int(n + whole)].cpu().numpy()
        return (ids[0].tolist() + [self.model.end])[:len(out)], out

    @torch.no_grad()
    def sample(self, label, max_length, temperature=1.0, top_k=0, seed=0):
        """A new text of a class, token by token, until <|endoftext|> or max_length tokens. temperature divides the logits; top_k: choose
        among so many tokens, 0 = all of them."""
        c, generator = self.labels.index(label), torch.Generator().manual_seed(seed)
        model, context = self.passes[0 if self.model.classes else c]
        ids = [model.end, *context]
        start, W = len(ids), model.wte.weight.float()               # (V, C)
        while len(ids) - start < min(max_length, model.cfg.block_size - start):
            x = torch.tensor([ids], device=self.device)
            with gpt.autocast(self.device, self.dtype):
                h = model.hidden(x)[c if model.classes else 0, -1].float()
            logits = (F.linear(h, W) / temperature).cpu()                                   # (V,)
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
            ids.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
            if ids[-1] == model.end:
                return self.enc.decode(ids[start:-1], errors='replace')
        return self.enc.decode(ids[start:], errors='replace')


NEUTRAL = ['N/A', '', '[MASK]']                                     # texts that say nothing, as in the paper


def tokenizer_name(model):
    """Name of the tokenizer that a model's vocabulary belongs to."""
    names = {257: 'bytes', 50257: 'gpt2'}
    if model.cfg.vocab_size not in names:
        raise UserError(f'this model has {model.cfg.vocab_size} tokens; known are GPT-2\'s 50257 and the 257 of bytes')
    return names[model.cfg.vocab_size]


def read_run(path):
    """run.json of a run folder, checked. Raises UserError where the folder holds no trained classifier."""
    if not os.path.isfile(os.path.join(path, 'run.json')):
        raise UserError(f'{path} is not a run folder: it has no run.json (train one with train_cls.py or train_gen.py --out {path})')
    info = data.read_json(os.path.join(path, 'run.json'))
    if isinstance(info, dict) and info.get('kind') == 'lm':
        raise UserError(f'{path} is a language model (--pretrain), not a classifier; train one over it with --model {path}')
    if (not isinstance(info, dict) or not all(k in info for k in ('labels', 'method', 'args', 'base'))
            or info['method'] not in METHODS.get(str(info.get('kind', 'cls')), ())):
        raise UserError(f'{path}/run.json is not one that train_cls.py or train_gen.py wrote')
    wrong = malformed(info)
    if wrong:
        raise UserError(f'{path}/run.json is damaged: {wrong} is missing or malformed; restore the file, or train the run again')
    return info


def malformed(info):
    """The first field of a run.json that is not as a training script writes it, None if all are: of what a run is opened and scored by."""
    args, labels, base, method, gen = info['args'], info['labels'], info['base'], info['method'], info.get('kind') == 'gen'

    def text(x):
        return isinstance(x, str) and len(x) > 0

    def number(x, low=-1e30, high=1e30):                            # NaN is none
        return type(x) in (int, float) and low <= x <= high

    def whole(x):
        return type(x) is int and 0 < x < 10**9

    def by_label(x, holds):
        return isinstance(x, dict) and all(label in x and holds(x[label]) for label in labels)
    if not (isinstance(labels, list) and len(labels) > 1 and all(isinstance(x, str) for x in labels) and len(set(labels)) == len(labels)):
        return 'labels'
    if not isinstance(args, dict):
        return 'args'
    for names, holds in (('max_length', whole), ('truncate', lambda x: x in ('head', 'tail')), ('data', text), ('seed', lambda x: type(x) is int),
                         ('data_dir val test text_col label_col', lambda x: x is None or text(x)), ('max_samples', lambda x: x is None or whole(x)),
                         ('balance quick', lambda x: type(x) is bool), ('bottleneck' if method == 'adapter' else '', whole),
                         ('direct' if method == 'zero_shot' else '', lambda x: type(x) is bool)):
        for name in names.split():
            if name not in args or not holds(args[name]):
                return name
    if (gen or method in ('lora', 'adapter', 'prompt')) and not (isinstance(base, dict) and text(base.get('name')) and (
            base.get('sha256', 0) is None or text(base.get('sha256')))):
        return 'base'
    if gen:
        fits, quantiles, pending = info.get('calibration'), info.get('likelihood_quantiles'), info.get('pending', {})
        for name, sane in dict(
                folders=method == 'zero_shot' or by_label(info.get('folders'), lambda x: text(x) and x == os.path.basename(x) not in ('.', '..')),
                prior=by_label(info.get('prior'), lambda x: number(x, 1e-12, 1)),
                prompts=method != 'zero_shot' or by_label(info.get('prompts'), text),
                calibration=fits is None or isinstance(fits, dict) and number(fits.get('tau'), 1e-12) and by_label(fits.get('bias'), number),
                pending=isinstance(pending, dict),
                likelihood_quantiles=quantiles is None or (
                    isinstance(quantiles, list) and len(quantiles) == 101 and all(map(number, quantiles)))).items():
            if not sane:
                return name
    return None


def named_classes(folder):
    """The class names in a folder's config.json, by their ids; None where it has none. transformers leaves LABEL_0, LABEL_1 out."""
    path = os.path.join(folder, 'config.json')
    id2label = data.read_object(path).get('id2label') if os.path.isfile(path) else None
    if not id2label:
        return None
    try:
        names = {int(i): name for i, name in id2label.items()}
        labels = [names[i] for i in range(len(names))]
    except (AttributeError, KeyError, ValueError):
        labels = []
    if not all(isinstance(name, str) for name in labels) or not 0 < len(set(labels)) == len(id2label):
        raise UserError(f'{path}: id2label must give each of the ids 0, 1, 2, ... a name of its own')
    return labels


def base_named(path, name):
    """The base model of a PEFT folder: in its own base/, at the path `name`, relative to it or not, or a published name."""
    named = [os.path.join(path, name), name] if isinstance(name, str) and name else []
    for folder in filter(os.path.isdir, [os.path.join(path, 'base'), *named]):
        return folder
    for short, full in gpt.HUB_NAMES.items():
        if name in (short, full):
            return short
    raise UserError(f'{path}/adapter_config.json: base_model_name_or_path is {name!r}, which is no folder here and not one of '
                    f'{", ".join(gpt.HUB_NAMES.values())}; write the folder of the base model there')


def elsewhere(path):
    """What run.json would say of a folder that transformers or PEFT wrote. UserError where it holds no classifier of this kind."""
    config = os.path.join(path, 'config.json')
    if os.path.isfile(os.path.join(path, 'adapter_config.json')):
        method, c = 'lora' if 'r' in peft_config(path) else 'prompt', data.read_object(os.path.join(path, 'adapter_config.json'))
        if c.get('task_type') not in ('SEQ_CLS', None):
            raise UserError(f'{path} is no adapter of a classifier (its task_type is {c["task_type"]}); merge it into its base model with PEFT '
                            'and train a classifier over that with --model')
        base, tensors = base_named(path, c.get('base_model_name_or_path')), adapter_tensors(path)
        head = 'base_model.score.weight' if method == 'prompt' else 'base_model.model.score.weight'
        if head not in tensors:
            raise UserError(f'{path} lacks {head}: the adapter was saved without its class head; train it with modules_to_save=["score"]')
    elif os.path.isfile(config):
        method, base, tensors, head, c = 'full', path, gpt.folder_tensors(path), 'score.weight', data.read_object(config)
        gpt.read_config(path, tensors, path)
        if head not in tensors and 'GPT2ForSequenceClassification' not in str(c.get('architectures')):
            raise UserError(f'{path} is a language model, not a classifier (it has no score.weight); train one over it with --model {path}')
        if c.get('problem_type') not in (None, 'single_label_classification'):
            raise UserError(f'{config}: problem_type is {c["problem_type"]!r}; here every text has one class')
    else:
        raise UserError(f'{path} is not a run folder: it has no run.json (train one with train_cls.py or train_gen.py --out {path}), '
                        'and no config.json or adapter_config.json of transformers or PEFT')
    rows = len(tensors[head]) if head in tensors and tensors[head].dim() else 2
    labels, of_base = named_classes(path), named_classes(base)      # PEFT's users have the names from the base
    labels = labels or (of_base if of_base and len(of_base) == rows else [f'LABEL_{i}' for i in range(rows)])
    if len(labels) < 2:
        raise UserError(f'{path}: {head} has one row, which gives a number and not a class')
    tokenizer = os.path.join(path, 'tokenizer_config.json')         # says how much of a text is read, if it was saved
    t = data.read_object(tokenizer) if os.path.isfile(tokenizer) else {}
    limit = t.get('model_max_length')                               # 10**30 where there is none
    args = dict(data=None, data_dir=None, seed=1337, val=None, test=None, text_col=None, label_col=None, max_samples=None, balance=False, quick=False,
                max_length=limit if type(limit) is int and limit > 0 else None, truncate='tail' if t.get('truncation_side') == 'left' else 'head')
    return dict(kind='cls', method=method, model=base, data=None, labels=labels, args=args, base=dict(name=base, sha256=None))


def info_of(path):
    """run.json of a run folder, or what it would say of a folder from elsewhere."""
    return read_run(path) if os.path.isfile(os.path.join(path, 'run.json')) else elsewhere(path)


def base_of(path, info):
    """The base model's folder or name, checked to be the one the run was trained over."""
    base = os.path.join(path, 'base')
    where = base if os.path.isdir(base) else info['base']['name']
    if info['base']['sha256'] is None:                              # random weights of which nothing stayed
        return where
    found = gpt.base_sha256(gpt.model_folder(where, info['args']['data_dir']))
    if found != info['base']['sha256']:
        raise UserError(f'{path} was trained over another base model than the one in {where}: its weights should have the '
                        f'sha256 {info["base"]["sha256"][:12]}..., not {found[:12]}...; put that model back')
    return where


def class_folder(path, info, label):
    """The folder of a class of a generative run, checked: trained to the end, and over the run's base model."""
    folder = os.path.join(path, info['folders'][label])
    record = os.path.join(folder, 'class.json')                     # written last
    if not os.path.isfile(record):
        raise UserError(f'{path} lacks the class {label!r} (no {record}); train it with: python train_gen.py --resume --out {path}')
    found, wanted = data.read_object(record).get('base'), info['base']['sha256']
    if found != wanted:
        raise UserError(f'{folder} was trained over another base model (sha256 {str(found)[:12]}...) than the rest of the run '
                        f'({str(wanted)[:12]}...); train it again with: python train_gen.py --class_id "{label}" --out {path}')
    return folder


def open_run(path, device='auto', dtype='auto'):
    """A finished run folder, or one that transformers or PEFT wrote -> Run or GenRun. Raises UserError where the folder is neither, or its base
    model cannot be had or is another one."""
    info = info_of(path)
    method, args, labels = info['method'], info['args'], info['labels']
    device, dtype, reason = gpt.pick_device(device, dtype)
    if info.get('kind') == 'gen':
        return open_gen(path, info, device, dtype, reason)
    if method in ('head', 'last', 'full'):
        model = GPT.load(path, num_labels=len(labels))
    else:
        model = GPT.load(base_of(path, info), num_labels=len(labels), new_head=True, data_dir=args['data_dir'])
        if method == 'adapter':
            tensors = gpt.load_safetensors(os.path.join(path, 'adapter.safetensors'))
            add_filled(model, lambda m: adapt(m, method, bottleneck=args['bottleneck']),
                       lambda m: fill(m, tensors, {n: n for n in trainables(m)}, path))
        else:
            load_peft(path, model)
    room = model.cfg.block_size - (0 if model.prompt is None else len(model.prompt))
    args['max_length'] = min(args['max_length'] or room, room)      # a folder from elsewhere may say nothing, or 10**30
    return Run(path, info, model, device, dtype, reason)


def open_gen(path, info, device, dtype, reason):
    """The same for a generative run, whose run.json is given."""
    method, args, labels = info['method'], info['args'], info['labels']
    answers = None
    if method == 'full':
        passes = [(GPT.load(class_folder(path, info, label)), ()) for label in labels]
    elif method == 'zero_shot':
        model = GPT.load(base_of(path, info), data_dir=args['data_dir'])
        prompts = {label: data.tokenizer(tokenizer_name(model), args['data_dir']).encode_ordinary(info['prompts'][label]) for label in labels}
        if args['direct']:
            answers = prompts
        passes = [(model, () if answers else prompts[label]) for label in labels]
    else:
        folders = [class_folder(path, info, label) for label in labels]
        model = GPT.load(base_of(path, info), data_dir=args['data_dir'])
        load_peft(folders, model, classes=len(labels))
        passes = [(model, ())]
    return GenRun(path, info, passes, answers, device, dtype, reason)


def export(path, folder):
    """Write the run in `path` to the new or empty `folder` as transformers folders, LoRA merged into its base in float32: a classifier, or of a
    generative run one language model per class; GPT-2's tokenizer comes with it. All or nothing. UserError where there is no merged form."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f'--export {folder} is there already and not empty; name a new folder')
    run = open_run(path, 'cpu', 'fp32')
    if run.info['method'] == 'zero_shot':
        raise UserError(f'{path} trained nothing that could be exported: --zero_shot is the base model behind a prompt')
    parts = [('', run.model, None)]
    if run.kind == 'gen':
        parts = [(run.info['folders'][label], run.passes[0 if run.model.classes else i][0], i if run.model.classes else None)
                 for i, label in enumerate(run.labels)]
    side = 'right' if run.args['truncate'] == 'head' else 'left'    # transformers names the end that is cut off
    files = {'tokenizer_config.json': json.dumps(dict(model_max_length=run.args['max_length'], truncation_side=side, pad_token=data.EOT,
                                                      tokenizer_class='GPT2Tokenizer'))}
    if tokenizer_name(run.model) == 'gpt2':                         # OpenAI's two files under the names that transformers looks for
        files.update({name: data.read_bytes(data.find(f'gpt2_bpe/{source}', run.args['data_dir']))
                      for name, source in (('vocab.json', 'encoder.json'), ('merges.txt', 'vocab.bpe'))})
    temp = f'{os.path.abspath(folder)}.{os.getpid()}.tmp'
    try:
        for name, model, at in parts:
            there = os.path.join(temp, name)
            gpt.save_hf(there, model, run.labels if run.kind == 'cls' else None, merged_state(model, at))
            for file, content in files.items():
                data.write_atomic(os.path.join(there, file), content)
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(temp, folder)
    except OSError as e:
        raise data.cannot_write(folder, e)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return [os.path.join(folder, name) if name else folder for name, _, _ in parts]
