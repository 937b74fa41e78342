"""Train a generative classifier: one language model per class on top of GPT-2, and Bayes' rule on
exact sequence probabilities.

    log P(class | text) = log P(text | class) + log P(class) - log P(text)

    python train_gen.py --lora --r 8                   SST-2, a LoRA per class (offline: the demo)
    python train_gen.py --data agnews --zero_shot      no training: a prompt per class
    python train_gen.py --class_id 3 --out runs/mine   add a class to a finished run, or retrain one
    python train_gen.py --pretrain --data mine.txt     one language model on all texts, for --model
"""

from lib import start

start.script(__name__)

import gc
import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
from lib import cli, device, files, flags, genflags, genrun, ranks, runs, summary, training
from lib.classes import calibrate
from lib.files import UserError
from lib.graphs import GRAPH_WIDTH, Graphs, check_device
from lib.interrupt import interrupted, interruptible, memory_advice
from lib.metrics import auc, metrics, run_metrics, selection, softmax
from lib.predictions import write_predictions
from lib.prompts import prompts_of
from lib.repeat import several_runs
from lib.report import counted, report
from lib.resume import restore, save_resume
from lib.rundata import shorten
from lib.scoring import ends_here, scored_lengths, text_logprobs
from lib.tokens import tokenize, tokenizer, tokenizer_name

# --- flags ---


def parser():
    p = cli.Parser(prog='train_gen.py', description=__doc__)
    flags.data_flags(p, data.READERS, data.named)
    flags.model_flags(p)
    group = p.add_argument_group('what to train')
    one_of = group.add_mutually_exclusive_group().add_argument
    one_of('--lora', action='store_true', help='low-rank updates of --targets per class (default)')
    one_of('--full', action='store_true', help='a whole model per class')
    text = 'one model for all classes, with a learned vector per class in front of the text'
    one_of('--prefix', action='store_true', help=text)
    text = 'no training: a prompt per class in front of the text, or with --direct behind it'
    one_of('--zero_shot', action='store_true', help=text)
    text = 'one language model on all texts, labels unused; the run is a folder for --model'
    one_of('--pretrain', action='store_true', help=text)
    add = group.add_argument
    text = 'only one class, by name, else by number (0 = first); --out may be a finished run'
    add('--class_id', metavar='K', help=text)
    text = 'JSON object {class: prompt} for --zero_shot (default: built-in prompts)'
    add('--prompts', metavar='FILE', help=text)
    text = 'with --zero_shot: score the words of the class behind the text, contextually calibrated'
    add('--direct', action='store_true', help=text)
    text = 'P(class): by training rows (default), or all equal (default of --zero_shot)'
    add('--prior', choices=('counts', 'uniform'), help=text)
    add = cli.group(p, 'from likelihood to posterior')
    text = 'then N steps on the cross-entropy of P(class | text), all classes together'
    add('--posterior_steps', text, cli.positive)
    text = 'weight of the likelihood (nats per token) in the loss of these steps'
    add('--likelihood_share', text, cli.share, 0.1)
    text = 'peak learning rate of these steps (default: --lr / 3)'
    add('--posterior_lr', text, cli.above_zero)
    flags.lora_flags(p)
    flags.optim_flags(p)
    flags.system_flags(p)
    return p


def parse(argv):
    """-> flags, names of the flags that were typed, state of the run to resume or None"""
    p = parser()
    args, given = p.parse(argv)
    if args.resume:
        return genflags.resume(args, given)
    args.method = p.chosen(args) or 'lora'
    if args.class_id is not None and args.out:
        if os.path.isfile(os.path.join(args.out, 'run.json')):
            genflags.inherit(args, given)
    flags.check_flags(args, given, genflags.needs(args))
    if args.posterior_steps and args.class_id is not None:
        why = '--posterior_steps trains all classes, --class_id one alone'
        raise UserError(f'{why}; give one of them')
    args.prior = args.prior or ('uniform' if args.zero_shot else 'counts')
    if args.direct and args.prior != 'uniform':
        raise UserError('--prior counts does nothing with --direct, which scores P(class | text)')
    return args, given, None


# --- data and phases ---


