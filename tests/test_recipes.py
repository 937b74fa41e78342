"""docs/recipes.md: each edit, applied to a copy of the project, changes what it should."""

import functools
import importlib
import json
import os
import re
import shutil
import sys
import traceback

from lib.files import read_json
from tests.helpers import TOP, needs_fork, tmp, topics

SHAPE = '--model nano --scratch --n_layer 2 --n_head 2 --n_embd 32 --dtype fp32 --seed 1'.split()
STEPS = '--max_steps 6 --batch_size 8 --lr 1e-2 --log_every 1 --eval_every 6'.split()
# recipe: (script, its flags, is the first loss that of the plain code?, class that speed_up leaves)
RUNS = {
    'The loss: label smoothing': ('train_cls', ['--full'], False, None),
    'The loss: focal': ('train_cls', ['--full'], False, None),
    'The block: attention and MLP side by side': ('train_cls', ['--full'], False, 'Block'),
    'The MLP: squared ReLU': ('train_cls', ['--full'], False, 'Block'),
    'The attention: no causal mask within the text': ('train_cls', ['--full'], False, 'Block'),
    'The head: two layers': ('train_cls', ['--lora'], False, None),
    'The pooling: the largest of each feature': ('train_cls', ['--lora'], False, 'GPT.classify'),
    'The LoRA formula: a learned scale per output': ('train_cls', ['--lora'], True, 'LoRA'),
    'The LoRA formula: scale alpha / sqrt(r)': ('train_cls', ['--lora'], True, None),
    'The optimizer: LoRA+': ('train_cls', ['--lora'], True, None),
    'The optimizer: SGD, and a schedule of torch': ('train_cls', ['--lora'], True, None),
    'The generative loss: the mean over texts instead of tokens': (
        'train_gen',
        ['--full'],
        False,
        None,
    ),
    'The data: a reader of your own': ('train_cls', ['--full', '--data', 'mine'], False, None),
}


@functools.lru_cache(None)
def recipes():
    """{title: [(file, old lines, new lines)]} of docs/recipes.md"""
    with open(os.path.join(TOP, 'docs', 'recipes.md'), encoding='utf-8') as f:
        sections = re.split('^## ', f.read(), flags=re.M)[1:]
    found = {}
    for section in sections:
        title, body = section.split('\n', 1)
        edits = found[title] = []
        for part in re.search('```diff\n(.*?)```', body, re.S)[1].split('--- ')[1:]:
            file, *lines = part.rstrip('\n').split('\n')
            old, new = (
                ''.join(f'{line[1:]}\n' for line in lines if line[:1] in kinds or not line)
                for kinds in ('- ', '+ ')
            )
            edits.append((file, old, new))
    return found


def copy_of(edits):
    """-> a folder with the edited project"""
    folder = tmp()
    for name in os.listdir(TOP):
        if name.endswith('.py'):
            shutil.copy(os.path.join(TOP, name), folder)
    shutil.copytree(
        os.path.join(TOP, 'lib'),
        os.path.join(folder, 'lib'),
        ignore=shutil.ignore_patterns('__pycache__'),
    )
    for file, old, new in edits:
        path = os.path.join(folder, file)
        with open(path, encoding='utf-8') as f:
            text = f.read()
        assert text.count(old) == 1, f'{file} has {text.count(old)} times:\n{old}'
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text.replace(old, new))
    return folder


def run_copy(folder, script, argv):
    """main(argv) of a script in a copy, in a forked process that has imported torch already.
    -> losses of its steps, results of its test, what it printed"""
    out, printed = os.path.join(folder, 'runs', 'trial'), os.path.join(folder, 'printed')
    pid = os.fork()
    if not pid:
        code = 1
        try:
            for name, module in list(sys.modules.items()):
                path = getattr(module, '__file__', None) or ''
                installed = path.startswith(sys.prefix + os.sep)  # it may lie in the clone
                if path.startswith(TOP + os.sep) and not installed:
                    del sys.modules[name]
            sys.path[:] = [folder, *(p for p in sys.path if os.path.abspath(p) != TOP)]
            os.chdir(folder)
            with open(printed, 'w', encoding='utf-8') as f:
                sys.stdout = sys.stderr = f
                importlib.import_module(script).main([*argv, '--out', out])
            code = 0
        except BaseException:
            with open(printed, 'a', encoding='utf-8') as f:
                traceback.print_exc(file=f)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    with open(printed, encoding='utf-8') as f:
        text = f.read()
    assert status == 0, text[-3000:]
    with open(os.path.join(out, 'log.jsonl'), encoding='utf-8') as f:
        losses = [row['loss'] for row in map(json.loads, f) if 'loss' in row]
    return losses, read_json(os.path.join(out, 'eval_results.json')), text


@functools.lru_cache(None)
def rows():
    return topics(sizes=(60, 60, 60))


def flags_of(title):
    _, flags, _, _ = RUNS[title]
    return [*([] if '--data' in flags else ['--data', rows()]), *SHAPE, *STEPS, *flags]


@functools.lru_cache(None)
def plain(script, flags):
    return run_copy(copy_of([]), script, flags)


