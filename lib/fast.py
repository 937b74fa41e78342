"""The same numbers, sooner: speed_up(model) replaces `forward` and a few methods on the
instances of a plain GPT. Called by the training scripts and lib/runs.py; leaving it out
(--plain) changes nothing but the time and, in training, which values dropout drops.

Every replacement is first compared with the plain code that it replaces (lib/selfcheck.py). So an
edit of model.py or lora.py takes effect: where the two differ, the plain code stays in place, and a
line says so."""

import ctypes
import gc
import sys
from types import MethodType

import torch

from lib import ranks, selfcheck
from lib.blocks import FastBlock, Rows, fast_forward, make_block, make_layer
from lib.matrices import packing
from lib.rows import TrainedRows
from lib.vocabulary import FastVocabulary
from lora import LoRA
from model import Conv1D


def speed_up(model, device, dtype, token_ids=None, pack=True, matrix=None):
    """Replace parts of a GPT that was adapted and placed by faster ones of the same values.

    token_ids: ids of all the texts to train on; if wte trains, only their rows of it are trained
    (lib/rows.py).  pack: False leaves the blocks plain, for torch.compile.  matrix: a class of
    frozen matrices in place of the one for dtype (lib/int8.py).  Frozen weights must not be
    changed afterwards."""
    floats = packing(device, dtype) if pack else None
    matrix = matrix or floats
    formula = matrix and matrix.formula  # in whose place the formulas are checked
    edited = {}  # {name of plain code that stays in place: how it differs}
    checked = {}
    for block in model.h if pack else ():
        if not install(block, make_block, matrix, checked, edited):
            for layer in list(block.modules()):
                if isinstance(layer, (Conv1D, LoRA)):
                    install(layer, make_layer, matrix, checked, edited)

    def same(name, why):
        edited.update({name: why} if why else {})
        return not why

    if model.classes and same('GPT.hidden', selfcheck.check_hidden(model, share_blocks, formula)):
        share_blocks(model)
    ends_fast = model.pooling == 'last' and isinstance(fast_forward(model.h[-1]), FastBlock)
    if hasattr(model, 'score') and ends_fast and not model.classes:
        if same('GPT.classify', selfcheck.check_classify(model, read_last, formula)):
            read_last(model)
    if same('GPT.next_logprobs', selfcheck.check_vocabulary(model, FastVocabulary)):
        packs = floats and not model.wte.weight.requires_grad
        model.next_logprobs = FastVocabulary(model, floats if packs else None)
    if token_ids is not None and model.wte.weight.requires_grad:
        if same('GPT.embed', selfcheck.check_rows(model, TrainedRows)):
            TrainedRows(model.wte, token_ids)
    if device.type == 'cpu':
        keep_freed_memory()
    if edited and ranks.rank() == 0:
        why = '; '.join(dict.fromkeys(edited.values()))
        text = f'note: {", ".join(edited)} as in model.py and lora.py, without the faster version'
        print(f'{text}, which computes something else ({why})', file=sys.stderr)


def install(module, make, matrix, checked, edited):
    """Put make(module, matrix) into the place of module.forward if both compute the same, which is
    checked once for all modules of a kind. -> is it in place?"""
    fast = make(module, matrix)
    if fast is None:
        return False
    kind = [(name, type(m)) for name, m in module.named_modules()]
    kind = repr((kind, [(n, p.shape, p.requires_grad) for n, p in module.named_parameters()]))
    if kind not in checked:
        checked[kind] = selfcheck.check_module(module, make, matrix and matrix.formula)
    if checked[kind]:
        edited[type(module).__name__] = checked[kind]
        return False
    module.forward = fast
    return True


def folds(device, dtype):
    """Does speed_up add LoRA to the weights as it packs them? Then they need not be merged."""
    return packing(device, dtype) is not None


def keep_freed_memory():
    """Ask glibc to keep freed memory. It returns large freed blocks to the OS, and the next layer's
    activations then cost page faults: 20 % of an evaluation. Other systems are left as they are."""
    try:
        libc = ctypes.CDLL('libc.so.6')
        mallopt = libc.mallopt
        gc.collect()  # the small copies of the comparisons: their faster parts refer to them
        libc.malloc_trim(0)  # returned to the OS for the last time
    except (OSError, AttributeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own, which free() would return
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes: free memory that the heap may keep


# --- faster methods of GPT ---


def read_last(model):
    """Let classify compute the last block at each text's last token alone."""
    model.classify = MethodType(classify, model)


def classify(self, ids, lengths):
    if not len(self.h):  # a tail of lib/frozen.py
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
    if torch.is_grad_enabled() or x.device.type != 'cpu':
        return None
    few = lengths.sum() > 0.98 * x.shape[0] * x.shape[1]
    fast = all(isinstance(fast_forward(block), FastBlock) for block in model.h)
    return None if few or not fast else Rows(lengths, x.shape[1])


def share_blocks(model):
    """Let K classes share the blocks below the first one in which they differ."""
    model.hidden = MethodType(hidden, model)


def hidden(self, ids, of=None):
    copies = self.classes if of is None else 0
    if not copies or self.prompt is not None:
        return type(self).hidden(self, ids, of)
    x, split = self.embed(ids), selfcheck.first_lora(self)
    for i, block in enumerate(self.h):
        x = block(x.repeat(copies, 1, 1) if i == split else x)
    return self.ln_f(x)
