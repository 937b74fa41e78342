"""
Data sets, tokenizer and batches.  `python data.py NAME` prints what a data set holds.

NAME is sst2, agnews, imdb, sms, demo (synthetic, needs no network), your own FILE.csv, FILE.tsv or FILE.jsonl, or a folder
with train.* and perhaps val.* and test.* of these kinds.  Files are looked for in --data_dir or $NANOCLS_DATA, then in the
cache ($NANOCLS_CACHE, or ~/.cache/nanocls), then downloaded into the cache.  Nothing but the cache is written to.
"""
import argparse, collections, contextlib, csv, difflib, glob, gzip, hashlib, io, json, os, random, re, sys, tarfile, time, zipfile
from dataclasses import dataclass

import numpy as np
import requests
import tiktoken

# --- errors, command line, small files --------------------------------------------------------------------------------

class UserError(Exception):
    """A user's mistake: one sentence that says what is wrong, where (file, line, flag) and what to do."""

class Unavailable(UserError):
    """Something has to be downloaded and cannot be."""

def cli(main):
    """Run main() as a script: a user's mistake ends with one sentence and exit code 2; a bug keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a text that the terminal cannot show must not end the program
    try:
        code = main()
        sys.stdout.flush()  # so that a closed pipe is noticed here, not while Python shuts down
    except UserError as e:
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(e))  # a broken file's names may hold anything
        print(f"error: {text if len(text) <= 2000 else text[:1000] + ' ... ' + text[-1000:]}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130  # 128 + SIGINT, as shells report it
    except BrokenPipeError:  # python data.py sst2 | head -3
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)

def end_quietly(kind, value, trace):
    """sys.excepthook: Ctrl-C while a script is still importing torch ends it without a traceback, too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, trace)

sys.excepthook = end_quietly

class Parser(argparse.ArgumentParser):
    """argparse with --max-steps == --max_steps (define them with _), no abbreviations, and mistakes as UserError."""

    def __init__(self, **kw):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kw)

    def parse(self, argv=None):
        """-> (namespace, given); given: the names that were really typed, so not the defaults."""
        argv = list(sys.argv[1:] if argv is None else argv)
        for i, arg in enumerate(argv):
            if arg == "--":  # what follows are texts, not flags
                break
            if arg.startswith("--"):
                name, equals, value = arg.partition("=")
                argv[i] = "--" + name[2:].replace("-", "_") + equals + value
        args = self.parse_intermixed_args(argv)  # `predict.py RUN --json TEXT` as well as `predict.py RUN TEXT --json`
        typed = {arg.partition("=")[0] for arg in (argv[:argv.index("--")] if "--" in argv else argv)}
        return args, {a.dest for a in self._actions if typed & set(a.option_strings)
                      or not a.option_strings and getattr(args, a.dest) not in (a.default, [])}

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: --([^\s=]+)", message)
        known = [flag.lstrip("-") for flag in self._option_string_actions]
        near = difflib.get_close_matches(unknown[1], known, 1) if unknown else []
        raise UserError(f"{message} ({f'did you mean --{near[0]}?' if near else 'see --help'})")

def number(kind, holds, words):
    """A type for Parser: int or float for which holds(value)."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value
    return parse

positive = number(int, lambda x: x > 0, "a whole number above 0")
above_zero = number(float, lambda x: 0 < x < float("inf"), "a number above 0")
not_negative = number(float, lambda x: 0 <= x < float("inf"), "a number of at least 0")
share = number(float, lambda x: 0 <= x < 1, "a share: a number from 0 to below 1")

def cache_dir():
    """The one folder that downloads and caches are written to."""
    return os.path.expanduser(os.environ.get("NANOCLS_CACHE") or os.path.join("~", ".cache", "nanocls"))

def cached(rel):
    return os.path.join(cache_dir(), rel)

def cannot_write(path, e):
    hint = "set $NANOCLS_CACHE to a folder that can be written" if path.startswith(cache_dir()) else "choose another place"
    return UserError(f"cannot write {path} ({e.strerror or e}); {hint}")

def make_folder(path):
    try:
        os.makedirs(path or ".", exist_ok=True)
    except OSError as e:
        raise cannot_write(path, e) from None

WRITES = True  # False in all but one of several processes that train one run: they write nothing but their caches

def write_atomic(path, content):
    """
    Write so that the file is at every moment either the old one or the new one, whole.  content: str, bytes, or a function
    that writes to the binary file it is given.
    """
    path = os.fspath(path)
    if not (WRITES or path.startswith(cache_dir())):
        if callable(content):  # what it computes may need this process, too
            with open(os.devnull, "wb") as f:
                content(f)
        return
    temp = f"{path}.{os.getpid()}.tmp"  # in the same folder: os.replace is atomic only inside one file system
    make_folder(os.path.dirname(path))
    try:
        with open(temp, "wb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except OSError as e:
        raise cannot_write(path, e) from None
    finally:
        if os.path.exists(temp):
            os.remove(temp)

CLAIMED = {}  # {folder: descriptor} of the folders that this process holds until it ends

def claim(folder):
    """
    Make a folder and hold it against all other processes until release, or as long as this one lives, however it ends.
    UserError when another does.  Temporary files that a killed process has left in it are removed.
    """
    make_folder(folder)
    if WRITES and os.path.realpath(folder) not in CLAIMED:
        CLAIMED[os.path.realpath(folder)] = lock(folder, 0)
        for left in glob.glob(os.path.join(glob.escape(folder), "**", "*.tmp"), recursive=True):
            os.remove(left)

def release(folder):
    descriptor = CLAIMED.pop(os.path.realpath(folder), None)
    if descriptor is not None:
        os.close(descriptor)

@contextlib.contextmanager
def locked(folder, patience=60):
    """Inside, no other process is inside with the same folder.  UserError after so many seconds of waiting for one."""
    held = WRITES and os.path.realpath(folder) not in CLAIMED
    descriptor = lock(folder, patience) if held else None
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)

def lock(folder, patience):
    """-> a descriptor that holds the folder until it is closed; None where the system cannot lock folders (Windows, some NFS)."""
    try:
        import fcntl
        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):
        return None
    until, told = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(descriptor)
                raise UserError(f"{folder} is in use by another process; wait for its end, or choose another folder") from None
            if not told:
                print(f"waiting for another process that writes to {folder}", file=sys.stderr)
            told = True
            time.sleep(0.05)
        except OSError:
            os.close(descriptor)
            return None

def write_json(path, obj):
    write_atomic(path, json.dumps(obj, indent=1, ensure_ascii=False) + "\n")

def read_json(path):
    try:
        return parse_json(decode(read_bytes(path), path))
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}); restore it or write it again") from None

def read_object(path):
    obj = read_json(path)
    if not isinstance(obj, dict):
        raise UserError(f"{path} holds no JSON object; restore it or write it again")
    return obj

def parse_json(text):
    """json.loads, whose every complaint is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

