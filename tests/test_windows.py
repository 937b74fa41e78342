"""lib/windows.py: long texts read whole (--windows)."""

import numpy as np
import torch

import predict
from lib import scoring, windows
from lib.files import UserError
from lib.metrics import softmax
from lib.runs import open_run
from lib.tokens import cut_note, tokenize
from lib.windows import spans
from tests.helpers import (
    CPU,
    SHAPE,
    class_model,
    gen_run,
    generate,
    lm_logits,
    one_by_one,
    opened,
    raises,
    run_eval,
    script,
    tiny_run,
    tree,
    write,
)

LONG = 'cat dog horse one two three bird fish ' * 7  # 266 bytes; the models have 96 positions


def whole(run, on=True):
    run.windows = on
    return run


def test_spans():
    for size in (1, 2, 5, 8, 95):
        for length in range(1, 4 * size + 3):
            found = spans(length, size)
            assert found[0][0] == 0 and found[-1][1] == length and len(set(found)) == len(found)
            assert all(0 < b - a <= size for a, b in found)
            assert len(found) == 1 or all(b - a == size for a, b in found)
            for (_, before), (start, _) in zip(found, found[1:]):
                assert before - start >= (size // 2 if size > 1 else 0), (length, size, found)


def test_windows_of_a_discriminative_run():
    """The mean of log-probabilities of all windows, one at a time; a short text has its logits."""
    run = open_run(tiny_run('lora'), 'cpu', 'fp32')
    size = run.args['max_length']
    texts = ['short', LONG, '', 'x' * size, LONG[:-30] + ' dull', LONG * 4]
    got = whole(run).logits(texts)
    whole(run, False)
    for text, row in zip(texts, got):
        raw, at, logs = text.encode(), 0, []
        while True:
            at = min(at, max(0, len(raw) - size))
            logs.append(np.log(softmax(run.logits([raw[at : at + size].decode()]))[0]))
            if at + size >= len(raw):
                break
            at += size // 2
        want = softmax(np.mean(logs, axis=0)[None])
        assert np.allclose(softmax(row[None]), want, atol=1e-5), (text[:9], len(logs))
    short = [text for text in texts if len(text) <= size]
    assert np.array_equal(whole(run).logits(short), whole(run, False).logits(short))
    assert not np.allclose(run.logits([LONG * 4]), got[-1:], atol=1e-4)
    assert whole(run).logits([]).shape == (0, 2)


@torch.no_grad()
def strided(model, raw, context, size):
    """log P(raw) in float64: a window of `size` tokens that moves on by half, the last one up to
    the end; each token once, from the first window that has it."""
    if len(raw) <= size:
        return (
            one_by_one(model, raw, bool(raw), context)
            if raw
            else one_by_one(model, [256], 0, context)
        )
    total, scored, at = 0.0, 0, 0
    while scored < len(raw):
        at = min(at, len(raw) - size)
        part = raw[at : at + size]
        ids = torch.tensor([[model.end, *context, *part, model.end]])
        logprobs = lm_logits(model, ids[:, :-1])[0].log_softmax(1)
        last = at + size == len(raw)
        for i in range(scored - at, len(part) + last):
            place = 1 + len(context) + i
            total += float(logprobs[place - 1, ids[0, place]])
        scored, at = at + size, at + size // 2
    return total


def test_windows_of_a_generative_run():
    """The exact log P of the whole text. Up to the positions of the model it is what a run reads
    anyway if its max_length is as long; beyond, every token is scored once, in a window that the
    reference computes in float64."""
    texts = ['cat dog', LONG, '', 'x' * 95, 'one two ' * 12, LONG + 'z']
    for method in ['zero_shot']:
        run = opened(method)
        got = whole(run).logits(texts) - run.log_prior
        for c, (model, context) in enumerate(run.passes):
            model, size = open_run(gen_run(method), 'cpu', 'fp32', plain=True).passes[c][0], 95
            for text, value in zip(texts, got[:, c]):
                want = strided(model.double(), list(text.encode()), context, size - len(context))
                assert abs(value - want) < 1e-3 * max(1, abs(want) / 100), (method, text[:9])
    for method in ('lora', 'zero_shot'):
        run = opened(method)
        room = run.args['max_length']
        inside = ['cat dog', '', 'x' * room, 'y']
        assert np.array_equal(whole(run).logits(inside), whole(run, False).logits(inside)), method
        run.args['max_length'] = 8  # whole texts, in spite of it
        assert np.array_equal(whole(run).logits(inside)[[0, 1, 3]], run.logits(inside)[[0, 1, 3]])
        assert np.allclose(run.logits(inside)[2], opened(method).logits(inside)[2], atol=1e-3)
        tokens = tokenize(run.enc, inside, cache=False)
        nats = run.nats_per_token(tokens, run.logits_of(tokens))
        total = np.logaddexp.reduce(run.logits_of(tokens), axis=1)
        assert np.allclose(nats, total / [8, 1, room + 1, 2])
    raises(UserError, whole(opened('direct')).logits, ['cat'], match='--windows')
    model, texts = class_model('prompt'), ['cat', 'x' * 253, 'dog ' * 20]  # 256 positions
    tokens, where = tokenize(run.enc, texts, cache=False), (253, 'first', CPU, torch.float32)
    read = (module.text_logprobs(model, tokens, *where) for module in (windows, scoring))
    assert np.array_equal(*read)


def test_windows_of_the_scripts():
    """predict.py and eval.py --windows read whole texts and leave the run's results alone; a note
    says when more than a fifth of the tokens is cut: in training, evaluation and prediction."""
    rows = ''.join(f'{"cat dog " * 30}{i},a\n{"one two " * 30}{i},b\n' for i in range(20))
    path = write('long.csv', 'text,label\n' + rows)
    out, text = generate('--data', path, *SHAPE, '--max_steps', '4')
    note = '% of the tokens are cut by --max_length 95: '
    assert f' 61 {note}' in text
    run = open_run(out, 'cpu', 'fp32')
    for flags, on in (([], False), (['--windows'], True)):
        _, shown, err = script(predict.main, [out, LONG, '--dtype', 'fp32', *flags])
        (label, p), *_ = whole(run, on).predict([LONG])
        assert shown.startswith(f'{label}\t{p:.4f}') and (note in err) == (not on), err
        before = tree(out)
        shown, _ = run_eval([out, '--dtype', 'fp32', *flags])
        assert (note in shown) == (not on) and tree(out) == before
    run_eval([out, '--windows'])
    assert tree(out) == before
    assert note not in script(predict.main, [out, 'cat dog'])[2]
    argv = [out, LONG, '--windows', '--explain']
    raises(UserError, predict.main, argv, match='leave --windows out')
    assert cut_note(np.array([10, 6]), 9) == [] and '40 %' in cut_note(np.array([10]), 6)[0]
