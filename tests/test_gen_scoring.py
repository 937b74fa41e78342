"""lib/scoring.py: log-probabilities of texts."""

import functools
import os
import random

import numpy as np
import torch
import torch.nn.functional as F

import data
import lib.scoring
from lib.fast import speed_up
from lib.files import UserError, read_json, write_json
from lib.peft import load_peft, save_peft
from lib.runs import open_run
from lib.scoring import ends_here, text_logprobs
from lib.tokens import tokenize, tokenizer
from model import GPT
from tests.helpers import (
    CPU,
    GEN,
    SMALL,
    class_model,
    formula_model,
    gen_run,
    lm_logits,
    one_by_one,
    patched,
    ragged,
    raises,
    save_hf,
    skip,
    tmp,
)

TEXTS = ['', 'a', 'two words', 'exactly twelv', 'this one is far too long for twelve']


def test_gen_exact_score():
    """The first token follows <|endoftext|>; the final <|endoftext|> counts unless the text was
    cut; '' is <|endoftext|> only."""
    model, enc = class_model('plain'), tokenizer('bytes')
    tokens = tokenize(enc, TEXTS, cache=False)
    for keep in ('first', 'last'):
        got = text_logprobs(model, tokens, 13, keep, CPU, torch.float32)[:, 0]
        for i, text in enumerate(TEXTS):
            raw = list(text.encode())
            ids = raw[:13] if keep == 'first' else raw[-13:]
            want = one_by_one(model, ids, len(raw) <= 13)
            assert abs(got[i] - want) < 1e-4, (keep, text, got[i], want)
    # the empty text's one id
    assert abs(one_by_one(model, [], True) - one_by_one(model, [256], False)) < 1e-9
    ids, n = ragged(257, pad=0)
    whole, context = torch.tensor([True, False, True, False]), (5, 9, 200)
    with torch.no_grad():
        got = model.logprob(ids, n, whole, context, first=torch.tensor([2, 0, 29, 4]))
        for row, k, w, f, value in zip(ids, n, whole, (2, 0, 29, 4), got):
            want = one_by_one(model, row[:k].tolist(), bool(w), context, f)
            assert abs(want - float(value)) < 1e-4
        each = model.token_logprobs(ids, n, whole)
        assert each.shape == (4, 31) and torch.allclose(each.sum(1), model.logprob(ids, n, whole))
        assert each[1, 0] != 0 and not each[1, 1:].any() and each[2, 30] != 0
        assert not each[0, 8:].any() and not each[3, 12:].any()


def test_gen_score_equals_transformers():
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        skip('transformers is not installed')
    folder, model = tmp(), class_model('plain')
    save_hf(folder, model)
    theirs = GPT2LMHeadModel.from_pretrained(folder).double().eval()
    tokens = tokenize(tokenizer('bytes'), TEXTS, cache=False)
    got = text_logprobs(GPT.from_pretrained(folder), tokens, 13, 'first', CPU, torch.float32)[:, 0]
    for i, ids in enumerate(tokens[i].tolist() for i in range(len(TEXTS))):
        line = [256, *ids] + [256] * (TEXTS[i] != '')
        line = torch.tensor([line[: 1 + 13] if len(ids) > 13 else line])
        with torch.no_grad():
            want = theirs(line).logits[0, :-1].log_softmax(1).gather(1, line[0, 1:, None]).sum()
        assert abs(got[i] - float(want)) < 1e-4, (TEXTS[i], got[i], want)


def test_gen_score_is_of_the_text_alone():
    """The score of a text is the same alone, in a batch of 64, in another order and padded by 100
    of any id: for a plain model, K LoRA updates and K prompts."""
    rng = random.Random(0)
    texts = [''.join(rng.choice('abc de') for _ in range(rng.randint(0, 40))) for _ in range(64)]
    tokens = tokenize(tokenizer('bytes'), texts, cache=False)
    order = rng.sample(range(64), 64)
    shuffled = tokenize(tokenizer('bytes'), [texts[i] for i in order], cache=False)
    for kind in ('plain', 'lora', 'prompt'):
        model = class_model(kind)
        how = dict(max_length=32, keep='first', device=CPU, dtype=torch.float32)
        score = functools.partial(text_logprobs, model, **how)
        each = [tokenize(tokenizer('bytes'), [text], cache=False) for text in texts]
        alone = np.concatenate([score(one) for one in each])
        assert alone.shape == (64, 1 if kind == 'plain' else 3)
        assert kind == 'plain' or float(np.abs(alone[:, 0] - alone[:, 1]).max()) > 1
        with patched(lib.scoring, 'CACHED', 10**9):  # all of them are one batch
            assert np.abs(score(tokens) - alone).max() < 1e-4, kind
        assert np.abs(score(shuffled) - alone[order]).max() < 1e-4, kind
        ids, n = data.collate(tokens, range(64), 32, 'first', 256)
        ends = ends_here(model.end, tokens, range(64), 32)
        for pad in (0, 256, None):
            shape = (64, ids.shape[1] + 100)
            padded = torch.randint(256, shape) if pad is None else torch.full(shape, pad)
            for row, mine, k in zip(padded, ids, n):
                row[:k] = mine[:k]
            with torch.no_grad():
                got = model.logprob(padded, n, ends).view(64, -1).numpy()
            assert np.abs(got - alone).max() < 1e-4, (kind, pad)


