"""Runs that differ in their seed alone: which ones do, their means, method against method. Called
by eval.py for --mean."""

import json

import numpy as np

from lib.files import UserError
from lib.flags import ALL_METHODS
from lib.intervals import compare_means, mean_interval

SHOWN = ('accuracy', 'macro_f1', 'mcc', 'nll', 'ece')
# flags that do not tell methods apart: seeds, places, devices, and the names of the methods
ASIDE = set('seed seeds split_seed out resume data_dir device log_every plain compile'.split())
ASIDE |= {'cuda_graphs', 'gradient_checkpointing', *ALL_METHODS} - {'last', 'prompt'}


def by_method(paths, infos):
    """Folders of runs and their run.json -> {method: indices of its runs}. The runs of a method
    have the same kind, method, data and flags, except for those in ASIDE; its name has the flags in
    which methods of this kind differ. Raises UserError if no method has two runs, or two of its
    runs have the same seed."""
    kinds = ['gen-' * (info['kind'] == 'gen') + info['method'] for info in infos]
    flags = [{k: v for k, v in info['args'].items() if k not in ASIDE} for info in infos]
    # only flags that are on have a place in a name
    flags = [{k: v for k, v in f.items() if v is not None and v is not False} for f in flags]
    groups = {}
    for i, key in enumerate(zip(kinds, flags)):
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(i)
    methods = {named(group[0], kinds, flags): group for group in groups.values()}
    if max(map(len, methods.values())) < 2:
        what = '--mean needs two runs or more of a method, which differ in --seed alone'
        raise UserError(f'{what}; these all differ in more: {", ".join(methods)}')
    for group in methods.values():
        of = {}
        for i in group:
            seed = infos[i]['args'].get('seed'), infos[i]['args'].get('split_seed')
            if seed[0] is not None and seed in of:
                same = f'{of[seed]} and {paths[i]} have the same flags and --seed {seed[0]}'
                raise UserError(f'{same}: --mean needs another seed for each run')
            of[seed] = paths[i]
    return methods


def named(i, kinds, flags):
    """The name of the method of run i: its kind, and flags in which others of this kind differ."""
    alike = [flags[j] for j, kind in enumerate(kinds) if kind == kinds[i]]
    name = kinds[i]
    for flag, value in flags[i].items():
        if any(other.get(flag) != value for other in alike):
            text = ','.join(map(str, value)) if isinstance(value, list) else value
            name += f' --{flag}' + ('' if value is True else f' {text}')
    return name


def by_seed(groups, paths, results, right):
    """What by_method found; metrics() of each run; right: bool (N,) of each run, the rows that it
    got right -> [{method, runs, means {metric: {mean, half}}}], compare_means() of each method with
    the first, None where one of the two has a single run."""
    methods = []
    for method, group in groups.items():
        means = {key: mean_interval([results[i][key] for i in group])._asdict() for key in SHOWN}
        methods.append(dict(method=method, runs=[paths[i] for i in group], means=means))
    first, *others = (np.array([right[i] for i in group]) for group in groups.values())
    tests = [compare_means(first, o) if min(len(first), len(o)) > 1 else None for o in others]
    return methods, tests
