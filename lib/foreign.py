"""Folders that transformers or PEFT wrote, read as runs of this project. Called by
lib/runfolder.py."""

import os
import shlex

from lib import checkpoints, files
from lib.download import HUB_NAMES, SHORT
from lib.files import UserError
from lib.peft import adapter_tensors, peft_config
from model import SHAPES


def no_run(path):
    """What is wrong with a folder without run.json."""
    advice = f'train one with train_cls.py or train_gen.py --out {shlex.quote(path)}'
    if os.path.isfile(os.path.join(path, 'resume.pt')):
        advice = 'its training was interrupted before anything was saved; go on with --resume'
    return f'{path} is not a run folder: it has no run.json ({advice})'


def elsewhere(path, moved):
    """What run.json would say of a folder that transformers or PEFT wrote (moved: the base model of
    an adapter, if not the one that it names). Raises UserError if it holds no classifier with one
    class per text."""
    config = os.path.join(path, 'config.json')
    if os.path.isfile(os.path.join(path, 'adapter_config.json')):
        method, base, head, tensors = read_adapter(path, moved)
    elif os.path.isfile(config):
        method, base, head = 'full', path, 'score.weight'
        tensors = read_checkpoint(path, config)
    else:
        kinds = 'config.json or adapter_config.json of transformers or PEFT'
        raise UserError(f'{no_run(path)}, and no {kinds}')
    rows = len(tensors[head]) if head in tensors and tensors[head].dim() else 2
    labels, of_base = named_classes(path), named_classes(base)
    if not labels:  # users of PEFT have the names from the base
        fits = of_base and len(of_base) == rows
        labels = of_base if fits else [f'LABEL_{i}' for i in range(rows)]
    if len(labels) < 2:
        raise UserError(f'{path}: {head} has one row, which gives a number and not a class')
    names = 'data data_dir val test text_col label_col sep encoding max_samples seed'.split()
    args = dict(dict.fromkeys(names), split_seed=1337, drop_unlabelled=False)
    args.update(balance=False, quick=False, **reading(path))
    args['pool'] = 'last'  # as GPT2ForSequenceClassification
    info = dict(kind='cls', method=method, model=base, data=None, labels=labels, args=args)
    return dict(info, base=dict(name=base, sha256=None))


def read_adapter(path, moved):
    """-> method, base model, name of the head, tensors of a folder of PEFT"""
    method = 'lora' if 'r' in peft_config(path) else 'prompt'
    c = files.read_object(os.path.join(path, 'adapter_config.json'))
    if c.get('task_type') not in ('SEQ_CLS', None):
        problem = f'{path} is no adapter of a classifier (its task_type is {c["task_type"]})'
        advice = 'merge it into its base model with PEFT, '
        advice += 'and train a classifier on that with --model'
        raise UserError(f'{problem}; {advice}')
    base = moved or base_named(path, c.get('base_model_name_or_path'))
    tensors = adapter_tensors(path)
    head = 'base_model.score.weight' if method == 'prompt' else 'base_model.model.score.weight'
    if head not in tensors:
        problem = f'{path} lacks {head}: the adapter was saved without its class head'
        raise UserError(f'{problem}; train it with modules_to_save=["score"]')
    return method, base, head, tensors


def read_checkpoint(path, config):
    """-> tensors of a folder of transformers"""
    c, tensors = files.read_object(config), checkpoints.folder_tensors(path)
    checkpoints.drop_tied_head(tensors, path)
    checkpoints.read_config(path, tensors, path, SHAPES)
    classifier = 'GPT2ForSequenceClassification' in str(c.get('architectures'))
    if 'score.weight' not in tensors and not classifier:
        problem = f'{path} is a language model, not a classifier (it has no score.weight)'
        raise UserError(f'{problem}; train one on top of it with --model {shlex.quote(path)}')
    if (kind := c.get('problem_type')) not in (None, 'single_label_classification'):
        raise UserError(f'{config}: problem_type is {kind!r}; here every text has one class')
    return tensors


def reading(path):
    """How much of a text is read, {'max_length', 'keep'}, if a tokenizer was saved as well."""
    tokenizer = os.path.join(path, 'tokenizer_config.json')
    t = files.read_object(tokenizer) if os.path.isfile(tokenizer) else {}
    limit = t.get('model_max_length')  # 10**30 if there is none
    known = type(limit) is int and limit > 0
    keep = 'last' if t.get('truncation_side') == 'left' else 'first'
    return dict(max_length=limit if known else None, keep=keep)


def named_classes(folder):
    """The class names in a folder's config.json, by id; None if it has none (transformers does not
    write LABEL_0, LABEL_1)."""
    path = os.path.join(folder, 'config.json')
    id2label = files.read_object(path).get('id2label') if os.path.isfile(path) else None
    if not id2label:
        return None
    try:
        names = {int(i): name for i, name in id2label.items()}
        labels = [names[i] for i in range(len(names))]
    except (AttributeError, KeyError, ValueError):
        labels = []
    text = all(isinstance(name, str) for name in labels)
    if not text or not 0 < len(set(labels)) == len(id2label):
        rule = 'must give each of the ids 0, 1, 2, ... a name of its own'
        raise UserError(f'{path}: id2label {rule}')
    return labels


def base_named(path, name):
    """The base model of a PEFT folder: its own base/, the folder `name` (relative to the PEFT
    folder or not), or a published name."""
    named = [os.path.join(path, name), name] if isinstance(name, str) and name else []
    for folder in filter(os.path.isdir, [os.path.join(path, 'base'), *named]):
        return folder
    if name in (*HUB_NAMES, *SHORT):
        return SHORT.get(name, name)
    names = ', '.join(HUB_NAMES.values())
    what = f'{path}/adapter_config.json: base_model_name_or_path is {name!r}, which is no folder'
    advice = f'name its folder with --base, or copy it to {os.path.join(path, "base")}'
    raise UserError(f'{what} here and not one of {names}; {advice}')
