"""What trains and what stays frozen: LoRA on GPT-2's Conv1D and on nn.Linear, Houlsby adapters, prompt tuning, head, last K blocks, full;
PEFT's files in and out; and open_run, which gives back a trained run ready to classify."""
import itertools
import math
import os
import re
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import model as gpt
from data import UserError
from model import GPT, Conv1D

METHODS = ('lora', 'head', 'last', 'full', 'adapter', 'prompt')
TARGETS = 'c_attn,attn.c_proj,c_fc,mlp.c_proj'      # every matrix of a block; beats attention alone at the same number of parameters
SMALL_BASE = 20_000_000                             # bytes; a base model below this travels inside the run folder

# ------------------------------------------------------------------------------------------------------------ wrappers

def dropout(x, p):
    """F.dropout(x, p) in training. On a CPU bernoulli_ draws a number per value, one after another, and took a quarter of a training step;
    here one 64-bit draw serves four values. p is rounded to 1/65536, and the kept values are scaled for that p, so the mean is exact."""
    if x.device.type != 'cpu':
        return F.dropout(x, p)
    n, dropped = x.numel(), round(p * 65536)
    bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:n].view(x.shape)
    return x * (bits >= dropped - 32768).to(x.dtype) * (65536 / (65536 - dropped))


class LoRA(nn.Module):
    """y = base(x) + (alpha / r) dropout(x) A^T B^T around a frozen layer (Hu et al. 2021, arXiv 2106.09685).

    A (r, in) starts uniform within 1/sqrt(in), B (out, r) at zero, so training starts from the base model. The product B A is never
    formed in forward: two thin matrix products cost r (in + out) per token instead of in x out."""

    def __init__(self, base, r, scale, p):
        super().__init__()
        n_in, n_out = base.weight.shape if isinstance(base, Conv1D) else base.weight.shape[::-1]    # Conv1D stores (in, out)
        self.base, self.scale, self.p = base, scale, p              # p: dropout
        self.A = nn.Parameter(torch.empty(r, n_in).uniform_(-1 / math.sqrt(n_in), 1 / math.sqrt(n_in)))
        self.B = nn.Parameter(torch.zeros(n_out, r))

    def forward(self, x):                                           # (..., in) -> (..., out)
        y = self.base(x)
        x = x.to(y.dtype)                                           # under autocast: rounded once, before the mask
        if self.training and self.p:
            x = dropout(x, self.p)
        a = F.linear(x, self.A) * self.scale                        # (..., r)
        return torch.addmm(y.flatten(0, -2), a.flatten(0, -2), self.B.t()).view(y.shape)            # the sum costs no pass of its own

    def delta(self):
        """scale * B A in float32, in the layout of the base weight."""
        d = self.scale * (self.B.detach().float() @ self.A.detach().float())                        # (out, in)
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


