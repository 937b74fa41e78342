"""What trains and what stays frozen: LoRA, Houlsby adapters, prompt vectors, the head, the last K
blocks, everything. Each is added to a plain GPT from outside; adapt() chooses.

Shapes in the comments: B texts, T tokens, C width, K classes, N prompt vectors, r rank."""

import math
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.checkpoints import NAMES
from lib.files import UserError
from lib.flags import ALL_METHODS
from lib.report import counted
from lib.tensors import learned
from model import Conv1D


class LoRA(nn.Module):
    """y = base(x) + scale dropout(x) A^T B^T around a frozen layer (Hu et al. 2021, arXiv
    2106.09685). A (r, in) starts uniform within 1/sqrt(in), B (out, r) at zero, so training starts
    from the base model. Two thin products cost r (in + out) per token; B A is never formed.

    classes = K > 0: K updates, A (K, r, in) and B (K, out, r), for K equal parts of x's rows."""

    def __init__(self, base, r, scale, p, classes=0):
        super().__init__()
        shape = base.weight.shape  # Conv1D stores (in, out), nn.Linear (out, in)
        n_in, n_out = shape if isinstance(base, Conv1D) else shape[::-1]
        self.base, self.scale, self.p = base, scale, p  # p: dropout probability
        axis = (classes,) if classes else ()
        bound = 1 / math.sqrt(n_in)
        self.A = nn.Parameter(torch.empty(*axis, r, n_in).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(*axis, n_out, r))

    def forward(self, x):  # (..., in) -> (..., out)
        y = self.base(x)
        x = F.dropout(x, self.p, self.training)
        x = x.reshape(*self.A.shape[:-2], -1, x.shape[-1])  # (n, in), or (K, n / K, in)
        thin = self.scale * (x @ self.A.mT)
        return y + (thin @ self.B.mT).view(y.shape)

    def delta(self, index=None):
        """scale * B A in float32, in the layout of the base weight. index: which of K classes."""
        A, B = (t.detach() if index is None else t.detach()[index] for t in (self.A, self.B))
        update = self.scale * (B.float() @ A.float())  # (out, in)
        return update.t() if isinstance(self.base, Conv1D) else update


class Adapter(nn.Module):
    """Bottleneck after a sublayer, before its residual sum: h + up(gelu(down(h))), h = sub(x)
    (Houlsby et al. 2019, arXiv 1902.00751). `up` starts at zero: training starts from the base."""

    def __init__(self, sub, n_embd, bottleneck):
        super().__init__()
        self.sub = sub
        self.down, self.up = nn.Linear(n_embd, bottleneck), nn.Linear(bottleneck, n_embd)
        nn.init.normal_(self.down.weight, 0.0, 0.02)
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        h = self.sub(x)
        return h + self.up(F.gelu(self.down(h), approximate='tanh'))


# --- adding them to a model ---


def layers(model, blocks=None):
    """{name: layer} of every Conv1D and nn.Linear in the blocks of these numbers (default: all)."""
    return {
        f'h.{i}.{name}': layer
        for i, block in enumerate(model.h)
        if blocks is None or i in blocks
        for name, layer in block.named_modules()
        if isinstance(layer, (Conv1D, nn.Linear))
    }


def add_lora(
    model, r=8, alpha=16.0, dropout=0.0, targets=(), classes=0, top=None, blocks=None,
    allow_missing=False,
):  # fmt: skip
    """Wrap every layer whose name is, or ends with, one of `targets`, as PEFT matches names.

    The scale is alpha / r.  classes: K updates per layer, 0 = one.  top: only in the last so many
    blocks.  blocks: only in the blocks of these numbers.  -> names wrapped.  Raises UserError for a
    target that matches no layer; allow_missing: only if none matches."""
    if (top or 0) > model.cfg.n_layer:
        raise UserError(f'--top {top}: this model has {counted(model.cfg.n_layer, "block")}')
    if not targets:
        raise UserError('--targets: name at least one layer')
    blocks = range(model.cfg.n_layer - top, model.cfg.n_layer) if top else blocks
    available = layers(model, blocks)
    hits = {
        t: [n for n in available if n == t.removeprefix('transformer.') or n.endswith('.' + t)]
        for t in targets
    }
    for target, names in hits.items():
        if not names and not (allow_missing and any(hits.values())):
            known = ', '.join(sorted({n.split('.', 2)[2] for n in available}))
            known = known or 'no Conv1D of model.py and no nn.Linear'
            raise UserError(f'--targets: {target!r} matches no layer of this model; it has {known}')
    chosen = {n for names in hits.values() for n in names}
    wrapped = [n for n in available if n in chosen]  # in the model's order
    scale = alpha / r
    for name in wrapped:
        replace(model, name, LoRA(available[name], r, scale, dropout, classes))
    model.classes = classes
    return wrapped


def replace(model, name, layer):
    """Put a layer into the place of the one called `name`."""
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, layer)


def add_adapters(model, bottleneck):
    """Wrap the attention and the MLP of every block with an Adapter. -> names wrapped."""
    for block in model.h:
        block.attn = Adapter(block.attn, model.cfg.n_embd, bottleneck)
        block.mlp = Adapter(block.mlp, model.cfg.n_embd, bottleneck)
    return [name for name, m in model.named_modules() if isinstance(m, Adapter)]


