"""Output of the frozen blocks, computed once for all epochs and kept in the cache. train_cls.py
calls cache(); the model knows nothing of it."""

import contextlib
import hashlib
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from lib import files, shipped
from lib.blocks import hooked
from lib.device import autocast
from lib.files import UserError
from lib.report import counted
from lib.scoring import in_batches
from lib.tensors import give_back, stamp, unchanged
from lib.versions import code_of

VERSION = 2  # of the files; raise it when their content changes
STALE = 'frozen blocks are cached, but {}: start again with --plain and another --out'


def frozen_depth(model):
    """Number of blocks, from the first, whose output for a text is the same in every step: nothing
    trains in them or below, and nothing is dropped."""
    below = [m for name, m in model.named_children() if name in ('wte', 'wpe', 'drop')]
    if model.prompt is not None or any(map(moves, below)):
        return 0
    moving = [moves(block) for block in model.h]
    return moving.index(True) if True in moving else len(model.h)


def moves(module):
    """Does something in it train, or drop values?"""
    drops = any(isinstance(m, nn.Dropout) and m.p for m in module.modules())
    return drops or any(p.requires_grad for p in module.parameters())


def cache(model, splits, *where):
    """splits {name: Tokens}, where: max_length, keep, device, dtype -> Feed, or None where no block
    is frozen, they were edited, or the rest of the model needs more than their output."""
    depth = frozen_depth(model)
    if not depth:
        return None
    names = shipped.edited_methods(model, (*shipped.HIDDEN, 'classify', 'forward'))
    if names := names or shipped.edited(*model.h[:depth], model.wte, model.drop):
        print(f'frozen blocks are not cached, because of an edit: {", ".join(names)}')
        return None
    if hooked(model.modules()):
        print('frozen blocks are not cached: a module has a hook')
        return None
    print(f'caching the output of {counted(depth, "frozen block")}', flush=True)
    try:
        for fresh in (False, True):
            feed = Feed(model, depth, splits, where, fresh)
            if all(feed.agrees(model, *split, *where) for split in splits.items()):
                return feed
        print('  not used: with it the logits would be others')
    except UserError as e:
        print(f'  not used: {e}')
    return None


class Feed:
    """.net(ids, lengths, states) -> logits, as the .net.model(ids, lengths) gives them;
    .states[name](index, ids) -> states of those rows of a split."""

    def __init__(self, model, depth, splits, where, fresh):
        others = [p.requires_grad for n, p in model.named_parameters() if n[:6] != 'score.']
        head_only = not any(others) and not shipped.edited_methods(model, shipped.CLASSIFY)
        self.net = HeadOnly(model) if head_only else Tail(model, depth)
        self.states = {}
        for name, tokens in splits.items():
            own = [states.path for states in self.states.values()]
            self.states[name] = FrozenStates(self.net, model, tokens, *where, fresh, own)

    @torch.no_grad()
    def agrees(self, model, name, tokens, max_length, keep, device, dtype):
        """Are the logits of a few rows of a split those of the model, to rounding, in evaluation
        and in training?"""
        training, same = model.training, True
        index = np.unique([*range(min(8, len(tokens))), *np.argsort(-tokens.lengths)[:4]])
        ids, n = data.collate(tokens, index, max_length, keep, model.end, device)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        for mode in (False, True):
            model.train(mode)
            found = []
            for net, states in ((model, ()), (self.net, (self.states[name](index, ids),))):
                # a BatchNorm counts what it reads
                with torch.random.fork_rng(), autocast(device, dtype), unchanged(model.buffers()):
                    torch.manual_seed(0)  # both drop the same
                    found.append(net(ids, n, *states).float())
            want, got = found
            same &= bool((want - got).abs().max() <= tolerance * want.abs().max())
        model.train(training)
        return same


class HeadOnly:
    """What trains if all blocks and ln_f are frozen: the states are what `score` reads, (B, C)."""

    pooled = True

    def __init__(self, model):
        self.model = model
        self.below = Below(model, [m for name, m in model.named_children() if name != 'score'])

    def __call__(self, ids, lengths, states):
        check(states, ids, lengths, self.below)
        return self.model.score(states)

    def states_of(self, ids, lengths):
        read = []
        hook = self.model.score.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        try:
            self.model(ids, lengths)
        finally:
            hook.remove()
        if len(read) != 1 or read[0].shape != (len(ids), self.model.cfg.n_embd):
            raise UserError('the head reads more than one state of a text')
        return read[0]


class Tail:
    """The model from block `depth` on; the states are what that block reads, (B, T, C)."""

    pooled = False

    def __init__(self, model, depth):
        self.model, self.front, self.tail = model, model.h[:depth], model.h[depth:]
        self.below = Below(model, [*self.front, model.wte, model.wpe, model.drop])

    def __call__(self, ids, lengths, states):
        check(states, ids, lengths, self.below)
        with only(self.model, h=self.tail):
            self.model.embed = lambda *_: states
            try:
                return self.model(ids, lengths)
            finally:
                del self.model.embed

    def states_of(self, ids, lengths):
        with only(self.model, h=self.front, ln_f=nn.Identity()):
            return self.model.hidden(self.model.padded(ids))


class Below:
    """The modules that make the states, watched: do they still compute what they did?"""

    def __init__(self, model, parts):
        self.model, self.modules = model, [m for part in parts for m in part.modules()]
        self.params = [p for part in parts for p in part.parameters()]
        self.drops = [m for m in self.modules if isinstance(m, nn.Dropout)]
        self.before = self.now()

    def now(self):
        params = stamp(*self.params), [p.requires_grad for p in self.params]
        patched = ['forward' in vars(m) for m in self.modules], hooked(self.modules)
        return params, patched, [m.p for m in self.drops], [*self.model.h], self.model.pooling


