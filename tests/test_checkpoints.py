"""lib/tensors.py, lib/checkpoints.py: weights in files, and what is refused."""

import json
import os
import re
import shutil
import struct
import sys

import torch

import lib.device
from lib.files import UserError, read_bytes, read_json, write_json
from lib.runs import open_run
from lib.tensors import give_back, load_safetensors, save_safetensors
from model import GPT
from tests.helpers import (
    METHODS,
    SMALL,
    far,
    formula_model,
    gen_run,
    hugging_face,
    patched,
    ragged,
    raises,
    save_raw,
    skip,
    their_adapter,
    their_folders,
    tiny_run,
    tmp,
)


def test_load_every_style():
    model = formula_model()
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids, lengths = ragged(257, pad=256)
    want = model.classify(ids, lengths)
    prefixed = {n if n == 'score.weight' else 'transformer.' + n: t for n, t in plain.items()}
    masks = {
        **{f'h.{i}.attn.bias': torch.ones(1, 1, 4, 4) for i in range(3)},
        'h.0.attn.masked_bias': torch.tensor(-1e4),
    }
    tied = {'lm_head.weight': plain['wte.weight'].clone()}
    for tensors, name in (
        (plain, 'model.safetensors'),
        (prefixed, 'model.safetensors'),
        ({**plain, **masks, **tied}, 'model.safetensors'),
        (prefixed, 'pytorch_model.bin'),
    ):
        got = (
            GPT.from_pretrained(save_raw(tmp(), tensors, name), num_labels=3)
            .eval()
            .classify(ids, lengths)
        )
        assert torch.equal(got, want)
    half = GPT.from_pretrained(
        save_raw(tmp(), {n: t.half() for n, t in plain.items()}), num_labels=3
    ).eval()
    assert far(half.classify(ids, lengths), want) < 0.02 and half.wte.weight.dtype == torch.float32
    folder, names = tmp(), list(plain)
    for i, part in enumerate((names[:5], names[5:])):
        save_safetensors(
            os.path.join(folder, f'model-{i}.safetensors'), {n: plain[n] for n in part}
        )
    write_json(
        os.path.join(folder, 'model.safetensors.index.json'),
        dict(weight_map={n: f'model-{int(i >= 5)}.safetensors' for i, n in enumerate(names)}),
    )
    save_raw(folder, {}, 'unused.safetensors')
    assert torch.equal(
        GPT.from_pretrained(folder, num_labels=3).eval().classify(ids, lengths), want
    )
    assert GPT.from_pretrained(folder).cfg == SMALL
    assert not hasattr(GPT.from_pretrained(folder), 'score')


def test_load_refuses():
    plain = {n: p.detach().clone() for n, p in formula_model().named_parameters()}

    def load(change, **kw):
        tensors = dict(plain)
        change(tensors)
        return GPT.from_pretrained(save_raw(tmp(), tensors), num_labels=3)

    raises(UserError, load, lambda t: t.pop('h.1.ln_2.bias'), match='h.1.ln_2.bias is missing')
    raises(UserError, load, lambda t: t.update(extra=torch.ones(2)), match='extra is unexpected')
    raises(
        UserError,
        load,
        lambda t: t.update({'h.0.attn.c_attn.weight': torch.ones(192, 64)}),
        match='(192, 64) where (64, 192) belongs',
    )
    raises(
        UserError, load, lambda t: t.update({'lm_head.weight': torch.ones(257, 64)}), match='untied'
    )
    raises(
        UserError,
        load,
        lambda t: t.update({'score.weight': torch.ones(2, 64)}),
        match='score.weight',
    )
    said = raises(UserError, load, lambda t: t.pop('score.weight'), match='score.weight is missing')
    assert 'new_head=True' in said
    raises(UserError, GPT.from_pretrained, tmp(), match='holds no model.safetensors')
    raises(UserError, GPT.from_pretrained, os.path.join(tmp(), 'none'), match='no such folder')
    folder = save_raw(tmp(), plain, config=False)
    raises(UserError, GPT.from_pretrained, folder, match='no config.json')
    for bad in (
        dict(model_type='bert'),
        dict(activation_function='relu'),
        dict(n_head=7),
        dict(n_layer='x'),
    ):
        save_raw(folder, plain)
        path = os.path.join(folder, 'config.json')
        write_json(path, {**read_json(path), **bad})
        raises(UserError, GPT.from_pretrained, folder, match='config.json')
    with open(os.path.join(folder, 'pytorch_model.bin'), 'wb') as f:
        f.write(b'no checkpoint')
    os.remove(os.path.join(folder, 'model.safetensors'))
    raises(UserError, GPT.from_pretrained, folder, match='pytorch_model.bin')


