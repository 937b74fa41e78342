"""lib/export.py."""

import json
import os

import numpy as np
import torch

import lib.files
import lora
import predict
from lib.files import UserError, write_atomic
from lib.runs import open_run
from model import GPT
from tests.helpers import (
    THEIR_TEXTS,
    TINY,
    assert_same,
    far,
    gen_run,
    hugging_face,
    lm_logits,
    opened,
    patched,
    probs_of,
    raises,
    real_data,
    script,
    tiny_run,
    tmp,
    train,
    tree,
    write,
)


def test_export():
    for method in ('head', 'last', 'full', 'lora'):
        out, folder = tiny_run(method), os.path.join(tmp(), 'merged')
        os.makedirs(folder) if method == 'lora' else None  # an empty one will do
        before = tree(out)
        code, text, _ = script(predict.main, [out, '--export', folder])
        assert text == f'wrote {folder}\n' and tree(out) == before
        model_files = {'config.json', 'model.safetensors'}
        tokenizer_files = {'tokenizer.json', 'tokenizer_config.json'}
        assert set(os.listdir(folder)) == model_files | tokenizer_files
        texts = [*THEIR_TEXTS, 'the song was warm ' * 50]  # longer than --max_length
        run, merged = open_run(out, 'cpu', 'fp32'), open_run(folder, 'cpu', 'fp32')
        a, b = torch.from_numpy(run.logits(texts)), torch.from_numpy(merged.logits(texts))
        assert merged.labels == run.labels and far(b, a) < 1e-5, (method, far(b, a))
        assert not any(isinstance(m, lora.LoRA) for m in merged.model.modules())
        flags = ['--json', '--dtype', 'fp32', *texts]
        lines = [script(predict.main, [x, *flags])[1].splitlines() for x in (out, folder)]
        rows = [[json.loads(line) for line in side] for side in lines]
        assert all(
            x['label'] == y['label'] and abs(x['probs']['positive'] - y['probs']['positive']) < 1e-5
            for x, y in zip(*rows)
        )
        raises(
            UserError,
            predict.main,
            [out, '--export', folder],
            match='is there already and not empty',
        )
    file = write('file', 'x')
    raises(UserError, predict.main, [out, '--export', file], match='is there already')
    raises(UserError, predict.main, [out, '--export', out], match='is there already')
    raises(UserError, predict.main, [out, 'a text', '--export', 'x'], match='leave text out')
    raises(
        UserError, predict.main, [out, '--device', 'cpu', '--export', 'x'], match='leave device out'
    )


def test_export_is_all_or_nothing():
    place = tmp()
    for run in ('adapter', 'prompt'):
        raises(
            UserError,
            predict.main,
            [tiny_run(run), '--export', os.path.join(place, 'x')],
            match='cannot be merged',
        )
    raises(
        UserError,
        predict.main,
        [gen_run('prefix'), '--export', os.path.join(place, 'x')],
        match='cannot be merged',
    )
    raises(
        UserError,
        predict.main,
        [gen_run('zero_shot'), '--export', os.path.join(place, 'x')],
        match='trained nothing',
    )
    writes, out = [], gen_run('lora')

    def full(path, content, real=write_atomic):
        writes.append(path)
        if len(writes) == 5:
            raise UserError(f'cannot write {path}')
        real(path, content)

    with patched(lib.files, 'write_atomic', full):
        raises(
            UserError,
            predict.main,
            [out, '--export', os.path.join(place, 'x')],
            match='cannot write',
        )
    assert len(writes) == 5 and os.listdir(place) == []
    raises(
        UserError,
        predict.main,
        [tiny_run('full'), '--export', os.path.join(write('file', 'x', place), 'x')],
        match='cannot write',
    )
    assert os.listdir(place) == ['file']


