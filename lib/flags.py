"""The flags that both training scripts share, one function per group, and what is checked of them.
Called by all scripts and the rooms that read the flags of a run."""

import argparse
import os
import textwrap

from lib import cli
from lib.cli import above_zero, absolute, group, not_negative, positive, seed, share
from lib.download import SHORT
from lib.files import Unavailable, UserError
from lib.textfiles import is_separator

METHODS = dict(gen=('lora', 'full', 'prefix', 'zero_shot'))
METHODS['cls'] = ('lora', 'head', 'last', 'full', 'adapter', 'prompt')
ALL_METHODS = (*METHODS['cls'], *METHODS['gen'], 'pretrain')
SELECT = ('accuracy', 'macro_f1', 'nll', 'mcc')  # names of metrics()
POOLS = ('last', 'first', 'mean', 'pad')  # of GPT.pool
TRAINING_DTYPES = ('auto', 'bf16', 'fp16', 'fp32')
DTYPES = (*TRAINING_DTYPES, 'int8')  # of eval.py and predict.py
# where published recipes for pretrained GPT-2 start; random weights need larger steps
LR = dict(lora=1e-3, head=1e-3, last=1e-4, full=3e-5, adapter=1e-3, prompt=3e-2)
LR.update(prefix=3e-5, pretrain=3e-5)
LR_SCRATCH, LR_NANO = 3e-4, dict(cls=3e-3, gen=6e-3)  # nano: LoRA on the demo's small model
STEPS, STEPS_NANO = 800, dict(cls=300, gen=600)  # nano: LoRA on it, where more gain little
# every matrix of a block: better than attention alone at the same number of parameters
TARGETS = 'c_attn,attn.c_proj,c_fc,mlp.c_proj'


def model_name(text):
    """A type for Parser: openai-community/gpt2 is gpt2, unless it is a folder."""
    return os.path.abspath(text) if os.path.isdir(text) else SHORT.get(text, text)


def training_dtype(text):
    """A type for Parser: a precision that has gradients."""
    if text == 'int8':
        advice = 'train in another precision, then use eval.py or predict.py --dtype int8'
        raise argparse.ArgumentTypeError(f'int8 has no gradients; {advice}')
    if text not in TRAINING_DTYPES:
        known = ', '.join(TRAINING_DTYPES)
        raise argparse.ArgumentTypeError(f'invalid choice: {text!r} (choose from {known})')
    return text


def separator(text):
    """A type for Parser: one character, or its name."""
    sep = {'tab': '\t', '\\t': '\t'}.get(text, text)
    if is_separator(sep):
        return sep
    raise argparse.ArgumentTypeError(f'{text!r} is not one character, or tab')


def names(text):
    """A type for Parser: a list, comma-separated."""
    return [name.strip() for name in text.split(',')]


def table_flags(add, of='your own data', labels=True):
    """How a user's files are read: the fields of tables.Format. labels: also of label columns."""
    text = f'text column or key of {of} (default: guessed); title,body joins two'
    add('--text_col', text, metavar='NAME')
    if labels:
        add('--label_col', f'label column or key of {of} (default: guessed)', metavar='NAME')
        add('--drop_unlabelled', 'leave out rows without a label', bool)
    text = f'separator of {of}: a character, or tab (default: found)'
    add('--sep', text, separator, metavar='CHAR')
    add('--encoding', f'of {of}, for example cp1252 (default: UTF-8)', metavar='NAME')


def data_flags(p, readers, named):
    """readers: names of data sets.  named: the type of --data (data.named)."""
    add = group(p, 'data')
    text = f'{", ".join(readers)}, a .csv, .tsv or .jsonl file (also .gz), or a folder of train.*'
    add('--data', text, named, 'sst2', 'NAME')
    add('--val', 'validation rows (default: held out from --data)', absolute, metavar='FILE')
    add('--test', 'test rows (default: those of --data, or held out)', absolute, metavar='FILE')
    table_flags(add)
    add('--max_length', 'cut texts to N tokens; SST-2 has at most 65', positive, 128)
    add('--keep', 'which tokens of a longer text to keep', ('first', 'last'), 'first')
    text = 'train on at most N rows per class, picked with --split_seed (default: all)'
    add('--max_samples', text, positive)
    add('--balance', 'drop rows until all classes are as small as the smallest', bool)
    text = 'random seed for the choice of rows: held-out splits, --max_samples, --balance, --quick'
    add('--split_seed', text, int, 1337)
    text = 'search here before the cache and the network (default: $NANOCLS_DATA)'
    add('--data_dir', text, absolute, metavar='DIR')


def model_flags(p):
    """-> function that adds another flag to this group, as in group()"""
    add = group(p, 'model')
    text = 'gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, nano (for the demo), or a folder '
    add('--model', text + 'with a GPT-2 checkpoint', model_name, 'gpt2', 'NAME')
    add('--scratch', 'random weights in the shape of --model', bool)
    add('--n_layer', 'blocks, with --scratch (default: of --model)', positive)
    add('--n_head', 'attention heads per block, with --scratch (default: of --model)', positive)
    add('--n_embd', 'width, with --scratch (default: of --model)', positive)
    add('--block_size', 'positions (tokens), with --scratch (default: of --model)', positive)
    return add


