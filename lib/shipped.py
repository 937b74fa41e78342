"""Is the code of model.py and lora.py the one that what stands beside it knows: the faster parts
(lib/fast.py), cached states (lib/frozen.py), transformers and PEFT? What was edited runs as
written, without them.

    python -m lib.shipped     takes the present code for the known one: for an edit that computes
                              the same, or after which lib/blocks.py was edited as well

shipped.json has a hash of each function."""

import functools
import hashlib
import inspect
import io
import os
import textwrap
import tokenize

from lib import files
from lora import Adapter, LoRA
from model import GPT, MLP, Attention, Block, Conv1D

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'shipped.json')
HIDDEN = 'embed', 'hidden'  # methods of GPT up to the final states
CLASSIFY = (*HIDDEN, 'padded', 'pool', 'classify', 'forward')
NEXT = 'next_logits', 'next_logprobs'
LOGPROB = (*HIDDEN, 'token_logprobs', *NEXT, 'logprob')
PARAMETERS = {Conv1D: {'weight', 'bias'}, LoRA: {'A', 'B'}}
PARAMETERS.update(dict.fromkeys((Attention, MLP, Block), set()))
SKIPPED = tokenize.COMMENT, tokenize.NL
MARKS = {tokenize.NEWLINE: '\n', tokenize.INDENT: '{', tokenize.DEDENT: '}'}


def edited(*modules, made=False, but=()):
    """Names of what is not the known code in these modules, as 'Block.forward': `forward` of all
    modules inside (but those of some classes), `delta` of LoRA, and parameters that an edit added
    to them; with made also `__init__`."""
    inside = {m for module in modules for m in module.modules() if not isinstance(m, but)}
    names = ('forward', 'delta', '__init__') if made else ('forward', 'delta')
    kinds = {type(m) for m in inside}
    found = set(unknown((kind, name) for kind in kinds for name in names if hasattr(kind, name)))
    for m in inside:
        if type(m) in PARAMETERS:
            found |= {f'{type(m).__name__}.{n}' for n in m._parameters.keys() - PARAMETERS[type(m)]}
    return sorted(found)


def edited_methods(model, names):
    """The same of a GPT's methods of these names, replaced on the model itself as well (but by
    lib/fast.py)."""
    own = [n for n in names if n in vars(model) and vars(model)[n].__module__[:4] != 'lib.']
    return unknown((type(model), name) for name in names) + [f'GPT.{n}' for n in own]


def unknown(pairs):
    """Pairs of a class and the name of a function -> names of the functions that are not known."""
    functions = {}
    for kind, name in pairs:
        owner = next(base for base in kind.__mro__ if name in vars(base))
        functions[f'{owner.__qualname__}.{name}'] = vars(owner)[name]
    return sorted(n for n, f in functions.items() if not of_torch(f) and code(f) != known().get(n))


def no_gpt2(model, but=()):
    """The same of a whole GPT, for what reads its weights as those of GPT-2 and LoRA."""
    methods = CLASSIFY if model.num_labels else LOGPROB
    return sorted({*edited(model, made=True, but=but), *edited_methods(model, methods)})


def of_torch(function):
    return (getattr(function, '__module__', None) or '').split('.')[0] == 'torch'


@functools.lru_cache(None)
def code(function):
    """Hash of a function's tokens, without comments and docstrings; '' if its source is not at
    hand, or is that of another function, which it wraps."""
    if hasattr(function, '__wrapped__'):
        return ''
    words = ['']
    try:
        source = textwrap.dedent(inspect.getsource(function))
        for kind, text, *_ in tokenize.generate_tokens(io.StringIO(source).readline):
            docstring = kind in (tokenize.STRING, tokenize.NEWLINE) and words[-1] in ('\n', '{')
            if kind not in SKIPPED and not docstring:
                words.append(MARKS.get(kind, text))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):  # a part of a statement
        return ''
    return hashlib.sha256(''.join(words).encode()).hexdigest()[:16]


@functools.lru_cache(None)
def known():
    return files.read_json(PATH)


def present():
    """{name: hash} of the code as it is."""
    every = ['__init__', 'forward']
    owners = dict.fromkeys((Conv1D, Attention, MLP, Block, LoRA, Adapter), every)
    owners[LoRA] = [*every, 'delta']
    owners[GPT] = [*every, *sorted({*CLASSIFY, *LOGPROB})]
    pairs = [(owner, name) for owner, names in owners.items() for name in names]
    return {f'{owner.__name__}.{name}': code(getattr(owner, name)) for owner, name in pairs}


if __name__ == '__main__':
    files.write_json(PATH, present())
