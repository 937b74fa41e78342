"""Makes `nano`, the language model of the demo that is part of the repository: lib/nano.

    python docs/nano.py [FOLDER]

trains it again on the demo's unlabelled sentences, a quarter of an hour on one core."""

import hashlib
import os
import subprocess
import sys
import tempfile

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if TOP not in sys.path:
    sys.path.insert(0, TOP)

from lib import demo, files, tensors

FLAGS = '--pretrain --data demo --model nano --scratch --dtype fp32 --batch_size 16 --lr 3e-3'
FLAGS += ' --schedule cosine --max_steps 6400 --eval_every 6400 --log_every 400 --seed 0'


def make_nano(folder=demo.NANO):
    """Train nano and write it to a folder."""
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, 'train_gen.py', *FLAGS.split(), '--out', run]
        subprocess.run(command, cwd=TOP, check=True)
        pack_nano(run, folder)


def pack_nano(run, folder):
    """From a run that trained it: weights in float16, which halves the file, config.json, and
    made.json, which says how it was made."""
    weights = tensors.load_safetensors(os.path.join(run, 'model.safetensors'))
    path = os.path.join(folder, 'model.safetensors')
    tensors.save_safetensors(path, {name: t.half() for name, t in weights.items()})
    config = files.read_json(os.path.join(run, 'config.json'))
    files.write_json(os.path.join(folder, 'config.json'), config)
    rows = files.log_rows(os.path.join(run, 'log.jsonl'))
    losses = [{k: r[k] for k in ('step', 'loss', 'val_loss') if k in r} for r in rows]
    made = dict(command=f'python train_gen.py {FLAGS}', texts=texts_sha256(), losses=losses)
    files.write_json(os.path.join(folder, 'made.json'), made)


def texts_sha256():
    """Of what nano has read."""
    return hashlib.sha256('\n'.join(demo.unlabelled()).encode()).hexdigest()


if __name__ == '__main__':
    make_nano(*sys.argv[1:2])