def load(args, given, resumed):
    """-> run, what all phases share: args, ds, labels, enc, model (the base, for the first phase),
    prompts, prior, log_prior, cfg, train. main adds given, dev, dtype; genrun.begin old, folders,
    phases, info."""

    def get():
        options = data.options(vars(args))
        if args.pretrain:
            texts, val_texts, notes = data.load_texts(args.data, **options)
            splits = [data.Split(t, np.zeros(len(t), np.int64)) for t in (texts, val_texts, [])]
            ds = data.Dataset(args.data, ['text'], *splits, notes)
        else:
            ds = data.load(args.data, **options)
        model = genrun.base_model(args)
        return ds, model, tokenizer(tokenizer_name(model.cfg.vocab_size), args.data_dir)

    with ranks.first_of_machine():
        insist = resumed or args.class_id is not None
        ds, model, enc = flags.or_demo(get, args, given, insist)  # the demo if there is no network
    ds = shorten(ds, vars(args))  # --quick, --eval_samples
    k, prompts = len(ds.labels), None
    counts = np.bincount(ds.train.y, minlength=k)
    prior = counts / counts.sum() if args.prior == 'counts' else np.full(k, 1 / k)
    front = 1 + args.prefix  # positions: <|endoftext|>, and what else is not the text
    if args.zero_shot:
        prompts = prompts_of(args, ds.labels)
        front += max(len(enc.encode_ordinary(text)) for text in prompts.values())
    room = model.cfg.block_size - front
    if room < 1 or args.max_length > room and 'max_length' in given:
        taken = f'{front} of them are taken in front of a text (or behind it)'
        why = f'the model has {model.cfg.block_size} positions, and {taken}'
        raise UserError(f'--max_length {args.max_length} does not fit: {why}')
    args.max_length = min(args.max_length, room)
    shared = dict(args=args, ds=ds, labels=ds.labels, enc=enc, model=model, prompts=prompts)
    shared.update(prior=prior, log_prior=np.log(prior).astype(np.float32))
    return SimpleNamespace(**shared, cfg=model.cfg, train=tokenize(enc, ds.train.texts))