def test_exports_open_in_transformers():
    Classifier, LM = hugging_face('AutoModelForSequenceClassification', 'AutoModelForCausalLM')
    for method in ('head', 'last', 'full', 'lora'):
        folder = os.path.join(tmp(), 'merged')
        script(predict.main, [tiny_run(method), '--export', folder])
        assert_same(
            open_run(tiny_run(method), 'cpu', 'fp32'),
            Classifier.from_pretrained(folder).eval(),
            method,
        )
    for method in ('lora', 'full', 'posterior'):
        out, folder, run = gen_run(method), os.path.join(tmp(), 'merged'), opened(method)
        code, text, _ = script(predict.main, [out, '--export', folder])
        assert text.splitlines() == [f'wrote {os.path.join(folder, label)}' for label in run.labels]
        texts = ['cat dog bird', 'one']
        ours = run.logits(texts) - run.log_prior
        for c, label in enumerate(run.labels):
            theirs = LM.from_pretrained(os.path.join(folder, label)).eval()
            again = GPT.from_pretrained(
                os.path.join(folder, label)
            )  # as --model of the train scripts
            for text, mine in zip(texts, ours[:, c]):
                ids = torch.tensor([[256, *text.encode(), 256]])
                with torch.no_grad():
                    logits, same = theirs(ids).logits[0, :-1], lm_logits(again.eval(), ids)[0, :-1]
                assert far(same, logits) < 1e-5
                assert abs(
                    float(logits.log_softmax(1).gather(1, ids[0, 1:, None]).sum()) - mine
                ) < 1e-5 * abs(mine), (method, label, text)


def test_export_brings_the_tokenizer():
    AutoTokenizer, pipeline = hugging_face('AutoTokenizer', 'pipeline')
    real_data('gpt2_bpe')
    flags = '--data demo --model gpt2 --scratch --n_layer 1 --n_head 2 --n_embd 16 --lora'.split()
    flags += '--max_steps 3 --max_length 20 --keep last --quick --dtype fp32'.split()
    out, _ = train(*flags)
    folder = os.path.join(tmp(), 'merged')
    script(predict.main, [out, '--export', folder])
    run, theirs = open_run(folder, 'cpu', 'fp32'), AutoTokenizer.from_pretrained(folder)
    texts = ['the song was warm', ' Größe \n\n naïve 日本', "it's 100 % <|end", 'a long text ' * 30]
    for text in texts:
        ids = theirs(text, truncation=True)['input_ids']
        assert ids == run.enc.encode_ordinary(text)[-20:]
        assert theirs.decode(theirs(text)['input_ids']) == text
    assert run.args['max_length'] == 20 and run.args['keep'] == 'last'
    rows = pipeline('text-classification', folder, device='cpu')(
        texts, batch_size=2, truncation=True, top_k=None
    )
    want = probs_of(open_run(out, 'cpu', 'fp32'), texts)
    got = [[{x['label']: x['score'] for x in row}[label] for label in run.labels] for row in rows]
    assert np.abs(np.array(got) - want).max() < 1e-5, (got, want)


def test_export_of_bytes_brings_a_tokenizer():
    """The demo's tokens are bytes: the export's tokenizer reads them in transformers, or is none
    there."""
    AutoTokenizer, pipeline = hugging_face('AutoTokenizer', 'pipeline')
    texts = ['the song was warm', 'naïve 日本 \n', 'x', 'a long text ' * 30]
    for keep in ('first', 'last'):
        flags = [*TINY, '--full', '--max_steps', '2', '--max_length', '40', '--keep', keep]
        out, folder = train(*flags)[0], os.path.join(tmp(), 'merged')
        script(predict.main, [out, '--export', folder])
        run, theirs = open_run(folder, 'cpu', 'fp32'), AutoTokenizer.from_pretrained(folder)
        for text in texts:
            ids = run.enc.encode_ordinary(text)
            assert theirs(text)['input_ids'] == ids and theirs.decode(ids) == text, text
            cut = ids[:40] if keep == 'first' else ids[-40:]
            assert theirs(text, truncation=True)['input_ids'] == cut, text
        classify = pipeline('text-classification', folder, device='cpu')
        rows = classify(texts, batch_size=2, truncation=True, top_k=None)
        got = [
            [{x['label']: x['score'] for x in row}[label] for label in run.labels] for row in rows
        ]
        want = probs_of(open_run(out, 'cpu', 'fp32'), texts)
        assert np.abs(np.array(got) - want).max() < 1e-5, (got, want)
