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
from lib.classes import calibrate, fit_calibration
from lib.files import UserError, read_json, write_json
from lib.metrics import auc, softmax
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


def two_rules(rule):
    """A run in which Bayes' rule and the calibrated one disagree, with this rule in its run.json
    (None: as runs of earlier versions)."""
    out = copied(gen_run('lora'))
    path = os.path.join(out, 'run.json')
    info = read_json(path)
    info['calibration'] = dict(tau=2.0, bias=dict(animals=0.0, numbers=500.0))
    info.pop('rule')
    write_json(path, {**info, 'rule': rule} if rule else info)
    return out, np.log(list(info['prior'].values()))


def test_gen_one_rule():
    """The rule of the run, or --rule, gives label, probabilities, threshold, explanation and ECE at
    once; a run of an earlier version has Bayes' rule."""
    for own in ('calibrated', 'bayes', None):
        out, prior = two_rules(own)
        run = open_run(out, 'cpu', 'fp32')
        logits = run.logits(['cat dog'])
        assert np.allclose(
            run.calibrated(logits), (logits - prior) / 2 + prior + [0, 500], atol=1e-3
        )
        rules = dict(bayes=logits, calibrated=run.calibrated(logits))
        for flags, rule in (([], own or 'bayes'), *((['--rule', r], r) for r in rules)):
            argv = [out, '--json', '--explain', '--dtype', 'fp32', 'cat dog', *flags]
            record, scores = json.loads(script(predict.main, argv)[1]), rules[rule]
            label = dict(bayes='animals', calibrated='numbers')[rule]
            probs = record['probs']
            assert record['label'] == label == max(probs, key=probs.get), (own, flags)
            assert np.allclose(list(probs.values()), softmax(scores)[0], atol=1e-4)
            assert probs[label] > 0.9
            margin = sum(number for _, number in record['explain'])
            assert abs(margin - np.ptp(scores)) < 1e-3 and margin > 0, (record, rule)
            assert record['runner_up'] == ({'animals', 'numbers'} - {label}).pop()
            plain = script(predict.main, [out, '--threshold', '0.9', 'cat dog', *flags])[1]
            assert plain.startswith(f'{label}\t'), (own, flags, plain)  # not '-'
            if not flags:
                assert run.predict(['cat dog']) == [(label, float(softmax(scores).max()))]


def test_gen_scores_are_of_one_rule():
    """eval.py: accuracy, NLL and ECE are those of the rule that decides, and the run's own results
    are written by its own rule alone."""
    for own in ('calibrated', 'bayes', None):
        out, _ = two_rules(own)
        before = tree(out)
        found = {}
        for rule in ('calibrated', 'bayes', None):
            flags = ['--rule', rule] if rule else []
            text = run_eval([out, '--json', '-', '--dtype', 'fp32', *flags])[0]
            found[rule] = json.loads(text)['runs'][0]
        bad, good = found['calibrated'], found['bayes']
        assert good['accuracy'] == 1 and good['nll'] < 0.1 and good['ece'] < 0.1
        assert bad['accuracy'] < 0.5 and bad['nll'] > 100 and bad['ece'] > 0.5
        assert bad['uncalibrated'] == {key: good[key] for key in ('nll', 'brier', 'ece')}
        assert 'uncalibrated' not in good and found[None] == found[own or 'bayes']
        for flags in ([], ['--rule', 'calibrated']):
            shown = 'before calibration' in run_eval([out, '--dtype', 'fp32', *flags])[0]
            assert shown == (own == 'calibrated' or bool(flags))
        run_eval([out, '--rule', 'bayes'])
        assert tree(out) == before  # results are those of the run's own rule and precision
        run_eval([out])
        changed = tree(out)
        assert {name for name in changed if changed[name] != before[name]} == {'eval_results.json'}
    for main in (evaluation.main, predict.main):
        argv = [tiny_run('full'), '--rule', 'bayes', *['x'] * (main is predict.main)]
        raises(UserError, main, argv, match='discriminative')
    path = os.path.join(out, 'run.json')
    write_json(path, {**read_json(path), 'rule': 'best'})
    raises(UserError, open_run, out, match='rule is missing or malformed')


def test_gen_rule_never_costs_accuracy():
    """calibrate: tau and biases where they keep the accuracy on the validation rows, as
    fit_calibration gives them; else one temperature, which changes no decision and still lowers
    the NLL. A trained run says which."""
    prior = np.log([0.5, 0.5]).astype(np.float32)
    run, costs = opened('lora'), 0
    for seed in range(60):
        rng = np.random.RandomState(seed)
        y = (rng.rand(60) < 0.5).astype(int)
        x = (-50 + np.eye(2)[y] * 2 + 2 * rng.randn(60, 2) + [seed % 2, 0]).astype(np.float32)
        run.log_prior, bayes = prior, x + prior
        words, scores = calibrate(run, bayes, y)['calibration']['fitted'], run.calibrated(bayes)
        assert (scores.argmax(1) == y).sum() >= (bayes.argmax(1) == y).sum(), seed
        if words.startswith('tau alone'):
            costs += 1
            a, b = fit_calibration(x, prior, y)
            worse = (x / a + prior + b).argmax(1) == y
            assert worse.sum() < (bayes.argmax(1) == y).sum()
            assert (scores.argmax(1) == bayes.argmax(1)).all()
            assert np.allclose(scores, bayes / run.tau, atol=1e-4)
        else:
            a, b = fit_calibration(bayes - prior, prior, y)
            assert run.tau == a and np.array_equal(run.bias, b)
        m = [lib.metrics.metrics(softmax(s), y, ['a', 'b'])['nll'] for s in (scores, bayes)]
        assert m[0] <= m[1] + 1e-6, (seed, m)
    assert 5 < costs < 55, costs
    one = calibrate(run, bayes, np.zeros(60, int))['calibration']['fitted']
    assert one == 'tau alone: a class has no validation row'
    assert (run.calibrated(bayes).argmax(1) == bayes.argmax(1)).all()
    for method in ('lora', 'direct'):
        info = read_json(os.path.join(gen_run(method), 'run.json'))
        assert info['rule'] == 'calibrated' and 'tau' in info['calibration']['fitted']


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
    far = np.array([[0.0, -500.0]] * 3, np.float32)  # e^-500 is no float32
    with patched(lib.runs.GenRun, 'logprobs_of', lambda *a: far):
        assert np.allclose(opened('direct').neutral, [0.0, -500.0], atol=1e-3)
    of_one, of_three = (softmax(r.logits(['N/A']))[0] for r in (alone, run))
    assert np.allclose(of_one, 0.5, atol=1e-4) and not np.allclose(of_three, 0.5, atol=1e-4)


def test_direct_runs_suggest_what_they_can_do():
    text = generate('--model', pretrained(), '--data', topics(), '--zero_shot', '--direct')[1]
    assert 'try:' in text and '--sample' not in text and '--explain' not in text, text


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


def test_texts_that_do_not_fit_are_refused():
    """A run.json of other hands asks for more tokens than the model has positions."""
    out = copied(gen_run('lora'))
    path = os.path.join(out, 'run.json')
    info = read_json(path)
    info['args']['max_length'] = 5000
    write_json(path, info)
    raises(UserError, open_run, out, match='max_length 5000 does not fit')