def log_row(line):
    """A line of log.jsonl -> {key: value}; None for one that a crash has cut off or damaged."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(isinstance(v, (int, float, str)) for v in row.values()) else None

def read_bytes(path):
    try:
        with open(path, "rb") as f:
            return f.read()
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the path
        raise UserError(f"cannot read {path} ({getattr(e, 'strerror', None) or e}); check the path") from None

def decode(raw, path):
    try:
        return raw.decode("utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as e:
        raise UserError(f"{path}, line {e.object.count(10, 0, e.start) + 1}: byte 0x{e.object[e.start]:02x} is not UTF-8; "
                        "save the file as UTF-8") from None

def sha256_file(path, kind="sha256"):
    h = hashlib.new(kind)
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            h.update(block)
    return h.hexdigest()

# --- finding and downloading ------------------------------------------------------------------------------------------

MAX_MEMBER = 32 << 20   # bytes of one file in an archive: the largest here has 4 MB
MAX_UNPACKED = 1 << 30  # bytes of a whole archive, unpacked: several times IMDB's
TIMEOUT = (10, 60)      # seconds to connect, seconds without a byte

def find(rel, data_dir=None):
    """The first file that matches rel in --data_dir or $NANOCLS_DATA, then in the cache; None when there is none."""
    folder = data_dir or os.environ.get("NANOCLS_DATA")
    if folder and not os.path.isdir(folder):
        raise UserError(f"there is no data folder {folder}; correct {'--data_dir' if data_dir else '$NANOCLS_DATA'}")
    for place in filter(None, (folder, cache_dir())):
        hits = sorted(glob.glob(os.path.join(glob.escape(place), rel)))
        if hits:
            return hits[0]
    return None

def download(urls, dest, **checks):
    """fetch_whole, by one process at a time: what another one has brought meanwhile is taken."""
    make_folder(os.path.dirname(dest))
    before = os.path.exists(dest)
    with locked(os.path.dirname(dest), patience=3600):
        return dest if os.path.exists(dest) > before else fetch_whole(urls, dest, **checks)

def fetch_whole(urls, dest, size=None, sha256=None, md5=None, member=None):
    """
    Download to dest and return dest.  The addresses are tried in order.  A connection that breaks is taken up again where it
    stopped, in this run or the next (dest.part).  Size in bytes and checksum decide whether the file is accepted; with
    member, dest is a zip and sha256 is that of its member.  Raises Unavailable.
    """
    part, failures = dest + ".part", []
    part_size = lambda: os.path.getsize(part) if os.path.exists(part) else 0
    try:
        for url in urls:
            have, resumed = -1, part_size() > 0
            while part_size() > have:  # as long as each try brings something new
                have = part_size()
                try:
                    fetch(url, part, have, size)
                except (requests.RequestException, ValueError) as e:  # ValueError: a redirect to what is no address
                    why = reason(e)
                    continue
                if intact(part, size, sha256, md5, member):
                    os.replace(part, dest)
                    return dest
                why = "wrong size or checksum"
                os.remove(part)
                have = -1 if resumed else 0  # the old beginning may be at fault: once more, from byte 0
                resumed = False
            failures.append(f"{url}: {why}")
    except OSError as e:
        raise cannot_write(dest, e) from None
    raise unavailable(dest, failures)

def unavailable(dest, failures):
    rel = os.path.relpath(dest, cache_dir())
    return Unavailable(f"cannot download {rel} ({'; '.join(failures)}); check the network, or put the file into a folder as "
                       f"{rel} and name that folder with --data_dir or $NANOCLS_DATA")

def fetch(url, part, have, size=None):
    """
    One request: append to part after its first `have` bytes.  RequestException when it fails or breaks off.  Reading ends
    where it is clear that more than `size` bytes come.
    """
    headers = {"Accept-Encoding": "identity"}  # so that Content-Length and Range count the bytes we store
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as r:
        if r.status_code == 416 and have:  # nothing comes after what we have: the checks decide
            return
        r.raise_for_status()
        have = have if r.status_code == 206 else 0  # a server without ranges sends everything again
        total = have + told_size(r.headers.get("Content-Length"))
        print(f"downloading {url} ({total / 1e6:,.1f} MB)", file=sys.stderr)
        tty, told = sys.stderr.isatty(), time.monotonic()
        with open(part, "ab" if have else "wb") as f:
            for block in r.iter_content(1 << 16):
                f.write(block)
                have += len(block)
                if size is not None and have > size:
                    return
                if time.monotonic() - told > (0.2 if tty else 10):  # seconds between signs of life
                    told = time.monotonic()
                    of = f" of {total / 1e6:,.1f}" if total else ""
                    print(f"  {have / 1e6:,.1f}{of} MB ", file=sys.stderr, end="\r" if tty else "\n", flush=True)
        if have < total:
            raise requests.exceptions.ChunkedEncodingError

def told_size(text):
    """A number of bytes that a server tells; 0 where it tells none, or nonsense."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text or "") else 0

