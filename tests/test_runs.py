"""lib/runs.py: finished runs, opened again, wherever their parts are by now."""

import os
import shutil
import sys
import threading
import time
import unittest.mock
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

import eval as evaluation  # not `eval`, which is Python's own
import lib.fast
import lib.packed
import lib.training
import lib.vocabulary
import predict
import train_cls
import train_gen
from lib.device import autocast
from lib.files import UserError, read_json, write_json
from lib.packed import FastConv1D, FastLoRA
from lib.runs import open_run
from lib.vocabulary import FastVocabulary
from model import SHAPES, Config
from tests.helpers import (
    CPU,
    FLAGS,
    GEN,
    METHODS,
    SCRATCH,
    SHAPE,
    TINY,
    Stop,
    Unpacked,
    class_model,
    copied,
    environment,
    formula_model,
    fresh_cache,
    gen_run,
    generate,
    opened,
    patched,
    pretrained,
    raises,
    run_eval,
    save_hf,
    script,
    stop_here,
    tiny_run,
    tmp,
    topics,
    train,
    tree,
)

TEXTS = ['cat dog', '', 'one two three']


def data_folder(cfg):
    """A --data_dir that holds the weights of one of the published models."""
    folder = tmp()
    save_hf(os.path.join(folder, 'models', 'distilgpt2'), formula_model(cfg, 0))
    return folder


def test_data_dir_may_move():
    """A run needs its base model when it is opened, and finds it where that is now: in --data_dir,
    in the folder that it was trained with, in $NANOCLS_DATA, in the cache."""
    cfg = Config(2, 2, 32, 96, 257)
    with unittest.mock.patch.dict(SHAPES, distilgpt2=cfg), fresh_cache() as cache:
        folder, steps = data_folder(cfg), ['--max_steps', '3', '--dtype', 'fp32']
        flags = ['--data', topics(), '--model', 'distilgpt2', '--data_dir', folder, *steps]
        runs = [train(*flags, *FLAGS['lora'])[0], generate(*flags, '--lora')[0]]
        runs += [generate(*flags[:-4], '--zero_shot')[0]]
        want = [open_run(out, 'cpu', 'fp32').logits(TEXTS) for out in runs]
        moved = os.path.join(tmp(), 'moved')
        shutil.move(folder, moved)
        for out, logits in zip(runs, want):
            with environment(NANOCLS_DATA=moved):
                assert np.array_equal(open_run(out, 'cpu', 'fp32').logits(TEXTS), logits)
            run = open_run(out, 'cpu', 'fp32', moved)
            assert np.array_equal(run.logits(TEXTS), logits)
            assert script(predict.main, [out, '--data_dir', moved, 'cat'])[1]
            run_eval([out, '--data_dir', moved])
            with environment(NANOCLS_DATA=None, HF_HOME=tmp(), HF_ENDPOINT='http://127.0.0.1:1'):
                raises(UserError, open_run, out, match='--data_dir')
        shutil.copytree(os.path.join(moved, 'models'), os.path.join(cache, 'models'))
        for out, logits in zip(runs, want):
            assert np.array_equal(open_run(out, 'cpu', 'fp32').logits(TEXTS), logits)


def test_runs_of_relative_paths_open_from_any_folder():
    """Prediction needs nothing but the run and its base model; evaluation says what it lacks."""
    here, folder, elsewhere = os.getcwd(), tmp(), tmp()
    try:
        os.chdir(folder)
        shutil.copyfile(topics(), 'x.csv')
        flags = ['--data', 'x.csv', *SCRATCH, '--max_steps', '2']
        outs = [os.path.join(folder, kind) for kind in ('cls', 'gen')]
        train(*flags, '--full', out='cls'), generate(*flags, '--lora', out='gen')
        os.chdir(elsewhere)
        for out in outs:
            assert script(predict.main, [out, 'cat dog'])[1]
            run_eval([out, '--test', os.path.join(folder, 'x.csv')])
            same = run_eval([out, '--data', os.path.join(folder, 'x.csv')])[0]
            assert 'accuracy' in same
        os.rename(os.path.join(folder, 'x.csv'), os.path.join(folder, 'y.csv'))
        for out in outs:
            assert script(predict.main, [out, 'cat dog'])[1]
            raises(UserError, evaluation.main, [out], match='x.csv')
    finally:
        os.chdir(here)


def test_no_texts():
    """No texts have no logits, of every kind of run."""
    runs = [open_run(tiny_run(method), 'cpu', 'fp32') for method in METHODS]
    for run in [*runs, *map(opened, GEN)]:
        assert run.logits([]).shape == (0, 2), run.info['method']


