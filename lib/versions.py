"""What made a run: versions, and the code of the model and of what it reads as a hash. Called by
lib/runfolder.py, lib/genrun.py, lib/runs.py, and lib/frozen.py, whose states depend on the code."""

import hashlib
import os
import platform
import re
import sys
from types import CodeType, ModuleType

import numpy as np
import torch

import data
import lora
import model
from lib import scoring, tokens
from lib.shipped import code

CONSTANTS = (bool, int, float, str, tuple, list, dict, type(None))
ADDRESS = re.compile(' at 0x[0-9a-f]+')  # of a function, another one in every process


def versions():
    """Versions for run.json."""
    every = {v for m in (model, lora) for v in vars(m).values() if isinstance(v, type)}
    every = {c for c in every if c.__module__ in (model.__name__, lora.__name__)}
    found = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    reads = tokens.tokenize, tokens.encoded, data.collate, scoring.ends_here
    return {**found, 'code': code_of(every, reads)}


def edited(info):
    """Was a run (info: its run.json) trained with other code, if that is known?"""
    then, now = info.get('versions') or {}, versions()  # Pythons cut f-strings otherwise
    return then.get('python') == now['python'] and then.get('code', now['code']) != now['code']


def code_of(classes, functions=()):
    """Hash of the code of classes, of functions and constants of their files and of those beside
    them that these import, and of functions. Comments do not count."""
    classes = {c for c in classes if c.__module__.split('.')[0] not in ('torch', 'builtins')}
    found = [(c.__qualname__, vars(c)) for c in classes]
    found.append(('', {f.__name__: f for f in functions}))
    for m in files_of(classes):  # without the functions that torch.compile adds to a file
        found.append((m.__name__, {k: v for k, v in vars(m).items() if not k.startswith('__')}))
    h = hashlib.sha256()
    for name, members in sorted(found, key=lambda item: item[0]):
        for key, value in sorted(members.items()):
            f = getattr(value, 'fget', None) or getattr(value, '__func__', value)
            compiled = getattr(f, '__code__', None)
            if isinstance(compiled, CodeType):
                value = code(f) or (compiled.co_code, compiled.co_consts)
            elif not isinstance(value, CONSTANTS) or key.startswith('__'):
                continue
            h.update(ADDRESS.sub('', repr((name, key, value))).encode())
    return h.hexdigest()[:16]


def files_of(classes):
    """The modules of these classes, and those in the same folders that they import."""
    todo = [sys.modules[c.__module__] for c in classes if c.__module__ in sys.modules]
    folders = {folder_of(m) for m in todo} - {None}
    seen = {}
    while todo:
        m = todo.pop()
        if m.__name__ not in seen:
            seen[m.__name__] = m
            names = [getattr(v, '__module__', None) or '' for v in vars(m).values()]
            owners = [sys.modules.get(name) for name in names]
            imported = [v for v in vars(m).values() if isinstance(v, ModuleType)]
            todo += [m for m in owners + imported if m and folder_of(m) in folders]
    return seen.values()


def folder_of(module):
    path = getattr(module, '__file__', None)
    return path and os.path.dirname(os.path.abspath(path))
