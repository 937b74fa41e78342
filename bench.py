"""Speed and memory on this machine, side by side with Hugging Face's Trainer + PEFT where they are installed.

    python bench.py --task lora --against hf        training: also full, last (one block), head, adapter
    python bench.py --task head --against hf        head and last: from the second epoch on, of a subset that is read several times
    python bench.py --task eval --against hf        evaluation of a LoRA model
    python bench.py --task gen --against hf         generative scoring of AG News, four classes a text; --top 4: LoRA in the last four blocks
    python bench.py --task predict --against hf     predict.py on a file, from opening the run to the last line written
    python bench.py --task startup --against hf     seconds from the command line to one answer, and those that importing torch takes
    python bench.py --task lora --length 128 --model gpt2-medium --steps 4 --against hf       peak memory: all texts of 128 tokens
    python bench.py --task curves --data sms --repeats 3       no speed but accuracy against the number of rows, discriminative and generative

Random weights of GPT-2's shape, real texts (SST-2's but for gen), the same token ids, rows and batch size on both sides. Ours is the scripts
themselves. --hf names the peers: `default` is TrainingArguments' own settings (float32, GPT-2's dropout 0.1, padding to the longest of a random
batch), `half` the same with --bf16, `best` what can be had from them by flags (--dtype, dropout as ours, batches of like length; evaluation on
weights in half precision). Of gen they are a float32 model per class fed one text at a time, one in --dtype fed eight, and one fed eight of like
length. Of predict a loop over batches of 16 in the file's order, the same in --dtype, and of like length. Of startup `default` is PEFT over the
base, the others the merged model without PEFT; all are spared the tokenizer.

The sides take turns, each in a process of its own. Figures are medians over blocks of steps after a warm-up; memory is the process's peak (of a
file that is mapped the pages that were read count, too), on CUDA that of PyTorch's allocator. GFLOP/s counts what the real tokens need (`flops`),
its share is of what matrix products reach here in --dtype, measured in the same run.
"""
import contextlib
import csv
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import data     # first: its excepthook covers the seconds that torch takes to import
import numpy as np
import torch

import lora
import model as gpt
import predict
import train_cls
from data import UserError

STEPS = data.WINDOW     # training steps of a timed block: so many batches are sorted by length at a time, and padding is that of a long run. Trainer
                        # sorts 50 at a time, longest first: any 50 steps see all lengths
WARM_UP = 50            # steps of Trainer before them
EPOCHS = 5              # of our training; the first is its warm-up: there the frozen blocks run, kernels are made for each new shape, and memory grows
ROWS = dict(eval=3000, gen=96, predict=4000)        # texts, unless --rows says otherwise
CLASSES = 4             # of gen
METHODS = dict(lora=['--lora', '--r', '8'], full=['--full'], last=['--last', '1'], head=['--head'], adapter=['--adapter'])
DTYPES = dict(bf16=torch.bfloat16, fp32=torch.float32)
HERE = os.path.dirname(os.path.abspath(__file__))
PEERS = ('default', 'half', 'best')
TEXT = 'a gorgeous, witty film'


def base_folder(name):
    """A folder with random weights of a published shape, in the files both sides load; made once, kept in the cache. All matrices are cut from
    one array of random numbers, so that no more memory is needed than the largest takes."""
    folder = os.path.join(data.cache_dir(), 'bench', name)
    if not os.path.isfile(os.path.join(folder, 'config.json')):
        with torch.device('meta'):
            model = gpt.GPT(gpt.SHAPES[name])
        shapes = {n: p.shape for n, p in model.named_parameters()}
        spare = 10_000                                              # numbers by which the cuts can differ
        noise = torch.randn(max(s.numel() for s in shapes.values()) + spare, generator=torch.Generator().manual_seed(0)).mul_(0.02)
        state = {}
        for i, (n, shape) in enumerate(shapes.items()):
            fill = torch.zeros if n.endswith('bias') else torch.ones if 'ln_' in n else None
            at = 997 * i % spare
            state[n] = fill(shape) if fill else noise[at:at + shape.numel()].view(shape)
        os.makedirs(folder, exist_ok=True)
        gpt.save_hf(folder, model, state=state)
    return folder


