"""lib/foreign.py: folders that transformers or PEFT wrote, and ours opened by them."""

import contextlib
import copy
import io
import json
import os
import shutil

import numpy as np
import torch

import eval as evaluation  # not `eval`, which is Python's own
import lib.base
import predict
from lib.checkpoints import base_sha256, class_names
from lib.files import UserError, read_bytes, read_json, write_json
from lib.foreign import base_named
from lib.metrics import softmax
from lib.runs import open_run
from lib.scoring import class_logits
from lib.tensors import load_safetensors
from lib.tokens import tokenize
from model import GPT
from tests.helpers import (
    CPU,
    SMALL,
    THEIR_TEXTS,
    assert_same,
    copied,
    formula_model,
    gen_run,
    hugging_face,
    opened,
    patched,
    probs_of,
    raises,
    run_eval,
    save_hf,
    script,
    skip,
    their_adapter,
    their_folders,
    three_classes,
    tiny_run,
    tmp,
    train,
    tree,
    write,
)


def test_moved_runs_open_in_peft():
    """PEFT looks for RUN/base where the run was; docs/formats.md has what opens it all the same."""
    Classifier, AutoPeft, PeftModel = hugging_face(
        'AutoModelForSequenceClassification', 'AutoPeftModelForSequenceClassification', 'PeftModel'
    )
    for method in ('lora', 'prompt'):
        moved = copied(tiny_run(method))
        config = os.path.join(moved, 'adapter_config.json')
        base = os.path.join(moved, 'base')
        assert os.path.isabs(read_json(config)['base_model_name_or_path'])  # from any folder
        write_json(config, {**read_json(config), 'base_model_name_or_path': '/where/it/was/base'})
        run = open_run(moved, 'cpu', 'fp32')
        theirs = PeftModel.from_pretrained(Classifier.from_pretrained(base), moved)
        assert_same(run, theirs.eval(), method)
        write_json(config, {**read_json(config), 'base_model_name_or_path': base})
        assert_same(run, AutoPeft.from_pretrained(moved).eval(), method)


def test_runs_open_in_transformers_and_peft():
    Classifier, AutoPeft, PeftModel = hugging_face(
        'AutoModelForSequenceClassification', 'AutoPeftModelForSequenceClassification', 'PeftModel'
    )
    for method in ('head', 'last', 'full', 'lora', 'prompt'):
        out = tiny_run(method)
        run = open_run(out, 'cpu', 'fp32')
        assert run.labels == ['negative', 'positive']
        if method in ('lora', 'prompt'):
            assert_same(run, AutoPeft.from_pretrained(out).eval(), method)
            assert_same(
                run,
                PeftModel.from_pretrained(
                    Classifier.from_pretrained(os.path.join(out, 'base')), out
                ).eval(),
                method,
            )
        else:
            assert_same(run, Classifier.from_pretrained(out).eval(), method)
            assert read_json(os.path.join(out, 'config.json'))['label2id'] == dict(
                negative=0, positive=1
            )


def test_label_names_over_a_base_that_stays_where_it_is():
    """A base that is not copied cannot know the run's classes: users of PEFT name them, as on top
    of openai-community/gpt2."""
    AutoPeft = hugging_face('AutoPeftModelForSequenceClassification')
    base = tmp()
    save_hf(base, formula_model(SMALL, 0))
    with patched(lib.base, 'SMALL_BASE', 0):
        out, _ = train(
            '--data', three_classes(), '--model', base, *'--lora --max_steps 3 --dtype fp32'.split()
        )
    assert not os.path.exists(os.path.join(out, 'base'))
    assert read_json(os.path.join(out, 'adapter_config.json'))['base_model_name_or_path'] == base
    labels = read_json(os.path.join(out, 'run.json'))['labels']
    assert_same(
        open_run(out, 'cpu', 'fp32'),
        AutoPeft.from_pretrained(out, id2label=dict(enumerate(labels)), pad_token_id=256).eval(),
        labels,
    )
    copy, _ = train(
        '--data', three_classes(), '--model', base, '--lora', '--max_steps', '3', '--dtype', 'fp32'
    )  # the base is copied
    assert_same(open_run(copy, 'cpu', 'fp32'), AutoPeft.from_pretrained(copy).eval(), labels)
    assert (
        read_json(os.path.join(base, 'config.json')).get('id2label') is None
    )  # the user's stays as it was


