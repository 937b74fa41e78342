"""Train a discriminative classifier: GPT-2 reads the text, and a linear head reads GPT-2's state at
the last token (or --pool).

    python train_cls.py --lora --r 8                    SST-2, LoRA (without a network: the demo)
    python train_cls.py --data mine.csv --last 2        your own texts, the last two blocks
    python train_cls.py --data sms --scratch --full     random weights, everything trains
"""

from lib import start

start.script(__name__)

import gc
import os

import numpy as np
import torch
import torch.nn.functional as F

import data
import lora
from lib import cli, device, fast, files, flags, frozen, ranks, runfolder, runs, summary, training
from lib.base import build_model
from lib.files import UserError
from lib.graphs import GRAPH_WIDTH, Graphs, check_device
from lib.init import inherit, start_from
from lib.interrupt import interrupted, interruptible, memory_advice
from lib.metrics import metrics, run_metrics, selection, softmax
from lib.predictions import unlike_saved, write_predictions
from lib.repeat import several_runs
from lib.report import counted, report
from lib.resume import load_resume, restore, save_resume
from lib.rundata import shorten
from lib.scoring import class_logits
from lib.tokens import tokenize, tokenizer, tokenizer_name


def parse(argv):
    """-> flags, names of the flags that were typed, resume.pt of the run to resume or None"""
    p = cli.Parser(prog='train_cls.py', description=__doc__)
    flags.data_flags(p, data.READERS, data.named)
    add = flags.model_flags(p)
    text = 'continue from a finished run, including its head, on new --data'
    add('--init', text, cli.absolute, metavar='RUN')
    group = p.add_argument_group('what to train')
    one_of = group.add_mutually_exclusive_group().add_argument
    text = 'low-rank updates of --targets, and the head (default)'
    one_of('--lora', action='store_true', help=text)
    one_of('--head', action='store_true', help='only the linear head')
    text = 'the last K blocks, the last LayerNorm and the head'
    one_of('--last', type=cli.positive, metavar='K', help=text)
    one_of('--full', action='store_true', help='everything')
    text = 'Houlsby bottlenecks after each attention and MLP, and the head'
    one_of('--adapter', action='store_true', help=text)
    text = 'N learned vectors in front of the text, and the head'
    one_of('--prompt', type=cli.positive, metavar='N', help=text)
    add = group.add_argument
    text = 'hidden units of an adapter'
    add('--bottleneck', type=cli.positive, default=64, metavar='N', help=text)
    text = 'state the head reads: the last token, the first (it has seen itself alone), the mean '
    text += 'of all, or pad all to --max_length and read the last pad '
    text += '(slow, worse: docs/editing.md)'
    add('--pool', choices=flags.POOLS, default='last', help=text)
    flags.lora_flags(p)
    add = flags.optim_flags(p)
    text = 'balanced: a class weighs rows / (classes x its rows)'
    add('--class_weights', text, ('none', 'balanced'), 'none')
    flags.system_flags(p)
    flags.fold_flags(p)
    args, given = p.parse(argv)
    if args.resume:
        resumed = load_resume(args.out)
        return flags.resumed(args, given, resumed['args']), set(), resumed
    args.method = p.chosen(args) or 'lora'
    if args.init:
        inherit(args, given)
    needs = dict(bottleneck=('--adapter', args.adapter))
    needs['gradient_checkpointing'] = ('blocks that train', not args.head)
    flags.check_flags(args, given, needs)
    return args, given, None


