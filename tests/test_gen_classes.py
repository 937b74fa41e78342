"""train_gen.py --class_id: classes trained one by one, added and replaced."""

import multiprocessing
import os
import re
import shutil
import sys

import numpy as np
import torch

import eval as evaluation  # not `eval`, which is Python's own
import predict
import train_gen
from lib.classes import folder_names
from lib.files import UserError, read_bytes, read_json, write_json
from lib.runs import open_run
from lib.tensors import load_safetensors, save_safetensors
from tests.helpers import (
    QUICKLY,
    TOPICS,
    copied,
    gen_run,
    generate,
    joint,
    needs_fork,
    over_base,
    pretrained,
    raises,
    records,
    script,
    tiny_run,
    tmp,
    topics,
    tree,
    weights,
    write,
)


def test_gen_class_by_class_equals_the_joint_run():
    out, text = generate(*over_base(*QUICKLY), '--class_id', '0')
    assert 'it lacks the classes numbers' in text
    assert sorted(os.listdir(out)) == [
        *('animals', 'base', 'log.jsonl', 'run.json', 'train_texts.bin')
    ]
    raises(UserError, open_run, out, match="lacks the class 'numbers'")
    later = copied(out)
    generate('--class_id', 'numbers', out=out)  # its flags are the run's
    assert weights(out) == weights(joint())
    assert read_json(os.path.join(out, 'eval_results.json')) == read_json(
        os.path.join(joint(), 'eval_results.json')
    )
    generate('--resume', out=later)  # trains what is lacking
    assert weights(later) == weights(joint()) and set(os.listdir(later)) == set(os.listdir(joint()))
    full, parts = generate(*over_base('--full', *QUICKLY[:-2]))[0], os.path.join(tmp(), 'parts')
    for c in ('numbers', 'animals'):
        generate(*over_base('--full', *QUICKLY[:-2]), '--class_id', c, out=parts)
    assert weights(parts) == weights(full) and len(weights(full)) == 2
    assert weights(generate(*over_base(*QUICKLY), '--trunk_dropout', '0')[0]) != weights(
        joint()
    )  # there was dropout, of the same numbers


def test_gen_class_is_added():
    """A third class, first by name or not: the files of the others do not change, and the run has
    three."""
    out = copied(joint())
    before = tree(out)
    _, text = generate(
        '--data', topics(('colours', 'numbers', 'animals')), '--class_id', 'colours', out=out
    )
    after = tree(out)
    assert all(
        after[name] == digest
        for name, digest in before.items()
        if name.split(os.sep)[0] in ('animals', 'numbers', 'base')
    )
    assert 'validation and test texts were training rows of the other classes' in text
    run = open_run(out, 'cpu', 'fp32')
    assert run.labels == run.info['labels'] == ['animals', 'colours', 'numbers']
    assert run.logits(['red pink']).shape == (1, 3)
    assert read_json(os.path.join(out, 'eval_results.json'))['n'] == 32
    assert set(run.info['calibration']['bias']) == set(run.labels)
    old = open_run(joint(), 'cpu', 'fp32')
    a, b = (
        old.logits(['cat', 'two one']) - old.log_prior,
        run.logits(['cat', 'two one']) - run.log_prior,
    )
    assert np.allclose(a, b[:, [0, 2]], atol=1e-3)
    steps = [r['step'] for r in records(out)]
    assert steps == sorted(steps) and records(out)[-1]['class'] == 'colours'
    raises(
        UserError,
        train_gen.main,
        ['--data', topics(), '--class_id', '0', '--out', out],
        match="no rows of the class 'colours'",
    )


