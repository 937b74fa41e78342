"""The laws of the house: where things are, how long they may be, what may import what."""

import ast
import os
import pathlib
import re
import subprocess
import sys

from tests.helpers import TOP, skip

HOUSE = pathlib.Path(TOP)
SCRIPTS = dict(train_cls=260, train_gen=380, eval=220, predict=220, bench=350)
NOUNS = dict(data=400, model=300, lora=250)
LIB, RUNNER, TOTAL = 300, 80, 10100  # lines: of a room, of test_all.py, of all but tests and bench
FUNCTION, MAIN, LOOP, LINE = 60, 120, 40, 100
# rooms that know the model; the others know neither model.py nor lora.py
KNOW_MODEL = set(
    """answers base blocks classes explain export fast foreign frozen genflags genrun gpubench init
    int8 onnxpeers packed page peers peft repeat rundata runfolder runs scoring
    shipped sides versions vocabulary windows workload""".split()
)
# rooms of bench.py, counted with it
BENCH = {'gpubench', 'measure', 'onnxpeers', 'peers', 'sides', 'workload'}
APART = {'fast', 'graphs', 'frozen', 'runs', 'ranks'}  # what model.py and lora.py never import


def rooms():
    return {p.stem: p for p in sorted((HOUSE / 'lib').glob('*.py')) if p.stem != '__init__'}


def sources():
    """{name: path} of every file of the program."""
    top = {name: HOUSE / f'{name}.py' for name in (*SCRIPTS, *NOUNS)}
    return {**top, **{f'lib.{name}': path for name, path in rooms().items()}}


def lines(path):
    return path.read_text(encoding='utf-8').count('\n')


def imports(path):
    """Modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == 'lib':
            found |= {f'lib.{alias.name}' for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & set(sources())


def test_budgets():
    """Each file, each function, each main and the whole are as short as they may be."""
    long = {n: lines(p) for n, p in sources().items()}
    limits = {**SCRIPTS, **NOUNS}
    over = [f'{n}: {k} lines' for n, k in long.items() if k > limits.get(n, LIB)]
    total = sum(k for n, k in long.items() if n != 'bench' and n[4:] not in BENCH)
    if total > TOTAL:
        over.append(f'all of it: {total} lines')
    if lines(HOUSE / 'test_all.py') > RUNNER:
        over.append('test_all.py')
    for name, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.FunctionDef):
                n = node.end_lineno - node.lineno + 1
                if n > (MAIN if node.name == 'main' else FUNCTION):
                    over.append(f'{name}.{node.name}: {n} lines')
    assert not over, over


def test_lines_are_short():
    files = [*sources().values(), *HOUSE.glob('tests/*.py'), *HOUSE.glob('docs/*.py')]
    wide = [
        f'{path.name}:{i}'
        for path in [*files, HOUSE / 'test_all.py']
        for i, line in enumerate(path.read_text(encoding='utf-8').split('\n'), 1)
        if len(line) > LINE
    ]
    assert not wide, wide


def test_imports_run_one_way():
    """lib's rooms that know no model -> data -> model -> lora -> rooms that know it -> scripts,
    and no circles."""
    graph = {name: imports(path) for name, path in sources().items()}

    def storey(name):
        if name in SCRIPTS:
            return 5
        if name in NOUNS:
            return dict(data=1, model=2, lora=3)[name]
        return 4 if name[4:] in KNOW_MODEL else 0

    for name, used in graph.items():
        for other in used - {name}:
            ok = storey(other) <= storey(name) and other not in SCRIPTS
            assert ok or (name == 'bench'), f'{name} imports {other}'
    for name in ('model', 'lora'):
        assert not {n[4:] for n in graph[name]} & APART, graph[name]
    done, doing = set(), []

    def visit(name):
        assert name not in doing, f'a circle: {" -> ".join([*doing, name])}'
        if name not in done:
            doing.append(name)
            for other in graph[name]:
                visit(other)
            done.add(doing.pop())

    for name in graph:
        visit(name)


def test_rooms_say_what_they_are_for():
    for name, path in sources().items():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
        assert doc and len(doc) > 40, name


def test_the_loop_is_in_sight():
    """Both train scripts: at most 40 lines between the marks, with forward, backward, clip and
    step."""
    for name in ('train_cls', 'train_gen'):
        text = (HOUSE / f'{name}.py').read_text(encoding='utf-8')
        parts = text.split('# --- loop ---')
        assert len(parts) == 3, name
        loop = parts[1]
        assert loop.count('\n') <= LOOP + 1, (name, loop.count('\n'))
        for word in ('loss_of(', '.backward()', 'clip_grad_norm_(', 'scaler.step(', 'zero_grad('):
            assert word in loop, (name, word)


def imported(path):
    """The rooms that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
        module = getattr(node, 'module', None) or ''
        names = {a.name for a in getattr(node, 'names', ()) if isinstance(a, ast.alias)}
        found |= names if module == 'lib' else {module[4:]} if module[:4] == 'lib.' else set()
        found |= {n[4:] for n in names if n[:4] == 'lib.'}
    return found