def lora_flags(p):
    add = group(p, 'LoRA')
    add('--r', 'rank of the updates', positive, 8)
    add('--alpha', 'scale the updates by alpha / r', above_zero, 16.0)
    add('--dropout', 'dropout on the inputs of the updates', share, 0.05)
    add('--targets', 'layers to update, comma-separated', names, TARGETS, 'NAMES')
    add('--top', 'update the last N blocks only (default: all)', positive)


def optim_flags(p):
    """-> function that adds another flag to this group, as in group()"""
    add = group(p, 'optimization')
    text = f'optimizer steps, of all classes together in train_gen.py; {STEPS} are 0.19 epochs of '
    text += f'SST-2 (default: {STEPS}; LoRA on nano: {STEPS_NANO["cls"]}, in train_gen.py '
    text += f'{STEPS_NANO["gen"]})'
    add('--max_steps', text, positive)
    add('--epochs', 'epochs over the training rows, instead of --max_steps', above_zero)
    add('--batch_size', 'rows per forward pass', positive, 16)
    text = 'instead of --batch_size: as many rows as fit N tokens, padding included'
    add('--batch_tokens', text, positive)
    add('--grad_accum', 'forward passes per step: batch_size x grad_accum rows', positive, 1)
    rates = ', '.join(f'{method} {rate:g}' for method, rate in LR.items())
    rates += f', --scratch {LR_SCRATCH:g}, LoRA on nano {LR_NANO["cls"]:g}, in train_gen.py '
    add('--lr', f'peak learning rate (default: {rates}{LR_NANO["gen"]:g})', above_zero)
    add('--weight_decay', 'AdamW weight decay (matrices only, no embeddings)', not_negative, 0.01)
    add('--warmup', 'fraction of the steps in which the learning rate rises', share, 0.06)
    add('--schedule', 'learning rate after the warmup', ('linear', 'cosine', 'constant'), 'linear')
    add('--clip', 'max gradient norm (0 = off)', not_negative, 1.0)
    add('--trunk_dropout', "GPT-2's own dropout: embedding, attention, residual", share, 0.0)
    text = 'validation score that chooses the weights to save; ties: the lower nll'
    add('--select', text, SELECT, 'accuracy')
    text = 'stop after N validations in a row without a better --select score (default: never)'
    add('--patience', text, positive)
    return add


def system_flags(p):
    add = group(p, 'system')
    add('--device', 'auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps', str, 'auto', 'NAME')
    text = 'matmul precision; auto: the faster of bf16 and fp32 (LoRA on nano: fp32)'
    add('--dtype', text, training_dtype, 'auto', f'{{{",".join(TRAINING_DTYPES)}}}')
    add('--compile', 'torch.compile the model', bool)
    add('--cuda_graphs', 'replay a graph per batch shape; single GPU, not benchmarked yet', bool)
    add('--gradient_checkpointing', 'recompute blocks in backward: less memory, more time', bool)
    add('--plain', 'run the plain model, without lib/fast.py and caches', bool)
    add('--seed', 'random seed for order, init and dropout', seed, 1337)
    text = 'train N runs, with the seeds S, S + 1, ... of --seed S, into OUT-seedS, ...'
    add('--seeds', text, positive, 1)
    add('--out', 'run folder (default: runs/DATA-METHOD, numbered if taken)', metavar='DIR')
    add('--resume', 'resume the interrupted run in --out with its own flags', bool)
    add('--eval_every', 'steps between validations (default: a quarter of the run)', positive)
    text = 'validate on N rows of the validation split, stratified (default: all)'
    add('--eval_samples', text, positive)
    add('--log_every', 'steps between log lines', positive, 20)
    add('--quick', 'a trial: 100 rows per class of each split, one epoch', bool)


def opening_flags(p):
    """Flags of eval.py and predict.py."""
    add = group(p, 'how runs are opened and texts read')
    add('--data_dir', "search here before the cache (default: the run's)", metavar='DIR')
    text = 'the base model, if it was moved (default: where the run found it)'
    add('--base', text, cli.folder, metavar='DIR')
    add('--device', 'auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps', str, 'auto', 'NAME')
    text = 'matmul precision; auto: the faster of bf16 and fp32, of eval.py fp32 if tested in it'
    add('--dtype', text, DTYPES, 'auto')
    add('--plain', 'run the plain model, without lib/fast.py', bool)
    text = 'read long texts whole, in overlapping windows (default: --max_length tokens of them)'
    add('--windows', text, bool)
    text = "of a generative run: calibrated probabilities, or Bayes' rule (default: the run's own)"
    add('--rule', text, ('calibrated', 'bayes'))


def fold_flags(p):
    add = group(p, 'cross-validation')
    text = 'K runs in --out, each on all but a K-th of the training rows, and suspects.csv'
    add('--folds', text, cli.several)
    p.add_argument('--fold', type=int, help=argparse.SUPPRESS)  # 0 = first: one run of --folds