def test_gen_two_classes_are_added():
    """One after the other: in the end the run has all four, by --class_id or by --resume."""
    path = write(
        'four.csv',
        read_bytes(topics(tuple(TOPICS))).decode()
        + ''.join(f'{"x" * i},letters\n' for i in range(1, 40)),
    )
    out = copied(joint())
    _, text = generate('--data', path, '--class_id', 'colours', out=out)
    assert 'it lacks the classes letters' in text
    assert open_run(out, 'cpu', 'fp32').logits(['cat']).shape == (
        1,
        2,
    )  # the finished run still works
    other = copied(out)
    generate('--data', path, '--class_id', 'letters', out=out)
    assert open_run(out, 'cpu', 'fp32').labels == ['animals', 'colours', 'letters', 'numbers']
    generate('--resume', out=other)  # as the message says
    assert open_run(other, 'cpu', 'fp32').labels == ['animals', 'colours', 'letters', 'numbers']


def test_gen_class_is_replaced():
    out = copied(joint())
    before = tree(out)
    generate('--class_id', '1', '--max_steps', '14', '--lr', '3e-2', out=out)
    after = tree(out)
    assert {name.split(os.sep)[0] for name in after if after[name] != before.get(name)} - {
        'numbers'
    } <= {'run.json', 'log.jsonl', 'eval_results.json', 'val_preds.json', 'val_labels.json'}
    assert (
        after[os.path.join('numbers', 'adapter_model.safetensors')]
        != before[os.path.join('numbers', 'adapter_model.safetensors')]
    )
    assert records(out)[-1]['step'] == records(joint())[-1]['step'] + 5
    assert set(after) == set(before)


def test_gen_class_with_another_dropout():
    """A class may have its own dropout, or is refused; the run works in either case."""
    out = copied(joint())
    try:
        generate('--class_id', '1', '--dropout', '0.3', out=out)
    except UserError:
        pass
    assert open_run(out, 'cpu', 'fp32').logits(['cat']).shape == (1, 2)


def test_gen_class_takes_its_own_length():
    """--max_steps for a run that was trained with --epochs: the typed flag counts, not the
    run's."""
    out = generate(*over_base('--epochs', '0.2', '--batch_size', '4'))[0]
    before = records(out)[-1]['step']
    generate('--class_id', '1', '--max_steps', '30', out=out)
    assert records(out)[-1]['step'] - before == 10  # its third of the rows


def test_gen_class_errors():
    out = copied(joint())
    for argv, match in (
        (['--r', '8'], '--r 8'),
        (['--targets', 'c_attn'], '--targets'),
        (['--top', '1'], '--top 1'),
        (['--max_length', '20'], '--max_length'),
        (['--full'], '--full'),
        (['--model', 'nano'], '--model'),
        (['--posterior_steps', '3'], '--posterior_steps'),
    ):
        raises(UserError, train_gen.main, ['--class_id', '1', '--out', out, *argv], match=match)
    for c in ('2', 'plants', '-1', '1.0', ''):
        raises(UserError, train_gen.main, ['--class_id', c, '--out', out], match='no such class; ')
    assert tree(out) == tree(joint())
    raises(
        UserError,
        train_gen.main,
        [*over_base(), '--class_id', '0', '--out', tiny_run('full')],
        match='no generative run',
    )
    raises(
        UserError,
        train_gen.main,
        ['--class_id', '0', '--out', gen_run('prefix')],
        match='no generative run of --lora or --full',
    )
    raises(
        UserError,
        train_gen.main,
        ['--class_id', '0', '--out', pretrained()],
        match='is a language model',
    )
    record = os.path.join(out, 'numbers', 'class.json')
    write_json(record, {**read_json(record), 'base': '0' * 64})
    for main, argv in ((predict.main, [out, 'x']), (evaluation.main, [out])):
        raises(UserError, main, argv, match='another base model')
    shutil.rmtree(os.path.join(out, 'numbers'))
    raises(UserError, predict.main, [out, 'x'], match="lacks the class 'numbers'")
    generate('--resume', out=out)
    assert weights(out) == weights(joint())
    path = os.path.join(out, 'base', 'model.safetensors')
    tensors = {n: t.clone() for n, t in load_safetensors(path).items()}
    tensors['transformer.wpe.weight'][0, 0] += 1
    save_safetensors(path, tensors)
    raises(UserError, open_run, out, match='another base model')
    raises(UserError, train_gen.main, ['--class_id', '0', '--out', out], match='another base model')


