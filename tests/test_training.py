"""lib/training.py, lib/device.py, lib/graphs.py, and what stops a run."""

import contextlib
import io
import json
import math
import os
import random
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

import data
import lib.device
import lib.graphs
import lib.ranks
import lib.scoring
import lib.training
import lora
import train_cls
import train_gen
from lib.device import autocast, bf16_pays, pick_device, place
from lib.files import UserError, read_json
from lib.graphs import Graphs, check_device
from lib.resume import load_resume
from lib.runs import open_run
from lib.scoring import class_logits, in_batches
from lib.tokens import Tokens, tokenize, tokenizer
from lib.training import Plan, clip_grad_norm_, lr_at, make_optimizer, seed_step
from model import GPT
from tests.helpers import (
    ALL,
    CPU,
    FLAGS,
    GEN,
    METHODS,
    SHAPE,
    SMALL,
    TINY,
    far,
    formula_model,
    generate,
    losses_of,
    over_base,
    patched,
    ragged,
    raises,
    records,
    same_run,
    script,
    stirred,
    tiny_run,
    tmp,
    topics,
    train,
)


def test_precision_choice():
    device, dtype, reason = pick_device('cpu')
    assert (dtype == torch.bfloat16) == bf16_pays() and reason
    assert pick_device('cpu', 'fp32')[1] == torch.float32
    bf16, fp32 = torch.bfloat16, torch.float32
    for amx, intels, want in ((True, True, bf16), (False, False, bf16), (False, True, fp32)):
        with contextlib.ExitStack() as stack:
            for owner, name, yes in (
                (torch.cpu, '_is_avx512_bf16_supported', True),
                (torch.cpu, '_is_amx_tile_supported', amx),
                (lib.device, 'cpu_is_intels', intels),
            ):
                stack.enter_context(patched(owner, name, lambda yes=yes: yes))
            assert pick_device('cpu')[1] == want, (amx, intels)
    raises(UserError, pick_device, 'cpu', 'fp16', match='GPU')
    raises(UserError, pick_device, 'abacus', match='abacus')
    if not torch.cuda.is_available():
        raises(UserError, pick_device, 'cuda', match='cuda')


def test_bf16_autocast_is_close():
    """The bf16 path (frozen weights stored in bf16, trainable ones in float32) stays within bf16's
    rounding of the float32 path."""
    ids, n = ragged(257, pad=256)
    for method, options in METHODS.items():
        torch.manual_seed(0)
        model = formula_model()
        read = model.state_dict()
        lora.adapt(model, method, **options)
        stirred(model)
        with torch.no_grad():
            want = model(ids, n)
        place(model, CPU, torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in lora.trainables(model).values())
        assert (method == 'full') != any(p.dtype == torch.bfloat16 for p in model.parameters())
        with torch.no_grad(), autocast(CPU, torch.bfloat16):
            got = model(ids, n)
        assert far(got.float(), want) < 0.05, (method, far(got.float(), want))
        saved, original = {**read, **lora.trained_state(model)}, formula_model().state_dict()
        assert all(t.dtype == torch.float32 for t in saved.values())
        if method == 'last':  # rounded weights are saved as they were read
            for name in ('h.0.mlp.c_fc.weight', 'wte.weight'):
                assert torch.equal(saved[name], original[name]), name


def test_optimizer_groups():
    model = GPT(SMALL, 2).init_weights()
    names = {p: n for n, p in model.named_parameters()}
    groups = [g for g in make_optimizer(model, 1e-3, 0.1).param_groups if g['weight_decay']]
    decayed = {names[p] for g in groups for p in g['params']}
    assert 'wte.weight' not in decayed and 'wpe.weight' not in decayed
    assert not any('ln_' in n or n.endswith('bias') for n in decayed)
    assert len(decayed) == 4 * SMALL.n_layer + 1
    lora.adapt(model, 'prompt', prompt=3)
    opt = make_optimizer(model, 1e-3, 0.1)
    # the prompt and the head, nothing frozen
    assert sum(len(g['params']) for g in opt.param_groups) == 2


