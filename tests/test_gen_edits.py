"""Edits of train_gen.py, of what scores and of the data: they hold wherever they should, or are
refused in a sentence before work is lost."""

import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import eval as evaluation
import lib.genrun
import lib.metrics
import lib.scoring
import lib.training
import lora
import predict
import train_gen
from lib import tokens, windows
from lib.explain import explain
from lib.files import UserError, read_json, write_json
from lib.runs import GenRun, open_run
from lib.tensors import load_safetensors
from model import GPT, Head
from tests.helpers import (
    SHAPE,
    TINY,
    far,
    fresh_cache,
    gen_run,
    generate,
    opened,
    over_base,
    patched,
    raises,
    records,
    script,
    tiny_run,
    tmp,
    train,
)

SHORT = ['--max_steps', '4', '--lr', '1e-2', '--dtype', 'fp32']


def test_numbers_of_numpy_and_torch_are_written():
    """What an edit adds to results, metrics and the log need not be Python's own numbers."""
    evaluate, metrics = train_gen.Phase.evaluate, lib.metrics.metrics

    def more(self, step):
        score, results = evaluate(self, step)
        return score, {**results, 'a': np.float32(0.5), 'b': torch.ones(2), 'c': None}

    def counted(*a, **k):
        return {**metrics(*a, **k), 'right': np.int64(3)}

    with patched(train_gen.Phase, 'evaluate', more), patched(lib.metrics, 'metrics', counted):
        out, text = generate(*over_base('--lora', *SHORT))
    row = next(r for r in records(out) if 'a' in r)
    assert (row['a'], row['b'], row['c']) == (0.5, [1.0, 1.0], None) and 'a 0.5000  b' in text
    assert read_json(os.path.join(out, 'eval_results.json'))['right'] == 3
    assert '\nright 3\n' in text[text.index('test (') :]


def test_kept_token_ids_are_those_of_the_tokenizer_as_it_is():
    """A function of another file that an edit of tokenize() calls has changed."""
    enc, texts = tokens.tokenizer('bytes'), [f'Text {i}' for i in range(50)]
    before = type(enc).encode_ordinary_batch
    lower = lambda self, texts, **k: before(self, [t.lower() for t in texts], **k)  # noqa: E731
    with fresh_cache():
        want = tokens.tokenize(enc, texts)
        assert np.array_equal(tokens.tokenize(enc, texts).flat, want.flat)
        with patched(type(enc), 'encode_ordinary_batch', lower):
            got = tokens.tokenize(enc, texts)
            assert bytes(got[7].astype(np.uint8)) == b'text 7'


def test_an_explanation_of_another_rule_is_refused():
    """The numbers of the words are log-probabilities: an edit of what is made of them is not in
    them."""
    run, text = opened('lora'), 'cat dog one'
    explain(run, text)
    logprob, logprobs_of, calibrated = GPT.logprob, GenRun.logprobs_of, GenRun.calibrated
    for owner, name, edit in (
        (GPT, 'logprob', lambda self, ids, n, *a: logprob(self, ids, n, *a) / n[:, None]),
        (GenRun, 'logprobs_of', lambda self, *a, **k: 0.5 * logprobs_of(self, *a, **k) ** 2),
        (GenRun, 'calibrated', lambda self, logits: calibrated(self, logits) ** 2),
    ):
        with patched(owner, name, edit):
            raises(UserError, explain, run, text, match='do not sum to what decides')
            if name == 'calibrated':
                page = os.path.join(tmp(), 'page.html')
                argv = [gen_run('lora'), '--html', page, '--dtype', 'fp32']
                assert not script(evaluation.main, argv)[0]
                with open(page, encoding='utf-8') as f:
                    assert 'do not sum to what decides' in f.read()


def test_a_run_without_calibration():
    with patched(train_gen, 'calibrate', lambda run, *a: dict(rule='bayes')):
        out, _ = generate(*over_base('--lora', *SHORT))
    assert set(read_json(os.path.join(out, 'run.json'))['results']) == {'val_accuracy', 'val_loss'}


