"""Trained runs as folders for transformers, with LoRA merged. Called by predict.py --export."""

import copy
import json
import os
import shutil

import torch

import lora
from lib import checkpoints, files, shipped
from lib.base import data_dir_of
from lib.download import find
from lib.files import UserError
from lib.runs import open_run
from lib.tokens import EOT, byte_of_character, tokenizer_name


def export(path, folder, data_dir=None, base=None):
    """Write the run in `path` to a new or empty folder, all or nothing: a classifier, or of a
    generative run a language model per class in folders of their own; LoRA is merged in float32,
    the tokenizer comes with it. -> the folders written. Raises UserError if there is no merged
    form."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f'--export {folder} is there already and not empty; name a new folder')
    run = open_run(path, 'cpu', 'fp32', data_dir, plain=True, base=base)
    if run.info['method'] == 'zero_shot':
        problem = '--zero_shot is the base model behind a prompt'
        raise UserError(f'{path} trained nothing that could be exported: {problem}')
    if run.kind == 'cls' and run.args['pool'] != 'last':
        problem = f'its head reads --pool {run.args["pool"]}, and transformers the last token'
        raise UserError(f'{path} cannot be exported: {problem}; train with --pool last')
    parts = [('', run.model, None)]  # folder, model, index of the class
    if run.kind == 'gen':
        models = [model for model, _ in run.passes]
        joint = bool(run.model.classes)
        names = [run.info['folders'][label] for label in run.labels]
        parts = [(n, models[0 if joint else i], i if joint else None) for i, n in enumerate(names)]
    written = tokenizer_files(run, data_dir)
    temp = f'{os.path.abspath(folder)}.{os.getpid()}.tmp'
    try:
        for name, model, index in parts:
            if edited := shipped.no_gpt2(model, but=lora.LoRA):
                names = f'{", ".join(edited)} {"were" if edited[1:] else "was"}'
                problem = f'{names} edited, and transformers computes GPT-2'
                raise UserError(f'{path} cannot be exported: {problem}')
            if layer := unmerged(model):
                problem = f'LoRA of {layer} as edited is not x W + x delta()'
                raise UserError(f'{path} cannot be merged: {problem}')
            state, part = lora.merged_state(model, index), os.path.join(temp, name)
            known = dict(model.named_buffers())
            if odd := [n for n in state if n not in known and not checkpoints.NAMES.fullmatch(n)]:
                problem = f'{odd[0]} is from an edit of model.py or lora.py'
                raise UserError(f'{path} cannot be exported: {problem}, unknown to transformers')
            checkpoints.save_hf(part, model.cfg, state, run.labels if run.kind == 'cls' else None)
            for file, content in written.items():
                files.write_atomic(os.path.join(part, file), content)
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(temp, folder)
    except OSError as e:
        raise files.cannot_write(folder, e) from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return [os.path.join(folder, name) if name else folder for name, _, _ in parts]


@torch.no_grad()
def unmerged(model):
    """Name of the first LoRA layer whose edit computes something else than its base with delta()
    added to the weight; None if all are what merging makes of them."""
    for name, m in model.named_modules():
        if isinstance(m, lora.LoRA) and shipped.edited(m):
            x = torch.randn(max(1, model.classes), 100, m.A.shape[-1])
            y = m.base(x)
            for i, update in enumerate(m(x) - y):
                base = copy.deepcopy(m.base)
                base.weight += m.delta(i if model.classes else None)
                error = (base(x[i]) - y[i] - update).abs().max()
                if not error <= 1e-4 * update.abs().max() + 1e-6 * y.abs().max():
                    return name
    return None


def tokenizer_files(run, data_dir):
    """{name: content} of the files from which transformers loads the tokenizer of a run."""
    side = 'right' if run.args['keep'] == 'first' else 'left'  # transformers names the end it cuts
    config = dict(model_max_length=run.args['max_length'], truncation_side=side, pad_token=EOT)
    config.update(eos_token=EOT, split_special_tokens=True)  # <|endoftext|> in a text is plain text
    if tokenizer_name(run.model.cfg.vocab_size) == 'gpt2':
        kind, written = 'GPT2Tokenizer', {}
        for name, source in (('vocab.json', 'encoder.json'), ('merges.txt', 'vocab.bpe')):
            place = data_dir_of(run.info, 'gpt2_bpe', data_dir)
            written[name] = files.read_bytes(find(f'gpt2_bpe/{source}', place))
    else:
        kind = 'PreTrainedTokenizerFast'
        written = {'tokenizer.json': json.dumps(byte_tokenizer(), ensure_ascii=False)}
    return {'tokenizer_config.json': json.dumps(dict(config, tokenizer_class=kind)), **written}


def byte_tokenizer():
    """tokenizer.json of Hugging Face's tokenizers for byte ids: BPE without merges."""
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    return dict(
        version='1.0',
        added_tokens=[dict(id=256, content=EOT, special=True, **flags)],
        pre_tokenizer=level,
        decoder=level,
        model=dict(type='BPE', vocab=byte_of_character(), merges=[]),
    )
