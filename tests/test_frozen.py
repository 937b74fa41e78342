"""lib/frozen.py: cached output of frozen blocks."""

import copy
import os
import time
import unittest.mock
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
import lib.files
import lora
from lib import frozen
from lib.device import autocast, place
from lib.fast import speed_up
from lib.files import UserError, cache_dir, cached
from lib.scoring import class_logits
from lib.tokens import Tokens, tokenize, tokenizer
from model import GPT, MLP
from tests.helpers import (
    CPU,
    METHODS,
    SMALL,
    TINY,
    far,
    formula_model,
    fresh_cache,
    patched,
    raises,
    records,
    train,
    write,
)


def example(method, dtype=torch.float32, fast=True, **options):
    """-> (model, Tokens of 40 texts, max_length, keep, device and dtype)"""
    torch.manual_seed(0)
    model = formula_model()
    lora.adapt(model, method, **options)
    place(model, CPU, dtype)
    if fast:
        speed_up(model, CPU, dtype)
    texts = [f'{i} {"word " * (i % 9)}' for i in range(40)]
    return model, tokenize(tokenizer('bytes'), texts, cache=False), (30, 'first', CPU, dtype)


def test_frozen_states_are_what_the_blocks_give():
    """Logits and gradients from the states equal those of the whole model, for every method that
    freezes the first blocks, plain and sped up; the rows may come in any order and more than once;
    the next run finds the file and does not compute."""
    L = SMALL.n_layer
    methods = (('head', {}, L), ('last', dict(last=1), L - 1))
    methods += (('lora', dict(top=1, targets=['c_fc']), L - 1),)
    for method, options, depth in methods:
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
            for fast in (False, True):
                with fresh_cache():
                    model, tokens, how = example(method, dtype, fast, **options)
                    assert frozen.frozen_depth(model) == depth
                    feed = frozen.cache(model, dict(train=tokens), *how)
                    states = feed.states['train']
                    want = torch.from_numpy(class_logits(model, tokens, *how))
                    got = class_logits(model, tokens, *how, net=feed.net, states=states)
                    assert far(torch.from_numpy(got), want) < limit, (method, dtype)
                    index, grads = np.array([31, 2, 2, 17]), []
                    ids, n = data.collate(tokens, index, 30, 'first', 256)
                    for net, more in ((model, ()), (feed.net, (states(index, ids),))):
                        model.zero_grad()
                        with autocast(CPU, dtype):
                            net(ids, n, *more).float().logsumexp(1).sum().backward()
                        trained = lora.trainables(model).values()
                        found = [p.grad.flatten() for p in trained if p.grad is not None]
                        grads.append(torch.cat(found))
                    assert far(*grads) < limit and grads[0].abs().max() > 0
                    assert states(index, ids).dtype == torch.float32
                    with patched(type(feed.net), 'states_of', None):  # computing again would fail
                        again = frozen.Feed(model, depth, dict(train=tokens), how, False)
                        held = again.states['train'](index, ids)
                        assert torch.equal(held, states(index, ids))
                    with patched(frozen, 'fits', lambda device, size: True):  # those on a GPU
                        again = frozen.Feed(model, depth, dict(train=tokens), how, False)
                        assert again.states['train'].flat.shape[0] == states.flat.shape[0] + 1
                        for wide in (ids, F.pad(ids, (0, 8), value=256)):
                            held = again.states['train'](index, wide)
                            assert torch.equal(held, states(index, wide)), method