def check_flags(args, given, needs):
    """Refuse flags that would do nothing, then fill in the defaults that depend on others. given:
    names that were typed; needs: {name: (flag without which it does nothing, is that flag there?)},
    in addition to what holds for both scripts."""
    lora, scratch = ('--lora', args.method == 'lora'), ('--scratch', args.scratch)
    both = dict.fromkeys('r alpha dropout targets top'.split(), lora)
    both.update(dict.fromkeys('n_layer n_head n_embd block_size'.split(), scratch))
    tests = args.method not in ('zero_shot', 'pretrain') and getattr(args, 'class_id', None) is None
    both['seeds'] = ('training that ends with a test', tests)
    both['folds'] = ('a single seed (--seeds 1)', args.seeds == 1)
    for name, (flag, present) in {**both, **needs}.items():
        if name in given and not present:
            raise UserError(f'--{name} does nothing without {flag}')
    if args.out and os.path.realpath(args.out) == os.path.realpath(args.model):
        raise UserError(f'--out {args.out} is the folder of --model; name another one')
    if {'max_steps', 'epochs'} <= given:
        raise UserError('--max_steps and --epochs both set the length of the run; give one of them')
    if {'batch_size', 'batch_tokens'} <= given:
        raise UserError('--batch_size and --batch_tokens both set the batch; give one of them')
    if args.batch_tokens:
        args.batch_size = None
        if args.batch_tokens < args.max_length:
            why = f'--max_length {args.max_length}: a text of that length would not fit'
            raise UserError(f'--batch_tokens {args.batch_tokens} is less than {why}')
    if args.quick:
        args.max_samples = args.max_samples or 100
        args.epochs = args.epochs or (None if 'max_steps' in given else 1.0)
    if args.data == 'demo' and 'model' not in given:
        args.model = 'nano'
    if args.model == 'nano' and 'data' not in given:
        args.data = 'demo'
    set_defaults(args)


def set_defaults(args):
    """Defaults of --lr, --max_steps and --dtype, which depend on the other flags."""
    nano = (args.model, args.method, args.scratch) == ('nano', 'lora', False)
    if nano and args.dtype == 'auto':  # matrices this small gain less than the casts take
        args.dtype = 'fp32'
    script = 'gen' if hasattr(args, 'pretrain') else 'cls'
    rate = LR_SCRATCH if args.scratch else LR_NANO[script] if nano else LR.get(args.method)
    if args.method not in ALL_METHODS or not (args.lr or rate or args.method == 'zero_shot'):
        raise UserError(f'--{args.method}: METHODS and LR in lib/flags.py lack it')
    args.lr = args.lr or rate
    args.max_steps = args.max_steps or (STEPS_NANO[script] if nano else STEPS)


def of_adapt(args):
    """The flags that are arguments of lora.adapt."""
    names = ('r', 'alpha', 'dropout', 'targets', 'top', 'last', 'bottleneck', 'prompt')
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def check_saved(args, saved, path, advice):
    """Raise UserError if a flag in `saved`, read from the file or run `path`, is of a type that the
    parsed flags `args` cannot have."""

    def fits(name, value):
        mine = getattr(args, name, None)
        if name == 'method':
            return value in ALL_METHODS
        if name == 'targets':
            return isinstance(value, list) and all(isinstance(t, str) for t in value)
        kinds = (str, int, float) if mine is None else type(mine)
        return value is None or isinstance(value, (int, float) if kinds in (int, float) else kinds)

    if strange := next((n for n, v in saved.items() if not fits(n, v)), None):
        raise UserError(f'{path} is damaged: its flag --{strange} is malformed; {advice}')


def resumed(args, given, saved):
    """-> the flags `saved` of an interrupted run, its folder named as now. Refuses a flag that was
    typed and differs."""
    if missing := [name for name in vars(args) if name not in saved]:
        text = f'was not started by this script and version (its flags lack --{missing[0]})'
        raise UserError(f'{args.out} {text}; resume with the one that did')
    check_saved(args, saved, args.out, 'start the run again')
    saved_as = {**saved, 'lora': saved['method'] == 'lora'}  # typed or not
    for name in sorted(given - {'resume', 'out'}):
        if getattr(args, name) != saved_as[name]:
            text = f"differs from the interrupted run's {saved_as[name]}"
            raise UserError(f'--{name} {getattr(args, name)} {text}; a resumed run keeps its flags')
    return argparse.Namespace(**{**saved, 'out': args.out})


def or_demo(get, args, given, insist):
    """-> get(). If what it needs cannot be downloaded and the user named neither data nor model,
    falls back to the demo and says so in a box."""
    try:
        return get()
    except Unavailable as e:
        if insist or given & {'data', 'model'}:
            raise
        text = f'{e}. This run uses the built-in demo instead: synthetic sentences, and `nano`, a '
        text += 'small language model trained on them. To insist on yours, name --data or --model.'
        text = textwrap.fill(text, 99, initial_indent='| ', subsequent_indent='| ')
        print(line := f'+{"-" * 98}', text, line, sep='\n', flush=True)
    args.data, args.model = 'demo', 'nano'
    for name in {'lr', 'max_steps'} - given:
        setattr(args, name, None)
    set_defaults(args)
    return get()
