"""Edits of model.py and lora.py: what they add trains, is saved, resumed and loaded again."""

import contextlib
import dataclasses
import functools
import math
import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

import data
import lib.base
import lib.device
import lib.frozen
import lib.genrun
import lib.runfolder
import lib.training
import lora
import model as model_module
import predict
import train_cls
import train_gen
from lib import export
from lib.checkpoints import NAMES
from lib.device import autocast
from lib.device import place as place_on
from lib.fast import speed_up
from lib.files import UserError
from lib.metrics import metrics, softmax
from lib.resume import load_resume
from lib.rundata import own_data
from lib.runs import open_run
from lib.tensors import load_safetensors
from lib.tokens import tokenize, tokenizer
from lora import LoRA
from model import GPT, MLP, SHAPES, Attention, Block, Config
from tests.helpers import (
    FLAGS,
    METHODS,
    Stop,
    far,
    fresh_cache,
    patched,
    raises,
    records,
    save_hf,
    script,
    stirred,
    stop_here,
    table,
    tmp,
    train,
    write,
)

EDITS = {
    'magnitude': (LoRA, lambda self: nn.Parameter(torch.ones(self.B.shape[-2]))),
    'gate': (Block, lambda self: nn.Parameter(torch.ones(32))),
    'ln_3': (Block, lambda self: nn.LayerNorm(32)),
    'hidden_layer': (GPT, lambda self: nn.Linear(32, 32)),
    'score': (GPT, lambda self: two_layers(self.num_labels)),  # in place of the linear head
}


def two_layers(num_labels):
    return nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, num_labels))


@contextlib.contextmanager
def edited(name):
    """Inside, a class has something new of this name, which its forward or classify uses."""
    place()  # made without the edit
    owner, make = EDITS[name]
    init, method = owner.__init__, 'classify' if owner is GPT else 'forward'
    plain = getattr(owner, method)

    def start(self, *a, **k):
        init(self, *a, **k)
        if owner is not GPT or self.num_labels:
            setattr(self, name, make(self))

    def forward(self, *a):
        new = getattr(self, name)
        if owner is GPT:
            state = self.pool(self.hidden(a[0]), a[1])
            return new(state) if name == 'score' else self.score(torch.tanh(new(state)))
        y = plain(self, *a)
        return y * new if isinstance(new, nn.Parameter) else y + new(y)

    with patched(owner, '__init__', start), patched(owner, method, forward):
        yield


@functools.lru_cache(None)
def place():
    """-> a folder with a GPT-2 as published: without what an edit adds; and a CSV"""
    torch.manual_seed(0)
    folder = os.path.join(tmp(), 'gpt')
    save_hf(folder, GPT(Config(2, 2, 32, 64, 257)).init_weights())
    return folder, write('rows.csv', table(60))


@contextlib.contextmanager
def watched(module, found):
    """Inside, what trains is noted in `found` whenever weights are saved."""
    name = 'save_weights' if module is lib.genrun else 'save'
    save = getattr(module, name)

    def note(*a, **k):
        model = a[1].model if module is lib.genrun else a[1]
        kind = a[1].classes[0] if module is lib.genrun else ''
        for n, p in lora.trainables(model).items():
            found[kind, n] = p.detach().clone()
        return save(*a, **k)

    with patched(module, name, note):
        yield


def argv(*flags):
    folder, path = place()
    steps = '--max_steps 4 --batch_size 8 --dtype fp32 --lr 1e-2 --eval_every 2'.split()
    return ['--data', path, '--model', folder, *steps, *flags]


def check(name, model, found, kind=''):
    """What the edit added has moved, and is in the opened model."""
    params = dict(model.named_parameters())
    own = {n for n in params if f'.{name}.' in f'.{n}.'}
    trained = {n for k, n in found if k == kind and f'.{name}.' in f'.{n}.'}
    assert own == trained and own, (name, own ^ trained)
    for n in own:
        assert torch.equal(params[n], found[kind, n]), n
        assert not NAMES.fullmatch(n)
    assert any((p != p.flatten()[0]).any() for p in map(params.get, own)), 'nothing moved'


def same_nll(run, *what):
    """An opened run gives the validation rows the loss that they had in training."""
    val, want = own_data(run.info).val, run.info['results']['val_loss']
    nll = metrics(softmax(run.logits(val.texts)), val.y, run.labels)['nll']
    assert abs(nll - want) < 1e-5, (*what, nll, want)


