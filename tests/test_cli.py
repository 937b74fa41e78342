"""lib/cli.py, and the scripts as a user runs them."""

import argparse
import asyncio
import contextlib
import io
import os
import runpy
import subprocess
import sys
import threading

import torch

import data
import eval as evaluation
import lib.training
import train_cls
import train_gen
from lib import cli
from lib.cli import Parser, above_zero, exit_code, positive
from lib.files import UserError, read_json
from lib.runfolder import free_folder
from tests.helpers import (
    SCRATCH,
    TINY,
    TOP,
    Stop,
    environment,
    generate,
    over_base,
    patched,
    raises,
    records,
    script,
    tiny_run,
    tmp,
    train,
    write,
)

SCRIPTS = ('train_cls', 'train_gen', 'predict', 'eval', 'bench', 'data')


def python(*argv, **options):
    """A Python in the folder of the scripts -> what it did."""
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'cwd': TOP, **options}
    return subprocess.run([sys.executable, *argv], text=True, **options)


def test_parser():
    p = Parser()
    p.add_argument('texts', nargs='*')
    p.add_argument('--max_steps', type=positive, default=5)
    p.add_argument('--flag', action='store_true')
    p.add_argument('--lr', type=above_zero)
    a, given = p.parse(['--max-steps', '7', '--lr=1e-3', 'hello', '--', '--max-steps'])
    assert (a.max_steps, a.lr, a.texts) == (7, 1e-3, ['hello', '--max-steps']), a
    assert given == {'max_steps', 'lr', 'texts'}, given
    assert p.parse([])[1] == set() and p.parse(['--max_steps=5'])[1] == {'max_steps'}
    raises(UserError, p.parse, ['--max-stepz', '3'], match='did you mean --max_steps?')
    raises(UserError, p.parse, ['--max', '3'], match='unrecognized')
    raises(UserError, p.parse, ['--max_steps', '0'], match="'0' is not a whole number above 0")
    raises(UserError, p.parse, ['--lr', 'fast'], match='--lr')
    raises(UserError, p.parse, ['--lr', 'nan'], match='--lr')


def test_cli_exit_codes():
    start = 'from lib import cli, files\n'

    def run(code):
        done = python('-c', f'{start}def main():\n {code}\ncli.run(main)')
        return done.returncode, done.stderr.strip()

    assert run('return None') == (0, '') and run('return 3') == (3, '')
    said = run("raise files.Unavailable('no such thing; do this')")
    assert said == (2, 'error: no such thing; do this')
    assert run('raise KeyboardInterrupt') == (130, 'interrupted')
    code, err = run("raise ValueError('bug')")
    assert code == 1 and 'Traceback' in err
    read, written = os.pipe()
    os.close(read)  # nobody listens any more
    done = python('-c', start + "cli.run(lambda: print('x' * 99999))", stdout=written)
    os.close(written)
    assert (done.returncode, done.stderr) == (141, ''), done  # what was to be done is not


