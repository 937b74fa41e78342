"""Run folders: a name for a new one, run.json read and checked, weights written. Called by
train_cls.py, eval.py and other rooms."""

import itertools
import os
import re
import shlex
import sys

import lora
import model as gpt2
from lib import base, checkpoints, files, ranks, rundata, shipped
from lib.blocks import has_hooks
from lib.checkpoints import NAMES
from lib.files import UserError
from lib.flags import METHODS, POOLS
from lib.foreign import elsewhere, no_run
from lib.peft import add_filled, extras, fill, load_peft, peft_names, save_peft
from lib.tensors import load_safetensors, save_safetensors
from lib.textfiles import is_encoding, is_separator
from lib.versions import edited, versions
from model import GPT


def first_folder(name, method):
    """runs/NAME-METHOD"""
    stem = os.path.splitext(os.path.basename(os.path.normpath(name)))[0] or 'data'
    return os.path.join('runs', f'{stem}-{method}')


def free_folder(name, method):
    """The same, numbered if that exists."""
    first = first_folder(name, method)
    numbered = (f'{first}-{i}' for i in itertools.count(2))
    return next(path for path in itertools.chain([first], numbered) if not os.path.exists(path))


def begin(args, ds, model, original, resumed):
    """Make the folder of a discriminative run, or take over that of the run to resume.
    original: see save. -> contents of run.json"""
    args.out = args.out or ranks.from_rank_zero(lambda: free_folder(args.data, args.method))

    def claim():
        files.claim(args.out)
        taken = any(os.path.exists(os.path.join(args.out, n)) for n in ('run.json', 'resume.pt'))
        if taken and not resumed:
            advice = 'name another folder, remove that one, or resume it (--resume)'
            raise UserError(f'--out {args.out} already holds a run; {advice}')
        files.remove_leftovers(args.out)
        return base.base_info(args, model.cfg, original, ds.labels)

    info = dict(kind='cls', method=args.method, model=args.model, data=args.data, seed=args.seed)
    info.update(labels=ds.labels, base=ranks.from_rank_zero(claim))
    info.update(rundata.record(args.out, ds, resumed, [args.init] if args.init else []))
    info.update(args=vars(args), parameters=lora.count(model))
    return {**info, 'versions': versions()}


def save(folder, model, info, original, results):
    """Write what train_cls.py trained, in the format that other programs load: a folder of
    transformers or PEFT, or adapter.safetensors. And run.json; info: its contents but for
    `results`. original: {plain name: float32 tensor} of the base model, for what stays frozen."""
    if info['method'] in ('lora', 'prompt'):
        save_peft(folder, model, base.peft_base(folder, info))
    elif info['method'] == 'adapter':
        save_safetensors(os.path.join(folder, 'adapter.safetensors'), lora.kept(model))
    else:
        state = {**original, **lora.trained_state(model)}
        assert lora.trainables(model).keys() <= state.keys(), 'all of it is saved'
        checkpoints.save_hf(folder, model.cfg, state, info['labels'])
    files.write_json(os.path.join(folder, 'run.json'), {**info, 'results': results})


def notes(model, method, pool='last'):
    """Lines about what other programs will miss, or compute otherwise, in the folder of a run."""
    names, plain = [] if method == 'adapter' else lora.trainables(model), lora.plain_names(model)
    names = {n for n in names if not NAMES.fullmatch(plain[n])}
    names -= set(peft_names(model).values())
    if method in ('lora', 'prompt'):
        names |= extras(model).keys()
    names = sorted({re.sub(r'\bh\.\d+\.', 'h.*.', n) for n in names})
    lines = [f'  {", ".join(names)}: saved, but transformers and PEFT will ignore it'] * bool(names)
    if new := shipped.no_gpt2(model):
        lines += [f'  {", ".join(new)} as edited: transformers and PEFT compute GPT-2 without it']
    if only := only_here(model):
        missed = 'the final test, predict.py and eval.py compute model.py and lora.py without it'
        lines += [f'  {", ".join(only)}: in this script alone; {missed}']
    if pool != 'last':
        lines += [f'  --pool {pool}: transformers and PEFT pool the last token: other logits there']
    return lines


