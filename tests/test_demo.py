"""lib/demo.py: the built-in data set and its model."""

import builtins
import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import torch

import data
import lib.demo
import lib.download
import lib.files
import predict
import train_cls
import train_gen
from lib.checkpoints import model_folder
from lib.demo import nano_folder
from lib.files import Unavailable, UserError, read_json
from lib.runfolder import read_run
from tests.helpers import (
    environment,
    fresh_cache,
    generate,
    patched,
    pretrained,
    raises,
    script,
    tmp,
    train,
    tree,
    write,
)
from tests.test_data import check_dataset


def test_demo():
    d = data.load('demo')
    check_dataset(d, ['negative', 'positive'])
    for s, n in ((d.train, 4000), (d.val, 500), (d.test, 1000)):
        assert len(s.texts) == n == 2 * s.y.sum()
    assert len(set(d.train.texts + d.val.texts + d.test.texts)) == 5500, 'a text twice'
    assert data.load('demo', seed=5).test.texts == d.test.texts
    unlabelled = lib.demo.unlabelled()
    h = hashlib.sha256(
        '\n'.join(d.train.texts + d.val.texts + d.test.texts + unlabelled).encode()
    ).hexdigest()
    assert h[:16] == '36d285e4700bf34e', h[:16]
    assert len(unlabelled) == 20000 and max(map(len, unlabelled)) < 128

    def words(texts):
        return {w for t in texts for w in t.replace(',', '').split()}

    new = words(d.test.texts) - words(d.train.texts)
    assert {'radiant', 'superb', 'dismal', 'awful'} <= new <= words(unlabelled)
    hang = sum(bool(words([t]) & {'radiant', 'superb', 'dismal', 'awful'}) for t in d.test.texts)
    assert 30 < hang < 200, hang


def test_demo_is_not_solved_by_single_words():
    d = data.load('demo')
    words = sorted({w for t in d.train.texts for w in t.replace(',', '').split()})
    column = {w: i for i, w in enumerate(words)}

    def counts(texts):
        x = np.zeros((len(texts), len(words)))
        for i, t in enumerate(texts):
            for w in t.replace(',', '').split():
                if w in column:
                    x[i, column[w]] += 1
        return x

    x, y, w, b = counts(d.train.texts), d.train.y, np.zeros(len(words)), 0.0
    for _ in range(300):  # logistic regression by gradient descent
        g = 1 / (1 + np.exp(-(x @ w + b))) - y
        w -= 1.0 * (x.T @ g / len(y) + 1e-4 * w)
        b -= 1.0 * g.mean()
    accuracy = ((counts(d.test.texts) @ w + b > 0) == d.test.y).mean()
    assert 0.62 < accuracy < 0.82, accuracy


def test_fallback_to_the_demo():
    """With neither data nor model named and none available, the demo is trained. What was named and
    is not available is an error."""

    def unavailable(*a, **k):
        raise Unavailable('no network (simulated)')

    with (
        patched(lib.download, 'download', unavailable),
        environment(NANOCLS_DATA=None, HF_HOME=tmp()),
    ):
        out, text = train('--quick', '--max_steps', '2')
        assert 'built-in demo instead' in text
        assert read_json(os.path.join(out, 'run.json'))['model'] == 'nano'
        raises(Unavailable, train, '--data', 'sst2', match='no network')
        raises(Unavailable, train, '--data', 'demo', '--model', 'gpt2', match='no network')


def test_demo_bag_of_words():
    """Logistic regression on word counts stays far below the language model on the demo; the figure
    is in the README."""
    ds = data.load('demo')
    words = sorted({w for t in ds.train.texts for w in re.findall('[a-z]+', t)})
    column = {w: i for i, w in enumerate(words)}

    def counts(texts):
        x = torch.zeros(len(texts), len(words) + 1)
        x[:, -1] = 1  # the constant
        for row, t in zip(x, texts):
            for w in re.findall('[a-z]+', t):
                if w in column:
                    row[column[w]] += 1
        return x

    x, y, best = counts(ds.train.texts), torch.from_numpy(ds.train.y).double(), 0.0
    for decay in (1e-4, 1e-3, 1e-2):
        w = torch.zeros(x.shape[1], requires_grad=True)
        opt = torch.optim.LBFGS([w], max_iter=100)

        def loss():
            opt.zero_grad()
            value = (
                torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y.float())
                + decay * w.square().sum()
            )
            value.backward()
            return value

        opt.step(loss)
        best = max(
            best, float(((counts(ds.test.texts) @ w > 0).long().numpy() == ds.test.y).mean())
        )
    print(f'     demo, bag of words: {best:.3f}')
    assert 0.65 < best < 0.80, best


def test_demo_learns():
    """The language model `nano` with LoRA on top of it, both in fewer steps than the default; the
    README has the full run."""
    out, _ = train('--data', 'demo', *'--max_steps 400 --eval_every 400 --log_every 200'.split())
    accuracy = read_json(os.path.join(out, 'eval_results.json'))['accuracy']
    assert accuracy > 0.9, accuracy


