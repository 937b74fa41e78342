"""train_cls.py on the demo, end to end."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

import lib.device
import lib.runs
import lib.training
import lora
import predict
from lib import ranks
from lib.device import autocast, place
from lib.fast import speed_up
from lib.files import UserError, read_bytes, read_json
from lib.rundata import own_data
from lib.runs import open_run
from lib.tensors import load_safetensors, save_safetensors
from lib.training import wrap_blocks
from lib.versions import versions
from model import GPT
from tests.helpers import (
    ALL,
    CPU,
    FLAGS,
    GEN,
    METHODS,
    SCRATCH,
    SMALL,
    TINY,
    Stop,
    copied,
    generate,
    imbalanced,
    losses_of,
    newborn,
    over_base,
    patched,
    raises,
    records,
    run_eval,
    script,
    skip,
    stop_here,
    tiny_run,
    train,
    weights,
)


def test_every_method_end_to_end():
    for method in METHODS:
        out = tiny_run(method)
        info, results = (read_json(os.path.join(out, f'{x}.json')) for x in ('run', 'eval_results'))
        assert (info['method'], info['labels']) == (method, ['negative', 'positive'])
        assert (info['data'], info['model'], info['seed']) == (TINY[1], 'nano', 1337)
        assert results['n'] == 100 and sum(map(sum, results['confusion'])) == 100
        keys = {'step', 'loss', 'lr', 'examples_per_s', 'tokens_per_s', 'pad_share'}
        assert any(keys | {'train_accuracy'} == set(r) for r in records(out))
        assert {'val_loss', 'val_accuracy'} <= set(records(out)[-1])
        names = set(os.listdir(out))
        of_peft = {'adapter_config.json', 'adapter_model.safetensors', 'base'}
        files = dict(lora=of_peft, prompt=of_peft, adapter={'adapter.safetensors', 'base'})
        files = files.get(method, {'config.json', 'model.safetensors'})
        results_files = {
            'eval_results.json',
            'val_preds.json',
            'val_labels.json',
            'train_texts.bin',
        }
        assert names == files | results_files | {'run.json', 'log.jsonl'}, names
        again = json.loads(run_eval([out, '--json', '-', '--dtype', 'fp32'])[0])['runs'][0]
        assert abs(again['nll'] - results['nll']) < 1e-6  # the same rows, the same weights
        texts = ['the song was warm', '']
        text = script(predict.main, [out, '--json', '--dtype', 'fp32', *texts])[1]
        rows = [json.loads(line) for line in text.splitlines()]
        assert [r['text'] for r in rows] == texts
        assert set(rows[0]['probs']) == {'negative', 'positive'}
        want = torch.from_numpy(open_run(out, 'cpu', 'fp32').logits(texts)).softmax(1)
        got = [[r['probs'][name] for name in info['labels']] for r in rows]
        assert np.allclose(got, want, atol=2e-6)
        assert all(r['label'] == max(r['probs'], key=r['probs'].get) for r in rows)


def test_val_predictions_agree_with_the_log():
    out = tiny_run('full')
    preds, labels = (read_json(os.path.join(out, f'val_{x}.json')) for x in ('preds', 'labels'))
    last = [r for r in records(out) if 'val_accuracy' in r][-1]
    assert last['val_accuracy'] == np.mean([p['label'] == y for p, y in zip(preds, labels)])


def activations(checkpointing, fast):
    """-> bytes that a forward pass stores for backward"""
    model = GPT(replace(SMALL, n_layer=6), 2).init_weights().train()
    lora.adapt(model, 'lora', targets=ALL, dropout=0.05)
    place(model, CPU, torch.bfloat16)
    if fast:
        speed_up(model, CPU, torch.bfloat16)
    wrap_blocks(model, SimpleNamespace(gradient_checkpointing=checkpointing, compile=False))
    sizes = {}

    def store(t):
        sizes[t.data_ptr()] = t.numel() * t.element_size()
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(store, lambda t: t)
    with hooks, autocast(CPU, torch.bfloat16):
        model(torch.randint(0, 256, (8, 32)), torch.full((8,), 32))
    return sum(sizes.values())


def test_gradient_checkpointing():
    """Bitwise the same weights for every method, with dropout; and far fewer activations are
    stored."""
    steps = '--trunk_dropout 0.1 --max_steps 4 --eval_every 4 --lr 1e-2'.split()
    checkpointing = ([], ['--gradient_checkpointing'])
    kinds = [(method, 'fp32') for method in METHODS if method != 'head']
    for method, dtype in (*kinds, ('lora', 'bf16')):
        flags = [*TINY, *FLAGS[method], *steps, '--dtype', dtype]
        a, b = (weights(train(*flags, *more)[0]) for more in checkpointing)
        assert a and a == b, (method, dtype)
    flags = over_base(*GEN['posterior'], '--max_steps', '10')
    a, b = (losses_of(generate(*flags, *more)[0]) for more in checkpointing)
    assert a == b and len(a) > 1
    for fast in (False, True):
        kept = [activations(checkpointing, fast) for checkpointing in (False, True)]
        assert kept[1] < 0.3 * kept[0], kept


def test_compile():
    """--compile takes the same steps, to rounding; so does a script that compiles its net."""
    if not os.environ.get('NANOCLS_DATA'):
        skip('compiling takes 20 s: only with $NANOCLS_DATA')
    if not shutil.which(os.environ.get('CXX', 'g++')):
        skip('torch.compile needs a C++ compiler')
    flags = [*TINY, *'--n_layer 1 --lora --dropout 0 --dtype fp32 --lr 1e-2'.split()]
    flags += '--max_steps 6 --log_every 1'.split()
    code = versions()['code']
    a, b = losses_of(train(*flags, '--compile')[0]), losses_of(train(*flags)[0])
    assert len(a) == len(b) == 6 and np.allclose(a, b, rtol=1e-4), (a, b)
    assert versions()['code'] == code, 'what torch.compile adds to model.py is no edit'
    with patched(ranks, 'wrap', lambda net: torch.compile(net, dynamic=True)):
        c = losses_of(train(*flags)[0])
    assert len(c) == 6 and np.allclose(b, c, rtol=1e-4), (b, c)


def test_frozen_weights_stay_bitwise():
    """In float32 and bf16, for each method: what is frozen does not change, what trains does."""
    for dtype in ('fp32', 'bf16'):
        for method in METHODS:
            seen = {}

            def catch(model, device, dtype, real=place, **k):
                model = real(model, device, dtype, **k)
                before = {n: p.detach().clone() for n, p in model.named_parameters()}
                seen.update(model=model, before=before)
                return model

            with patched(lib.device, 'place', catch), patched(lib.runs, 'open_run', stop_here):
                flags = [*FLAGS[method], '--dtype', dtype, '--max_steps', '5', '--eval_every', '5']
                raises(Stop, train, *TINY, *flags)
            params = dict(seen['model'].named_parameters())
            assert set(params) == set(seen['before'])
            for n, before in seen['before'].items():
                moved, trains = not torch.equal(params[n], before), params[n].requires_grad
                assert moved == trains, (method, dtype, n, moved)
                assert trains or params[n].grad is None


def test_accumulation_equals_the_big_batch():
    """Ragged lengths, class weights: 2 steps of 12 rows, at once and in three parts."""
    flags = ['--data', imbalanced(), *SCRATCH, '--class_weights', 'balanced', '--full']
    flags += '--dtype fp32 --max_steps 2 --lr 1e-2 --log_every 1'.split()
    whole = train(*flags, '--batch_size', '12')[0]
    parts = train(*flags, '--batch_size', '4', '--grad_accum', '3')[0]
    assert np.allclose(losses_of(whole), losses_of(parts), rtol=1e-5)
    a, b = (load_safetensors(os.path.join(out, 'model.safetensors')) for out in (whole, parts))
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-4


def test_class_weights():
    path = imbalanced()
    for kind in ('none', 'balanced'):
        calls, real = [], torch.nn.functional.cross_entropy

        def catch(logits, target, weight=None, reduction='mean'):
            calls.extend([weight] if reduction == 'sum' else [])
            return real(logits, target, weight=weight, reduction=reduction)

        with patched(torch.nn.functional, 'cross_entropy', catch):
            flags = ['--data', path, *SCRATCH, '--class_weights', kind]
            train(*flags, '--max_steps', '1')
        balanced = [48 / (2 * 36), 48 / (2 * 12)]  # 36 common, 12 rare of 48 training rows
        want = balanced if kind == 'balanced' else [1, 1]
        assert torch.allclose(calls[0], torch.tensor(want).float()), calls[0]


def test_same_seed_same_run():
    argv = [*TINY, '--lora', '--max_steps', '4', '--eval_every', '4']
    runs = [train(*argv, '--seed', s)[0] for s in (1, 1, 2)]
    a, b, c = (read_bytes(os.path.join(out, 'adapter_model.safetensors')) for out in runs)
    assert a == b != c


def test_best_on_validation_is_saved():
    """With a rate that destroys the model after step 4, the saved weights are those of step 2 or
    4."""
    with patched(lib.training, 'lr_at', lambda step, *a: 1e-3 if step < 4 else 3.0):
        out, _ = train(*TINY, '--full', '--dtype', 'fp32', '--max_steps', '8', '--eval_every', '2')
    log = [r for r in records(out) if 'val_loss' in r]
    scores = [(r['val_accuracy'], -r['val_loss'], r['step']) for r in log]
    best = max(scores, key=lambda s: s[:2])
    assert read_json(os.path.join(out, 'run.json'))['results']['step'] == best[2], scores
    assert best[2] <= 4, scores
    files = [os.path.join(out, f'val_{name}.json') for name in ('preds', 'labels')]
    saved = json.loads(run_eval(['--preds', files[0], '--labels', files[1], '--json', '-'])[0])
    assert saved['runs'][0]['accuracy'] == best[0], (saved, scores)  # of the saved weights


def test_training_accuracy():
    """The log has the accuracy on the texts since its last line, all parts of a step counted."""
    flags = [*TINY, '--head', '--dtype', 'fp32', '--lr', '1e-12', '--epochs', '1']  # nothing moves
    out, _ = train(*flags, '--grad_accum', '2', '--batch_size', '5', '--eval_every', '99')
    row = next(r for r in records(out)[::-1] if 'loss' in r)
    run, rows = open_run(out, 'cpu', 'fp32'), own_data(read_json(f'{out}/run.json')).train
    right = run.logits(rows.texts).argmax(1) == rows.y
    first = 10 * 20  # --log_every 20 steps of 10 rows: all but the last line are full ones
    shown = [r['train_accuracy'] for r in records(out) if 'loss' in r]
    sizes = [min(first, len(right) - i) for i in range(0, len(right), first)]
    total = sum(a * n for a, n in zip(shown, sizes))
    assert abs(total - right.sum()) < 1e-6 and 0 < row['train_accuracy'] < 1, (shown, right.sum())


def test_lora_on_one_block():
    """A target that names one block's layer is saved with its full name; the short one would mean
    that layer in every block."""
    out, _ = train(*TINY, '--lora', '--targets', 'h.1.mlp.c_fc', '--max_steps', '2')
    assert read_json(os.path.join(out, 'adapter_config.json'))['target_modules'] == ['h.1.mlp.c_fc']
    opened = open_run(out, 'cpu', 'fp32', plain=True).model.state_dict()
    base = os.path.join(out, 'base')
    base = GPT.from_pretrained(base, 2, new_head=True).state_dict()
    changed = {n for n in base if not torch.equal(base[n], opened[n])}
    assert changed == {'h.1.mlp.c_fc.weight', 'score.weight'} and opened.keys() == base.keys()


def test_training_is_freed_before_the_final_test():
    """The run that is opened finds the memory of model, optimizer and gradients free."""
    left = []
    for method in METHODS:
        with newborn(GPT, torch.optim.Optimizer, torch.nn.Parameter) as alive:

            def opening(*a, **k):
                left.append(alive())
                raise Stop

            with patched(lib.runs, 'open_run', opening):
                flags = [*FLAGS[method], '--epochs', '2', '--batch_size', '50', '--eval_every', '9']
                raises(Stop, train, *TINY, *flags)
    assert len(left) == len(METHODS) and not any(left), left


def test_a_run_that_ends_in_nan_is_told_so():
    """Its last update is in no loss of a step, and its validation is not the best one; nor does
    such a run answer."""
    flags = '--full --max_steps 1 --eval_every 1 --dtype fp32 --lr 1e20 --clip 0 --warmup 0'.split()
    raises(UserError, train, *TINY, *flags, match='not finite')
    out = copied(tiny_run('full'))
    path = os.path.join(out, 'model.safetensors')
    tensors = load_safetensors(path)
    save_safetensors(path, {**tensors, 'score.weight': tensors['score.weight'] * float('nan')})
    raises(UserError, run_eval, [out], match='not finite')
    raises(UserError, predict.main, [out, 'a text'], match='not finite')