# --------------------------------------------------------------------------------------------------------------- measures

def flops(task, cfg, lengths, top=None):
    """Arithmetic that texts of so many tokens need -> number of floating-point operations.

    Forward 2 per weight of a block (12 C^2) and token, and 4 C for each pair of a token and one it attends to, itself included. A classifier
    reads the last token only: its last block needs keys and values of all, query, projection and MLP of one. Backward through a block costs
    the forward again for the gradient of the activations, and again for that of the weights; that of attention's products is twice the
    forward. So per weight: head, eval, predict 2, lora and adapter 4, full 6, last 2 and in the last block 6. gen: <|endoftext|> in front,
    all tokens and the one behind scored, with the vocabulary projection 2 C V each; CLASSES times, of the blocks below the last `top` once.
    Not counted: embeddings, LayerNorm, the class head, what LoRA and adapters add, and that nothing below the first update needs a gradient.
    Of head and last it is what training without a cache of the frozen blocks needs."""
    n, C, L = np.asarray(lengths, np.float64), cfg.n_embd, cfg.n_layer
    if task == 'gen':
        n = n + 1
        block = 24 * C**2 * n + 2 * C * n * (n + 1)
        own = min(top or L, L)                                      # blocks that every class has for itself
        return float((block * (L - own + own * CLASSES) + 2 * C * cfg.vocab_size * n * CLASSES).sum())
    weights, attention = 24 * C**2 * n, 2 * C * n * (n + 1)         # of a whole block; 1 + ... + n pairs, 4 C each
    last_weights, last_attention = 4 * C**2 * n + 20 * C**2, 4 * C * n
    times, lasts = dict(lora=(2, 2), adapter=(2, 2), full=(3, 3), last=(1, 3)).get(task, (1, 1))
    pairs = {1: 1, 2: 3, 3: 3}                                      # attention has no weights: its backward is whole or not there
    return float(((L - 1) * (times * weights + pairs[times] * attention) + lasts * last_weights + pairs[lasts] * last_attention).sum())


def synchronize(device):
    """Wait until a GPU has done what it was given, so that the clock sees it."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def matmul_rate(device, dtype, size=None):
    """GFLOP/s of square matrix products: the median of some, after two as the warm-up."""
    size = size or (8192 if torch.device(device).type == 'cuda' else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(9):
        synchronize(device)
        t0 = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - t0)
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e9


def peak_memory(device):
    """MiB that this process has held at most; on CUDA of the GPU's memory."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError), open('/proc/self/status') as f:
        found = re.search(r'VmHWM:\s*(\d+) kB', f.read())           # not ru_maxrss, in which Linux counts the process that started this one
        if found:
            return int(found[1]) / 2**10
    import resource                                                 # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def block_of(fed, seconds):
    """Batches [(rows, real tokens, with pads)] and the seconds they took -> the speeds of a block, named as in log.jsonl."""
    rows, real, padded = (sum(column) for column in zip(*fed))
    return dict(examples_per_s=rows / seconds, tokens_per_s=real / seconds, pad_share=1 - real / padded)


def timed(run, fed, device):
    """run(), whose batches enter themselves in the list `fed` -> its block."""
    fed.clear()
    synchronize(device)
    t0 = time.perf_counter()
    run()
    synchronize(device)
    return block_of(fed, time.perf_counter() - t0)


# ------------------------------------------------------------------------------------------------------------------ texts

def rows_flags(args):
    """The flags by which train_cls.py reads as many rows as --steps steps take, so that an epoch is a block: its lengths are those of any other."""
    if args.length:
        return ['--data', os.path.join(args.at, 'texts.csv'), '--max_length', str(args.length)]
    return ['--data', 'sst2', '--max_samples', str(per_class(args))]


def per_class(args):
    """The --max_samples of that: SST-2 has two classes."""
    return math.ceil(args.steps * args.batch_size / 2)