def one_edit(name, methods):
    for method in methods:
        found = {}
        with edited(name), watched(lib.runfolder, found):
            out, text = train(*argv(*FLAGS[method]))
            run = open_run(out, 'cpu', 'fp32')
            check(name, run.model, found)
            assert ('transformers and PEFT will ignore it' in text) == (method != 'adapter'), text
            same_nll(run, method)  # the weights are those of the best evaluation
            if method in ('lora', 'last', 'full'):
                raises(UserError, export.export, out, os.path.join(tmp(), 'x'), match='cannot be')
        # the same folder and the code as it was: refused, not half loaded
        raises(UserError, open_run, out, 'cpu', 'fp32', match=name)


def test_a_parameter_added_to_lora_is_saved():
    one_edit('magnitude', ['lora'])


def test_a_parameter_added_to_the_block_is_saved():
    one_edit('gate', ['lora', 'full', 'last', 'adapter', 'prompt', 'head'])


def test_a_layer_norm_added_to_the_block_is_saved():
    one_edit('ln_3', ['lora', 'full', 'head'])


def test_a_layer_before_the_head_is_saved():
    one_edit('hidden_layer', ['lora', 'head', 'prompt', 'adapter'])


def test_a_head_of_two_layers_is_saved():
    one_edit('score', METHODS)
    labels = write('other.csv', table(60, ('news', 'ham')))
    with edited('score'):
        out, _ = train(*argv('--lora'))
        again, _ = train('--init', out, '--data', place()[1], '--max_steps', '1')
        assert open_run(again).labels == open_run(out).labels
        flags = ['--init', out, '--data', labels, '--out', os.path.join(tmp(), 'x')]
        raises(UserError, train_cls.main, flags, match='no row per label')
        more = write('more.csv', table(90, ('news', 'ham', 'spam')))
        flags[flags.index(labels)] = more
        raises(UserError, train_cls.main, flags, match='no row per label')


def test_a_head_of_an_edit_is_not_taken_along():
    """--model RUN starts with a fresh head, of whatever kind the run's was."""
    rows = write('three.csv', table(90, ('news', 'ham', 'spam')))
    with edited('score'):
        out, _ = train(*argv('--full'))
        model = GPT.from_pretrained(out, 3, new_head=True)
        assert len(model.score[2].weight) == 3
        train('--data', rows, '--model', out, '--full', '--max_steps', '1', '--dtype', 'fp32')
    kept = GPT.from_pretrained(out).wte.weight
    assert torch.equal(kept, model.wte.weight)


def test_what_an_edit_does_not_freeze_is_saved():
    """An edit of adapt() leaves the last LayerNorm trainable."""
    found, adapt = {}, lora.adapt

    def unfrozen(model, *a, **k):
        wrapped = adapt(model, *a, **k)
        model.ln_f.requires_grad_(True)
        return wrapped

    for method in ('lora', 'prompt', 'adapter'):
        with patched(lora, 'adapt', unfrozen), watched(lib.runfolder, found):
            out, text = train(*argv(*FLAGS[method]))
            got = dict(open_run(out, 'cpu', 'fp32').model.named_parameters())
        for n in ('ln_f.weight', 'ln_f.bias'):
            assert torch.equal(got[n], found['', n]) and got[n].std() > 1e-4, (method, n)
        if method != 'adapter':  # whose reader follows adapt()
            assert 'ln_f.bias, ln_f.weight: saved, but' in text, text
            plain = dict(open_run(out, 'cpu', 'fp32').model.named_parameters())
            assert torch.equal(plain['ln_f.bias'], found['', 'ln_f.bias'])


def test_resume_holds_what_an_edit_added():
    for name in ('magnitude', 'gate', 'hidden_layer'):
        out = os.path.join(tmp(), 'run')
        with edited(name), patched(train_cls, 'test', stop_here):
            raises(Stop, train_cls.main, argv('--lora', '--out', out))
            saved = load_resume(out)
            names = [n for n in saved['params'] if f'.{name}.' in f'.{n}.']
            assert names and len(saved['opt']['state']) == len(saved['params'])
            whole = saved['params']
        with edited(name):  # in two parts: the same
            again = os.path.join(tmp(), 'run')
            with patched(train_cls.training.Plan, 'evaluates', stop_after(2)):
                raises(Stop, train_cls.main, argv('--lora', '--out', again))
            with patched(train_cls, 'test', stop_here):
                raises(Stop, train_cls.main, ['--resume', '--out', again])
            for n, t in load_resume(again)['params'].items():
                assert torch.equal(t, whole[n]), n