def check(states, ids, lengths, below):
    """Raise UserError if a step reads other ids or lengths than those of its states, or if what
    makes the states is no longer what it was."""
    of, version = getattr(states, 'of', (ids, ids._version))
    same = of is ids and version == ids._version
    if hasattr(states, 'want'):
        want, n = states.want
        same &= torch.equal(want, ids[:, : want.shape[1]]) and torch.equal(n, lengths)
    if not same:
        raise UserError(STALE.format('a step reads other token ids than the cache'))
    if below.now() != below.before:
        raise UserError(STALE.format('one of them was changed or trains now'))


@contextlib.contextmanager
def only(model, **modules):
    """Inside, the model has these in place of its own modules of those names."""
    own = {name: model._modules[name] for name in modules}
    model._modules.update(modules)
    try:
        yield
    finally:
        model._modules.update(own)


class FrozenStates:
    """states(index (B,), ids (B, T)) -> (B, T, C) float32, padded with zeros; or (B, C). The ids
    are those that the states are of; an edit of the script that changes them is told so.

    They are in a file of the cache, in the compute precision ((B, C) in float32),
    memory-mapped; a GPU with room for them holds a copy. The file is named after all that they
    depend on, so the next run over the same finds it."""

    def __init__(self, net, model, tokens, max_length, keep, device, dtype, fresh, own):
        """own: files of the cache that this run needs as well."""
        lengths = np.minimum(tokens.lengths, max_length)
        self.pooled, self.device = net.pooled, device
        self.tokens, self.cut, self.lengths = tokens, (max_length, keep, model.end), lengths
        read = np.full_like(lengths, model.pad_to) if model.pooling == 'pad' else lengths
        self.rows = np.ones_like(lengths) if net.pooled else read
        order = np.argsort(-lengths, kind='stable')  # that of in_batches
        self.starts = np.empty_like(lengths)
        self.starts[order] = np.cumsum(self.rows[order]) - self.rows[order]
        kind = torch.float32 if net.pooled else dtype
        n, C = int(self.rows.sum()), model.cfg.n_embd
        size = n * C * kind.itemsize
        settings = (max_length, keep, net.pooled, kind, dtype, device.type, model.pooling)
        path = self.path = files.cached(f'frozen/{key_of(model, tokens, settings)}.bin')

        def compute(f):
            def write(ids, lengths, index):
                x = net.states_of(ids, lengths).to(kind).cpu()
                for row, count in zip(x, self.rows[index]):
                    row = row if net.pooled else row[:count]
                    f.write(row.contiguous().view(torch.uint8).numpy())
                return x.new_zeros(len(index), 0)

            in_batches(write, model, tokens, max_length, keep, device, dtype, progress=True)

        if fresh or not has_size(path, size):
            files.make_room(os.path.dirname(path), size, own)
            files.write_atomic(path, compute, every_rank=True)
        with contextlib.suppress(OSError):  # a cache that is only read
            os.utime(path)  # the most recently used
        try:
            self.flat = torch.from_file(path, size=n * C, dtype=kind).view(n, C)
        except RuntimeError:
            raise UserError(f'{path} is gone: another run needed its room') from None
        self.on_gpu = fits(device, size)
        if self.on_gpu:
            mapped = self.flat
            self.flat = torch.zeros(n + 1, C, dtype=kind, device=device)  # the last row: pads
            self.flat[:n].copy_(mapped)

    def __call__(self, index, ids):
        states = self.read(index, ids.shape[1])
        states.of = ids, ids._version  # for check()
        if self.device.type == 'cpu':  # a GPU would be waited for
            want = data.collate(self.tokens, index, *self.cut)[0]
            states.want = want, torch.from_numpy(self.lengths[index])
        return states

    def read(self, index, width):
        starts, rows = self.starts[index], self.rows[index]
        if self.on_gpu:  # only positions are copied
            t = np.arange(max(width, rows.max()))
            place = np.where(t < rows[:, None], starts[:, None] + t, len(self.flat) - 1)  # (B, T)
            place = data.to_device(torch.from_numpy(place), self.device)
            return self.flat[place[:, 0]] if self.pooled else self.flat[place].float()
        parts = [self.flat[i : i + n] for i, n in zip(starts, rows)]
        if self.pooled:
            return data.to_device(torch.cat(parts), self.device)
        x = nn.utils.rnn.pad_sequence(parts, batch_first=True).float()
        return data.to_device(F.pad(x, (0, 0, 0, max(0, width - x.shape[1]))), self.device)


def fits(device, size):
    """Does a GPU hold so many bytes in half of its free memory? The rest is for the steps."""
    return device.type == 'cuda' and 2 * size <= torch.cuda.mem_get_info(device)[0]


def has_size(path, size):
    try:
        return os.path.getsize(path) == size
    except OSError:
        return False


# --- the name of a file ---


def key_of(model, tokens, settings):
    """Hash of all that the states depend on: settings, code, frozen weights, texts."""
    code = code_of({data.Split, *(c for m in model.modules() for c in type(m).__mro__)})
    h = hashlib.sha256(repr((VERSION, model.cfg, settings, code)).encode())
    weights = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    buffers = {n: b for n, b in model.named_buffers() if n[:6] != 'score.'}
    for name, t in {**weights, **buffers}.items():
        h.update(name.encode())
        h.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        give_back(t)
    h.update(tokens.flat)
    h.update(tokens.starts)
    return h.hexdigest()[:32]
