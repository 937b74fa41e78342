"""lib/resume.py: runs that are interrupted or killed go on."""

import contextlib
import os
import shutil
import signal

import torch

import data
import lib.training
import train_cls
import train_gen
from lib.files import UserError, read_bytes, read_json
from lib.resume import load_resume, restore
from lib.runs import open_run
from tests.helpers import (
    FLAGS,
    QUICKLY,
    SHAPE,
    TINY,
    Killed,
    Stop,
    copied,
    generate,
    interrupted_at,
    joint,
    killed,
    over_base,
    patched,
    raises,
    records,
    same_run,
    script,
    stop_here,
    tmp,
    topics,
    train,
    tree,
)
from tests.kills import kill_and_resume


def test_resume_is_bitwise():
    """Interrupted (Ctrl-C) mid-epoch and mid-accumulation, then resumed: the weights of a run that
    was never interrupted."""
    typed = ['--lora', '--targets', 'c_attn,attn.c_proj,c_fc,mlp.c_proj']  # the defaults
    for method, same in (('lora', typed), ('full', [])):
        argv = [
            *TINY,
            *FLAGS[method],
            *'--max_steps 9 --grad_accum 2 --batch_size 8 --eval_every 4 --dtype fp32'.split(),
        ]
        whole, _ = train(*argv)
        out, real, calls = os.path.join(tmp(), 'run'), data.collate, []

        def interrupting(*a, **k):
            calls.append(1)
            if len(calls) == 11:  # in the first half of step 6
                os.kill(os.getpid(), signal.SIGINT)
            return real(*a, **k)

        with patched(data, 'collate', interrupting):
            code, text, err = script(train_cls.main, [*argv, '--out', out])
        assert code == 130 and '--resume --out' in err
        assert os.path.exists(os.path.join(out, 'resume.pt'))
        for other in (['--lr', '5'], ['--targets', 'c_fc']):
            flags = ['--resume', '--out', out, *other]
            raises(UserError, train_cls.main, flags, match=' '.join(other)[:9])
        train('--resume', *same, out=out)
        name = 'adapter_model.safetensors' if method == 'lora' else 'model.safetensors'
        assert read_bytes(os.path.join(out, name)) == read_bytes(os.path.join(whole, name)), method
        assert [r['step'] for r in records(out)] == [r['step'] for r in records(whole)]
        assert read_json(os.path.join(out, 'eval_results.json')) == read_json(
            os.path.join(whole, 'eval_results.json')
        )
        assert not os.path.exists(os.path.join(out, 'resume.pt'))


@contextlib.contextmanager
def interrupted_in_evaluation(number):
    """Ctrl-C in the first batch of the number-th evaluation inside. -> a list that counts the
    batches read after it"""
    real, started, after = data.collate, [], []

    def collate(tokens, index, *a, **k):
        if torch.is_grad_enabled():
            started.append('training')
        elif not started or started[-1] == 'training':
            started.append('evaluation')
            if started.count('evaluation') == number:
                os.kill(os.getpid(), signal.SIGINT)
        elif started.count('evaluation') >= number:
            after.append(len(index))
        return real(tokens, index, *a, **k)

    with patched(data, 'collate', collate):
        yield after


def test_interrupts_in_an_evaluation():
    """Ctrl-C in an evaluation ends it with its batch. Even in the last one the run stops there and
    can be resumed: it does not start the next class or the final test."""
    flags = [*TINY, *'--full --max_steps 4 --eval_every 2 --dtype fp32 --batch_size 4'.split()]
    classes = over_base('--lora', *QUICKLY)
    for main, argv, number in (
        (train_cls.main, flags, 1),
        (train_cls.main, flags, 2),
        (train_gen.main, classes, 2),
        (train_gen.main, classes, 4),
    ):
        whole, out = (os.path.join(tmp(), 'run') for _ in range(2))
        script(main, [*argv, '--out', whole])
        with interrupted_in_evaluation(number) as after:
            code, text, err = script(main, [*argv, '--out', out])
        assert code == 130 and f'--resume --out {out}' in err, (argv, number, code, err)
        assert not os.path.exists(os.path.join(out, 'eval_results.json'))
        assert not after, 'the evaluation went on'
        assert not script(main, ['--resume', '--out', out])[0]
        same_run(out, whole)


def test_gen_resume_is_bitwise():
    """Interrupted in the second class, in the posterior phase, in a run of one phase; each forward
    pass is half a step."""
    halves = [*QUICKLY, '--grad_accum', '2']
    others = [*QUICKLY[:-2], '--grad_accum', '2']  # without --r
    for argv, calls in (
        (['--lora', *halves], (3, 13)),
        (['--lora', *halves, '--posterior_steps', '4'], (21,)),
        (['--full', *others], (13,)),
        (['--prefix', *others, '--posterior_steps', '4'], (7, 19)),
        (['--pretrain', *others], (7,)),
    ):
        whole = generate(*over_base(*argv))[0]
        for call in calls:
            out = os.path.join(tmp(), 'run')
            with interrupted_at(call):
                code, text, err = script(train_gen.main, [*over_base(*argv), '--out', out])
            assert code == 130 and f'--resume --out {out}' in err, (argv, code, err)
            assert [at for at in tree(out) if at.endswith('resume.pt')] != []
            raises(UserError, train_gen.main, ['--resume', '--out', out, '--lr', '5'], match='--lr')
            raises(
                UserError,
                train_gen.main,
                [*over_base(*argv), '--out', out],
                match='already holds a run',
            )
            generate('--resume', out=out)
            same_run(out, whole)
            assert read_json(os.path.join(out, 'run.json'))['args']['lr'] == 1e-2


