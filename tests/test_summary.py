"""lib/summary.py: the commands that a run suggests, pasted into a shell; and what else it says."""

import os
import subprocess

import eval as evaluation
import lib.download
import lib.interrupt
import predict
import train_cls
import train_gen
from lib import summary
from lib.checkpoints import model_folder
from lib.download import HUB_NAMES
from lib.files import UserError
from lib.flags import model_name
from lib.report import counted
from tests.helpers import (
    SCRATCH,
    TOP,
    copied,
    gen_run,
    generate,
    patched,
    raises,
    script,
    tmp,
    train,
    write,
)

MAIN = dict(predict=predict.main, eval=evaluation.main)
MAIN.update(train_cls=train_cls.main, train_gen=train_gen.main)
WORDS = """it's "$HOME" `ls` \\n *.py; exit 1 && !! <b> #"""


def pasted(line, cwd=TOP):
    """What a shell passes to python for that line."""
    shim = write('python', '#!/bin/sh\nprintf "%s\\0" "$@"\n')
    os.chmod(shim, 0o755)
    env = dict(os.environ, PATH=os.path.dirname(shim) + os.pathsep + os.environ['PATH'])
    p = subprocess.run(['sh', '-c', line], env=env, cwd=cwd, capture_output=True, text=True)
    assert p.returncode == 0 and not p.stderr, (line, p)
    return p.stdout.split('\0')[:-1]


def run_pasted(text, start='  python '):
    """Run each line of `text` that suggests a command. -> [(words, what it printed)]"""
    ran = []
    for line in text.splitlines():
        if line.startswith(start):
            name, *words = pasted(line)
            code, out, err = script(MAIN[os.path.basename(name)[:-3]], words)
            assert not code, (line, out, err)
            ran.append((words, out))
    return ran


def hard_rows():
    """Labels and texts that a shell would take for something else."""
    rows = ''.join(
        f'"- {WORDS.replace(chr(34), chr(34) * 2)} {i}",{"-ab"[i % 2]}\n' for i in range(60)
    )
    return write('rows.csv', 'text,label\n' + rows.replace(',a', ",it's"))


def test_suggested_commands_work_when_pasted():
    tiny = ['--data', hard_rows(), *SCRATCH, '--max_steps', '1', '--max_length', '20']
    out = os.path.join(tmp(), 'my run\'s $HOME; "x"')
    _, text = train(*tiny, '--head', out=out)
    (words, answer), _ = run_pasted(text)
    assert words[:2] == [out, '--'] and words[2].startswith('- it\'s "$HOME"'), words
    assert words[2] in answer
    out += ' gen'
    _, text = generate(*tiny, '--lora', out=out)
    ran = run_pasted(text)
    assert len(ran) == 3 and ran[1][0][1].startswith('--sample=-'), ran
    out += ' lm'
    _, text = generate(*tiny, '--pretrain', out=out)
    line = next(line for line in text.splitlines() if 'train_cls.py' in line)
    assert pasted(line)[1:] == ['--model', out, '--data', tiny[1]], line


def test_resume_command_works_when_pasted():
    out, here = os.path.join(tmp(), "it's a $run"), os.getcwd()
    for where in (TOP, '/'):  # from another folder the script is named in full
        try:
            os.chdir(where)
            said = script(lambda _: lib.interrupt.interrupted('train_cls.py', out, 3, 9), [])[2]
        finally:
            os.chdir(here)
        words = pasted(said[said.index('python ') :].strip(), where)
        assert words[1:] == ['--resume', '--out', out]
        assert os.path.isfile(os.path.join(where, words[0])), words


def test_command_in_an_error_works_when_pasted():
    run = copied(gen_run('lora'))
    moved = os.path.join(os.path.dirname(run), "a run's")
    os.rename(run, moved)
    os.remove(os.path.join(moved, 'animals', 'class.json'))
    said = raises(UserError, predict.main, [moved, 'x'], match='train it with')
    assert pasted(said[said.index('python ') :])[1:] == ['--resume', '--out', moved]


def test_suggested_text():
    """Of a long text its first words, of one word its start; never a line break."""
    for text, want in (
        ('one two\nthree\t\x1b[0m four ' + 'five ' * 30, None),
        ('x' * 99, 'x' * 60),
        ('', ''),
        ('-1', '-1'),
    ):
        line = summary.suggestions('run', text).splitlines()[1]
        shown = pasted(line)[-1]
        assert len(shown) <= 60 and shown.isprintable(), shown
        assert shown == want or want is None and shown.startswith('one two three [0m four five')
        assert not shown.endswith('fiv')


def test_numbers_of_things():
    got = [
        counted(n, noun) for n, noun in ((1, 'block'), (0, 'row'), (2000, 'class'), (1, 'class'))
    ]
    assert got == ['1 block', '0 rows', '2,000 classes', '1 class']
    flags = [
        '--data',
        'demo',
        *SCRATCH,
        '--max_steps',
        '1',
        '--batch_size',
        '1',
        '--max_length',
        '1',
    ]
    _, text = train(*flags, '--n_layer', '1', '--lora', '--quick')
    for wrong in ('1 steps', '1 rows', '1 blocks', '1 tokens', '1 texts'):
        assert f' {wrong}' not in f' {text}'.replace('\n', ' '), text
    raises(UserError, train, *flags, '--n_layer', '1', '--last', '5', match='has 1 block')
    raises(UserError, train, *flags, '--n_layer', '1', '--top', '5', match='has 1 block')


def test_published_names_with_their_owner():
    assert model_name('openai-community/gpt2-xl') == 'gpt2-xl'
    assert model_name('distilbert/distilgpt2') == 'distilgpt2' and model_name('a/gpt2') == 'a/gpt2'
    flags = ['--model', HUB_NAMES['gpt2'], '--scratch', '--n_layer', '1', '--n_head', '1']
    assert train_cls.parse(flags)[0].model == 'gpt2'
    asked = []
    with patched(lib.download, 'weights', lambda name, _: asked.append(name) or f'/w/{name}/x'):
        assert model_folder(HUB_NAMES['gpt2']) == model_folder('gpt2') == '/w/gpt2'
        assert model_folder(HUB_NAMES['distilgpt2']) == '/w/distilgpt2' and len(asked) == 3