def test_gen_folder_names():
    labels = [
        'Sci/Tech',
        'Sci_Tech',
        'a/b',
        'a_b',
        'A_B',
        'base',
        'Base',
        'posterior',
        'prefix',
        '..',
        '.',
        '/',
        ' ',
        '-',
        '',
        'x' * 200,
        'x' * 199,
        'Äpfel',
        'con.txt',
        'a\\b',
        '../../etc',
        'new\nline',
        'class',
        'class-2',
        'tab\there',
        '中' * 200,
    ]
    names = folder_names(labels, {})
    assert list(names) == labels and len({name.lower() for name in names.values()}) == len(labels)
    for label, name in names.items():
        assert re.fullmatch(r'[\w-]+', name) and len(f'{name}.part'.encode()) < 255, (label, name)
        assert name.lower() not in ('base', 'posterior', 'prefix')
        os.makedirs(os.path.join(tmp(), name))
    assert names['Sci/Tech'] == 'Sci_Tech' and names['Äpfel'] == 'Äpfel' and names['a_b'] != 'a_b'
    for new in ('a:b', 'BASE', 'aaa', 'X' * 200):
        more = folder_names([new, *reversed(labels)], names)
        assert {label: more[label] for label in labels} == names
        assert more[new].lower() not in {name.lower() for name in names.values()}
    labels = ['..', 'base', 'a/b']
    path = write(
        'odd.csv',
        'text,label\n'
        + ''.join(
            f'{w} {i},{label}\n'
            for i in range(12)
            for w, label in zip(('cat', 'one', 'red'), labels)
        ),
    )
    out, _ = generate(
        '--data', path, '--model', pretrained(), '--dtype', 'fp32', '--max_steps', '3'
    )
    run = open_run(out, 'cpu', 'fp32')
    assert sorted(run.labels) == sorted(labels) and run.logits(['cat']).shape == (1, 3)
    assert len(os.listdir(out)) == 4 + 6


def test_classes_trained_by_several_processes_at_once():
    """--class_id K in three processes with one --out: the run of one process, without a lost log
    line."""
    needs_fork()
    flags = ['--data', topics(('animals', 'colours', 'numbers')), '--model', pretrained()]
    flags += '--dtype fp32 --max_steps 24 --device cpu'.split()
    whole, _ = generate(*flags)
    out = os.path.join(tmp(), 'run')

    def one(k):
        torch.set_num_threads(1)  # a forked process has lost the threads of OpenMP
        sys.exit(script(train_gen.main, [*flags, '--class_id', str(k), '--out', out])[0])

    fork = multiprocessing.get_context('fork')
    children = [fork.Process(target=one, args=(k,)) for k in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert os.path.isfile(os.path.join(out, 'eval_results.json'))
    assert 'calibration' in read_json(os.path.join(out, 'run.json'))
    assert sorted(r['class'] for r in records(out)) == sorted(r['class'] for r in records(whole))
    a, b = (
        open_run(folder, 'cpu', 'fp32').logits(['cat dog', 'red', 'two six one'])
        for folder in (out, whole)
    )
    assert np.allclose(a, b, atol=1e-3), (a, b)


def test_posterior_steps_are_not_repeated():
    for run, more, match in (
        ('posterior', ['--posterior_steps', '1'], 'they are not repeated'),
        ('lora', ['--likelihood_share', '0.5'], 'does nothing without --posterior_steps'),
    ):
        flags = ['--resume', '--out', copied(gen_run(run)), *more]
        raises(UserError, train_gen.main, flags, match=match)


def test_a_class_of_a_run_without_hashes():
    """As the message on a damaged file of hashes advises."""
    out = copied(gen_run('lora'))
    os.remove(os.path.join(out, 'train_texts.bin'))
    assert not script(train_gen.main, ['--class_id', '0', '--max_steps', '2', '--out', out])[0]
    assert os.path.getsize(os.path.join(out, 'train_texts.bin')) % 8 == 0
