"""Files and errors: atomic writes, locks, JSON, the cache folder. Called by everything else."""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time


class UserError(Exception):
    """A user's mistake: one sentence that says what is wrong, where (file, line, flag) and what to
    do."""


class Unavailable(UserError):
    """Something has to be downloaded and cannot be."""


class CannotWrite(UserError):
    """.note: what to say where the file is not needed."""


WRITES = True  # False in all but the first of several ranks: they write nothing but caches
LIMIT = 8 * 2**30  # bytes in a folder of the cache: the frozen states of SST-2 take 1.3 GB
DAY = 24 * 60 * 60  # seconds; a file that nobody has written to for so long is nobody's
CLAIMED = {}  # {folder: descriptor} of the folders that this process holds until it ends


def cache_dir():
    """The one folder that downloads and caches are written to."""
    default = os.path.join('~', '.cache', 'nanocls')
    return os.path.expanduser(os.environ.get('NANOCLS_CACHE') or default)


def cached(rel):
    return os.path.join(cache_dir(), rel)


def cannot_write(path, e):
    """-> CannotWrite for an OSError"""
    cache = os.path.join(os.path.abspath(cache_dir()), '')
    in_cache = os.path.join(os.path.abspath(path), '').startswith(cache)
    hint = 'set $NANOCLS_CACHE to a folder you can write to' if in_cache else 'choose another place'
    why = e.strerror or e
    error = CannotWrite(f'cannot write {path} ({why}); {hint}')
    place = f'the cache {cache_dir()}' if in_cache else path
    error.note = f'note: {place} cannot be written ({why}); going on without it'
    return error


@contextlib.contextmanager
def optional():
    """Inside, a file that cannot be written costs a note: one for the whole cache."""
    try:
        yield
    except CannotWrite as e:
        say_once(e.note)


@functools.lru_cache(None)
def say_once(text):
    print(text, file=sys.stderr)


def make_folder(path):
    try:
        os.makedirs(path or '.', exist_ok=True)
    except OSError as e:
        raise cannot_write(path, e) from None


def write_atomic(path, content, every_rank=False):
    """Write a file so that at every moment it is either the old one or the new one, complete.

    content: str, bytes, or a function that writes to the binary file it is given.  every_rank: a
    cache, which all ranks write."""
    if not (WRITES or every_rank):
        path = os.devnull  # what content computes may need this rank as well
    if isinstance(content, str):
        content = content.encode('utf-8', 'replace')
    write = content if callable(content) else lambda f: f.write(content)
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a device, a pipe: stays
            with open(path, 'wb') as f:
                write(f)
            return
        path = os.path.realpath(path)  # of a link what it points to
        make_folder(os.path.dirname(path))
        # beside the file: os.replace is atomic only inside one file system
        temp = f'{path}.{os.getpid()}.{threading.get_ident()}.tmp'
        try:
            with open(temp, 'wb') as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temp, path)
        finally:
            if os.path.exists(temp):
                os.remove(temp)
    except OSError as e:
        raise cannot_write(path, e) from None


def claim(folder):
    """Make a folder and keep other processes out of it until release(), or until this process ends,
    even if it is killed. Raises UserError if another one has claimed it."""
    make_folder(folder)
    if WRITES and os.path.realpath(folder) not in CLAIMED:
        CLAIMED[os.path.realpath(folder)] = lock(folder, 0)


def release(folder):
    if (descriptor := CLAIMED.pop(os.path.realpath(folder), None)) is not None:
        os.close(descriptor)


def remove_leftovers(folder):
    """Remove the temporary files that a killed process left in a run folder, in its base/ and in
    its *.part/: those of write_atomic, NAME.PID.THREAD.tmp. Called once the folder is accepted."""
    inside = glob.escape(folder)
    for pattern in ('*.tmp', os.path.join('base', '*.tmp'), os.path.join('*.part', '*.tmp')):
        for path in glob.glob(os.path.join(inside, pattern)) if WRITES else ():
            if re.fullmatch(r'.+\.\d+\.tmp', os.path.basename(path)):
                with contextlib.suppress(OSError):
                    os.remove(path)