def test_flags_that_make_no_sense():
    for argv, match in (
        (['--r', '0'], 'above 0'),
        (['--head', '--r', '4'], '--r does nothing without --lora'),
        (['--seed', str(10**20)], 'at most 64 bits'),
        (['--device', 'meta'], '--device meta'),
        (['--lora', '--head'], 'not allowed with'),
        (['--n_layer', '2'], '--n_layer does nothing without --scratch'),
        (['--max-steps', '3', '--epochs', '1'], 'give one of them'),
        (['--batch_size', '8', '--batch_tokens', '512'], 'give one of them'),
        (['--batch_tokens', '100', *TINY], 'less than --max_length 128'),
        (['--lorra'], 'did you mean --lora'),
        (['--dropout', '1.5'], '--dropout'),
        (['--lr', 'nan'], '--lr'),
        (['--resume'], '--out'),
        (['--data', 'nowhere.csv'], 'nowhere.csv'),
        (['--targets', 'q_proj', *TINY], 'matches no layer'),
        (['--last', '99', *TINY], '--last 99'),
        (['--top', '3', *TINY], '--top 3: this model has 2 blocks'),
        (['--full', '--top', '1', *TINY], '--top does nothing without --lora'),
        (['--prompt', '300', *TINY], '--prompt 300'),
        (['--max_length', '999', *TINY], '--max_length 999'),
        (['--bottleneck', '4'], '--adapter'),
        (['--n_head', '5', *TINY[:5]], 'not a multiple'),
        (['--resume', '--out', tmp()], 'no resume.pt'),
        (['--device', 'abacus', *TINY], 'abacus'),
    ):
        resumes = '--resume' in argv
        out = [] if resumes else ['--out', os.path.join(tmp(), 'x')]
        raises(UserError, train_cls.main, argv + out, match=match)
    taken = [*TINY, '--out', tiny_run('lora')]
    raises(UserError, train_cls.main, taken, match='already holds a run')
    own = ['--data', 'demo', '--model', tmp(), '--out', tmp()]
    raises(UserError, train_cls.main, [*own[:4], '--out', own[3]], match='is the folder of --model')


def test_default_run_folder():
    """runs/DATA-METHOD in the working folder, numbered if it is taken."""
    here, folder = os.getcwd(), tmp()
    try:
        os.chdir(folder)
        for name in ('runs/demo-head', 'runs/demo-head-2', 'runs/demo-head-3'):
            code, text, _ = script(train_cls.main, [*TINY, '--head', '--max_steps', '1'])
            assert not code and os.path.isfile(os.path.join(name, 'run.json'))
            assert f'saved in {name};' in text
        assert free_folder('some/where/mine.csv', 'lora') == os.path.join('runs', 'mine-lora')
    finally:
        os.chdir(here)


def test_dash_and_underscore_are_the_same_flag():
    for flag in ('--max-steps', '--max_steps'):
        assert records(train(*TINY, '--head', flag, '2')[0])[-1]['step'] == 2


def test_steps_of_less_than_an_epoch_are_announced():
    """800 steps are 0.19 epochs of SST-2: the line that says so names the flag for more, unless
    the length was chosen."""
    rows = ''.join(f'row {i},{"ab"[i % 2]}\n' for i in range(99))
    flags = ['--data', write('rows.csv', 'text,label\n' + rows), *SCRATCH, '--head']
    flags += ['--batch_size', '1', '--log_every', '9']

    def defaults(self, argv=None, parse=Parser.parse):
        self.set_defaults(max_steps=7)
        return parse(self, argv)

    def line(*argv):
        with patched(Parser, 'parse', defaults):
            return next(x for x in train(*flags, *argv)[1].splitlines() if ' epochs' in x)

    assert '0.09 epochs' in line() and '--epochs' in line()
    assert '--epochs' not in line('--epochs', '0.1')
    assert '--epochs' not in line('--max_steps', '2')


def test_help():
    """Grouped, at most 100 columns whatever the terminal, and each default is named."""
    parsers = []

    def caught(self, *a, real=Parser.parse_intermixed_args):
        parsers.append(self)
        return real(self, *a)

    for columns in ('300', '60'):
        with environment(COLUMNS=columns), patched(Parser, 'parse_intermixed_args', caught):
            for name in SCRIPTS:
                code, text, _ = as_script(os.path.join(TOP, f'{name}.py'), '--help')
                lines = text.splitlines()
                assert not code and max(map(len, lines)) <= 100, max(lines, key=len)
                if columns == '300' and name != 'data':
                    assert max(map(len, lines)) > 90, 'no room was used'
                check_defaults(parsers.pop(), ' '.join(text.split()))