def test_clipping_is_that_of_torch():
    def of_torch(params, limit):
        return torch.nn.utils.clip_grad_norm_(params, limit or math.inf)

    for shift in (0.0, math.nan):
        for limit in (0.0, 1.0, 1e3):
            sets = []
            for clip in (
                lambda params, limit: clip_grad_norm_([dict(params=params)], limit),
                of_torch,
            ):
                torch.manual_seed(1)
                params = [torch.nn.Parameter(torch.zeros(s)) for s in ((4, 3), (5,), (2,))]
                params[0].grad = torch.randn(3, 4).t() + shift  # of other strides
                params[1].grad = torch.randn(5)
                norm = clip(dict(enumerate(params)).values(), limit)
                sets.append([norm, *(p.grad for p in params[:2])])
                assert params[2].grad is None
            for a, b in zip(*sets):
                assert torch.allclose(a, b, rtol=1e-6, equal_nan=True), (shift, limit, a, b)
            clipped = float(sets[0][1].norm()) < 1
            assert math.isnan(shift) or clipped == (limit == 1), 'only 1 is below the norm'


def test_lr_schedule():
    at = [lr_at(s, 10, 1.0, 0.2, 'linear') for s in range(10)]
    assert np.allclose(at, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]), at
    assert [lr_at(s, 4, 2.0, 0.0, 'constant') for s in range(4)] == [2.0] * 4
    at = [lr_at(s, 4, 1.0, 0.0, 'cosine') for s in range(4)]
    assert np.allclose(at, [1, 0.853553, 0.5, 0.146447])


def test_random_numbers_of_a_step_are_its_own():
    """Those of torch, and of numpy and Python, which an edit may draw: of seed and step alone."""
    found = {}
    for key in ((0, 3), (0, 4), (1, 3), (0, 3)):
        seed_step(*key)
        drawn = torch.rand(()).item(), np.random.rand(), random.random()
        assert found.setdefault(key, drawn) == drawn
    assert all(len({*column}) == 3 for column in zip(*found.values())), found


def test_evaluation_has_no_dropout():
    """During training: LoRA's and GPT-2's own dropout are off in an evaluation, and on again
    afterwards."""
    torch.manual_seed(0)
    model = formula_model()
    lora.adapt(model, 'lora', targets=ALL, r=4, dropout=0.5)
    stirred(model)
    model.set_dropout(0.5)
    tokens = tokenize(tokenizer('bytes'), ['one', 'another text'], cache=False)
    want = [class_logits(model, tokens, 64, 'first', CPU, torch.float32) for _ in range(2)]
    model.train()
    assert np.array_equal(class_logits(model, tokens, 64, 'first', CPU, torch.float32), want[0])
    assert np.array_equal(*want)
    assert model.training and model.h[0].attn.c_attn.training
    ids, n = data.collate(tokens, [0, 1], 64, 'first', 256)
    assert not torch.equal(model(ids, n), model(ids, n))


STEPS = '--dtype fp32 --lr 1e-3 --log_every 1 --batch_size 6'.split()


def capture_on_cpu(graphs, places):
    """Graphs.capture without CUDA graphs: a replay computes again from the same addresses."""
    loss = graphs.once(*places)

    def replay():
        loss.copy_(graphs.once(*places))

    return replay, loss


@contextlib.contextmanager
def graphs_on_cpu():
    """--cuda_graphs on a CPU -> a list of the shapes of ids that are recorded."""
    shapes = []

    def capture(graphs, places):
        shapes.append(tuple(places[1].shape))  # behind the share of the loss
        return capture_on_cpu(graphs, places)

    allowed = [
        patched(script, 'check_device', lambda *a: None) for script in (train_cls, train_gen)
    ]
    with allowed[0], allowed[1], patched(Graphs, 'capture', capture):
        yield shapes


def test_graphs_take_the_same_steps():
    """--cuda_graphs, with a CPU stand-in for a graph: the same losses as without it; each shape is
    recorded once."""
    for method, more in dict(
        lora=['--dropout', '0', '--grad_accum', '2', '--class_weights', 'balanced'],
        full=[],
        last=['--epochs', '2'],
    ).items():
        flags = [*TINY, *FLAGS[method], *more, *STEPS]
        with graphs_on_cpu() as shapes:
            outs = train(*flags, '--cuda_graphs')[0], train(*flags)[0]
        a, b = map(losses_of, outs)
        assert len(a) == len(b) > 10 and np.allclose(a, b, rtol=1e-4), (method, a, b)
        assert len(set(shapes)) == len(shapes) < len(a), (method, shapes)
        assert all(width % 8 == 0 for _, width in shapes), (method, shapes)
        if method != 'full':  # what warming up and recording count is taken back
            a, b = ([r['train_accuracy'] for r in records(o) if 'loss' in r] for o in outs)
            assert a == b, (method, a, b)
    flags = over_base(*GEN['posterior'], *'--dropout 0 --max_steps 30 --log_every 1'.split())
    with graphs_on_cpu():
        a, b = losses_of(generate(*flags, '--cuda_graphs')[0]), losses_of(generate(*flags)[0])
    assert len(a) == len(b) >= 30 and np.allclose(a, b, rtol=1e-4), (a, b)