@contextlib.contextmanager
def locked(folder, patience=60):
    """Inside, no other process is inside with the same folder. Raises UserError after so many
    seconds of waiting for one."""
    needed = WRITES and os.path.realpath(folder) not in CLAIMED
    descriptor = lock(folder, patience) if needed else None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def lock(folder, patience):
    """-> a descriptor that holds the folder until it is closed; None where folders cannot be locked
    (Windows, some NFS)."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):
        return None
    until, waiting = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(descriptor)
                hint = 'wait for it, or choose another folder'
                raise UserError(f'{folder} is in use by another process; {hint}') from None
            if not waiting:
                print(f'waiting for another process that writes to {folder}', file=sys.stderr)
            waiting = True
            time.sleep(0.05)
        except OSError:
            os.close(descriptor)
            return None


def as_json(obj, **options):
    """obj as JSON; what an edit adds may be numbers or arrays of numpy and torch."""
    return json.dumps(obj, default=lambda x: x.tolist(), **options)


def write_json(path, obj):
    write_atomic(path, as_json(obj, indent=1, ensure_ascii=False) + '\n')


def read_json(path):
    try:
        return parse_json(decode(read_bytes(path), path))
    except ValueError as e:
        raise UserError(f'{path} is not valid JSON ({e}); restore it or write it again') from None


def read_object(path):
    obj = read_json(path)
    if not isinstance(obj, dict):
        raise UserError(f'{path} holds no JSON object; restore it or write it again')
    return obj


def parse_json(text):
    """json.loads, every complaint of which is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError('it is nested too deeply') from None


def log_rows(path):
    """The rows {key: value} of a log.jsonl, without those that a crash has cut off or damaged; []
    if there is none."""
    lines = read_bytes(path).decode('utf-8', 'replace') if os.path.isfile(path) else ''
    rows = []
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and type(row.get('step')) is int:
                rows.append(row)
    return rows


def read_bytes(path):
    try:
        with open(path, 'rb') as f:
            return f.read()
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the path
        why = getattr(e, 'strerror', None) or e
        raise UserError(f'cannot read {path} ({why}); check the path') from None


def decode(raw, path):
    """UTF-8 bytes of a file, with or without a byte order mark -> str"""
    try:
        return raw.decode('utf-8-sig')
    except UnicodeDecodeError as e:
        where = f'{path}, line {e.object.count(10, 0, e.start) + 1}'
        why = f'byte 0x{e.object[e.start]:02x} is not UTF-8; save the file as UTF-8'
        raise UserError(f'{where}: {why}') from None


def hash_file(path, kind='sha256'):
    h = hashlib.new(kind)
    with open(path, 'rb') as f:
        for block in iter(lambda: f.read(1 << 20), b''):
            h.update(block)
    return h.hexdigest()


def make_room(folder, size, own=()):
    """Remove the least recently used files of a cache folder, but none of this run (own), until
    `size` bytes more are within LIMIT; remove too what a killed run was writing. Raises UserError
    if the disk has less than twice the room."""
    make_folder(folder)
    with locked(folder):
        known = []
        for path in [os.path.join(folder, name) for name in os.listdir(folder)]:
            with contextlib.suppress(FileNotFoundError):  # another run has removed it
                stat = os.stat(path)
                known.append((stat.st_mtime, stat.st_size, path))
        used = sum(taken for _, taken, _ in known)
        for last_used, taken, path in sorted(known):
            abandoned = path.endswith('.tmp') and time.time() - last_used > DAY
            if abandoned or used + size > LIMIT and path.endswith('.bin') and path not in own:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
                used -= taken
    if 2 * size > shutil.disk_usage(folder).free:
        raise UserError(f'{folder} has no room for {size / 2**30:.1f} GB')