def check_defaults(parser, text):
    groups = [group for group in parser._action_groups if group._group_actions]
    assert groups[-1].title not in ('options', 'optional arguments'), 'no groups'
    for action in parser._actions[1:]:
        value, said = action.default, action.help
        if not action.option_strings or value is None or value is False or value == '':
            continue
        if said == argparse.SUPPRESS:
            continue
        if 'default' not in said:  # not one that is computed or explained
            value = f'{value:g}' if isinstance(value, float) else value
            said = ' '.join(f'{said} (default: {value})'.split())
        assert said in text, (action.dest, said)


def test_ctrl_c_while_importing():
    """Torch takes seconds to import: Ctrl-C then ends each script with one word, whatever is being
    imported."""
    # the handler is set because a shell that starts the tests in the background has SIGINT ignored
    code = """if True:
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def hook(event, args):
            if event == 'import' and args[0] == {at!r}:
                os.kill(os.getpid(), signal.SIGINT)

        sys.addaudithook(hook)
    """
    moments = [(name, 'numpy') for name in SCRIPTS if name != 'bench'] + [('bench', 'torch')]
    moments += [('predict', at) for at in ('torch', 'torch._C', 'torch.nn', 'tiktoken', 'lib.runs')]
    for name, at in moments:
        folder = os.path.dirname(write('sitecustomize.py', code.format(at=at)))
        p = python(f'{name}.py', 'x', env={**os.environ, 'PYTHONPATH': folder})
        assert (p.returncode, p.stderr) == (130, 'interrupted\n'), (name, at, p)


def as_script(path, *argv):
    """Run a script in this process, which has imported torch. -> exit code, stdout, stderr"""
    out, err = io.StringIO(), io.StringIO()
    hook, line = patched(sys, 'excepthook', sys.excepthook), patched(sys, 'argv', [path, *argv])
    with hook, line, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(path, run_name='__main__')
        except SystemExit as e:
            return e.code, out.getvalue(), err.getvalue()


def test_scripts_end_as_they_should():
    """As a user runs them: exit codes, one sentence on stderr, no traceback."""
    for name, argv, code, match in (
        ('train_cls', ['--bogus'], 2, 'error: '),
        ('eval', ['nowhere'], 2, 'nowhere'),
        ('predict', ['nowhere', 'x'], 2, 'nowhere'),
        ('data', ['nowhere'], 2, 'nowhere'),
        ('bench', ['--task', 'x'], 2, '--task'),
        ('train_cls', ['--help'], 0, None),
        ('train_gen', ['--bogus'], 2, 'error: '),
    ):
        path = os.path.join(TOP, f'{name}.py')
        ends = [as_script(path, *argv)]
        if name == 'predict':  # also in a process of its own
            p = python(path, *argv, cwd=tmp())
            ends.append((p.returncode, p.stdout, p.stderr))
        for got, _, err in ends:
            assert got == code and 'Traceback' not in err, (name, got, err)
            assert not match or match in err and len(err.strip().splitlines()) == 1, err


# --- both training scripts ---


def parser_of(parse):
    """{flag: what it accepts and what --help says of it} of a training script."""

    def catch(self, argv=None):
        names = ('default', 'help', 'choices', 'type', 'nargs', 'metavar')
        kinds = [(a.dest, [getattr(a, n) for n in names], type(a)) for a in self._actions]
        raise Stop({dest: kind for dest, *kind in kinds})

    with patched(Parser, 'parse', catch):
        try:
            parse([])
        except Stop as e:
            return e.args[0]


def test_flags_of_both_scripts_are_the_same():
    a, b = parser_of(train_cls.parse), parser_of(train_gen.parse)
    assert len(set(a) & set(b)) > 30
    for name in set(a) & set(b):
        if name in ('lora', 'full'):  # one model there, one per class here
            a[name][0][1] = b[name][0][1] = 'what it trains'
        assert a[name] == b[name], (name, a[name], b[name])