def test_another_calibration_decides_everywhere():
    """In the final test as in the run that is opened; tau may be one per class."""
    bias, found = dict(animals=3.0, numbers=-3.0), []
    for tau in (25.0, np.array([25.0, 25.0]), [25.0, 20.0]):
        own = dict(rule='calibrated', calibration=dict(tau=tau, bias=bias))
        with patched(train_gen, 'calibrate', lambda run, *a, own=own: own):
            out, _ = generate(*over_base('--lora', *SHORT))
        tested = read_json(os.path.join(out, 'eval_results.json'))
        script(evaluation.main, [out, '--dtype', 'fp32'])
        again = read_json(os.path.join(out, 'eval_results.json'))
        assert abs(tested['nll'] - again['nll']) < 1e-6, (tested['nll'], again['nll'])
        found.append(tested['nll'])
    assert abs(found[0] - found[1]) < 1e-6 < abs(found[0] - found[2]), found
    code, text, _ = script(predict.main, ['--explain', out, 'one red cat'])
    assert not code and text, text
    info = read_json(os.path.join(out, 'run.json'))
    for tau in ([25.0], [25.0, -1.0], [25.0, None], 'two', {}):
        info['calibration']['tau'] = tau
        write_json(os.path.join(out, 'run.json'), info)
        raises(UserError, open_run, out, match='calibration')


def test_a_loop_that_is_left_early_saves_its_weights():
    """By a break of an edit, before the first evaluation and after it."""
    steps = lib.training.Plan.steps

    def two(self, opt, interrupt, done):
        for step, rows in steps(self, opt, interrupt, done):
            if step > 2:
                return
            yield step, rows

    with patched(lib.training.Plan, 'steps', two):
        for every in ('4', '1'):
            out, text = train(*TINY, *SHORT, '--eval_every', every)
            ended = '(step 2, ended at step 2 of 4)' if every == '4' else 'ended at step 2 of 4)'
            assert ended in text, text
            assert open_run(out, 'cpu', 'fp32').logits(['good']).shape == (1, 2)
        out, text = generate(*over_base('--lora', *SHORT[2:], '--max_steps', '12'))
        assert 'lacks the classes' not in text
        moved = load_safetensors(os.path.join(out, 'animals', 'adapter_model.safetensors'))
        assert any(t.any() for n, t in moved.items() if 'lora_B' in n)


def test_an_untied_head():
    """Under the name that transformers gives it, it is kept and read."""
    before = GPT.__init__

    def init(self, cfg, num_labels=0):
        before(self, cfg, num_labels)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)

    def next_logits(self, h):
        return self.lm_head(h.float())

    flags = ['--data', over_base()[1], *SHAPE, *SHORT]  # made without the edit
    with patched(GPT, '__init__', init), patched(GPT, 'next_logits', next_logits):
        for method in ('--full', '--lora'):
            out, _ = generate(*flags, method)
            run = open_run(out, 'cpu', 'fp32')
            assert np.isfinite(run.logits(['cat dog'])).all()
            if method == '--full':
                saved = load_safetensors(os.path.join(out, 'animals', 'model.safetensors'))
                head = saved['transformer.lm_head.weight']
                assert torch.equal(run.passes[0][0].lm_head.weight, head)
                assert not torch.equal(head, saved['transformer.wte.weight'])
        base, _ = generate('--pretrain', *flags)
        generate(*flags[:2], '--model', base, '--lora', *SHORT)


def test_a_reader_of_other_types():
    """Rows as lists, labels as numbers; what is no text, or not among the labels, is named."""

    def reader(data_dir):
        rows = [[f'text {i} of {"ab"[i % 2]}', i % 2] for i in range(60)]
        return dict(train=rows), [1, 0]

    data.READERS['mine'] = reader
    try:
        ds = data.load('mine')
        assert ds.labels == ['1', '0'] and isinstance(ds.train.texts[0], str)
        run, start = ['--data', 'mine', *TINY[2:], *SHORT], os.getcwd()
        os.chdir(tmp())
        try:
            os.mkdir('mine')  # hides no reader
            train(*run)
        finally:
            os.chdir(start)
        for text in (('a', 'b'), None, 3):
            data.READERS['mine'] = lambda d, t=text: (dict(train=[('a', 0), (t, 1)] * 30), None)
            raises(TypeError, data.load, 'mine', match='is no string')
        data.READERS['mine'] = lambda d: (dict(train=[('a', 0), ('b', 1), ('c', 2)] * 30), [0, 1])
        raises(UserError, data.load, 'mine', match="the label '2', which")
    finally:
        del data.READERS['mine']