def test_gen_resume_while_a_class_is_added():
    out, whole = copied(joint()), copied(joint())
    argv = ['--data', topics(('colours', 'numbers', 'animals')), '--class_id', 'colours']
    generate(*argv, out=whole)
    with interrupted_at(2):
        assert script(train_gen.main, [*argv, '--out', out])[0] == 130
    assert open_run(out, 'cpu', 'fp32').labels == ['animals', 'numbers']  # it works meanwhile
    generate('--resume', out=out)
    same_run(out, whole)
    assert open_run(out, 'cpu', 'fp32').labels == ['animals', 'colours', 'numbers']


def test_gen_promote_survives_a_kill():
    """Killed before any of the renames that move the result of a phase to its place, then resumed:
    the same run."""
    for method in ('--lora', '--prefix'):
        argv = over_base(
            method, *'--max_steps 2 --batch_size 4 --lr 1e-2 --posterior_steps 1'.split()
        )
        whole, calls = generate(*argv)[0], 0
        while True:
            out = os.path.join(tmp(), 'run')
            try:
                with killed(os, 'rename', calls + 1):
                    script(train_gen.main, [*argv, '--out', out])
                break  # there is no such rename any more
            except Killed:
                calls += 1
            generate('--resume', out=out)
            same_run(out, whole)
        assert calls >= 4, calls


def test_gen_promote_of_the_log_survives_a_kill():
    """Killed while log lines are moved or the emptied folder is removed, then resumed: each line
    appears once."""
    argv = over_base(*QUICKLY)
    for owner, name, call, after in (
        (os, 'remove', 1, False),
        (os, 'remove', 1, True),
        (os, 'remove', 2, True),
        (shutil, 'rmtree', 1, False),
        (shutil, 'rmtree', 2, False),
    ):
        out = os.path.join(tmp(), 'run')
        with killed(owner, name, call, after), contextlib.suppress(Killed):
            script(train_gen.main, [*argv, '--out', out])
            raise AssertionError(f'{name} was not called {call} times')
        generate('--resume', out=out)
        same_run(out, joint())


def test_killed_before_the_first_step():
    """A run can be resumed from the moment it has its folder."""
    for main, flags, work in (
        (train_cls.main, [*TINY, '--max_steps', '2'], ''),
        (train_gen.main, ['--data', topics(), *SHAPE, '--max_steps', '4'], 'animals.part'),
    ):
        out = os.path.join(tmp(), 'run')
        with patched(lib.training, 'seed_step', stop_here):
            raises(Stop, main, [*flags, '--out', out])
        assert load_resume(os.path.join(out, work))['step'] == 0
        assert not script(main, ['--resume', '--out', out])[0]
        assert os.path.isfile(os.path.join(out, 'eval_results.json'))


def test_resume_state_is_checked():
    """Found by the fuzz: an optimizer state that is a list, or of impossible steps, is one sentence
    and not a crash in the next step."""
    layer = torch.nn.Linear(2, 2)
    params = dict(layer.named_parameters())
    for change in (
        [],
        dict(step=torch.tensor(-1.0)),
        dict(step=torch.tensor(99.0)),
        dict(exp_avg=torch.zeros(3)),
    ):
        opt, scaler = torch.optim.AdamW(params.values()), torch.amp.GradScaler('cpu', enabled=False)
        sum(p.sum() for p in params.values()).backward()
        opt.step()
        state = opt.state_dict()['state']
        saved = dict(
            step=1,
            best=None,
            params={n: p.detach() for n, p in params.items()},
            opt=dict(state=state),
            scaler=scaler.state_dict(),
            more=[],
        )
        assert restore(saved, layer, torch.optim.AdamW(params.values()), scaler) == (1, None)
        state[0] = {**state[0], **change} if change else change
        raises(
            UserError,
            restore,
            saved,
            layer,
            torch.optim.AdamW(params.values()),
            scaler,
            match='resume.pt',
        )


def test_killed_runs_end_the_same():
    """kill -9 anywhere, then --resume: bitwise the run that was never killed."""
    for name in ('train_cls lora', 'train_cls full', 'train_gen --lora --posterior_steps 4'):
        assert kill_and_resume(name, 1, seed=0) > 0


def test_several_interrupted_classes():
    """Several processes with a class each are killed: every --resume finishes one class, the last
    one the run."""
    out, flags = os.path.join(tmp(), 'run'), ['--data', topics(), *SHAPE, '--max_steps', '4']
    for k in '01':
        with patched(lib.training, 'seed_step', stop_here):
            raises(Stop, train_gen.main, [*flags, '--class_id', k, '--out', out])
    assert {'animals.part', 'numbers.part'} <= set(os.listdir(out))
    for there in ({'animals', 'numbers.part'}, {'animals', 'numbers', 'eval_results.json'}):
        generate('--resume', out=out)
        assert there <= set(os.listdir(out)), os.listdir(out)
    assert open_run(out, 'cpu', 'fp32').logits(['cat']).shape == (1, 2)


def test_targets_with_spaces_are_those_of_the_run():
    out = os.path.join(tmp(), 'run')
    flags = [*TINY, '--max_steps', '2', '--targets', 'c_attn, mlp.c_proj', '--out', out]
    with patched(train_cls, 'test', stop_here):
        raises(Stop, train_cls.main, flags)
    assert not script(train_cls.main, [*flags, '--resume'])[0]
    again = train('--init', out, *TINY[:2], '--quick', *flags[-6:-2])[0]
    assert open_run(again).info['args']['targets'] == ['c_attn', 'mlp.c_proj']
