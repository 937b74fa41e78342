"""The same work done by Hugging Face's transformers and PEFT, for bench.py. Both are imported
inside the functions, only where a peer runs. Called by bench.py, lib/onnxpeers.py and lib/sides.py.

args: bench.py's flags. peer: 'default', 'half' or 'best', see bench.py. Every theirs...() returns
([speeds of a block of steps], lengths in tokens of the texts)."""

import os
import tempfile
import time

import numpy as np
import torch

from lib import files
from lib.device import DTYPES
from lib.measure import CLASSES, block_of, synchronize, timed
from lib.workload import METHODS, agnews_texts, texts_of, tokens_of, training_rows

PEERS = ('default', 'half', 'best')
WARM_UP = 50  # steps of Trainer before the timed ones
END = 50256  # <|endoftext|>

ANSWER = """import json, sys
import torch
from transformers import GPT2ForSequenceClassification
folder, adapter, device, dtype, ids = sys.argv[1:]
model = GPT2ForSequenceClassification.from_pretrained(
    folder, num_labels=2, pad_token_id=50256, dtype=getattr(torch, dtype))
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
with torch.no_grad():
    ids = torch.tensor([json.loads(ids)], device=device)
    print(model.to(device).eval()(ids).logits.softmax(-1).tolist())
"""


def precision(args, peer):
    """Name of the precision of a peer's matmuls."""
    return args.hf_dtype or ('fp32' if peer == 'default' else args.dtype)


def padded(rows, batches, device='cpu'):
    """Lists of ids -> ids and attention mask (B, T), padded to the longest as
    DataCollatorWithPadding does; appended to `batches`, see measure.block_of."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(r) for r in rows], True, END)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(r)] for r in rows])).long()
    batches.append((len(rows), int(mask.sum()), mask.numel()))
    return ids.to(device), mask.to(device)


def in_parts(rows, size, by_length):
    """Yield `size` rows at a time, in their order or longest first."""
    ordered = sorted(rows, key=len, reverse=True) if by_length else rows
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def theirs(args, folder, peer):
    """The task of bench.py with the base model in `folder`."""
    if args.task == 'gen':
        return theirs_gen(args, folder, peer)
    if args.task == 'predict':
        return theirs_predict(args, peer)
    return theirs_trainer(args, folder, peer)


@torch.no_grad()
def theirs_gen(args, folder, peer):
    """One complete language model per class, as the usual scripts have it. default: the model's own
    mean loss times the number of tokens, one text at a time; half: eight texts; best: eight texts
    of like length; the last two take the same sums as ours."""
    from transformers import GPT2LMHeadModel

    tokens, batches = tokens_of(agnews_texts(args)), []
    dtype = DTYPES[precision(args, peer)]
    models = [GPT2LMHeadModel.from_pretrained(folder, dtype=dtype) for _ in range(CLASSES)]
    models = [model.to(args.device).eval() for model in models]
    rows = [[END, *ids.tolist(), END] for ids in tokens]

    def score(model, ids, mask):
        if peer == 'default':
            return model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().mT
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction='none')
        return (loss * mask[:, 1:]).sum(1)

    def run(rows):
        for part in in_parts(rows, 1 if peer == 'default' else 8, peer == 'best'):
            ids, mask = padded(part, batches, args.device)
            for model in models:
                score(model, ids, mask).cpu()

    run(rows[:8])  # warm-up
    return [timed(lambda: run(rows), batches, args.device)], tokens.lengths


@torch.no_grad()
def theirs_predict(args, peer):
    """The run, merged and exported for transformers, is loaded and reads the file, 16 texts at a
    time; best: by length. Token ids come from tiktoken, as ours do."""
    from transformers import GPT2ForSequenceClassification

    batches, probs = [], []
    folder, dtype = os.path.join(args.shared, 'exported'), DTYPES[precision(args, peer)]

    def run():
        model = GPT2ForSequenceClassification.from_pretrained(folder, dtype=dtype)
        model.to(args.device).eval()
        with open(os.path.join(args.shared, 'texts.txt'), encoding='utf-8') as f:
            tokens = tokens_of(f.read().splitlines())
        rows = [ids.tolist() for ids in tokens]
        for part in in_parts(rows, 16, peer == 'best'):
            ids, mask = padded(part, batches, args.device)
            logits = model(input_ids=ids, attention_mask=mask).logits
            probs.extend(logits.float().softmax(-1).tolist())
        files.write_json(os.path.join(args.shared, 'answers'), probs)

    return [timed(run, batches, args.device)], tokens_of(texts_of(args)[0]).lengths


def adapted(args, folder, best):
    """GPT2ForSequenceClassification with what trains for the task; LoRA by PEFT."""
    from transformers import GPT2ForSequenceClassification

    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if best else {}
    model = GPT2ForSequenceClassification.from_pretrained(
        folder, num_labels=2, pad_token_id=END, **dropout
    )
    if args.task in ('lora', 'eval'):
        from peft import LoraConfig, get_peft_model

        targets = ['c_attn', 'attn.c_proj', 'c_fc', 'mlp.c_proj']
        rank = dict(r=8, lora_alpha=16, lora_dropout=0.05, fan_in_fan_out=True)
        return get_peft_model(
            model, LoraConfig(task_type='SEQ_CLS', target_modules=targets, **rank)
        )
    body = model.transformer
    trains = dict(full=[model], last=[body.h[-1], body.ln_f, model.score], head=[model.score])
    model.requires_grad_(False)
    for module in trains[args.task]:
        module.requires_grad_(True)
    return model


def clock(times, first, last, device):
    """TrainerCallback that appends the time after step `first` and after step `last` to `times`."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            if not first:
                times.append(time.perf_counter())

        def on_step_end(self, args, state, *rest, **kwargs):
            if state.global_step in (first, last):
                synchronize(device)
                times.append(time.perf_counter())

    return Clock()