def by_loss(model, ids, lengths, ends, context=(), first=None):
    """GPT.logprob as most scripts compute it: one text and one class at a time, mean loss over all
    logits times the number of tokens."""
    rows = []
    for b, n in enumerate(lengths.tolist()):
        x = torch.cat((torch.tensor([model.end, *context]), ids[b, :n]))[None]  # (1, 1 + P + n)
        start = 1 + len(context) + (int(first[b]) if first is not None else 0)
        y = F.pad(x, (0, 1), value=model.end)[0, start : None if ends[b] else -1]  # what is scored
        logits = lm_logits(model, x)[:, start - 1 : start - 1 + len(y)]
        rows.append(torch.stack([-F.cross_entropy(one, y) * len(y) for one in logits]))
    return torch.stack(rows) if model.classes else torch.cat(rows)


def test_gen_stacked_classes_equal_separate_models():
    """K adapters in one model give what K models with one adapter each give; `of` reads each text
    with one of the prompts. With lib/fast.py, blocks below the first adapter read each text
    once."""
    ids, n = ragged(257, pad=256)
    whole = torch.tensor([True, True, False, True])
    for kind in ('lora', 'prompt', 'top'):
        model, folders = class_model(kind), [tmp() for _ in range(3)]
        for i, folder in enumerate(folders):
            save_peft(folder, model, 'somewhere', i)
        with torch.no_grad():
            separate = []
            for folder in folders:
                one = formula_model(SMALL, 0)
                load_peft(folder, one)
                separate.append(one.eval().logprob(ids, n, whole))
            want, stacked = torch.stack(separate, 1), formula_model(SMALL, 0)
            load_peft(folders, stacked, classes=3)
            assert float((by_loss(stacked.eval(), ids, n, whole) - want).abs().max()) < 1e-3, kind
            assert float((want[:, 0] - want[:, 1]).abs().min()) > 0.1, 'it would prove nothing'
            for fast in (False, True):
                rows = []
                if fast:
                    speed_up(stacked, CPU, torch.float32)
                seen = lambda _, args: rows.append(len(args[0]))  # noqa: E731
                hooks = [block.register_forward_pre_hook(seen) for block in stacked.h]
                got = stacked.logprob(ids, n, whole)
                [hook.remove() for hook in hooks]
                once = 4 if kind == 'top' and fast else 12
                assert rows == [once, once, 12], (kind, rows)
                assert got.shape == (4, 3) and float(((got - want) / want).abs().max()) < 1e-5, kind
                if kind == 'prompt':
                    of = torch.tensor([2, 0, 1, 2])
                    mine = stacked.logprob(ids, n, whole, y=of)
                    assert torch.allclose(mine, want.gather(1, of[:, None])[:, 0], rtol=1e-5)
        config = os.path.join(folders[1], 'adapter_config.json')
        change = dict(num_virtual_tokens=3) if kind == 'prompt' else dict(lora_alpha=99)
        write_json(config, {**read_json(config), **change})
        other = formula_model(SMALL, 0)
        raises(UserError, load_peft, folders, other, classes=3, match='must agree')


def test_gen_scores_by_loss_agree():
    """Mean loss times count, the usual computation, gives the numbers of every kind of run."""
    texts = ['cat dog', '', 'seven', 'horse fish ' * 30]
    for method in GEN:
        run = open_run(gen_run(method), 'cpu', 'fp32', plain=True)
        want, calls = run.logits(texts), []

        def logprob(model, ids, lengths, ends, context=(), first=None, y=None):
            calls.append(len(ids))
            return by_loss(model, ids, lengths, ends, context, first)

        with patched(GPT, 'logprob', logprob):
            got = run.logits(texts)
        assert calls and np.abs(got - want).max() < 1e-3, (method, got, want)


def test_gen_bf16_is_close():
    texts = ['cat dog', 'one two three', 'horse fish ' * 30]
    for method in GEN:
        runs = [open_run(gen_run(method), 'cpu', dtype) for dtype in ('fp32', 'bf16')]
        want, got = (run.logits(texts) for run in runs)
        assert 0 < np.abs(got - want).max() < 0.01 * np.abs(want).max(), (method, got, want)
