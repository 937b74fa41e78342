"""train_gen.py, end to end."""

import json
import os
import random

import numpy as np
import torch

import data
import eval as evaluation  # not `eval`, which is Python's own
import lib.device
import lib.runs
import lib.training
import lora
import predict
import train_gen
from lib.checkpoints import base_sha256
from lib.device import place
from lib.files import UserError, read_bytes, read_json
from lib.metrics import softmax
from lib.runfolder import read_run
from lib.runs import open_run
from lib.scoring import text_logprobs
from lib.tensors import load_safetensors
from lib.tokens import tokenize, tokenizer
from model import GPT
from tests.helpers import (
    CPU,
    GEN,
    QUICKLY,
    SCRATCH,
    SHAPE,
    Stop,
    gen_run,
    generate,
    imbalanced,
    joint,
    losses_of,
    newborn,
    opened,
    over_base,
    patched,
    pretrained,
    raises,
    records,
    run_eval,
    script,
    stop_here,
    tiny_run,
    tmp,
    topics,
    train,
    tree,
    weights,
    write,
)


def test_gen_every_method_end_to_end():
    for method in GEN:
        out = gen_run(method)
        info, results = (read_json(os.path.join(out, f'{x}.json')) for x in ('run', 'eval_results'))
        assert (info['kind'], info['labels']) == ('gen', ['animals', 'numbers'])
        assert info['data'] == topics()
        assert (info['model'], info['seed']) == (pretrained(), 1337)
        assert info['method'] == dict(direct='zero_shot', posterior='lora').get(method, method)
        assert abs(sum(info['prior'].values()) - 1) < 1e-9
        fit = info['calibration']
        assert set(fit) == {'tau', 'bias', 'fitted'} and fit['tau'] > 0
        assert info['rule'] == 'calibrated'
        assert ('likelihood_quantiles' in info) == (method != 'direct')
        assert ('prompts' in info) == (method in ('zero_shot', 'direct'))
        names = {'run.json', 'eval_results.json', 'val_preds.json', 'val_labels.json'}
        names |= {'train_texts.bin'}
        names |= {'base'} if method != 'full' else set()
        if 'zero' not in GEN[method][0]:
            names |= {'animals', 'numbers', 'log.jsonl'}
            files = {'class.json', 'adapter_config.json', 'adapter_model.safetensors'}
            if method == 'full':
                files = {'class.json', 'config.json', 'model.safetensors'}
            assert all(set(os.listdir(os.path.join(out, c))) == files for c in info['labels'])
            steps = [r['step'] for r in records(out)]
            assert steps == sorted(steps)
            assert steps[-1] == dict(posterior=46, prefix=120).get(method, 40)
            assert {'class', 'step', 'loss'} <= set(records(out)[0])
            phases = ['all classes'] if method == 'prefix' else info['labels']
            phases = phases + ['the posterior of all classes'] * (method == 'posterior')
            assert list(dict.fromkeys(r['class'] for r in records(out))) == phases
        assert set(os.listdir(out)) == names, (method, os.listdir(out))  # no *.part, no resume.pt
        again = json.loads(run_eval([out, '--json', '-', '--dtype', 'fp32'])[0])['runs'][0]
        assert again['accuracy'] == results['accuracy']
        assert abs(again['nll'] - results['nll']) < 1e-6
        assert set(again['uncalibrated']) == {'nll', 'brier', 'ece'}
        preds, y = (read_json(os.path.join(out, f'val_{x}.json')) for x in ('preds', 'labels'))
        right = [p['label'] == label for p, label in zip(preds, y)]
        assert np.mean(right) == info['results']['val_accuracy']
        texts = ['cat dog cat', '', 'two one', 'horse ' * 60]
        text = script(predict.main, [out, '--json', '--dtype', 'fp32', *texts])[1]
        rows = [json.loads(line) for line in text.splitlines()]
        run = opened(method)
        logits = run.logits(texts)
        assert [r['text'] for r in rows] == texts
        assert all(abs(sum(r['probs'].values()) - 1) < 1e-9 for r in rows)
        got = [[r['logprobs'][name] for name in run.labels] for r in rows]
        assert np.allclose(got, logits - run.log_prior, atol=1e-3)
        assert [r['label'] for r in rows] == [run.labels[c] for c in run.probs(logits).argmax(1)]
        assert ('nats_per_token' in rows[0]) == (method != 'direct')


