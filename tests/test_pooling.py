"""--pool: which state the head reads, in model.py and everywhere a run goes."""

import contextlib
import functools
import io
import os

import torch

import lora
import predict
import train_cls
from lib.device import place
from lib.fast import speed_up
from lib.files import UserError, read_json, write_json
from lib.metrics import metrics, softmax
from lib.rundata import own_data
from lib.runs import open_run
from tests.helpers import (
    CPU,
    FLAGS,
    METHODS,
    TINY,
    far,
    formula_model,
    hugging_face,
    losses_of,
    ragged,
    raises,
    script,
    stirred,
    tiny_run,
    tmp,
    train,
)

POOLS = ('last', 'first', 'mean', 'pad')
WIDTH = 40  # what 'pad' pads to


def pooled(model, pooling):
    model.pooling, model.pad_to = pooling, WIDTH
    return model


def reference(model, ids, n, pooling):
    """The state of each text, read alone (B, C)."""
    rows = []
    for row, k in zip(ids, n.tolist()):
        h = model.hidden(row[None, :k])[0]
        if pooling == 'pad':
            filled = torch.full((1, WIDTH), model.end)
            filled[0, :k] = row[:k]
            h = model.hidden(filled)[0]
        rows.append(dict(last=h[-1], first=h[0], mean=h.mean(0), pad=h[-1])[pooling])
    return torch.stack(rows)


@torch.no_grad()
def test_what_the_head_reads():
    """Each pooling reads the states it names, whatever the padding of the batch is."""
    for method in ('head', 'prompt'):
        model = formula_model()
        lora.adapt(model, method, **METHODS[method])
        for pooling in POOLS:
            pooled(model, pooling)
            seen = [ragged(257, pad=7), ragged(257, pad=9, extra=3)]
            seen = seen[:1] if pooling == 'pad' else seen  # whose pads are seen: <|endoftext|>
            for ids, n in seen:
                real = torch.arange(ids.shape[1]) < n[:, None]
                ids = ids.where(real, 256) if pooling == 'pad' else ids
                want = model.score(reference(model, ids, n, pooling))
                assert far(model.classify(ids, n), want) < 1e-5, (method, pooling)


def test_pooling_is_as_fast_as_it_can_be():
    """speed_up has no complaint about an ordinary flag, and gives the plain model's values."""
    ids, n = ragged(257, pad=256)
    for method in ('lora', 'full', 'prompt'):
        for pooling in POOLS:
            logits, err = [], io.StringIO()
            for fast in (False, True):
                torch.manual_seed(0)
                model = pooled(formula_model(), pooling)
                lora.adapt(model, method, **METHODS[method])
                place(stirred(model), CPU, torch.float32)
                if fast:
                    with contextlib.redirect_stderr(err):
                        speed_up(model, CPU, torch.float32)
                    assert ('classify' in vars(model)) <= (pooling == 'last')
                logits.append(model(ids, n))
            assert far(logits[1], logits[0]) < 1e-4 and not err.getvalue(), (method, pooling)


@functools.lru_cache(None)
def run_of(method, pooling, *flags):
    flags = ['--pool', pooling, '--dtype', 'fp32', '--max_length', '48', *flags]
    return train(*TINY, *FLAGS[method], *flags, '--max_samples', '16')


def test_a_run_remembers_its_pooling():
    for method, pooling in (
        ('lora', 'mean'),
        ('full', 'first'),
        ('prompt', 'pad'),
        ('head', 'pad'),
    ):
        out, text = run_of(method, pooling)
        assert f'  --pool {pooling}: transformers and PEFT' in text, text
        run = open_run(out, 'cpu', 'fp32')
        assert (run.args['pool'], run.model.pooling, run.model.pad_to) == (pooling, pooling, 48)
        val = own_data(run.info).val
        m = metrics(softmax(run.logits(val.texts)), val.y, run.labels)
        assert abs(m['nll'] - run.info['results']['val_loss']) < 1e-5, (method, pooling)
        one = script(predict.main, [out, '--dtype', 'fp32', val.texts[0]])[1]
        p = softmax(run.logits(val.texts[:1])).max()
        assert f'\t{p:.4f}\t' in one, one
        match = f'--pool {pooling}'
        raises(UserError, predict.main, [out, '--export', os.path.join(tmp(), 'x')], match=match)
    assert '--pool' not in train(*TINY, '--head')[1]


def test_frozen_states_of_every_pooling():
    """The cache of frozen blocks (Head and Tail) gives the run without it, epoch after epoch."""
    for method in ('head', 'last'):
        for pooling in POOLS:
            several = ['--epochs', '2', '--log_every', '1']
            out, text = run_of(method, pooling, *several)
            assert 'caching the output of' in text and 'not used' not in text, text
            plain, text = run_of(method, pooling, *several, '--plain')
            assert 'caching' not in text
            for a, b in zip(losses_of(out), losses_of(plain)):
                assert abs(a - b) < 1e-4, (method, pooling)


def test_pool_in_run_json():
    """A pooling that does not exist is refused, and a run that does not say which it has."""
    out = tiny_run('head')
    info, folder = read_json(os.path.join(out, 'run.json')), tmp()
    for name in ('config.json', 'model.safetensors'):
        os.symlink(os.path.join(out, name), os.path.join(folder, name))
    for pooling in (None, 'median', ['last']):
        args = {**info['args'], 'pool': pooling}
        if pooling is None:
            del args['pool']
        write_json(os.path.join(folder, 'run.json'), {**info, 'args': args})
        raises(UserError, open_run, folder, match='pool is missing or malformed')
    raises(UserError, train_cls.main, [*TINY, '--pool', 'median'], match='--pool')


def test_last_is_what_transformers_reads():
    """And no other pooling is: the note says so."""
    auto = hugging_face('AutoModelForSequenceClassification')
    for method, pooling, same in (('full', 'first', False), ('full', 'last', True)):
        out = run_of(method, pooling)[0]
        run = open_run(out, 'cpu', 'fp32')
        ids = torch.tensor([run.enc.encode_ordinary('the song was warm')])
        with torch.no_grad():
            theirs = auto.from_pretrained(out)(ids).logits
        assert (far(theirs, torch.from_numpy(run.logits(['the song was warm']))) < 1e-4) == same