def reason(e):
    """A failed request in a few words."""
    if isinstance(e, requests.TooManyRedirects):
        return "it redirects in a circle"
    if getattr(e, "response", None) is not None:
        wait = told_size(e.response.headers.get("Retry-After"))
        return f"{e.response.status_code} {e.response.reason}" + f", try again in {wait:,} s" * (wait > 0)
    if isinstance(e, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    if isinstance(e, requests.Timeout) or "timed out" in str(e):  # in mid-file requests calls it a ConnectionError
        return "timed out"
    return "no connection" if isinstance(e, requests.ConnectionError) else str(e)

def intact(path, size, sha256, md5, member):
    try:
        return size in (None, os.path.getsize(path)) and md5 in (None, sha256_file(path, "md5")) and sha256 in (
            None, hashlib.sha256(zip_member(path, member)).hexdigest() if member else sha256_file(path))
    except UserError:  # not a zip, or another one
        return False

def zip_member(path, name):
    """The bytes of the member whose name ends like this; nothing is unpacked to disk."""
    try:
        with zipfile.ZipFile(path) as z:
            for info in z.infolist():
                if ("/" + info.filename).endswith("/" + name) and info.file_size <= MAX_MEMBER:
                    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise zipfile.BadZipFile("another compression")  # those zipfile unpacks without a limit
                    with z.open(info) as f:
                        return f.read(info.file_size)  # told how much, it unpacks no more; and it checks the CRC
        why = f"it has no {name} of at most {MAX_MEMBER:,} bytes"
    except Exception as e:  # zipfile raises a dozen types for a broken file
        why = e
    raise UserError(f"{path} is not the published zip file ({why}); remove it to have it downloaded again")

WEIGHTS = {"gpt2": "openai-community", "gpt2-medium": "openai-community", "gpt2-large": "openai-community",
           "gpt2-xl": "openai-community", "distilgpt2": "distilbert"}  # whose repository it is
GPT2 = dict(size=548105171, sha256="248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707")

def weights(name, data_dir=None):
    """The path of a published model's model.safetensors: found, or in Hugging Face's cache, or downloaded."""
    rel = f"models/{name}/model.safetensors"
    path = find(rel, data_dir)
    if path:
        return path
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME") or "~/.cache/huggingface", "hub")
    for repo in (f"{WEIGHTS[name]}--{name}", name):  # the cache names a model as it was asked for, with or without owner
        hits = glob.glob(os.path.join(os.path.expanduser(hub), f"models--{repo}", "snapshots", "*", "model.safetensors"))
        if hits:
            return hits[0]
    host = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url, checks = f"{host}/{WEIGHTS[name]}/{name}/resolve/main/model.safetensors", GPT2
    if name != "gpt2":
        try:  # the redirect itself tells size and sha256 of the file it leads to
            told = requests.head(url, headers={"Accept-Encoding": "identity"}, timeout=TIMEOUT).headers
        except requests.RequestException as e:
            raise unavailable(cached(rel), [f"{url}: {reason(e)}"]) from None
        checks = dict(size=told_size(told.get("x-linked-size")) or None,
                      sha256=told.get("x-linked-etag", "").strip('"') or None)
    return download([url], cached(rel), **checks)

# --- data sets --------------------------------------------------------------------------------------------------------
# A reader takes data_dir and returns ({split: rows}, labels in order); a row is (text, label).

@dataclass
class Split:
    texts: list    # of str
    y: np.ndarray  # (n,) int64, index into Dataset.labels

@dataclass
class Dataset:
    name: str
    labels: list   # of str; the index is the class id
    train: Split
    val: Split
    test: Split
    notes: list    # of str: what was dropped or carved

def file_or_member(rel, archive, inside, data_dir, urls, **checks):
    """(bytes, name) of a plain file, or else of the same file inside the published zip."""
    path = find(rel, data_dir)
    if path:
        return read_bytes(path), path
    path = find(archive, data_dir) or download(urls, cached(archive), **checks)
    return zip_member(path, inside), f"{path}, {inside}"

def tab_rows(raw, path, names, label_first):
    """Rows of a file with one tab per line, where quotes mean nothing; names: label in the file -> label."""
    rows = []
    for i, line in enumerate(decode(raw, path).split("\n")):
        fields = line.rstrip("\r").split("\t")
        label, text = (fields if label_first else fields[::-1]) if len(fields) == 2 else (None, None)
        if label in names:
            rows.append((text, names[label]))
        elif line.strip() and not (i == 0 and label == "label"):  # not blank, not SST-2's header
            raise UserError(f"{path}, line {i + 1}: expected a text, a tab and {' or '.join(names)}; replace the file")
    return rows

def read_sst2(data_dir):
    rows = {}
    for split, file in (("train", "train.tsv"), ("test", "dev.tsv")):  # GLUE's own test.tsv has no labels
        raw, path = file_or_member(
            f"sst2/{file}", "sst2/SST-2.zip", f"SST-2/{file}", data_dir,
            ["https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"], md5="9f81648d4199384278b86e315dac217c")
        rows[split] = tab_rows(raw, path, {"0": "negative", "1": "positive"}, label_first=False)
    return rows, ["negative", "positive"]

def read_agnews(data_dir):
    rows, labels = {}, ["World", "Sports", "Business", "Sci/Tech"]
    for split, md5 in (("train", "b1a00f826fdfbd249f79597b59e1dc12"), ("test", "d52ea96a97a2d943681189a97654912d")):
        rel = f"ag_news_csv/{split}.csv"
        path = find(rel, data_dir) or download(
            [f"https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/{rel}"], cached(rel), md5=md5)
        rows[split] = []
        for where, r in csv_records(io.StringIO(decode(read_bytes(path), path), newline=""), path, ","):
            if len(r) != 3 or r[0] not in ("1", "2", "3", "4"):
                raise UserError(f"{where}: expected class 1-4, title, description; replace the file")
            rows[split].append((f"{r[1]} {r[2]}", labels[int(r[0]) - 1]))
    return rows, labels

def read_imdb(data_dir):
    path = find("imdb/aclImdb*.tar.gz", data_dir) or download(
        ["https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"], cached("imdb/aclImdb_v1.tar.gz"),
        md5="7c2ac02c03563afcf9b574c7e56c153a")
    stat, labels = os.stat(path), ["negative", "positive"]
    parsed = cached(f"imdb/rows-{stat.st_size}-{stat.st_mtime_ns}.json")  # 0.5 s to read, the archive takes 6 s
    try:
        with open(parsed, encoding="utf-8") as f:
            rows = json.load(f)
        rows = {s: [(text, label) for text, label in rows[s]] for s in ("train", "test")}
        if all(r and all(isinstance(text, str) and label in labels for text, label in r) for r in rows.values()):
            return rows, labels
    except Exception:
        pass  # not there, or broken: made anew
    found, why = [], "it lacks train or test reviews"
    try:
        with gzip.open(path) as f, tarfile.open(fileobj=Limited(f, MAX_UNPACKED), mode="r|") as tar:
            while (m := tar.next()) is not None:  # | is one pass over a stream; nothing is unpacked to disk
                tar.members.clear()  # or it would keep them all
                hit = re.fullmatch(r"(?:.*/)?(train|test)/(neg|pos)/\d+_\d+\.txt", m.name)
                if hit and m.isfile() and not m.issparse() and m.size <= MAX_MEMBER:
                    text = decode(tar.extractfile(m).read(), f"{path}, {m.name}").replace("<br />", "\n")
                    found.append((m.name, hit[1], text, labels[hit[2] == "pos"]))
    except UserError:
        raise
    except Exception as e:  # tarfile raises a dozen types for a broken file
        found, why = [], e
    found.sort()  # by name, so that the split does not depend on the archive's order
    rows = {s: [(text, label) for _, split, text, label in found if split == s] for s in ("train", "test")}
    if not (rows["train"] and rows["test"]):
        raise UserError(f"{path} is not the published archive ({why}); remove it to have it downloaded again")
    write_atomic(parsed, json.dumps(rows))
    return rows, labels

class Limited:
    """A file whose reading ends with an error after so many bytes: what a small archive unpacks to must not fill the memory."""

    def __init__(self, f, limit):
        self.f, self.left = f, limit

    def read(self, n):
        self.left -= n  # not what comes: tarfile looks for the end of a member of 10 GB long after that of the file
        if self.left < 0:
            raise tarfile.ReadError("it unpacks to far more than that one, or claims to")
        return self.f.read(n)

def read_sms(data_dir):
    raw, path = file_or_member(
        "sms_spam/SMSSpamCollection", "sms_spam/sms+spam+collection.zip", "SMSSpamCollection", data_dir,
        ["https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
         "https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip"],
        member="SMSSpamCollection", sha256="7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d")
    return {"train": tab_rows(raw, path, {"ham": "ham", "spam": "spam"}, label_first=True)}, ["ham", "spam"]

READERS = {"sst2": read_sst2, "agnews": read_agnews, "imdb": read_imdb, "sms": read_sms,
           "demo": lambda data_dir: (demo_labelled(), ["negative", "positive"])}

# a user's own files
KINDS = (".csv", ".tsv", ".jsonl")
STEMS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
TEXT_NAMES = ("text", "sentence", "review", "message", "content", "comment", "body", "document", "tweet", "utterance", "sms")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "rating", "y")
MAX_CLASSES = 5000  # their confusion matrix fills 0.2 GB
csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters refuses long documents; more overflows on Windows

