"""What surrounds the training loop: the plan of its steps, optimizer and clipping, the log. Called
by both train scripts, which spell out the loop itself, bench.py and lib/genrun.py."""

import bisect
import hashlib
import json
import math
import os
import random
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from lib import files, ranks
from lib.files import UserError
from lib.progress import clock, columns, fitting
from lib.report import counted
from lib.tokens import piece_starts


class Plan:
    """The steps of a run: which rows each takes, at what learning rate, and when to evaluate.

    lengths (N,): tokens of every training text.  batches(lengths, size, seed, epoch, tokens): the
    rows of each step of an epoch (data.batches).  epochs: if given, instead of max_steps."""

    def __init__(self, args, lengths, batches, max_steps, epochs, lr):
        if getattr(args, 'pool', '') == 'pad':  # all texts are padded to it
            lengths = np.full_like(lengths, args.max_length)
        self.args, self.lengths, self.batches, self.lr = args, lengths, batches, lr
        self.tokens, self.cached = args.batch_tokens, (None, [])  # epoch, rows of its steps
        self.ends = [0]  # steps up to the end of each epoch that was looked at
        self.epoch_steps, self.max_steps = len(self.epoch(0)), max_steps
        if epochs:  # they may differ in length
            before = sum(len(self.epoch(i)) for i in range(int(epochs)))
            self.max_steps = before + math.ceil(epochs % 1 * len(self.epoch(int(epochs))))
        self.eval_every = args.eval_every or max(1, math.ceil(self.max_steps / 4))

    def __str__(self):
        epochs, size = self.max_steps / self.epoch_steps, self.args.grad_accum
        epochs = f'{epochs:.2f}' if epochs < 1 else f'{epochs:.1f}'
        rows = f'at most {counted(self.tokens * size, "token")}' if self.tokens else ''
        rows = rows or counted(self.args.batch_size * size, 'row')
        return f'{counted(self.max_steps, "step")} of {rows} = {epochs} epochs'

    def hint(self, given):
        """The flag for a whole epoch, where the default of --max_steps is shorter. given: names of
        the flags that were typed."""
        shorter = self.max_steps < self.epoch_steps and not given & {'max_steps', 'epochs'}
        return ' (--epochs 1 would read every row once)' if shorter else ''

    def epoch(self, number):
        """Rows of each step of an epoch; 0 is the first."""
        if self.cached[0] != number:
            size = self.args.grad_accum * (1 if self.tokens else self.args.batch_size)
            rows = self.batches(self.lengths, size, self.args.seed, number, self.tokens)
            self.cached = number, rows
        return self.cached[1]

    def rows(self, step):
        """Training rows of a step; 1 is the first."""
        while self.ends[-1] < step:
            self.ends.append(self.ends[-1] + len(self.epoch(len(self.ends) - 1)))
        epoch = bisect.bisect_left(self.ends, step) - 1
        return self.epoch(epoch)[step - 1 - self.ends[epoch]]

    def parts(self, rows):
        """Rows of a step -> this rank's, in --grad_accum parts of like length, and the factor of
        their loss (ranks.rank_part)."""
        rows = rows[np.argsort(self.lengths[rows])]
        starts = piece_starts(self.lengths[rows], self.tokens) if self.tokens else [0]
        shares = [ranks.rank_part(piece) for piece in np.split(rows, starts[1:])]
        shares = [share for share in shares if share[1]] or shares[:1]
        own, factor = shares[0]
        self.idle = not factor  # no row of this step is this rank's
        if self.tokens:
            return [rows for rows, _ in shares], factor
        return np.array_split(own, min(self.args.grad_accum, len(own))), factor

    def steps(self, opt, interrupt, done):
        """Yield (step, rows) from step done + 1 to the last, or until a rank is interrupted. Seeds
        dropout, and sets the learning rate of each group of parameters in proportion to its first
        one, until a scheduler of torch.optim or the script itself does that."""
        ratios, told = {}, False  # ratios: by group, one may be added later
        for step in range(done, self.max_steps):
            if ranks.any_rank(interrupt.requested):
                return
            rate = lr_at(step, self.max_steps, self.lr, self.args.warmup, self.args.schedule)
            for i, group in enumerate(opt.param_groups):
                own = group['lr'] != group.get('planned', group['lr'])  # the loop sets it
                if 'initial_lr' not in group and not own:
                    ratio = ratios.setdefault(i, group['lr'] / self.lr)
                    group['planned'] = group['lr'] = ratio * rate
                elif not told and ranks.rank() == 0:
                    text = 'note: the script sets the rate, --warmup and --schedule do nothing'
                    print(text, file=sys.stderr)
                    told = True
            self.rate = max(group['lr'] for group in opt.param_groups)  # for the log
            seed_step(self.args.seed, step)
            yield step + 1, self.rows(step + 1)

    def evaluates(self, step):
        """Is the model evaluated after this step?"""
        return step % self.eval_every == 0 or step == self.max_steps


