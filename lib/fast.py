"""The same numbers, sooner: speed_up(model) replaces `forward` and a few methods on the instances
of a plain GPT. Called by train_cls.py, lib/genrun.py, lib/int8.py and lib/runs.py; leaving it out
(--plain) changes nothing but the time and, in training, which values dropout drops.

An edit of model.py or lora.py takes effect: a function whose code is not the known one
(lib/shipped.py), or a module with other parts than model.py gives it (lib/blocks.py), has no faster
part, and a line says so. torch.compile compiles the plain code."""

import ctypes
import sys
from types import MethodType

from lib import ranks, shipped
from lib.blocks import FastBlock, Rows, fast_forward, hooked, make_block, make_layer
from lib.matrices import packing
from lib.vocabulary import FastVocabulary
from lora import LoRA
from model import Conv1D


def speed_up(model, device, dtype, matrix=None):
    """Replace parts of a GPT that was adapted and placed by faster ones of the same values.

    matrix: a class of frozen matrices in place of the one for dtype (lib/int8.py)."""
    floats = packing(device, dtype)
    matrix, plain = matrix or floats, {}  # plain: {what runs as written: why}
    for block in model.h:
        if not install(block, make_block, matrix, plain):
            if names := shipped.edited(block, made=True):
                plain.setdefault('Block', as_written(names))
            for layer in list(block.modules()):
                if isinstance(layer, (Conv1D, LoRA)):
                    install(layer, make_layer, matrix, plain)

    def known(method, methods):
        """Are the methods of GPT that a faster one of this name stands for the known ones?"""
        found = shipped.edited_methods(model, methods)
        plain.update({method: as_written(found)} if found else {})
        return not found

    if model.classes and known('GPT.hidden', shipped.HIDDEN):
        model.hidden = MethodType(hidden, model)
    ends_fast = model.pooling == 'last' and isinstance(fast_forward(model.h[-1]), FastBlock)
    if hasattr(model, 'score') and ends_fast and not model.classes:
        if known('GPT.classify', shipped.CLASSIFY):
            model.classify = MethodType(classify, model)
    if known('GPT.next_logprobs', shipped.NEXT):
        packs = floats and not model.wte.weight.requires_grad
        model.next_logprobs = FastVocabulary(model, floats if packs else None)
    if device.type == 'cpu':
        keep_freed_memory()
    for why in dict.fromkeys(plain.values()) if ranks.rank() == 0 else ():
        parts = ', '.join(part for part, reason in plain.items() if reason == why)
        print(f'note: no faster version of {parts}: {why}', file=sys.stderr)


def install(module, make, matrix, plain):
    """Put make(module, matrix) into the place of module.forward if it stands for the code as it is.
    -> is it in place?"""
    if names := shipped.edited(module):
        plain[type(module).__name__] = as_written(names)
    elif fast := make(module, matrix):
        module.forward = fast
        return True
    return False


def as_written(names):
    return f'{", ".join(names)} edited, runs as written'


def keep_freed_memory():
    """Ask glibc to keep freed memory. It returns large freed blocks to the OS, and the next layer's
    activations then cost page faults: 20 % of an evaluation. Other systems are left as they are."""
    try:
        libc = ctypes.CDLL('libc.so.6')
        mallopt = libc.mallopt
        libc.malloc_trim(0)  # returned to the OS for the last time
    except (OSError, AttributeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own, which free() would return
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes: free memory that the heap may keep


# --- faster methods of GPT ---


def classify(self, ids, lengths):  # the last block at each text's last token alone
    blocks = [fast for fast in map(fast_forward, self.h) if isinstance(fast, FastBlock)]
    known = self.pooling == 'last' and not {'hidden', 'padded', 'pool'} & vars(self).keys()
    known = known and blocks and blocks[-1] is fast_forward(self.h[-1])  # none above cached ones
    beside = (m for m in self.children() if m is not self.h)
    if not known or hooked(beside) or any(block.touched() for block in blocks):
        return type(self).classify(self, ids, lengths)
    x = self.embed(ids)
    last = x.shape[1] - ids.shape[1] + lengths - 1  # prompt vectors shift positions
    rows = without_pads(self, x, last + 1)
    x = rows.gather(x) if rows else x
    for block in self.h[:-1]:
        x = block(x, None, rows) if rows else block(x)
    return self.score(self.ln_f(self.h[-1](x, last, rows).squeeze(1)))


def without_pads(model, x, lengths):
    """Rows of a padded batch x (B, T, C) that are not pads, where computing them alone pays."""
    if x.device.type != 'cpu':
        return None
    few = lengths.sum() > 0.98 * x.shape[0] * x.shape[1]
    fast = all(isinstance(fast_forward(block), FastBlock) for block in model.h)
    return None if few or not fast else Rows(lengths, x.shape[1])


def hidden(self, ids, y=None):  # K classes share the blocks below the first one that differs
    copies = self.classes if y is None else 0
    if not copies or self.prompt is not None:
        return type(self).hidden(self, ids, y)
    own = [any(isinstance(m, LoRA) for m in block.modules()) for block in self.h]
    x, split = self.embed(ids), own.index(True) if True in own else 0
    for i, block in enumerate(self.h):
        x = block(x.repeat(copies, 1, 1) if i == split else x)
    return self.ln_f(x)