def test_frozen_states_of_other_ids_are_refused():
    """An edit of batch_of that replaces tokens would not be seen by cached states."""
    with fresh_cache():
        model, tokens, how = example('head')
        feed, index = frozen.cache(model, dict(train=tokens), *how), np.array([3, 17])
        ids, n = data.collate(tokens, index, 30, 'first', 256)
        ids[1, 1] += 1
        known = feed.states['train'](index, ids)
        raises(UserError, feed.net, ids, n, known, match='other token ids than the cache: start')
    for method, options in (('head', {}), ('last', dict(last=1))):  # and of loss_of, or the loop
        with fresh_cache():
            model, tokens, how = example(method, **options)
            feed = frozen.cache(model, dict(train=tokens), *how)
            ids, n = data.collate(tokens, index, 30, 'first', 256)
            known = feed.states['train'](index, ids)
            feed.net(ids, n, known)
            raises(UserError, feed.net, ids + 1, n, known, match='other token ids')
            ids[0, 0] += 1
            raises(UserError, feed.net, ids, n, known, match='other token ids')
            ids, n = data.collate(tokens, index, 30, 'first', 256)
            known = feed.states['train'](index, ids)
            raises(UserError, feed.net, ids, n - 1, known, match='other token ids')


def test_what_cached_states_come_from_is_watched():
    """A weight, dropout, hook, pooling or block that is another one since they were cached."""
    index = np.array([3, 17])

    def scaled(model):
        with torch.no_grad():
            model.h[0].mlp.c_fc.weight.mul_(0.5)

    changes = [scaled, lambda model: model.drop.__setattr__('p', 0.5)]
    changes += [lambda model: model.h[0].register_forward_hook(lambda *a: None)]
    changes += [lambda model: setattr(model, 'pooling', 'mean')]
    changes += [lambda model: setattr(model.h[0].mlp, 'forward', lambda x: x)]
    changes += [lambda model: setattr(model, 'h', model.h[1:])]
    for method, options in (('head', {}), ('last', dict(last=1))):
        for change in changes:
            with fresh_cache():
                model, tokens, how = example(method, **options)
                feed = frozen.cache(model, dict(train=tokens), *how)
                ids, n = data.collate(tokens, index, 30, 'first', 256)
                feed.net(ids, n, feed.states['train'](index, ids))
                change(model)
                known = feed.states['train'](index, ids)
                raises(UserError, feed.net, ids, n, known, match='was changed')
    with fresh_cache():
        model, tokens, how = example('head')
        model.wte.register_forward_hook(lambda *a: None)
        assert frozen.cache(model, dict(train=tokens), *how) is None
        model, tokens, how = example('head')
        model.embed = lambda ids, y=None, copies=1: GPT.embed(model, ids) / 2
        assert frozen.cache(model, dict(train=tokens), *how) is None


def test_edits_around_frozen_states():
    """Another data.collate has states of its own, tokens that are replaced in a later step are
    noticed, another model and other texts are not given the cached ones, and what pool leaves in
    the model is of this step."""

    def kept(self, x, lengths, before=GPT.pool):
        self.pooled = before(self, x, lengths)
        return self.pooled

    def other(tokens, index, *a, collate=data.collate, **k):
        ids, n = collate(tokens, index, *a, **k)
        ids[n == 30, :5] = 7  # of long texts alone
        return ids, n

    index, later = np.arange(2), np.arange(2, 5)
    with fresh_cache(), patched(GPT, 'pool', kept):
        model, tokens, how = example('last', last=1)
        feed = frozen.cache(model, dict(train=tokens), *how)
        states = feed.states['train']
        ids, n = data.collate(tokens, index, 30, 'first', 256)
        feed.net(ids, n, states(index, ids)).sum().backward()
        assert model.pooled.shape == (2, 64) and model.pooled.requires_grad
        assert len(model.h) == SMALL.n_layer and 'embed' not in vars(model)
        ids, n = data.collate(tokens, later, 30, 'first', 256)
        ids[1, 0] += 1
        raises(UserError, feed.net, ids, n, states(later, ids), match='other token ids')
        model.pooled = None  # of a graph, which is not copied
        mean = copy.deepcopy(model)
        with torch.no_grad():
            mean.h[0].mlp.c_fc.weight.mul_(2)
        got = class_logits(mean, tokens, *how, net=feed.net, states=states)
        assert np.array_equal(got, class_logits(mean, tokens, *how))
        second = tokenize(tokenizer('bytes'), ['of a second validation set'] * 40, cache=False)
        got = class_logits(model, second, *how, net=feed.net, states=states)
        assert np.array_equal(got, class_logits(model, second, *how))
        with patched(data, 'collate', other):
            feed = frozen.cache(model, dict(train=tokens), *how)
            assert len(os.listdir(cached('frozen'))) == 2
            got = class_logits(model, tokens, *how, net=feed.net, states=feed.states['train'])
            assert np.allclose(got, class_logits(model, tokens, *how), atol=1e-4)