def lr_at(step, max_steps, lr, warmup, schedule):
    """Learning rate of a step, 0 is the first: linear warm-up over the fraction `warmup` of the
    steps, then linear or cosine to 0, or constant."""
    n = math.ceil(warmup * max_steps)
    if step < n:
        return lr * (step + 1) / n
    x = (step - n) / max(1, max_steps - n)  # 0 .. 1
    cosine = 0.5 * (1 + math.cos(math.pi * x))
    return lr * {'linear': 1 - x, 'cosine': cosine, 'constant': 1.0}[schedule]


def seed_step(seed, step):
    """Make random numbers a pure function of seed, step and rank, so that a resumed run continues
    as if it had never stopped."""
    digest = hashlib.sha256(f'{seed} {step} {ranks.rank()}'.encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], 'little'))
    np.random.seed(int.from_bytes(digest[:4], 'little'))  # which an edit may use, or Python's
    random.seed(digest)


def make_optimizer(model, lr, weight_decay):
    """AdamW over what trains, fused where possible. Biases, LayerNorm, embeddings and prompt
    vectors are not decayed."""
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    embeddings |= {model.prompt}
    train = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in train if p.dim() >= 2 and p not in embeddings]
    rest = [p for p in train if p.dim() < 2 or p in embeddings]
    pairs = ((decay, weight_decay), (rest, 0.0))
    groups = [dict(params=params, weight_decay=wd) for params, wd in pairs if params]
    fused = train[0].device.type in ('cuda', 'cpu')
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def clip_grad_norm_(groups, max_norm):
    """torch.nn.utils.clip_grad_norm_ (Pascanu et al. 2013, arXiv 1211.5063) over all groups of an
    optimizer, 0 = off -> the norm (). On a CPU by dot products, in two thirds of the time, and it
    skips the scaling when it is not needed (on a GPU that test would synchronize)."""
    params = [p for group in groups for p in group['params'] if p.grad is not None]
    max_norm, grads = max_norm or math.inf, [p.grad for p in params]
    if any(g.device.type != 'cpu' for g in grads):
        return nn.utils.clip_grad_norm_(params, max_norm)
    norm = torch.stack([g.dot(g) for g in map(torch.flatten, grads)]).sum().sqrt()
    if not norm <= max_norm:  # also for NaN, which spreads as in torch
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
    return norm


def wrap_blocks(model, args):
    """--gradient_checkpointing: a block keeps no activations and computes them again in backward.
    --compile: blocks run compiled."""
    for block in model.h:
        if args.gradient_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if args.compile:
            block.compile(dynamic=True)


# --- the log ---


