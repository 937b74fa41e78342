"""Loss curves beside transformers and peft: `python test_all.py --parity SHAPE [STEPS]`."""

import contextlib
import csv
import io
import os
import random
import re
import time

import numpy as np
import torch

import data
import lib.device
import lora
from lib.device import place
from lib.files import read_json
from lib.flags import LR
from lib.tensors import load_safetensors
from lib.tokens import tokenizer
from model import GPT, SHAPES
from tests.helpers import generate, hugging_face, patched, real_data, records, save_hf, tmp, train


def curve_rows(cfg):
    """A folder with train.csv, val.csv and test.csv of two equal classes: random letters for the
    bytes, SST-2's texts for GPT-2's own vocabulary."""
    if cfg.vocab_size == 257:  # labels that nothing tells, so that the loss stays up
        rng = random.Random(0)
        texts = [
            ''.join(rng.choice('etaoin shrdlu') for _ in range(rng.randint(2, 40)))
            for i in range(106)
        ]
        rows = [(f'{text} {i}', 'ab'[i % 2]) for i, text in enumerate(texts)]
    else:
        real_data('sst2')
        ds = data.load('sst2', max_samples=128)
        negative, positive = (
            [(text, ds.labels[c]) for text, y in zip(ds.train.texts, ds.train.y) if y == c]
            for c in range(2)
        )
        rows = [row for pair in zip(negative, positive) for row in pair]
    folder = tmp()
    for name, part in (('train', rows[:-16]), ('val', rows[-16:-8]), ('test', rows[-8:])):
        with open(os.path.join(folder, name + '.csv'), 'w', newline='', encoding='utf-8') as f:
            csv.writer(f).writerows([('text', 'label'), *part])
    return folder


def curve_base(cfg):
    """A folder with a base model initialised like GPT-2, but without vectors of zeros or ones, and
    with matrices that do as much as at width 768."""
    g, model, folder = torch.Generator().manual_seed(0), GPT(cfg), tmp()
    with torch.no_grad():
        for name, p in model.init_weights(g).named_parameters():
            if p.dim() == 1:
                p.add_(torch.empty_like(p).normal_(0, 0.1, generator=g))
            elif name.startswith('h.'):
                p.mul_((768 / cfg.n_embd) ** 0.5)
    save_hf(folder, model)
    return folder


def our_curve(kind, method, rows, base, rate, steps, batch_size, max_length):
    """Run the script. -> its loss and learning rate in every step, the initial values of what
    trains, the file with the final ones"""
    begun = {}

    def catch(model, *where, real=place, **k):
        if not begun:
            begun.update({n: p.detach().clone() for n, p in lora.trainables(model).items()})
        return real(model, *where, **k)

    argv = ['--data', rows, '--model', base, f'--{method}', '--lr', rate]
    argv += ['--max_length', max_length, '--batch_size', batch_size, '--eval_every', 10 * steps]
    argv += '--seed 7 --weight_decay 0.1 --warmup 0.2 --device cpu --dtype fp32'.split()
    argv += ['--log_every', '1']
    argv += ['--dropout', '0'] if method == 'lora' else []
    with patched(lib.device, 'place', catch):
        if kind == 'cls':
            out = saved = train(*argv, '--max_steps', steps)[0]
        else:  # two equal classes share the steps
            out = generate(*argv, '--max_steps', 2 * steps, '--class_id', '0')[0]
            saved = os.path.join(out, read_json(os.path.join(out, 'run.json'))['labels'][0])
    log = [r for r in records(out) if 'loss' in r]
    file = 'adapter_model.safetensors' if method == 'lora' else 'model.safetensors'
    return [r['loss'] for r in log], [r['lr'] for r in log], begun, os.path.join(saved, file)