def test_graphs_keep_gradients_and_random_numbers():
    """Recording changes neither: in the step of a new shape the gradients of earlier parts are
    there already, and dropout follows the seed. Nor does it change buffers."""
    scaler, model = torch.amp.GradScaler('cpu', enabled=False), torch.nn.Module()
    w = model.w = torch.nn.Parameter(torch.tensor(3.0))
    model.register_buffer('seen', torch.zeros(()))

    def loss(x):
        model.seen += 1  # as a BatchNorm does
        return (w * x * torch.rand(())).sum()

    with patched(Graphs, 'capture', capture_on_cpu):
        graphs = Graphs(loss, model, scaler)
        draws = []
        for shape in (2, 2, 3):
            torch.manual_seed(5)
            draws.append(float(graphs(torch.tensor(0.5), torch.ones(shape)) / shape / 1.5))
        assert draws[0] == draws[1] and abs(draws[0] - draws[2]) < 1e-6
        assert len(graphs.recorded) == 2 and model.seen == 3
        assert abs(float(w.grad) - 0.5 * draws[0] * (2 + 2 + 3)) < 1e-5


def test_a_device_that_is_not_there_is_refused_before_data_is_read():
    def read(*args, **flags):
        raise AssertionError('data is read')

    with patched(data, 'load', read):
        for main in (train_cls.main, train_gen.main):
            raises(UserError, main, [*TINY, '--device', 'cuda:99'], match='cuda:99')
            flags = [*TINY, '--device', 'cpu', '--cuda_graphs']
            raises(UserError, main, flags, match='needs a GPU')


def test_graphs_are_refused():
    for other in ('compile', 'gradient_checkpointing', 'batch_tokens'):
        flags = dict(cuda_graphs=True, compile=False, gradient_checkpointing=False)
        flags.update(batch_tokens=None, device='cuda', dtype='fp32')
        args = SimpleNamespace(**{**flags, other: True})
        with patched(lib.graphs, 'pick_device', lambda *a: (torch.device('cuda'), None, '')):
            raises(UserError, check_device, args, match=f'--{other}')
            args.cuda_graphs = False
            check_device(args)


def plan_of(lengths, max_steps, epochs, **flags):
    flags = {**dict(batch_tokens=300, grad_accum=1, seed=3, eval_every=None), **flags}
    return Plan(SimpleNamespace(**flags), lengths, data.batches, max_steps, epochs, 1e-3)


def test_steps_of_batches_of_tokens():
    """--batch_tokens: --epochs N reads every row N times, in so many steps, whatever number of
    steps each epoch has; any step can be asked for at any time."""
    lengths = np.random.RandomState(1).randint(1, 60, 500)
    for accum in (1, 3):
        plan = plan_of(lengths, 0, 3.0, grad_accum=accum)
        sizes = [len(data.batches(lengths, accum, 3, epoch, 300)) for epoch in range(3)]
        assert plan.max_steps == sum(sizes) and plan.epoch_steps == sizes[0]
        steps = [plan.rows(step) for step in range(1, plan.max_steps + 1)]
        assert (np.bincount(np.concatenate(steps)) == 3).all()
        late = plan_of(lengths, 0, 3.0, grad_accum=accum)  # of a run that is resumed
        for step in (plan.max_steps, 2, plan.epoch_steps + 1):
            assert np.array_equal(late.rows(step), steps[step - 1])
        for rows in steps:
            parts, factor = plan.parts(rows)
            assert factor == 1 and not plan.idle and len(parts) <= accum
            assert all(len(p) * lengths[p].max() <= 300 for p in parts)
            assert sorted(np.concatenate(parts)) == sorted(rows)
    assert len(set(map(len, steps))) > 3 and f'at most {900} tokens' in str(plan)
    half = plan_of(lengths, 0, 1.5)
    sizes = [len(data.batches(lengths, 1, 3, epoch, 300)) for epoch in range(2)]
    assert half.max_steps == sizes[0] + math.ceil(sizes[1] / 2)
    wide = plan_of(lengths, 7, None, pool='pad', max_length=60)  # each text takes 60
    assert wide.max_steps == 7 and all(len(wide.rows(step)) <= 5 for step in range(1, 8))