def test_a_tied_head_of_the_language_model():
    """An edit gives wte's weight a second name, which the file of the weights lacks."""
    flags, init = over_base('--lora', *SHORT), GPT.__init__

    def start(self, cfg, num_labels=0):
        init(self, cfg, num_labels)
        self.lm_head = Head(cfg.n_embd, cfg.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    logits = open_run(generate(*flags)[0], 'cpu', 'fp32').logits(['good', 'not bad'])
    with patched(GPT, '__init__', start):
        with patched(GPT, 'next_logits', lambda self, h: self.lm_head(h.float())):
            run = open_run(generate(*flags)[0], 'cpu', 'fp32')
            assert run.passes[0][0].lm_head.weight is run.passes[0][0].wte.weight
            assert far(*map(torch.from_numpy, (run.logits(['good', 'not bad']), logits))) < 1e-4


def test_a_rank_per_class():
    """Classes whose adapters differ are read one by one."""
    flags, build, ranks = over_base('--lora', *SHORT), lib.genrun.build, iter((2, 4))

    def other(run, kind):
        run.args.r = next(ranks)
        return build(run, kind)

    with patched(lib.genrun, 'build', other):
        out, _ = generate(*flags)
    run = open_run(out, 'cpu', 'fp32')
    assert [model.h[0].attn.c_attn.A.shape[0] for model, _ in run.passes] == [2, 4]
    assert len({model for model, _ in run.passes}) == 2


def test_what_adapt_adds_is_read_again():
    """LoRA around an embedding, which add_lora does not know."""

    class Wte(nn.Module):
        def __init__(self, wte):
            super().__init__()
            self.weight = wte.weight
            self.down = nn.Parameter(torch.randn(wte.weight.shape[0], 2))
            self.up = nn.Parameter(torch.zeros(2, wte.weight.shape[1]))

        def forward(self, ids):
            return F.embedding(ids, self.weight) + F.embedding(ids, self.down) @ self.up

    adapt = lora.adapt

    def more(model, method, *a, **k):
        wrapped = adapt(model, method, *a, **k)
        model.wte = Wte(model.wte)
        return wrapped

    with patched(lora, 'adapt', more):
        for run, opened_as in (
            (train(*TINY, *SHORT, '--lora')[0], lambda run: run.model),
            (generate(*over_base('--lora', *SHORT))[0], lambda run: run.passes[0][0]),
        ):
            assert opened_as(open_run(run, 'cpu', 'fp32')).wte.up.any(), run


def test_weights_of_one_class_and_the_posterior():
    """A base that each class trains for itself is no base of all."""
    build = lib.genrun.build

    def norm(run, kind):
        built = build(run, kind)
        built[0].ln_f.requires_grad_(True)
        return built

    out = os.path.join(tmp(), 'run')
    argv = over_base('--lora', *SHORT, '--posterior_steps', '1', '--out', out)
    with patched(lib.genrun, 'build', norm):
        raises(UserError, train_gen.main, argv, match='has weights of its class alone beside LoRA')


def test_a_cut_of_an_edit_is_explained():
    """The words that collate() leaves are those that get a number."""
    before = data.collate

    def ends(tokens_, index, length, keep, end, *rest, **k):
        both = [
            np.r_[row[:2], row[-2:]] if len(row) > 4 else row
            for row in map(tokens_.__getitem__, index)
        ]
        flat = tokens.Tokens(np.concatenate(both), np.cumsum([0, *map(len, both)]))
        return before(flat, np.arange(len(both)), length, keep, end, *rest, **k)

    run, text = open_run(tiny_run('lora'), 'cpu', 'fp32'), 'ab' + 'x ' * 20 + 'yz'
    with patched(data, 'collate', ends):
        assert ''.join(word for word, _ in explain(run, text)[1]) == 'abyz'


def test_windows_end_as_other_texts_do():
    """An edit of ends_here: no text is scored with its <|endoftext|>."""
    run, texts = opened('lora'), ['cat dog', 'one']
    none = lambda end, tokens, index, *a: torch.zeros(len(index), dtype=torch.bool)  # noqa: E731
    before = run.logits(texts)
    with patched(lib.scoring, 'ends_here', none):
        want = run.logits(texts)
        run.windows = True
        assert np.allclose(run.logits(texts), want, atol=1e-3)
    assert not np.allclose(want, before, atol=0.1) and windows is run.scorer


def test_results_of_the_code_that_trained_are_kept():
    """eval.py beside an edited model.py does not replace the results of the final test."""
    out, _ = train(*TINY, *SHORT)
    path = os.path.join(out, 'eval_results.json')
    before = read_json(path)
    pool = lambda self, x, lengths: x[:, 0]  # noqa: E731
    cut = lambda *a, before=data.collate: before(*a[:2], 3, *a[3:])  # noqa: E731
    for where, name, edit in ((GPT, 'pool', pool), (data, 'collate', cut)):
        with patched(where, name, edit):
            _, _, err = script(evaluation.main, [out])
        assert f'note: {out} was trained with other code' in err, name
        assert 'eval_results.json keeps the results of the code as it was' in err, name
        assert read_json(path) == before
    assert not script(evaluation.main, [out])[0] and read_json(path) == before
