"""The folder of a generative run while it is trained: its base, its phases, where they work and
what they leave. Called by train_gen.py; `run` is what its load() returns."""

import glob
import os
import re

import torch

import lora
from lib import base, checkpoints, classes, device, fast, files, peft, ranks, rundata, runfolder
from lib.files import UserError
from lib.flags import of_adapt
from lib.training import wrap_blocks
from lib.versions import versions
from model import GPT


def recover(out):
    """Finish what a killed process began: a phase whose weights were being moved to their place."""
    if out and os.path.isdir(out) and files.WRITES:
        with files.locked(out):
            for folder in glob.glob(os.path.join(glob.escape(out), '*.done')):
                classes.promote(folder, out)


def base_model(args):
    """The base of every class: a random or small one that the run holds, or --model."""
    stored, record = (os.path.join(args.out or '', name) for name in ('base', 'run.json'))
    if args.method == 'lora' and args.out and os.path.isdir(args.out):
        with files.locked(args.out):  # the process of another class may be writing it
            if os.path.isfile(record) and os.path.isdir(stored):  # begin() wrote both
                torch.manual_seed(args.seed)
                return GPT.from_pretrained(stored, new_head=True)
    return base.build_model(args)


def begin(run, resumed):
    """Make the run folder, or take over one to resume or to add a class to. Sets run.old (its
    run.json), run.folders, run.phases, run.info (the new run.json). Adds notes to ds.notes."""
    args, ds, labels = run.args, run.ds, run.labels
    method = 'pretrain' if args.pretrain else f'gen-{args.method}'
    args.out = args.out or ranks.from_rank_zero(lambda: runfolder.free_folder(args.data, method))

    def old_run():
        if args.pretrain:
            files.claim(args.out)
        names = [n for n in ('run.json', 'resume.pt') if os.path.exists(os.path.join(args.out, n))]
        if names and not resumed and args.class_id is None:
            others = 'resume it (--resume), or train one of its classes (--class_id)'
            advice = f'name another folder, remove that one, {others}'
            raise UserError(f'--out {args.out} already holds a run; {advice}')
        found = 'run.json' in names and not args.pretrain
        return runfolder.read_run(args.out) if found else dict(labels=[], folders={})

    old = run.old = ranks.from_rank_zero(old_run)
    if lost := [label for label in old['labels'] if label not in labels]:
        problem = f'{args.data} has no rows of the class {lost[0]!r}, but {args.out} has it'
        raise UserError(f'{problem}; --data must hold all classes of the run')
    run.folders = classes.folder_names(labels, old['folders'])
    run.phases = plan_phases(run, resumed)
    with torch.device('meta'):  # checks --targets before the run has a folder
        outline = GPT(run.cfg)
        lora.adapt(outline, args.method, **of_adapt(args))
    if args.posterior_steps and args.method == 'lora' and (more := peft.extras(outline)):
        problem = f'each class trains its own {next(iter(more))}, added by an edit'
        raise UserError(f'{problem}, so --posterior_steps cannot hold all classes in one model')
    files.make_folder(args.out)
    ds.notes += classes.leaked(old, args, ds)
    if args.class_id is not None and old['labels'] and old['args']['posterior_steps']:
        text = 'the other classes were trained on to the posterior, this one is not: '
        ds.notes.append(text + '--resume --posterior_steps N does that for all')
    recorded = rundata.record(args.out, ds, resumed, [args.out])  # with its other classes

    def base_info():
        with files.locked(args.out):
            return base.base_info(args, run.cfg, run.model.state_dict())

    if 'base' in old:
        info = {**old, 'labels': labels, 'folders': run.folders, 'data': args.data}
        if not args.prefix:  # whose base changes as it trains
            base.base_of(args.out, old, args.data_dir)
    else:
        info = dict(kind='lm' if args.pretrain else 'gen', method=args.method, model=args.model)
        info.update(data=args.data, seed=args.seed, labels=[] if args.pretrain else labels)
        info.update(base=ranks.from_rank_zero(base_info), folders=run.folders)
    info.update(recorded, args=vars(args), versions=versions())
    info.update({} if args.pretrain else dict(prior=dict(zip(labels, run.prior.tolist()))))
    info.update(dict(prompts=run.prompts) if run.prompts else {})
    if 'base' not in old and not args.pretrain:  # there save_weights does, so that it has weights
        files.write_json(os.path.join(args.out, 'run.json'), info)
    run.info = info