def test_frozen_states_that_a_gpu_has_room_for():
    """Half of the free memory, on a GPU alone."""
    free = dict(mem_get_info=lambda device: (1000, 5000))
    with unittest.mock.patch.multiple(torch.cuda, **free):
        gpu = torch.device('cuda', 0)
        assert frozen.fits(gpu, 500) and not frozen.fits(gpu, 501) and not frozen.fits(CPU, 1)


def test_frozen_depth():
    """Nothing is kept where the first block, the embeddings or a prompt train, or GPT-2's own
    dropout is on."""
    for method, options in METHODS.items():
        depth = frozen.frozen_depth(example(method, fast=False, **options)[0])
        assert (depth > 0) == (method in ('head', 'last')), method
    model = example('head')[0]
    model.set_dropout(0.1)
    assert frozen.frozen_depth(model) == 0


def test_frozen_states_are_named_after_what_they_come_from():
    """Another weight, text, length, side, depth, precision (of the head alone as well), or another
    code of the model is another file; what trains is not looked at."""
    with fresh_cache():
        model, tokens, how = example('last', last=1)

        def name(model=model, tokens=tokens, how=how):
            frozen.Feed(model, frozen.frozen_depth(model), dict(train=tokens), how, False)
            return sorted(os.listdir(cached('frozen')))

        first = name()
        with torch.no_grad():
            model.score.weight.add_(1), model.h[-1].mlp.c_fc.weight.add_(1)
        assert name() == first and len(first) == 1
        model.score.register_buffer('seen', torch.ones(3))
        assert name() == first, 'what the head has seen is not below it'
        half, _, bf16 = example('last', torch.bfloat16, last=1)
        changes = [
            ('max_length', dict(how=(29, *how[1:]))),
            ('side', dict(how=(30, 'last', *how[2:]))),
            ('text', dict(tokens=Tokens(tokens.flat[::-1].copy(), tokens.starts))),
            ('depth', dict(model=example('head')[0])),
            ('precision', dict(model=half, how=bf16)),
            ('precision of the head', dict(model=example('head', torch.bfloat16)[0], how=bf16)),
        ]
        for n, (what, change) in enumerate(changes):
            assert len(name(**change)) == n + 2, what
        with torch.no_grad():
            model.h[0].mlp.c_proj.bias[3] += 1e-3
        assert len(name()) == 8

        for n, factor in enumerate((1.5, 2.5)):
            code = f'def forward(self, x): return {factor} * self.c_proj(self.c_fc(x))'
            scope = {}
            exec(code, scope)
            with patched(MLP, 'forward', scope['forward']):
                assert len(name(example('last', last=1)[0])) == 9 + n, factor


def test_states_that_do_not_fit_are_not_used():
    """A model that reads more than the states, or a file with other numbers, is noticed."""
    with fresh_cache():
        model, tokens, how = example('last', last=1)
        splits = dict(train=tokens)
        assert frozen.cache(model, splits, *how)
        (path,) = (os.path.join(cached('frozen'), f) for f in os.listdir(cached('frozen')))
        with open(path, 'r+b') as f:
            f.write(np.ones(64 * 30, np.float32).tobytes())
        feed = frozen.cache(model, splits, *how)  # rebuilt
        got = class_logits(model, tokens, *how, net=feed.net, states=feed.states['train'])
        assert np.allclose(got, class_logits(model, tokens, *how), atol=1e-4)

        def hidden(self, ids, y=None, before=GPT.hidden):
            return before(self, ids, y) + self.wte(ids)  # the embeddings once more, at the end

        with patched(GPT, 'hidden', hidden):
            model, tokens, how = example('last', last=1)
            assert frozen.cache(model, splits, *how) is None
        with patched(GPT, 'pool', lambda self, x, n: 2 * x[:, 0]):
            model, tokens, how = example('head')
            feed = frozen.cache(model, splits, *how)
            got = class_logits(model, tokens, *how, net=feed.net, states=feed.states['train'])
            assert np.allclose(got, class_logits(model, tokens, *how), atol=1e-4)


