"""Speed on this machine, side by side with Hugging Face's Trainer + PEFT where they are installed.

    python bench.py --task lora --against hf      examples/s of training, ours and theirs taking turns in one run
    python bench.py --task eval --against hf      examples/s of evaluation
    python bench.py --task gen --against hf --batch_size 1    generative scoring of AG News: texts/s, four classes each; theirs with a model
                                                              per class, --batch_size texts at a time
    python bench.py --task curves --data sms --repeats 3      no speed but accuracy against the number of rows, discriminative and generative

Random weights of GPT-2's shape, real texts (SST-2's but for gen), the same token ids and batch size on both sides. Ours is train_cls.py itself, run as a
user runs it; theirs is Trainer with padding to the longest of the batch. The figure is the median over blocks of 10 steps after a warm-up.
"""
import csv
import json
import math
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
GEN_ROWS, CLASSES = 48, 4       # texts and classes of generative scoring


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
    if args.task in ('eval', 'gen'):
        return (ours_eval if args.task == 'eval' else ours_gen)(args, folder, dtype)
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
    return rates_of(lambda: gpt.class_logits(model, tokens, 128, 'head', device, dtype), len(tokens), 1)


def rates_of(run, n, turns):
    """Texts/s of each of so many calls of run(), which takes n texts, after one call as the warm-up."""
    rates = []
    for _ in range(1 + turns):
        t0 = time.perf_counter()
        run()
        rates.append(n / (time.perf_counter() - t0))
    return rates[1:]


def ours_gen(args, folder, dtype):
    """One base and a LoRA per class, as lora.open_run opens a generative run."""
    import lora
    device, dtype, _ = gpt.pick_device(args.device, dtype)
    tokens = agnews_tokens()
    model = gpt.GPT.load(folder)
    lora.add_lora(model, 8, 16.0, 0.0, lora.TARGETS.split(','), classes=CLASSES, top=args.top)
    gpt.place(model.requires_grad_(False), device, dtype)
    return rates_of(lambda: gpt.text_logprobs(model, tokens, 128, 'head', device, dtype), len(tokens), 2)


def agnews_tokens():
    """-> data.Tokens of the first GEN_ROWS test texts."""
    return data.tokenize(data.tokenizer('gpt2'), data.load('agnews').test.texts[:GEN_ROWS])


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


def hf_gen(args):
    """A whole language model per class, as scripts that do this have it: -> texts/s. Mean losses times counts, the same sums as ours."""
    from transformers import GPT2LMHeadModel
    tokens, device = agnews_tokens(), torch.device(args.device)
    dtype = dict(bf16=torch.bfloat16, fp32=torch.float32)[args.dtype]
    models = [GPT2LMHeadModel.from_pretrained(args.hf_worker).to(device).eval() for _ in range(CLASSES)]
    rows = [[50256, *tokens[i][:128].tolist(), 50256] for i in range(len(tokens))]

    @torch.no_grad()
    def run(rows):
        for at in range(0, len(rows), args.batch_size):
            part = rows[at:at + args.batch_size]
            T = max(map(len, part))
            ids = torch.tensor([r + [50256] * (T - len(r)) for r in part], device=device)
            mask = torch.tensor([[1] * len(r) + [0] * (T - len(r)) for r in part], device=device)
            for model in models:
                with gpt.autocast(device, dtype):
                    if len(part) == 1:
                        out = model(input_ids=ids, labels=ids).loss * (T - 1)
                    else:
                        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
                        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction='none')
                        out = (loss * mask[:, 1:]).sum(1)
                out.cpu()
    run(rows[:max(4, args.batch_size)])                             # the warm-up
    t0 = time.perf_counter()
    run(rows)
    print(json.dumps([len(rows) / (time.perf_counter() - t0)]))


def hf_worker(args):
    if args.task == 'gen':
        return hf_gen(args)
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


# ------------------------------------------------------------------------------------------------------- learning curves

def naive_bayes(ds, enc):
    """Test accuracy of multinomial naive Bayes with add-one smoothing over the same tokens."""
    counts = np.ones((len(ds.labels), enc.n_vocab))                 # (K, V)
    train, test = data.tokenize(enc, ds.train.texts), data.tokenize(enc, ds.test.texts)
    for i, c in enumerate(ds.train.y):
        np.add.at(counts[c], train[i], 1)
    log_p = np.log(counts / counts.sum(1, keepdims=True))
    log_prior = np.log(np.bincount(ds.train.y) / len(ds.train.y))
    pred = np.array([(log_p[:, test[i]].sum(1) + log_prior).argmax() for i in range(len(test))])
    return float((pred == ds.test.y).mean())