def plan_phases(run, resumed):
    """-> the phases that are to be trained, pairs of kind and label: ('class', its label), or
    'prefix', 'pretrain' or 'posterior' and None. resumed: state of a run, which has done some."""
    args, labels = run.args, run.labels
    phases = [('class', label) for label in labels]
    if args.class_id is not None:
        k = labels.index(args.class_id) if args.class_id in labels else len(labels)
        k = int(args.class_id) if k == len(labels) and args.class_id.isdecimal() else k
        if k >= len(labels):
            known = ', '.join(f'{i} {label}' for i, label in enumerate(labels))
            raise UserError(f'--class_id {args.class_id}: no such class; {args.data} has {known}')
        phases = phases[k : k + 1]
    elif args.method not in ('lora', 'full'):
        phases = [] if args.method == 'zero_shot' else [(args.method, None)]
    phases += [('posterior', None)] if args.posterior_steps else []
    if not resumed:
        return phases
    return [p for p in phases if was_interrupted(run, resumed, *p) or not done(run, *p)]


def work_folder(run, kind, label):
    """Where a phase works; finish_phase moves what it made to its place."""
    name = run.folders[label] if kind == 'class' else kind
    return run.args.out if kind == 'pretrain' else os.path.join(run.args.out, name + '.part')


def claim(run, kind, label):
    """Make the folder of a phase, without what a killed process left in it. -> its path"""
    work = work_folder(run, kind, label)
    files.claim(work)
    for folder in ('', *run.folders.values()) if kind != 'pretrain' else ('',):
        files.remove_leftovers(os.path.join(work, folder))
    return work


def was_interrupted(run, resumed, kind, label):
    """Is `resumed` the state of this phase? (It has no `work` if no phase was interrupted.)"""
    here = os.path.normpath(work_folder(run, kind, label))
    return bool(resumed and resumed['work']) and os.path.normpath(resumed['work']) == here


def done(run, kind, label):
    """Did an interrupted run finish this phase?"""
    out, folders = run.args.out, [run.folders[n] for n in run.labels]
    if kind == 'posterior':
        return classes.had_posterior(out, folders)
    folders = [run.folders[label]] if kind == 'class' else folders
    return kind != 'pretrain' and all(classes.finished(out, folder) for folder in folders)


def build(run, kind):
    """Load the model of a phase and add what trains. -> model, its original weights, lines about
    it"""
    args, labels, wrapped = run.args, run.labels, []
    if kind == 'posterior':  # continues from the best weights of the likelihood
        stored = os.path.join(args.out, 'base')
        model = GPT.from_pretrained(stored) if args.prefix else base_model(args)
    else:  # each class starts from the base
        model, run.model = run.model or base_model(args), None
    torch.manual_seed(args.seed)  # as if this phase were trained alone
    original = model.state_dict()
    if kind == 'posterior':
        folders = [os.path.join(args.out, run.folders[label]) for label in labels]
        peft.load_peft(folders, model, len(labels), args.r)
        if args.prefix:
            model.requires_grad_(True)
    else:
        wrapped = lora.adapt(model, args.method, **of_adapt(args))
        if args.prefix:  # the vectors start as the mean embeddings of the labels
            lora.add_prompt(model, 1, classes=len(labels))
            rows = [model.wte.weight.detach()[run.enc.encode_ordinary(label)] for label in labels]
            model.prompt.data = torch.stack([row.mean(0, keepdim=True) for row in rows])
    if args.trunk_dropout:
        model.set_dropout(args.trunk_dropout)
    run.info['parameters'] = lora.count(model)
    lines = lora.describe(model, wrapped) + runfolder.notes(model, args.method)
    device.place(model, run.dev, run.dtype)
    if not args.plain:
        fast.speed_up(model, run.dev, run.dtype)
    wrap_blocks(model, args)
    model.forward = model.logprob  # what DistributedDataParallel calls
    return model, original, lines