def test_edits_that_read_other_states_are_not_cached():
    """Another classify or forward may read other blocks' states, or take and return more; an edit
    may have no positions."""

    def of_all(self, ids, lengths):
        x, pooled = self.embed(ids), []
        for block in self.h:
            x = block(x)
            pooled.append(self.pool(x, lengths))
        return self.score(self.ln_f(pooled[-1] + pooled[-2]))

    def with_state(self, ids, lengths):
        x = self.pool(self.hidden(ids), lengths)
        return (self.score(x), x) if self.training else self.score(x)

    def of_class(self, ids, lengths, y=None):
        return self.classify(ids, lengths)

    edits = ('classify', of_all), ('classify', with_state), ('forward', of_class)
    for name, edit in edits:
        for method, options in (('head', {}), ('last', dict(last=1))):
            with fresh_cache(), patched(GPT, name, edit):
                model, tokens, how = example(method, **options)
                assert frozen.cache(model, dict(train=tokens), *how) is None
    with patched(GPT, 'embed', lambda self, ids, *_: self.wte(ids)):
        model, tokens, how = example('head')
        del model.wpe, model.drop
        assert frozen.cache(model, dict(train=tokens), *how) is None


def test_a_second_head_reads_cached_states():
    """What trains beside `score` above frozen blocks: no block is left to compute."""
    with fresh_cache():
        model, tokens, how = example('head')
        model.length = torch.nn.Linear(64, 1)
        feed = frozen.cache(model, dict(train=tokens), *how)
        got = class_logits(model, tokens, *how, net=feed.net, states=feed.states['train'])
        assert np.allclose(got, class_logits(model, tokens, *how), atol=1e-4)


def test_an_edit_above_the_frozen_blocks_leaves_the_cache():
    """An edited LoRA in the last block runs as written on the cached output of those below."""
    before = lora.LoRA.forward

    def edited(self, x):
        return before(self, x) + x.mean(-1, keepdim=True)

    with fresh_cache(), patched(lora.LoRA, 'forward', edited):
        model, tokens, how = example('lora', top=1, targets=['c_fc'])
        feed = frozen.cache(model, dict(train=tokens), *how)
        got = class_logits(model, tokens, *how, net=feed.net, states=feed.states['train'])
        assert np.allclose(got, class_logits(model, tokens, *how), atol=1e-4)
        model, tokens, how = example('lora', top=1, targets=['c_fc'])
        lora.add_lora(model, targets=['h.0.mlp.c_fc'])
        for p in model.h[0].parameters():
            p.requires_grad_(False)
        assert frozen.cache(model, dict(train=tokens), *how) is None


def test_statistics_of_an_edited_head():
    """What a BatchNorm has seen is what was trained on: comparing the cache with the model leaves
    no trace."""
    for method, options in (('head', {}), ('last', dict(last=1))):
        with fresh_cache():
            model, tokens, how = example(method, **options)
            model.score = torch.nn.Sequential(torch.nn.BatchNorm1d(64), model.score)
            before = {n: b.clone() for n, b in model.named_buffers()}
            assert before and frozen.cache(model, dict(train=tokens), *how)
            assert all(torch.equal(b, before[n]) for n, b in model.named_buffers()), method


