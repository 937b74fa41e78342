"""lib/demo.py: the built-in data set and its model."""

import glob
import hashlib
import os
import re
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
from docs import nano
from lib.files import Unavailable, read_json
from lib.runfolder import read_run
from lib.scoring import text_logprobs
from lib.tokens import tokenize, tokenizer
from model import GPT
from tests.helpers import (
    TOP,
    environment,
    fresh_cache,
    generate,
    patched,
    pretrained,
    raises,
    script,
    tmp,
    train,
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
        assert 'built-in demo instead' in text and 'matmuls in float32: --dtype fp32' in text
        info = read_json(os.path.join(out, 'run.json'))
        assert info['model'] == 'nano' and info['args']['dtype'] == 'fp32'
        raises(Unavailable, train, '--data', 'sst2', match='no network')
        raises(Unavailable, train, '--data', 'demo', '--model', 'gpt2', match='no network')
        flags = ['--quick', '--seeds', '2', '--out', os.path.join(tmp(), 'run')]
        assert not script(train_cls.main, flags)[0]
        text = script(train_cls.main, flags)[1]
        assert text.count('trained before') == 2, text


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
    """LoRA on top of `nano` in a quarter of the default steps; the README has the full run."""
    out, _ = train('--data', 'demo', *'--max_steps 100 --eval_every 100 --log_every 100'.split())
    accuracy = read_json(os.path.join(out, 'eval_results.json'))['accuracy']
    assert accuracy > 0.8, accuracy  # a bag of words reaches 0.74


def test_nano_is_what_its_command_makes():
    """lib/nano was made by the present flags on the present sentences, and its loss is the one that
    training had at the end. `python docs/nano.py FOLDER` trains it again."""
    made = read_json(os.path.join(lib.demo.NANO, 'made.json'))
    assert made['command'] == f'python train_gen.py {nano.FLAGS}'
    assert made['texts'] == nano.texts_sha256(), 'the sentences changed: python docs/nano.py'
    steps = [row['step'] for row in made['losses']]
    args, _, _ = train_gen.parse(nano.FLAGS.split())
    assert args.dtype == 'fp32' and steps[-1] == args.max_steps, (args.dtype, steps)
    enc, (_, val, _) = tokenizer('bytes'), data.load_texts('demo')
    tokens, model = tokenize(enc, val), GPT.from_pretrained('nano').eval()
    logp = text_logprobs(model, tokens, 128, 'first', torch.device('cpu'), torch.float32)
    loss = -logp.sum() / (tokens.lengths + 1).sum()  # nats per token, the end included
    told = made['losses'][-1]['val_loss']
    assert abs(loss - told) < 1e-3 * told, (loss, told)
    sizes = [os.path.getsize(path) for path in glob.glob(os.path.join(lib.demo.NANO, '*'))]
    assert sum(sizes) < 2_000_000, sizes


def test_nano_can_be_made_again():
    """The command, with fewer steps: what it writes is what nano loads."""
    flags = '--pretrain --data demo --model nano --scratch --max_samples 40 --max_steps 2'
    folder = os.path.join(tmp(), 'nano')

    def run(command, cwd, check):  # in this process, to save the imports
        assert command[:2] == [sys.executable, 'train_gen.py'] and cwd == TOP and check
        assert script(train_gen.main, command[2:])[0] == 0

    with patched(nano, 'FLAGS', flags), patched(subprocess, 'run', run):
        nano.make_nano(folder)
    made = read_json(os.path.join(folder, 'made.json'))
    assert made['command'].endswith(flags) and 'val_loss' in made['losses'][-1]
    fresh, shipped = (GPT.from_pretrained(where) for where in (folder, 'nano'))
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (fresh, shipped)]
    assert shapes[0] == shapes[1]


def test_cache_that_cannot_be_written():
    """One note for all of it."""
    lib.files.say_once.cache_clear()
    with environment(NANOCLS_CACHE=os.path.join(write('file', ''), 'cache')):
        flags = '--data demo --max_samples 20 --head --epochs 2 --batch_size 20 --max_length 9'
        out = os.path.join(tmp(), 'run')
        code, text, err = script(train_cls.main, [*flags.split(), '--out', out])
        assert not code and err.count('note: the cache ') == 1 and 'cannot be written' in err, err
        assert 'not used: cannot write' in text, text
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
        patched(lib.demo, 'NANO', pretrained()),
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
            assert 'zero' in info['method'] or 'matmuls in float32' in text
        raises(Unavailable, generate, '--data', 'sst2', match='no network')
