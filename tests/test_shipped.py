"""lib/shipped.py: which code is that of GPT-2 and LoRA, and what an edit keeps from running."""

import functools
import os

import numpy as np
import torch

import data
import lora
import model as model_module
import predict
from lib import export, frozen, runfolder, shipped
from lib.files import UserError
from lib.metrics import metrics, softmax
from lib.rundata import own_data
from lib.runs import open_run
from lib.tokens import tokenize, tokenizer
from lib.versions import versions
from model import GPT, Attention, Block, Embedding, Head
from tests.helpers import (
    CPU,
    SMALL,
    TINY,
    assert_same,
    far,
    formula_model,
    fresh_cache,
    hugging_face,
    patched,
    ragged,
    raises,
    script,
    tiny_run,
    tmp,
    train,
)


def test_the_code_is_the_known_one():
    assert shipped.present() == shipped.known(), 'python -m lib.shipped'


def test_what_counts_as_an_edit():
    def other(self, x):
        return x + self.attn(self.ln_1(x))

    first = other

    def other(self, x):
        """With a docstring."""
        return x + self.attn(self.ln_1(x))  # and a comment

    @functools.wraps(Block.forward)
    def wrapper(self, x):
        return other(self, x)

    assert shipped.code(first) == shipped.code(other) != shipped.code(Block.forward)
    assert not shipped.code(wrapper) and not shipped.code(len)
    small = GPT(SMALL, 2)
    assert not shipped.edited(small.h) and not shipped.edited_methods(small, shipped.CLASSIFY)
    for function in (other, wrapper, lambda self, x: x):
        with patched(Block, 'forward', function):
            assert shipped.edited(small.h) == ['Block.forward']
            assert not shipped.edited(small.h[0].attn)
    with patched(GPT, 'pool', lambda self, x, lengths: x[:, 0]):
        assert shipped.edited_methods(small, shipped.CLASSIFY) == ['GPT.pool']
    small.h[0].mlp = torch.nn.Sequential(torch.nn.Linear(4, 4), Own())
    small.h[1].gate = torch.nn.Parameter(torch.ones(1))
    assert shipped.edited(small.h) == ['Block.gate', 'Own.forward']
    assert not shipped.edited(Embedding(3, 4))


class Own(torch.nn.Module):
    def forward(self, x):
        return x


def test_an_edit_without_parameters_is_not_exported():
    """transformers would compute plain GPT-2 from the files: other labels, without a word."""
    for name, methods in dict(classify=['--lora', '--full'], hidden=['--last 1']).items():
        before = getattr(GPT, name)

        def edited(self, *args, before=before):
            return before(self, *args) * 0.5

        for flags in methods:
            with patched(GPT, name, edited):
                out, text = train(*TINY, *flags.split(), '--dtype', 'fp32')
                match = f'GPT.{name} was edited, and transformers computes GPT-2'
                raises(UserError, export.export, out, os.path.join(tmp(), 'x'), match=match)
            assert f'GPT.{name} as edited: transformers and PEFT compute GPT-2 without it' in text
    plain = formula_model()
    assert not runfolder.notes(plain, 'full')
    init = Attention.__init__
    for owner, name, edited in (
        (GPT, 'forward', lambda self, ids, lengths: 2 * self.classify(ids, lengths)),
        (Head, 'forward', lambda self, x: torch.cos(x @ self.weight.t())),
        (Attention, '__init__', lambda self, cfg: init(self, cfg)),
    ):
        with patched(owner, name, edited):
            assert f'{owner.__name__}.{name} as edited' in runfolder.notes(plain, 'full')[0]
    code, text, _ = script(predict.main, [tiny_run('full'), '--export', os.path.join(tmp(), 'y')])
    assert not code and 'wrote' in text


def test_states_of_edited_blocks_are_not_cached():
    """A frozen block that skips itself now and then has no states to cache."""
    small = formula_model()
    lora.adapt(small, 'head')
    small.eval()
    tokens = tokenize(tokenizer('bytes'), ['abc', 'de'], cache=False)
    splits, where = dict(train=tokens), (16, 'first', CPU, torch.float32)
    with fresh_cache():
        assert frozen.cache(small, splits, *where)
        with patched(Block, 'forward', lambda self, x: x if torch.rand(()) < 0.5 else x + 1):
            assert not frozen.cache(small, splits, *where)


def test_an_edit_of_lora_is_exported_if_delta_follows():
    class Gain(lora.LoRA):
        def __init__(self, *args):
            super().__init__(*args)
            self.gain = torch.nn.Parameter(torch.full((self.B.shape[-2],), 1.5))

        def forward(self, x):
            y = self.base(x)
            return y + (super().forward(x) - y) * self.gain

        def delta(self, index=None):
            return super().delta(index) * self.gain.detach()

    with patched(lora, 'LoRA', Gain):
        out, _ = train(*TINY, *'--lora --dtype fp32 --lr 1e-2 --epochs 3'.split())
        folder = os.path.join(tmp(), 'x')
        export.export(out, folder)
        want = torch.from_numpy(open_run(out, 'cpu', 'fp32').logits(['good', 'not bad']))
    got = torch.from_numpy(open_run(folder, 'cpu', 'fp32').logits(['good', 'not bad']))
    assert far(got, want) < 1e-5


