"""Tensors in files: safetensors, read memory-mapped and written; torch's pickles, read without
running code. Called by model.py, lora.py and the rooms that read, write or pack weights."""

import contextlib
import ctypes
import json
import math
import mmap
import os
import pickletools
import re
import struct
import sys
import zipfile

import torch

from lib import files
from lib.files import UserError

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
DTYPES.update(I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8)
DTYPES.update(U8=torch.uint8, BOOL=torch.bool)
DTYPE_NAMES = {v: k for k, v in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes: the limit of the format
MAX_PICKLE = 32 << 20  # bytes of the pickle in a checkpoint, without its tensors
# the only globals that a pickle of tensors needs
GLOBALS = re.compile(
    r'torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict'
)
MAPPED = []  # (address, bytes) of the files that load_safetensors has mapped

# --- safetensors ---


def load_safetensors(path):
    """{name: tensor} of a safetensors file, memory-mapped copy-on-write: changing a tensor never
    changes the file. Raises UserError if the header does not describe exactly the bytes after
    it."""
    try:
        header, raw, start = map_file(path)
        tensors, spans = {}, []
        for name, info in header.items():
            tensors[name], span = entry(raw, start, name, info)
            spans.append(span)
        spans.sort()
        edges = zip([(0, 0), *spans], [*spans, (len(raw) - start, 0)])
        if any(before[1] != after[0] for before, after in edges):
            raise ValueError('its tensors overlap or leave holes')
    except (ValueError, RuntimeError) as e:  # RuntimeError: a shape that torch cannot have
        advice = 'delete it and fetch or train it again'
        raise UserError(f'{path} is not a complete safetensors file ({e}); {advice}') from None
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror}') from None
    return tensors


def map_file(path):
    """-> header {name: info}, the mapped file, offset of the tensors in it"""
    with open(path, 'rb') as f:
        size = os.fstat(f.fileno()).st_size
        n = struct.unpack('<Q', f.read(8))[0] if size >= 8 else -1
        if not 2 <= n <= min(size - 8, MAX_HEADER):
            raise ValueError('its header length is wrong')
        try:
            header = json.loads(f.read(n))
        except (ValueError, RecursionError):
            raise ValueError('its header is not JSON') from None
        raw = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    if not isinstance(header, dict):
        raise ValueError('its header is no object')
    header.pop('__metadata__', None)
    MAPPED.append((torch.frombuffer(raw, dtype=torch.uint8).data_ptr(), size))
    return header, raw, 8 + n


def entry(raw, offset, name, info):
    """-> tensor of one entry of the header, its span (start, end) after the header"""
    try:
        dtype, shape, (start, end) = DTYPES[info['dtype']], info['shape'], info['data_offsets']
        numbers = [*shape, start, end]
        valid = len(shape) <= 64 and all(type(v) is int and 0 <= v < 2**48 for v in numbers)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f'entry {name!r} is malformed or of an unknown dtype') from None
    size = dtype.itemsize
    # only if valid: with something else than numbers, prod could run for years
    if not valid or not end - start == math.prod(shape) * size <= len(raw) - offset - start:
        raise ValueError(f'entry {name!r} does not fit the file')
    if start == end:
        return torch.empty(shape, dtype=dtype), (start, end)
    t = torch.frombuffer(raw, dtype=torch.uint8, count=end - start, offset=offset + start)
    aligned = (offset + start) % size == 0
    return (t if aligned else t.clone()).view(dtype).view(shape), (start, end)


def save_safetensors(path, tensors):
    """Write {name: tensor} as a safetensors file, atomically."""
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        dtype = DTYPE_NAMES[t.dtype]
        header[name] = dict(dtype=dtype, shape=list(t.shape), data_offsets=[start, end])
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # aligns the tensors

    def write(f):
        f.write(struct.pack('<Q', len(text)) + text)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())

    files.write_atomic(path, write)


def stamp(*tensors):
    """Another value if one of these tensors is another one, or was changed in place."""
    found = [t for t in tensors if t is not None]
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in found]