def add_lora(model, r, alpha, dropout, targets, rslora=False):
    """Wrap every Conv1D / nn.Linear of the blocks whose name is, or ends with, one of `targets` (PEFT's rule), or matches it as a regular
    expression if `targets` is a string. Scale alpha / r, or alpha / sqrt(r) with rslora. -> names wrapped.
    Raises UserError for a target that matches nothing, listing what there is."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (Conv1D, nn.Linear)) and n.startswith('h.')}
    if isinstance(targets, str):
        hits = {targets: [n for n in layers if re.fullmatch(targets, 'transformer.' + n) or re.fullmatch(targets, n)]}
    else:
        hits = {t: [n for n in layers if n == t or n.endswith('.' + t) or n == t.replace('transformer.', '', 1)] for t in targets}
    for t, names in hits.items():
        if not names:
            there = sorted({n.split('.', 2)[2] for n in layers})
            raise UserError(f'--targets: {t!r} matches no layer of this model; there are {", ".join(there)}')
    chosen = {n for names in hits.values() for n in names}
    names = [n for n in layers if n in chosen]                      # in the model's order
    for n in names:
        parent, _, child = n.rpartition('.')
        setattr(model.get_submodule(parent), child, LoRA(layers[n], r, alpha / (math.sqrt(r) if rslora else r), dropout))
    return names


def add_adapters(model, bottleneck):
    """Wrap the attention and the MLP of every block with an Adapter of that many hidden units. -> names wrapped."""
    for block in model.h:
        block.attn = Adapter(block.attn, model.cfg.n_embd, bottleneck)
        block.mlp = Adapter(block.mlp, model.cfg.n_embd, bottleneck)
    return [n for n, m in model.named_modules() if isinstance(m, Adapter)]


def add_prompt(model, n):
    """n learned vectors in front of every text (Lester et al. 2021, arXiv 2104.08691), started at the embeddings of n random tokens."""
    if not 0 < n < model.cfg.block_size:
        raise UserError(f'--prompt {n}: this model has {model.cfg.block_size} positions, and a text needs at least one of them')
    model.prompt = nn.Parameter(model.wte.weight.detach()[torch.randint(model.cfg.vocab_size, (n,))].float().clone())


def adapt(model, method, last=0, r=8, alpha=16.0, dropout=0.0, targets=TARGETS.split(','), bottleneck=64, prompt=0):
    """Make `model` ready for a method: freeze what is frozen, add what is added. -> names of the wrapped modules."""
    wrapped = []
    model.requires_grad_(method == 'full')                          # what is added below trains
    if method == 'lora':
        wrapped = add_lora(model, r, alpha, dropout, targets)
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


def merged_state(model):
    """{name: float32 tensor} of the plain GPT-2 with every LoRA product added to its float32 base weight. An explicit verb: training and
    evaluation never merge. Adapters and prompt vectors have no merged form: UserError."""
    if model.prompt is not None or any(isinstance(m, Adapter) for m in model.modules()):
        raise UserError('adapters and prompt vectors are extra computation and cannot be merged into GPT-2; only --lora can')
    state = model.float32_state()
    for name, m in model.named_modules():
        if isinstance(m, LoRA):
            state[name + '.base.weight'] = state[name + '.base.weight'] + m.delta()
            del state[name + '.A'], state[name + '.B']
    return {WRAPPER.sub('.', n): t for n, t in state.items()}


# --------------------------------------------------------------------------------------------------------- PEFT's files

PREFIX = 'base_model.model.transformer.'


def save_peft(folder, model, base_name, task='SEQ_CLS'):
    """Write a model's LoRA or prompt vectors, with its head, as PEFT's adapter_config.json and adapter_model.safetensors."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRA)}
    config = dict(task_type=task, base_model_name_or_path=base_name, inference_mode=True)
    if model.prompt is None:
        m = next(iter(layers.values()))
        targets = sorted({n.split('.', 2)[2] for n in layers})      # names below a block: c_proj alone would mean two layers
        if len(layers) < len(targets) * model.cfg.n_layer:          # not in every block: full names
            targets = list(layers)
        r = m.A.shape[0]
        config.update(peft_type='LORA', r=r, lora_alpha=m.scale * r, lora_dropout=m.p, bias='none', fan_in_fan_out=True,
                      target_modules=targets, modules_to_save=['score'] if hasattr(model, 'score') else None)
        tensors = {f'{PREFIX}{n}.lora_{k}.weight': getattr(m, k) for n, m in layers.items() for k in 'AB'}
        head = 'base_model.model.score.weight'
    else:
        cfg = model.cfg
        config.update(peft_type='PROMPT_TUNING', num_virtual_tokens=len(model.prompt), token_dim=cfg.n_embd, num_layers=cfg.n_layer,
                      num_attention_heads=cfg.n_head, num_transformer_submodules=1)
        tensors, head = {'prompt_embeddings': model.prompt}, 'base_model.score.weight'
    if hasattr(model, 'score'):
        tensors[head] = model.score.weight
    gpt.save_safetensors(os.path.join(folder, 'adapter_model.safetensors'), {n: t.detach().float() for n, t in tensors.items()})
    data.write_json(os.path.join(folder, 'adapter_config.json'), config)


def load_peft(folder, model):
    """Add the adapter of a PEFT folder to `model` (a fresh GPT) and fill it. Every tensor must find its place and every place its tensor."""
    path = os.path.join(folder, 'adapter_config.json')
    c = data.read_json(path)
    kind = c.get('peft_type')
    try:
        if kind == 'LORA':
            for key in ('use_dora', 'rank_pattern', 'alpha_pattern', 'layers_to_transform', 'exclude_modules', 'trainable_token_indices'):
                if c.get(key):
                    raise UserError(f'{path}: {key} is set, which nanocls does not support')
            if c.get('bias', 'none') != 'none':
                raise UserError(f'{path}: bias is {c["bias"]!r}; only "none" is supported')
            add_lora(model, int(c['r']), float(c['lora_alpha']), float(c.get('lora_dropout', 0.0)), c['target_modules'], bool(c.get('use_rslora')))
            names = {f'{PREFIX}{n}.lora_{k}.weight': f'{n}.{k}' for n, m in model.named_modules() if isinstance(m, LoRA) for k in 'AB'}
            head = 'base_model.model.score.weight'
        elif kind == 'PROMPT_TUNING':
            add_prompt(model, int(c['num_virtual_tokens']))
            names, head = {'prompt_embeddings': 'prompt'}, 'base_model.score.weight'
        else:
            raise UserError(f'{path}: peft_type is {kind!r}; LORA and PROMPT_TUNING are supported')
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f'{path}: a field is missing or malformed ({e})')
    if hasattr(model, 'score'):
        names[head] = 'score.weight'
    fill(model, gpt.load_safetensors(os.path.join(folder, 'adapter_model.safetensors')), names, folder)


def fill(model, tensors, names, folder):
    """Copy tensors {name in file: tensor} into the parameters {name in file: name in model}. UserError lists all that does not fit."""
    params = dict(model.named_parameters())
    gpt.check_tensors(tensors, {n: params[p].shape for n, p in names.items()}, f'{folder} does not fit this model')
    with torch.no_grad():
        for n, p in names.items():
            params[p].copy_(tensors[n])


# ----------------------------------------------------------------------------------------------------------- run folders