def steps_of(main, *argv):
    """What the loop of a training script does, call by call."""
    calls, restore = [], contextlib.ExitStack()

    def spy(owner, name, note):
        real = getattr(owner, name)

        def noted(*a, **k):
            out = real(*a, **k)
            if torch.is_grad_enabled():
                calls.append((name, *note(out, *a)))
            return out

        restore.enter_context(patched(owner, name, noted))

    with restore:
        spy(data, 'batches', lambda plan, *a: [[rows.tolist() for rows in plan]])
        spy(data, 'collate', lambda out, tokens, index, *a: [sorted(index.tolist())])
        spy(lib.training, 'lr_at', lambda rate, step, *a: [rate, step])
        spy(lib.training, 'seed_step', lambda out, *a: a)
        spy(lib.training, 'clip_grad_norm_', lambda norm, params, limit: [limit])
        spy(torch.optim.AdamW, 'step', lambda out, opt, *a: [g['lr'] for g in opt.param_groups])
        spy(torch.optim.AdamW, 'zero_grad', lambda out, *a: [])
        spy(torch.Tensor, 'backward', lambda out, *a: [])
        code = script(main, [*argv, '--out', os.path.join(tmp(), 'run')])[0]
    assert not code
    end = max(i for i, (name, *_) in enumerate(calls) if name == 'zero_grad')
    return calls[: end + 1]  # without the calibration of a generative run


def test_loops_of_both_scripts_take_the_same_steps():
    """The loop is written out in both scripts. On the same rows, both take the same batches, parts,
    rates, dropout seeds, clipping, backward passes and optimizer steps, in the same order, and log
    the same steps."""
    flags = over_base(*'--epochs 1.3 --batch_size 11 --grad_accum 3 --lr 1e-3 --clip 0.5'.split())
    flags += '--eval_every 4 --log_every 3 --warmup 0.3 --schedule cosine --max_length 20'.split()
    a = steps_of(train_cls.main, *flags, '--full')
    b = steps_of(train_gen.main, *flags, '--prefix')
    assert len(a) == len(b) > 50 and {name for name, *_ in a} >= {'backward', 'step', 'collate'}
    for x, y in zip(a, b):
        assert x == y
    a, b = (records(f(*flags, more)[0]) for f, more in ((train, '--full'), (generate, '--prefix')))
    assert [(r['step'], r.get('lr'), r.get('pad_share')) for r in a] == [
        (r['step'], r.get('lr'), r.get('pad_share')) for r in b
    ]


class Notebook(io.TextIOBase):
    """A stdout like that of a notebook: no reconfigure, no terminal."""

    def write(self, text):
        return len(text)


def in_thread(main, argv):
    """What main(argv) returns or raises, called as in a notebook's thread: an event loop runs, and
    there is no sys.argv."""
    box = []

    async def call():
        try:
            box.append(main(argv))
        except Exception as e:
            box.append(e)

    stdout, given = sys.stdout, sys.argv
    sys.stdout = Notebook()
    del sys.argv
    try:
        thread = threading.Thread(target=lambda: asyncio.run(call()))
        thread.start()
        thread.join()
    finally:
        sys.stdout, sys.argv = stdout, given
    assert not isinstance(box[0], Exception), box[0]
    return box[0]


def test_main_returns_results_in_a_thread():
    """The mains return what they write, in a thread and without what a notebook lacks; as a script
    they end with exit code 0."""
    for main, flags in ((train_cls.main, TINY), (train_gen.main, [*TINY, '--max_steps', '4'])):
        out = os.path.join(tmp(), 'run')
        found = in_thread(main, [*flags, '--out', out])
        assert found['out'] == out and found['test']['n'] == 100
        assert found['test'] == read_json(os.path.join(out, 'eval_results.json'))
        assert found['val'] == read_json(os.path.join(out, 'run.json'))['results']
        scored = in_thread(evaluation.main, [out])['runs'][0]
        assert scored['run'] == out and scored['confusion'] == found['test']['confusion']
    assert [exit_code(x) for x in (found, None, 0, 130)] == [0, 0, 0, 130]
    with patched(sys, 'exit', lambda code: box.append(code)):
        box = []
        cli.run(lambda: found)
    assert box == [0]