def only_here(model):
    """Names of the classes, replaced methods and hooks of a model that an opened one will not have,
    because they are neither in model.py nor in lora.py."""
    found = []
    for name, m in model.named_modules():
        kind, name = type(m), re.sub(r'\bh\.\d+', 'h.*', name) or 'model'
        ours = any(getattr(module, kind.__name__, None) is kind for module in (gpt2, lora))
        if not ours and not shipped.of_torch(kind):
            found.append(f'{kind.__module__}.{kind.__name__}')
        found += [f'{name}.{n}' for n in vars(m) if callable(getattr(kind, n, None))]
        found += [f'a hook of {name}'] * has_hooks(m)
    return list(dict.fromkeys(found))


def load_cls(path, info, data_dir=None, moved=None):
    """-> the model of a discriminative run, as its folder holds it. moved: the folder of its base
    model, if that is another one now."""
    method, k = info['method'], len(info['labels'])
    if method not in ('lora', 'prompt', 'adapter'):
        return GPT.from_pretrained(path, k)
    model = GPT.from_pretrained(base.base_of(path, info, data_dir, moved), k, new_head=True)
    if method == 'adapter':
        load_adapters(path, model, info['args']['bottleneck'])
    else:
        load_peft(path, model, r=info['args'].get('r'))
    return model


def load_adapters(path, model, bottleneck):
    tensors = load_safetensors(os.path.join(path, 'adapter.safetensors'))

    def fill_all(model):
        known = model.state_dict().keys() & tensors.keys()
        needed = lora.kept(model, buffers=False).keys()
        fill(model, tensors, {n: n for n in known | needed}, path)

    add_filled(model, lambda m: lora.adapt(m, 'adapter', bottleneck=bottleneck), fill_all)


def info_of(path, moved):
    """run.json of a run folder, or what it would say of a folder from elsewhere (moved: --base)."""
    if os.path.isfile(path):
        raise UserError(f'{path} is a file: name the run folder that it is in')
    ours = os.path.isfile(os.path.join(path, 'run.json'))
    return read_run(path) if ours else elsewhere(path, moved)


def precision(path, info):
    """The name of the torch.dtype in which eval_results.json of a run was computed; None if that is
    not known."""
    try:
        recorded = files.read_object(os.path.join(path, 'eval_results.json')).get('dtype')
    except UserError:  # missing or damaged
        recorded = None
    names = dict(fp32='float32', bf16='bfloat16', fp16='float16')  # of --dtype
    return recorded or names.get(info['args'].get('dtype'))


def read_run(path):
    """run.json of a run folder, checked. Raises UserError if the folder holds no classifier."""
    record = os.path.join(path, 'run.json')
    if not os.path.isfile(record):
        raise UserError(no_run(path))
    info = files.read_json(record)
    if isinstance(info, dict) and info.get('kind') == 'lm':
        advice = f'train one on top of it with --model {shlex.quote(path)}'
        raise UserError(f'{path} is a language model (--pretrain), not a classifier; {advice}')
    names = ('kind', 'labels', 'method', 'args', 'base')
    known = isinstance(info, dict) and all(name in info for name in names)
    if not known or info['method'] not in METHODS.get(str(info['kind']), ()):
        raise UserError(f'{record} is not one that train_cls.py or train_gen.py wrote')
    if wrong := malformed(info):
        problem = f'{wrong} is missing or malformed'
        raise UserError(f'{record} is damaged: {problem}; restore the file, or train the run again')
    return info


def update_results(path, results):
    """Write eval_results.json of a run; a note instead if it holds results of another precision or
    of code that was edited since, or cannot be written."""
    info = read_run(path)
    before, kept = precision(path, info), 'eval_results.json keeps the results of'
    if edited(info):
        print(f'note: {kept} the code as it was', file=sys.stderr)
    elif before not in (None, results['dtype']):
        print(f'note: {kept} {before}; these are of {results["dtype"]}', file=sys.stderr)
    else:
        with files.optional():
            files.write_json(os.path.join(path, 'eval_results.json'), results)


# --- checks of run.json ---


def value(*kinds, valid=lambda x: True):
    """-> a check of one value: is it of one of these types, and valid?"""
    return lambda x: type(x) in kinds and bool(valid(x))


