"""Folders of transformers: finding them, reading their weights and config.json, writing them.
Called by model.py, lora.py and the rooms that read or write weights."""

import hashlib
import os
import re

import torch

from lib import demo, download, files
from lib.files import UserError
from lib.report import counted
from lib.tensors import load_bin, load_safetensors, save_safetensors

# fields of config.json with the values of GPT-2; any other value is another architecture
GPT2 = dict(model_type='gpt2', activation_function='gelu_new', layer_norm_epsilon=1e-5)
GPT2.update(n_inner=None, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
GPT2.update(add_cross_attention=False, tie_word_embeddings=True)
# names of GPT-2's weights and of the class head; others come from an edit of model.py
NAMES = re.compile(
    r'(wte|wpe|score)\.weight|'
    r'(ln_f|h\.\d+\.(ln_[12]|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj))\.(weight|bias)'
)
SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')


def has_plain_tensors(model):
    """Does a module have tensors that are neither parameters nor buffers, as an edit may make? They
    must be computed, which the meta device does not do."""
    values = [value for m in model.modules() for value in vars(m).values()]
    inside = [x for value in values if isinstance(value, (tuple, list)) for x in value]
    return any(map(torch.is_tensor, values + inside))


def model_folder(where, data_dir=None):
    """The folder of a model: `where` itself, that of a published name (downloaded if needed), or of
    the demo's 'nano'."""
    if where == 'nano':
        return demo.NANO
    if os.path.isdir(where):
        return where
    where = download.SHORT.get(where, where)
    if where in download.HUB_NAMES:
        return os.path.dirname(download.weights(where, data_dir))
    names = ', '.join([*download.HUB_NAMES, 'nano'])
    raise UserError(f'--model {where}: no such folder, and not one of {names}')


def weight_files(folder):
    """Paths of the file or the shards that hold a folder's weights."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        if os.path.isfile(os.path.join(folder, name)):
            return [os.path.join(folder, name)]
        index = os.path.join(folder, name + '.index.json')
        if os.path.isfile(index) and (shards := shards_of(folder, index)):
            return shards
    if os.path.isfile(os.path.join(folder, 'adapter_config.json')):
        advice = 'name its base model, or export the merged adapter first'
        raise UserError(f'{folder} holds an adapter, not a whole model; {advice}')
    what = 'no model.safetensors (or its shards with an index) and no pytorch_model.bin'
    raise UserError(f'{folder} holds {what}')


def shards_of(folder, index):
    weight_map = files.read_object(index).get('weight_map')
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    for name in names:
        plain = isinstance(name, str) and os.path.basename(name) == name
        if not plain or not os.path.isfile(os.path.join(folder, name)):
            raise UserError(f'{index} names {name!r}, which is not a file of that folder')
    return [os.path.join(folder, name) for name in sorted(set(names))]


def folder_tensors(folder):
    """{name without "transformer.": tensor} of a folder's weights, without GPT-2's mask buffers.
    Raises UserError for a name that appears twice."""
    tensors = {}
    for path in weight_files(folder):
        load = load_safetensors if path.endswith('.safetensors') else load_bin
        for name, t in load(path).items():
            name = name.removeprefix('transformer.')
            if name in tensors:
                raise UserError(f'{path}: {name} appears twice in the weights; keep one of them')
            mask = name.endswith('.attn.bias') and t.shape[:-2] == (1, 1)  # (1, 1, T, T)
            if not mask and not name.endswith('.attn.masked_bias'):
                tensors[name] = t
    return tensors


def drop_tied_head(tensors, folder):
    """Remove the language model's head, which some tools store again. Raises UserError if it is not
    tied to wte."""
    head = tensors.pop('lm_head.weight', None)
    wte = tensors.get('wte.weight', head)
    if head is not None and (head.dtype != wte.dtype or not head.equal(wte)):
        problem = 'lm_head.weight differs from wte.weight, but GPT-2 ties them'
        raise UserError(f'{folder}: {problem}; nanocls cannot load an untied head')


def base_sha256(folder):
    """One sha256 (hex) of the weight files of a folder, in order."""
    sums = [files.hash_file(path) for path in weight_files(folder)]
    return sums[0] if len(sums) == 1 else hashlib.sha256(''.join(sums).encode()).hexdigest()


def read_config(folder, tensors, where, shapes):
    """{field of Config: value} from config.json. Without one, from `shapes` {name: Config}: of the
    published name `where`, or of the only shape that the tensors match. Fields that an edit added
    to Config are those of the file, else those of `where`."""
    path = os.path.join(folder, 'config.json')
    if not os.path.isfile(path):
        return guess_config(folder, tensors, where, shapes)
    c = files.read_object(path)
    for key, value in GPT2.items():
        usual = key == 'n_inner' and type(c.get('n_embd')) is int and c.get(key) == 4 * c['n_embd']
        if c.get(key, value) != value and not usual:
            wanted = f'but this model is GPT-2, where it is {value!r}'
            raise UserError(f'{path}: {key} is {c[key]!r}, {wanted}')
    names = ('n_layer', 'n_head', 'n_embd', 'n_positions', 'vocab_size')
    c.setdefault('n_positions', c.get('n_ctx'))
    if missing := [name for name in names if name not in c]:
        raise UserError(f'{path} lacks {missing[0]!r}')
    sizes = [c[name] for name in names]
    valid = all(type(s) is int and 0 < s < 10**7 for s in sizes)
    if not valid or sizes[2] % sizes[1] or sizes[0] > 1000:
        raise UserError(f'{path}: sizes that make no sense: ({", ".join(names)}) = {tuple(sizes)}')
    fields = vars(shapes.get(where) or next(iter(shapes.values())))
    found = {n: c.get(n, value) for n, value in fields.items() if where in shapes or n in c}
    return {**found, **dict(zip(SIZES, sizes))}


def guess_config(folder, tensors, where, shapes):
    layers = {name.split('.')[1] for name in tensors if name.startswith('h.')}
    shape = tensors['wte.weight'].shape if 'wte.weight' in tensors else ()
    width = shape[1] if len(shape) > 1 else 0
    for name, cfg in shapes.items():
        same = (cfg.n_layer, cfg.n_embd) == (len(layers), width)
        if where == name or (where not in shapes and same):
            return vars(cfg)
    what = f'its {counted(len(layers), "layer")} of width {width} match no published GPT-2'
    why = f'{what}, so the number of heads is unknown; put its config.json beside the weights'
    raise UserError(f'{folder} has no config.json, and {why}')


def class_names(labels, end):
    """Extra config.json fields of a classifier: its classes, and the pad id, without which
    transformers refuses batches."""
    id2label = {str(i): label for i, label in enumerate(labels)}
    label2id = {label: i for i, label in enumerate(labels)}
    return dict(pad_token_id=end, id2label=id2label, label2id=label2id)


def save_hf(folder, cfg, state, labels=None):
    """Write config.json and model.safetensors for transformers: GPT2ForSequenceClassification with
    `labels`, else GPT2LMHeadModel. cfg: model.Config; state: {name: tensor} of the plain GPT-2."""
    kind, end = 'GPT2ForSequenceClassification' if labels else 'GPT2LMHeadModel', cfg.vocab_size - 1
    config = dict(model_type='gpt2', architectures=[kind], vocab_size=cfg.vocab_size)
    config.update(n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer)
    config.update(n_head=cfg.n_head, activation_function='gelu_new', layer_norm_epsilon=1e-5)
    config.update({k: v for k, v in vars(cfg).items() if k not in SIZES})  # of an edit
    config.update(class_names(labels, end) if labels else {}, bos_token_id=end, eos_token_id=end)
    plain = {n if n == 'score.weight' else f'transformer.{n}': t for n, t in state.items()}
    save_safetensors(os.path.join(folder, 'model.safetensors'), plain)
    files.write_json(os.path.join(folder, 'config.json'), config)
