"""Train a generative classifier: one language model per class over GPT-2, and Bayes' rule on exact sequence probabilities.

    log P(class | text) = log P(text | class) + log P(class) - log P(text)

    python train_gen.py --lora --r 8                        SST-2, one LoRA per class (without a network: the built-in demo)
    python train_gen.py --data agnews --zero_shot           no training: a prompt per class in front of the text
    python train_gen.py --class_id 3 --out runs/mine        add a class to a finished run, or train one again; the others stay as they are
    python train_gen.py --pretrain --data mine.txt          one language model on all the texts, for --model of both scripts
"""
import glob
import json
import math
import os
import platform
import re
import shutil
import sys
import time

import data     # first: its excepthook covers the seconds that torch takes to import
import numpy as np
import torch
import torch.nn.functional as F

import lora
import model as gpt
from data import UserError
from eval import metrics, own_data, report, run_metrics, softmax, write_predictions
from model import GPT

# Prompts of --zero_shot in front of a text, and with --direct behind it. Their common part cancels between the classes.
PROMPTS = {
    'sst2': {'negative': 'A negative movie review:\n', 'positive': 'A positive movie review:\n'},
    'imdb': {'negative': 'A negative movie review:\n', 'positive': 'A positive movie review:\n'},
    'agnews': {'World': 'World news:\n', 'Sports': 'Sports news:\n', 'Business': 'Business news:\n', 'Sci/Tech': 'Science and technology news:\n'},
    'sms': {'ham': 'A text message from a friend:\n', 'spam': 'An advertising text message:\n'},
}
ANSWERS = {
    'sst2': {'negative': '\nSentiment: negative', 'positive': '\nSentiment: positive'},
    'imdb': {'negative': '\nSentiment: negative', 'positive': '\nSentiment: positive'},
    'agnews': {'World': '\nTopic: world', 'Sports': '\nTopic: sports', 'Business': '\nTopic: business', 'Sci/Tech': '\nTopic: technology'},
    'sms': {'ham': '\nThis message is from a friend', 'spam': '\nThis message is spam'},
}


def parse(argv):
    p = data.Parser(description=__doc__, prog='train_gen.py')
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
    what.add_argument('--full', action='store_true', help='everything')
    what.add_argument('--prefix', action='store_true', help='one model for all classes, told the class by a learned vector in front of the text')
    what.add_argument('--zero_shot', action='store_true', help='nothing: each class is a prompt in front of the text, or with --direct behind it')
    what.add_argument('--pretrain', action='store_true', help='one language model on all the texts, labels unused; the run is a folder for --model')
    p.add_argument('--class_id', metavar='K', help='one class alone, by its number (0 = the first) or name; --out may be a finished run, which keeps the others')
    p.add_argument('--prompts', metavar='FILE', help='JSON object {class: prompt}, with --zero_shot')
    p.add_argument('--direct', action='store_true', help='with --zero_shot: score the class\'s words behind the text, with contextual calibration')
    p.add_argument('--prior', choices=('counts', 'uniform'), help='P(class): its share of the training rows (the default), or all equal (zero_shot\'s)')
    # from likelihood to posterior
    p.add_argument('--posterior_steps', type=data.positive, metavar='N', help='then N steps on the cross-entropy of the posterior P(class | text), all classes together')
    p.add_argument('--likelihood_share', type=data.share, default=0.1, help='share of the likelihood (nats per token) in the loss of those steps')
    p.add_argument('--posterior_lr', type=data.above_zero, help='peak learning rate of those steps; a third of --lr without it')
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
        return resume(args, given)
    args.method = next((m for m in ('full', 'prefix', 'zero_shot', 'pretrain') if getattr(args, m)), 'lora')
    if args.class_id is not None and args.out and os.path.isfile(os.path.join(args.out, 'run.json')):
        inherit(args, given)
    trains = args.method != 'zero_shot'
    needs = {name: ('--zero_shot', not trains) for name in ('prompts', 'direct')}
    needs.update({name: ('--posterior_steps', args.posterior_steps) for name in ('likelihood_share', 'posterior_lr')})
    needs['posterior_steps'] = ('--lora or --prefix, the methods that hold all classes in one model', args.method in ('lora', 'prefix'))
    needs['class_id'] = ('--lora or --full, the methods that train a class alone', args.method in ('lora', 'full'))
    needs['prior'] = ('classes', args.method != 'pretrain')
    needs.update({name: ('training, which --zero_shot leaves out', trains) for name in
                  ('max_steps', 'epochs', 'batch_size', 'grad_accum', 'lr', 'weight_decay', 'warmup', 'schedule', 'clip', 'trunk_dropout', 'eval_every',
                   'compile', 'cuda_graphs', 'gradient_checkpointing')})
    lora.settle(args, given, needs)
    if args.posterior_steps and args.class_id is not None:
        raise UserError('--posterior_steps changes all classes, --class_id trains one alone; give one of them')
    args.prior = args.prior or ('counts' if trains and not args.direct else 'uniform')
    if args.direct and args.prior != 'uniform':
        raise UserError('--prior counts does nothing with --direct, which scores P(class | text) itself')
    return args, given, None