def test_bin_runs_no_code():
    folder, mark = save_raw(tmp(), {}), os.path.join(tmp(), 'ran')

    class Evil:
        def __reduce__(self):
            return open, (mark, 'w')

    torch.save({'wte.weight': Evil()}, os.path.join(folder, 'pytorch_model.bin'))
    os.remove(os.path.join(folder, 'model.safetensors'))
    raises(UserError, GPT.from_pretrained, folder, match='without running code')
    assert not os.path.exists(mark)


def test_safetensors():
    path, g = os.path.join(tmp(), 'x.safetensors'), torch.Generator().manual_seed(0)
    tensors = dict(
        a=torch.randn(3, 5, generator=g),
        b=torch.arange(7, dtype=torch.int64),
        c=torch.tensor(2.5),
        d=torch.empty(0, 4),
        e=torch.randn(3, generator=g).bfloat16(),
        f=torch.tensor([True, False, True]),
        g=torch.randn(4, 4, generator=g).t(),
    )
    save_safetensors(path, tensors)
    back = load_safetensors(path)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())
    before = read_bytes(path)
    back['a'].zero_()
    assert read_bytes(path) == before  # memory-mapped, but the file stays what it is
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        skip('safetensors is not installed (reader and writer were tested on each other)')
    theirs = load_file(path)
    assert all(torch.equal(theirs[n], t) for n, t in tensors.items())
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    assert all(torch.equal(load_safetensors(path)[n], t) for n, t in tensors.items())


def test_safetensors_broken():
    path = os.path.join(tmp(), 'x.safetensors')
    save_safetensors(path, dict(a=torch.ones(8), b=torch.ones(8)))
    good = read_bytes(path)
    n = struct.unpack('<Q', good[:8])[0]

    def header(**change):
        h = json.loads(good[8 : 8 + n])
        for key, value in change.items():
            h['a'][key] = value
        text = json.dumps(h).encode()
        return struct.pack('<Q', len(text)) + text + good[8 + n :]

    for raw in (
        b'',
        b'abc',
        good[:4],
        good[:20],
        good[:-1],
        good + b'x',
        struct.pack('<Q', 1 << 60) + good[8:],
        good[:8] + b'?' * n + good[8 + n :],
        header(dtype='F31'),
        header(shape=[9]),
        header(shape=[-8]),
        header(shape='x'),
        header(shape=[True] * 3),
        header(data_offsets=[4, 36]),
        header(data_offsets=[32, 64]),
        header(data_offsets=[0, 1 << 50], shape=[1 << 48]),
        struct.pack('<Q', 2) + b'[]',
        header(shape=[1 << 70]),
    ):
        with open(path, 'wb') as f:
            f.write(raw)
        raises(UserError, load_safetensors, path, match='safetensors')


def test_unloaded_weights_come_back():
    """Weights that were given back to the OS are not resident, and read as before; a changed value
    stays changed."""
    if sys.platform != 'linux':
        skip('only Linux is asked to take memory back')
    path = os.path.join(tmp(), 'x.safetensors')
    save_safetensors(path, dict(x=torch.arange(16 << 20, dtype=torch.float32)))  # 64 MB
    x = load_safetensors(path)['x']

    def resident():
        return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20

    x[1000] = -1.0
    total, full = float(x.sum(dtype=torch.float64)), resident()
    give_back(x)
    assert resident() < full - 40, (full, resident())
    assert x[1000] == -1 and float(x.sum(dtype=torch.float64)) == total
    y = torch.ones(1 << 20)
    give_back(y)  # no file's
    assert y.sum() == 1 << 20