def test_gen_learns():
    """Each method separates classes of different words, which the base model cannot."""
    for method in ('lora', 'full', 'prefix', 'posterior'):
        results = read_json(os.path.join(gen_run(method), 'eval_results.json'))
        assert results['accuracy'] >= 0.9 > results['majority_accuracy'] + 0.1, (method, results)
        log = [r for r in records(gen_run(method)) if 'val_loss' in r and r['class'] == 'animals']
        assert not log or log[-1]['val_loss'] < 0.75 * records(pretrained())[-1]['val_loss'], log


def test_gen_posterior_steps():
    """Texts of shared words and one telling word, few steps: the posterior phase lowers the loss
    and not the validation accuracy."""
    rng = random.Random(0)

    def text(label):
        common = 'the of and to in it was for on with as by at'.split()
        words = [rng.choice(common) for _ in range(6)]
        words[rng.randrange(6)] = rng.choice((['red', 'pink'], ['dog', 'fish'])[label])
        return f'{" ".join(words)},{"ab"[label]}\n'

    train_file, val = ('text,label\n' + ''.join(text(i % 2) for i in range(n)) for n in (300, 200))
    argv = ['--data', write('t.csv', train_file), '--val', write('v.csv', val)]
    argv += ['--model', pretrained(), *'--dtype fp32 --lr 1e-2 --max_steps 40'.split()]
    runs = [generate(*argv, *more)[0] for more in ([], ['--posterior_steps', '40'])]
    plain, sharp = (read_json(os.path.join(out, 'run.json'))['results'] for out in runs)
    assert 0.5 <= plain['val_accuracy'] < 0.98, plain  # there is something to gain
    assert sharp['val_accuracy'] >= plain['val_accuracy'], (plain, sharp)
    assert sharp['val_loss'] < plain['val_loss'], (plain, sharp)
    losses = []
    for share in ('0', '0.9'):  # the share of the likelihood reaches the loss
        flags = [*QUICKLY, '--posterior_steps', '1', '--likelihood_share', share]
        losses.append(losses_of(generate(*over_base(*flags))[0])[-1])
    assert losses[1] > losses[0] + 0.1, losses


def test_gen_pretrain():
    """A language model of a file of lines serves as --model of both scripts; it is no classifier
    itself."""
    out = pretrained()
    info = read_json(os.path.join(out, 'run.json'))
    assert info['kind'] == 'lm' and info['labels'] == []
    assert set(os.listdir(out)) == {
        *('run.json', 'config.json', 'model.safetensors', 'log.jsonl', 'train_texts.bin')
    }
    log = [r['val_loss'] for r in records(out) if 'val_loss' in r]
    assert log[-1] < 0.6 * log[0] and min(log) == info['results']['val_loss']
    flags = ('data_dir', 'val', 'test', 'max_samples', 'balance')
    flags = {name: info['args'][name] for name in flags}
    texts, val_texts, _ = data.load_texts(info['data'], **flags)
    assert len(val_texts) == 32 and len(texts) == 288 and not set(texts) & set(val_texts)
    model, tokens = GPT.from_pretrained(out), tokenize(tokenizer('bytes'), val_texts, cache=False)
    total = -text_logprobs(model, tokens, 95, 'first', CPU, torch.float32).sum()
    nats = total / (tokens.lengths + 1).sum()
    assert abs(nats - min(log)) < 1e-4, (nats, log)  # nats per token, <|endoftext|> counted
    cls, _ = train('--data', topics(), '--model', out, '--head', '--max_steps', '1')
    for run in (cls, gen_run('lora')):
        base = read_json(os.path.join(run, 'run.json'))['base']
        assert base == dict(name=out, sha256=base_sha256(out))
    for main, argv in (
        (predict.main, [out, 'x']),
        (evaluation.main, [out]),
        (train_gen.main, ['--resume', '--out', out]),
    ):
        raises(UserError, main, argv, match='is a language model')
    taken = ['--pretrain', '--data', topics(), '--model', 'nano', '--scratch', '--out', out]
    raises(UserError, train_gen.main, taken, match='already holds a run')
    # a table's texts, its test rows left out
    table, _ = generate('--pretrain', '--data', topics(), *SHAPE, '--max_steps', '2')
    assert read_json(os.path.join(table, 'run.json'))['rows'] == dict(train=192, val=24, test=0)
    few = ['--data', write('few.txt', 'one\ntwo\ntwo\n')]
    raises(UserError, generate, '--pretrain', *few, *SHAPE, match='at least 10')