def check(title):
    """The edit changes the losses, or the data; and the run is trained, saved, opened, tested."""
    needs_fork()
    script, _, same_start, slower = RUNS[title]
    argv = flags_of(title)
    losses, results, text = run_copy(copy_of(recipes()[title]), script, argv)
    left = re.search('note: no faster version of (.*?): ', text)
    assert (slower in left[1].split(', ')) if slower else not left, (title, left and left[1])
    if 'mine' in argv:
        assert results['n'] == 20 and '1' in results['per_class'], results
        return
    before = plain(script, tuple(argv))[0]
    assert len(losses) == len(before), (losses, before)
    assert (abs(losses[0] - before[0]) < 1e-6) == same_start, (title, losses[0], before[0])
    assert abs(losses[-1] - before[-1]) > 1e-5, (title, losses, before)


def test_recipes_of_losses_and_data():
    for title in [t for t in RUNS if 'loss' in t or 'data' in t]:
        check(title)


def test_recipes_of_the_model():
    for title in [t for t in RUNS if re.match('The (block|MLP|attention|head|pooling)', t)]:
        check(title)


def test_recipes_of_lora():
    for title in [t for t in RUNS if 'LoRA' in t]:
        check(title)


def test_every_recipe_is_tried():
    assert list(recipes()) == list(RUNS)


def interrupted(edits, argv):
    """-> losses of a run with these edits, stopped after step 3 and resumed; what it printed"""
    stop = '            interrupt.requested |= step == 3 and not resumed\n'
    line = '            done = step\n'
    folder = copy_of([*edits, ('train_cls.py', line, line + stop)])
    with open(os.path.join(folder, 'twice.py'), 'w', encoding='utf-8') as f:
        f.write('import train_cls\ndef main(argv):\n    assert train_cls.main(argv) == 130\n')
        f.write("    train_cls.main(['--resume', *argv[-2:]])\n")
    got, _, text = run_copy(folder, 'twice', argv)
    return got, text


def test_a_schedule_of_torch_goes_on():
    """A run with that recipe, interrupted and resumed, has the losses of one that was not."""
    needs_fork()
    title = 'The optimizer: SGD, and a schedule of torch'
    check(title)
    argv, edits = flags_of(title), recipes()[title]
    want = run_copy(copy_of(edits), 'train_cls', argv)[0]
    got, text = interrupted(edits, argv)
    assert got == want, (got, want)
    assert 'the script sets the rate, --warmup and --schedule do nothing' in text


def test_momenta_of_a_schedule_go_on():
    """OneCycleLR moves the momentum of its groups as well, and ReduceLROnPlateau has no first rate
    of theirs: a resumed run goes on from what they have set."""
    needs_fork()
    title = 'The optimizer: SGD, and a schedule of torch'
    kinds = 'torch.optim.lr_scheduler.'
    for schedule, step in (
        ('OneCycleLR(opt, max_lr=args.lr, total_steps=plan.max_steps)', 'schedule.step()'),
        ('ReduceLROnPlateau(opt, patience=0, mode="max")', 'schedule.step(-step)'),
        ('ReduceLROnPlateau(opt, patience=1, mode="max")', 'schedule.step(-step)'),
        ('ReduceLROnPlateau(opt, patience=3, mode="max")', 'schedule.step(-step)'),
    ):
        edits = [
            (file, old, re.sub(r'torch\.optim\.lr_scheduler\.Cos.*', kinds + schedule, new))
            for file, old, new in recipes()[title]
        ]
        edits = [(f, old, new.replace('schedule.step()', step)) for f, old, new in edits]
        for flags in (['--schedule', 'constant', '--warmup', '0'], ['--schedule', 'linear']):
            argv = [*flags_of(title), *flags]
            want = run_copy(copy_of(edits), 'train_cls', argv)[0]
            got = interrupted(edits, argv)[0]
            assert got == want, (schedule, flags, got, want)


def test_a_method_of_your_own():
    """docs/editing.md, *A method of your own*: a flag alone is refused, not trained as LoRA; with
    its name and rate in lib/flags.py it is trained, saved, opened and tested."""
    needs_fork()
    last = "    one_of('--full', action='store_true', help='everything')\n"
    flag = ('train_cls.py', last, last + "    one_of('--bitfit', action='store_true', help='')\n")
    names = "METHODS['cls'] = ('lora', "
    rate = 'LR = dict(lora=1e-3, '
    of_flags = [('lib/flags.py', names, names + "'bitfit', ")]
    of_flags += [('lib/flags.py', rate, rate + 'bitfit=3e-3, ')]
    old = "    elif method == 'adapter':\n"
    new = "    elif method == 'bitfit':\n        for name, p in model.named_parameters():\n"
    new += '            p.requires_grad_(p.dim() == 1)\n'
    trains = ('lora.py', old, new + old)
    argv = ['--data', rows(), *SHAPE, *STEPS, '--bitfit']
    last = "    one_of('--full', action='store_true', help='a whole model per class')\n"
    of_gen = ('train_gen.py', last, last + "    one_of('--bitfit', action='store_true', help='')\n")
    for script, edit in dict(train_cls=flag, train_gen=of_gen).items():
        try:
            run_copy(copy_of([edit]), script, argv)
            raise SystemError('not refused')
        except AssertionError as e:
            assert '--bitfit: METHODS and LR in lib/flags.py lack it' in str(e)
    folder = copy_of([flag, trains, *of_flags])
    losses, results, text = run_copy(folder, 'train_cls', argv)
    assert losses and 'training 960 of' in text, text