def training_rows(args, max_samples=None):
    """-> data.Split of the training rows."""
    return (data.load(os.path.join(args.at, 'texts.csv')) if args.length else data.load('sst2', max_samples=max_samples)).train


def texts_of(args):
    """-> (texts, labels (n,)) of evaluation and prediction."""
    ds = data.load(os.path.join(args.at, 'texts.csv') if args.length else 'sst2')
    split = ds.test if args.split == 'validation' else ds.train     # SST-2's validation split serves as the test here
    return split.texts[:args.rows], split.y[:args.rows]


def tokens_of(texts, max_length):
    """-> data.Tokens, cut."""
    tokens = data.tokenize(data.tokenizer('gpt2'), texts)
    rows = [tokens[i][:max_length] for i in range(len(tokens))]
    return data.Tokens(np.concatenate(rows), np.cumsum([0] + [len(r) for r in rows]))


def write_rows(path, texts, labels):
    """A .csv with texts and labels."""
    with open(path, 'w', encoding='utf-8', newline='') as f:
        csv.writer(f).writerows([('text', 'label'), *zip(texts, labels)])


def texts_of_length(n, count):
    """So many different texts of exactly n tokens, cut from SST-2's joined ones."""
    enc = data.tokenizer('gpt2')
    flat = data.tokenize(enc, [' '.join(' '.join(data.load('sst2').train.texts).split())]).flat
    texts, at = {}, 0
    while len(texts) < count and at + n <= len(flat):
        text = ' '.join(enc.decode(flat[at:at + n].tolist(), errors='replace').split())
        fits = len(enc.encode_ordinary(text)) == n                  # a word that is cut can come back as other tokens
        if fits:
            texts[text] = True
        at += n if fits else 1
    if len(texts) < count:
        raise UserError(f'--length {n}: SST-2 gives only {len(texts)} of the {count} texts that are needed; lower it, or --batch_size or --rows')
    return list(texts)


# ------------------------------------------------------------------------------------------------------------------- ours

class Done(Exception):
    """The last step that is measured has been logged."""


def ours(args, folder):
    """-> what a worker prints (see worker)."""
    device, dtype, _ = gpt.pick_device(args.device, args.dtype)
    if args.task in METHODS:
        return ours_train(args, folder)
    fed, collate = [], data.collate

    def counting(*a, **k):
        ids, n = collate(*a, **k)
        fed.append((len(ids), int(n.sum()), ids.numel()))
        return ids, n
    data.collate = counting
    try:
        if args.task == 'predict':
            command = [os.path.join(args.at, 'run'), '--file', os.path.join(args.at, 'texts.txt'), '--out', os.path.join(args.at, 'answers'),
                       '--device', args.device, '--dtype', args.dtype]
            return [timed(lambda: predict.main(command), fed, device)], tokens_of(texts_of(args)[0], 128).lengths
        if args.task == 'gen':                                      # one base and a LoRA per class, as lora.open_run opens a generative run
            texts, score = agnews_texts(args), gpt.text_logprobs
            model = gpt.GPT.load(folder)
            lora.add_lora(model, 8, 16.0, 0.0, lora.TARGETS.split(','), classes=CLASSES, top=args.top)
        else:
            texts, score = texts_of(args)[0], gpt.class_logits
            model = gpt.GPT.load(folder, num_labels=2, new_head=True)
            lora.adapt(model, 'lora')
        gpt.place(model.requires_grad_(False), device, dtype)
        tokens = tokens_of(texts, args.length or 128)
        score(model, tokens, 1024, 'head', device, dtype)           # the warm-up
        return [timed(lambda: score(model, tokens, 1024, 'head', device, dtype), fed, device)], tokens.lengths
    finally:
        data.collate = collate