def free_folder(name, method):
    """runs/NAME-METHOD, numbered if it is taken."""
    stem = os.path.splitext(os.path.basename(os.path.normpath(name)))[0] or 'data'
    first = os.path.join('runs', f'{stem}-{method}')
    numbered = (f'{first}-{i}' for i in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if not os.path.exists(path))


def base_info(args, out, model):
    """What run.json says of the base model, and the base itself where the run would be lost without it: a random one (--scratch) that
    stays frozen is written to out/base, a small one is copied there."""
    base = os.path.join(out, 'base')
    stays = args.method in ('lora', 'adapter', 'prompt')            # the other methods save every weight
    if args.scratch:
        if stays:
            frozen = {WRAPPER.sub('.', n): t for n, t in model.float32_state().items() if n not in trainables(model)}
            data.make_folder(base)
            gpt.save_hf(base, model, state=frozen)
        return dict(name=f'{args.model} --scratch', sha256=gpt.base_sha256(base) if stays else None)
    folder = gpt.model_folder(args.model, args.data_dir)
    files = gpt.weight_files(folder)
    if stays and args.model not in gpt.HUB_NAMES and sum(map(os.path.getsize, files)) < SMALL_BASE:
        for path in [*files, *(os.path.join(folder, f) for f in ('config.json', 'model.safetensors.index.json', 'pytorch_model.bin.index.json'))]:
            if os.path.isfile(path):
                data.write_atomic(os.path.join(base, os.path.basename(path)), data.read_bytes(path))
    name = args.model if args.model in gpt.SHAPES else os.path.abspath(args.model)
    return dict(name=name, sha256=gpt.base_sha256(folder))


def save_weights(folder, model, method, labels, base_name):
    """Write what a method trained, in the format other programs load (design: HF folder, PEFT folder, or adapter.safetensors)."""
    if method in ('lora', 'prompt'):
        save_peft(folder, model, gpt.HUB_NAMES.get(base_name, base_name))
    elif method == 'adapter':
        gpt.save_safetensors(os.path.join(folder, 'adapter.safetensors'), {n: p.detach() for n, p in trainables(model).items()})
    else:
        gpt.save_hf(folder, model, labels)


class Run:
    """A trained run, ready to classify: .info (run.json), .labels, .args (all training flags), .model, .enc, .device, .dtype, .reason."""

    def __init__(self, path, info, model, device, dtype, reason):
        self.path, self.info, self.labels, self.args = path, info, info['labels'], info['args']
        self.device, self.dtype, self.reason = device, dtype, reason
        self.model = gpt.place(model.requires_grad_(False), device, dtype).eval()
        self.enc = data.tokenizer(tokenizer_name(model), self.args['data_dir'])

    def logits(self, texts, progress=False, cache=False):
        """texts: list of str -> logits (N, K) float32 numpy, in the order of the texts. cache=True keeps their token ids on disk."""
        return self.logits_of(data.tokenize(self.enc, texts, cache=cache), progress)

    def logits_of(self, tokens, progress=False):
        """The same for data.Tokens."""
        return gpt.class_logits(self.model, tokens, self.args['max_length'], self.args['truncate'], self.device, self.dtype, progress=progress)


def tokenizer_name(model):
    """Name of the tokenizer that a model's vocabulary belongs to."""
    names = {257: 'bytes', 50257: 'gpt2'}
    if model.cfg.vocab_size not in names:
        raise UserError(f'this model has {model.cfg.vocab_size} tokens; known are GPT-2\'s 50257 and the 257 of bytes')
    return names[model.cfg.vocab_size]


def open_run(path, device='auto', dtype='auto'):
    """A finished run folder -> Run. Raises UserError where the folder is no run, or its base model cannot be had or is another one."""
    if not os.path.isfile(os.path.join(path, 'run.json')):
        raise UserError(f'{path} is not a run folder: it has no run.json (train one with train_cls.py --out {path})')
    info = data.read_json(os.path.join(path, 'run.json'))
    if not isinstance(info, dict) or not all(k in info for k in ('labels', 'method', 'args', 'base')) or info['method'] not in METHODS:
        raise UserError(f'{path}/run.json is not one that train_cls.py wrote')
    method, args, labels = info['method'], info['args'], info['labels']
    device, dtype, reason = gpt.pick_device(device, dtype)
    if method in ('head', 'last', 'full'):
        model = GPT.load(path, num_labels=len(labels))
    else:
        base = os.path.join(path, 'base')
        where = base if os.path.isdir(base) else info['base']['name']
        found = gpt.base_sha256(gpt.model_folder(where, args['data_dir']))
        if found != info['base']['sha256']:
            raise UserError(f'{path} was trained over another base model than the one in {where}: its weights should have the '
                            f'sha256 {info["base"]["sha256"][:12]}..., not {found[:12]}...; put that model back')
        model = GPT.load(where, num_labels=len(labels), new_head=True, data_dir=args['data_dir'])
        if method == 'adapter':
            adapt(model, method, bottleneck=args['bottleneck'])
            fill(model, gpt.load_safetensors(os.path.join(path, 'adapter.safetensors')), {n: n for n in trainables(model)}, path)
        else:
            load_peft(path, model)
    return Run(path, info, model, device, dtype, reason)