def test_plain_runs_are_the_same():
    """Without lib/fast.py a run gives the same numbers, to rounding."""
    for out in [tiny_run(method) for method in METHODS] + [gen_run(method) for method in GEN]:
        a, b = (open_run(out, 'cpu', 'fp32', plain=plain).logits(TEXTS) for plain in (False, True))
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max(), (out, a, b)


def test_runs_may_be_moved():
    for out in [tiny_run('lora'), tiny_run('full'), gen_run('lora'), gen_run('prefix')]:
        want = open_run(out, 'cpu', 'fp32').logits(TEXTS)
        assert np.array_equal(open_run(copied(out), 'cpu', 'fp32').logits(TEXTS), want)


def test_base_model_that_was_moved():
    """--base says where it is; another one is refused, and so is --base where it does nothing."""
    text = 'the song was warm'
    for made in (tiny_run('lora'), tiny_run('adapter'), gen_run('lora'), gen_run('zero_shot')):
        out, there = copied(made), os.path.join(tmp(), 'there')
        os.rename(os.path.join(out, 'base'), there)
        want = open_run(made, 'cpu', 'fp32').logits([text])
        if not os.path.isdir(read_json(os.path.join(out, 'run.json'))['base']['name']):
            raises(UserError, predict.main, [out, text], match='name its new place with --base')
        assert np.array_equal(open_run(out, 'cpu', 'fp32', base=there).logits([text]), want)
        answers = [
            script(predict.main, [r, text, *more]) for r, *more in ([made], [out, '--base', there])
        ]
        assert answers[0] == answers[1], answers
    another = pretrained()
    for main, argv in ((predict.main, [text]), (evaluation.main, [])):
        said = 'another base model'
        raises(UserError, main, [copied(tiny_run('lora')), *argv, '--base', another], match=said)
        raises(UserError, main, [tiny_run('full'), *argv, '--base', another], match='does nothing')
        raises(UserError, main, [tiny_run('lora'), *argv, '--base', 'nowhere'], match='no folder')
    out, there = copied(tiny_run('lora')), os.path.join(tmp(), 'there')
    os.rename(os.path.join(out, 'base'), there)
    table = [line for line in run_eval([out, tiny_run('full'), '--base', there])[0].splitlines()]
    assert any(line.startswith('majority class') for line in table)
    merged = os.path.join(tmp(), 'merged')
    assert script(predict.main, [out, '--export', merged, '--base', there])[1].startswith('wrote')
    want = open_run(tiny_run('lora'), 'cpu', 'fp32').logits([text])
    assert np.allclose(open_run(merged, 'cpu', 'fp32').logits([text]), want, atol=1e-4)
    os.remove(os.path.join(out, 'run.json'))  # now it is a folder of PEFT
    config = os.path.join(out, 'adapter_config.json')
    write_json(config, {**read_json(config), 'base_model_name_or_path': 'gone'})
    raises(UserError, predict.main, [out, text], match='name its folder with --base')
    run = open_run(out, 'cpu', 'fp32', base=there)
    assert np.allclose(run.logits([text]), want, atol=1e-5) and run.labels == [
        'negative',
        'positive',
    ]


def test_interrupted_runs_of_earlier_versions_are_refused():
    """Their resume.pt lacks flags: one sentence says so, and nothing changes."""
    for main, flags in (
        (train_cls.main, [*TINY, '--head']),
        (train_gen.main, ['--data', topics(), *SHAPE]),
    ):
        out = os.path.join(tmp(), 'run')
        with patched(lib.training, 'seed_step', stop_here):
            raises(Stop, main, [*flags, '--max_steps', '4', '--keep', 'last', '--out', out])
        for folder, _, names in os.walk(out):
            path = os.path.join(folder, 'resume.pt')
            if 'resume.pt' in names:
                saved = torch.load(path, weights_only=True)
                del saved['args']['keep']
                torch.save(saved, path)
        before, argv = tree(out), ['--resume', '--out', out]
        raises(UserError, main, argv, match='was not started by this script and version')
        assert tree(out) == before


def test_a_file_of_a_run_is_no_run():
    raises(UserError, open_run, os.path.join(tiny_run('head'), 'run.json'), match='name the run')