def curves(args):
    """Accuracy against the number of labelled rows per class: naive Bayes, discriminative, generative without and with posterior steps, the
    same rows and test rows for all, several seeds. Base model: a small GPT trained here from random weights on the training texts, labels unused."""
    here = os.path.dirname(os.path.abspath(__file__))
    enc = data.tokenizer('gpt2')
    shape = '--scratch --n_layer 2 --n_head 4 --n_embd 128 --block_size 128'.split()
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        test = None                                                 # of SMS carved out by the seed; of AG News 250 of each class, to save time
        if args.data == 'agnews':
            whole, test = data.load(args.data), os.path.join(tmp, 'test.csv')
            keep = np.sort(np.concatenate([np.flatnonzero(whole.test.y == c)[:250] for c in range(len(whole.labels))]))
            with open(test, 'w', encoding='utf-8', newline='') as f:
                csv.writer(f).writerows([('text', 'label')] + [(whole.test.texts[i], whole.labels[whole.test.y[i]]) for i in keep])

        def train(script, name, *flags):
            """-> accuracy on the test rows"""
            out = os.path.join(tmp, name)
            common = ['--data', args.data, '--max_length', '24', '--eval_every', '100000', '--log_every', '1000', '--out', out]
            p = subprocess.run([sys.executable, os.path.join(here, script), *(['--out', out] if '--resume' in flags else common), *flags],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if p.returncode:
                raise UserError(f'{script} {" ".join(flags)} failed: {p.stdout[-500:]}')
            results = os.path.join(out, 'eval_results.json')
            return data.read_json(results)['accuracy'] if os.path.isfile(results) else None

        base = args.base
        for seed in range(args.seed, args.seed + args.repeats):
            if not args.base and (seed == args.seed or not test):               # a base per split: it must not have read the test texts
                base = os.path.join(tmp, f'base-{seed}')
                train('train_gen.py', f'base-{seed}', '--pretrain', *shape, '--batch_size', '32', '--lr', '2e-3', '--seed', str(seed),
                      '--epochs', '2' if test else '3')
            for size, epochs in ((100, 10), (1000, 3), (None, 1 if args.data == 'agnews' else 3)):
                name = f'{size or "all"}-{seed}'
                same = ['--model', base, *(['--test', test] if test else []), '--seed', str(seed), '--lora', '--lr', '3e-3', '--epochs', str(epochs)]
                same += ['--max_samples', str(size)] if size else []
                ds = data.load(args.data, seed, test=test, max_samples=size)
                accuracy = dict(naive_bayes=naive_bayes(ds, enc), discriminative=train('train_cls.py', f'cls-{name}', *same),
                                generative=train('train_gen.py', f'gen-{name}', *same),
                                posterior=train('train_gen.py', f'gen-{name}', '--resume', '--posterior_steps', '100'))
                rows.append(dict(size=size or 'all', rows=len(ds.train.y), seed=seed, **accuracy))
                print(json.dumps(rows[-1]), flush=True)
    for size in (100, 1000, 'all'):
        print(f'{size} rows per class: ' + ', '.join(
            f'{name} {100 * np.mean(x):.2f} +- {100 * 4.303 * np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) == 3 else math.nan:.2f}'
            for name in ('naive_bayes', 'discriminative', 'generative', 'posterior')
            for x in [[r[name] for r in rows if r['size'] == size]]))
    return rows


def main(argv=None):
    p = data.Parser(description=__doc__, prog='bench.py')
    p.add_argument('--task', choices=('lora', 'full', 'last', 'head', 'eval', 'gen', 'curves'), default='lora', help='what to time')
    p.add_argument('--against', choices=('hf',), help='the peer to run beside it: Hugging Face Trainer (+ PEFT for lora and eval), GPT2LMHeadModel for gen')
    p.add_argument('--model', choices=tuple(gpt.HUB_NAMES), default='gpt2', help='shape; the weights are random')
    p.add_argument('--batch_size', type=data.positive, default=16, help='rows per step; of gen: texts at a time on the Hugging Face side')
    p.add_argument('--steps', type=data.positive, default=80, help='training steps per turn')
    p.add_argument('--repeats', type=data.positive, default=2, help='turns that each side takes; of curves: seeds')
    p.add_argument('--data', choices=('agnews', 'sms'), default='agnews', help='of --task curves')
    p.add_argument('--device', default='cpu' if not torch.cuda.is_available() else 'cuda', help='cpu or cuda')
    p.add_argument('--dtype', choices=('bf16', 'fp32'), default='bf16', help='precision of the matrix products')
    p.add_argument('--seed', type=int, default=1, help='of --task curves: the first seed')
    p.add_argument('--base', metavar='DIR', help='of --task curves: this base model, instead of training one')
    p.add_argument('--top', type=data.positive, metavar='M', help='of --task gen: LoRA in the last M blocks alone')
    p.add_argument('--hf_dtype', choices=('bf16', 'fp32'), help='precision of the Hugging Face side, if it is to differ from --dtype')
    p.add_argument('--json', metavar='FILE', help='write the figures there')
    p.add_argument('--hf_worker', metavar='DIR', help='(used by bench.py itself: run the Hugging Face side on this base and print its figures)')
    args, _ = p.parse(argv)
    if args.hf_worker:
        return hf_worker(args)
    if args.task == 'curves':
        rows = curves(args)
        if args.json:
            data.write_json(args.json, rows)
        return
    folder = base_folder(args.model)
    sides = [('nanocls', ours)] + ([('Hugging Face', theirs)] if args.against else [])
    blocks = {name: [] for name, _ in sides}
    for turn in range(args.repeats):                                # taking turns, so that a busy moment of the machine meets both
        for name, measure in sides:
            rates = measure(args, folder, args.dtype if measure is ours else args.hf_dtype or args.dtype)
            blocks[name] += rates if args.task in ('eval', 'gen') else rates[WARM_UP:]
            print(f'turn {turn + 1}, {name}: {statistics.median(rates):.1f} examples/s', flush=True)
    medians = {name: statistics.median(rates) for name, rates in blocks.items()}
    for name, rate in medians.items():
        lo, hi = np.percentile(blocks[name], [25, 75])
        print(f'{name:>14}  {rate:8.1f} examples/s  (middle half of {len(blocks[name])} blocks: {lo:.1f} to {hi:.1f})')
    result = dict(task=args.task, model=args.model, batch_size=args.batch_size, device=args.device, dtype=args.dtype,
                  hf_dtype=args.hf_dtype or args.dtype, torch=torch.__version__, threads=torch.get_num_threads(), examples_per_s=medians)
    if args.against:
        result['ratio'] = medians['nanocls'] / medians['Hugging Face']
        print(f'ratio {result["ratio"]:.2f}')
    if args.json:
        data.write_json(args.json, result)


if __name__ == '__main__':
    data.cli(main)