def test_what_a_batch_norm_has_seen_is_kept():
    """Statistics of a head are saved with every method, resumed, and taken along by --init; so are
    buffers that an edit replaces, and one of integers."""
    init, _ = GPT.__init__, place()  # made without the edit

    def start(self, *a, **k):
        init(self, *a, **k)
        if self.num_labels:
            inner = nn.BatchNorm1d(32, momentum=None)  # which counts its batches
            self.score = nn.Sequential(inner, nn.Linear(32, self.num_labels))
            self.score.register_buffer('seen', torch.zeros(()))
            self.register_buffer('steps', torch.tensor(0))
            self.register_buffer('mask', torch.arange(32) < 20)

    def classify(self, ids, lengths):
        state = self.pool(self.hidden(ids), lengths)
        if self.training:
            self.score.seen, self.steps = self.score.seen + 1, self.steps + 1
        return self.score(state.masked_fill(self.mask, 0.0)) / (1 + self.score.seen)

    with patched(GPT, '__init__', start), patched(GPT, 'classify', classify):
        for method in METHODS:
            out, _ = train(*argv(*FLAGS[method]))
            run = open_run(out, 'cpu', 'fp32')
            same_nll(run, method)
            assert int(run.model.steps) == float(run.model.score.seen), method
            again = os.path.join(tmp(), 'run')
            with patched(train_cls.training.Plan, 'evaluates', stop_after(2)):
                raises(Stop, train_cls.main, argv(*FLAGS[method], '--out', again))
            train_cls.main(['--resume', '--out', again])
            losses = [[row.get('val_loss') for row in records(o)] for o in (out, again)]
            assert losses[0][-1] == losses[1][-1] and losses[0][-1], (method, losses)
            still = '--max_steps 1 --lr 1e-30 --batch_size 8 --dtype fp32'.split()
            new = open_run(train('--init', out, *argv()[:2], *still)[0], 'cpu', 'fp32')
            assert float(new.model.score.seen) == float(run.model.score.seen) + 1 > 1, method


def test_what_an_edit_keeps_frozen():
    """A parameter that requires no gradient stays as it was drawn, or read, and is saved all the
    same; with --full as well."""
    place()
    for owner, methods in ((LoRA, ['lora']), (lora.Adapter, ['adapter']), (GPT, [*METHODS])):
        trained, init, name = {}, owner.__init__, 'forward' if owner is not GPT else 'pool'
        plain = getattr(owner, name)

        def start(self, *a, init=init, **k):
            init(self, *a, **k)
            self.gain = nn.Parameter(torch.rand(()), requires_grad=False)
            if isinstance(self, GPT):
                self.wpe.weight.requires_grad_(False)

        def forward(self, *a, plain=plain):
            return plain(self, *a) * self.gain

        with patched(owner, '__init__', start), patched(owner, name, forward):
            for method in methods:
                with watched(lib.runfolder, trained):
                    run = open_run(train(*argv(*FLAGS[method]))[0], 'cpu', 'fp32')
                same_nll(run, owner, method)
        assert trained and not any(n.endswith(('gain', 'wpe.weight')) for _, n in trained)


def test_a_layer_may_be_called_base():
    """As the one that LoRA wraps; with it, and with a method that wraps nothing."""
    init, forward, _ = MLP.__init__, MLP.forward, place()

    def start(self, cfg):
        init(self, cfg)
        self.base = nn.Linear(32, 32)

    with (
        patched(MLP, '__init__', start),
        patched(MLP, 'forward', lambda self, x: forward(self, self.base(x))),
    ):
        for method in ('--full', '--head', '--lora', '--adapter'):
            run = open_run(train(*argv(*FLAGS[method[2:]]))[0], 'cpu', 'fp32')
            same_nll(run, method)


def test_scores_and_optimizers_of_an_edit_are_resumed():
    """numpy's numbers in the score; AdamW with a third state per parameter."""
    from lib.training import make_optimizer

    def amsgrad(*a, **k):
        opt = make_optimizer(*a, **k)
        return torch.optim.AdamW([{**group, 'amsgrad': True} for group in opt.param_groups])

    select, out = train_cls.selection, os.path.join(tmp(), 'run')
    with (
        patched(lib.training, 'make_optimizer', amsgrad),
        patched(train_cls, 'selection', lambda *a: tuple(map(np.float64, select(*a)))),
    ):
        whole, _ = train(*argv('--lora'))
        with patched(train_cls.training.Plan, 'evaluates', stop_after(2)):
            raises(Stop, train_cls.main, argv('--lora', '--out', out))
        train_cls.main(['--resume', '--out', out])
    a, b = (load_safetensors(f'{folder}/adapter_model.safetensors') for folder in (whole, out))
    assert a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def test_a_head_that_reads_more_states():
    """On a model that was loaded, a head of another width is drawn in that width."""
    init, _ = GPT.__init__, place()

    def start(self, cfg, num_labels=0):
        init(self, cfg, num_labels)
        if num_labels:
            self.score = model_module.Head(2 * cfg.n_embd, num_labels, bias=False)

    def classify(self, ids, lengths):
        x = self.hidden(ids)
        return self.score(torch.cat((self.pool(x, lengths), x[:, 0]), 1))

    with patched(GPT, '__init__', start), patched(GPT, 'classify', classify):
        for method in ('--head', '--lora'):
            out, _ = train(*argv(method))
            assert open_run(out).model.score.weight.shape == (2, 64)