def their_curve(kind, method, rows, base, rate, steps, batch_size, max_length, begun):
    """The same run written with transformers, peft and torch, from the same head and the same A. ->
    losses, rates, {name in the file: tensor} before and after"""
    import transformers
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    transformers.logging.set_verbosity_error()  # not that the head is new
    zero = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    with contextlib.redirect_stderr(io.StringIO()):
        if kind == 'cls':
            model = transformers.GPT2ForSequenceClassification.from_pretrained(
                base, num_labels=2, **zero
            )
        else:
            model = transformers.GPT2LMHeadModel.from_pretrained(base, **zero)
        end = model.config.pad_token_id = model.config.vocab_size - 1
        if method == 'lora':
            model = get_peft_model(
                model,
                LoraConfig(
                    task_type='SEQ_CLS' if kind == 'cls' else 'CAUSAL_LM',
                    r=8,
                    lora_alpha=16,
                    lora_dropout=0.0,
                    fan_in_fan_out=True,
                    target_modules=['c_attn', 'attn.c_proj', 'c_fc', 'mlp.c_proj'],
                ),
            )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(begun)
    assert sum(p.numel() for p in trained.values()) == sum(p.numel() for p in begun.values())
    with torch.no_grad():  # what is drawn at random
        for n, p in trained.items():
            if 'lora_A' in n:
                p.copy_(begun[re.sub(r'.*transformer\.(.*)\.lora_A.*', r'\1.A', n)])
            elif 'score' in n:
                p.copy_(begun['score.weight'])

    def state():
        tensors = (
            get_peft_model_state_dict(model, save_embedding_layers=False)
            if method == 'lora'
            else dict(model.named_parameters())
        )
        return {n: t.detach().clone() for n, t in tensors.items()}

    before = state()
    plain = [n for n in trained if n.endswith('bias') or '.ln_' in n or '.wte' in n or '.wpe' in n]
    opt = torch.optim.AdamW(
        [
            dict(params=[p for n, p in trained.items() if n not in plain], weight_decay=0.1),
            dict(params=[trained[n] for n in plain], weight_decay=0.0),
        ],
        lr=rate,
    )
    warm = -(-steps // 5)  # a fifth, rounded up
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: (s + 1) / warm if s < warm else (steps - s) / (steps - warm)
    )

    enc, ds = tokenizer('bytes' if end == 256 else 'gpt2'), data.load(rows)
    mine = [i for i, c in enumerate(ds.train.y) if kind == 'cls' or c == 0]
    whole = [enc.encode_ordinary(ds.train.texts[i]) for i in mine]
    ids = [text[:max_length] for text in whole]
    lengths = [len(text) for text in ids]
    if kind == 'gen':  # <|endoftext|> in front, and behind a text that was not cut
        ids = [[end, *text] + [end] * (len(text) == len(uncut)) for text, uncut in zip(ids, whole)]
    plan = [
        batch for epoch in range(steps) for batch in data.batches(lengths, batch_size, 7, epoch)
    ][:steps]
    losses, rates = [], []
    model.train()
    for batch in plan:
        T = max(len(ids[i]) for i in batch)
        x = torch.tensor([ids[i] + [end] * (T - len(ids[i])) for i in batch])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (T - len(ids[i])) for i in batch])
        labels = (
            torch.tensor([ds.train.y[mine[i]] for i in batch])
            if kind == 'cls'
            else x.masked_fill(mask == 0, -100)
        )
        loss = model(input_ids=x, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        losses, rates = losses + [loss.item()], rates + schedule.get_last_lr()[:1]
        opt.step()
        schedule.step()
        opt.zero_grad()
    return losses, rates, before, state()


def curve_differences(kind, method, cfg, rate, steps=50, batch_size=8, max_length=32):
    """-> the largest relative difference between our run and theirs: of the losses, of the rates,
    of how each tensor moved; our losses"""
    hugging_face('LoraConfig')  # or a visible skip
    same = kind, method, curve_rows(cfg), curve_base(cfg), rate, steps, batch_size, max_length
    losses, rates, begun, path = our_curve(*same)
    their_losses, their_rates, before, after = their_curve(*same, begun)
    ours, ways = load_safetensors(path), []
    assert len(losses) == len(their_losses) == steps and ours.keys() == after.keys()
    for n in after:
        a, b, start = ours[n], after[n], before[n]
        if n.endswith('c_attn.bias'):
            # what all keys have in common drops out of the softmax: its gradient is rounding
            # alone, from which AdamW makes steps of full size
            keys = torch.arange(len(a)) // cfg.n_embd == 1
            a, b, start = a[~keys], b[~keys], start[~keys]
        ways.append(float((a - b).norm() / (b - start).norm()))
    pairs = (losses, their_losses), (rates, their_rates)
    loss, lr = (float(np.max(np.abs(np.divide(a, b) - 1))) for a, b in pairs)
    return loss, lr, max(ways), losses


def print_curves(name='gpt2', steps=50):
    """`--parity`: those two tests on a published shape with random weights, at the rates that are
    the defaults."""
    for kind in ('cls', 'gen'):
        for method in ('full', 'lora'):
            t = time.time()
            same = kind, method, SHAPES[name], LR[method], steps, 4, 64
            loss, lr, way, losses = curve_differences(*same)
            print(f'train_{kind}.py --{method}, {name}, {steps} steps, ', end='')
            print(
                f'loss {losses[0]:.4f} .. {losses[-1]:.4f}; largest relative difference: ', end=''
            )
            print(f'loss {loss:.1e}, rate {lr:.1e}, way of a tensor {way:.1e}; ', end='')
            print(f'{time.time() - t:.0f} s', flush=True)


def main(words):
    """`python test_all.py --parity [SHAPE [STEPS]]` -> exit code"""
    print_curves(*words[:1], *map(int, words[1:]))
    return 0