def add_prompt(model, n, classes=0):
    """Put n learned vectors in front of every text (Lester et al. 2021, arXiv 2104.08691), started
    at the embeddings of random tokens: (n, C), or with classes (K, n, C)."""
    if not 0 < n < model.cfg.block_size:
        why = f"the model has {model.cfg.block_size} positions, one is the text's"
        raise UserError(f'--prompt {n}: {why}')
    ids = torch.randint(model.cfg.vocab_size, (classes, n) if classes else (n,))
    model.prompt = nn.Parameter(model.wte.weight.detach()[ids].float().clone())
    model.classes = classes


def adapt(model, method, last=0, bottleneck=64, prompt=0, classes=0, **options):
    """Freeze what is frozen and add what is added for a method of the training scripts; opening a
    run calls it too. options: arguments of add_lora. -> names of the wrapped layers"""
    if method not in ALL_METHODS:
        raise UserError(f'{method!r} is none of {", ".join(dict.fromkeys(ALL_METHODS))}')
    wrapped = []
    everything = method in ('full', 'pretrain', 'prefix')
    for name, p in model.named_parameters():  # what an edit adds trains, unless it says otherwise
        p.requires_grad_(p.requires_grad and (everything or not NAMES.fullmatch(name)))
    if method == 'lora':
        wrapped = add_lora(model, classes=classes, **options)
    elif method == 'adapter':
        wrapped = add_adapters(model, bottleneck)
    elif method == 'prompt':
        add_prompt(model, prompt, classes)
    elif method == 'last':
        if not 0 < last <= model.cfg.n_layer:
            raise UserError(f'--last {last}: this model has {counted(model.cfg.n_layer, "block")}')
        for m in (*model.h[-last:], model.ln_f):
            m.requires_grad_(True)
    if hasattr(model, 'score'):
        model.score.requires_grad_(True)
    return wrapped


def trainables(model):
    """{name: parameter} of what trains."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def count(model):
    """Number of parameters that train, and of all."""
    sets = dict(trainable=trainables(model).values(), total=model.parameters())
    return {name: sum(p.numel() for p in params) for name, params in sets.items()}


def describe(model, wrapped):
    """Lines that say what was wrapped and how many parameters train."""
    rows = Counter()
    for name in wrapped:
        m = model.get_submodule(name)
        shapes = [str(tuple(p.shape)) for p in own(m).values() if p.dim() > 1]
        what = f'{type(m).__name__} {" x ".join(shapes)}'
        rows[f'h.*.{name.split(".", 2)[2]:<12} {what}'] += 1
    train, total = count(model).values()
    share = 100 * train / total
    lines = [f'  {k} times {line}' for line, k in rows.items()]
    return [*lines, f'training {train:,} of {total:,} parameters ({share:.2f} %)']


# --- states and merging ---


def own(wrapper):
    """{name: parameter} of what a LoRA or an Adapter adds to the layer inside it."""
    return {n: p for n, p in wrapper.named_parameters() if not n.startswith(('base.', 'sub.'))}


def plain_names(model):
    """{name of a weight or buffer: its name in a GPT without LoRA and adapters}"""
    names = {n: n for n in model.state_dict()}
    for name, m in reversed([*model.named_modules()]):  # what is inside another one first
        if isinstance(m, (LoRA, Adapter)):
            inside = f'{name}.base.' if isinstance(m, LoRA) else f'{name}.sub.'
            names = {n: plain.replace(inside, f'{name}.') for n, plain in names.items()}
    return names


def kept(model, buffers=True):
    """{name: tensor} of what a run has beside GPT-2: what trains, what an edit added and keeps
    frozen, and buffers, such as what a BatchNorm has seen."""
    found, plain = learned(model) if buffers else trainables(model), plain_names(model)
    added = {n: p for n, p in model.named_parameters() if not NAMES.fullmatch(plain[n])}
    return {n: t.detach() for n, t in {**found, **added}.items()}


def trained_state(model):
    """{plain name: tensor} to save over the weights as they were read: what trains, in float32, and
    what device.place did not round (that has not changed), without LoRA, adapters and the
    prompt."""
    wrappers = [(n, m) for n, m in model.named_modules() if isinstance(m, (LoRA, Adapter))]
    added = {f'{name}.{n}' for name, m in wrappers for n in own(m)} | {'prompt'}
    trains, plain = trainables(model), plain_names(model)
    state = {n: t for n, t in model.state_dict().items() if n not in added}
    rounded = {n for n, t in state.items() if t.is_floating_point() and t.dtype != torch.float32}
    state = {n: t for n, t in state.items() if n in trains or n not in rounded}
    return {plain[n]: t.float() if n in rounded else t for n, t in state.items()}


def merge(model):
    """Replace every LoRA by its base layer, with scale B A added to a weight of its own."""
    for name, m in list(model.named_modules()):
        if isinstance(m, LoRA):
            m.base.weight = nn.Parameter(m.base.weight.data + m.delta(), requires_grad=False)
            replace(model, name, m.base)


def merged_state(model, index=None):
    """{plain name: float32 CPU tensor} of the plain GPT-2 with every LoRA update added to its
    weight; index: which of K classes. Raises UserError for adapters and prompts, which have no
    merged form."""
    if model.prompt is not None or any(isinstance(m, Adapter) for m in model.modules()):
        raise UserError('adapters and prompt vectors cannot be merged into GPT-2; only --lora can')
    state, plain = {n: t.float().cpu() for n, t in model.state_dict().items()}, plain_names(model)
    for name, m in model.named_modules():
        if isinstance(m, LoRA):
            state[name + '.base.weight'] = state[name + '.base.weight'] + m.delta(index).cpu()
            for n in own(m):  # A, B, and what an edit added
                del state[f'{name}.{n}']
    return {plain[n]: t for n, t in state.items()}