def test_a_shared_parameter_stays_shared():
    """An edit gives two layers one weight: it is one in training and in an opened run."""
    init, _ = GPT.__init__, place()

    def start(self, *a):
        init(self, *a)
        self.h[1].mlp.c_fc.weight = self.h[0].mlp.c_fc.weight

    with patched(GPT, '__init__', start):
        for method in ('--full', '--lora'):
            run = open_run(train(*argv(method))[0], 'cpu', 'fp32', plain=True)
            first, second = (block.mlp.c_fc.weight for block in run.model.h)
            assert (first is second) == (method == '--full')  # LoRA is merged into each
            same_nll(run, method)


def test_lora_of_several_ranks_is_read_back():
    """The scale of a layer is its own, and its rank made of --r, whatever the rank of the first."""
    init, _ = LoRA.__init__, place()

    for factor in (3, 4):  # of c_attn, the first, and of c_fc

        def start(self, base, r, *rest, factor=factor):
            wider = base.weight.shape[1] == factor * base.weight.shape[0]
            init(self, base, r * (1 + wider), *rest)

        with patched(LoRA, '__init__', start):
            out, _ = train(*argv('--lora', '--max_steps', '20'))
            run = open_run(out, 'cpu', 'fp32')
            ranks = {m.A.shape[0] for m in run.model.modules() if isinstance(m, LoRA)}
        assert len(ranks) == 2, ranks
        same_nll(run)


def test_blocks_that_share_one_projection_of_lora():
    """A of the first block is that of all: written for each, as PEFT reads it."""
    adapt, _ = lora.adapt, place()

    def shared(model, *a, **k):
        wrapped = adapt(model, *a, **k)
        for name in wrapped:
            first = model.get_submodule('h.0.' + name.split('.', 2)[2])
            model.get_submodule(name).A = first.A
        return wrapped

    with patched(lora, 'adapt', shared):
        run = open_run(train(*argv('--lora'))[0], 'cpu', 'fp32')
    same_nll(run)


def stop_after(last):
    def evaluates(self, step):
        if step > last:
            raise Stop
        return step == last

    return evaluates


def test_generative_runs_keep_what_an_edit_added():
    rows = ['text,label'] + [f'{w} number {i},{w}' for i in range(30) for w in ('no', 'yes')]
    path, labels = write('rows.csv', '\n'.join(rows) + '\n'), ('no', 'yes')
    common = [*argv()[2:], '--data', path, '--eval_every', '1', '--max_steps', '2']
    for method, name in (
        *(('lora', name) for name in ('magnitude', 'gate')),
        *((method, 'gate') for method in ('full', 'prefix')),
    ):
        found, out = {}, os.path.join(tmp(), 'run')
        with edited(name), watched(lib.genrun, found):
            code, text, _ = script(train_gen.main, [*common, f'--{method}', '--out', out])
            assert not code and 'will ignore it' in text
            run = open_run(out, 'cpu', 'fp32')
            models = [model for model, _ in run.passes]
            assert len(models) == (1 if method == 'prefix' else 2)
            for label, model in zip(labels, models):
                check(name, model, found, label)
            if method == 'lora':
                a, b = (dict(m.named_parameters()) for m in models)
                assert any(not torch.equal(a[n], b[n]) for n in a if name in n), 'one for all'
            assert np.isfinite(run.logits(['no number 3', 'yes'])).all()
            if method != 'prefix':
                script(predict.main, [out, '--sample', 'no', '--num', '1'])
        raises(UserError, open_run, out, 'cpu', 'fp32', match=name)
    with edited('gate'):
        again = [*common, '--lora', '--posterior_steps', '2', '--out', out + '2']
        raises(UserError, train_gen.main, again, match='h.0.gate')
        assert not os.path.exists(out + '2')
        code, text, _ = script(train_gen.main, [*common, '--pretrain', '--out', out + '3'])
        tensors = load_safetensors(os.path.join(out + '3', 'model.safetensors'))
        assert 'transformer.h.1.gate' in tensors and 'will ignore it' in text
        train(*argv('--lora')[:3], out + '3', *argv()[4:])  # --model with the edit: read from there