def resume(args, given):
    """The flags and the state of the interrupted run in --out. Without a resume.pt: those of a run that lacks classes, or its final test."""
    if not args.out:
        raise UserError('--resume needs --out, the folder of the run to go on with')
    found = glob.glob(os.path.join(glob.escape(args.out), '*.part', 'resume.pt')) + glob.glob(os.path.join(glob.escape(args.out), 'resume.pt'))
    if found:                                                       # of several classes, each trained by a process of its own, the first
        work = os.path.dirname(min(found))
        saved = gpt.load_resume(work)
        return lora.resumed(args, given, saved['args']), set(), {**saved, 'work': work}
    info = lora.read_run(args.out)
    if info.get('kind') != 'gen':
        raise UserError(f'{args.out} was trained by train_cls.py; go on with that')
    later = ('posterior_steps', 'likelihood_share', 'posterior_lr')  # a finished run may go on to the posterior
    if given & set(later) and info['method'] not in ('lora', 'prefix'):
        raise UserError(f'--posterior_steps needs a run of --lora or --prefix, and {args.out} is one of --{info["method"]}')
    new = {name: getattr(args, name) for name in later if name in given}
    return lora.resumed(args, given - set(later), {**info.get('pending', info['args']), **new, 'class_id': None}), set(), dict(work=None)


def inherit(args, given):
    """--class_id on a run that is there: flags that were not typed are the run's; those that all its classes share cannot be others."""
    info = lora.read_run(args.out)
    if info.get('kind') != 'gen' or info['method'] not in ('lora', 'full'):
        raise UserError(f'--class_id: {args.out} is no generative run of --lora or --full, so it has no class that can be trained alone')
    if given & {'lora', 'full'} and args.method != info['method']:
        raise UserError(f'--{args.method}: {args.out} was trained with --{info["method"]}; its classes must be alike')
    strange = lora.strange_flags(args, info.get('pending', info['args']))
    if strange:
        raise UserError(f'{args.out}/run.json is damaged: its flag --{strange[0]} is malformed; restore the file, or train the run again')
    for name, value in info.get('pending', info['args']).items():
        if name in ('class_id', 'resume', 'out', 'posterior_steps', 'posterior_lr'):
            continue
        if name not in given:
            setattr(args, name, value)
        elif name in ('model', 'scratch', 'n_layer', 'n_head', 'n_embd', 'block_size', 'max_length', 'truncate', 'r', 'alpha', 'targets', 'top'):
            mine = getattr(args, name) if name != 'targets' else args.targets.split(',')
            if mine != value:
                raise UserError(f'--{name} {getattr(args, name)}: the other classes of {args.out} have {value}, and all must be alike')
    args.targets = ','.join(args.targets) if isinstance(args.targets, list) else args.targets
    if 'max_steps' in given:
        args.epochs = None


# -------------------------------------------------------------------------------------------------- the run's own folders