def csv_records(f, path, delimiter):
    """('path, line N', fields) of each record.  strict: a quote that is never closed is an error, not one huge field."""
    reader = csv.reader(f, delimiter=delimiter, strict=True)
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise UserError(f"{where}: the record that begins here cannot be read ({e}); check its quotes") from None
        if record:  # not a blank line
            yield where, record

def csv_rows(f, path, delimiter):
    """('path, line N', {column: field}) of each row below the header."""
    columns = None
    for where, fields in csv_records(f, path, delimiter):
        if columns is None:
            columns = [c.strip() for c in fields]
        elif len(fields) != len(columns):
            raise UserError(f"{where}: the row has {len(fields)} fields and the header {len(columns)}; complete the row, or "
                            "put quotes around a text that holds the separator")
        else:
            yield where, dict(zip(columns, fields))

def json_rows(f, path):
    for i, line in enumerate(f):
        if line.strip():
            where = f"{path}, line {i + 1}"
            try:
                row = parse_json(line)
            except ValueError as e:
                raise UserError(f"{where}: not valid JSON ({e}); write one object per line") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: not a JSON object; write one object per line, with a text and a label")
            yield where, row

def read_table(path, text_col=None, label_col=None):
    """One .csv or .tsv (header, standard quoting) or .jsonl file -> (rows, text_col, label_col)."""
    kind = os.path.splitext(path)[1].lower()
    if kind not in KINDS:
        raise UserError(f"{path}: expected a file that ends in {', '.join(KINDS)}")
    f = io.StringIO(decode(read_bytes(path), path), newline="")  # newline="": line ends inside quotes stay as they are
    found = list(json_rows(f, path) if kind == ".jsonl" else csv_rows(f, path, "," if kind == ".csv" else "\t"))
    if not found:
        raise UserError(f"{path} is empty: it has no rows; add some{'' if kind == '.jsonl' else ' below a header'}")
    text_col, label_col = pick_columns(path, found, text_col, label_col)
    rows = []
    for where, r in found:
        y = r.get(label_col)
        y = json.dumps(y) if isinstance(y, int) else y  # 1 -> '1', True -> 'true'
        if not isinstance(y, str) or not y.strip():
            raise UserError(f"{where}: the label {label_col!r} is not a string, whole number or true/false, or is empty")
        rows.append((text_of(where, r, text_col), mend(y).strip()))
    return rows, text_col, label_col