def test_ranks_share_batches_of_tokens():
    """Each rank takes its part of every piece of a step; one without rows has one of factor 0."""
    lengths = np.random.RandomState(1).randint(1, 60, 200)
    plan = plan_of(lengths, 0, 1.0, grad_accum=2)
    for step in range(1, plan.max_steps + 1):
        rows, found, idle = plan.rows(step), [], 0
        pieces = len(plan.parts(rows)[0])
        with patched(lib.ranks, 'world_size', lambda: 3):
            for i in range(3):
                with patched(lib.ranks, 'rank', lambda i=i: i):
                    parts, factor = plan.parts(rows)
                    assert factor == (0.0 if plan.idle else 3.0) and 1 <= len(parts) <= pieces
                    idle += plan.idle
                    found += [] if plan.idle else [*np.concatenate(parts)]
        assert sorted(found) == sorted(rows) and (idle == 0 or len(rows) < 6), (step, rows)


def test_training_on_batches_of_tokens():
    """Both scripts: a resumed run gives the weights of one that was never stopped, and run.json
    keeps the flag; one batch of all rows is one batch, however it is named."""
    steps = '--dtype fp32 --batch_tokens 1000 --grad_accum 2 --epochs 2 --eval_every 5'.split()
    for main, flags in (
        (train_cls.main, [*TINY, '--lora']),
        (train_gen.main, over_base(*GEN['lora'], '--max_samples', '60')),
    ):
        outs = [os.path.join(tmp(), 'run') for _ in range(2)]
        assert not script(main, [*flags, *steps, '--out', outs[0]])[0]
        real, calls = data.collate, []

        def interrupting(*a, real=real, calls=calls, **k):
            calls.append(torch.is_grad_enabled())
            if sum(calls) == 8:  # in the second half of step 4
                os.kill(os.getpid(), signal.SIGINT)
            return real(*a, **k)

        with patched(data, 'collate', interrupting):
            assert script(main, [*flags, *steps, '--out', outs[1]])[0] == 130
        assert not script(main, ['--resume', '--out', outs[1]])[0]
        same_run(*outs[::-1])
        args = read_json(os.path.join(outs[0], 'run.json'))['args']
        assert (args['batch_tokens'], args['batch_size']) == (1000, None)
    for size, said in (([], 'at most 2,000 tokens'), (['--batch_size', '8'], 'of 16 rows')):
        again = ['--class_id', '0', '--max_steps', '2', *size, '--out', outs[0]]
        code, text, _ = script(train_gen.main, again)  # the batches of the run, or others
        assert not code and said in text, text
    flags = [*TINY, '--full', *'--dtype fp32 --max_steps 3 --log_every 1'.split()]
    flags += ['--max_samples', '20']
    a, b = train(*flags, '--batch_tokens', '9999')[0], train(*flags, '--batch_size', '40')[0]
    assert np.allclose(losses_of(a), losses_of(b), rtol=1e-6), (losses_of(a), losses_of(b))


def test_not_finite_loss_stops():
    flags = '--full --dtype fp32 --lr 1e30 --clip 0 --log_every 1 --warmup 0'.split()
    raises(UserError, train, *TINY, *flags, match='try a smaller --lr')