def test_placing_gives_back_what_it_rounded():
    for dtype, n in ((torch.float32, 0), (torch.bfloat16, 2)):  # wte and wpe
        model, given = GPT(SMALL).requires_grad_(False), []
        with patched(lib.device, 'give_back', given.append):
            lib.device.place(model, torch.device('cpu'), dtype)
        assert len(given) == n, (dtype, len(given))


def test_every_tensor_must_fit():
    """A missing, an extra and a misshapen tensor in every kind of folder: an error that names
    it."""
    hugging_face('LoraConfig')
    kinds = {method: tiny_run(method) for method in METHODS}
    kinds.update(
        {
            'generative lora': gen_run('lora'),
            'generative full': gen_run('full'),
            'generative prefix': gen_run('prefix'),
        }
    )
    kinds.update(
        {
            'their classifier': their_folders()[0],
            'their lora': their_adapter(r=2, target_modules=['c_attn']),
            'their prompt': their_adapter('PromptTuningConfig', num_virtual_tokens=3),
        }
    )
    for kind, folder in kinds.items():
        copied_to = os.path.join(tmp(), 'copy')
        shutil.copytree(folder, copied_to)
        inside = os.path.join(copied_to, 'numbers') if kind.startswith('generative') else copied_to
        path = next(
            os.path.join(inside, name)
            for name in sorted(os.listdir(inside))
            if name.endswith('.safetensors')
        )
        tensors = {n: t.clone() for n, t in load_safetensors(path).items()}
        open_run(copied_to, 'cpu', 'fp32')
        for name in (list(tensors)[0], list(tensors)[-1]):
            shown = name.replace('transformer.', '', 1) if name.startswith('transformer.') else name
            for change, what in (
                ({}, 'lacks|is missing'),
                ({name: tensors[name][..., :-1]}, r'is \(.*\) where \(.*\) belongs'),
            ):
                save_safetensors(
                    path, {**{n: t for n, t in tensors.items() if n != name}, **change}
                )
                message = raises(UserError, open_run, copied_to, 'cpu', 'fp32', match=shown)
                assert re.search(what, message), (kind, message)
        save_safetensors(path, {**tensors, 'one.more': torch.ones(2)})
        raises(UserError, open_run, copied_to, 'cpu', 'fp32', match='one.more is unexpected')
        if kind in ('full', 'their classifier'):
            twice = next(n for n in tensors if n.startswith('transformer.'))
            save_safetensors(path, {**tensors, twice.replace('transformer.', ''): tensors[twice]})
            raises(UserError, open_run, copied_to, 'cpu', 'fp32', match='appears twice')


def test_another_base_is_refused():
    out = os.path.join(tmp(), 'copy')
    shutil.copytree(tiny_run('lora'), out)
    path = os.path.join(out, 'base', 'model.safetensors')
    tensors = {n: t.clone() for n, t in load_safetensors(path).items()}
    tensors['transformer.wpe.weight'][0, 0] += 1
    save_safetensors(path, tensors)
    raises(UserError, open_run, out, match='another base model')
    os.remove(path)
    raises(UserError, open_run, out, match='holds no model.safetensors')
    os.remove(os.path.join(out, 'adapter_config.json'))
    os.remove(os.path.join(out, 'run.json'))
    raises(UserError, open_run, out, match='run.json')


def test_run_without_weights():
    for method, name in (
        ('full', 'model.safetensors'),
        ('lora', 'adapter_model.safetensors'),
        ('adapter', 'adapter.safetensors'),
    ):
        out = os.path.join(tmp(), 'copy')
        shutil.copytree(tiny_run(method), out)
        os.remove(os.path.join(out, name))
        raises(UserError, open_run, out, match=name)
