"""`python test_all.py [WORD ...]`: all tests, or those whose name or file holds one of the words.
`--fuzz N [KIND ...]` reads N damaged files of each kind, `--kills N` kills and resumes N runs of
each method, `--parity gpt2 [STEPS]` trains beside transformers and peft. No network is needed; real
data are read from $NANOCLS_DATA. `python -m pytest tests` runs the same files."""

import faulthandler
import importlib
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import unittest
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

FIRST = 'demo resume ranks train_cls train_gen gen_classes hostile fast cli'.split()  # the longest


def chosen(words):
    """-> [(name of a test file, names of its tests)], the longest files first."""
    files = []
    for path in sorted(pathlib.Path(__file__).parent.glob('tests/test_*.py')):
        file, names = path.stem[5:], re.findall(r'^def (test_\w+)', path.read_text('utf-8'), re.M)
        names = [name for name in names if not words or any(w in name or w in file for w in words)]
        files += [(file, names)] if names else []
    return sorted(files, key=lambda x: FIRST.index(x[0]) if x[0] in FIRST else len(FIRST))


def run(file, names):
    """In a worker process: run these tests of a file -> [(outcome, name)]"""
    results = []
    for name in names:
        start, result = time.time(), unittest.TestResult()
        test = unittest.FunctionTestCase(
            lambda name=name: getattr(importlib.import_module(f'tests.test_{file}'), name)()
        )
        faulthandler.dump_traceback_later(900, exit=True)  # a test that hangs ends its worker
        test.run(result)
        faulthandler.cancel_dump_traceback_later()
        broken, skipped = result.errors + result.failures, result.skipped
        what = 'FAIL' if broken else 'skip' if skipped else 'ok  '
        why = '\n' + broken[0][1] if broken else f' ({skipped[0][1]})' if skipped else ''
        results.append((what, name))
        print(f'{what} {name} {time.time() - start:.1f} s{why}', flush=True)
    return results


def serve(files, results):
    """A thread: hands files to a worker process; one that dies is a failure, and is replaced."""
    pool, spawn = None, multiprocessing.get_context('spawn')
    while files:
        file, names = files.pop(0)
        try:
            pool = pool or ProcessPoolExecutor(1, spawn)
            results += pool.submit(run, file, names).result()
        except Exception as e:
            print(f'FAIL test_{file}: {e}', flush=True)
            results += [('FAIL', f'test_{file}')]
            pool = None


def main(words):
    if words and words[0] in ('--fuzz', '--kills', '--parity'):
        return importlib.import_module(f'tests.{words[0][2:]}').main(words[1:])
    start, results, root = time.time(), [], tempfile.mkdtemp(prefix='nanocls-test-')
    os.environ.update(NANOCLS_TEST_ROOT=root, OMP_NUM_THREADS='1')
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(serve, [chosen(words)] * 2, [results] * 2))
    shutil.rmtree(root, ignore_errors=True)
    done, failed, skipped = ([n for w, n in results if w == x] for x in ('ok  ', 'FAIL', 'skip'))
    print(f'{time.time() - start:.0f} s; failed: {", ".join(failed) or "none"}')
    print(f'{len(done)} passed, {len(failed)} failed, {len(skipped)} skipped')
    return 1 if failed or not done else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