def text_of(where, row, text_col):
    if not isinstance(row.get(text_col), str):
        raise UserError(f"{where}: the text {text_col!r} is missing or no string; give every row one")
    return mend(row[text_col])

def read_texts(path, text_col=None):
    """Yield the texts of a file one by one: the text column of .csv / .tsv, the text key of .jsonl, else every line."""
    kind = os.path.splitext(path)[1].lower()
    try:
        with open(path, encoding="utf-8-sig", newline="" if kind in (".csv", ".tsv") else None) as f:
            if kind == ".jsonl":
                yield from stream(json_rows(f, path), path, text_col)
            elif kind in (".csv", ".tsv"):
                yield from stream(csv_rows(f, path, "," if kind == ".csv" else "\t"), path, text_col)
            else:
                yield from (line.rstrip("\n") for line in f)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; check the path") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 (byte 0x{e.object[e.start]:02x}); save it as UTF-8") from None

def stream(found, path, text_col):
    for where, r in found:
        columns = list(r)
        text_col = text_col or (columns[0] if len(columns) == 1 else usual(columns, TEXT_NAMES))
        if text_col not in columns:
            raise UserError(f"{where}: there is no column {text_col or 'text'!r}: it has {', '.join(map(repr, columns))}; "
                            "name one with --text_col")
        yield text_of(where, r, text_col)

def mend(text):
    """JSON can hold half of a surrogate pair, which no file or terminal takes: it becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def usual(columns, names):
    return next((c for n in names for c in columns if c.lower() == n), None)

def pick_columns(path, found, text_col, label_col):
    """The columns asked for; else those with a usual name; else, of two columns, the one with fewer values is the label."""
    columns = list(found[0][1])
    have = f"it has {', '.join(map(repr, columns))}; name two of them with --text_col and --label_col"
    for col in (text_col, label_col):
        if col and col not in columns:
            raise UserError(f"{path} has no column {col!r}: {have}")
    t = text_col or usual([c for c in columns if c != label_col], TEXT_NAMES)
    y = label_col or usual([c for c in columns if c != t], LABEL_NAMES)
    if len(columns) == 2 and not (t and y):
        values = [{str(r.get(c)) for _, r in found} for c in columns]
        if not (t or y):
            if any(c in v for c, v in zip(columns, values)):
                raise UserError(f"{path} seems to have no header: its first line looks like a row; put text,label above")
            y = columns[len(values[0]) >= len(values[1])]
        other = columns[columns[0] == (t or y)]
        t, y = t or other, y or other
    if not (t and y):
        raise UserError(f"{path}: cannot tell which column is the {'label' if t else 'text'}: {have}")
    return t, y

def read_own(path, text_col, label_col):
    """A user's file or folder -> ({split: rows}, text_col, label_col)."""
    files = {} if os.path.isdir(path) else {"train": path}
    for file in sorted(os.listdir(path)) if os.path.isdir(path) else ():
        stem, kind = os.path.splitext(file.lower())
        for split in STEMS:
            if stem in STEMS[split] and kind in KINDS:
                if split in files:
                    raise UserError(f"{path} has both {os.path.basename(files[split])} and {file}; keep one of them")
                files[split] = os.path.join(path, file)
    if "train" not in files:
        raise UserError(f"{path} has no train.csv, train.tsv or train.jsonl; add one, or name a file")
    rows = {}
    for split in [s for s in STEMS if s in files]:  # train first: its columns hold for the others
        rows[split], text_col, label_col = read_table(files[split], text_col, label_col)
    return rows, text_col, label_col