def test_loss_that_is_not_finite():
    """It names the step and shows its texts, saves nothing of it, and the checkpoint before it is
    as it was."""
    steps = '--dtype fp32 --max_steps 12 --batch_size 4 --eval_every 4 --log_every 3'.split()
    for main, flags in (
        (train_cls.main, [*TINY, '--full']),
        (train_gen.main, ['--data', topics(), *SHAPE, '--pretrain']),
    ):
        out, real, seen = os.path.join(tmp(), 'run'), data.collate, []

        def note(tokens, index, *a, **k):
            if torch.is_grad_enabled():
                rows = [tokens[i].astype(np.uint8) for i in sorted(index.tolist())]
                seen.append([bytes(row).decode() for row in rows])
            return real(tokens, index, *a, **k)

        def spoiling(step, *a):
            return math.nan if step == 5 else lr_at(step, *a)

        with patched(lib.training, 'lr_at', spoiling), patched(data, 'collate', note):
            argv = [*flags, *steps, '--out', out]
            said = raises(UserError, main, argv, match='at step 7')  # after the one that spoilt it
        assert len(seen[6]) == 4 and len(set(seen[6])) == 4
        assert all(json.dumps(text[:60]) in said for text in seen[6][:3]), (said, seen[6])
        assert '--lr' in said and '--resume' in said, said
        assert load_resume(out)['step'] == 4
        assert all(torch.isfinite(p).all() for p in load_resume(out)['params'].values())
        code = script(main, ['--resume', '--out', out])[0]  # without the cause it goes on
        assert not code and records(out)[-1]['step'] == 12


def test_interrupt_after_a_loss_that_is_not_finite():
    """Ctrl-C before the next log line does not save spoilt weights."""
    out = os.path.join(tmp(), 'run')
    flags = [*TINY, *'--full --dtype fp32 --max_steps 9 --eval_every 9'.split(), '--out', out]

    def rate(step, *a):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return math.nan if step == 2 else lr_at(step, *a)

    with patched(lib.training, 'lr_at', rate), contextlib.redirect_stderr(io.StringIO()):
        raises(UserError, train_cls.main, flags, match='at step 4')
    assert load_resume(out)['step'] == 0


def test_out_of_memory_names_a_batch_size():
    def full(*a, **k):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')

    for size, advice, same in (
        (8, '--batch_size 4 --grad_accum 2', True),
        (5, '--batch_size 2 --grad_accum 2', False),  # 4 rows a step
        (1, 'a smaller --max_length', False),
    ):
        flags = [*TINY, '--batch_size', str(size), '--out', os.path.join(tmp(), 'run')]
        with patched(torch.Tensor, 'backward', full):
            said = raises(UserError, train_cls.main, flags, match=advice)
        assert ('the same steps' in said) == same, said
    for tokens, advice in ((600, '--batch_tokens 300 --grad_accum 2'), (200, 'a smaller')):
        flags = [*TINY, '--batch_tokens', str(tokens), '--out', os.path.join(tmp(), 'run')]
        with patched(torch.Tensor, 'backward', full):
            raises(UserError, train_cls.main, flags, match=advice)


def test_out_of_memory_in_evaluation_takes_smaller_batches():
    """The results do not depend on the batch size that fits; a single text that does not fit is one
    sentence."""
    run = open_run(tiny_run('full'), 'cpu', 'fp32')
    texts = [f'{"very " * (i % 7)}good {i}' for i in range(40)]
    want, real = run.logits(texts), GPT.embed
    for room in (100, 1):

        def small(self, ids, *a, room=room, **k):
            if ids.numel() > room:
                raise torch.OutOfMemoryError('out of memory')
            return real(self, ids, *a, **k)

        with patched(GPT, 'embed', small):
            if room == 1:
                raises(UserError, run.logits, texts, match='a single text')
            else:
                assert np.allclose(run.logits(texts), want, atol=1e-5)


def test_batches_of_evaluation_fit_a_cache():
    """On a CPU half as many tokens at a time in float32 as in bfloat16 where the model is narrow,
    the same bytes. Not fewer than 512 in bfloat16 and 1,024 in float32 where it is wide: their
    products would be slow."""
    tokens = Tokens(np.zeros(10000, np.int64), np.arange(0, 10001, 10))
    exact, half = torch.float32, torch.bfloat16
    for width, dtype, limit in (
        (768, exact, 1024),
        (768, half, 512),
        (1536, exact, 1024),
        (1536, half, 512),
        (64, exact, 3072),
        (64, half, 6144),
    ):
        model = GPT(replace(SMALL, n_layer=1, n_embd=width), 2)
        sizes = []

        def fn(ids, n, index, sizes=sizes):
            sizes.append(ids.numel())
            return torch.zeros(len(ids), 1)

        in_batches(fn, model, tokens, 128, 'first', CPU, dtype)
        assert sum(sizes) == 10000 and limit - 10 < max(sizes) <= limit