LORA_OPTIONS = dict(
    plain=dict(r=4, target_modules=['c_attn'], fan_in_fan_out=True),
    alpha=dict(r=4, lora_alpha=23, target_modules=['c_attn', 'mlp.c_proj']),
    alphas=dict(
        r=4,
        lora_alpha=8,
        alpha_pattern={'h.1.mlp.c_fc': 40, 'c_attn': 3, 'c_fc': 5},
        target_modules=['c_attn', 'mlp.c_fc', 'mlp.c_proj'],
    ),
    rslora=dict(r=8, lora_alpha=4, use_rslora=True, target_modules=['attn.c_proj', 'c_fc']),
    head=dict(r=2, target_modules=['c_attn'], modules_to_save=['score']),
    half=dict(r=2, target_modules=['c_fc'], half=True),
    expression=dict(r=2, target_modules=r'.*\.h\.[02]\.(attn\.c_attn|mlp\.c_fc)'),
    everything=dict(r=2, target_modules='all-linear'),
    spare=dict(r=2, target_modules=['c_attn', 'q_proj']),
    blocks=dict(r=2, target_modules=['c_proj'], layers_to_transform=[0, 2]),
    block=dict(r=2, target_modules=['c_attn'], layers_to_transform=0),
    untyped=dict(r=2, target_modules=['c_attn'], modules_to_save=['score'], task_type=None),
    start=dict(r=2, target_modules=['c_attn'], init_lora_weights='gaussian'),
)


def test_adapters_of_peft_open():
    AutoPeft, Classifier, PeftModel = hugging_face(
        'AutoPeftModelForSequenceClassification', 'AutoModelForSequenceClassification', 'PeftModel'
    )
    base = their_folders()[1]
    for what, options in [
        *LORA_OPTIONS.items(),
        ('prompt', dict(kind='PromptTuningConfig', num_virtual_tokens=5)),
    ]:
        folder = their_adapter(**options)
        run = open_run(folder, 'cpu', 'fp32')
        theirs = PeftModel.from_pretrained(
            Classifier.from_pretrained(base, num_labels=3, pad_token_id=256), folder
        ).eval()
        assert_same(run, theirs, what)
        assert run.labels == ['LABEL_0', 'LABEL_1', 'LABEL_2']
        assert run.args['max_length'] == 256 - 5 * (what == 'prompt')
        head = GPT.from_pretrained(
            base, 3, new_head=True
        )  # the adapter does something, so that it would be missed
        head.score.weight.data = run.model.score.weight.data
        without = class_logits(
            head, tokenize(run.enc, THEIR_TEXTS, cache=False), 200, 'first', CPU, torch.float32
        )
        assert np.abs(softmax(without) - probs_of(run, THEIR_TEXTS)).max() > 1e-3, what
        if what == 'plain':  # the older file
            weights = load_safetensors(os.path.join(folder, 'adapter_model.safetensors'))
            torch.save(
                {n: t.clone() for n, t in weights.items()},
                os.path.join(folder, 'adapter_model.bin'),
            )
            os.remove(os.path.join(folder, 'adapter_model.safetensors'))
            assert_same(open_run(folder, 'cpu', 'fp32'), theirs, 'bin')


def test_classes_of_an_adapter():
    """Class names come from a config.json beside it, else from its base model, else LABEL_i."""
    AutoPeft = hugging_face('AutoPeftModelForSequenceClassification')
    names = ['c', 'a', 'b']  # not in the order of the alphabet
    cls_dir = os.path.join(tmp(), 'cls')
    shutil.copytree(their_folders()[0], cls_dir)
    path = os.path.join(cls_dir, 'config.json')
    write_json(path, {**read_json(path), **class_names(names, 256)})
    folder = their_adapter(r=2, target_modules=['c_attn'], names=names, base=cls_dir)
    run = open_run(folder, 'cpu', 'fp32')
    assert run.labels == names
    assert_same(run, AutoPeft.from_pretrained(folder).eval(), 'named by the base')
    write_json(os.path.join(folder, 'config.json'), dict(id2label={'2': 'z', '0': 'x', '1': 'y'}))
    assert open_run(folder, 'cpu', 'fp32').labels == ['x', 'y', 'z']
    write_json(os.path.join(folder, 'config.json'), dict(id2label={'0': 'x', '1': 'y'}))
    raises(
        UserError,
        open_run,
        folder,
        match='base_model.model.score.weight is (3, 64) where (2, 64) belongs',
    )
    for bad in (
        {'0': 'x', '1': 'x', '2': 'z'},
        {'0': 'x', '2': 'y', '3': 'z'},
        {'0': 'x', '1': 5, '2': 'z'},
        ['x', 'y', 'z'],
        {'a': 'x'},
    ):
        write_json(os.path.join(folder, 'config.json'), dict(id2label=bad))
        raises(UserError, open_run, folder, match='id2label must give')