def load(name, seed=1337, data_dir=None, val=None, test=None, text_col=None, label_col=None, max_samples=None,
         balance=False):
    """
    Read a data set and split it -> Dataset.  val, test: files that take the place of these splits.  balance: drop training
    rows until all classes are as small as the smallest, before anything is carved.  A split that does not exist is carved
    out of train, stratified, by seed.  max_samples: training rows kept per class.
    """
    notes = []
    if name in READERS:
        if (text_col or label_col) and not (val or test):
            raise UserError(f"--text_col and --label_col are for your own files; leave them out with {name}")
        rows, labels = READERS[name](data_dir)
        notes += ["demo is synthetic text that this program makes"] * (name == "demo")
    elif os.path.exists(name):
        rows, text_col, label_col = read_own(name, text_col, label_col)
        labels = None
        notes.append(f"columns: {text_col!r} is the text, {label_col!r} the label")
    else:
        raise UserError(f"there is no data set {name!r}; choose {', '.join(READERS)}, or the path of a {', '.join(KINDS)} "
                        "file or of a folder of them")
    for split, path in (("val", val), ("test", test)):
        if path:
            rows[split] = read_table(path, text_col, label_col)[0]

    train, rng = rows["train"], np.random.RandomState(seed % 2**32)  # its streams are the same in all versions of numpy
    found = {label for _, label in train}
    whole = all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in found)
    labels = labels or sorted(found, key=lambda label: (int(label), label) if whole else label)
    if len(labels) > MAX_CLASSES:
        raise UserError(f"{name}: there are {len(labels):,} different labels, and at most {MAX_CLASSES:,} can be told "
                        "apart; name the column of the labels with --label_col")
    if len(found) < max(2, len(labels)):
        raise UserError(f"{name}: the training rows have no label but {', '.join(sorted(found))}; "
                        f"{'at least two classes' if len(labels) < 2 else ', '.join(labels)} are needed")
    for split in ("val", "test"):
        for _, label in rows.get(split, ()):
            if label not in found:
                raise UserError(f"{name}: a {split} row has the label {label!r}, which no training row has; correct it, or "
                                "add training rows of that label")

    one_pool = "test" not in rows
    if one_pool:
        train = list(dict.fromkeys(train))  # equal rows must not stand on both sides of the split
        notes += [f"{len(rows['train']) - len(train):,} exact duplicates dropped"] * (len(train) < len(rows["train"]))
    if balance:
        n, before = min(count(train, labels)), len(train)
        train = [train[i] for i in sample(train, labels, [n] * len(labels), rng)]
        notes.append(f"balanced to {n:,} rows per class: {before - len(train):,} dropped")
    n = len(train)
    if one_pool:
        rows["test"], train = carve("test", train, n // 5 if name == "sms" else n // 10, labels, rng, notes)
    if "val" not in rows:  # of an official train at most 1,000 rows: +-2 % at 90 % accuracy, and quick to score
        rows["val"], train = carve("val", train, min(n // 10, 1000) if name in READERS else n // 10, labels, rng, notes)
    if max_samples:
        train = [train[i] for i in sample(train, labels, [max_samples] * len(labels), rng)]
        notes.append(f"train cut to at most {max_samples:,} rows per class")
    seen = {text for text, _ in train}
    both = sum(text in seen for text, _ in rows["test"])
    notes += [f"{both:,} test texts also stand in train (left as they are)"] * (both > 0)
    ids = {label: i for i, label in enumerate(labels)}
    return Dataset(name, labels, *[Split([text for text, _ in part], np.array([ids[label] for _, label in part], np.int64))
                                   for part in (train, rows["val"], rows["test"])], notes)

def load_texts(name, **flags):
    """
    Texts for a language model, labels unused -> (train texts, val texts, notes).  name: as in load, whose flags are taken (the
    same seed keeps the same texts out of train); of the demo its unlabelled sentences; of a file that is no table every line.
    """
    if os.path.isfile(name) and os.path.splitext(name)[1].lower() not in KINDS:
        for flag in ("val", "test", "text_col", "label_col", "balance"):
            if flags[flag]:
                raise UserError(f"--{flag} does nothing with {name}, which is read line by line")
        texts = list(dict.fromkeys(t for t in read_texts(name) if t.strip()))
        order = np.random.RandomState(flags["seed"] % 2**32).permutation(len(texts))
        n = min(len(texts) // 10, 1000)
        if not n:
            raise UserError(f"{name} has {len(texts)} different lines; at least 10 are needed, to keep one for validation")
        end = n + (flags["max_samples"] or len(texts))
        return [texts[i] for i in sorted(order[n:end])], [texts[i] for i in sorted(order[:n])], [f"val: {n:,} lines"]
    d = load(name, **flags)
    return demo_unlabelled(flags["max_samples"] or 20000) if name == "demo" else d.train.texts, d.val.texts, d.notes

def count(rows, labels):
    counted = collections.Counter(label for _, label in rows)
    return [counted[label] for label in labels]

def sample(rows, labels, counts, rng):
    """Ascending indices of at most counts[c] rows of each class c, drawn by rng."""
    members = {label: [] for label in labels}
    for i, (_, label) in enumerate(rows):
        members[label].append(i)
    return sorted(i for label, n in zip(labels, counts) for i in rng.permutation(members[label])[:n])

def cap(split, n, seed):
    """A Split with at most n rows of each class, chosen by seed."""
    rows, labels = list(zip(split.texts, split.y.tolist())), sorted(set(split.y.tolist()))
    keep = sample(rows, labels, [n] * len(labels), np.random.RandomState(seed % 2**32))
    return Split([split.texts[i] for i in keep], split.y[keep])

def carve(split, rows, n, labels, rng, notes):
    """Take n rows out, stratified -> (taken, rest).  A class with two rows or more gives one at least, and keeps one."""
    have = np.array(count(rows, labels))
    wanted = np.diff(np.round(np.cumsum(have) * n / len(rows)), prepend=0).astype(int)  # adds up to n
    taken = set(sample(rows, labels, np.minimum(np.maximum(wanted, 1), have - 1), rng))
    rest = [r for i, r in enumerate(rows) if i not in taken]
    texts = {text for text, _ in rest}
    kept = [rows[i] for i in sorted(taken) if rows[i][0] not in texts]
    if not kept:
        raise UserError(f"{len(rows)} rows in {len(labels)} classes are too few to take {split} rows out of; add rows, or "
                        f"give --{split} FILE")
    also = f"; {len(taken) - len(kept):,} of them dropped, as their text also stands in train"
    notes.append(f"{split}: {len(taken):,} rows carved out of train" + also * (len(kept) < len(taken)))
    return kept, rest

# --- the demo ---------------------------------------------------------------------------------------------------------
# Synthetic reviews from a small grammar.  A clause is good or bad by its adjective unless a negation turns it round; where
# two clauses disagree the main one decides.  After the bar: words that the labelled train never has.  The unlabelled text
# has them in telling places ("warm and radiant"), so that only a model that has read it can know them.

DEMO_VERSION = 1  # raise it with every change of the words or the grammar: a cached `nano` has learned the old ones
WORDS = {
    "good": "warm bright clever charming lively honest graceful witty fresh tender lovely splendid | radiant superb",
    "bad": "dull clumsy bland tedious shallow dreary messy stale bitter grim feeble noisy | dismal awful",
    "thing": "song plot cast ending garden hotel script museum market voyage dinner lecture hall painting journey staff "
             "menu dance poem campsite beach tower ferry concert | kitchen bakery library village",
    "how": "very really truly utterly simply | deeply remarkably",
    "who": "my sister, an old friend, the guide, our host, everyone, the reporter, his aunt, a visitor | the baker, "
           "a neighbour",
    "when": "on monday, last week, this time, at first sight, in the end, after the break, at noon | that evening, in may",
}
WORDS = {k: [part.split(", " if "," in v else None) for part in v.split(" | ")] for k, v in WORDS.items()}
JUDGED = 9 * ["{same}", "{how} {same}"] + 7 * ["{same} and {same}"] + [
    "{same} rather than {other}", "not {other}", "not at all {other}", "hardly {other}", "far from {other}",
    "anything but {other}", "neither {other} nor {other}"]
CLAUSES = ["the {thing} was {judged}", "the {thing} felt {judged}", "{who} found the {thing} {judged}",
           "{who} called the {thing} {judged}"]
SENTENCES = 3 * ["{main}"] + 5 * ["{when} {main}"] + 8 * ["{main} and {main}"] + [
    "{side} but {main}", "{side}, yet {main}", "although {side}, {main}", "despite the {other} {thing}, {main}"]
# share of new words per draw: at 0.03 about 3 % of the test rows hang on a new adjective; the other kinds decide nothing
NEW_AT_TEST = {"good": 0.03, "bad": 0.03, "thing": 0.15, "how": 0.15, "who": 0.15, "when": 0.15}
NEW_UNLABELLED = dict.fromkeys(WORDS, 0.25)

def demo_sentence(rng, good, new_share):
    """One sentence whose label is good (bool).  new_share: how often a kind of word is drawn from behind the bar."""
    used = set()

    def pick(options):
        return options[int(rng.random() * len(options))]  # the one draw that is the same in every Python version

    def word(kind):
        seen, new = WORDS[kind]
        w = pick(new if rng.random() < new_share.get(kind, 0) else seen)
        if w in used:  # the same garden is not both grim and lovely
            return word(kind)
        used.add(w)
        return w

    def fill(template, good):
        def slot(match):
            name = match[1]
            if name in ("main", "side"):
                return fill(pick(CLAUSES), good == (name == "main"))
            if name == "judged":
                return fill(pick(JUDGED), good)
            return word({"same": "good" if good else "bad", "other": "bad" if good else "good"}.get(name, name))
        return re.sub(r"\{(\w+)\}", slot, template)

    return fill(pick(SENTENCES), good)

def demo_labelled():
    """{'train': 4,000 rows, 'val': 500, 'test': 1,000}, balanced, no text twice; always the same."""
    rng, seen, rows = random.Random(1), set(), {}
    for split, n, new_share in (("train", 4000, {}), ("val", 500, NEW_AT_TEST), ("test", 1000, NEW_AT_TEST)):
        rows[split] = []
        while len(rows[split]) < n:
            good = len(rows[split]) % 2 == 1
            text = demo_sentence(rng, good, new_share)
            if text not in seen:
                seen.add(text)
                rows[split].append((text, "positive" if good else "negative"))
    return rows

def demo_unlabelled(n=20000):
    """n sentences of the same grammar with all its words and no labels: what a language model is trained on."""
    rng = random.Random(2)
    return [demo_sentence(rng, rng.random() < 0.5, NEW_UNLABELLED) for _ in range(n)]

# --- tokenizer --------------------------------------------------------------------------------------------------------

BPE_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
BPE_SHA256 = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # as GPT-2 was published
EOT = "<|endoftext|>"
# tiktoken panics on a run of a million spaces; so a longer text is cut in front of a space after a non-space, where GPT-2's
# pattern begins a new piece whatever surrounds it (the ids stay the same), or, where there is no such place, anywhere
LONG = 100_000  # characters: 0.01-0.02 s each, even without a space
CUT = re.compile(r"(?s:.{1,%d}(?<=\S)(?= )|.{1,%d})" % (LONG, LONG))

def tokenizer(name, data_dir=None):
    """'gpt2' (OpenAI's two files, sha256 always checked) or 'bytes' (256 bytes and <|endoftext|>) -> tiktoken.Encoding."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]+", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={EOT: 256})
    assert name == "gpt2", name
    files = {}
    for file, sha256 in BPE_SHA256.items():
        rel = f"gpt2_bpe/{file}"
        path = find(rel, data_dir) or download([BPE_ADDRESS + file], cached(rel), sha256=sha256)
        files[file] = read_bytes(path)
        if hashlib.sha256(files[file]).hexdigest() != sha256:
            raise UserError(f"{path} is not GPT-2's {file} (its sha256 differs); replace or remove it")
    # the files write bytes as printable characters: a printable Latin-1 byte as itself, the others as 256, 257, ...
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    order = plain + [b for b in range(256) if b not in plain]
    byte = {chr(b) if i < len(plain) else chr(256 + i - len(plain)): b for i, b in enumerate(order)}
    ranks = {bytes([b]): i for i, b in enumerate(order)}
    for i, merge in enumerate(files["vocab.bpe"].decode().split("\n")[1:-1]):  # line 1 is the version
        ranks[bytes(byte[c] for c in merge if c != " ")] = 256 + i
    ids = json.loads(files["encoder.json"])
    assert ids.pop(EOT) == len(ranks) and ranks == {bytes(byte[c] for c in k): v for k, v in ids.items()}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})

class Tokens:
    """The ids of many texts in one flat array: t[i] is a view, (length,) uint16."""

    def __init__(self, flat, starts):
        self.flat, self.starts = flat, starts  # (n_tokens,) uint16, (n + 1,) int64
        self.lengths = np.diff(starts)         # (n,) int64

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return self.flat[self.starts[i]:self.starts[i + 1]]

def tokenize(enc, texts, cache=True):
    """
    Texts -> Tokens.  A text that says <|endoftext|> is plain text like any other; an empty text becomes that one special id.
    cache: keep the ids in the cache folder under a hash of tokenizer and texts.
    """
    assert enc.n_vocab <= 1 << 16, "ids are stored in 16 bits"
    h = hashlib.sha256(f"1 {enc.name} {enc.n_vocab}".encode())  # 1: the version of this function
    for t in texts:
        raw = t.encode("utf-8", "surrogatepass")
        h.update(b"%d:" % len(raw) + raw)
    path = cached(f"tokens/{h.hexdigest()[:32]}.npz")
    if cache and os.path.exists(path):
        try:
            with np.load(path, allow_pickle=False) as z:
                flat, starts = z["flat"], z["starts"]
            whole = (flat.dtype, starts.dtype, starts.shape) == (np.uint16, np.int64, (len(texts) + 1,)) and starts[0] == 0
            if whole and flat.shape == (starts[-1],) and (np.diff(starts) > 0).all() and flat.max(initial=0) < enc.n_vocab:
                return Tokens(flat, starts)
        except Exception:
            pass  # half written by a crash, or damaged in one of the many ways that numpy names: made anew
    arrays = []
    for at in range(0, len(texts), 4096):  # texts at a time: as lists of Python ints, all of IMDB would take half a gigabyte
        part = texts[at:at + 4096]
        ids = enc.encode_ordinary_batch(["" if len(t) > LONG else t for t in part], num_threads=os.cpu_count() or 1)
        for i, t in enumerate(part):
            if len(t) > LONG:
                ids[i] = [x for piece in CUT.findall(t) for x in enc.encode_ordinary(piece)]
            arrays.append(np.array(ids[i] or [enc.eot_token], np.uint16))
    starts = np.cumsum([0] + [len(a) for a in arrays], dtype=np.int64)
    flat = np.concatenate(arrays) if arrays else np.empty(0, np.uint16)
    if cache:
        buffer = io.BytesIO()
        np.savez(buffer, flat=flat, starts=starts)
        write_atomic(path, buffer.getvalue())
    return Tokens(flat, starts)

# --- batches ----------------------------------------------------------------------------------------------------------

WINDOW = 100  # batches sorted by length together: 2.4 % padding on SST-2 at 16 (50: 4.4 %, 25: 8.1 %), and ever new batches

def batches(lengths, batch_size, seed, epoch):
    """
    Length-bucketed batches of one epoch: list of index arrays.  Shuffle all rows, sort windows of WINDOW batches by length,
    cut them into batches, shuffle these.  A pure function; each row comes exactly once; only one batch may be smaller.
    lengths: (n,) tokens per row as they will be fed (cut to --max_length before).
    """
    rng, lengths = np.random.RandomState([seed % 2**32, epoch]), np.asarray(lengths)
    order, out = rng.permutation(len(lengths)), []
    for i in range(0, len(order), batch_size * WINDOW):
        window = order[i:i + batch_size * WINDOW]
        window = window[np.argsort(lengths[window], kind="stable")]
        out += [window[j:j + batch_size] for j in range(0, len(window), batch_size)]
    return [out[i] for i in rng.permutation(len(out))]

def collate(tokens, index, max_length, truncate, pad_id, device="cpu", multiple=1):
    """Rows index (B,) of tokens -> ids (B, T), lengths (B,), both int64, padded on the right; T <= max_length, a multiple of
    `multiple` if that fits."""
    import torch  # here, so that `python data.py` does not wait for it
    assert truncate in ("head", "tail"), truncate
    rows = [tokens[i][:max_length] if truncate == "head" else tokens[i][-max_length:] for i in index]
    lengths = np.array([len(r) for r in rows], np.int64)
    ids = np.full((len(rows), min(-(-lengths.max() // multiple) * multiple, max_length)), pad_id, np.int64)
    for i, r in enumerate(rows):
        ids[i, :len(r)] = r
    batch = torch.from_numpy(ids), torch.from_numpy(lengths)
    if str(device).startswith("cuda"):  # from pinned memory a copy does not wait for what the GPU still computes
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)
    return tuple(t.to(device) for t in batch)

# --- python data.py NAME ----------------------------------------------------------------------------------------------

def main(argv=None):
    p = Parser(description="Print what a data set holds: rows, classes, token lengths, three examples.")
    p.add_argument("data", metavar="NAME", help=f"{', '.join(READERS)}, or a {', '.join(KINDS)} file, or a folder of them")
    p.add_argument("--val", metavar="FILE", help="validation rows (default: the data set's own, or carved out of train)")
    p.add_argument("--test", metavar="FILE", help="test rows (default: the data set's own, or carved out of train)")
    p.add_argument("--text_col", help="column that holds the text (default: guessed)")
    p.add_argument("--label_col", help="column that holds the label (default: guessed)")
    p.add_argument("--max_length", type=positive, default=128, help="tokens at which a text would be cut")
    p.add_argument("--max_samples", type=positive, metavar="N", help="keep N training rows per class (default: all)")
    p.add_argument("--balance", action="store_true", help="drop rows until all classes are as large as the smallest")
    p.add_argument("--data_dir", help="folder to look for data in first (default: $NANOCLS_DATA)")
    p.add_argument("--seed", type=int, default=1337, help="of the split")
    a, _ = p.parse(argv)
    d = load(a.data, a.seed, a.data_dir, a.val, a.test, a.text_col, a.label_col, a.max_samples, a.balance)
    enc = tokenizer("bytes" if a.data == "demo" else "gpt2", a.data_dir)
    print(f"{d.name}: {len(d.labels)} classes, tokens of {enc.name}")
    for note in d.notes:
        print(f"  {note}")
    width = max(map(len, d.labels))
    print(f"\n{'rows':{width}} {'train':>8} {'val':>8} {'test':>8}")
    counts = [np.bincount(s.y, minlength=len(d.labels)) for s in (d.train, d.val, d.test)]
    for label, row in zip(d.labels + ["all"], zip(*[[*c, c.sum()] for c in counts])):
        print(f"{label:{width}} " + " ".join(f"{n:8,}" for n in row))
    quantiles = (0, 5, 25, 50, 75, 95, 99, 100)
    print(f"\n{'tokens':8}" + "".join(f"{q:6} %" for q in quantiles) + f"{'mean':>8}   longer than {a.max_length}")
    for name, s in (("train", d.train), ("val", d.val), ("test", d.test)):
        n = tokenize(enc, s.texts).lengths
        print(f"{name:8}" + "".join(f"{x:8.0f}" for x in (*np.percentile(n, quantiles), n.mean()))
              + f"   {100 * (n > a.max_length).mean():.1f} %")
    print()
    for i in np.linspace(0, len(d.train.y) - 1, 3).astype(int):
        text = d.train.texts[i]
        print(f"{d.labels[d.train.y[i]]}: {text[:200]!r}{'...' * (len(text) > 200)}")

if __name__ == "__main__":
    cli(main)