def save_weights(run, phase, results):
    """Write the weights of a phase, the best so far."""
    if not files.WRITES:
        return
    args, model, sha256 = run.args, phase.model, run.info['base']['sha256']
    exact = {**phase.original, **lora.trained_state(model)}  # {plain name: float32 tensor}
    if phase.kind == 'pretrain':
        checkpoints.save_hf(args.out, model.cfg, exact)
        files.write_json(os.path.join(args.out, 'run.json'), {**run.info, 'results': results})
        return
    base_name = base.peft_base(args.out, run.info)
    if args.prefix:
        stored = os.path.join(phase.work, 'base')
        checkpoints.save_hf(stored, model.cfg, exact)
        base_name = os.path.join(os.path.abspath(args.out), 'base')
        sha256 = checkpoints.base_sha256(stored)
    for i, label in enumerate(phase.classes):
        folder = os.path.join(phase.work, run.folders[label])
        if args.full:
            checkpoints.save_hf(folder, model.cfg, exact)
        else:
            peft.save_peft(folder, model, base_name, None if phase.kind == 'class' else i)
        rows = int((run.ds.train.y == run.labels.index(label)).sum())
        record = dict(label=label, base=sha256, rows=rows, method=args.method)
        record.update(parameters=run.info['parameters'], results=results)
        if phase.kind == 'posterior':
            record['posterior_steps'] = args.posterior_steps
        files.write_json(os.path.join(folder, 'class.json'), record)


def finish_phase(run, phase, best):
    """Move what a phase made from its folder to its place in the run. best: its best score."""
    if files.WRITES and phase.kind == 'pretrain':
        os.remove(os.path.join(phase.work, 'resume.pt'))
    elif files.WRITES:
        finished = re.sub(r'part$', 'done', phase.work)
        with files.locked(run.args.out):
            os.rename(phase.work, finished)
            classes.promote(finished, run.args.out)
    files.release(phase.work)
    ranks.barrier()  # the other ranks find it in its place
    run.best = best


def missing(run):
    """-> labels of the classes that are not trained yet. run.json then says how to train them,
    unless the run was complete before: what worked still works."""
    out, old = run.args.out, run.old

    def untrained(labels):
        return [label for label in labels if not classes.finished(out, run.folders[label])]

    with files.locked(out):  # of several processes the last one misses none
        labels = [] if run.args.zero_shot else untrained(run.labels)
        if labels:
            complete = old['labels'] and not untrained(old['labels'])
            pending = {**old, 'pending': vars(run.args)} if complete else run.info
            files.write_json(os.path.join(out, 'run.json'), pending)
    return labels


def complete(run):
    """Bring run.json up to date before the final test, now that all classes are trained."""
    args, info = run.args, run.info
    if args.prefix:
        info['base']['sha256'] = checkpoints.base_sha256(os.path.join(args.out, 'base'))
    for name in ('parameters', 'rule', 'calibration', 'likelihood_quantiles', 'results', 'pending'):
        info.pop(name, None)  # written again, in this order
    if not args.zero_shot:  # another process may have run the last phase
        record = os.path.join(args.out, run.folders[run.labels[-1]], 'class.json')
        info['parameters'] = files.read_json(record)['parameters']
    files.write_json(os.path.join(args.out, 'run.json'), info)
    ranks.barrier()