def test_where_the_base_of_an_adapter_is():
    folder = their_adapter(r=2, target_modules=['c_attn'])
    want = probs_of(open_run(folder, 'cpu', 'fp32'), THEIR_TEXTS)
    path = os.path.join(folder, 'adapter_config.json')
    config = read_json(path)
    beside = os.path.join(folder, 'gpt', 'small')
    shutil.copytree(their_folders()[1], beside)
    for name in ('gpt/small', beside):
        write_json(path, {**config, 'base_model_name_or_path': name})
        assert np.array_equal(probs_of(open_run(folder, 'cpu', 'fp32'), THEIR_TEXTS), want), name
    for name in ('someone/gpt2-news', None, 5, ''):
        write_json(path, {**config, 'base_model_name_or_path': name})
        raises(UserError, open_run, folder, match=f'base_model_name_or_path is {name!r}')
    os.rename(beside, os.path.join(folder, 'base'))  # a run of ours that has lost its run.json
    assert np.array_equal(probs_of(open_run(folder, 'cpu', 'fp32'), THEIR_TEXTS), want)
    assert base_named('x', 'openai-community/gpt2') == base_named('x', 'gpt2') == 'gpt2'
    assert base_named('x', 'distilbert/distilgpt2') == 'distilgpt2'


def test_checkpoints_of_transformers_open():
    Classifier = hugging_face('AutoModelForSequenceClassification')
    origin = Classifier.from_pretrained(their_folders()[0]).eval()
    origin.config.id2label, origin.config.label2id = (
        {0: 'news', 1: 'spam', 2: 'ham'},
        dict(news=0, spam=1, ham=2),
    )
    folders = {
        name: os.path.join(tmp(), name)
        for name in ('whole', 'shards', 'float16', 'bfloat16', 'bin', 'bin shards')
    }
    origin.save_pretrained(folders['whole'])
    origin.save_pretrained(folders['shards'], max_shard_size='100KB')
    assert sum(name.endswith('.safetensors') for name in os.listdir(folders['shards'])) > 3
    for name in ('float16', 'bfloat16'):
        copy.deepcopy(origin).to(getattr(torch, name)).save_pretrained(folders[name])
    state, config = origin.state_dict(), read_bytes(os.path.join(folders['whole'], 'config.json'))
    shards = {'pytorch_model-1.bin': list(state)[::2], 'pytorch_model-2.bin': list(state)[1::2]}
    for name in ('bin', 'bin shards'):
        os.makedirs(folders[name])
        write('config.json', config, folders[name])
    torch.save(state, os.path.join(folders['bin'], 'pytorch_model.bin'))
    for file, names in shards.items():
        torch.save({n: state[n].clone() for n in names}, os.path.join(folders['bin shards'], file))
    index = dict(metadata={}, weight_map={n: file for file, names in shards.items() for n in names})
    write_json(os.path.join(folders['bin shards'], 'pytorch_model.bin.index.json'), index)
    for name, folder in folders.items():
        run, theirs = (
            open_run(folder, 'cpu', 'fp32'),
            Classifier.from_pretrained(folder, dtype=torch.float32).eval(),
        )
        assert_same(run, theirs, name)
        assert run.labels == ['news', 'spam', 'ham'] and run.args['max_length'] == 256
    assert (
        np.ptp(probs_of(run, THEIR_TEXTS), axis=0).max() > 0.01
    )  # the texts get different answers
    first = sorted(os.listdir(folders['shards']))[1]  # a shard that is not there
    os.remove(os.path.join(folders['shards'], first))
    raises(UserError, open_run, folders['shards'], match=first)


