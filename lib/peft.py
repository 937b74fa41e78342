"""Folders of PEFT (adapter_config.json, adapter_model.safetensors): LoRA and prompt tuning of a
GPT, written and read. Called by lib/runfolder.py, lib/runs.py, lib/foreign.py and lib/genrun.py."""

import json
import os
import re
import subprocess
import sys

import torch

import lora
from lib import files
from lib.checkpoints import NAMES
from lib.files import UserError
from lib.tensors import check_tensors, load_bin, load_safetensors, save_safetensors
from lora import LoRA
from model import GPT

PREFIX = 'base_model.model.transformer.'
EXTRA = 'extra.safetensors'  # beside the adapter: what PEFT has no place for
REGEX_SECONDS = 5  # for a regular expression of target_modules; 0.1 s are usual
# fields of a LoraConfig that are read, or do not change what the adapter computes; any other one
# that is set is refused
FIELDS = set(
    """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    r target_modules lora_alpha alpha_pattern lora_dropout fan_in_fan_out bias use_rslora
    modules_to_save init_lora_weights layers_to_transform layers_pattern megatron_core
    qalora_group_size ensure_weight_tying""".split()
)

# --- writing ---


def save_peft(folder, model, base_name, index=None):
    """Write a model's LoRA or prompt vectors, and its head if it has one. index: which of K
    classes."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRA)}
    params, cfg = dict(model.named_parameters(remove_duplicate=False)), model.cfg
    head = 'score.weight' in params  # a head of an edit is among the extras
    config = dict(task_type='SEQ_CLS' if model.num_labels else 'CAUSAL_LM')
    config.update(base_model_name_or_path=base_name, inference_mode=True)
    if model.prompt is None:
        if not layers:
            raise UserError('the model has no LoRA of lora.py: edit that file, not a copy of it')
        m = next(iter(layers.values()))
        targets = sorted({n.split('.', 2)[2] for n in layers})  # c_proj alone would mean two layers
        if len(layers) < len(targets) * cfg.n_layer:  # not in every block: full names
            targets = list(layers)
        r = m.A.shape[-2]
        alphas = {n: float(x.scale) * x.A.shape[-2] for n, x in layers.items()}
        alpha = float(m.scale) * r
        config.update(peft_type='LORA', r=r, lora_alpha=alpha, lora_dropout=m.p, bias='none')
        config.update(alpha_pattern={n: a for n, a in alphas.items() if a != alpha})
        config.update(fan_in_fan_out=True, target_modules=targets)
        config.update(modules_to_save=['score'] if head else None)
    else:
        config.update(peft_type='PROMPT_TUNING', num_virtual_tokens=model.prompt.shape[-2])
        config.update(token_dim=cfg.n_embd, num_layers=cfg.n_layer)
        config.update(num_attention_heads=cfg.n_head, num_transformer_submodules=1)
    tensors = {key: params[n].detach().float() for key, n in peft_names(model).items()}
    if index is not None:
        tensors = {key: t[index] for key, t in tensors.items()}
    save_safetensors(os.path.join(folder, 'adapter_model.safetensors'), tensors)
    more = {n: t.float() if t.is_floating_point() else t for n, t in extras(model).items()}
    if more and index is None:  # with classes, the weights of the one base are saved apart
        save_safetensors(os.path.join(folder, EXTRA), more)
    files.write_json(os.path.join(folder, 'adapter_config.json'), config)


def peft_names(model):
    """{name in PEFT's file: name in the model} of a model's LoRA or prompt, and of its head, if
    that is GPT-2's. Raises UserError for a LoRA of an edit that has no A and B."""
    params = dict(model.named_parameters(remove_duplicate=False))  # an edit may share one
    head = 'base_model.model.score.weight'
    if model.prompt is None:
        layers = [n for n, m in model.named_modules() if isinstance(m, LoRA)]
        names = {f'{PREFIX}{n}.lora_{k}.weight': f'{n}.{k}' for n in layers for k in 'AB'}
        if lacking := sorted({n[-1] for n in names.values() if n not in params}):
            keep = 'keep both (what is to stay frozen as a parameter that requires no gradient)'
            why = f'a run is saved as PEFT saves it, with A and B, so {keep}'
            raise UserError(f'LoRA as edited has no parameter {", ".join(lacking)}: {why}')
    else:
        names, head = {'prompt_embeddings': 'prompt'}, 'base_model.score.weight'
    return {**names, head: 'score.weight'} if 'score.weight' in params else names


def extras(model):
    """{name: tensor} of what training changes and has no place in a PEFT folder: what an edit of
    model.py or lora.py added, or does not freeze; of a classifier also buffers."""
    places = set(peft_names(model).values())
    found = lora.kept(model, buffers=model.num_labels > 0)
    return {n: t for n, t in found.items() if n not in places}


# --- reading ---


def load_peft(folder, model, classes=0, r=None):
    """Add the adapter of a PEFT folder to a fresh GPT and fill it; every tensor must fit.

    classes: K; `folder` is then a list of K folders with adapters of the same shape.  r: --r of
    the run, whatever ranks an edit made of it.  Raises UserError for what does not fit."""
    folders = folder if classes else [folder]
    if why := classes and apart(folders):
        raise UserError(why)
    first = peft_config(folders[0])
    known = {n for n, _ in model.named_parameters() if classes or NAMES.fullmatch(n)}

    def add(model):
        if 'n' in first:
            return lora.adapt(model, 'prompt', prompt=first['n'], classes=classes)
        # PEFT skips targets that match nothing; the tensors must fit anyway
        options = dict(lora_options(first, model), classes=classes, allow_missing=True)
        lora.adapt(model, 'lora', **{**options, 'r': r or options['r']})

    def fill_all(model):
        for i, one in enumerate(folders):
            fill(model, adapter_tensors(one), peft_names(model), one, i if classes else None)
        for name, m in model.named_modules():
            if isinstance(m, LoRA) and not isinstance(m.scale, torch.nn.Parameter):
                # as saved, whatever add_lora or LoRA make of alpha and r
                m.scale = alpha_of(name, first) / (m.A.shape[-2] ** (0.5 if first['rslora'] else 1))

    add_filled(model, add, fill_all)
    known.update(peft_names(model).values())
    plain = lora.plain_names(model)
    needed = {n for n, _ in model.named_parameters() if not {n, plain[n]} & known}
    load_extras(folders[0], model, needed)


def apart(folders):
    """Why no model can hold the adapters of these folders together, in words; None if one can."""
    first = peft_config(folders[0])
    for one, config in zip(folders, map(peft_config, folders)):
        if differ := [k for k in config if k != 'dropout' and config[k] != first.get(k)]:
            values = f'{config[differ[0]]}, but {first.get(differ[0])} in {folders[0]}'
            return f'{one}: {differ[0]} is {values}; the adapters of one classifier must agree'
        if os.path.isfile(os.path.join(one, EXTRA)):
            what = f'has weights of its class alone beside LoRA ({EXTRA})'
            return f'{one} {what}, so one model cannot hold all classes'
    return None


def load_extras(folder, model, needed):
    """Fill what trained besides LoRA, prompt and head. needed: names that must be among it."""
    path, places = os.path.join(folder, EXTRA), model.state_dict()
    tensors = load_safetensors(path) if os.path.isfile(path) else {}
    shapes = {n: t.shape for n, t in places.items() if n in tensors or n in needed}
    check_tensors(tensors, shapes, f'{folder} does not fit model.py and lora.py as they are')
    for n, t in tensors.items():
        places[n].copy_(t)


def add_filled(model, add, fill_all):
    """add(model), then fill_all(model); both are first checked on the meta device, so that a bad
    file cannot make us allocate."""
    with torch.device('meta'):
        outline = GPT(model.cfg, model.num_labels)
        add(outline)
    fill_all(outline)
    add(model)
    fill_all(model)


def fill(model, tensors, names, folder, index=None):
    """Copy tensors {name in file: tensor} to their places {name in file: name in model}, or to
    slice `index` of each. Raises UserError that lists all that does not fit."""
    params = model.state_dict()
    places = {n: params[p] if index is None else params[p][index] for n, p in names.items()}
    shapes = {n: t.shape for n, t in places.items()}
    check_tensors(tensors, shapes, f'{folder} does not fit this model')
    for n, t in places.items():
        t.copy_(tensors[n])


def adapter_tensors(folder):
    """{name: tensor} of a PEFT folder; PEFT wrote a .bin before version 0.7."""
    path = os.path.join(folder, 'adapter_model.safetensors')
    old = os.path.join(folder, 'adapter_model.bin')
    return load_bin(old) if os.path.isfile(old) > os.path.isfile(path) else load_safetensors(path)


def peft_config(folder):
    """adapter_config.json of a PEFT folder -> the arguments of lora_options, or dict(n=) of
    add_prompt. Raises UserError for what is not supported."""
    path = os.path.join(folder, 'adapter_config.json')
    c = files.read_object(path)

    def field(key, kinds, valid=lambda v: True, default=None):
        value = c.get(key, default)
        if type(value) not in kinds or not valid(value):
            problem = f'malformed: {value!r}' if key in c else 'missing'
            raise UserError(f'{path}: the field {key} is {problem}; restore the file')
        return value

    if c.get('peft_type') == 'PROMPT_TUNING':
        return dict(n=field('num_virtual_tokens', [int], lambda n: 0 < n < 10**7))
    if c.get('peft_type') != 'LORA':
        kinds = 'LORA and PROMPT_TUNING are supported'
        raise UserError(f'{path}: peft_type is {c.get("peft_type")!r}; {kinds}')
    for key, value in c.items():
        if value and key not in FIELDS:
            raise UserError(f'{path}: {key} is set, which nanocls does not support')
    start = c.get('init_lora_weights')
    if isinstance(start, str) and start not in ('gaussian', 'orthogonal', 'eva'):
        what = f'init_lora_weights is {start!r}, which changes the base model'
        raise UserError(f'{path}: {what}; merge the adapter into it with PEFT first')
    if c.get('bias', 'none') != 'none':
        raise UserError(f'{path}: bias is {c["bias"]!r}; only "none" is supported')

    def list_of(kind):
        return lambda v: not isinstance(v, list) or all(type(x) is kind for x in v)

    def numbers(alphas):
        pairs = (alphas or {}).items()
        if odd := [end for end, _ in pairs if not re.fullmatch(r'[\w.]+', end)]:
            what = f'alpha_pattern holds the expression {odd[0]!r}'
            raise UserError(f'{path}: {what}; only names of layers and their ends are supported')
        return all(type(a) in (int, float) and abs(a) < 1e6 for _, a in pairs)

    targets = field('target_modules', [str, list], lambda t: t and list_of(str)(t))
    blocks = field('layers_to_transform', [int, list, type(None)], list_of(int))
    return dict(
        r=field('r', [int], lambda r: 0 < r < 10**7),
        alpha=float(field('lora_alpha', [int, float], lambda a: abs(a) < 1e6)),
        alphas=field('alpha_pattern', [dict, type(None)], numbers) or {},
        dropout=float(field('lora_dropout', [int, float], lambda p: 0 <= p < 1, 0.0)),
        targets=targets if isinstance(targets, str) else sorted(targets),
        rslora=bool(field('use_rslora', [bool, type(None)])),
        blocks=[blocks] if isinstance(blocks, int) else blocks or None,
    )


def alpha_of(name, config):
    """alpha of a layer: that of the first name in PEFT's alpha_pattern that its own ends with."""
    own = [a for end, a in config['alphas'].items() if f'.transformer.{name}'.endswith(f'.{end}')]
    return own[0] if own else config['alpha']


def lora_options(config, model):
    """What peft_config returned -> the arguments of lora.add_lora: a regular expression of
    target_modules becomes the names of layers that it matches."""
    config = {key: value for key, value in config.items() if key not in ('alphas', 'rslora')}
    targets = config['targets']
    if isinstance(targets, str):
        available = list(lora.layers(model, blocks=config['blocks']))
        config['targets'] = matching(targets, available)
        if not config['targets']:
            known = ', '.join(sorted({n.split('.', 2)[2] for n in available}))
            problem = f'{targets!r} matches no layer of this model'
            raise UserError(f'target_modules: {problem}; it has {known}')
    return config


def matching(pattern, names):
    """Which of the names a regular expression matches, with or without "transformer." in front.
    Some expressions would take years, so a process of its own does it, which can be stopped."""
    code = """if True:
        import json, re, sys
        pattern, names = json.load(sys.stdin)
        match = lambda name: re.fullmatch(pattern, name)
        json.dump([n for n in names if match('transformer.' + n) or match(n)], sys.stdout)"""
    command, given = [sys.executable, '-I', '-c', code], json.dumps([pattern, names])
    options = dict(input=given, capture_output=True, text=True, timeout=REGEX_SECONDS)
    try:
        p = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        problem = f'the regular expression {pattern!r} takes too long'
        raise UserError(f'target_modules: {problem}; rewrite it, or list the names') from None
    if p.returncode:
        why = p.stderr.strip().rpartition('\n')[2]
        raise UserError(f'target_modules: {pattern!r} is no regular expression ({why})')
    return json.loads(p.stdout)
