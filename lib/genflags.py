"""Flags of train_gen.py: which need which, and those that come from a run that exists (--resume,
and --class_id with its --out). Called by train_gen.py."""

from lib import flags, runfolder
from lib.classes import had_posterior
from lib.files import UserError
from lib.resume import interrupted_in, load_resume

POSTERIOR = ('posterior_steps', 'likelihood_share', 'posterior_lr')
ALIKE = ('model', 'scratch', 'n_layer', 'n_head', 'n_embd', 'block_size', 'max_length', 'keep')
ALIKE += ('r', 'alpha', 'targets', 'top')  # all classes of a run have the same


def needs(args):
    """-> what check_flags needs to know of the flags of train_gen.py"""
    trains, joint = args.method != 'zero_shot', args.method in ('lora', 'prefix')
    found = dict.fromkeys(('prompts', 'direct'), ('--zero_shot', not trains))
    found.update(dict.fromkeys(POSTERIOR[1:], ('--posterior_steps', args.posterior_steps)))
    text = '--lora or --prefix, the methods that hold all classes in one model'
    found['posterior_steps'] = (text, joint)
    text = '--lora or --full, the methods that train a class alone'
    found['class_id'] = (text, args.method in ('lora', 'full'))
    text = '--prefix or --posterior_steps: classes and pretraining have scores of their own'
    found['select'] = (text, args.prefix or args.posterior_steps)
    found['prior'] = ('classes', args.method != 'pretrain')
    of_training = """max_steps epochs batch_size batch_tokens grad_accum lr weight_decay warmup
    schedule clip trunk_dropout patience eval_every log_every compile cuda_graphs
    gradient_checkpointing""".split()
    found['seed'] = ('training or --scratch', trains or args.scratch)
    text = 'training, and --zero_shot has none'
    found.update(dict.fromkeys(of_training, (text, trains)))
    return found


def resume(args, given):
    """What parse returns, of the interrupted run in --out; without a resume.pt of a run that lacks
    classes or its final test."""
    if not args.out:
        raise UserError('--resume needs --out, the folder of the run to resume')
    if work := interrupted_in(args.out):
        saved = load_resume(work)
        return flags.resumed(args, given, saved['args']), set(), {**saved, 'work': work}
    info = runfolder.read_run(args.out)
    if info['kind'] != 'gen':
        raise UserError(f'{args.out} was trained by train_cls.py; resume it with that')
    later = given & {*POSTERIOR}  # a finished run may continue with the posterior
    if later and info['method'] not in ('lora', 'prefix'):
        method = f'{args.out} is one of --{info["method"]}'
        raise UserError(f'--posterior_steps needs a run of --lora or --prefix, and {method}')
    if later and had_posterior(args.out, list(info['folders'].values())):
        raise UserError(f'{args.out} has had its posterior steps; they are not repeated')
    if later and not (args.posterior_steps or info['args'].get('posterior_steps')):
        raise UserError(f'--{min(later)} does nothing without --posterior_steps')
    old = {**info.get('pending', info['args']), **{name: getattr(args, name) for name in later}}
    return flags.resumed(args, given - later, {**old, 'class_id': None}), set(), dict(work=None)


def inherit(args, given):
    """--class_id on an existing run: flags that were not typed are those of the run; those that all
    its classes share must be the same."""
    info = runfolder.read_run(args.out)
    if info['kind'] != 'gen' or info['method'] not in ('lora', 'full'):
        why = 'is no generative run of --lora or --full, so it has no class that can be trained'
        raise UserError(f'--class_id: {args.out} {why} alone')
    if given & {'lora', 'full'} and args.method != info['method']:
        method = f'{args.out} was trained with --{info["method"]}'
        raise UserError(f'--{args.method}: {method}; its classes must be alike')
    old = info.get('pending', info['args'])
    flags.check_saved(args, old, f'{args.out}/run.json', 'restore the file, or train again')
    for name, value in old.items():
        if name in ('class_id', 'resume', 'out', 'posterior_steps', 'posterior_lr'):
            continue
        if name not in given:
            setattr(args, name, value)
        elif name in ALIKE and getattr(args, name) != value:
            others = f'the other classes of {args.out} have {value}'
            raise UserError(f'--{name} {getattr(args, name)}: {others}, and all must be alike')
    given.update(('data', 'model'))  # those of the run, not the defaults
    if 'max_steps' in given:
        args.epochs = None
    if 'batch_size' in given:
        args.batch_tokens = None