def ours_train(args, folder):
    """train_cls.py until its last step is logged: the evaluation and the final test after it are not what is measured. The first epoch is left out,
    any other is a block."""
    train = training_rows(args, per_class(args))
    epoch = math.ceil(len(train.y) / args.batch_size)
    steps, blocks, log = epoch * EPOCHS, [], gpt.Log

    class Watched(log):
        def __call__(self, *a, **record):
            super().__call__(*a, **record)
            if 'loss' in record:
                blocks.append(record)
                if record['step'] == steps:
                    raise Done
    gpt.Log = Watched
    try:
        with tempfile.TemporaryDirectory() as tmp:
            train_cls.main([*rows_flags(args), '--model', folder, *METHODS[args.task], '--batch_size', str(args.batch_size),
                            '--max_steps', str(steps), '--log_every', str(epoch), '--eval_every', '1000000', '--device', args.device,
                            '--dtype', args.dtype, *args.extra.split(), '--out', os.path.join(tmp, 'run')])
        raise UserError(f'train_cls.py ended without logging step {steps}')
    except Done:
        pass
    finally:
        gpt.Log = log
    blocks = [{k: r[k] for k in ('examples_per_s', 'tokens_per_s', 'pad_share')} for r in blocks if r['step'] > epoch]
    return blocks, tokens_of(train.texts, args.length or 128).lengths


def agnews_texts(args):
    """The first test texts."""
    return data.load('agnews').test.texts[:args.rows]


# ----------------------------------------------------------------------------------------------------------------- theirs

def precision(args, peer):
    """Name of the precision of a peer's matrix products."""
    return args.hf_dtype or ('fp32' if peer == 'default' else args.dtype)


def padded(rows, fed, device='cpu'):
    """Lists of ids -> ids and attention mask (B, T), padded to the longest as DataCollatorWithPadding does, and entered in `fed`."""
    T = max(map(len, rows))
    ids, mask = torch.full((len(rows), T), 50256), torch.zeros(len(rows), T, dtype=torch.long)
    for i, r in enumerate(rows):
        ids[i, :len(r)], mask[i, :len(r)] = torch.as_tensor(r), 1
    fed.append((len(rows), int(mask.sum()), mask.numel()))
    return ids.to(device), mask.to(device)


def in_parts(rows, size, by_length):
    """Yields so many rows at a time, in their order or by length."""
    order = sorted(rows, key=len, reverse=True) if by_length else rows
    for at in range(0, len(order), size):
        yield order[at:at + size]


def theirs(args, folder, peer):
    """-> what a worker prints (see worker) for a peer."""
    if args.task == 'gen':
        return theirs_gen(args, folder, peer)
    if args.task == 'predict':
        return theirs_predict(args, peer)
    return theirs_trainer(args, folder, peer)


@torch.no_grad()
def theirs_gen(args, folder, peer):
    """A whole language model per class, as scripts that do this have it. default: the model's own mean loss times the tokens, a text at a time;
    half: eight; best: eight, by length; the same sums as ours."""
    from transformers import GPT2LMHeadModel
    tokens, fed = tokens_of(agnews_texts(args), 128), []
    models = [GPT2LMHeadModel.from_pretrained(folder, dtype=DTYPES[precision(args, peer)]).to(args.device).eval() for _ in range(CLASSES)]
    rows = [[50256, *tokens[i].tolist(), 50256] for i in range(len(tokens))]

    def run(rows):
        for part in in_parts(rows, 1 if peer == 'default' else 8, peer == 'best'):
            ids, mask = padded(part, fed, args.device)
            for model in models:
                if peer == 'default':
                    out = model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
                else:
                    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
                    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction='none')
                    out = (loss * mask[:, 1:]).sum(1)
                out.cpu()
    run(rows[:8])                                                   # the warm-up
    return [timed(lambda: run(rows), fed, args.device)], tokens.lengths


