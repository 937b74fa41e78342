"""Broken and hostile files."""

import contextlib
import gzip
import io
import json
import os
import struct
import tarfile
import zipfile

import torch

import data
import lib.cli
import lib.download
import lib.peft
import lora
from lib.download import zip_member
from lib.files import UserError, read_json, write_json
from lib.peft import load_peft, lora_options, peft_config, save_peft
from lib.tensors import load_bin, load_safetensors
from model import GPT
from tests.fuzz import FUZZED, bounded, fuzz, kinds
from tests.helpers import (
    ALL,
    dump,
    formula_model,
    fresh_cache,
    patched,
    raises,
    run_eval,
    save_hf,
    tmp,
    write,
)


def test_fuzz():
    """Some mutations of each kind; `python test_all.py --fuzz N` makes N, and `--fuzz N KIND` of
    one kind."""
    broken = [line for kind in kinds() for line in fuzz(kind, 50)[2]]
    assert not broken, '\n'.join(broken)


def test_hostile_files():
    """Files that mutations hardly find: made to take years, or all memory, or to write
    elsewhere."""
    folder = tmp()
    with bounded(), patched(lib.peft, 'REGEX_SECONDS', 1):
        # a rank, a prompt, a bottleneck that no file holds; a regular expression that takes years;
        # numbers that are none
        model = formula_model(FUZZED, 2)
        lora.adapt(model, 'lora', targets=ALL, r=2)
        save_peft(folder, model, 'somewhere')
        path = os.path.join(folder, 'adapter_config.json')
        config = read_json(path)
        for change, match in (
            (dict(r=9_999_999), 'where (9999999, 8) belongs'),
            (dict(r=2**63), 'r is malformed'),
            (dict(r=True), 'r is malformed'),
            (dict(r=2.5), 'malformed'),
            (dict(lora_alpha=float('nan')), 'lora_alpha is malformed'),
            (dict(lora_dropout=1.0), 'lora_dropout'),
            (dict(target_modules=[1]), 'target_modules'),
            (dict(target_modules='(.*.*)*!'), 'takes too long'),
            (dict(target_modules='('), 'no regular expression'),
            (dict(target_modules=[]), 'target_modules'),
        ):
            write_json(path, {**config, **change})
            raises(UserError, load_peft, folder, formula_model(FUZZED, 2), match=match)
        write_json(path, {**config, 'target_modules': r'.*\.(c_attn|c_proj|c_fc)'})
        load_peft(folder, formula_model(FUZZED, 2))
        state = torch.get_rng_state()
        load_peft(folder, formula_model(FUZZED, 2))
        once = torch.get_rng_state()
        torch.set_rng_state(state)
        model, options = formula_model(FUZZED, 2), peft_config(folder)
        lora.add_lora(model, **lora_options(options, model))
        assert torch.equal(
            once, torch.get_rng_state()
        )  # trying it without memory draws no random numbers
    with bounded():
        # one value that claims to be 10^12 of them; a checkpoint in a zip that unpacks to more than
        # it is
        path = os.path.join(folder, 'pytorch_model.bin')
        torch.save({'a': torch.ones(1).expand(10**12)}, path)
        raises(UserError, load_bin, path, match='without running code')
        torch.save({'a': torch.ones(3), 'b': torch.ones(3)}, path)
        assert list(load_bin(path)) == ['a', 'b']
        with (
            zipfile.ZipFile(path) as old,
            zipfile.ZipFile(path + '2', 'w', zipfile.ZIP_DEFLATED) as new,
        ):
            for info in old.infolist():
                new.writestr(info.filename, old.read(info) + bytes(10**6))
        raises(UserError, load_bin, path + '2', match='without running code')
        # safetensors: the product of what is no number
        for shape in (['x' * 10_000, 2**40], [2**40] * 10**6, [0] * 100):
            text = json.dumps(dict(a=dict(dtype='F32', shape=shape, data_offsets=[0, 0]))).encode()
            raises(
                UserError,
                load_safetensors,
                write('x.safetensors', struct.pack('<Q', len(text)) + text),
                match='safetensors',
            )
    with (
        bounded(extra=64 << 20),
        patched(lib.download, 'MAX_MEMBER', 2 << 20),
        patched(lib.download, 'MAX_UNPACKED', 8 << 20),
    ):
        # archives
        for size, told, way, match in (
            (3 << 20, 3 << 20, zipfile.ZIP_DEFLATED, 'of at most'),
            (100 << 20, 1 << 20, zipfile.ZIP_DEFLATED, 'Bad CRC'),
            (1 << 20, 1 << 20, zipfile.ZIP_BZIP2, 'compression'),
            (5, 10 << 30, zipfile.ZIP_STORED, 'of at most'),
        ):
            path = os.path.join(folder, 'x.zip')
            with zipfile.ZipFile(path, 'w', way) as z:
                with z.open('../SMSSpamCollection', 'w') as f:
                    for _ in range(max(1, size >> 20)):
                        f.write(bytes(min(size, 1 << 20)))
                z.infolist()[0].file_size = told
            raises(UserError, zip_member, path, 'SMSSpamCollection', match=match)
        os.mkdir(os.path.join(folder, 'imdb'))
        for size, content in ((10 << 30, b''), (2**62, b''), (20 << 20, bytes(1 << 20))):
            header = tarfile.TarInfo('aclImdb/train/neg/1_1.txt')
            header.size = size
            with (
                gzip.open(os.path.join(folder, 'imdb', 'aclImdb_v1.tar.gz'), 'wb', 1) as f,
                fresh_cache(),
            ):
                f.write(header.tobuf(tarfile.GNU_FORMAT))
                for _ in range(20 if content else 0):
                    f.write(content)
                f.close()
                raises(
                    UserError, data.load, 'imdb', data_dir=folder, match='not the published archive'
                )
        # a label column with a label per row
        raises(
            UserError,
            data.load,
            write('x.csv', 'text,label\n' + ''.join(f't{i},l{i}\n' for i in range(6000))),
            match='--label_col',
        )
        many = dump([f'l{i}' for i in range(6000)])
        raises(
            UserError,
            run_eval,
            ['--preds', many, '--labels', many],
            match='more than the 5,000 supported',
        )
    # what a file calls its tensors must not drive the terminal, nor fill it
    model = formula_model(FUZZED, 0)
    save_hf(
        folder, model, state={**model.state_dict(), '\033[2Jevil\n' + 'x' * 9000: torch.ones(1)}
    )
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        raises(SystemExit, lib.cli.run, lambda: GPT.from_pretrained(folder))
    told = err.getvalue()
    assert told.startswith('error: ') and '\\x1b[2Jevil\\n' in told and told[:-1].isprintable()
    assert len(told) < 2100