class Log:
    """log.jsonl of a run, and what the terminal shows of it: a line that is rewritten on a
    terminal, plain lines in a pipe. The loop calls count() for each part, add() for each step.

    texts: those that the rows of the plan stand for.  done: steps of a resumed run; later lines are
    dropped.  extra: fields of every line.  device: of .hits (), to which a loop may add the
    number of texts that it classified right; the log sets it back."""

    def __init__(self, out, plan, texts, done=0, extra=None, device=None):
        self.path, self.plan, self.texts = os.path.join(out, 'log.jsonl'), plan, texts
        self.extra, rows = extra or {}, files.log_rows(self.path) if done else []
        self.hits = device and torch.zeros((), dtype=torch.int64, device=device)
        # without the line of --patience: out_of_patience() writes it again
        kept = [row for row in rows if row['step'] <= done and 'stopped' not in row]
        files.write_atomic(self.path, ''.join(json.dumps(row) + '\n' for row in kept))
        self.validated = [row['step'] for row in kept if 'val_loss' in row]
        self.restart()

    def restart(self):
        """Start counting and the clock anew: the speeds are those of training alone."""
        self.losses, self.rows, self.real, self.padded, self.right = [], 0, 0, 0, 0
        if self.hits is not None:
            self.hits.zero_()
        self.since = time.perf_counter()

    def count(self, real, padded):
        """Add a part's tokens, without and with padding."""
        self.real, self.padded = self.real + int(real), self.padded + padded

    def add(self, step, loss, norm, rows):
        """Add a step: its loss () of this rank, its gradient's norm () or None, its number of rows.
        Writes a line every --log_every steps and before an evaluation."""
        loss = loss / ranks.world_size()
        self.losses.append(loss if norm is None else loss + 0.0 * norm)  # finite if both are
        self.rows += rows
        if self.hits is not None:
            self.right = self.right if self.plan.idle else self.right + self.hits
            self.hits.zero_()
        if step % self.plan.args.log_every == 0 or self.plan.evaluates(step):
            loss, seconds = self.check_finite(step), time.perf_counter() - self.since
            totals = torch.tensor([self.real, self.padded, int(self.right)])
            real, padded, right = ranks.all_reduce(totals).tolist()
            record = dict(step=step, loss=loss, lr=self.plan.rate)
            record.update(examples_per_s=self.rows / seconds, tokens_per_s=real / seconds)
            record.update(pad_share=1 - real / padded)
            record.update({} if self.hits is None else dict(train_accuracy=right / self.rows))
            self.write(seconds / len(self.losses), **record)
            self.restart()

    def out_of_patience(self, done, best):
        """--patience: did the last N evaluations bring no better score? best: its last number is
        minus the step of the best one."""
        n = self.plan.args.patience
        if not n or not best or sum(step > -best[-1] for step in self.validated) < n:
            return False
        self.write(step=done, stopped=f'no better score in {n} validations (--patience {n})')
        return True

    def check_finite(self, step):
        """Mean loss since the last line, summed over the ranks. Raises UserError if one is not
        finite, with texts of its step: a single one can be the cause."""
        if not self.losses:
            return None
        values = ranks.all_reduce(torch.stack(self.losses).detach().cpu().double()).tolist()
        for bad, value in enumerate(values, step - len(values) + 1):
            if not math.isfinite(value):
                rows = np.sort(self.plan.rows(bad))
                shown = [json.dumps(self.texts[i][:60], ensure_ascii=False) for i in rows[:3]]
                shown += [f'{len(rows) - 3} more'] if len(rows) > 3 else []
                where = f'at step {bad}, whose texts are {", ".join(shown)}: look at them'
                why = f'the loss or its gradient is not finite ({value}) {where}'
                advice = f'try a smaller --lr than {self.plan.lr:g} or --dtype fp32, in another'
                raise UserError(f'{why}, or {advice} --out: --resume would take the same steps')
        return sum(values) / len(values)

    def write(self, seconds_per_step=0.0, **record):
        """Write and show one line."""
        record = json.loads(files.as_json(record))
        self.validated += [record['step']] * ('val_loss' in record)
        try:
            with open(self.path if files.WRITES else os.devnull, 'a', encoding='utf-8') as f:
                f.write(json.dumps({**record, **self.extra}) + '\n')
        except OSError as e:
            raise files.cannot_write(self.path, e) from None
        step, width = record['step'], columns(sys.stdout)
        parts = [f'step {step}/{self.plan.max_steps}']
        if 'pad_share' in record:  # of add()
            line = 'loss {loss:.4f}|lr {lr:.1e}|{examples_per_s:.1f} examples/s|'
            line += '{tokens_per_s:.0f} tokens/s|padding {padding:.1f} %'
            parts += line.format(padding=100 * record['pad_share'], **record).split('|')
            parts += [f'{clock((self.plan.max_steps - step) * seconds_per_step)} left']
            text = fitting(parts, width, spare=(5, 4, 2, 3))
        else:
            shown = [(k, f'{v:.4f}' if type(v) is float else v) for k, v in record.items()]
            text = '  '.join(parts + [f'{k} {v}' for k, v in shown if k != 'step'])
        end = '' if width and 'pad_share' in record else '\n'
        print(('\r\033[K' if width else '') + text, end=end, flush=True)
