"""Generative runs once they are trained: prior, calibration, prompts."""

import json
import os

import numpy as np
import torch

import data
import eval as evaluation  # not `eval`, which is Python's own
import lib.metrics
import lib.runs
import predict
import train_gen
from lib.classes import auc, fit_calibration
from lib.files import UserError, read_json, write_json
from lib.metrics import softmax
from lib.plots import read_log
from lib.prompts import ANSWERS, PROMPTS
from lib.runs import NEUTRAL, open_run
from lib.scoring import text_logprobs
from lib.tokens import tokenize
from model import GPT
from tests.helpers import (
    CPU,
    QUICKLY,
    SHAPE,
    SMALL,
    copied,
    formula_model,
    gen_run,
    generate,
    joint,
    one_by_one,
    opened,
    over_base,
    patched,
    pretrained,
    raises,
    run_eval,
    save_hf,
    script,
    skip,
    tiny_run,
    tmp,
    topics,
    train,
    tree,
    weights,
    write,
)


def test_gen_prior():
    run = opened('lora')
    counts = np.bincount(data.load(topics()).train.y)
    assert run.info['prior'] == dict(zip(run.labels, (counts / counts.sum()).tolist()))
    assert counts[0] > 1.5 * counts[1]
    tokens = tokenize(run.enc, ['cat', 'one two', ''], cache=False)
    pure = text_logprobs(run.passes[0][0], tokens, 128, 'first', CPU, torch.float32)
    assert np.allclose(run.logits_of(tokens), pure + np.log(counts / counts.sum()), atol=1e-4)
    out, _ = generate(*over_base(*QUICKLY), '--prior', 'uniform')
    assert weights(out) == weights(joint())  # it plays no part in the likelihoods
    other = open_run(out, 'cpu', 'fp32')
    assert list(other.info['prior'].values()) == [0.5, 0.5]
    assert opened('zero_shot').info['prior'] == other.info['prior']
    mine = open_run(joint(), 'cpu', 'fp32').logits_of(tokens)
    assert np.allclose(
        other.logits_of(tokens) - np.log(0.5), mine - np.log(counts / counts.sum()), atol=1e-4
    )


def test_gen_calibration_is_fitted():
    """Recovers known tau and biases; few or separable rows give finite ones; the NLL decreases."""
    rng = np.random.RandomState(0)
    prior = np.log([0.5, 0.3, 0.2]).astype(np.float32)

    def nll(x, y, tau=1.0, bias=0.0):
        return lib.metrics.metrics(softmax(x / tau + prior + bias), y, ['a', 'b', 'c'])['nll']

    for tau, bias in ((12.0, (0.7, -0.2, -0.5)), (0.5, (0.0, 0.0, 0.0)), (1.0, (-1.0, 2.0, -1.0))):
        x = (-80 + 2 * tau * rng.randn(20000, 3)).astype(np.float32)
        p = softmax(x / tau + prior + np.array(bias))
        y = (rng.rand(20000, 1) > p.cumsum(1)).sum(1)
        got, b = fit_calibration(x, prior, y)
        assert abs(got / tau - 1) < 0.05, (tau, got, bias, b)
        assert np.abs(b - b.mean() - bias + np.mean(bias)).max() < 0.1, (tau, got, bias, b)
        assert nll(x, y, got, b) <= nll(x, y) + 1e-3
        assert tau == 0.5 or nll(x, y, got, b) < nll(x, y) - 0.05
    for x, y in (
        ([[-300.0, -310, -305], [-200, -190, -220]], [0, 1]),
        ([[-300.0, -310, -305], [-200, -190, -220]], [1, 0]),
        ([[-5.0, -9, -9]], [0]),
        (np.eye(3)[[0, 1, 2] * 9] * 50, [0, 1, 2] * 9),
    ):
        x, y = np.array(x, np.float32), np.array(y)
        tau, b = fit_calibration(x, prior, y)
        assert 0 < tau < np.inf and np.isfinite(b).all(), (x, y, tau, b)
        assert nll(x, y, tau, b) <= nll(x, y) + 1e-3, (x, y, tau, b)