def test_dropout_in_a_constructor_drops():
    """Without --trunk_dropout it is as model.py says; blocks that drop have no states to cache."""
    before = MLP.__init__

    def drop(self, cfg):
        before(self, cfg)
        self.resid_drop = nn.Dropout(0.5)

    flags = '--last 1 --max_steps 8 --batch_size 40 --log_every 1'.split()
    want, _ = train(*argv(*flags))
    with patched(MLP, '__init__', drop):
        (out, text), (plain, _) = train(*argv(*flags)), train(*argv(*flags, '--plain'))
    a, b, c = ([row['loss'] for row in records(run) if 'loss' in row] for run in (want, out, plain))
    assert 'caching' not in text and abs(a[0] - b[0]) > 1e-4
    assert len(a) == len(b) == len(c) > 2


def test_tables_and_shared_blocks_are_read_again():
    """Tensors that are attributes, and one block in two places."""
    before, start = Block.forward, GPT.__init__

    def tables(self, cfg, num_labels=0):
        start(self, cfg, num_labels)
        self.h[0].table = torch.linspace(0.9, 1.1, cfg.n_embd)

    def scaled(self, x):
        return before(self, x) * vars(self).get('table', 1.0)

    def shared(self, cfg, num_labels=0):
        start(self, cfg, num_labels)
        self.h = nn.ModuleList([self.h[0]] * cfg.n_layer)

    for edits in (
        [(GPT, '__init__', tables), (Block, 'forward', scaled)],
        [(GPT, '__init__', shared)],
    ):
        with contextlib.ExitStack() as stack:
            for edit in edits:
                stack.enter_context(patched(*edit))
            shape = '--model nano --scratch --n_layer 2 --n_head 2 --n_embd 32'.split()
            out, _ = train(*argv('--full'), *shape)
            run = open_run(out, 'cpu', 'fp32')
            val = own_data(run.info).val
            nll = metrics(softmax(run.logits(val.texts)), val.y, run.labels)['nll']
            assert abs(nll - run.info['results']['val_loss']) < 1e-5, edits


def test_optimizers_of_an_edit():
    """Groups of parameters keep the proportions of their rates; the state of any optimizer is
    resumed."""

    def plain_sgd(model, lr, weight_decay):
        params = list(lora.trainables(model).values())
        groups = [dict(params=params[:1], lr=16 * lr), dict(params=params[1:])]
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)

    rates = []

    def step(self, *a, before=torch.optim.SGD.step):
        rates.append([group['lr'] for group in self.param_groups])
        return before(self, *a)

    flags = argv('--lora', '--r', '2', '--dropout', '0')
    with patched(lib.training, 'make_optimizer', plain_sgd), patched(torch.optim.SGD, 'step', step):
        with patched(train_cls, 'test', stop_here):
            out = os.path.join(tmp(), 'run')
            raises(Stop, train_cls.main, [*flags, '--out', out])
            assert all(abs(a / b - 16) < 1e-9 for a, b in rates) and len({a for a, _ in rates}) > 2
            whole, again = load_resume(out)['params'], os.path.join(tmp(), 'run')
            with patched(train_cls.training.Plan, 'evaluates', stop_after(2)):
                raises(Stop, train_cls.main, [*flags, '--out', again])
            raises(Stop, train_cls.main, ['--resume', '--out', again])
        for n, t in load_resume(again)['params'].items():
            assert torch.equal(t, whole[n]), n


def test_schedulers_of_torch_set_the_rate():
    """Groups that a scheduler of torch.optim has taken over keep its rates; the log shows what the
    optimizer takes."""
    make, schedulers = lib.training.make_optimizer, []
    for start in (
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1, (step + 1) / 4)),
        lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.1),
    ):
        want = [0.1 * g for g in ((0.25, 0.5, 0.75, 1.0) if not schedulers else (1, 1, 0.1, 0.1))]

        def optimizer(model, lr, weight_decay, start=start):
            opt = make(model, 0.1, weight_decay)
            schedulers.append(start(opt))
            return opt

        def step(self, *a, before=torch.optim.AdamW.step):
            found = before(self, *a)
            schedulers[-1].step()  # at the end of a step
            return found

        with patched(lib.training, 'make_optimizer', optimizer):
            with patched(torch.optim.AdamW, 'step', step):
                out, _ = train(*argv('--lora', '--log_every', '1', '--max_steps', '4'))
        rates = [row['lr'] for row in records(out) if 'loss' in row]
        assert np.allclose(rates, want), (rates, want)