def test_an_edit_of_an_embedding_or_of_the_head_is_not_cached():
    """Dropout in front of the head, and noise on embeddings: in training alone."""

    def pool(self, x, lengths, before=GPT.pool):
        return torch.nn.functional.dropout(before(self, x, lengths), 0.5, self.training)

    def noisy(self, ids):
        x = torch.nn.functional.embedding(ids, self.weight)
        return x + torch.rand_like(x) if self.training else x

    small = formula_model()
    lora.adapt(small, 'head')
    tokens = tokenize(tokenizer('bytes'), ['abc', 'de'], cache=False)
    splits, where = dict(train=tokens), (16, 'first', CPU, torch.float32)
    ids, n = ragged(257)
    with fresh_cache():
        with patched(GPT, 'pool', pool):
            feed = frozen.cache(small.train(), splits, *where)
            ids, n = data.collate(tokens, np.arange(2), 16, 'first', small.end)
            states = feed.states['train'](np.arange(2), ids)
            a, b = (feed.net(ids, n, states) for _ in range(2))
            assert not torch.equal(a, b)
        with patched(Embedding, 'forward', noisy):
            assert not frozen.cache(small, splits, *where)


def test_an_edited_lora_is_not_merged():
    """This one is W + B A in a comparison on a few tokens."""

    def late(self, x, before=lora.LoRA.forward):
        early = torch.arange(x.shape[-2]) < 100
        return torch.where(early[:, None], before(self, x), self.base(x))

    def layers():
        run = open_run(tiny_run('lora'), 'cpu', 'fp32', plain=True)
        return sum(isinstance(m, lora.LoRA) for m in run.model.modules())

    assert not layers()
    with patched(lora.LoRA, 'forward', late):
        assert layers()
    want = open_run(tiny_run('lora'), 'cpu', 'fp32').logits(['good', 'not bad'])
    with patched(lora.LoRA, 'delta', lambda self, index=None: 0 * self.base.weight):
        assert layers()
        got = open_run(tiny_run('lora'), 'cpu', 'fp32').logits(['good', 'not bad'])
        refused = [tiny_run('lora'), os.path.join(tmp(), 'x')]
        raises(UserError, export.export, *refused, match=r'LoRA of h.0.attn.c_attn as edited')
    assert np.allclose(got, want, atol=1e-4), 'folded by an edit of delta() alone'


class PerLayer(lora.LoRA):
    def __init__(self, base, r, scale, *rest):
        super().__init__(base, r, scale * base.weight.shape[0] / 32, *rest)


def test_a_scale_of_lora_per_layer_is_saved():
    """As README.md says of the scale in `add_lora`; and one that trains."""

    class Trained(lora.LoRA):
        def __init__(self, base, r, scale, *rest):
            super().__init__(base, r, scale, *rest)
            self.scale = torch.nn.Parameter(torch.tensor(float(scale)))

    for kind in (PerLayer, Trained):
        with patched(lora, 'LoRA', kind):
            out, _ = train(*TINY, *'--lora --dtype fp32 --lr 1e-2 --epochs 3'.split())
            run = open_run(out, 'cpu', 'fp32')
        val = own_data(run.info).val
        nll = metrics(softmax(run.logits(val.texts)), val.y, run.labels)['nll']
        assert abs(nll - run.info['results']['val_loss']) < 1e-5, kind
    scales = [float(m.scale) for m in run.model.modules() if isinstance(m, lora.LoRA)]
    assert len({round(scale, 5) for scale in scales}) > 4, 'the scales have not trained'


def test_a_scale_of_lora_per_layer_opens_in_peft():
    AutoPeft = hugging_face('AutoPeftModelForSequenceClassification')

    with patched(lora, 'LoRA', PerLayer):
        out, _ = train(*TINY, *'--lora --dtype fp32 --lr 1e-2 --epochs 3'.split())
        assert_same(open_run(out, 'cpu', 'fp32'), AutoPeft.from_pretrained(out).eval(), 'PerLayer')


def test_the_hash_of_the_code_is_the_same_in_every_process():
    """A table of functions is hashed by their names, not by where they are in memory."""
    found = []
    for _ in range(2):
        scope = {}
        exec('def act(x): return x', scope)
        found.append(scope['act'])
    before = versions()['code']
    try:
        hashes = []
        for act in found:
            model_module.ACTS = dict(act=act)
            hashes.append(versions()['code'])
    finally:
        del model_module.ACTS
    assert hashes[0] == hashes[1] != before == versions()['code']