@torch.no_grad()
def theirs_predict(args, peer):
    """The run, merged and exported for transformers, loaded and run over the file, 16 texts at a time; best: by length, weights in half
    precision. The ids are tiktoken's, as ours."""
    from transformers import GPT2ForSequenceClassification
    fed, found = [], []

    def run():
        model = GPT2ForSequenceClassification.from_pretrained(os.path.join(args.at, 'exported'), dtype=DTYPES[precision(args, peer)])
        model.to(args.device).eval()
        with open(os.path.join(args.at, 'texts.txt'), encoding='utf-8') as f:
            tokens = tokens_of(f.read().splitlines(), 128)
        for part in in_parts([tokens[i].tolist() for i in range(len(tokens))], 16, peer == 'best'):
            ids, mask = padded(part, fed, args.device)
            found.extend(model(input_ids=ids, attention_mask=mask).logits.float().softmax(-1).tolist())
        data.write_json(os.path.join(args.at, 'answers'), found)
    return [timed(run, fed, args.device)], tokens_of(texts_of(args)[0], 128).lengths


def theirs_trainer(args, folder, peer):
    """Training and evaluation by Trainer, LoRA by PEFT."""
    from transformers import GPT2ForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
    best, half = peer == 'best', precision(args, peer) == 'bf16'
    train = training_rows(args) if args.task in METHODS else None     # all: the more rows, the better they can be grouped by length
    texts, y = (train.texts, train.y) if train else texts_of(args)
    tokens = tokens_of(texts, args.length or 128)
    rows = [dict(input_ids=tokens[i].astype(np.int64), labels=int(y[i])) for i in range(len(tokens))]
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if best else {}
    model = GPT2ForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=50256, **dropout)
    if args.task in ('lora', 'eval'):
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(task_type='SEQ_CLS', r=8, lora_alpha=16, lora_dropout=0.05, fan_in_fan_out=True,
                                                 target_modules=['c_attn', 'attn.c_proj', 'c_fc', 'mlp.c_proj']))
    else:
        open_ = dict(full=[model], last=[model.transformer.h[-1], model.transformer.ln_f, model.score], head=[model.score])[args.task]
        model.requires_grad_(False)
        for m in open_:
            m.requires_grad_(True)
    first = min(WARM_UP, args.steps // 2)                           # of head and last, too: nothing of theirs is kept for the next epoch
    fed, times = [], []

    def collate(batch):
        ids, mask = padded([b['input_ids'] for b in batch], fed)
        return dict(input_ids=ids, attention_mask=mask, labels=torch.tensor([b['labels'] for b in batch]))

    class Clock(TrainerCallback):
        def on_train_begin(self, *a, **k):
            if not first:
                times.append(time.perf_counter())

        def on_step_end(self, _, state, *a, **k):
            if state.global_step in (first, first + args.steps):
                synchronize(args.device)
                times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as tmp:
        targs = TrainingArguments(tmp, per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=eval_batch(args, best),
                                  max_steps=first + args.steps, bf16=half, bf16_full_eval=half and best, use_cpu=args.device == 'cpu', report_to=[],
                                  save_strategy='no', logging_strategy='no', learning_rate=1e-4, disable_tqdm=True, remove_unused_columns=False,
                                  **(dict(train_sampling_strategy='group_by_length') if best and args.task != 'eval' else {}))
        trainer = Trainer(model=model, args=targs, train_dataset=rows, data_collator=collate, callbacks=[Clock()])
        if args.task == 'eval':
            if best:
                rows.sort(key=lambda row: -len(row['input_ids']))
            trainer.predict(rows[::8] if peer == 'default' else rows)       # the warm-up
            return [timed(lambda: trainer.predict(rows), fed, args.device)], tokens.lengths
        trainer.train()
    return [block_of(fed[first:first + args.steps], times[1] - times[0])], tokens.lengths


def eval_batch(args, best):
    """Texts at a time of Trainer's evaluation."""
    return (256 if args.device.startswith('cuda') else 32) if best else args.batch_size


# ------------------------------------------------------------------------------------------------------------------ turns

def worker(args):
    """One turn of a side, in the process that main starts for it; prints a line of JSON: the blocks' speeds, the peak of memory in MiB, and the
    arithmetic that a token needs, on average over the texts."""
    folder = base_folder(args.model)
    blocks, lengths = ours(args, folder) if args.worker == 'nanocls' else theirs(args, folder, args.worker)
    memory = peak_memory(args.device)
    per_token = flops(args.task, gpt.SHAPES[args.model], lengths, args.top) / float(lengths.sum())
    print(json.dumps(dict(blocks=blocks, memory=memory, flops_per_token=per_token)))


def checked(command, what):
    """What a command prints. UserError if it fails."""
    p = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if p.returncode:
        raise UserError(f'{what} failed: {" ".join(p.stderr.split())[-500:]}')
    return p.stdout


def prepare(args, folder):
    """Put what the sides share into the folder args.at: texts.csv of --length, a run and a file of texts for predict and startup."""
    if args.length:
        few = args.steps if args.task in ('head', 'last') else min(args.steps, 4)       # texts of one length: any epoch is like a longer one
        rows = args.rows or args.batch_size * few
        n = max(rows, 20)
        while n - 2 * (n // 10) < rows:                             # what is left when a tenth each became validation and test rows
            n += 1
        texts = texts_of_length(args.length, n)
        write_rows(os.path.join(args.at, 'texts.csv'), texts, ['negative', 'positive'] * (n // 2) + ['negative'] * (n % 2))
    if args.task in ('predict', 'startup'):
        run, few = os.path.join(args.at, 'run'), os.path.join(args.at, 'few.csv')
        ds = data.load('sst2', max_samples=20)
        write_rows(few, ds.train.texts, [ds.labels[c] for c in ds.train.y])
        checked([sys.executable, os.path.join(HERE, 'train_cls.py'), '--data', few, '--model', folder, '--lora', '--max_steps', '1',
                 '--device', args.device, '--dtype', args.dtype, '--out', run], 'training a run')
        if args.against:
            checked([sys.executable, os.path.join(HERE, 'predict.py'), run, '--export', os.path.join(args.at, 'exported')], 'exporting the run')
    if args.task == 'predict':
        with open(os.path.join(args.at, 'texts.txt'), 'w', encoding='utf-8') as f:
            f.writelines(' '.join(text.split()) + '\n' for text in texts_of(args)[0])


ANSWER = """import json, sys
import torch
from transformers import GPT2ForSequenceClassification
folder, adapter, device, dtype, ids = sys.argv[1:]
model = GPT2ForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=50256, dtype=getattr(torch, dtype))
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
with torch.no_grad():
    print(model.to(device).eval()(torch.tensor([json.loads(ids)], device=device)).logits.softmax(-1).tolist())
"""


def startup(args, folder, side):
    """Wall seconds of a fresh process that answers one text -> the same as a worker's."""
    run = os.path.join(args.at, 'run')
    if side == 'nanocls':
        command = [sys.executable, os.path.join(HERE, 'predict.py'), run, TEXT, '--device', args.device, '--dtype', args.dtype]
    elif side == 'floor':
        command = [sys.executable, '-c', 'import torch, numpy']
    else:
        merged = side != 'default'
        dtype = str(DTYPES[precision(args, side)])[6:]
        ids = data.tokenizer('gpt2').encode_ordinary(TEXT)
        command = [sys.executable, '-c', ANSWER, os.path.join(args.at, 'exported') if merged else folder, '' if merged else run, args.device, dtype,
                   json.dumps(ids)]
    t0 = time.perf_counter()
    checked(command, side)
    return dict(blocks=[dict(seconds=time.perf_counter() - t0)])


def row_of(turns, rate):
    """What the turns of a side found -> its figures: medians over all blocks, the middle half of the speed, the largest peak of memory."""
    blocks = [b for t in turns for b in t['blocks']]
    row = {name: statistics.median(b[name] for b in blocks) for name in blocks[0]}
    main = next(iter(row))                                          # examples_per_s, or seconds
    row.update(middle_half=np.percentile([b[main] for b in blocks], [25, 75]).tolist(), blocks=len(blocks))
    if 'memory' in turns[0]:
        row['memory_mib'] = max(t['memory'] for t in turns)
        row['gflops'] = row['tokens_per_s'] * turns[0]['flops_per_token'] / 1e9
        row['share_of_matmul'] = row['gflops'] / rate
    return row


def line_of(side, row):
    """A row for the terminal."""
    middle = f'(middle half of {row["blocks"]}: {row["middle_half"][0]:.4g} to {row["middle_half"][1]:.4g})'
    if 'seconds' in row:
        return f'{side:>22}  {row["seconds"]:.2f} s  {middle}'
    return (f'{side:>22}  {row["examples_per_s"]:8.1f} examples/s  {middle}  {row["tokens_per_s"]:.0f} tokens/s  '
            f'padding {100 * row["pad_share"]:.1f} %  {row["memory_mib"]:.0f} MiB  '
            f'{row["gflops"]:.1f} GFLOP/s = {100 * row["share_of_matmul"]:.0f} %')


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
    enc = data.tokenizer('gpt2')
    shape = '--scratch --n_layer 2 --n_head 4 --n_embd 128 --block_size 128'.split()
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        test = None                                                 # of SMS carved out by the seed; of AG News 250 of each class, to save time
        if args.data == 'agnews':
            whole, test = data.load(args.data), os.path.join(tmp, 'test.csv')
            keep = np.sort(np.concatenate([np.flatnonzero(whole.test.y == c)[:250] for c in range(len(whole.labels))]))
            write_rows(test, [whole.test.texts[i] for i in keep], [whole.labels[whole.test.y[i]] for i in keep])

        def train(script, name, *flags):
            """-> accuracy on the test rows"""
            out = os.path.join(tmp, name)
            common = ['--data', args.data, '--max_length', '24', '--eval_every', '100000', '--log_every', '1000', '--out', out]
            p = subprocess.run([sys.executable, os.path.join(HERE, script), *(['--out', out] if '--resume' in flags else common), *flags],
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
    p.add_argument('--task', choices=(*METHODS, 'eval', 'gen', 'startup', 'predict', 'curves'), default='lora', help='what to time')
    p.add_argument('--against', choices=('hf',), help='run the peers beside it: transformers, with PEFT for lora and eval')
    p.add_argument('--hf', nargs='+', choices=PEERS, default=list(PEERS), help='which peers, with --against hf: float32 as Trainer comes, the same '
                   'in --dtype, and with all settings that make it fast')
    p.add_argument('--model', choices=tuple(gpt.HUB_NAMES), default='gpt2', help='shape; the weights are random')
    p.add_argument('--batch_size', type=data.positive, default=16, help='rows per training step, and of the default peer\'s evaluation')
    p.add_argument('--steps', type=data.positive, default=STEPS, help='training steps of a block; few are enough for the peak of memory')
    p.add_argument('--repeats', type=data.positive, default=2, help='turns that each side takes; of curves: seeds')
    p.add_argument('--rows', type=data.positive, help=f'texts of {", ".join(ROWS)}; {", ".join(map(str, ROWS.values()))} without it')
    p.add_argument('--split', choices=('train', 'validation'), default='train', help='of eval and predict: which texts of SST-2')
    p.add_argument('--length', type=data.positive, metavar='N', help='of training and eval: texts of exactly N tokens')
    p.add_argument('--data', choices=('agnews', 'sms'), default='agnews', help='of --task curves')
    p.add_argument('--device', default='cpu' if not torch.cuda.is_available() else 'cuda', help='cpu or cuda')
    p.add_argument('--dtype', choices=tuple(DTYPES), default='bf16', help='precision of the matrix products')
    p.add_argument('--seed', type=int, default=1, help='of --task curves: the first seed')
    p.add_argument('--base', metavar='DIR', help='of --task curves: this base model, instead of training one')
    p.add_argument('--top', type=data.positive, metavar='M', help='of --task gen: LoRA in the last M blocks alone')
    p.add_argument('--extra', default='', metavar='FLAGS', help='of training: more flags of train_cls.py, --extra=--cuda_graphs')
    p.add_argument('--hf_dtype', choices=tuple(DTYPES), help='precision of all peers; without it float32 of default, and --dtype of the others')
    p.add_argument('--json', metavar='FILE', help='write the figures there')
    p.add_argument('--worker', metavar='SIDE', help='(used by bench.py itself: take one turn of this side and print its figures)')
    p.add_argument('--at', metavar='DIR', help='(used by bench.py itself: what the sides share)')
    argv = list(sys.argv[1:] if argv is None else argv)
    args, given = p.parse(argv)
    if args.task == 'curves':
        rows = curves(args)
        if args.json:
            data.write_json(args.json, rows)
        return
    if args.length and args.task not in (*METHODS, 'eval'):
        raise UserError(f'--length does nothing with --task {args.task}')
    if args.length and args.length > gpt.SHAPES[args.model].block_size:
        raise UserError(f'--length {args.length} does not fit: the model has {gpt.SHAPES[args.model].block_size} positions')
    if args.rows and args.task not in ROWS:
        raise UserError(f'--rows does nothing with --task {args.task}' + ('; --steps sets how many are read' if args.task in METHODS else ''))
    args.rows = args.rows or ROWS.get(args.task)
    if args.worker:
        return worker(args)

    folder = base_folder(args.model)
    peers = list(dict.fromkeys(args.hf)) if args.against else []
    if peers and args.task == 'adapter':
        print('PEFT has no Houlsby adapters: there is no peer')
        peers = []
    sides = ['nanocls', *peers, *(['floor'] if args.task == 'startup' else [])]
    names = {'nanocls': 'nanocls', 'floor': 'import torch, numpy', **{peer: f'Hugging Face {peer}' for peer in peers}}
    turns, rates = {side: [] for side in sides}, []
    with tempfile.TemporaryDirectory() as args.at:
        prepare(args, folder)
        if args.task == 'startup':                                  # the files come from the disk the first time
            for side in sides:
                startup(args, folder, side)
        for turn in range(args.repeats):                            # taking turns, so that a busy moment of the machine meets all
            rates.append(matmul_rate(args.device, DTYPES[args.dtype]))
            for side in sides:
                if args.task == 'startup':
                    turns[side].append(startup(args, folder, side))
                else:
                    out = checked([sys.executable, os.path.abspath(__file__), *argv, '--worker', side, '--at', args.at], names[side])
                    turns[side].append(json.loads(out.splitlines()[-1]))
                print(f'turn {turn + 1}, {line_of(names[side], row_of(turns[side][-1:], rates[-1])).strip()}', flush=True)
    rate = statistics.median(rates)
    rows = {names[side]: row_of(turns[side], rate) for side in sides}
    print(f'\n{args.task}, {args.model}, {args.device}, {args.dtype}; matrix products reach {rate:.0f} GFLOP/s')
    print('\n'.join(line_of(name, row) for name, row in rows.items()))
    result = dict(task=args.task, model=args.model, batch_size=args.batch_size, length=args.length, device=args.device, dtype=args.dtype,
                  hf_dtype={peer: precision(args, peer) for peer in peers}, torch=torch.__version__, threads=torch.get_num_threads(),
                  matmul_gflops=rate, rows=rows, ratio={}, memory_ratio={})
    for peer in peers:                                              # how many times as fast, and as much memory
        theirs_, mine = rows[names[peer]], rows['nanocls']
        # of tokens, since in training the sides meet other texts of the same set
        result['ratio'][peer] = mine['tokens_per_s'] / theirs_['tokens_per_s'] if 'seconds' not in mine else theirs_['seconds'] / mine['seconds']
        print(f'against {peer}: {result["ratio"][peer]:.2f} times as fast', end='\n' if 'seconds' in mine else '')
        if 'seconds' not in mine:
            result['memory_ratio'][peer] = mine['memory_mib'] / theirs_['memory_mib']
            print(f', {result["memory_ratio"][peer]:.2f} times the memory')
    if args.json:
        data.write_json(args.json, result)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *a: sys.exit(143))         # an exception, at which subprocess.run ends the worker, too
    data.cli(main)