def test_what_begins_to_train_later_trains():
    """Whatever is unfrozen after speed_up: in the kernels it runs as written, beside cached states
    it is told so."""
    ids, n = torch.randint(256, (3, 9)), torch.tensor([9, 4, 7])
    for method, dtype in (
        ('lora', torch.float32),
        ('head', torch.float32),
        ('lora', torch.bfloat16),
    ):
        for part in ('h.0.ln_1', 'h.1.mlp.c_fc', 'h.0.attn.c_attn', 'wte'):
            grads = []
            for fast in (False, True):
                torch.manual_seed(0)
                model = GPT(Config(2, 2, 32, 16, 257), 2).init_weights()
                lora.adapt(model, method, **METHODS[method])
                place_on(stirred(model), torch.device('cpu'), dtype)
                if fast:
                    speed_up(model, torch.device('cpu'), dtype)
                    model.classify(ids, n).sum().backward()
                module = model.get_submodule(part)
                module.float().requires_grad_(True)  # an embedding was rounded
                model.eval().zero_grad()
                with autocast(torch.device('cpu'), dtype):
                    model.classify(ids, n).float().logsumexp(1).sum().backward()
                grads.append([p.grad for p in module.parameters() if p.requires_grad])
            for a, b in zip(*grads):
                limit = 1e-4 if dtype == torch.float32 else 0.1
                assert b is not None and far(b, a) < limit, (method, dtype, part)
    tokens = tokenize(tokenizer('bytes'), ['some text', 'another', 'a third one'])
    model = GPT(Config(2, 2, 32, 16, 257), 2).init_weights()
    lora.adapt(model, 'last', last=1)
    how = 16, 'first', torch.device('cpu'), torch.float32
    with fresh_cache():
        feed = lib.frozen.cache(model, dict(train=tokens), *how)
    index = np.arange(3)
    ids, n = data.collate(tokens, index, 16, 'first', 256)
    feed.net(ids, n, feed.states['train'](index, ids))
    model.h[0].ln_2.requires_grad_(True)
    with contextlib.ExitStack() as stack:
        stack.callback(model.requires_grad_, False)
        raises(UserError, feed.net, ids, n, feed.states['train'](index, ids), match='trains now')


def test_a_field_added_to_the_config_is_kept():
    """It shapes the model; the run folder holds it, with LoRA in the folder of its base."""

    @dataclasses.dataclass
    class Wider(Config):
        factor: float = 1.0

    before = GPT.classify

    def classify(self, ids, lengths):
        return before(self, ids, lengths) * self.cfg.factor

    shapes = {name: Wider(**vars(cfg)) for name, cfg in SHAPES.items()}
    shapes['nano'].factor = 3.0
    shape = '--model nano --scratch --n_layer 2 --n_head 2 --n_embd 32'.split()
    with patched(model_module, 'Config', Wider), patched(lib.base, 'SHAPES', shapes):
        with patched(model_module, 'SHAPES', shapes), patched(GPT, 'classify', classify):
            for method in ('--full', '--lora'):
                out, _ = train(*argv(method), *shape)
                run = open_run(out, 'cpu', 'fp32')
                assert run.model.cfg == Wider(2, 2, 32, 256, 257, 3.0), (method, run.model.cfg)


def test_names_and_tuples_that_gpt2_has_otherwise():
    """A parameter `bias` of an Attention is no mask; tables in a tuple are computed, not loaded."""
    start = Attention.__init__

    def init(self, cfg):
        start(self, cfg)
        self.bias = nn.Parameter(torch.ones(cfg.n_head, 1, 1))
        self.tables = torch.arange(3.0), [torch.ones(2)]

    with patched(Attention, '__init__', init):
        shape = '--model nano --scratch --n_layer 2 --n_head 2 --n_embd 32'.split()
        for method in ('--full', '--lora'):
            out, _ = train(*argv(method), *shape)
            model = open_run(out, 'cpu', 'fp32').model
            assert model.h[1].attn.bias.shape == (2, 1, 1)
            assert torch.equal(model.h[0].attn.tables[0], torch.arange(3.0))


def test_layer_norms_beside_adapters():
    """What the script unfreezes after adapt() is saved with the adapters, and read again."""
    adapt = lora.adapt

    def thawed(model, *a, **k):
        wrapped = adapt(model, *a, **k)
        model.h[0].ln_1.requires_grad_(True)
        return wrapped

    with patched(train_cls.lora, 'adapt', thawed), patched(train_cls, 'test', stop_here):
        out = os.path.join(tmp(), 'run')
        raises(Stop, train_cls.main, argv('--adapter', '--lr', '1e-2', '--out', out))
    tensors = load_safetensors(os.path.join(out, 'adapter.safetensors'))
    model = open_run(out, 'cpu', 'fp32').model
    assert torch.equal(model.h[0].ln_1.weight, tensors['h.0.ln_1.weight'])
    assert tensors['h.0.ln_1.weight'].std() > 1e-4