def test_texts_are_a_list_of_strings():
    """Anything else is a TypeError that names the place and what to do."""
    for run in (open_run(tiny_run('full'), 'cpu', 'fp32'), opened('zero_shot')):
        for call in (run.logits, run.predict):
            for texts, match in (
                ('hello', 'not one str: put it into brackets'),
                (b'hello', 'not one bytes'),
                (['a', None], 'texts[1] is None, which is no string: leave it out'),
                (['a', 'b', float('nan')], 'texts[2] is nan'),
                ([7], 'texts[0] is 7'),
                ([['a']], "texts[0] is ['a']"),
                (np.array(['a', None], object), 'texts[1] is None'),
            ):
                raises(TypeError, call, texts, match=match)
        want = run.logits(['cat', 'dog'])
        for texts in (('cat', 'dog'), (t for t in ('cat', 'dog')), np.array(['cat', 'dog'])):
            assert np.array_equal(run.logits(texts), want)


def test_predict_gives_labels_and_probabilities():
    """In the order of the texts, by the rule of the run."""
    for run in (open_run(tiny_run('full'), 'cpu', 'fp32'), opened('zero_shot')):
        texts = ['cat dog', '', 'one two three four', 'cat dog']
        got, probs = run.predict(texts), run.probs(run.logits(texts))
        assert [type(x) for x in got[0]] == [str, float] and len(got) == 4
        assert [label for label, _ in got] == [run.labels[k] for k in probs.argmax(1)]
        assert np.array_equal([p for _, p in got], probs.max(1))
        assert run.predict([]) == []


class Everywhere(Unpacked):
    """Packs on every CPU, in bfloat16."""

    dtype = torch.bfloat16


def interleaved(make, call):
    """make() -> a fresh object. For each line that call(object) runs in packing code: the result of
    a second call, in another thread just before that line, and that of the first."""
    where, line = {lib.packed.__file__, lib.vocabulary.__file__}, 0
    while True:
        thing, seen, results = make(), 0, []

        def trace(frame, event, arg, thing=thing, at=line, results=results):
            nonlocal seen
            if frame.f_code.co_filename not in where:
                return None
            if event == 'line':
                seen += 1
                if seen == at + 1:
                    other = threading.Thread(target=lambda: results.append(call(thing)))
                    other.start()
                    other.join()
            return trace

        sys.settrace(trace)
        try:
            results.append(call(thing))
        finally:
            sys.settrace(None)
        if seen <= line:
            return
        yield results
        line += 1


def test_packing_is_done_when_it_is_seen():
    """What packs weights on its first call gives the same when other threads call in between."""
    model, x = class_model('lora').requires_grad_(False), torch.randn(3, 2, 64)
    layer, ids = model.h[0].mlp.c_fc, torch.tensor([[1, 2], [4, 5], [6, 7]])
    kinds = [
        (lambda: FastLoRA(layer, Everywhere), lambda f: f(x.bfloat16(), gelu=True)),
        (lambda: FastConv1D(layer.base, Everywhere), lambda f: f(x.bfloat16())),
        (lambda: FastVocabulary(model, Everywhere), lambda f: f(x, ids, ids > 0)),
    ]
    for make, use in kinds:

        def call(thing, use=use):
            with torch.no_grad(), autocast(CPU, torch.bfloat16):
                return use(thing)

        want, lines = call(make()), 0
        for results in interleaved(make, call):
            lines += 1
            assert len(results) == 2 and all(torch.equal(got, want) for got in results)
        assert lines > 5, lines


def test_first_calls_in_threads():
    """Threads that share an opened run get what one thread gets, from their first calls on, while
    weights are packed; opening runs in threads leaves torch as it was."""
    outs, texts, dropout = [class_run(), tiny_run('lora')], ['cat dog', 'one'], F.dropout
    with patched(lib.fast, 'packing', lambda *_: Everywhere):
        for out in outs:
            want = open_run(out, 'cpu', 'bf16').logits(texts)
            run, start = open_run(out, 'cpu', 'bf16'), threading.Barrier(4)

            def first_call(i, run=run, start=start):
                start.wait()
                time.sleep(5e-4 * i)
                return run.logits(texts)

            with ThreadPoolExecutor(4) as pool:
                assert all(np.array_equal(x, want) for x in pool.map(first_call, range(4)))
                runs = list(pool.map(lambda _, out=out: open_run(out, 'cpu', 'bf16'), range(4)))
            assert all(np.array_equal(run.logits(texts), want) for run in runs)
            assert F.dropout is dropout


def class_run():
    """A generative run of --lora whose classes are folded into one product."""
    shape = '--model nano --scratch --n_layer 1 --n_head 2 --n_embd 64 --block_size 32'.split()
    steps = '--r 1 --max_steps 2 --eval_every 2 --dtype fp32 --quick'.split()
    return generate('--data', topics(), *shape, '--lora', *steps)[0]