def folder_names(labels, old):
    """{label: folder name}: the label with what a file system may not take replaced, no two alike even where case is not told apart."""
    names = dict(old)
    taken = {'base', 'prefix', 'posterior'} | {name.lower() for name in old.values()}
    for label in labels:
        if label not in names:
            stem = re.sub(r'[^\w-]+', '_', label).strip('_')[:60] or 'class'
            name, i = stem, 2
            while name.lower() in taken:
                name, i = f'{stem}-{i}', i + 1
            names[label] = name
            taken.add(name.lower())
    return {label: names[label] for label in labels}


def finished(out, folder):
    """Is that class trained to its end? Its class.json is written last."""
    return os.path.isfile(os.path.join(out, folder, 'class.json'))


def promote(done, out):
    """Move what a phase trained from its folder `done` to its place in the run: the folders in it, and its log lines, whose steps go on
    counting. A kill at any moment leaves a folder *.done, and promoting that once more ends with the same run."""
    for folder in sorted(os.listdir(done)):
        if os.path.isdir(os.path.join(done, folder)):
            shutil.rmtree(os.path.join(out, folder), ignore_errors=True)
            os.rename(os.path.join(done, folder), os.path.join(out, folder))
    log, merged, whole = os.path.join(done, 'log.jsonl'), os.path.join(done, 'merged.jsonl'), os.path.join(out, 'log.jsonl')
    if os.path.isfile(log):
        before, new = ([r for r in map(data.log_row, data.read_bytes(path).decode('utf-8', 'replace').splitlines()) if r]
                       if os.path.isfile(path) else [] for path in (whole, log))
        steps = before[-1]['step'] if before else 0
        data.write_atomic(merged, ''.join(json.dumps(r) + '\n' for r in before + [{**r, 'step': steps + r['step']} for r in new]))
        os.remove(log)
    if os.path.isfile(merged):
        os.replace(merged, whole)
    shutil.rmtree(done)


def prompts_of(args, labels):
    """{label: prompt} of --zero_shot: from --prompts, or the defaults of the data set; for other data the label itself."""
    if not args.prompts:
        default = (ANSWERS if args.direct else PROMPTS).get(args.data, {})
        return {label: default.get(label, f'\nLabel: {label}' if args.direct else f'{label}:\n') for label in labels}
    prompts = data.read_json(args.prompts)
    if not isinstance(prompts, dict) or not all(isinstance(p, str) and p for p in prompts.values()):
        raise UserError(f'--prompts {args.prompts}: expected a JSON object that gives each class a prompt, {{"class": "text", ...}}')
    wrong = [label for label in prompts if label not in labels] or [label for label in labels if label not in prompts]
    if wrong:
        raise UserError(f'--prompts {args.prompts}: {wrong[0]!r} is {"no class of the data" if wrong[0] in prompts else "missing"}; '
                        f'the classes are {", ".join(labels)}')
    return prompts


def leaked(old, args, ds):
    """A note for a finished run that gets a class from other data: how many of the rows that will judge it were trained on before."""
    split_by = ('data', 'seed', 'val', 'test', 'text_col', 'label_col', 'max_samples', 'balance')
    if 'args' not in old or all(old['args'][key] == getattr(args, key) for key in split_by):
        return []
    try:
        seen = set(own_data(old, args.data_dir).train.texts)
    except UserError as e:
        return [f'the rows that the other classes were trained on cannot be read any more ({e}); should they be among these, the results are too kind']
    n = sum(text in seen for text in ds.val.texts + ds.test.texts)
    return [f'{n:,} of the validation and test texts were training rows of the other classes: they judge those too kindly'] * (n > 0)


def auc(scores, positive):
    """Area under the ROC curve: the share of pairs (a positive, a negative) of scores (n,) in which the positive's is larger; ties count half."""
    order = np.sort(scores)
    ranks = (np.searchsorted(order, scores, 'left') + np.searchsorted(order, scores, 'right') + 1) / 2    # 1-based, of ties the mean
    p, n = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