def give_back(t):
    """Return the memory of a tensor that is mapped from a file and not needed for now to the OS;
    it is read again on the next use. Changed values stay (MADV_PAGEOUT, not MADV_DONTNEED). Does
    nothing for other tensors, and on other systems than Linux."""
    start, end = t.data_ptr(), t.data_ptr() + t.nbytes
    mapped = any(first <= start and end <= first + size for first, size in MAPPED)
    if sys.platform != 'linux' or not mapped:
        return
    page = mmap.PAGESIZE
    start, end = -(-start // page) * page, end // page * page
    if start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 21)


# --- tensors of a module ---


def learned(module):
    """{name: tensor} of what trains in a module, and of its buffers that are saved, such as what a
    BatchNorm has seen."""
    names = {n for n, p in module.named_parameters() if p.requires_grad}
    names |= {n for n, _ in module.named_buffers()}
    return {n: t for n, t in module.state_dict().items() if n in names}


@contextlib.contextmanager
def unchanged(tensors):
    """Inside, these may change; afterwards they are as before."""
    kept = [(t, t.clone()) for t in tensors]
    try:
        yield
    finally:
        for t, before in kept:
            t.copy_(before)


# --- what torch.save wrote ---


def load_pickle(path, advice, mapped):
    """What torch.save wrote, loaded with weights_only: no code in the file ever runs.

    mapped: memory-map the tensors instead of checking their checksums.  Raises UserError, which
    ends in `advice`, for a file that holds more than tensors, numbers, strings and containers, or
    whose tensors are larger than the file."""
    try:
        check_zip(path, mapped)
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
        check_objects(saved)
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror or e}') from None
    except Exception as e:  # torch raises half a dozen types for files that are no checkpoint
        problem = f'is not a checkpoint that can be read without running code ({type(e).__name__})'
        raise UserError(f'{path} {problem}; {advice}') from None
    return saved


def check_zip(path, mapped):
    with zipfile.ZipFile(path) as z:
        size = sum(max(info.file_size, info.compress_size) for info in z.infolist())
        if size > os.path.getsize(path):  # torch.save never compresses
            raise ValueError('it unpacks to more than its size')
        if not mapped and z.testzip():  # torch does not look at the checksums
            raise ValueError('damaged')
        for info in z.infolist():  # weights_only would let bytearray take 10 GB
            if info.filename.endswith('.pkl'):
                if info.file_size > MAX_PICKLE:
                    raise ValueError('its pickle is too large')
                ops = pickletools.genops(z.read(info))
                if not all(GLOBALS.fullmatch(arg) for op, arg, _ in ops if op.name == 'GLOBAL'):
                    raise ValueError('it names more than tensors')


def check_objects(saved):
    """Raise for a tensor of an unusual kind, or one that claims more memory than it has: one value
    expanded to 10^12 fits into any file."""
    todo, seen = [saved], set()
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            plain = x.layout == torch.strided and not x.is_quantized and x.device.type == 'cpu'
            if not plain or x.dtype not in DTYPE_NAMES:
                raise TypeError('a tensor of an unusual kind')
            if x.nbytes > x.untyped_storage().nbytes():
                raise ValueError('a tensor that repeats its values')
        items = x.values() if isinstance(x, dict) else x
        todo += items if isinstance(x, (dict, list, tuple)) else ()


def load_bin(path):
    """{name: tensor} of a pytorch_model.bin."""
    tensors = load_pickle(path, 'save it again as model.safetensors', mapped=True)
    items = tensors.items() if isinstance(tensors, dict) else [(None, None)]
    if not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in items):
        raise UserError(f'{path} does not hold a plain dictionary of tensors')
    return tensors


def check_tensors(tensors, shapes, complaint):
    """Raise UserError, `complaint` and a list of what is wrong, unless `tensors` has exactly the
    names and shapes of `shapes` {name: shape}."""
    bad = [f'{n} is missing' for n in shapes if n not in tensors]
    bad += [f'{n} is unexpected' for n in tensors if n not in shapes]
    for n, shape in shapes.items():
        if n in tensors and tensors[n].shape != shape:
            bad.append(f'{n} is {tuple(tensors[n].shape)} where {tuple(shape)} belongs')
    if bad:
        more = f'; and {len(bad) - 8} more' if len(bad) > 8 else ''
        raise UserError(f'{complaint}: ' + '; '.join(bad[:8]) + more)
