"""Train a discriminative classifier: GPT-2 reads the text, a linear head reads GPT-2's state at the last token.

    python train_cls.py --lora --r 8                       SST-2, LoRA on every matrix (without a network: the built-in demo)
    python train_cls.py --data mine.csv --last 2           your own texts, last two blocks
    python train_cls.py --data sms --scratch --full        random weights of GPT-2's shape, everything trains
"""
import math
import os
import platform
import re
import sys
import time

import data     # first: its excepthook covers the seconds that torch takes to import
import numpy as np
import torch
import torch.nn.functional as F

import lora
import model as gpt
from data import UserError
from eval import metrics, report, softmax, write_predictions

def parse(argv):
    p = data.Parser(description=__doc__, prog='train_cls.py')
    # data
    p.add_argument('--data', default='sst2', help='sst2, agnews, imdb, sms, demo, your own .csv, .tsv or .jsonl file, or a folder with train.*')
    p.add_argument('--val', metavar='FILE', help='validation rows of your own data; without it they are taken from --data')
    p.add_argument('--test', metavar='FILE', help='test rows of your own data; without it they are taken from --data')
    p.add_argument('--text_col', metavar='NAME', help='column or key of the text in your own data; guessed from common names without it')
    p.add_argument('--label_col', metavar='NAME', help='column or key of the label in your own data; guessed from common names without it')
    p.add_argument('--max_length', type=data.positive, default=128, help='tokens a text is cut to; SST-2 has at most 65')
    p.add_argument('--truncate', choices=('head', 'tail'), default='head', help='keep the head (start) or the tail (end) of a text that is too long')
    p.add_argument('--max_samples', type=data.positive, metavar='N', help='train on at most N rows per class, chosen by the seed')
    p.add_argument('--balance', action='store_true', help='drop rows of the larger classes until all classes are as small as the smallest')
    p.add_argument('--data_dir', metavar='DIR', help='folder to look in before the cache and the network; $NANOCLS_DATA without it')
    # model
    p.add_argument('--model', default='gpt2', help='gpt2, gpt2-medium, -large, -xl, distilgpt2, nano (the demo\'s), or a folder with a GPT-2 checkpoint')
    p.add_argument('--scratch', action='store_true', help='that shape with random weights')
    p.add_argument('--n_layer', type=data.positive, help='number of blocks, with --scratch; the shape\'s own without it')
    p.add_argument('--n_head', type=data.positive, help='attention heads per block, with --scratch; the shape\'s own without it')
    p.add_argument('--n_embd', type=data.positive, help='width, with --scratch; the shape\'s own without it')
    p.add_argument('--block_size', type=data.positive, help='positions, with --scratch; the shape\'s own without it')
    # what to train
    what = p.add_mutually_exclusive_group()
    what.add_argument('--lora', action='store_true', help='low-rank updates of the layers named by --targets (the default)')
    what.add_argument('--head', action='store_true', help='the linear head alone')
    what.add_argument('--last', type=data.positive, metavar='K', help='the last K blocks, the last LayerNorm and the head')
    what.add_argument('--full', action='store_true', help='everything')
    what.add_argument('--adapter', action='store_true', help='Houlsby bottlenecks after each attention and MLP, and the head')
    what.add_argument('--prompt', type=data.positive, metavar='N', help='N learned vectors in front of the text, and the head')
    p.add_argument('--bottleneck', type=data.positive, default=64, help='hidden units of an adapter, with --adapter')
    # LoRA
    p.add_argument('--r', type=data.positive, default=8, help='rank of the updates, with --lora')
    p.add_argument('--alpha', type=data.above_zero, default=16.0, help='the update is scaled by alpha / r, with --lora')
    p.add_argument('--dropout', type=data.share, default=0.05, help='share of the inputs of an update dropped in training, with --lora')
    p.add_argument('--targets', default=lora.TARGETS, help='comma-separated names of the layers to update, with --lora')
    p.add_argument('--top', type=data.positive, metavar='M', help='update the last M blocks alone, with --lora; all of them without it')
    # optimisation
    p.add_argument('--max_steps', type=data.positive, default=800, help='optimizer steps; train_gen.py shares them out among the classes by their rows')
    p.add_argument('--epochs', type=data.above_zero, help='passes over the training rows, instead of --max_steps')
    p.add_argument('--batch_size', type=data.positive, default=16, help='rows per forward pass')
    p.add_argument('--grad_accum', type=data.positive, default=1, help='forward passes per step, which then sees batch_size x grad_accum rows')
    p.add_argument('--lr', type=data.above_zero, help=lora.LR_HELP)
    p.add_argument('--weight_decay', type=data.not_negative, default=0.01, help='AdamW\'s decay of the matrices alone')
    p.add_argument('--warmup', type=data.share, default=0.06, help='share of the steps in which the rate rises from 0')
    p.add_argument('--schedule', choices=('linear', 'cosine', 'constant'), default='linear', help='how the rate falls to 0 after the warm-up')
    p.add_argument('--clip', type=data.not_negative, default=1.0, help='largest norm of the gradient; 0 = no limit')
    p.add_argument('--class_weights', choices=('none', 'balanced'), default='none', help='balanced: rare classes weigh more, rows / (classes x rows of the class)')
    p.add_argument('--trunk_dropout', type=data.share, default=0.0, help='GPT-2\'s own dropout (embedding, attention, residual)')
    # system
    p.add_argument('--device', default='auto', help='auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps')
    p.add_argument('--dtype', choices=('auto', 'bf16', 'fp16', 'fp32'), default='auto', help='of the matrix products; auto: the fastest native one')
    p.add_argument('--compile', action='store_true', help='torch.compile the model; pays on CUDA and long runs')
    p.add_argument('--cuda_graphs', action='store_true', help='record each shape of a batch once and replay it; pays for small models on CUDA')
    p.add_argument('--gradient_checkpointing', action='store_true', help='keep no activations within blocks, compute them twice: less memory, more time')
    p.add_argument('--seed', type=int, default=1337, help='of the split, the order of the rows, new weights and dropout')
    p.add_argument('--out', metavar='DIR', help='run folder; without it runs/DATA-METHOD, numbered if it is taken')
    p.add_argument('--resume', action='store_true', help='go on with the interrupted run in --out, with its own flags')
    p.add_argument('--eval_every', type=data.positive, metavar='N', help='steps between evaluations on the validation rows; without it 4 in a run')
    p.add_argument('--log_every', type=data.positive, default=20, metavar='N', help='steps between log lines')
    p.add_argument('--quick', action='store_true', help='a trial: 100 rows per class of each split, one epoch')
    args, given = p.parse(argv)

    if args.resume:
        if not args.out:
            raise UserError('--resume needs --out, the folder of the run to go on with')
        saved = gpt.load_resume(args.out)
        return lora.resumed(args, given, saved['args']), set(), saved
    args.method = next((m for m in ('head', 'last', 'full', 'adapter', 'prompt') if getattr(args, m)), 'lora')
    lora.settle(args, given, {'bottleneck': ('--adapter', args.adapter), 'gradient_checkpointing': ('blocks that train', not args.head)})
    return args, given, None