def test_names_of_a_checkpoint():
    """transformers writes no id2label for two classes without names: LABEL_0, LABEL_1. A saved
    tokenizer says how long a text may be."""
    GPT2ForSequenceClassification, GPT2Config = hugging_face(
        'GPT2ForSequenceClassification', 'GPT2Config'
    )
    folder = tmp()
    shape = dict(vocab_size=257, n_positions=256, n_embd=64, n_layer=2, n_head=4, pad_token_id=256)
    GPT2ForSequenceClassification(GPT2Config(**shape)).save_pretrained(folder)
    run = open_run(folder, 'cpu', 'fp32')
    assert run.labels == ['LABEL_0', 'LABEL_1']
    assert (run.args['max_length'], run.args['keep']) == (256, 'first')
    for limit, side, want in (
        (10, 'left', (10, 'last')),
        (10**30, 'right', (256, 'first')),
        (1e30, None, (256, 'first')),
    ):
        write_json(
            os.path.join(folder, 'tokenizer_config.json'),
            dict(model_max_length=limit, truncation_side=side),
        )
        args = open_run(folder, 'cpu', 'fp32').args
        assert (args['max_length'], args['keep']) == want
    path = os.path.join(folder, 'config.json')
    config = read_json(path)
    for change, match in (
        (dict(problem_type='multi_label_classification'), 'problem_type'),
        (dict(model_type='bert'), 'model_type'),
        (
            dict(id2label={'0': 'a', '1': 'b', '2': 'c'}),
            'score.weight is (2, 64) where (3, 64) belongs',
        ),
    ):
        write_json(path, {**config, **change})
        raises(UserError, open_run, folder, match=match)
    GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=1)).save_pretrained(folder)
    raises(UserError, open_run, folder, match='score.weight has one row')


def test_folders_that_are_no_classifier():
    get_peft_model, LoraConfig, LM = hugging_face(
        'get_peft_model', 'LoraConfig', 'AutoModelForCausalLM'
    )
    lm = their_folders()[1]
    message = raises(UserError, open_run, lm, match='is a language model, not a classifier')
    assert f'--model {lm}' in message
    folder = tmp()
    get_peft_model(
        LM.from_pretrained(lm), LoraConfig(task_type='CAUSAL_LM', target_modules=['c_attn'])
    ).save_pretrained(folder)
    raises(UserError, open_run, folder, match='its task_type is CAUSAL_LM')
    raises(
        UserError,
        open_run,
        os.path.join(gen_run('lora'), 'animals'),
        match='its task_type is CAUSAL_LM',
    )
    raises(
        UserError, open_run, os.path.join(gen_run('full'), 'animals'), match='is a language model'
    )
    for options, match in (
        (dict(use_dora=True), 'use_dora'),
        (dict(bias='all'), 'bias'),
        (dict(rank_pattern={'c_attn': 3}), 'rank_pattern'),
        (dict(init_lora_weights='pissa'), 'init_lora_weights'),
        (dict(lora_bias=True), 'lora_bias'),
        (dict(exclude_modules=['h.0.attn.c_attn']), 'exclude_modules'),
        (dict(modules_to_save=['score', 'ln_f']), 'ln_f.weight is unexpected'),
    ):
        raises(
            UserError,
            open_run,
            their_adapter(**{**dict(r=2, target_modules=['c_attn']), **options}),
            match=match,
        )
    folder = their_adapter(
        r=2, target_modules=['c_attn'], task_type=None
    )  # PEFT does not add the head by itself then
    raises(
        UserError,
        open_run,
        folder,
        match='lacks base_model.model.score.weight: the adapter was saved without its class head',
    )
    raises(
        UserError,
        open_run,
        their_adapter('IA3Config', target_modules=['c_attn'], feedforward_modules=[]),
        match='IA3',
    )
    folder = tmp()
    write_json(os.path.join(folder, 'config.json'), dict(model_type='gpt2'))
    raises(UserError, open_run, folder, match='holds no model.safetensors')