def theirs_trainer(args, folder, peer):
    """Training and evaluation by Trainer, LoRA by PEFT."""
    from transformers import Trainer, TrainingArguments

    best, half = peer == 'best', precision(args, peer) == 'bf16'
    trains = args.task in METHODS
    train = training_rows(args) if trains else None  # more rows are easier to group by length
    texts, y = (train.texts, train.y) if trains else texts_of(args)
    tokens = tokens_of(texts, args.length)
    rows = [dict(input_ids=ids.astype(np.int64), labels=int(c)) for ids, c in zip(tokens, y)]
    first = min(WARM_UP, args.steps // 2)  # for head and last as well: Trainer caches nothing
    last = first + args.steps
    batches, times = [], []

    def collate(batch):
        ids, mask = padded([b['input_ids'] for b in batch], batches)
        labels = torch.tensor([b['labels'] for b in batch])
        return dict(input_ids=ids, attention_mask=mask, labels=labels)

    how = dict(train_sampling_strategy='group_by_length') if best and trains else {}
    eval_batch = (256 if args.device.startswith('cuda') else 32) if best else args.batch_size
    how.update(per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=eval_batch)
    how.update(save_strategy='no', logging_strategy='no', report_to=[], disable_tqdm=True)
    how.update(bf16=half, bf16_full_eval=half and best, remove_unused_columns=False)
    how.update(max_steps=last, learning_rate=1e-4, use_cpu=args.device == 'cpu')
    with tempfile.TemporaryDirectory() as place:
        trainer = Trainer(
            model=adapted(args, folder, best),
            args=TrainingArguments(place, **how),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[clock(times, first, last, args.device)],
        )
        if trains:
            trainer.train()
            return [block_of(batches[first:last], times[1] - times[0])], tokens.lengths
        if best:
            rows.sort(key=lambda row: -len(row['input_ids']))
        trainer.predict(rows[::8] if peer == 'default' else rows)  # warm-up
        return [timed(lambda: trainer.predict(rows), batches, args.device)], tokens.lengths