def load(args, given, resumed):
    """-> data set, base model with a fresh head, Tokens of the training and validation texts"""

    def get():
        ds = data.load(args.data, **data.options(vars(args)))
        model = build_model(args, len(ds.labels))
        return ds, model, tokenizer(tokenizer_name(model.cfg.vocab_size), args.data_dir)

    with ranks.first_of_machine():
        ds, model, enc = flags.or_demo(get, args, given, resumed)  # the demo if there is no network
    ds = shorten(ds, vars(args))  # --quick, --eval_samples, --fold
    room = model.cfg.block_size - (args.prompt or 0)
    if args.max_length > room and 'max_length' in given:
        taken = f', and --prompt takes {args.prompt} of them' if args.prompt else ''
        positions = f'the model has {model.cfg.block_size} positions{taken}'
        raise UserError(f'--max_length {args.max_length} does not fit: {positions}')
    args.max_length = max(1, min(args.max_length, room))  # lora.add_prompt checks --prompt
    if args.trunk_dropout:
        model.set_dropout(args.trunk_dropout)
    model.pooling, model.pad_to = args.pool, args.max_length
    return ds, model, tokenize(enc, ds.train.texts), tokenize(enc, ds.val.texts)


def main(argv=None):
    args, given, resumed = parse(argv)
    if args.seeds > 1 or args.folds and args.fold is None:
        return several_runs(main, args, given, argv)
    check_device(args)  # before data are read
    ds, model, train, val = load(args, given, resumed)
    dev, dtype, reason = device.pick_device(args.device, args.dtype)  # or the demo's

    # --- what trains ---
    original = model.state_dict()  # float32: frozen weights are saved as they were read
    wrapped = lora.adapt(model, args.method, **flags.of_adapt(args))
    start_from(model, args, ds)
    info = runfolder.begin(args, ds, model, original, resumed)
    facts = lora.describe(model, wrapped) + runfolder.notes(model, args.method, args.pool)
    device.place(model, dev, dtype)
    if not args.plain:  # the same numbers up to rounding, only faster: you may delete this
        fast.speed_up(model, dev, dtype)
    training.wrap_blocks(model, args)  # --gradient_checkpointing, --compile
    net = ranks.wrap(model.train())

    # --- the steps ---
    lengths = np.minimum(train.lengths, args.max_length)  # (N,) tokens that are read
    plan = training.Plan(args, lengths, data.batches, args.max_steps, args.epochs, args.lr)
    opt = training.make_optimizer(model, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(dev.type, enabled=dtype == torch.float16)
    state = model, opt, scaler  # in resume.pt; add what has a state_dict(), such as schedulers
    settings = args.max_length, args.keep, dev, dtype  # for lib/scoring.py
    counts, balanced = np.bincount(ds.train.y), args.class_weights == 'balanced'
    weights = len(ds.train.y) / (len(counts) * counts) if balanced else np.ones(len(counts))  # (K,)
    class_weights = torch.tensor(weights).float().to(dev)
    print('\n'.join(summary.describe(args, ds, train, model.cfg, (dev, dtype, reason)) + facts))
    changed = given - {'lr', 'data', 'model', 'max_steps', 'epochs', *flags.METHODS['cls']}
    print(f'{plan}{plan.hint(given)}, lr {args.lr:g}{summary.flags(args, changed)}', flush=True)
    done, best = restore(resumed, *state) if resumed else (0, None)  # steps; (score, ..., -step)
    log = training.Log(args.out, plan, ds.train.texts, done, device=dev)
    if not resumed:
        save_resume(args.out, args, 0, None, *state)  # from here on the run can be resumed
    cacheable = plan.max_steps > plan.epoch_steps and ranks.world_size() == 1 and not args.plain
    cached = frozen.cache(model, dict(train=train, val=val), *settings) if cacheable else None
    net = cached.net if cached else net  # reads the cached output of the frozen blocks

    def batch_of(index):
        """Rows index (B,) of the training split -> arguments of loss_of. (Other splits, and new
        texts, are read by lib/scoring.py.)"""
        width = GRAPH_WIDTH if args.cuda_graphs else 1  # T is a multiple of it
        ids, n = data.collate(train, index, args.max_length, args.keep, model.end, dev, width)
        batch = ids, n, data.to_device(torch.from_numpy(ds.train.y[index]), dev)
        return (*batch, cached.states['train'](index, ids)) if cached else batch

    def loss_of(ids, n, y, *states):
        """Sum of a batch's losses, weighted by class. ids (B, T), n (B,) tokens, y (B,) classes,
        states: output of the frozen blocks, if it is cached."""
        with device.autocast(dev, dtype):
            logits = net(ids, n, *states)  # (B, K)
        log.hits.add_((logits.argmax(1) == y).sum())  # for the log; stays on the device
        return F.cross_entropy(logits.float(), y, weight=class_weights, reduction='sum')

    def weight_of(rows):
        """Divisor of a step's summed loss: the class weights of its rows (else their number)."""
        return float(weights[ds.train.y[rows]].sum())

    def evaluate(step, best):
        """Evaluate on the validation rows; save the weights if they are the best. -> best score"""
        fed = dict(net=cached.net, states=cached.states['val']) if cached else {}
        with interrupt.evaluation():
            probs = softmax(class_logits(model, val, *settings, **fed, progress=True))
        m = metrics(probs, ds.val.y, ds.labels)
        results = dict(val_loss=m['nll'], val_accuracy=m['accuracy'], val_macro_f1=m['macro_f1'])
        log.write(step=step, **results)
        score = *selection(m, args.select), -step  # a tuple; of equal scores the earliest
        if best is None or score > best:
            best = score
            write_predictions(args.out, probs, ds.val.y, ds.labels)
            runfolder.save(args.out, model, info, original, dict(step=step, **results))
        save_resume(args.out, args, step, best, *state)
        log.restart()
        return best

    graphs = Graphs(loss_of, model, scaler, [log.hits]) if args.cuda_graphs else None

    # --- loop ---
    with memory_advice(args), interruptible() as interrupt:
        if resumed and resumed['due']:
            best = evaluate(done, best)
        for step, rows in plan.steps(opt, interrupt, done):  # sets lr, seeds dropout
            if log.out_of_patience(done, best):
                break
            parts, factor = plan.parts(rows)  # factor: number of ranks; 0: no row is this rank's
            scale, loss = factor / weight_of(rows), 0.0
            for part in parts:
                batch = batch_of(part)
                if graphs:
                    part_loss = graphs(torch.full((), scale, device=dev), *batch)
                else:
                    with ranks.sync_gradients(net, last=part is parts[-1]):
                        part_loss = loss_of(*batch) * scale
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
        save_resume(args.out, args, done, best, *state, due=interrupt.evaluating)
        return interrupted(__file__, args.out, done, plan.max_steps)
    best = best or evaluate(done, best)  # no evaluation yet if an edit left the loop
    model = net = opt = state = graphs = cached = original = resumed = None
    batch = part_loss = None
    gc.collect()  # the test needs their memory
    ranks.barrier()
    return test(args, ds, summary.best(args, best, done, plan.max_steps))


def test(args, ds, headline):
    """The final test, on what was saved, opened as predict.py opens it. -> dict(out, val, test):
    run folder, results on the validation rows, metrics(); main returns it"""
    run = runs.open_run(args.out, args.device, args.dtype, args.data_dir, args.plain)
    logits = run.logits(ds.test.texts, progress=True, cache=True)
    results = run_metrics(run, logits, ds.test.y, ds.labels)[0]
    files.write_json(os.path.join(args.out, 'eval_results.json'), results)
    if files.WRITES:
        os.remove(os.path.join(args.out, 'resume.pt'))
    files.release(args.out)
    rows = counted(len(ds.test.y), 'row')
    print('', *unlike_saved(run, ds.val.texts), sep='\n')
    print(f'{headline}; test ({args.data}, {rows}):')
    print(report(results, ds.labels))
    print(f'\n{summary.suggestions(args.out, ds.test.texts[0])}')
    return dict(out=args.out, val=run.info['results'], test=results)


if __name__ == '__main__':
    cli.run(ranks.under_torchrun(main))