class Phase:
    """One model to train: of a class (kind 'class'), of all classes together ('prefix',
    'posterior'), or of all texts ('pretrain')."""

    def __init__(self, run, kind, label, number):
        args, ds, labels = run.args, run.ds, run.labels
        self.run, self.kind, self.work = run, kind, genrun.claim(run, kind, label)
        self.classes = [label] if kind == 'class' else labels
        self.rows, val_rows = np.arange(len(ds.train.y)), np.arange(len(ds.val.y))
        if kind == 'class':  # its validation rows, and as many of the other classes
            k = labels.index(label)
            self.rows = np.flatnonzero(ds.train.y == k)
            own, other = np.flatnonzero(ds.val.y == k), np.flatnonzero(ds.val.y != k)
            other = np.random.RandomState(args.split_seed % 2**32).permutation(other)[: len(own)]
            val_rows = np.concatenate((own, other))
            self.own = ds.val.y[val_rows] == k
        self.val = tokenize(run.enc, [ds.val.texts[i] for i in val_rows], cache=False)
        self.lengths = np.minimum(run.train.lengths[self.rows], args.max_length)  # (N,) tokens read
        scored = scored_lengths(run.cfg.vocab_size - 1, run.train, args.max_length)
        self.n_scored = scored[self.rows]  # (N,) tokens with their <|endoftext|>
        share = len(self.rows) / len(run.train)
        steps, epochs, lr = max(1, round(args.max_steps * share)), args.epochs, args.lr
        if kind == 'posterior':
            steps, epochs, lr = args.posterior_steps, None, args.posterior_lr or args.lr / 3
        self.plan = training.Plan(args, self.lengths, data.batches, steps, epochs, lr)
        names = dict(pretrain='all texts', prefix='all classes')
        names.update(posterior='the posterior of all classes')
        self.name = names.get(kind, label)
        self.log_prior = torch.from_numpy(run.log_prior).to(run.dev)
        self.model, self.original, facts = genrun.build(run, kind)  # original: weights as loaded
        title = f'\n{self.name} ({number} of {len(run.phases)}): {counted(len(self.rows), "row")}'
        hint = '' if kind == 'posterior' else self.plan.hint(run.given)
        print(f'{title}, {self.plan}{hint}, lr {self.plan.lr:g}', *facts, sep='\n', flush=True)
        if kind == 'class' and len(self.val):
            self.base_logprobs = self.val_logprobs()  # before its first step a class is the base

    def batch_of(self, index):
        """Rows index (B,) of this phase -> arguments of loss_of."""
        run, rows, args = self.run, self.rows[index], self.run.args
        end, width = self.model.end, GRAPH_WIDTH if args.cuda_graphs else 1
        ids, n = data.collate(run.train, rows, args.max_length, args.keep, end, run.dev, width)
        ends = ends_here(end, run.train, rows, args.max_length)  # edit it there: scores need it too
        rest = (ends, torch.from_numpy(run.ds.train.y[rows]))
        return ids, n, *(data.to_device(t, run.dev) for t in rest)

    def loss_of(self, ids, n, ends, y):
        """Sum of a batch's losses: -log P(text | its class), or the cross-entropy of the posterior
        mixed with --likelihood_share of the likelihood (hybrid loss of GeDi, arXiv 2009.06367).
        ids (B, T), n (B,) tokens, ends (B,): scored with <|endoftext|>, y (B,) classes."""
        with device.autocast(self.run.dev, self.run.dtype):
            alone = y if self.kind == 'prefix' else None
            logprobs = self.net(ids, n, ends, y=alone)  # (B,), of the posterior (B, K)
        if self.kind != 'posterior':
            return -logprobs.sum()
        own = logprobs.gather(1, y[:, None]).squeeze(1) / (n + ends)  # (B,) nats per token
        share = self.run.args.likelihood_share
        posterior = F.cross_entropy(logprobs + self.log_prior, y, reduction='sum')
        return (1 - share) * posterior - share * own.sum()

    def weight_of(self, rows):
        """What the loss of a step is divided by: its tokens, of the posterior its rows."""
        return len(rows) if self.kind == 'posterior' else int(self.n_scored[rows].sum())

    def val_logprobs(self):
        """log P of every validation text (n, 1), or (n, K) of a model with classes."""
        run = self.run
        settings = run.args.max_length, run.args.keep, run.dev, run.dtype
        return text_logprobs(self.model, self.val, *settings, progress=True)

    def log(self, done):
        """The log of this phase, after `done` steps."""
        texts = [self.run.ds.train.texts[i] for i in self.rows]
        fields = {} if self.kind == 'pretrain' else {'class': self.name}
        return training.Log(self.work, self.plan, texts, done, fields)

    def evaluate(self, step):
        """-> score, larger is better, and numbers for the log. A class alone is judged by how well
        log P(text | class) - log P(text) of the base model tells its texts from the others.
        Likelihood alone stops too early: every class forgets texts in general, which cancels in
        Bayes' rule."""
        if not len(self.val):
            return (step,), {}  # the last weights
        logprobs, y, labels = self.val_logprobs(), self.run.ds.val.y, self.run.labels
        if self.kind in ('prefix', 'posterior'):
            m = metrics(softmax(logprobs + self.run.log_prior), y, labels)
            results = dict(val_loss=m['nll'], val_accuracy=m['accuracy'])
            return selection(m, self.run.args.select), {**results, 'val_macro_f1': m['macro_f1']}
        own = self.own if self.kind == 'class' else np.full(len(self.val), True)
        n = scored_lengths(self.model.end, self.val, self.run.args.max_length)
        loss = -float(logprobs[own].sum() / n[own].sum())
        results = dict(val_loss=loss, val_nats_per_text=-float(logprobs[own].mean()))
        if own.all():
            return (-loss,), results
        results['val_auc'] = auc((logprobs - self.base_logprobs)[:, 0], own)
        return (results['val_auc'], -loss), results