def test_rooms_name_their_callers():
    """Whoever the head of a room says calls it imports it; where it does not speak of rooms or
    scripts at large, nobody else does."""
    of = {path.relative_to(HOUSE).as_posix(): imported(path) for path in sources().values()}
    wrong = {}
    for room, path in rooms().items():
        head = ast.get_docstring(ast.parse(path.read_text('utf-8')))
        found = re.search(r'Called\s+by\s+(?:[^.]|\.(?=\w))*\.', head or '')
        if found:
            words = re.sub(r'both train(ing)? scripts', 'train_cls.py train_gen.py', found[0])
            named = set(re.findall(r'[\w/]+\.py', words.replace('\n', ' ')))
            callers = {name for name, rooms in of.items() if room in rooms}
            large = re.search(r'rooms|script|modules|everything', words)
            if not named <= callers or not large and named != callers:
                wrong[room] = named ^ callers
    assert not wrong, wrong


def test_line_counts_in_the_readme():
    """Every table row `| [file](file) | ... | N |` of README.md has the file's number of lines."""
    text = (HOUSE / 'README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| \[?`?([\w/]+\.py)`?\]?(?:\([\w/.]+\))? \|.*\| (\d+) \|$', text, re.M)
    assert {f'{n}.py' for n in (*SCRIPTS, *NOUNS)} <= {name for name, _ in rows}, rows
    wrong = {n: lines(HOUSE / n) for n, k in rows if lines(HOUSE / n) != int(k)}
    assert not wrong, wrong
    assert len(re.findall(r'\S+', text)) <= 2000


def test_importing_changes_nothing():
    """No module changes the process that imports it: excepthook, signals, csv's limit, environment,
    threads, locale."""
    code = """
import csv, os, signal, sys, locale, threading
def state():
    signals = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    return sys.excepthook, csv.field_size_limit(), dict(os.environ), signals, locale.setlocale(0)
import numpy, requests, tiktoken, torch
before, threads = state(), torch.get_num_threads()
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    __import__(name)
assert state() == before and torch.get_num_threads() == threads
"""
    names = [name for name in sources() if name != 'eval']
    p = subprocess.run(
        [sys.executable, '-c', code, TOP, *names, 'eval'], capture_output=True, text=True
    )
    assert p.returncode == 0, p.stderr


def test_ruff():
    """`ruff format --check` and `ruff check` over every file."""
    ruff = os.path.join(os.path.dirname(sys.executable), 'ruff')
    if not os.path.exists(ruff):
        skip('ruff is not installed')
    for command in (['format', '--check'], ['check']):
        p = subprocess.run([ruff, *command, TOP], capture_output=True, text=True)
        assert p.returncode == 0, p.stdout[-2000:]
