"""--select and --patience: which weights are saved, and when a run ends."""

import contextlib
import os
import signal

import train_cls
import train_gen
from lib.files import UserError, read_json
from lib.resume import load_resume
from tests.helpers import (
    GEN,
    SCRATCH,
    Stop,
    generate,
    over_base,
    patched,
    raises,
    records,
    same_run,
    script,
    stop_here,
    table,
    tmp,
    train,
    write,
)

# of the evaluations after step 2, 4, ...: each score is best at another one
SCORES = dict(accuracy=[0.5, 0.9, 0.6, 0.7, 0.8, 0.8], macro_f1=[0.5, 0.6, 0.9, 0.7, 0.8, 0.8])
SCORES.update(mcc=[0.5, 0.6, 0.7, 0.9, 0.8, 0.8], nll=[0.2, 0.9, 0.9, 0.9, 0.9, 0.9])
BEST = dict(nll=2, accuracy=4, macro_f1=6, mcc=8)  # steps
ROWS = write('rows.csv', table(30))
FLAGS = ['--data', ROWS, *SCRATCH, '--head', '--dtype', 'fp32', '--batch_size', '4']
FLAGS += ['--max_steps', '12', '--eval_every', '2']


@contextlib.contextmanager
def scored(module=train_cls, first=0, calls=None, **scores):
    """Inside, evaluations have these scores instead of their own, from number `first` on."""
    real, seen = module.metrics, [] if calls is None else calls

    def metrics(*a, **k):
        i = first + len(seen)
        seen.append(1)
        given = {name: values[i] for name, values in scores.items() if i < len(values)}
        return {**real(*a, **k), **given}

    with patched(module, 'metrics', metrics):
        yield seen


def test_select():
    """Weights and run.json are those of the best evaluation by the score that was asked for."""
    for name, step in BEST.items():
        flags = [] if name == 'accuracy' else ['--select', name]  # the default
        with scored(**SCORES):
            out, text = train(*FLAGS, *flags)
        assert read_json(os.path.join(out, 'run.json'))['results']['step'] == step, name
        best = SCORES[name][step // 2 - 1]
        assert f'best on validation: {name} {best:.4f} (step {step});' in text, text
    with scored(accuracy=[0.5] * 6, nll=[0.3, 0.2, 0.2, 0.4, 0.2, 0.3]):  # a tie: the lower nll,
        out, text = train(*FLAGS)  # then the earlier
    assert read_json(os.path.join(out, 'run.json'))['results']['step'] == 4
    raises(UserError, train_cls.main, [*FLAGS, '--select', 'ece'], match='--select')


def test_patience():
    with scored(**SCORES):
        out, text = train(*FLAGS, '--patience', '2')
    rows = records(out)
    assert rows[-1]['step'] == 8 and '2 validations' in rows[-1]['stopped'], rows
    assert 'step 8/12  stopped no better score in 2 validations (--patience 2)' in text
    assert '(step 4, ended by --patience at step 8 of 12)' in text
    assert read_json(os.path.join(out, 'run.json'))['results']['step'] == 4
    with scored(**SCORES):  # never: 5 evaluations after the best one are not 6
        out, text = train(*FLAGS, '--select', 'nll', '--patience', '6')
    assert 'stopped' not in text and records(out)[-1]['step'] == 12
    with scored(**SCORES):  # an evaluation at the end that is no multiple of --eval_every
        out, text = train(*FLAGS, '--eval_every', '5', '--patience', '1')
    assert [r['step'] for r in records(out) if 'val_loss' in r] == [5, 10, 12]
    evaluates = patched(train_cls.training.Plan, 'evaluates', lambda plan, step: step != 3)
    with scored(**SCORES), evaluates:  # by an edit of the loop, after other steps
        out, text = train(*FLAGS, '--patience', '2')
    assert records(out)[-1]['step'] == 5 and '(step 2, ended by --patience' in text, text


def test_patience_and_resume():
    """A run that is interrupted or killed anywhere ends as one that was not."""
    flags = [*FLAGS, '--patience', '2']
    with scored(**SCORES):
        whole, _ = train(*flags)
    for step in (5, 7):  # Ctrl-C before the best evaluation is followed by one, by two worse ones
        out, real = os.path.join(tmp(), 'run'), train_cls.training.Log.add

        def add(self, at, *a, real=real, step=step):
            if at == step:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, at, *a)

        with scored(**SCORES) as calls, patched(train_cls.training.Log, 'add', add):
            assert script(train_cls.main, [*flags, '--out', out])[0] == 130
        with scored(first=len(calls), **SCORES):
            assert load_resume(out)['step'] == step
            script(train_cls.main, ['--resume', '--out', out])
        same_run(out, whole)
    out = os.path.join(tmp(), 'run')  # killed where it had stopped
    with scored(**SCORES), patched(train_cls, 'test', stop_here):
        raises(Stop, train_cls.main, [*flags, '--out', out])
    assert load_resume(out)['step'] == 8
    with scored(first=4, **SCORES):
        script(train_cls.main, ['--resume', '--out', out])
    same_run(out, whole)


def test_select_and_patience_of_generative_runs():
    common = over_base('--batch_size', '4', '--max_steps', '12', '--eval_every', '2')
    wanted = dict(accuracy=[0.5, 0.9, 0.6, 0.7, 0.8, 0.8], nll=[0.3, 0.4, 0.2, 0.9, 0.9, 0.9])
    for flags, step in (([], 4), (['--select', 'nll'], 6)):
        with scored(train_gen, **wanted):
            out, text = generate(*common, '--prefix', *flags, '--patience', '2')
        steps = [r['step'] for r in records(out)]
        assert steps[-1] == step + 4 and 'stopped' in records(out)[-1], records(out)
        assert 'stopped no better score in 2 validations' in text
        folder = next(f for f in os.scandir(out) if os.path.isfile(f'{f.path}/class.json'))
        assert read_json(f'{folder.path}/class.json')['results']['step'] == step
    for method in (GEN['lora'], ['--zero_shot']):
        raises(UserError, generate, *common, *method, '--select', 'nll', match='--select')
    raises(UserError, generate, *common[:4], '--zero_shot', '--patience', '2', match='--patience')
