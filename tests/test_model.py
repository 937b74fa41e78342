"""model.py against golden values and transformers."""

import copy

import torch

import lora
from lib.fast import speed_up
from model import GPT, SHAPES, Config
from tests.helpers import (
    CPU,
    METHODS,
    SMALL,
    far,
    formula_model,
    hf_models,
    lm_logits,
    patched,
    ragged,
    stirred,
    tmp,
)

GOLDEN_CLASS = [
    [-0.1365244, -1.0958053, 1.6796055],
    [-1.3674160, -3.0564530, -0.6827729],
    [1.1845060, -1.4639315, 2.2462472],
    [0.2685358, -1.5401258, 0.3566168],
]


GOLDEN_LM = [
    [0.0429622, 1.5568747, -0.5584779, -3.8660697],
    [-0.9938234, 0.9918339, -1.2921475, -2.3741940],
    [-0.5403783, 1.2652088, -0.6159189, -1.8866494],
    [-1.1541725, 1.2015047, -2.6051303, -3.4585470],
]


def test_golden_logits():
    """Logits of the formula model, computed once by transformers 5.23
    (GPT2ForSequenceClassification, GPT2LMHeadModel) in float32."""
    ids, lengths = ragged(257, pad=256)
    model = formula_model()
    with torch.no_grad():
        logits, lm = model.classify(ids, lengths), lm_logits(model, ids)
    assert far(logits, torch.tensor(GOLDEN_CLASS)) < 1e-5, logits
    assert far(lm[torch.arange(4), lengths - 1, :4], torch.tensor(GOLDEN_LM)) < 1e-5, lm[
        torch.arange(4), lengths - 1, :4
    ]
    with (
        patched(
            torch.nn.functional,
            'gelu',
            lambda x, approximate, real=torch.nn.functional.gelu: real(x),
        ),
        torch.no_grad(),
    ):
        assert (
            far(model.classify(ids, lengths), torch.tensor(GOLDEN_CLASS)) > 1e-4
        )  # the exact GELU would be seen


def parity(cfg):
    hf_cls, cls_dir, hf_lm, lm_dir = hf_models(tmp(), cfg)
    ids, lengths = ragged(cfg.vocab_size, pad=cfg.vocab_size - 1)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        ours, theirs = (
            GPT.from_pretrained(cls_dir, num_labels=3).eval().classify(ids, lengths),
            hf_cls(ids, attention_mask=mask).logits,
        )
        assert far(ours, theirs) < 1e-5, far(ours, theirs)
        ours, theirs = (
            lm_logits(GPT.from_pretrained(lm_dir).eval(), ids),
            hf_lm(ids, attention_mask=mask).logits,
        )
        real = mask.bool()
        assert far(ours[real], theirs[real]) < 1e-5, far(ours[real], theirs[real])


def test_parity_small():
    parity(SMALL)


def test_parity_gpt2_124m():
    parity(SHAPES['gpt2'])


def test_shapes():
    sizes = dict(gpt2=124_439_808, distilgpt2=81_912_576)
    sizes.update({'gpt2-medium': 354_823_168, 'gpt2-large': 774_030_080, 'gpt2-xl': 1_557_611_200})
    with torch.device('meta'):
        for name, n in sizes.items():
            assert sum(p.numel() for p in GPT(SHAPES[name]).parameters()) == n, name


WIDE = Config(2, 12, 768, 1024, 1000)  # as wide as GPT-2, but small


def test_pad_invariance():
    """All six methods: a text has the same logits alone, in a batch, and padded further with any
    id."""
    for cfg, lengths, extra in ((SMALL, (7, 1, 30, 12), 200), (WIDE, (40, 3), 200)):
        base = GPT(cfg, 3).init_weights(torch.Generator().manual_seed(0))
        for method, options in METHODS.items():
            torch.manual_seed(0)
            model = copy.deepcopy(base)
            lora.adapt(model, method, **options)
            stirred(model)
            with torch.no_grad():
                ids, n = ragged(cfg.vocab_size, lengths)
                want = torch.cat(
                    [model(ids[i : i + 1, :k], n[i : i + 1]) for i, k in enumerate(lengths)]
                )
                assert float((want[0] - want[1]).abs().max()) > 1e-3 * float(
                    want.abs().max()
                )  # the texts do differ
                for pad in (0, cfg.vocab_size - 1, None):
                    padded, n = ragged(cfg.vocab_size, lengths, pad, extra)
                    for i, k in enumerate(lengths):
                        padded[i, :k] = ids[i, :k]
                    assert far(model(padded, n), want) < 1e-5, (
                        cfg,
                        method,
                        pad,
                        far(model(padded, n), want),
                    )


def test_wrong_pooling_would_be_seen():
    """The test above can fail: pooling at -1 is far outside its tolerance."""
    model, (ids, lengths) = formula_model(), ragged(257, pad=256)
    with torch.no_grad():
        wrong = model.score(model.hidden(ids)[:, -1])
        assert far(wrong, model(ids, lengths)) > 0.05


def test_last_position_equals_the_whole():
    """lib/fast.py computes the last block at one position per text: the logits and their gradients
    are those of the last token among all positions."""
    plain, (ids, lengths) = formula_model(), ragged(257, pad=256)
    fast = formula_model()
    speed_up(fast, CPU, torch.float32)
    everywhere = plain.score(plain.hidden(ids)[torch.arange(4), lengths - 1])
    everywhere.square().sum().backward()
    want = {n: p.grad.clone() for n, p in plain.named_parameters()}
    for model in (plain, fast):
        model.zero_grad()
        logits = model(ids, lengths)
        logits.square().sum().backward()
        assert far(logits, everywhere) < 1e-5
        grads = {n: p.grad for n, p in model.named_parameters()}
        for n, g in want.items():
            assert float((grads[n] - g).abs().max()) <= 1e-4 * float(g.abs().max()), n
    assert 'classify' in vars(fast)