def test_foreign_folders_in_the_scripts():
    cls_dir = os.path.join(tmp(), 'cls')
    shutil.copytree(their_folders()[0], cls_dir)
    before = tree(cls_dir)
    adapter = their_adapter(r=2, target_modules=['c_attn'])
    rows = [('text one', 'news'), ('two', 'spam'), ('3', 'ham'), ('', 'news')]
    test = write('rows.csv', 'text,label\n' + ''.join(f'{t},{y}\n' for t, y in rows))
    run = open_run(adapter, 'cpu', 'fp32')
    want = probs_of(run, [t for t, _ in rows])
    lines = script(predict.main, [adapter, '--file', test, '--json', '--dtype', 'fp32'])[
        1
    ].splitlines()
    got = [json.loads(line)['probs'] for line in lines]
    assert [list(p) for p in got] == [run.labels] * 4
    assert np.abs(np.array([list(p.values()) for p in got]) - want).max() < 1e-6
    assert script(predict.main, [cls_dir, '--dtype', 'fp32', '--explain', 'a text'])[1].startswith(
        'LABEL_'
    )
    for folder in (cls_dir, adapter):
        raises(UserError, run_eval, [folder], match='--data NAME')
        raises(
            UserError,
            run_eval,
            [folder, '--data', 'demo'],
            match='does not name its 3 classes, and demo has 2',
        )
        truth = [
            ['ham', 'news', 'spam'].index(y) for _, y in rows
        ]  # the order that data.load gives the names
        code, text, _ = script(evaluation.main, [folder, '--test', test, '--dtype', 'fp32'])
        assert 'taken in the order of' in text and 'ham, news, spam' in text
        numbers = json.loads(
            script(evaluation.main, [folder, '--test', test, '--dtype', 'fp32', '--json', '-'])[1]
        )
        p = probs_of(open_run(folder, 'cpu', 'fp32'), [t for t, _ in rows])
        assert abs(numbers['runs'][0]['nll'] + np.log(p[range(4), truth]).mean()) < 1e-5
        assert numbers['labels'] == ['ham', 'news', 'spam']
    assert tree(cls_dir) == before  # nothing was written there
    write_json(
        os.path.join(adapter, 'config.json'), class_names(['spam', 'ham', 'news'], 256)
    )  # by name now
    code, text, _ = script(
        evaluation.main, [adapter, '--test', test, '--dtype', 'fp32', '--json', '-']
    )
    truth = [['spam', 'ham', 'news'].index(y) for _, y in rows]
    assert abs(json.loads(text)['runs'][0]['nll'] + np.log(want[range(4), truth]).mean()) < 1e-5
    both = json.loads(
        script(
            evaluation.main, [adapter, cls_dir, '--test', test, '--dtype', 'fp32', '--json', '-']
        )[1]
    )
    assert both['comparisons'] and sorted(both['labels']) == ['ham', 'news', 'spam']
    text, _ = run_eval([cls_dir, copied(cls_dir), '--test', test, '--mean'])  # seeds are not known
    assert 'full: 2 runs' in text, text
    write_json(os.path.join(adapter, 'config.json'), class_names(['spam', 'egg', 'news'], 256))
    raises(UserError, run_eval, [adapter, '--test', test], match='ham')
    out, _ = train(
        '--data', three_classes(), '--model', cls_dir, '--head', '--max_steps', '2'
    )  # as a base model
    assert open_run(out).labels == ['ham', 'news', 'spam']
    raises(
        UserError,
        train,
        '--data',
        three_classes(),
        '--model',
        adapter,
        match='holds an adapter, not a whole model',
    )


def test_gen_files_open_in_transformers_and_peft():
    """Every class of a run, opened by transformers or PEFT, gives our log P(text | class)."""
    try:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
    except ImportError:
        skip('transformers or peft is not installed')
    texts = ['cat dog bird', 'one', 'two three größe']
    for method in ('lora', 'full', 'prefix', 'posterior'):
        out, run = gen_run(method), opened(method)
        ours = run.logits(texts) - run.log_prior
        for c, label in enumerate(run.labels):
            folder = os.path.join(out, label)
            with contextlib.redirect_stderr(io.StringIO()):
                if method == 'full':
                    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
                else:
                    theirs = PeftModel.from_pretrained(
                        AutoModelForCausalLM.from_pretrained(os.path.join(out, 'base')), folder
                    ).eval()
            for text, mine in zip(texts, ours[:, c]):
                ids = torch.tensor([[256, *text.encode(), 256]])
                with torch.no_grad():
                    logits = theirs(ids).logits[
                        0, -ids.shape[1] : -1
                    ]  # without those of the prompt
                assert (
                    abs(float(logits.log_softmax(1).gather(1, ids[0, 1:, None]).sum()) - mine)
                    < 1e-3
                ), (method, label, text)
            if method != 'full':
                named = read_json(os.path.join(folder, 'adapter_config.json'))[
                    'base_model_name_or_path'
                ]
                assert os.path.isdir(named)
                assert base_sha256(named) == base_sha256(os.path.join(out, 'base'))


def test_an_interrupted_run_says_how_to_go_on():
    folder = tmp()
    open(os.path.join(folder, 'resume.pt'), 'wb').close()
    raises(UserError, open_run, folder, match='go on with --resume')