def test_make_room_beside_another_run():
    """Another run may remove a file at any moment."""

    def gone(real):
        def fn(path, *a, **k):
            if str(path).endswith('gone.bin') and os.path.lexists(path):
                os.rename(path, path + '.taken')
            return real(path, *a, **k)

        return fn

    for name in ('stat', 'remove'):
        with fresh_cache(), patched(lib.files, 'LIMIT', 350):
            os.mkdir(cached('frozen'))
            for i, file in enumerate(('gone', 'b', 'c')):
                path = write(f'{file}.bin', b'x' * 100, cached('frozen'))
                os.utime(path, (i, i))
            with patched(frozen.os, name, gone(getattr(os, name))):
                lib.files.make_room(cached('frozen'), 100)
            left = sorted(n for n in os.listdir(cached('frozen')) if n.endswith('.bin'))
            assert left == ['b.bin', 'c.bin'], (name, left)
    with fresh_cache():
        model, tokens, how = example('last', last=1)
        with patched(frozen.os, 'utime', os.remove):
            assert frozen.cache(model, dict(train=tokens), *how) is None


def test_frozen_states_are_limited():
    """The least recently used files of the cache are evicted first; without room on the disk
    training computes the blocks in every epoch, and says so."""
    with fresh_cache():
        os.makedirs(cached('frozen'))
        for i, name in enumerate('abc'):
            path = write(os.path.join('frozen', f'{name}.bin'), b'x' * 100, cache_dir())
            os.utime(path, (i, i))
        with patched(lib.files, 'LIMIT', 350):
            lib.files.make_room(cached('frozen'), 100)
        assert sorted(os.listdir(cached('frozen'))) == ['b.bin', 'c.bin']
        with patched(lib.files, 'LIMIT', 250):  # never a file that the same run needs
            for name, age in (('d.bin.123.tmp', 2 * lib.files.DAY), ('e.bin.124.tmp', 60)):
                path = write(os.path.join('frozen', name), b'x', cache_dir())
                os.utime(path, (time.time() - age,) * 2)  # of a killed run, of another at work
            lib.files.make_room(cached('frozen'), 100, own=[cached('frozen/b.bin')])
        assert sorted(os.listdir(cached('frozen'))) == ['b.bin', 'e.bin.124.tmp']
        raises(UserError, lib.files.make_room, cached('frozen'), 2**60, match='no room')
    flags = [*TINY[:-1], *'--max_samples 50 --dtype fp32 --head --epochs 2 --lr 1e-2'.split()]
    with fresh_cache():
        with patched(lib.files.shutil, 'disk_usage', lambda path: SimpleNamespace(free=0)):
            out, text = train(*flags)
        assert 'not used: ' in text and not os.listdir(cached('frozen'))
    with fresh_cache():
        kept, text = train(*flags)
        assert 'not used' not in text
        assert len(os.listdir(cached('frozen'))) == 2  # of the training and the validation rows
    with fresh_cache():
        plain, text = train(*flags, '--plain')
        assert 'caching' not in text and not os.path.exists(cached('frozen'))
    losses = [[r['loss'] for r in records(f) if 'loss' in r] for f in (out, kept, plain)]
    assert len(losses[0]) > 1 and np.allclose(losses[0], losses[1], atol=1e-5), losses
    assert np.allclose(losses[0], losses[2], atol=1e-5), losses


def test_every_edit_of_the_model_is_another_file():
    """A constant of a file of the model, what such a file imports from beside it, and GPT.pool
    take effect over the files that the code before has left."""
    import model as owner

    with fresh_cache():
        net, tokens, how = example('head')
        splits = dict(train=tokens)

        def count():
            assert frozen.cache(example('head')[0], splits, *how)
            return len(os.listdir(cached('frozen')))

        assert count() == 1 and count() == 1
        owner.FACTOR = 1.0
        assert count() == 2
        with patched(owner, 'FACTOR', 2.0):
            assert count() == 3
        del owner.FACTOR
        pool = GPT.pool
        with patched(GPT, 'pool', lambda self, x, n: 1e-3 * pool(self, x, n)):
            tail = example('last', last=1)[0]
            feed = frozen.cache(tail, splits, *how)
            got = class_logits(tail, tokens, *how, net=feed.net, states=feed.states['train'])
            assert np.allclose(got, class_logits(tail, tokens, *how), atol=1e-4)
            assert abs(got).max() <= 1