def test_gen_bad_input():
    out, some = os.path.join(tmp(), 'run'), over_base()
    one = write('one.csv', 'text,label\n' + ''.join(f'text {i},a\n' for i in range(30)))
    for argv, match in (
        (['--data', one], 'at least two classes'),
        ([*some, '--class_id', 'plants'], 'no such class'),
        ([*some, '--class_id', '2'], '0 animals, 1 numbers'),
        ([*some, '--max_length', '96'], '--max_length 96 does not fit: the model has 96 positions'),
        ([*some, '--prefix', '--max_length', '95'], 'and 2 of them'),
        ([*some, '--zero_shot', '--max_length', '90'], '--max_length 90'),
        ([*some, '--full', '--posterior_steps', '3'], '--posterior_steps'),
        ([*some, '--zero_shot', '--posterior_steps', '3'], '--posterior_steps'),
        ([*some, '--prefix', '--class_id', '0'], '--class_id'),
        ([*some, '--zero_shot', '--class_id', '0'], '--class_id'),
        ([*some, '--pretrain', '--class_id', '0'], '--class_id'),
        ([*some, '--zero_shot', '--direct', '--prior', 'counts'], '--prior counts'),
        ([*some, '--pretrain', '--prior', 'counts'], '--prior'),
        ([*some, '--prompts', 'x.json'], '--prompts does nothing without --zero_shot'),
        ([*some, '--direct'], '--direct does nothing'),
        ([*some, '--likelihood_share', '0.5'], 'without --posterior_steps'),
        ([*some, '--posterior_lr', '1'], 'without --posterior_steps'),
        ([*some, '--full', '--r', '4'], '--r does nothing without --lora'),
        ([*some, '--prefix', '--targets', 'c_fc'], '--targets'),
        ([*some, '--zero_shot', '--lr', '1'], '--lr does nothing'),
        ([*some, '--zero_shot', '--epochs', '1'], '--epochs does nothing'),
        ([*some, '--zero_shot', '--log_every', '5'], '--log_every does nothing'),
        ([*some, '--zero_shot', '--seed', '5'], '--seed does nothing'),
        ([*some, '--n_layer', '2'], '--n_layer'),
        ([*some, '--lora', '--full'], 'not allowed with'),
        ([*some, '--posterior_steps', '3', '--class_id', '0'], 'give one'),
        ([*some, '--zero_shot', '--prompts', 'nowhere.json'], 'nowhere.json'),
        ([*some, '--targets', 'q_proj'], 'matches no layer'),
        ([*some, '--device', 'abacus'], 'abacus'),
        (['--resume'], 'run.json'),
        ([*some[:2], '--model', 'nowhere'], 'nowhere'),
    ):
        raises(UserError, train_gen.main, [*argv, '--out', out], match=match)
        assert not os.path.exists(out), argv
    raises(UserError, train_gen.main, ['--resume'], match='--out')
    taken, own = 'already holds a run', 'is the folder of --model'
    for there, match in ((joint(), taken), (pretrained(), own), (tiny_run('full'), taken)):
        before = tree(there)
        raises(UserError, train_gen.main, [*some, '--out', there], match=match)
        assert tree(there) == before
    raises(UserError, train_gen.main, ['--resume', '--out', tiny_run('full')], match='train_cls.py')
    wild = '--lr 1e30 --clip 0 --log_every 1 --warmup 0'.split()
    raises(UserError, generate, *some, *QUICKLY, *wild, match='try a smaller --lr')