class FakeTraining:
    """subprocess.Popen of nano_folder: makes a folder instead of training for a minute."""

    code, also, commands = 0, (), []

    def __init__(self, command, **kw):
        self.returncode, self.stdout = self.code, ['step 400/1600  loss 1\n', 'something else\n']
        self.commands.append(command)
        for folder in [command[-1]] * (self.code == 0) + list(self.also):
            shutil.copytree(pretrained(), folder)

    def __enter__(self):
        return self

    def __exit__(self, *a):
        pass


def test_gen_nano_is_made_once():
    model = pretrained()
    with (
        fresh_cache() as cache,
        patched(subprocess, 'Popen', FakeTraining),
        patched(FakeTraining, 'commands', []),
    ):
        folder = os.path.join(cache, 'models', f'nano-{lib.demo.VERSION}')
        code, text, _ = script(lambda argv: print(nano_folder()), [])
        assert text.splitlines()[-1] == folder and text.count('nano: step 400/1600') == 1
        assert 'something else' not in text
        (command,) = FakeTraining.commands
        assert command[0] == sys.executable and os.path.basename(command[1]) == 'train_gen.py'
        assert os.path.isfile(command[1])
        args, given, _ = train_gen.parse(command[2:])
        assert (args.method, args.data, args.model, args.scratch) == (
            'pretrain',
            'demo',
            'nano',
            True,
        )
        assert args.max_steps == args.eval_every
        assert model_folder('nano') == folder and len(FakeTraining.commands) == 1  # kept
        assert tree(folder) == tree(model)
        assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
        shutil.rmtree(os.path.join(cache, 'models'))
        with patched(FakeTraining, 'code', 2):
            raises(UserError, nano_folder)
        assert os.listdir(os.path.join(cache, 'models')) == []  # nothing half made
        with (
            patched(FakeTraining, 'also', [folder]),
            contextlib.redirect_stdout(io.StringIO()),
        ):  # another process was faster
            assert nano_folder() == folder and tree(folder) == tree(model)
        assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]


def test_ctrl_c_while_nano_trains():
    """Ends the process that trains and removes its folder, which nothing has named."""
    name, seen = os.path.join(tmp(), 'pid'), []
    trainer = write('trainer', f'#!/bin/sh\necho $$ > {name}\necho step 1\nexec sleep 60\n')
    os.chmod(trainer, 0o755)

    def strike(line, **kw):
        if line.startswith('nano: step'):
            with open(name, encoding='utf-8') as f:
                seen.append(int(f.read()))
            assert os.getsid(seen[0]) != os.getsid(0)  # the terminal does not interrupt it as well
            raise KeyboardInterrupt

    with fresh_cache() as cache, patched(sys, 'executable', trainer):
        with patched(builtins, 'print', strike):
            raises(KeyboardInterrupt, nano_folder)
        assert os.listdir(os.path.join(cache, 'models')) == []
    raises(ProcessLookupError, os.kill, seen[0], 0)


def test_cache_that_cannot_be_written():
    """One note for all of it; nano is trained for this process alone, and kept nowhere."""
    lib.files.say_once.cache_clear()
    lib.demo.passing_folder.cache_clear()
    with (
        environment(NANOCLS_CACHE=os.path.join(write('file', ''), 'cache')),
        patched(subprocess, 'Popen', FakeTraining),
        patched(FakeTraining, 'commands', []),
    ):
        flags = '--data demo --max_samples 20 --head --epochs 2 --batch_size 20 --max_length 9'
        out = os.path.join(tmp(), 'run')
        code, text, err = script(train_cls.main, [*flags.split(), '--out', out])
        assert not code and err.count('note: the cache ') == 1 and 'cannot be written' in err, err
        assert 'for this run alone' in text and 'not used: cannot write' in text, text
        assert len(FakeTraining.commands) == 1
        code, _, err = script(predict.main, [out, 'a text'])
        assert not code and not err, err


def test_gen_fallback_to_the_demo():
    """With neither data nor model named and none available: the demo, for zero_shot as well."""

    def unavailable(*a, **k):
        raise Unavailable('no network (simulated)')

    nothing = environment(NANOCLS_DATA=None, HF_HOME=tmp())
    with (
        fresh_cache(),
        patched(lib.download, 'download', unavailable),
        patched(lib.demo, 'nano_folder', pretrained),
        nothing,
    ):
        for argv in (
            ['--quick', '--max_steps', '2', '--max_length', '20'],
            ['--zero_shot', '--quick', '--max_length', '20'],
        ):
            out, text = generate(*argv)
            info = read_run(out)
            assert 'built-in demo instead' in text
            assert (info['model'], info['data']) == ('nano', 'demo')
        raises(Unavailable, generate, '--data', 'sst2', match='no network')