def fit_calibration(logprobs, log_prior, y):
    """tau and b (K,) that minimise the mean -log softmax(logprobs / tau + log_prior + b)[y] of validation rows, by LBFGS in float64: temperature
    scaling (Guo et al. 2017, arXiv 1706.04599) with a bias per class. A weak pull to b = 0 and tau = 1 keeps them finite on few rows."""
    x, prior, y = torch.tensor(logprobs).double(), torch.tensor(log_prior).double(), torch.tensor(y)
    a, b = torch.zeros(()).double().requires_grad_(True), torch.zeros(x.shape[1]).double().requires_grad_(True)      # a = -log tau
    opt = torch.optim.LBFGS([a, b], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn='strong_wolfe')

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(x * a.exp() + prior + b, y) + 1e-4 * (a ** 2 + (b ** 2).sum())
        loss.backward()
        return loss
    opt.step(closure)
    return float(torch.exp(-a.detach())), b.detach().numpy()


def main(argv=None):
    args, given, saved = parse(argv)
    device, dtype, reason = gpt.pick_device(args.device, args.dtype)
    gpt.check_graphs(args, device)
    if args.out and os.path.isdir(args.out) and data.WRITES:
        with data.locked(args.out):
            for left in glob.glob(os.path.join(glob.escape(args.out), '*.done')):             # killed while a phase's weights were put in place
                promote(left, args.out)

    # --- data and base model; a first run that can have neither falls back to the demo ---
    def base_model():
        kept = os.path.join(args.out or '', 'base')                 # a random or small base lies in the run
        if args.method == 'lora' and args.out and os.path.isdir(args.out):
            with data.locked(args.out):                             # another class's process may be writing it
                if os.path.isdir(kept):
                    return GPT.load(kept)
        return gpt.build_model(args)

    def get():
        flags = {name: getattr(args, name) for name in ('seed', 'data_dir', 'val', 'test', 'text_col', 'label_col', 'max_samples', 'balance')}
        if args.method == 'pretrain':
            texts, val_texts, notes = data.load_texts(args.data, **flags)
            one_class = [data.Split(part, np.zeros(len(part), np.int64)) for part in (texts, val_texts, [])]
            ds = data.Dataset(args.data, ['text'], *one_class, notes)
        else:
            ds = data.load(args.data, **flags)
        model = base_model()
        return ds, model, data.tokenizer(lora.tokenizer_name(model), args.data_dir)
    with gpt.first_of_machine():
        ds, model, enc = lora.or_demo(get, args, given, saved or args.class_id is not None)
    if args.quick:
        ds.val, ds.test = (data.cap(split, 100, args.seed) for split in (ds.val, ds.test))
    labels, k = ds.labels, len(ds.labels)
    counts = np.bincount(ds.train.y, minlength=k)
    prior = counts / counts.sum() if args.prior == 'counts' else np.full(k, 1 / k)
    log_prior = np.log(prior).astype(np.float32)
    prompts = prompts_of(args, labels) if args.method == 'zero_shot' else None
    front = 1 + args.prefix + max([len(enc.encode_ordinary(text)) for text in prompts.values()] if prompts else [0])     # <|endoftext|> and more
    room = model.cfg.block_size - front
    if room < 1 or args.max_length > room and 'max_length' in given:
        raise UserError(f'--max_length {args.max_length} does not fit: the model has {model.cfg.block_size} positions, and {front} of them '
                        'stand in front of a text (or behind it)')
    args.max_length = min(args.max_length, room)
    train = data.tokenize(enc, ds.train.texts)

    # --- the run folder: a new one, an interrupted one, or a finished one that gets a class ---
    args.out = gpt.from_rank_zero(lambda: args.out or lora.free_folder(args.data, 'pretrain' if args.pretrain else f'gen-{args.method}'))

    def begin():
        """-> run.json of the run that is there, or that of none."""
        if args.pretrain:
            data.claim(args.out)
        there = [name for name in ('run.json', 'resume.pt') if os.path.exists(os.path.join(args.out, name))]
        if there and not saved and args.class_id is None:
            raise UserError(f'--out {args.out} already holds a run; name another folder, remove that one, go on with it (--resume), '
                            'or train one of its classes (--class_id)')
        return lora.read_run(args.out) if 'run.json' in there and not args.pretrain else dict(labels=[], folders={})
    old = gpt.from_rank_zero(begin)
    lost = [label for label in old['labels'] if label not in labels]
    if lost:
        raise UserError(f'{args.data} has no rows of the class {lost[0]!r}, which {args.out} has; --data must hold all classes of the run')
    folders = folder_names(labels, old['folders'])
    if args.class_id is not None:
        chosen = labels.index(args.class_id) if args.class_id in labels else int(args.class_id) if args.class_id.isdecimal() else k
        if chosen >= k:
            raise UserError(f'--class_id {args.class_id}: there is no such class; {args.data} has ' +
                            ', '.join(f'{i} {label}' for i, label in enumerate(labels)))
        phases = [('class', labels[chosen])]
    elif args.method in ('lora', 'full'):
        phases = [('class', label) for label in labels]
    else:
        phases = dict(prefix=[('prefix', None)], pretrain=[('pretrain', None)], zero_shot=[])[args.method]
    if args.posterior_steps:
        phases.append(('posterior', None))

    def work_of(kind, label):
        """The folder a phase works in; what it made is moved to its place when it is done."""
        return args.out if kind == 'pretrain' else os.path.join(args.out, (folders[label] if kind == 'class' else kind) + '.part')

    def done(kind, label):
        """Was this phase of an interrupted run done already?"""
        if kind == 'pretrain' or not all(finished(args.out, folders[one]) for one in ([label] if kind == 'class' else labels)):
            return False
        return kind != 'posterior' or all('posterior_steps' in data.read_object(os.path.join(args.out, folders[one], 'class.json')) for one in labels)
    if saved:
        resumed = os.path.normpath(saved['work'] or '')
        phases = [phase for phase in phases if os.path.normpath(work_of(*phase)) == resumed or not done(*phase)]

    # --- what trains ---
    with torch.device('meta'):                                      # --targets that match nothing end the run before it has a folder
        lora.adapt(GPT(model.cfg), args.method, 0, args.r, args.alpha, args.dropout, args.targets, top=args.top)
    data.make_folder(args.out)
    model.requires_grad_(False)                                     # base_info writes what stays frozen

    def base_info():
        with data.locked(args.out):
            return lora.base_info(args, args.out, model)
    if 'base' not in old:
        info = dict(kind='lm' if args.pretrain else 'gen', method=args.method, model=args.model, data=args.data, seed=args.seed,
                    labels=[] if args.pretrain else labels, base=gpt.from_rank_zero(base_info), folders=folders)
    else:
        info = {**old, 'labels': labels, 'folders': folders, 'data': args.data}
        if args.method != 'prefix':                                 # whose base changes as it trains
            lora.base_of(args.out, old)
    info.update(rows={name: len(getattr(ds, name).y) for name in ('train', 'val', 'test')}, args=vars(args),
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
    if not args.pretrain:
        info['prior'] = dict(zip(labels, prior.tolist()))
    if prompts:
        info['prompts'] = prompts
    if 'base' not in old:
        data.write_json(os.path.join(args.out, 'run.json'), info)
    base_name = lora.peft_base(args.out, info)

    print(f'{args.data}: ' + ', '.join(f'{label} {n}' for label, n in zip(labels, counts)) + ' training rows; '
          f'{len(ds.val.y)} validation, {len(ds.test.y)} test')
    notes = ds.notes + leaked(old, args, ds)
    if args.class_id is not None and old['labels'] and old['args']['posterior_steps']:
        notes.append('the other classes were trained on to the posterior, which this one is not: --resume --posterior_steps N does that for all')
    for note in notes:
        print(f'  {note}')
    print(f'{100 * np.mean(train.lengths > args.max_length):.1f} % of the training texts are longer than {args.max_length} tokens and lose '
          f'their {"tail" if args.truncate == "head" else "head"}')
    print(f'{args.model}{" (random weights)" if args.scratch else ""}: {model.cfg}')
    print(f'{device}, matrix products in {str(dtype)[6:]}: {reason}')
    print(', '.join([args.method] + [f'{name} {getattr(args, name)}' for name in sorted(given - {'data', 'model', args.method})]), flush=True)

    y = torch.from_numpy(ds.train.y).to(device)
    y_prior = torch.from_numpy(log_prior).to(device)
    step_rows = args.batch_size * args.grad_accum                   # rows per optimizer step

    for number, (kind, label) in enumerate(phases):
        # --- one phase: a class, or all classes together, or the unlabelled texts ---
        work = work_of(kind, label)
        data.claim(work)
        classes = [label] if kind == 'class' else labels            # whose weights this phase makes
        members = np.flatnonzero(ds.train.y == labels.index(label)) if kind == 'class' else np.arange(len(ds.train.y))
        val_members = np.arange(len(ds.val.y))
        if kind == 'class':                                         # its validation rows, and as many of the other classes
            own, other = (np.flatnonzero((ds.val.y == labels.index(label)) == mine) for mine in (True, False))
            val_members = np.concatenate((own, np.random.RandomState(args.seed % 2**32).permutation(other)[:len(own)]))
        val = data.tokenize(enc, [ds.val.texts[i] for i in val_members], cache=False)
        if kind == 'posterior':                                     # goes on from the likelihood's best weights
            model = base_model() if args.method == 'lora' else GPT.load(os.path.join(args.out, 'base'))
            torch.manual_seed(args.seed)                            # whatever was trained before, in this process or another
            model.requires_grad_(args.prefix)                       # what is added below trains
            lora.load_peft([os.path.join(args.out, folders[one]) for one in labels], model, classes=k)
            wrapped = []
        else:
            model = base_model() if number else model               # each class starts from the base
            torch.manual_seed(args.seed)                            # as if this class were trained alone
            wrapped = lora.adapt(model, args.method, 0, args.r, args.alpha, args.dropout, args.targets, top=args.top)
            if args.prefix:                                         # the vectors start as the labels' mean embeddings
                lora.add_prompt(model, 1, classes=k)
                model.prompt.data = torch.stack([model.wte.weight.detach()[enc.encode_ordinary(one)].mean(0, keepdim=True) for one in labels])
        model.set_dropout(args.trunk_dropout)
        gpt.place(model, device, dtype, pack=not args.compile)
        model.recomputes = args.gradient_checkpointing
        if args.compile:
            for block in model.h:                                   # one graph for all blocks
                block.compile(dynamic=True)
        trained, total = lora.count(model)
        info['parameters'] = dict(trainable=trained, total=total)

        lengths = np.minimum(train.lengths[members], args.max_length)                # (N,) tokens of each training text that are used
        scored = gpt.scored_lengths(model, train, args.max_length)[members]          # with their <|endoftext|>
        epoch_steps = math.ceil(len(members) / step_rows)
        max_steps = math.ceil(args.epochs * epoch_steps) if args.epochs else max(1, round(args.max_steps * len(members) / len(train)))
        lr = args.lr
        if kind == 'posterior':
            max_steps, lr = args.posterior_steps, args.posterior_lr or args.lr / 3
        eval_every = args.eval_every or max(1, math.ceil(max_steps / 4))
        what = dict(pretrain='all texts', prefix='all classes', posterior='the posterior of all classes').get(kind, label)
        print(f'\n{what} ({number + 1} of {len(phases)}): {len(members)} rows, {max_steps} steps of {step_rows} rows = '
              f'{max_steps / epoch_steps:.1f} epochs, lr {lr:g}\n' + '\n'.join(lora.describe(model, wrapped)), flush=True)

        def batch_of(index):
            """What loss_of is given for the rows index (B,) of this phase."""
            rows = members[index]
            ids, n = data.collate(train, rows, args.max_length, args.truncate, model.end, device, multiple=gpt.GRAPH_WIDTH if graphs else 1)
            return ids, n, gpt.ends_here(model, train, rows, args.max_length, device), y[rows]

        def loss_of(ids, n, whole, y):
            """Sum of the losses of a batch: -log P(text | its class), or the posterior's cross-entropy with a share of likelihood (the hybrid loss
            of GeDi, arXiv 2009.06367). ids (B, T), n (B,) tokens, whole (B,): scored with <|endoftext|>, y (B,) classes."""
            with gpt.autocast(device, dtype):
                logprobs = net(ids, n, 'logprob', whole=whole, of=y if kind == 'prefix' else None)           # (B,), of the posterior (B, K)
            if kind != 'posterior':
                return -logprobs.sum()
            own = logprobs.gather(1, y[:, None]).squeeze(1) / (n + whole)            # (B,) nats per token
            share = args.likelihood_share
            return (1 - share) * F.cross_entropy(logprobs + y_prior, y, reduction='sum') - share * own.sum()

        def rows_of_step(number):
            """The training rows of a step, 1 is the first."""
            epoch, at = divmod(number - 1, epoch_steps)
            return members[data.batches(lengths, step_rows, args.seed, epoch)[at]]

        def weight_of(index):
            """What the loss of a step is divided by: its tokens, of the posterior its rows. A step cut into ragged parts equals the whole."""
            return len(index) if kind == 'posterior' else int(scored[index].sum())

        def val_logprobs():
            """log P of every validation text (n, 1), or (n, K) of a model with classes."""
            return gpt.text_logprobs(model, val, args.max_length, args.truncate, device, dtype)

        def evaluate():
            """-> (what is better when larger, the numbers for the log). A class alone is judged by how well log P(text | class) - log P(text)
            of the base model tells its texts from the others': its likelihood alone would stop too early, since what it forgets of texts in
            general it forgets like every other class, and Bayes' rule never sees it."""
            if not len(val):
                return (step,), {}                                  # nothing to choose by: the last weights
            logprobs = val_logprobs()
            if kind in ('prefix', 'posterior'):
                m = metrics(softmax(logprobs + log_prior), ds.val.y, labels)
                return (m['accuracy'], -m['nll']), dict(val_loss=m['nll'], val_accuracy=m['accuracy'], val_macro_f1=m['macro_f1'])
            mine = ds.val.y[val_members] == ds.val.y[val_members[0]]                 # (n,) the class's own rows come first
            n = gpt.scored_lengths(model, val, args.max_length)
            results = dict(val_loss=-float(logprobs[mine].sum() / n[mine].sum()), val_nats_per_text=-float(logprobs[mine].mean()))
            if mine.all():
                return (-results['val_loss'],), results
            results['val_auc'] = auc((logprobs - base_logprobs)[:, 0], mine)
            return (results['val_auc'], -results['val_loss']), results

        def save_best(results):
            if not data.WRITES:
                return
            if kind == 'pretrain':
                gpt.save_hf(args.out, model)
                data.write_json(os.path.join(args.out, 'run.json'), {**info, 'results': results})
                return
            base = info['base']
            if args.prefix:
                gpt.save_hf(os.path.join(work, 'base'), model, state={n: t for n, t in model.float32_state().items() if n != 'prompt'})
                base = dict(sha256=gpt.base_sha256(os.path.join(work, 'base')))
            for i, one in enumerate(classes):
                folder = os.path.join(work, folders[one])
                if args.full:
                    gpt.save_hf(folder, model)
                else:
                    name = os.path.join(os.path.abspath(args.out), 'base') if args.prefix else base_name
                    lora.save_peft(folder, model, name, i if kind != 'class' else None)
                record = dict(label=one, base=base['sha256'], rows=int((ds.train.y == labels.index(one)).sum()), method=args.method,
                              parameters=info['parameters'], results=results)
                if kind == 'posterior':
                    record['posterior_steps'] = args.posterior_steps
                data.write_json(os.path.join(folder, 'class.json'), record)

        def keep(step, best):
            gpt.save_resume(work, args, step, best, params, opt, scaler)

        base_logprobs = val_logprobs() if kind == 'class' and len(val) else None     # before its first step a class is the base
        params, net = lora.trainables(model), gpt.wrap(model)
        opt = gpt.make_optimizer(model, lr, args.weight_decay)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        graphs = gpt.Graphs(loss_of, params.values(), scaler) if args.cuda_graphs else None
        step, best = gpt.restore(saved, params, opt, scaler) if saved and saved['work'] and os.path.normpath(work) == resumed else (0, None)
        log = gpt.Log(work, max_steps, step, {} if kind == 'pretrain' else {'class': what})
        if not step:
            keep(0, None)                                           # from here on --resume goes on

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
            print(f'\ninterrupted after step {step} of {max_steps}; go on with: python train_gen.py --resume --out {args.out}', file=sys.stderr)
            return 130
        if data.WRITES and kind == 'pretrain':
            os.remove(os.path.join(work, 'resume.pt'))
        elif data.WRITES:
            done_folder = re.sub(r'part$', 'done', work)
            with data.locked(args.out):
                os.rename(work, done_folder)
                promote(done_folder, args.out)
            data.release(work)
        gpt.meet()                                                  # the other ranks find it in place

    # --- calibration on the validation rows and the final test, on what was saved, opened as predict.py opens it ---
    model = net = opt = params = None                               # their memory is needed for the run as it is opened
    if args.pretrain:
        print(f'\nbest on validation: {-best[0]:.4f} nats per token; saved in {args.out}; try:\n  python train_cls.py --model {args.out} --data ...')
        return

    def lacking():
        """The classes that are not trained yet; run.json says so, unless the run was whole before: what worked still works."""
        with data.locked(args.out):                                 # of several processes the last one finds none
            missing = [label for label in labels if args.method != 'zero_shot' and not finished(args.out, folders[label])]
            if missing:
                whole = old['labels'] and all(finished(args.out, folders[label]) for label in old['labels'])
                data.write_json(os.path.join(args.out, 'run.json'), {**old, 'pending': vars(args)} if whole else info)
        return missing
    missing = gpt.from_rank_zero(lacking)
    if missing:
        print(f'\nsaved in {args.out}; it lacks the classes {", ".join(missing)}: train each with --class_id, or all with --resume')
        return
    if args.prefix:
        info['base']['sha256'] = gpt.base_sha256(os.path.join(args.out, 'base'))
    for name in ('parameters', 'calibration', 'likelihood_quantiles', 'results', 'pending'):
        info.pop(name, None)                                        # they come again, in this order
    if args.method != 'zero_shot':                                  # of the last phase, which another process may have run
        info['parameters'] = data.read_json(os.path.join(args.out, folders[labels[-1]], 'class.json'))['parameters']
    data.write_json(os.path.join(args.out, 'run.json'), info)
    gpt.meet()
    run = lora.open_run(args.out, args.device, args.dtype)
    val = data.tokenize(enc, ds.val.texts, cache=False)
    logits = run.logits_of(val)                                     # (N, K)
    run.tau, run.bias = fit_calibration(logits - log_prior, log_prior, ds.val.y)
    val_results, probs, pred = run_metrics(run, logits, ds.val.y, labels)
    info['calibration'] = dict(tau=run.tau, bias=dict(zip(labels, run.bias.tolist())))
    if not args.direct:
        info['likelihood_quantiles'] = np.quantile(run.nats_per_token(val, logits), np.linspace(0, 1, 101)).tolist()
    info['results'] = dict(val_accuracy=val_results['accuracy'], val_loss=val_results['nll'], val_loss_uncalibrated=val_results['uncalibrated']['nll'])
    data.write_json(os.path.join(args.out, 'run.json'), info)
    write_predictions(args.out, probs, pred, ds.val.y, labels)

    results = run_metrics(run, run.logits(ds.test.texts, progress=True, cache=True), ds.test.y, labels)[0]
    data.write_json(os.path.join(args.out, 'eval_results.json'), results)
    print(f'\nvalidation accuracy {val_results["accuracy"]:.4f}; test ({args.data}, {len(ds.test.y)} rows):\n{report(results, labels)}')
    example = re.sub(r'[^\w\s.,-]', '', ds.test.texts[0][:60])                       # safe between a shell's quotes
    print(f'\nsaved in {args.out}; try:\n  python predict.py {args.out} --explain "{example}"\n  python predict.py {args.out} --sample '
          f'"{labels[0]}"\n  python eval.py {args.out}')


if __name__ == '__main__':
    data.cli(gpt.under_torchrun(main))
