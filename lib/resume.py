"""resume.pt, the state from which an interrupted run goes on. Called by both train scripts,
lib/genflags.py and lib/repeat.py."""

import glob
import os

import numpy as np
import torch

from lib import files
from lib.files import UserError
from lib.tensors import learned, load_pickle


def save_resume(out, args, step, best, model, opt, scaler, *more, due=False):
    """Write out/resume.pt: all that the rest of the run depends on, in types that weights_only
    loads. more: what else an edit has with a state_dict(), such as schedulers. due: the evaluation
    after this step is still to be done. Batches and dropout are pure functions of seed and step,
    and the best weights are in the run folder already. Step 0 has nothing but the flags."""
    best = best and tuple(np.array(x).item() for x in best)  # of an edit they may be numpy's
    state = dict(args=dict(vars(args)), step=step, best=best, due=due)
    if step:
        state.update(params=learned(model), opt=opt.state_dict(), scaler=scaler.state_dict())
        state.update(more=[x.state_dict() for x in more])
    files.write_atomic(os.path.join(out, 'resume.pt'), lambda f: torch.save(state, f))


def interrupted_in(out):
    """-> the folder in `out` that has a resume.pt, the first of several classes', or None"""
    inside = glob.escape(out)
    states = glob.glob(os.path.join(inside, '*.part', 'resume.pt'))
    states += glob.glob(os.path.join(inside, 'resume.pt'))
    return os.path.dirname(min(states)) if states else None


def load_resume(out):
    """-> what save_resume wrote"""
    if not out:
        raise UserError('--resume needs --out, the folder of the run to resume')
    path = os.path.join(out, 'resume.pt')
    if not os.path.isfile(path):
        raise UserError(f'--resume: {out} holds no interrupted run (no resume.pt)')
    saved = load_pickle(path, 'remove it and start the run again', mapped=False)
    saved = saved if isinstance(saved, dict) else {}
    step = saved.get('step')
    known = isinstance(saved.get('args'), dict) and type(saved.get('due')) is bool
    if not known or type(step) is not int or step < 0:
        raise UserError(f'{path} was not written by a training script; remove it and start again')
    return saved


def restore(saved, model, opt, scaler, *more):
    """Put a saved state back. -> (steps done, best score so far)"""
    try:
        if saved['step']:
            for n, t in learned(model).items():
                t.copy_(saved['params'][n])
            groups = opt.state_dict()['param_groups']  # these settings come from the flags
            for group, old in zip(groups, saved['opt'].get('param_groups', ())):
                own = old['lr'] != old.get('planned', old['lr'])  # see Plan.steps
                if own or 'initial_lr' in {**group, **old}:  # but what the script set goes on
                    group.update({**old, 'params': group['params']})
            opt.load_state_dict(dict(state=saved['opt']['state'], param_groups=groups))
            for p, state in opt.state.items() if type(opt) is torch.optim.AdamW else ():
                shapes = dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape)
                if any(state[k].shape != shape for k, shape in shapes.items()):
                    raise ValueError('a state of another shape')
                if not 0 <= float(state['step']) <= saved['step']:  # float16 skips steps
                    raise ValueError('a state of other steps')
            scaler.load_state_dict(saved['scaler'])
            if len(more) != len(saved['more']):
                raise ValueError('a state of other objects')
            for x, state in zip(more, saved['more']):
                x.load_state_dict(state)
        if saved['best'] is not None and not all(type(v) in (int, float) for v in [*saved['best']]):
            raise ValueError('a score that is no number')
        return saved['step'], saved['best']
    except Exception as e:  # torch raises half a dozen types for what does not fit
        what = f'resume.pt does not fit this run ({type(e).__name__})'
        raise UserError(f'{what}; remove it and start the run again') from None