def test_buffers_go_to_the_device():
    with torch.device('meta'):  # a device that every machine has
        model = GPT(Config(1, 2, 32, 16, 257), 2)
    model.h[0].register_buffer('table', torch.ones(3), persistent=False)
    place_on(model, torch.device('meta'), torch.float32)
    assert model.h[0].table.device.type == 'meta'


def test_batches_of_another_number():
    """An edit of data.batches may leave rows out, or read some twice."""
    for change in (lambda plan: plan[:-1], lambda plan: plan + plan[:3]):

        def batches(*a, change=change):
            return change(data.batches(*a))

        lengths = np.arange(1, 100)
        sizes = [len(batches(lengths, 10, 3, epoch)) for epoch in range(3)]
        flags = dict(batch_tokens=None, batch_size=10, grad_accum=1, seed=3, eval_every=None)
        plan = lib.training.Plan(SimpleNamespace(**flags), lengths, batches, 0, 2.5, 1e-3)
        for step in range(1, plan.max_steps + 1):
            assert len(plan.rows(step))
        rows = plan.rows(sizes[0] + 1)
        assert plan.max_steps == sum(sizes[:2]) + math.ceil(sizes[2] / 2)
        assert np.array_equal(rows, batches(lengths, 10, 3, 1)[0])


def test_a_block_of_other_parts_is_named():
    """Its forward is the known one, what it is made of is not."""
    before = Block.__init__

    def init(self, cfg):
        before(self, cfg)
        self.ln_1 = nn.RMSNorm(cfg.n_embd)

    shape = '--model nano --scratch --n_layer 2 --n_head 2 --n_embd 32'.split()
    with patched(Block, '__init__', init):
        out = os.path.join(tmp(), 'run')
        _, _, err = script(train_cls.main, [*argv('--lora', '--out', out), *shape])
    assert err.count('note: no faster version of Block: Block.__init__ edited') >= 1, err


def test_a_lora_without_a_place_in_peft_is_refused():
    """A vector in place of A and B ((IA)^3), A as a buffer (VeRA): said before the first step."""

    def vector(self, base, r, scale, p, classes=0):
        nn.Module.__init__(self)
        self.base, self.scale, self.p = base, scale, p
        self.gain = nn.Parameter(torch.ones(base.weight.shape[1]))

    before = LoRA.__init__

    def buffer(self, *a, **k):
        before(self, *a, **k)
        A = self._parameters.pop('A').detach()
        self.register_buffer('A', A)

    def forward(self, x):
        return self.base(x) * self.gain

    for init, lacking in (vector, 'A, B'), (buffer, 'A'):
        with patched(LoRA, '__init__', init), contextlib.ExitStack() as stack:
            if init is vector:
                stack.enter_context(patched(LoRA, 'forward', forward))
            out = os.path.join(tmp(), 'run')
            flags = argv('--lora', '--out', out)
            raises(UserError, train_cls.main, flags, match=f'no parameter {lacking}:')
            raises(UserError, train_gen.main, flags, match=f'no parameter {lacking}:')


def test_what_changes_after_speed_up_is_computed():
    """Frozen weights, LoRA's while they are frozen, parts and methods of the model itself, hooks:
    the faster parts follow."""
    cpu, ids, n = torch.device('cpu'), torch.randint(256, (3, 9)), torch.tensor([9, 4, 7])

    def weight(module, factor=0.5):
        with torch.no_grad():
            module.mul_(factor)

    changes = dict(
        matrix=lambda model: weight(model.h[1].mlp.c_fc.base.weight),
        data=lambda model: setattr(
            model.h[1].mlp.c_fc.base.weight, 'data', model.h[1].mlp.c_fc.base.weight.data / 2
        ),
        lora=lambda model: weight(model.h[0].attn.c_attn.B),
        embedding=lambda model: weight(model.wte.weight),
        pool=lambda model: setattr(model, 'pool', lambda x, lengths: x.mean(1)),
        pooling=lambda model: setattr(model, 'pooling', 'mean'),
        part=lambda model: setattr(model.h[1], 'mlp', nn.Identity()),
        forward=lambda model: setattr(model.h[1].mlp, 'forward', lambda x: x / 2),
        logits=lambda model: setattr(model, 'next_logits', lambda h: h @ model.wte.weight.t() / 2),
        last=lambda model: setattr(model.h[-1], 'forward', lambda x: x / 2),
    )
    for name, change in changes.items():
        for trains in (False, True):
            found = []
            for fast in (False, True):
                torch.manual_seed(0)
                model = GPT(Config(2, 2, 32, 16, 257), 2).init_weights()
                lora.adapt(model, 'lora', **METHODS['lora'])
                stirred(model).requires_grad_(False)
                place_on(model, cpu, torch.float32)
                for m in model.modules() if trains else ():
                    if isinstance(m, LoRA):
                        m.A.requires_grad_(True), m.B.requires_grad_(True)
                if fast:
                    speed_up(model, cpu, torch.float32)
                ends = torch.tensor([True, False, True])
                model.classify(ids, n), model.logprob(ids, n, ends)
                change(model)
                found.append((model.classify(ids, n), model.logprob(ids, n, ends)))
            for a, b in zip(*found):
                assert far(b, a) < 1e-4, (name, trains)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda m, args, y: y / 2 if isinstance(m, MLP) else None
    )
    with contextlib.ExitStack() as stack:
        stack.callback(hook.remove)
        found = []
        for fast in (False, True):
            torch.manual_seed(0)
            model = GPT(Config(2, 2, 32, 16, 257), 2).init_weights().requires_grad_(False)
            if fast:
                speed_up(model, cpu, torch.float32)
            found.append(model.classify(ids, n))
        assert far(*found) < 1e-5