def train_phase(run, kind, label, number, resumed):
    """Train one model; resumed: its state, if it was interrupted. -> exit code if interrupted"""
    args, dev, phase = run.args, run.dev, Phase(run, kind, label, number)
    model, plan, lengths = phase.model, phase.plan, phase.lengths
    phase.net = ranks.wrap(model.train())
    opt = training.make_optimizer(model, plan.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(dev.type, enabled=run.dtype == torch.float16)
    state = model, opt, scaler  # in resume.pt; add what has a state_dict(), such as schedulers
    graphs = Graphs(phase.loss_of, model, scaler) if args.cuda_graphs else None
    done, best = restore(resumed, *state) if resumed else (0, None)  # steps, score
    log = phase.log(done)
    if not done:
        save_resume(phase.work, args, 0, None, *state)  # from here on it can be resumed

    def evaluate(step, best):  # saves the weights if they are the best -> best score
        with interrupt.evaluation():
            score, results = phase.evaluate(step)
        log.write(step=step, **results)
        if best is None or (*score, -step) > best:
            best = *score, -step
            genrun.save_weights(run, phase, dict(step=step, **results))
        save_resume(phase.work, args, step, best, *state)
        log.restart()
        return best

    # --- loop ---
    with memory_advice(args), interruptible() as interrupt:
        if resumed and resumed['due']:
            best = evaluate(done, best)
        for step, rows in plan.steps(opt, interrupt, done):
            if log.out_of_patience(done, best):
                break
            parts, factor = plan.parts(rows)
            scale, loss = factor / phase.weight_of(rows), 0.0
            for part in parts:
                batch = phase.batch_of(part)
                if graphs:
                    part_loss = graphs(torch.full((), scale, device=dev), *batch)
                else:
                    with ranks.sync_gradients(phase.net, last=part is parts[-1]):
                        part_loss = phase.loss_of(*batch) * scale
                        scaler.scale(part_loss).backward()
                loss = loss + part_loss.detach()  # a tensor: reading it would wait for the GPU
                log.count(lengths[part].sum(), batch[0].numel())
            scaler.unscale_(opt)
            norm = training.clip_grad_norm_(opt.param_groups, args.clip)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad(set_to_none=not graphs)
            done = step
            log.add(step, loss, None if scaler.is_enabled() else norm, len(rows))
            if plan.evaluates(step):
                best = evaluate(step, best)
        log.check_finite(done)
    # --- loop ---

    if ranks.any_rank(interrupt.requested):
        save_resume(phase.work, args, done, best, *state, due=interrupt.evaluating)
        return interrupted(__file__, args.out, done, plan.max_steps)
    genrun.finish_phase(run, phase, best or evaluate(done, best))  # None: an edit left early


def finish(run):
    """Calibration on the validation rows, then the final test, on what was saved, opened as
    predict.py opens it."""
    args, ds, labels, info = run.args, run.ds, run.labels, run.info
    genrun.complete(run)
    opened = runs.open_run(args.out, args.device, args.dtype, args.data_dir, args.plain)
    val = tokenize(run.enc, ds.val.texts, cache=False)
    logits, y = opened.logits_of(val, progress=True), ds.val.y  # (N, K), (N,)
    info.update(calibrate(opened, logits, y))
    opened.decide_by(info)
    m, probs = run_metrics(opened, logits, y, labels)
    if not args.direct:
        nats = opened.nats_per_token(val, logits)
        info['likelihood_quantiles'] = np.quantile(nats, np.linspace(0, 1, 101)).tolist()
    info['results'] = dict(val_accuracy=m['accuracy'], val_loss=m['nll'])
    if opened.rule == 'calibrated':
        info['results']['val_loss_uncalibrated'] = m['uncalibrated']['nll']
    files.write_json(os.path.join(args.out, 'run.json'), info)
    write_predictions(args.out, probs, y, labels)

    test = opened.logits(ds.test.texts, progress=True, cache=True)
    results = run_metrics(opened, test, ds.test.y, labels)[0]
    files.write_json(os.path.join(args.out, 'eval_results.json'), results)
    rows = counted(len(ds.test.y), 'row')
    print(f'\nvalidation accuracy {m["accuracy"]:.4f}; test ({args.data}, {rows}):')
    print(report(results, labels))
    label = None if args.direct else labels[0]
    print(f'\n{summary.suggestions(args.out, ds.test.texts[0], label)}')
    return dict(out=args.out, val=info['results'], test=results)


def main(argv=None):
    """-> dict(out, val, test), without a test dict(out); an exit code if interrupted"""
    args, given, resumed = parse(argv)
    if args.seeds > 1:
        return several_runs(main, args, given, argv)
    check_device(args)  # before data are read
    genrun.recover(args.out)
    run = load(args, given, resumed)
    dev, dtype, reason = device.pick_device(args.device, args.dtype)  # or the demo's
    run.given, run.dev, run.dtype = given, dev, dtype
    genrun.begin(run, resumed)
    print('\n'.join(summary.describe(args, run.ds, run.train, run.cfg, (dev, dtype, reason))))
    print(f'{args.method}{summary.flags(args, given - {"data", "model", args.method})}', flush=True)
    for number, (kind, label) in enumerate(run.phases, 1):
        state = resumed if genrun.was_interrupted(run, resumed, kind, label) else None
        if code := train_phase(run, kind, label, number, state):
            return code
        gc.collect()  # frees this model before the next one is loaded
    if args.pretrain:
        best = run.best[0] if len(run.ds.val.y) else None
        print(f'\n{summary.pretrained(args, best)}')
        return dict(out=args.out)
    if missing := ranks.from_rank_zero(lambda: genrun.missing(run)):
        how = 'train each with --class_id, or all with --resume'
        print(f'\nsaved in {args.out}; it lacks the classes {", ".join(missing)}: {how}')
        return dict(out=args.out)
    run.model = resumed = state = None
    gc.collect()
    return finish(run)


if __name__ == '__main__':
    cli.run(ranks.under_torchrun(main))