BOOL, INT, TEXT = value(bool), value(int), value(str, valid=len)
COUNT = value(int, valid=lambda n: 0 < n < 10**9)
NUMBER = value(int, float, valid=lambda x: abs(x) <= 1e30)  # not NaN
POSITIVE = value(int, float, valid=lambda x: 1e-12 <= x <= 1e30)
PROBABILITY = value(int, float, valid=lambda x: 1e-12 <= x <= 1)
FOLDER = value(str, valid=lambda x: x == os.path.basename(x) and x not in ('', '.', '..'))


def optional(check):
    return lambda x: x is None or check(x)


def mapping(names, check):
    """-> a check of one value: is it a dict of these names, each with a value that passes check?"""
    return lambda x: isinstance(x, dict) and set(x) == {*names} and all(map(check, x.values()))


def malformed(info):
    """The first field of a run.json, of those that a run is opened and scored by, that is not as a
    training script writes it; None if all are."""
    args, labels, base, method = info['args'], info['labels'], info['base'], info['method']
    strings = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not strings or not 1 < len(labels) == len(set(labels)):
        return 'labels'
    if not isinstance(args, dict):
        return 'args'
    for name, check in args_fields(method, info['kind']).items():
        if name not in args or not check(args[name]):
            return name
    if info['kind'] == 'gen' or method in ('lora', 'adapter', 'prompt'):
        named = isinstance(base, dict) and TEXT(base.get('name')) and 'sha256' in base
        if not named or not optional(TEXT)(base['sha256']):
            return 'base'
    columns = mapping(('text_col', 'label_col'), optional(TEXT))
    split = mapping(rundata.SPLITS, value(str))
    checks = dict(columns=optional(columns)(info.get('columns')))
    checks['split'] = optional(split)(info.get('split'))
    checks.update(gen_fields(info, labels, method) if info['kind'] == 'gen' else {})
    return next((name for name, valid in checks.items() if not valid), None)


def args_fields(method, kind):
    """{flag: check of its value} of the flags in run.json that are used later."""
    fields = dict.fromkeys(('data_dir', 'val', 'test', 'text_col', 'label_col'), optional(TEXT))
    fields.update(sep=optional(is_separator), encoding=optional(is_encoding), split_seed=INT)
    fields.update(max_length=COUNT, keep=lambda x: x in ('first', 'last'), data=TEXT, seed=INT)
    fields.update(max_samples=optional(COUNT), eval_samples=optional(COUNT))
    fields.update(balance=BOOL, quick=BOOL, drop_unlabelled=BOOL)
    part = value(int, valid=lambda i: i >= 0)
    if kind != 'gen':
        fields.update(folds=optional(COUNT), fold=optional(part), pool=lambda x: x in POOLS)
    fields.update(dict(bottleneck=COUNT) if method == 'adapter' else {})
    fields.update(dict(direct=BOOL) if method == 'zero_shot' else {})
    return fields


def gen_fields(info, labels, method):
    """{field: is it valid?} of the run.json of a generative run."""
    fit, quantiles = info.get('calibration'), info.get('likelihood_quantiles')
    zero_shot = method == 'zero_shot'

    def by_label(x, check):
        return isinstance(x, dict) and all(label in x and check(x[label]) for label in labels)

    def calibration(x):
        if not isinstance(x, dict) or not by_label(x.get('bias'), NUMBER):
            return False
        tau = x.get('tau')  # of an edit also one per class
        each = isinstance(tau, list) and len(tau) == len(labels) and all(map(POSITIVE, tau))
        return each or POSITIVE(tau)

    return dict(
        folders=zero_shot or by_label(info.get('folders'), FOLDER),
        prior=by_label(info.get('prior'), PROBABILITY),
        prompts=not zero_shot or by_label(info.get('prompts'), TEXT),
        calibration=optional(calibration)(fit),
        rule=info.get('rule', 'bayes') in ('bayes', 'calibrated'),
        pending=isinstance(info.get('pending', {}), dict),
        likelihood_quantiles=quantiles is None
        or (isinstance(quantiles, list) and len(quantiles) == 101 and all(map(NUMBER, quantiles))),
    )