def test_rates_that_the_script_sets():
    """ReduceLROnPlateau, which does not say that it sets them, and a number set by hand stay."""
    before, found = torch.optim.AdamW.step, []

    def step(self, *a, **k):
        found.append([group['lr'] for group in self.param_groups])
        done = before(self, *a, **k)
        if len(found) == 3:
            self.param_groups[0]['lr'] = 7e-4
        return done

    with patched(torch.optim.AdamW, 'step', step):
        train(*argv('--lora', '--max_steps', '6'))
    assert [rates[0] for rates in found][3:] == 3 * [7e-4], found
    assert 0 < found[2][0] < found[1][0], found


def test_what_trains_in_bfloat16_is_saved():
    def thawed(model, *a, place=lib.device.place, **k):
        place(model, *a, **k)
        model.wpe.weight.requires_grad_(True)  # rounded, since it was frozen
        return model

    with patched(lib.device, 'place', thawed), patched(train_cls, 'test', stop_here):
        out = os.path.join(tmp(), 'run')
        flags = argv('--last', '1', '--out', out, '--lr', '1e-2')
        raises(Stop, train_cls.main, [*flags, '--dtype', 'bf16'])
    read, saved = (load_safetensors(f'{folder}/model.safetensors') for folder in (argv()[3], out))
    name = 'transformer.wpe.weight'
    assert far(saved[name], read[name]) > 1e-3 and saved[name].dtype == torch.float32


def test_what_the_script_alone_changed_is_named():
    """An opened run would not have it. What model.py and lora.py make has no line."""

    class Mine(GPT):
        pass

    def changed(args, labels):
        model = lib.base.build_model(args, labels)
        model.__class__ = Mine
        model.classify = model.classify
        model.h[1].register_forward_hook(lambda m, x, y: y)
        return model

    with patched(train_cls, 'build_model', changed):
        text = train(*argv('--head', '--max_steps', '1'))[1]
    names = f'{__name__}.Mine, model.classify, a hook of h.*: in this script alone'
    assert names in text, text
    for flags in FLAGS.values():
        text = train(*argv(*flags, '--max_steps', '1'))[1]
        assert 'in this script alone' not in text and 'other probabilities' not in text


def test_a_run_that_is_not_what_was_trained_is_named():
    """Whatever the script changed, and wherever: a hook, another pooling."""

    def tripled(model, args):
        model.score.register_forward_hook(lambda m, x, y: 3 * y)

    def mean(model, args):
        model.pooling = 'mean'

    for change in (tripled, mean):
        with patched(lib.training, 'wrap_blocks', change):
            text = train(*argv('--full', '--max_steps', '20'))[1]
        assert 'gives validation texts other probabilities than in training (by 0.' in text, text


def test_a_copy_of_lora_is_refused():
    class Copy(nn.Module):
        def __init__(self, base, r, scale, p, classes=0):
            super().__init__()
            self.base, self.A = base, nn.Parameter(torch.zeros(r, base.weight.shape[0]))

        def forward(self, x):
            return self.base(x)

    with patched(lora, 'LoRA', Copy):
        raises(UserError, train, *argv('--lora', '--max_steps', '1'), match='not a copy')
    raises(UserError, lora.adapt, GPT(SHAPES['nano']), 'Lora', match="'Lora' is none of lora, head")
