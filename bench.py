"""Speed on this machine, side by side with Hugging Face's Trainer + PEFT where they are installed.

    python bench.py --task lora --against hf      examples/s of training, ours and theirs taking turns in one run
    python bench.py --task eval --against hf      examples/s of evaluation

Random weights of GPT-2's shape, real SST-2 texts, the same token ids and batch size on both sides. Ours is train_cls.py itself, run as a
user runs it; theirs is Trainer with padding to the longest of the batch. The figure is the median over blocks of 10 steps after a warm-up.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import data     # first: its excepthook covers the seconds that torch takes to import
import numpy as np
import torch

import model as gpt
from data import UserError

BLOCK = 10              # steps per timed block: short enough to see noise, long enough for the clock
WARM_UP = 2             # blocks left out at the start
ROWS = 1000             # texts of an evaluation


def base_folder(name):
    """A folder with random weights of a published shape, in the files both sides load; made once, kept in the cache."""
    folder = os.path.join(data.cache_dir(), 'bench', name)
    if not os.path.isfile(os.path.join(folder, 'config.json')):
        torch.manual_seed(0)
        os.makedirs(folder, exist_ok=True)
        gpt.save_hf(folder, gpt.GPT(gpt.SHAPES[name]).init_weights())
    return folder


# ------------------------------------------------------------------------------------------------------------------ ours

def ours(args, folder, dtype):
    """-> examples/s of each block."""
    if args.task == 'eval':
        return ours_eval(args, folder, dtype)
    method = dict(lora=['--lora', '--r', '8'], full=['--full'], last=['--last', '1'], head=['--head'])[args.task]
    with tempfile.TemporaryDirectory() as tmp:
        out = os.path.join(tmp, 'run')
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train_cls.py')
        command = [sys.executable, script, '--data', 'sst2', '--model', folder, *method,
                   '--batch_size', str(args.batch_size), '--max_steps', str(args.steps), '--log_every', str(BLOCK), '--eval_every', '1000000',
                   '--device', args.device, '--dtype', dtype, '--out', out]
        stop_before_the_test(command, os.path.join(out, 'log.jsonl'), args.steps)
        with open(os.path.join(out, 'log.jsonl'), encoding='utf-8') as f:
            return [r['examples_per_s'] for r in map(json.loads, f) if 'loss' in r]


def stop_before_the_test(command, log, steps):
    """Run a training script until its log holds the last step; its evaluation and final test are not what is measured."""
    with tempfile.TemporaryFile('w+') as err:
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err)
        while p.poll() is None:
            if os.path.isfile(log) and f'"step": {steps},' in open(log, encoding='utf-8').read():
                p.kill()
                p.wait()
                return
            time.sleep(0.5)
        if p.returncode:
            err.seek(0)
            raise UserError(f'{" ".join(command)} failed: {err.read()[-500:]}')


def ours_eval(args, folder, dtype):
    import lora
    device, dtype, _ = gpt.pick_device(args.device, dtype)
    tokens = sst2_tokens('train')[0]
    model = gpt.GPT.load(folder, num_labels=2, new_head=True)
    lora.adapt(model, 'lora')
    gpt.place(model.requires_grad_(False), device, dtype)          # as lora.open_run does
    rates = []
    for _ in range(2):                                              # the first is the warm-up
        t0 = time.perf_counter()
        gpt.class_logits(model, tokens, 128, 'head', device, dtype)
        rates.append(len(tokens) / (time.perf_counter() - t0))
    return rates[1:]


def sst2_tokens(split):
    """-> (data.Tokens, labels (n,)) of the first ROWS texts of a split."""
    ds = data.load('sst2')
    part = getattr(ds, split)
    return data.tokenize(data.tokenizer('gpt2'), part.texts[:ROWS]), part.y[:ROWS]


# ---------------------------------------------------------------------------------------------------------------- theirs

def theirs(args, folder, dtype):
    """-> examples/s of each block, measured in a process of its own (this file, --hf_worker)."""
    command = [sys.executable, os.path.abspath(__file__), '--task', args.task, '--hf_worker', folder, '--batch_size', str(args.batch_size),
               '--steps', str(args.steps), '--device', args.device, '--dtype', dtype]
    p = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if p.returncode:
        raise UserError(f'the Hugging Face side failed: {p.stderr[-500:]}')
    return json.loads(p.stdout.splitlines()[-1])


def hf_worker(args):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2ForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
    tokens, y = sst2_tokens('train')
    rows = [dict(input_ids=tokens[i].astype(np.int64), labels=int(y[i])) for i in range(len(tokens))]
    model = GPT2ForSequenceClassification.from_pretrained(args.hf_worker, num_labels=2, pad_token_id=50256)
    if args.task in ('lora', 'eval'):
        model = get_peft_model(model, LoraConfig(task_type='SEQ_CLS', r=8, lora_alpha=16, lora_dropout=0.05, fan_in_fan_out=True,
                                                 target_modules=['c_attn', 'attn.c_proj', 'c_fc', 'mlp.c_proj']))
    else:
        open_ = dict(full=[model], last=[model.transformer.h[-1], model.transformer.ln_f, model.score], head=[model.score])[args.task]
        model.requires_grad_(False)
        for m in open_:
            m.requires_grad_(True)

    def collate(batch):                                             # DataCollatorWithPadding, without the tokenizer that is not there
        T = max(len(b['input_ids']) for b in batch)
        ids, mask = torch.full((len(batch), T), 50256), torch.zeros(len(batch), T, dtype=torch.long)
        for i, b in enumerate(batch):
            ids[i, :len(b['input_ids'])], mask[i, :len(b['input_ids'])] = torch.from_numpy(b['input_ids']), 1
        return dict(input_ids=ids, attention_mask=mask, labels=torch.tensor([b['labels'] for b in batch]))

    class Clock(TrainerCallback):
        times = []

        def on_step_end(self, *a, **k):
            self.times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as tmp:
        targs = TrainingArguments(tmp, per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.batch_size, max_steps=args.steps,
                                  bf16=args.dtype == 'bf16', use_cpu=args.device == 'cpu', report_to=[], save_strategy='no', logging_strategy='no',
                                  learning_rate=1e-4, disable_tqdm=True, remove_unused_columns=False)
        trainer = Trainer(model=model, args=targs, train_dataset=rows, eval_dataset=rows, data_collator=collate, callbacks=[Clock()])
        if args.task == 'eval':
            trainer.predict(rows[:200])                             # the warm-up
            t0 = time.perf_counter()
            trainer.predict(rows)
            print(json.dumps([len(rows) / (time.perf_counter() - t0)]))
        else:
            trainer.train()
            t = Clock.times[BLOCK - 1::BLOCK]
            print(json.dumps([0.0] + [BLOCK * args.batch_size / (b - a) for a, b in zip(t, t[1:])]))


def main(argv=None):
    p = data.Parser(description=__doc__, prog='bench.py')
    p.add_argument('--task', choices=('lora', 'full', 'last', 'head', 'eval'), default='lora', help='what to time')
    p.add_argument('--against', choices=('hf',), help='the peer to run beside it: Hugging Face Trainer (+ PEFT for lora and eval)')
    p.add_argument('--model', choices=tuple(gpt.HUB_NAMES), default='gpt2', help='shape; the weights are random')
    p.add_argument('--batch_size', type=data.positive, default=16, help='rows per step')
    p.add_argument('--steps', type=data.positive, default=80, help='training steps per turn')
    p.add_argument('--repeats', type=data.positive, default=2, help='turns that each side takes')
    p.add_argument('--device', default='cpu' if not torch.cuda.is_available() else 'cuda', help='cpu or cuda')
    p.add_argument('--dtype', choices=('bf16', 'fp32'), default='bf16', help='precision of the matrix products on both sides')
    p.add_argument('--json', metavar='FILE', help='write the figures there')
    p.add_argument('--hf_worker', metavar='DIR', help='(used by bench.py itself: run the Hugging Face side on this base and print its figures)')
    args, _ = p.parse(argv)
    if args.hf_worker:
        return hf_worker(args)
    folder = base_folder(args.model)
    sides = [('nanocls', ours)] + ([('Hugging Face', theirs)] if args.against else [])
    blocks = {name: [] for name, _ in sides}
    for turn in range(args.repeats):                                # taking turns, so that a busy moment of the machine meets both
        for name, measure in sides:
            rates = measure(args, folder, args.dtype)
            blocks[name] += rates if args.task == 'eval' else rates[WARM_UP:]
            print(f'turn {turn + 1}, {name}: {statistics.median(rates):.1f} examples/s', flush=True)
    medians = {name: statistics.median(rates) for name, rates in blocks.items()}
    for name, rate in medians.items():
        lo, hi = np.percentile(blocks[name], [25, 75])
        print(f'{name:>14}  {rate:8.1f} examples/s  (middle half of {len(blocks[name])} blocks: {lo:.1f} to {hi:.1f})')
    result = dict(task=args.task, model=args.model, batch_size=args.batch_size, device=args.device, dtype=args.dtype, torch=torch.__version__,
                  threads=torch.get_num_threads(), examples_per_s=medians)
    if args.against:
        result['ratio'] = medians['nanocls'] / medians['Hugging Face']
        print(f'ratio {result["ratio"]:.2f}')
    if args.json:
        data.write_json(args.json, result)


if __name__ == '__main__':
    data.cli(main)