def test_gen_decision_is_bayes_rule():
    """Bayes' rule decides, with --calibrated the calibrated rule; probabilities and explanation are
    those of the rule that decided. Scoring by another rule leaves the run's results alone."""
    out = copied(gen_run('lora'))
    path = os.path.join(out, 'run.json')
    info = read_json(path)
    write_json(path, {**info, 'calibration': dict(tau=2.0, bias=dict(animals=0.0, numbers=500.0))})

    def run_predict(*flags):
        argv = [out, '--json', '--explain', '--dtype', 'fp32', 'cat dog', *flags]
        return json.loads(script(predict.main, argv)[1])

    run = open_run(out, 'cpu', 'fp32')
    logits = run.logits(['cat dog'])
    prior = np.log(list(info['prior'].values()))
    assert np.allclose(run.calibrated(logits), (logits - prior) / 2 + prior + [0, 500], atol=1e-3)
    bayes, calibrated = run_predict(), run_predict('--calibrated')
    assert (bayes['label'], calibrated['label']) == ('animals', 'numbers')
    assert np.allclose(list(bayes['probs'].values()), softmax(logits)[0], atol=1e-4)
    want = softmax(run.calibrated(logits))[0]
    assert np.allclose(list(calibrated['probs'].values()), want, atol=1e-4) and want[1] > 0.99
    for answer, rule in ((bayes, logits[0]), (calibrated, run.calibrated(logits)[0])):
        margin = sum(number for _, number in answer['explain'])  # of the class that was decided for
        assert abs(margin - np.ptp(rule)) < 1e-3 and margin > 0, (answer, rule)
    before = tree(out)
    plain, calibrated = (
        json.loads(run_eval([out, '--json', '-', '--dtype', 'fp32', *flag])[0])['runs'][0]
        for flag in ([], ['--calibrated'])
    )
    assert plain['accuracy'] == 1 and calibrated['accuracy'] < 0.5
    assert plain['nll'] == calibrated['nll'] > 100 and plain['uncalibrated']['nll'] < 0.1
    assert 'before calibration' in run_eval([out, '--dtype', 'fp32'])[0]
    assert tree(out) == before  # the results of the run are those of its own rule and precision
    run_eval([out])
    changed = tree(out)
    assert {name for name in changed if changed[name] != before[name]} == {'eval_results.json'}
    raises(UserError, evaluation.main, [tiny_run('full'), '--calibrated'], match='discriminative')
    raises(UserError, predict.main, [tiny_run('full'), '--calibrated', 'x'], match='discriminative')


def test_gen_auc():
    s, y = np.array([3.0, 1, 2, 2, 0]), np.array([True, False, True, False, False])
    assert abs(auc(s, y) - 5.5 / 6) < 1e-12  # one pair of six is a tie
    assert abs(auc(s, ~y) - 0.5 / 6) < 1e-12 and auc(np.zeros(5), y) == 0.5
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        skip('scikit-learn is not installed (by hand it was tested)')
    rng = np.random.RandomState(0)
    for digits in (1, 9):
        s, y = rng.randn(500).round(digits).astype(np.float32), rng.rand(500) < 0.2
        assert abs(auc(s, y) - roc_auc_score(y, s)) < 1e-9