def test_gen_long_and_odd_texts():
    """Texts that are longer than the positions, empty, or of one character: the run trains, and
    only uncut texts are scored with their end."""
    rows = ''.join(f'{"cat dog " * 30}{i},a\n{"one two " * 30}{i},b\n' for i in range(20))
    path = write('long.csv', 'text,label\n' + rows + '"",a\nx,b\n')
    out, text = generate('--data', path, *SHAPE, '--max_steps', '4')
    assert 'are longer than 95 tokens' in text and read_run(out)['args']['max_length'] == 95
    run = open_run(out, 'cpu', 'fp32')
    assert np.isfinite(run.logits(['', 'x', 'y' * 95, 'y' * 96])).all()
    assert [len(run.token_logprobs(t)[1]) for t in ('', 'x', 'y' * 95, 'y' * 96)] == [1, 2, 96, 95]


def test_gen_class_of_one_row():
    """It has no validation rows to choose its weights by; the run works."""
    path = write('rare.csv', read_bytes(topics()).decode() + 'zzz,rare\n')
    for method in (['--lora'], ['--full'], ['--lora', '--posterior_steps', '2']):
        flags = ['--model', pretrained(), '--dtype', 'fp32', '--max_steps', '4', *method]
        out, _ = generate('--data', path, *flags)
        run = open_run(out, 'cpu', 'fp32')
        assert run.labels == ['animals', 'numbers', 'rare'] and run.info['prior']['rare'] == 1 / 193
        assert np.isfinite(run.logits(['zzz'])).all()


def test_gen_frozen_base_stays_bitwise():
    for dtype in ('fp32', 'bf16'):
        seen, base = [], over_base()[:-1]  # the base is made here, if no test has made it

        def catch(model, device, dtype, real=place, **k):
            model = real(model, device, dtype, **k)
            seen.append((model, {n: p.detach().clone() for n, p in model.named_parameters()}))
            return model

        with patched(lib.device, 'place', catch), patched(lib.runs, 'open_run', stop_here):
            raises(Stop, generate, *base, dtype, *QUICKLY, '--posterior_steps', '3')
        assert len(seen) == 3
        for model, before in seen:
            assert {n.rpartition('.')[2] for n in lora.trainables(model)} == {'A', 'B'}
            for n, p in model.named_parameters():
                assert torch.equal(p, before[n]) != p.requires_grad, (dtype, n)
                assert p.requires_grad or p.grad is None, (dtype, n)
            rounded = [n for n, p in model.named_parameters() if p.dtype == torch.bfloat16]
            assert ('wte.weight' in rounded) == bool(rounded) == (dtype == 'bf16')


