"""lora.py and lib/peft.py."""

import os

import torch

import lora
from lib.files import UserError, read_json, write_json
from lib.peft import load_peft, matching, save_peft
from lib.runs import open_run
from lib.tensors import load_safetensors, save_safetensors
from model import GPT, SHAPES, Conv1D
from tests.helpers import (
    ALL,
    METHODS,
    SMALL,
    far,
    formula_model,
    gen_run,
    ragged,
    raises,
    stirred,
    tiny_run,
    tmp,
)


def test_lora_is_its_formula():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    conv = Conv1D(8, 6)
    torch.nn.init.normal_(conv.weight), torch.nn.init.normal_(conv.bias)
    linear = torch.nn.Linear(8, 6)
    for base, w in ((conv, conv.weight), (linear, linear.weight.t())):
        m = lora.LoRA(base, r=2, scale=16 / 2, p=0.0)
        assert m.A.shape == (2, 8) and m.B.shape == (6, 2) and torch.equal(m(x), base(x))
        assert m.A.abs().max() <= 8**-0.5 and m.A.abs().max() > 0.5 * 8**-0.5
        torch.nn.init.normal_(m.B)
        assert torch.allclose(m(x), x @ w + base.bias + 8.0 * x @ m.A.t() @ m.B.t(), atol=1e-5)
        assert torch.allclose(
            x @ (w + (m.delta() if base is conv else m.delta().t())) + base.bias, m(x), atol=1e-5
        )


def test_lora_dropout_only_in_training():
    m = lora.LoRA(torch.nn.Linear(64, 4), 2, 1.0, 0.5)
    torch.nn.init.normal_(m.B)
    x = torch.randn(5, 64)
    assert not torch.equal(m.train()(x), m(x)) and torch.equal(m.eval()(x), m(x))


def test_trainable_count_gpt2():
    """The figure that PEFT prints for r 8 on all four matrices with two classes."""
    with torch.device('meta'):
        model = GPT(SHAPES['gpt2'], 2)
        names = lora.adapt(model, 'lora', targets=ALL, r=8)
    assert len(names) == 48 and sum(p.numel() for p in lora.trainables(model).values()) == 1_181_184


def test_lora_targets():
    def wrapped(targets):
        return lora.add_lora(GPT(SMALL), 4, 8.0, 0.0, targets)

    assert wrapped(['c_attn']) == [f'h.{i}.attn.c_attn' for i in range(3)]
    assert len(wrapped(['c_proj'])) == 6 and wrapped(['h.1.mlp.c_fc']) == ['h.1.mlp.c_fc']
    names = list(lora.layers(GPT(SMALL)))
    assert len(matching(r'.*\.h\.[01]\.attn\.c_attn', names)) == 2
    message = raises(UserError, wrapped, ['c_attn', 'q_proj'], match="'q_proj' matches no layer")
    assert 'attn.c_attn' in message and 'mlp.c_proj' in message


def test_merge():
    ids, n = ragged(257, pad=256)
    torch.manual_seed(0)
    model = formula_model()
    before = model.state_dict()
    lora.adapt(model, 'lora', targets=ALL, r=4)
    stirred(model)
    merged = GPT(SMALL, 3).eval()
    merged.load_state_dict(lora.merged_state(model))
    with torch.no_grad():
        assert far(merged(ids, n), model(ids, n)) < 1e-5
        assert far(merged(ids, n), formula_model()(ids, n)) > 1e-3
    assert torch.equal(
        model.h[0].mlp.c_fc.base.weight, before['h.0.mlp.c_fc.weight']
    )  # merging changed nothing
    lora.adapt(other := formula_model(), 'prompt', prompt=2)
    raises(UserError, lora.merged_state, other, match='cannot be merged')


def test_methods_train_what_they_say():
    want = dict(
        lora=12, head=0, last=2 * 12 + 2, full=36 + 4, adapter=6 * 4, prompt=1
    )  # tensors, besides the head
    for method, options in METHODS.items():
        model = formula_model()
        lora.adapt(model, method, **options)
        names = set(lora.trainables(model))
        assert 'score.weight' in names
        assert len(names) - 1 == (24 if method == 'lora' else want[method]), (method, len(names))
    raises(
        UserError,
        lora.adapt,
        formula_model(),
        'last',
        99,
        match='--last 99: this model has 3 blocks',
    )
    raises(UserError, lora.add_prompt, formula_model(), 256, match='--prompt 256')


def test_peft_files_refused():
    torch.manual_seed(0)
    model, folder = formula_model(), tmp()
    lora.adapt(model, 'lora', targets=ALL, r=4)
    save_peft(folder, model, 'somewhere')
    path = os.path.join(folder, 'adapter_config.json')
    config = read_json(path)
    assert config['target_modules'] == ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']
    assert config['r'] == 4 and config['lora_alpha'] == 16
    for change, match in (
        (dict(r=8), 'where (8, 64) belongs'),
        (dict(use_dora=True), 'use_dora'),
        (dict(peft_type='IA3'), 'IA3'),
        (dict(bias='all'), 'bias'),
        (dict(target_modules=['c_attn']), 'is unexpected'),
        (dict(r='many'), 'malformed'),
        (dict(alpha_pattern={'c_attn': 'much'}), 'malformed'),
        (dict(alpha_pattern={r'.*\.c_attn': 3}), 'holds the expression'),
    ):
        write_json(path, {**config, **change})
        raises(UserError, load_peft, folder, formula_model(), match=match)
    for key in (
        'r',
        'lora_alpha',
        'target_modules',
        'peft_type',
    ):  # PEFT's silent defaults: here an error
        write_json(path, {k: v for k, v in config.items() if k != key})
        raises(UserError, load_peft, folder, formula_model(), match='adapter_config.json')
    write_json(path, config)
    weights = os.path.join(folder, 'adapter_model.safetensors')
    tensors = load_safetensors(weights)
    save_safetensors(weights, {n: t for n, t in tensors.items() if 'score' not in n})
    raises(UserError, load_peft, folder, formula_model(), match='score.weight is missing')


def test_opened_runs_do_not_train():
    for folder in (tiny_run('lora'), gen_run('lora'), gen_run('full')):
        run = open_run(folder, 'cpu', 'fp32')
        models = [model for model, _ in run.passes] if run.kind == 'gen' else [run.model]
        assert not any(m.training for model in models for m in model.modules())
        assert not any(p.requires_grad for model in models for p in model.parameters())
        assert {
            m.scale for model in models for m in model.modules() if isinstance(m, lora.LoRA)
        } <= {16 / run.args['r']}