def test_gen_prompts():
    assert opened('zero_shot').info['prompts'] == dict(animals='animals:\n', numbers='numbers:\n')
    assert opened('direct').info['prompts'] == dict(
        animals='\nLabel: animals', numbers='\nLabel: numbers'
    )
    for table in (PROMPTS, ANSWERS):  # the published data sets have good ones
        assert set(table) == {'sst2', 'agnews', 'imdb', 'sms'}
        assert all(len(set(p.values())) == len(p) for p in table.values())
    for name in ('sst2', 'agnews', 'imdb', 'sms'):
        assert set(PROMPTS[name]) == set(ANSWERS[name])
    mine = dict(animals='cat dog\n', numbers='one two\n')
    out, _ = generate(*over_base('--zero_shot', '--prompts', write('p.json', json.dumps(mine))))
    run = open_run(out, 'cpu', 'fp32')
    assert run.info['prompts'] == mine
    model = GPT.from_pretrained(pretrained()).eval()
    want = [one_by_one(model, b'horse', True, list(mine[label].encode())) for label in run.labels]
    assert np.abs(run.logits(['horse'])[0] - run.log_prior - want).max() < 1e-3
    out = os.path.join(tmp(), 'none')
    for content, match in (
        ('["a"]', 'JSON object'),
        ('{"animals": "x"}', "'numbers' is missing"),
        ('{', 'p.json'),
        ('{"animals": 3, "numbers": "x"}', 'JSON object'),
        ('{"animals": "", "numbers": "y"}', 'JSON object'),
        ('{"animals": "x", "numbers": "y", "plants": "z"}', "'plants' is no class"),
    ):
        raises(
            UserError,
            train_gen.main,
            [*over_base('--zero_shot', '--prompts', write('p.json', content), '--out', out)],
            match=match,
        )
    assert not os.path.exists(out)


def test_gen_contextual_calibration():
    """--direct: log P(class's words | text) minus the log of the mean posterior after content-free
    texts. After a single such text the posterior is uniform; after several, it is so on average
    before the correction."""
    run = opened('direct')
    model = GPT.from_pretrained(pretrained()).eval()
    raw = [
        one_by_one(model, list(f'cat dog{prompt}'.encode()), False, first=7)
        for prompt in run.info['prompts'].values()
    ]
    assert np.abs(run.logits(['cat dog'])[0] - run.log_prior + run.neutral - raw).max() < 1e-3
    p = np.array(
        [softmax((run.logits([t]) - run.log_prior + run.neutral).astype(float))[0] for t in NEUTRAL]
    )
    assert np.allclose(np.exp(run.neutral), p.mean(0), atol=1e-4), run.neutral
    assert np.ptp(run.neutral) > 0.01, run.neutral
    with patched(lib.runs, 'NEUTRAL', ['N/A']):
        alone = opened('direct')
    of_one, of_three = (softmax(r.logits(['N/A']))[0] for r in (alone, run))
    assert np.allclose(of_one, 0.5, atol=1e-4) and not np.allclose(of_three, 0.5, atol=1e-4)


def test_gen_zero_shot_over_random_weights():
    """It knows nothing, but is the same run when it is opened again, or it is refused."""
    out = os.path.join(tmp(), 'run')
    try:
        generate('--data', topics(), *SHAPE, '--zero_shot', out=out)
    except UserError as e:
        assert not os.path.exists(out), e  # refused before anything is written
    else:
        assert open_run(out, 'cpu', 'fp32').logits(['cat']).shape == (1, 2)


def test_gen_zero_shot_over_another_base():
    base = copied(pretrained())
    out, _ = generate('--data', topics(), '--model', base, '--zero_shot')
    open_run(out)
    save_hf(base, formula_model(SMALL, 0))
    open_run(out)  # a small base travels with the run
    save_hf(os.path.join(out, 'base'), formula_model(SMALL, 0))
    raises(UserError, open_run, out, match='another base model')


def test_gen_runs_beside_discriminative_ones():
    """eval.py compares both kinds on the same rows."""
    cls, _ = train(
        '--data',
        topics(),
        '--model',
        pretrained(),
        *'--dtype fp32 --full --lr 1e-2 --max_steps 30'.split(),
    )
    out = os.path.join(tmp(), 'numbers.json')
    text, _ = run_eval([cls, gen_run('lora'), gen_run('direct'), '--dtype', 'fp32', '--json', out])
    numbers = read_json(out)
    want = read_json(os.path.join(gen_run('lora'), 'eval_results.json'))['accuracy']
    assert len(numbers['runs']) == 3 and numbers['runs'][1]['accuracy'] == want
    assert 'uncalibrated' not in numbers['runs'][0] and "McNemar's test" in text
    assert read_log(os.path.join(gen_run('lora'), 'log.jsonl'))['val_loss']