def test_gen_accumulation_equals_the_big_batch():
    """2 steps of 12 rows of very different lengths, at once and in parts of 4: the likelihood of
    all weights, of one vector, the posterior loss."""
    some = ['--data', imbalanced(), *SCRATCH, *'--dtype fp32 --lr 1e-2 --log_every 1'.split()]
    for argv in (
        ['--full', '--max_steps', '4'],
        ['--prefix', '--max_steps', '2'],
        ['--dropout', '0', '--max_steps', '4', '--posterior_steps', '2'],
    ):
        whole, parts = (
            generate(*some, *argv, '--batch_size', size, '--grad_accum', 12 // size)[0]
            for size in (12, 4)
        )
        a, b = ([r['loss'] for r in records(out) if 'loss' in r] for out in (whole, parts))
        assert len(a) >= 2 and np.allclose(a, b, rtol=1e-5), (argv, a, b)
        for name in weights(whole):
            a, b = (load_safetensors(os.path.join(out, name)) for out in (whole, parts))
            assert all(float((a[n] - b[n]).abs().max()) < 1e-4 for n in a), (argv, name)


def test_gen_best_on_validation_is_saved():
    """With a rate that destroys a class after step 4, the saved adapter is an earlier one;
    class.json has its numbers."""
    # this makes the base, at its own rate
    argv = over_base('--max_steps', '12', '--batch_size', '8', '--eval_every', '2')
    with patched(lib.training, 'lr_at', lambda step, *a: 1e-2 if step < 4 else 3.0):
        out, _ = generate(*argv)
    for label in ('animals', 'numbers'):
        log = [r for r in records(out) if r['class'] == label and 'val_loss' in r]
        start = min(r['step'] for r in log) - 2
        best = max(log, key=lambda r: (r['val_auc'], -r['val_loss']))
        results = read_json(os.path.join(out, label, 'class.json'))['results']
        assert results['step'] == best['step'] - start <= 4, (results, log)
        assert results['val_loss'] == best['val_loss'] < log[-1]['val_loss'], (results, log)


def test_gen_loss_is_what_it_says():
    """The first logged loss of a step with all rows: nats per token, with <|endoftext|>; in the
    posterior phase the mean of its cross-entropy and, by --likelihood_share, of the nats per token
    of each row."""
    argv = [*over_base(), *'--r 4 --dropout 0 --batch_size 300 --max_steps 3 --log_every 1'.split()]
    out, _ = generate(*argv, '--posterior_steps', '1', '--likelihood_share', '0.25')
    ds, plain = data.load(topics()), open_run(generate(*argv)[0], 'cpu', 'fp32')
    tokens = tokenize(plain.enc, ds.train.texts, cache=False)
    model = GPT.from_pretrained(pretrained())
    base = text_logprobs(model, tokens, 95, 'first', CPU, torch.float32)[:, 0]
    rows = [r for r in reversed(records(out)) if 'loss' in r]
    losses = {r['class']: r['loss'] for r in rows}  # the first of each
    for c, label in enumerate(plain.labels):
        mine = ds.train.y == c
        want = -base[mine].sum() / (tokens.lengths + 1)[mine].sum()
        assert abs(losses[label] - want) < 1e-4, (label, losses)
    logits, rows = plain.logits_of(tokens), np.arange(len(tokens))
    own = (logits - plain.log_prior)[rows, ds.train.y] / (tokens.lengths + 1)
    entropy = -np.log(softmax(logits)[rows, ds.train.y])
    want = 0.75 * entropy.mean() - 0.25 * own.mean()
    assert abs(losses['the posterior of all classes'] - want) < 1e-4, losses


def test_gen_one_class_in_memory():
    """Models are trained one after another: while the next one is loaded, and before the final
    test, nothing is left of the last one."""
    real, left = GPT.from_pretrained, []
    for flags in (['--full', *QUICKLY[:-2]], [*QUICKLY, '--posterior_steps', '1']):
        with newborn(GPT, torch.optim.Optimizer, torch.nn.Parameter) as alive:

            def loading(*a, **k):
                left.append(alive())
                return real(*a, **k)

            def opening(*a, **k):
                left.append(alive())
                raise Stop

            loads = patched(GPT, 'from_pretrained', loading)
            with loads, patched(lib.runs, 'open_run', opening):
                raises(Stop, generate, *over_base(*flags))
    assert len(left) >= 6 and not any(left), left
