"""The base model of a run: built for training, recorded in run.json, found again later. Called by
train_cls.py, eval.py and the rooms that open or write runs."""

import os
from dataclasses import replace

import torch

from lib import checkpoints, files
from lib.download import HUB_NAMES
from lib.files import UserError
from model import GPT, SHAPES

SMALL_BASE = 20_000_000  # bytes; a smaller base model is copied into the run folder
STAYS = ('lora', 'adapter', 'prompt', 'zero_shot')  # the other methods save every weight


def build_model(args, num_labels=0):
    """The base model of a training run with a fresh head of num_labels rows: loaded, or with random
    weights in the shape that the flags name."""
    torch.manual_seed(args.seed)
    if not args.scratch:
        if num_labels:
            note_dropped_head(args)
        kw = dict(new_head=args.method != 'zero_shot', data_dir=args.data_dir)
        try:
            return GPT.from_pretrained(args.model, num_labels, **kw)
        except files.Unavailable as e:
            raise files.Unavailable(f'{e}; --scratch starts from random weights') from None
    if args.model not in SHAPES:
        raise UserError(f'--scratch needs a shape by name ({", ".join(SHAPES)}), not {args.model}')
    flags = {name: getattr(args, name) for name in ('n_layer', 'n_head', 'n_embd', 'block_size')}
    cfg = replace(SHAPES[args.model], **{name: n for name, n in flags.items() if n})
    if cfg.n_embd % cfg.n_head:
        raise UserError(f'--n_embd {cfg.n_embd} is not a multiple of --n_head {cfg.n_head}')
    return GPT(cfg, num_labels).init_weights()


def note_dropped_head(args):
    """Say so if --model is a folder with a class head, which a new one replaces."""
    config = os.path.join(args.model, 'config.json')
    kinds = files.read_object(config).get('architectures') if os.path.isfile(config) else None
    if 'GPT2ForSequenceClassification' in str(kinds) and not getattr(args, 'init', None):
        own = os.path.isfile(os.path.join(args.model, 'run.json'))
        keeps = f'; --init {args.model} would keep it' if own else ''
        print(f'note: the class head of {args.model} is not used{keeps}')


def base_info(args, cfg, state, labels=None):
    """What run.json says of the base model: name and sha256. Writes it to --out/base if the run
    needs it and would lose it (random weights that stay frozen), or if it is small.

    cfg: model.Config; state: {plain name: float32 tensor} of the base.  labels go into its
    config.json, because PEFT takes the class names from the base."""
    stored = os.path.join(args.out, 'base')
    if args.scratch:
        if args.method not in STAYS:
            return dict(name=f'{args.model} --scratch', sha256=None)
        frozen = {n: t for n, t in state.items() if n != 'score.weight'}
        checkpoints.save_hf(stored, cfg, frozen, labels)
        announce(stored, args.method)
        return dict(name=f'{args.model} --scratch', sha256=checkpoints.base_sha256(stored))
    folder = checkpoints.model_folder(args.model, args.data_dir)
    weights = checkpoints.weight_files(folder)
    small = sum(map(os.path.getsize, weights)) < SMALL_BASE
    if args.method in STAYS and args.model not in HUB_NAMES and small:
        copy_base(folder, stored, weights, cfg, labels)
        announce(stored, args.method)
    return dict(name=args.model, sha256=checkpoints.base_sha256(folder))


def announce(stored, method):
    """PEFT reads an absolute path, or one relative to the folder that it is started from: neither
    moves with the run."""
    moved = ' (PEFT needs its new path if you move the run: docs/formats.md)'
    print(f'base model copied to {stored}{moved * (method in ("lora", "prompt"))}')


def copy_base(folder, stored, weights, cfg, labels):
    names = ('config.json', 'model.safetensors.index.json', 'pytorch_model.bin.index.json')
    for path in [*weights, *(os.path.join(folder, name) for name in names)]:
        if os.path.isfile(path):
            copied = os.path.join(stored, os.path.basename(path))
            files.write_atomic(copied, files.read_bytes(path))
    config = os.path.join(stored, 'config.json')
    if labels and os.path.isfile(config):
        named = checkpoints.class_names(labels, cfg.vocab_size - 1)
        files.write_json(config, {**files.read_json(config), **named})


def peft_base(out, info):
    """What adapter_config.json calls the base model of a run: the folder in the run, or a name that
    PEFT can resolve."""
    stored, name = os.path.join(os.path.abspath(out), 'base'), info['base']['name']
    return stored if os.path.isdir(stored) else HUB_NAMES.get(name, name)


def base_of(path, info, data_dir=None, moved=None):
    """The folder of the base model of a run, wherever it is now (moved: --base); checked to be the
    one that the run was trained on. Raises UserError if it is gone or is another one."""
    stored, name, sha256 = os.path.join(path, 'base'), info['base']['name'], info['base']['sha256']
    where = moved or (stored if os.path.isdir(stored) else name)
    if where in SHAPES:
        place = data_dir_of(info, os.path.join('models', where), data_dir)
        where = checkpoints.model_folder(where, place)
    if sha256 is None:  # random weights that were not kept, or a folder from elsewhere
        return where
    if not os.path.isdir(where):
        advice = f'name its new place with --base (predict.py, eval.py), or copy it to {stored}'
        raise UserError(f'{path}: its base model {name} is no longer there; {advice}')
    if (current := checkpoints.base_sha256(where)) != sha256:
        problem = f'was trained on another base model than the one in {where}'
        sums = f'its weights should have the sha256 {sha256[:12]}..., not {current[:12]}...'
        raise UserError(f'{path} {problem}: {sums}; put that model back')
    return where


def data_dir_of(info, rel, data_dir):
    """Where to look for a file or folder `rel` that a run needs: data_dir; else the folder that the
    run was trained with, if it still has it; None leaves it to $NANOCLS_DATA and the cache."""
    recorded = info['args']['data_dir']
    usable = recorded and os.path.exists(os.path.join(recorded, rel))
    return data_dir or (recorded if usable else None)