def main(argv=None):
    args, given, saved = parse(argv)
    device, dtype, reason = gpt.pick_device(args.device, args.dtype)
    gpt.check_graphs(args, device)

    # --- data and base model; a first run that can have neither falls back to the demo ---
    def get():
        ds = data.load(args.data, args.seed, args.data_dir, args.val, args.test, args.text_col, args.label_col, args.max_samples, args.balance)
        model = gpt.build_model(args, len(ds.labels))
        return ds, model, data.tokenizer(lora.tokenizer_name(model), args.data_dir)
    with gpt.first_of_machine():
        ds, model, enc = lora.or_demo(get, args, given, saved)
    if args.quick:
        ds.val, ds.test = (data.cap(split, 100, args.seed) for split in (ds.val, ds.test))
    room = model.cfg.block_size - (args.prompt or 0)
    if args.max_length > room and 'max_length' in given:
        raise UserError(f'--max_length {args.max_length} does not fit: the model has {model.cfg.block_size} positions' +
                        (f', and --prompt takes {args.prompt} of them' if args.prompt else ''))
    args.max_length = max(1, min(args.max_length, room))            # --prompt has its own check

    train, val = data.tokenize(enc, ds.train.texts), data.tokenize(enc, ds.val.texts)

    # --- what trains ---
    wrapped = lora.adapt(model, args.method, args.last, args.r, args.alpha, args.dropout, args.targets, args.bottleneck, args.prompt, args.top)
    model.set_dropout(args.trunk_dropout)
    args.out = gpt.from_rank_zero(lambda: args.out or lora.free_folder(args.data, args.method))

    def begin():
        """Make the run folder this process's -> what run.json says of the base model."""
        data.claim(args.out)
        if not saved and any(os.path.exists(os.path.join(args.out, name)) for name in ('run.json', 'resume.pt')):
            raise UserError(f'--out {args.out} already holds a run; name another folder, remove that one, or go on with it (--resume)')
        return lora.base_info(args, args.out, model, ds.labels)
    base = gpt.from_rank_zero(begin)
    trained, total = lora.count(model)
    info = dict(kind='cls', method=args.method, model=args.model, data=args.data, seed=args.seed, labels=ds.labels,
                base=base, rows={name: len(getattr(ds, name).y) for name in ('train', 'val', 'test')},
                args=vars(args), parameters=dict(trainable=trained, total=total),
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
    gpt.place(model, device, dtype, pack=not args.compile)
    model.recomputes = args.gradient_checkpointing
    if args.compile:
        for block in model.h:                                       # one graph for all blocks
            block.compile(dynamic=True)

    lengths = np.minimum(train.lengths, args.max_length)            # (N,) tokens of each training text that are used
    y = torch.from_numpy(ds.train.y).to(device)
    counts = np.bincount(ds.train.y, minlength=len(ds.labels))
    class_weights = len(ds.train.y) / (len(ds.labels) * counts) if args.class_weights == 'balanced' else None            # (K,)
    weights = None if class_weights is None else torch.from_numpy(class_weights).float().to(device)

    step_rows = args.batch_size * args.grad_accum                   # rows per optimizer step
    epoch_steps = math.ceil(len(lengths) / step_rows)
    max_steps, lr = math.ceil(args.epochs * epoch_steps) if args.epochs else args.max_steps, args.lr
    eval_every = args.eval_every or max(1, math.ceil(max_steps / 4))

    print(f'{args.data}: ' + ', '.join(f'{label} {n}' for label, n in zip(ds.labels, counts)) + ' training rows; '
          f'{len(ds.val.y)} validation, {len(ds.test.y)} test')
    for note in ds.notes:
        print(f'  {note}')
    print(f'{100 * np.mean(train.lengths > args.max_length):.1f} % of the training texts are longer than {args.max_length} tokens and lose '
          f'their {"tail" if args.truncate == "head" else "head"}')
    print(f'{args.model}{" (random weights)" if args.scratch else ""}: {model.cfg}')
    print('\n'.join(lora.describe(model, wrapped)))
    print(f'{device}, matrix products in {str(dtype)[6:]}: {reason}')
    print(f'{max_steps} steps of {step_rows} rows = {max_steps / epoch_steps:.1f} epochs, lr {args.lr:g}' + ''.join(
        f', {name} {getattr(args, name)}' for name in sorted(given - {'lr', 'data', 'model', 'max_steps', 'epochs', *lora.METHODS['cls']})), flush=True)

    def batch_of(index):
        """What loss_of is given for the rows index (B,) of the training split."""
        ids, n = data.collate(train, index, args.max_length, args.truncate, model.end, device, multiple=gpt.GRAPH_WIDTH if graphs else 1)
        return ids, n, y[index], *([frozen['train'](index, ids.shape[1])] if frozen['train'] else [])

    def loss_of(ids, n, y, states=None):
        """Sum of the losses of a batch, weighted by class: ids (B, T), n (B,) tokens, y (B,) classes, states of the blocks that do not train."""
        with gpt.autocast(device, dtype):
            logits = net(ids, n, states=states)                     # (B, K)
        return F.cross_entropy(logits.float(), y, weight=weights, reduction='sum')

    def rows_of_step(number):
        """The rows of a step, 1 is the first."""
        epoch, at = divmod(number - 1, epoch_steps)
        return data.batches(lengths, step_rows, args.seed, epoch)[at]

    def weight_of(index):
        """What the loss of a step is divided by: its rows, or their class weights. A step cut into ragged parts equals the whole."""
        return len(index) if class_weights is None else float(class_weights[ds.train.y[index]].sum())

    def evaluate():
        """-> (what is better when larger, the numbers for the log); writes the predictions."""
        probs = softmax(gpt.class_logits(model, val, args.max_length, args.truncate, device, dtype, states=frozen['val']))
        write_predictions(args.out, probs, probs.argmax(1), ds.val.y, ds.labels)
        m = metrics(probs, ds.val.y, ds.labels)
        return (m['accuracy'], -m['nll']), dict(val_loss=m['nll'], val_accuracy=m['accuracy'], val_macro_f1=m['macro_f1'])

    def save_best(results):
        if not data.WRITES:
            return
        lora.save_weights(args.out, model, args.method, ds.labels, lora.peft_base(args.out, info))
        data.write_json(os.path.join(args.out, 'run.json'), {**info, 'results': results})

    def keep(step, best):
        gpt.save_resume(args.out, args, step, best, params, opt, scaler)

    if args.method == 'full':
        model.wte.train_rows_of(torch.from_numpy(np.append(train.flat, model.end)))              # end: pads
    params, net = lora.trainables(model), gpt.wrap(model)
    opt = gpt.make_optimizer(model, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    graphs = gpt.Graphs(loss_of, params.values(), scaler) if args.cuda_graphs else None
    step, best = gpt.restore(saved, params, opt, scaler) if saved else (0, None)
    log = gpt.Log(args.out, max_steps, resumed_at=step)
    if not saved:
        keep(0, None)                                               # from here on --resume goes on

    frozen, depth = dict(train=None, val=None), model.frozen_depth()
    if max_steps > epoch_steps and depth and gpt.ranks() == 1:
        print(f'the first {depth} blocks do not train: what comes out of them is computed once for all epochs', flush=True)
        try:
            frozen = {name: gpt.FrozenStates(model, tokens, args.max_length, args.truncate, device, dtype)
                      for name, tokens in dict(train=train, val=val).items()}
        except UserError as e:
            print(f'  or again in every epoch: {e}')

    # --- loop ---
    model.train()
    plan, losses, real, padded, rows_done, since = None, [], 0, 0, 0, time.perf_counter()                 # since the last log line
    with gpt.advice_on_memory(args), gpt.finish_step_on_interrupt() as interrupted:
        while step < max_steps and not gpt.any_rank(interrupted):
            epoch, at = divmod(step, epoch_steps)
            if at == 0 or plan is None:
                plan = data.batches(lengths, step_rows, args.seed, epoch)           # the rows of each step of this epoch
            rows, rate = plan[at], gpt.lr_at(step, max_steps, lr, args.warmup, args.schedule)
            for group in opt.param_groups:
                group['lr'] = rate
            gpt.seed_step(args.seed, step)
            weight, loss = weight_of(rows), 0.0
            mine, counts = gpt.share_of(rows[np.argsort(lengths[rows])])
            parts = np.array_split(mine, min(args.grad_accum, len(mine)))
            for part in parts:
                batch, share = batch_of(part), counts / weight
                if graphs:
                    part_loss = graphs(torch.full((), share, device=device), *batch)
                else:
                    with gpt.exchange(net, last=part is parts[-1]):
                        part_loss = loss_of(*batch) * share
                        scaler.scale(part_loss).backward()
                loss = loss + part_loss.detach()                                    # a tensor: reading it here would wait for the GPU
                real, padded = real + int(lengths[part].sum()), padded + batch[0].numel()
            scaler.unscale_(opt)
            norm = gpt.clip_gradients(params.values(), args.clip)
            losses.append(loss / gpt.ranks() + (0.0 if scaler.is_enabled() else 0.0 * norm))        # not finite if either is not
            scaler.step(opt)
            scaler.update()
            opt.zero_grad(set_to_none=not graphs)
            step, rows_done = step + 1, rows_done + len(rows)
            at_evaluation = step % eval_every == 0 or step == max_steps
            if step % args.log_every == 0 or at_evaluation:
                mean_loss, seconds = gpt.mean_finite(losses, step, rows_of_step, lr, args.out), time.perf_counter() - since
                real, padded = gpt.across_ranks(torch.tensor([real, padded])).tolist()
                log(seconds / len(losses), step=step, loss=mean_loss, lr=rate, examples_per_s=rows_done / seconds, tokens_per_s=real / seconds,
                    pad_share=1 - real / padded)
                losses, real, padded, rows_done, since = [], 0, 0, 0, time.perf_counter()
            if at_evaluation:
                score, results = evaluate()
                log(step=step, **results)
                if best is None or score > best:
                    best = score
                    save_best(dict(step=step, **results))
                keep(step, best)
                since = time.perf_counter()                                         # the speeds logged are those of training alone
        if losses:
            gpt.mean_finite(losses, step, rows_of_step, lr, args.out)               # what is kept now is sound
    # --- loop ---
    if step < max_steps:
        keep(step, best)
        print(f'\ninterrupted after step {step} of {max_steps}; go on with: python train_cls.py --resume --out {args.out}', file=sys.stderr)
        return 130

    # --- the final test, on what was saved, opened as predict.py opens it ---
    model = net = opt = params = None                               # their memory is needed for the run as it is opened
    gpt.meet()
    run = lora.open_run(args.out, args.device, args.dtype)
    probs = softmax(run.logits(ds.test.texts, progress=True, cache=True))
    results = metrics(probs, ds.test.y, ds.labels)
    data.write_json(os.path.join(args.out, 'eval_results.json'), results)
    if data.WRITES:
        os.remove(os.path.join(args.out, 'resume.pt'))
    print(f'\nbest on validation: accuracy {best[0]:.4f}; test ({args.data}, {len(ds.test.y)} rows):\n{report(results, ds.labels)}')
    example = re.sub(r'[^\w\s.,-]', '', ds.test.texts[0][:60])                       # safe between a shell's quotes
    print(f'\nsaved in {args.out}; try:\n  python predict.py {args.out} "{example}"\n  python eval.py {args.out}')


if __name__ == '__main__':
    data.cli(gpt.under_torchrun(main))
