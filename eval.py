"""Score trained runs: metrics, run against run, calibration, plots.

    python eval.py runs/sst2                                 the test split of the run's own data, made again from run.json
    python eval.py runs/lora runs/head                       side by side on the same rows, with McNemar's test
    python eval.py runs/lora runs/gen-lora                   discriminative or generative: which is better here?
    python eval.py runs/sst2 --test new.csv                  every row of another labelled file
    python eval.py --preds preds.json --labels labels.json   numbers from files, whatever program wrote them
"""
import io
import json
import math
import os
import sys

import numpy as np

import data
from data import UserError

# --- metrics: arrays in, plain numbers out ---

def divide(a, b):
    """a / b for arrays, 0 where b is 0 (scikit-learn's zero_division=0)."""
    return np.divide(a, b, out=np.zeros(len(b)), where=b > 0)


def softmax(logits):
    """Logits (N, K) -> probabilities (N, K) in float64."""
    e = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reliability(probs, y, bins=15):
    """Rows in bins ((i-1)/15, i/15] of their top probability -> count, mean top probability, accuracy, each (bins,)."""
    top = probs.max(1)                                                        # (N,)
    where = np.clip(np.ceil(top * bins).astype(int) - 1, 0, bins - 1)         # (N,) bin of each row
    count, right = np.bincount(where, minlength=bins), (probs.argmax(1) == y).astype(float)
    return count, divide(np.bincount(where, top, bins), count), divide(np.bincount(where, right, bins), count)


def metrics(probs, y, labels, seed=0, pred=None):
    """All numbers about one set of predictions, as a dict that json can write.

    probs (N, K), or None when only labels were predicted (nll, brier and ece are then None);  y (N,) class ids;
    labels: K names;  pred (N,) predicted ids, -1 = no answer (counts as wrong), default the most probable class.
    macro_f1    mean over the classes that occur in y or in pred (as scikit-learn);  weighted_f1: weighted by rows in y
    mcc         multi-class Matthews correlation (Gorodkin 2004); no answer is one more predicted class
    nll         nats per text, mean of -log p(true class)
    brier       mean over texts of the SUM over classes of (p - truth)^2: 0 to 2, for two classes twice the one-sided score
    ece         expected calibration error of the top class, 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599)
    ci95        95 % percentile bootstrap interval of the accuracy. The number right among n rows drawn with replacement is
                Binomial(n, accuracy), so that is drawn (10,000 times) instead of the rows. At accuracy 0 or 1 it is a point.
    majority_accuracy   of always answering the most frequent class of y;  coverage: share of texts with an answer
    confusion   rows = truth, columns = prediction, in the order of labels; texts without an answer are in no column
    """
    y, n, k = np.asarray(y), len(y), len(labels)
    if probs is not None:
        probs = np.asarray(probs, dtype=np.float64)                           # (N, K)
    assert n > 0 and (probs is None or probs.shape == (n, k)), (n, k)
    pred = probs.argmax(1) if pred is None else np.asarray(pred)
    told = pred >= 0
    confusion = np.bincount(y[told] * k + pred[told], minlength=k * k).reshape(k, k)
    hit, predicted, support = np.diag(confusion).astype(float), confusion.sum(0), np.bincount(y, minlength=k)
    precision, recall, f1 = divide(hit, predicted), divide(hit, support), divide(2 * hit, predicted + support)
    accuracy, p, t = hit.sum() / n, np.append(predicted, n - told.sum()) / n, support / n     # p, t: shares of pred, of y
    spread = (1 - p @ p) * (1 - t @ t)
    draws = np.random.default_rng(seed).binomial(n, accuracy, 10000) / n
    m = dict(accuracy=accuracy, macro_f1=f1[predicted + support > 0].mean(), weighted_f1=f1 @ t,
             mcc=(accuracy - p[:k] @ t) / math.sqrt(spread) if spread > 1e-15 else 0.0)
    m = {name: float(value) for name, value in m.items()}
    m.update(nll=None, brier=None, ece=None)
    if probs is not None:
        count, top, right = reliability(probs, y)
        m["nll"] = float(-np.log(np.maximum(probs[np.arange(n), y], np.finfo(np.float64).tiny)).mean())
        m["brier"] = float(((probs - np.eye(k)[y]) ** 2).sum(1).mean())
        m["ece"] = float(count @ np.abs(right - top) / n)
    table = zip(precision.tolist(), recall.tolist(), f1.tolist(), support.tolist())
    keys = ("precision", "recall", "f1", "support")
    m.update(n=n, majority_accuracy=float(t.max()), ci95=np.percentile(draws, [2.5, 97.5]).tolist(),
             coverage=float(told.mean()), per_class={label: dict(zip(keys, row)) for label, row in zip(labels, table)},
             confusion=confusion.tolist())
    return m


def run_metrics(run, logits, y, labels, calibrated=False):
    """
    An opened run's logits (N, K), columns in the run's order, on y (N,) in the order of labels -> metrics(), probs (N, K) in
    that order, pred (N,).  A generative run's probabilities are the calibrated ones, its predictions those of Bayes' rule
    without calibration, unless calibrated; nll, brier and ece before calibration stand under 'uncalibrated'.
    """
    order = [run.labels.index(name) for name in labels]
    probs, logits = softmax(run.calibrated(logits))[:, order], logits[:, order]
    if run.kind == "cls":
        return metrics(probs, y, labels), probs, probs.argmax(1)
    pred = (probs if calibrated else logits).argmax(1)
    m, raw = metrics(probs, y, labels, pred=pred), metrics(softmax(logits), y, labels)
    m["uncalibrated"] = {key: raw[key] for key in ("nll", "brier", "ece")}
    return m, probs, pred


def compare(first, other, seed=0):
    """Is `other` better than `first`?  Two bool arrays (N,), the same rows: which rows each of them got right.

    McNemar's test on the rows that only one of them got right: exact binomial below 25 such rows, else chi-squared with
    continuity correction.  ci95: paired bootstrap interval of the accuracy difference; a resampled row is one of three kinds
    (only first right, only other right, the rest), so their counts are Multinomial and are drawn as such (10,000 times).
    """
    n, a, b = len(first), int((first & ~other).sum()), int((other & ~first).sum())
    if a + b < 25:
        test, p = "exact binomial", min(1.0, 2 * sum(math.comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b))
    else:
        chi2 = max(abs(a - b) - 1, 0) ** 2 / (a + b)
        test, p = "chi-squared", math.erfc(math.sqrt(chi2 / 2))               # upper tail at one degree of freedom
    draws = np.random.default_rng(seed).multinomial(n, [a / n, b / n, (n - a - b) / n], 10000)
    return dict(difference=(b - a) / n, ci95=np.percentile((draws[:, 1] - draws[:, 0]) / n, [2.5, 97.5]).tolist(),
                only_first_right=a, only_other_right=b, test=test, p=p)

# --- text for people ---

def short(name, width):
    """name, its middle cut out where it is longer than width."""
    return name if len(name) <= width else name[:(width - 1) // 2] + ".." + name[len(name) - (width - 2) // 2:]


def listing(labels):
    return ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")


def report(m, labels):
    """metrics() as a table of at most 100 columns. A confusion matrix that does not fit becomes its ten largest errors."""
    cm, interval = np.array(m["confusion"]), "[{:.4f}, {:.4f}]".format(*m["ci95"])
    lines = [f"accuracy {m['accuracy']:.4f} {interval}   majority class {m['majority_accuracy']:.4f}   n {m['n']:,}",
             f"macro F1 {m['macro_f1']:.4f}   weighted F1 {m['weighted_f1']:.4f}   MCC {m['mcc']:.4f}"]
    if m["nll"] is not None:
        lines.append(f"NLL {m['nll']:.4f} nats   Brier {m['brier']:.4f}   ECE {m['ece']:.4f}")
    if "uncalibrated" in m:
        lines[-1] += "   (before calibration {nll:.4f}, {brier:.4f}, {ece:.4f})".format(**m["uncalibrated"])
    if cm.sum() < m["n"]:
        lines.append(f"coverage {m['coverage']:.4f}: {m['n'] - cm.sum():,} texts got no label and count as wrong; "
                     f"accuracy on the others {np.trace(cm) / max(cm.sum(), 1):.4f}")
    names = [short(label, 30) for label in labels]
    wide = max(map(len, names + ["class"]))
    lines += ["", f"{'class':{wide}}  precision  recall      F1  support"]
    for name, c in zip(names, m["per_class"].values()):
        lines.append(f"{name:{wide}}  {c['precision']:9.4f}  {c['recall']:.4f}  {c['f1']:.4f}  {c['support']:7,}")
    cell, room = max(len(str(cm.max())), 3) + 1, 100 - wide - 4               # 4: a column number beside the name
    if len(labels) <= 20 and len(labels) * cell <= room:
        heads = names
        if len(names) * (max(map(len, names)) + 1) > room:                    # names are too wide for columns: numbers
            heads = [f"#{i}" for i in range(len(names))]
            names = [f"{name:{wide}} {head:>3}" for name, head in zip(names, heads)]
        cell, wide = max([cell] + [len(head) + 1 for head in heads]), max(map(len, names))
        lines += ["", "confusion matrix (rows: truth, columns: prediction)"]
        lines += [" " * wide + "".join(f"{head:>{cell}}" for head in heads)]
        lines += [f"{name:{wide}}" + "".join(f"{c:{cell}d}" for c in row) for name, row in zip(names, cm)]
    else:
        errors = cm - np.diag(np.diag(cm))
        truth, wrong = np.unravel_index(np.argsort(-errors, axis=None, kind="stable")[:10], errors.shape)
        lines += ["", "most frequent errors (texts, truth -> prediction)"]
        lines += [f"{errors[i, j]:7,}  {names[i]} -> {names[j]}" for i, j in zip(truth, wrong) if errors[i, j]]
    return "\n".join(lines)


def side_by_side(names, results, tests):
    """One row per run, then each run against the first: tests are compare() of the first with the others, in order."""
    names = [short(name, 36) for name in names]
    wide = max(map(len, names + ["majority class"]))
    lines = [f"{'run':{wide}}  accuracy [95 % interval]  macro F1      MCC      NLL     ECE"]
    for name, m in zip(names, results):
        lines.append(f"{name:{wide}}    {m['accuracy']:.4f} [{m['ci95'][0]:.4f}, {m['ci95'][1]:.4f}]    "
                     f"{m['macro_f1']:.4f}  {m['mcc']:7.4f}  {m['nll']:7.4f}  {m['ece']:6.4f}")
    lines += [f"{'majority class':{wide}}    {results[0]['majority_accuracy']:.4f}", "",
              f"McNemar's test against {names[0]}, {results[0]['n']:,} rows"]
    for name, t in zip(names[1:], tests):
        p = "p < 0.0001" if t["p"] < 1e-4 else f"p = {t['p']:.2g}"
        better = name if t["difference"] > 0 else names[0]
        lines += [f"{name}: accuracy {t['difference']:+.4f} [{t['ci95'][0]:+.4f}, {t['ci95'][1]:+.4f}], "
                  f"{t['only_other_right']:,} rows gained, {t['only_first_right']:,} lost",
                  f"  {'the difference is within noise' if t['p'] >= 0.05 else better + ' is better'} ({p}, {t['test']})"]
    if len(tests) > 1:
        lines.append(f"({len(tests)} tests: to be wrong in 5 % of all such tables, ask for p < {0.05 / len(tests):.2g})")
    return "\n".join(lines)

# --- predictions in files ---

def write_predictions(out, probs, pred, y, labels):
    """val_preds.json and val_labels.json of a run folder, as --preds and --labels read them: probs (N, K), pred and y (N,) class ids."""
    predictions = [dict(label=labels[c], probs=dict(zip(labels, p.tolist()))) for p, c in zip(probs, pred)]
    data.write_json(os.path.join(out, "val_preds.json"), predictions)
    data.write_json(os.path.join(out, "val_labels.json"), [labels[c] for c in y])



def read_items(path):
    """The items of a JSON list, or of a file with one JSON value per line (what predict.py --json writes)."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read()
        if text.lstrip().startswith("["):
            items = json.loads(text)
        else:
            items = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as e:                        # a wrong encoding is a ValueError too
        raise UserError(f"{path} cannot be read as JSON ({e}): give a UTF-8 file with one list, or one value per line")
    if not items:
        raise UserError(f"{path} is empty: it needs one item per text")
    return items


def read_preds(preds_path, labels_path):
    """-> label names, y (N,), probs (N, K) or None, pred (N,) with -1 where the label is null.

    The classes are those of the first item's probs, in that order; without probs, the sorted labels of labels_path.
    """
    truth, items = read_items(labels_path), read_items(preds_path)
    items = [item if isinstance(item, dict) else {"label": item} for item in items]
    if len(items) != len(truth):
        raise UserError(f"{preds_path} has {len(items)} predictions but {labels_path} has {len(truth)} labels: "
                        "both need one item per text, in the same order")
    for i, label in enumerate(truth, 1):
        if not isinstance(label, str):
            raise UserError(f"{labels_path}, item {i}: {json.dumps(label)[:60]} is not a label: write a string in quotes")
    first = items[0].get("probs")
    labels = list(first) if isinstance(first, dict) and first else sorted(set(truth))
    if len(labels) > data.MAX_CLASSES:
        raise UserError(f"{labels_path if first is None else preds_path} has {len(labels):,} different labels, and at most "
                        f"{data.MAX_CLASSES:,} can be told apart: are these the labels?")
    ids, pred, rows = {label: i for i, label in enumerate(labels)}, [], []
    for i, label in enumerate(truth, 1):
        if label not in ids:
            raise UserError(f"{labels_path}, item {i}: {label!r} is not among the classes of {preds_path} "
                            f"({listing(labels)}): make the names agree")
    for i, item in enumerate(items, 1):
        where, label, p = f"{preds_path}, item {i}", item.get("label", 0), item.get("probs")   # 0: missing
        if label is not None and not isinstance(label, str):
            raise UserError(f"{where} has no \"label\" that is a string, or null for no answer: add one")
        if label is not None and label not in ids:
            raise UserError(f"{where}: {label!r} is not among the labels ({listing(labels)}): make the names agree")
        pred.append(-1 if label is None else ids[label])
        if p is None and first is None:
            continue
        if first is None or not isinstance(p, dict) or set(p) != set(labels):
            raise UserError(f"{where}: \"probs\" must give one probability to each of {listing(labels)}, "
                            "in every item or in none")
        row = [p[name] for name in labels]
        if not all(isinstance(v, (int, float)) and 0 <= v <= 1.01 for v in row):   # NaN fails this too
            raise UserError(f"{where}: \"probs\" holds {json.dumps(p)[:80]}: each value must be a number from 0 to 1")
        if abs(sum(row) - 1) > 0.01:                                          # room for values rounded to a few digits
            raise UserError(f"{where}: \"probs\" sum to {sum(row):.4g}: probabilities must sum to 1")
        rows.append(row)
    y = np.array([ids[label] for label in truth])
    return labels, y, np.array(rows, float) if rows else None, np.array(pred)

# --- predictions from runs ---

def own_data(info, data_dir):
    """The data set a run was trained on, split by the same seed; of a --quick run the same few rows."""
    a = info["args"]
    ds = data.load(a["data"], seed=a["seed"], data_dir=data_dir or a["data_dir"],
                   **{key: a[key] for key in ("val", "test", "text_col", "label_col", "max_samples", "balance")})
    if a["quick"]:
        ds.val, ds.test = (data.cap(split, 100, a["seed"]) for split in (ds.val, ds.test))
    return ds


def score(args, out):
    """Every run on the same rows -> data set, label names, y (N,), and run_metrics() of each run."""
    import lora   # here, because torch takes seconds to import and --preds does without it
    infos = [lora.info_of(path) for path in args.run]
    first = infos[0]["args"]
    if not (first["data"] or args.data or args.test):
        raise UserError(f"{args.run[0]} was not trained here, so it has no data of its own: name it with --data NAME, or score "
                        "every row of a labelled file with --test FILE")
    files = dict(text_col=args.text_col, label_col=args.label_col, data_dir=args.data_dir or first["data_dir"])
    if args.data:
        balance = first["balance"] and args.data == first["data"]   # else test could hold rows it was trained on
        ds = data.load(args.data, seed=first["seed"], val=args.val, test=args.test, balance=balance, **files)
    elif args.test:
        ds = data.load(args.test, val=args.test, test=args.test, **files)   # three times: no row is split off
    else:
        ds = own_data(infos[0], args.data_dir)
    texts, y = getattr(ds, args.split).texts, getattr(ds, args.split).y
    if not len(y):
        raise UserError(f"--split {args.split} of {ds.name} has no rows: choose another split")
    for path, info in zip(args.run, infos):
        k = len(info["labels"])
        if info["labels"] == [f"LABEL_{i}" for i in range(k)] and not set(ds.labels) <= set(info["labels"]):    # not named by anyone
            if k != len(ds.labels):
                raise UserError(f"{path} does not name its {k} classes, and {ds.name} has {len(ds.labels)} ({listing(ds.labels)}): "
                                "write their names into id2label in its config.json")
            print(f"{path} does not name its classes; taken in the order of {ds.name}: {listing(ds.labels)}", file=out)
            info["labels"] = ds.labels
    labels = infos[0]["labels"]
    for path, info in zip(args.run, infos):
        if sorted(info["labels"]) != sorted(labels):
            raise UserError(f"{path} has the labels {listing(info['labels'])}, {args.run[0]} has {listing(labels)}: "
                            "compare runs with the same labels")
    strange = sorted({ds.labels[i] for i in np.unique(y)} - set(labels))
    if strange:
        raise UserError(f"{ds.name} has labels that {args.run[0]} does not know ({listing(strange)}; it knows "
                        f"{listing(labels)}): rename them in the data, or train a run on it")
    y = np.array([labels.index(name) if name in labels else -1 for name in ds.labels])[y]   # by name, into the run's ids
    every = []
    for path, info in zip(args.run, infos):
        run = lora.open_run(path, device=args.device, dtype=args.dtype)
        run.labels = info["labels"]
        print(f"{path}: {info['method']}, {ds.name} {args.split}, {len(y):,} texts "
              f"({run.device}, {str(run.dtype)[6:]}: {run.reason})", file=out)
        split_by = ("data", "seed", "val", "test", "balance")
        if not info["args"]["data"]:
            print("  not trained here: whether it has seen some of these texts in training is not known", file=out)
        elif not args.data and not args.test and any(info["args"][key] != first[key] for key in split_by):
            seen = set(own_data(info, args.data_dir).train.texts)
            print(f"  trained on another split; {sum(t in seen for t in texts):,} of these texts were in it", file=out)
        if run.kind == "gen":
            run.method = args.method
        elif args.calibrated or args.method != "exact":
            raise UserError(f"{path} is a discriminative run: --calibrated and --method are for generative ones")
        logits = run.logits(texts, progress=True, cache=True)                 # (N, K)
        if not np.isfinite(logits).all():
            raise UserError(f"{path} gives logits that are not finite: try --dtype fp32, or train again with a smaller --lr")
        every.append(run_metrics(run, logits, y, labels, args.calibrated))
    return ds, labels, y, every

# --- plots ---

def figure_class():
    """matplotlib's Figure, which draws with Agg and opens no window."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    return Figure


def read_log(path):
    """log.jsonl -> {key: (steps, values)}. Of a step logged again after a resume the later line counts."""
    series = {}
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            row = data.log_row(line) or {}                                    # a line cut off by a kill
            for key in ("loss", "val_loss", "val_accuracy", "val_auc"):
                if type(row.get(key)) in (int, float):
                    series.setdefault(key, {})[row["step"]] = row[key]
    return {key: tuple(zip(*sorted(points.items()))) for key, points in series.items()}


def plot(folder, names, labels, y, every, results, logs):
    """Write curves.png (with logs), confusion.png and reliability.png (with probabilities) -> their paths."""
    Figure, figures, marks = figure_class(), {}, dict(marker="o", ms=4)
    names, ticks, k = [short(name, 28) for name in names], [short(label, 18) for label in labels], len(labels)
    if any(logs):
        fig = figures["curves.png"] = Figure(figsize=(10, 4), layout="constrained")
        left, right = fig.subplots(1, 2)
        for i, (name, log) in enumerate(zip(names, logs)):
            left.plot([], [], color=f"C{i}", label=name)                      # the legend's line, whatever the log holds
            if "loss" in log:
                left.plot(*log["loss"], color=f"C{i}", alpha=0.4, lw=1)
            if "val_loss" in log:
                left.plot(*log["val_loss"], color=f"C{i}", **marks)
            for key in ("val_accuracy", "val_auc"):
                if key in log:
                    right.plot(*log[key], color=f"C{i}", **marks)
        by_class = any("val_auc" in log for log in logs)                      # a class of a generative run, one after another
        left.set(xlabel="step", ylabel="nats per text" + " (of a class: per token)" * by_class, title="loss (pale: training, dots: validation)")
        right.set(xlabel="step", ylabel="accuracy" + " (of a class: area under ROC)" * by_class, title="validation accuracy")
        left.grid(alpha=0.3)
        right.grid(alpha=0.3)
        fig.legend(loc="outside lower center", fontsize=8, ncols=3)
    columns, lines, side = min(3, len(names)), -(-len(names) // 3), min(0.4 * k + 3, 14)
    fig = figures["confusion.png"] = Figure(figsize=(columns * side, lines * side), layout="constrained")
    axes = fig.subplots(lines, columns, squeeze=False).ravel()
    for ax, name, m in zip(axes, names, results):
        cm = np.array(m["confusion"])
        share = divide(cm.ravel(), np.repeat(cm.sum(1), k)).reshape(k, k)     # of its row: rare classes show too
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        ax.set(xlabel="prediction", ylabel="truth", title=f"{name}\naccuracy {m['accuracy']:.4f}")
        if k <= 40:
            ax.set_xticks(range(k), ticks, rotation=45, ha="right", rotation_mode="anchor")
            ax.set_yticks(range(k), ticks)
        for i, j in np.ndindex(k, k) if k <= 20 else ():
            ax.text(j, i, cm[i, j], ha="center", va="center", fontsize=8, color="k" if share[i, j] < 0.6 else "w")
    for ax in axes[len(names):]:
        ax.remove()
    if every[0] is not None:
        fig = figures["reliability.png"] = Figure(figsize=(5, 6.5), layout="constrained")
        top, low = fig.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        top.plot([0, 1], [0, 1], color="0.6", ls="--", lw=1, label="perfect calibration")
        for i, (name, probs, m) in enumerate(zip(names, every, results)):
            count, mean, accuracy = reliability(probs, y)
            top.plot(mean[count > 0], accuracy[count > 0], color=f"C{i}", label=f"{name}, ECE {m['ece']:.3f}", **marks)
            low.stairs(count / len(y), np.linspace(0, 1, len(count) + 1), color=f"C{i}", lw=1.5)
        top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02), title="reliability")
        low.set(xlabel="probability of the predicted class", ylabel="share of texts")
        top.grid(alpha=0.3)
        low.grid(alpha=0.3)
        fig.legend(loc="outside lower center", fontsize=8)
    for name, fig in figures.items():
        png = io.BytesIO()
        fig.savefig(png, dpi=150, format="png", bbox_inches="tight")             # tight: square axes can overhang
        data.write_atomic(os.path.join(folder, name), png.getvalue())
    return [os.path.join(folder, name) for name in figures]

# --- command line ---

def main(argv=None):
    p = data.Parser(prog="eval.py", description="Score runs or predictions: metrics, comparison, calibration, plots.")
    # what to score
    p.add_argument("run", nargs="*", metavar="RUN", help="run folder; several: on the same rows, each against the first")
    p.add_argument("--preds", metavar="FILE", help="score this instead of a run: a JSON list, or a value per line, of "
                   "labels or {label, probs}; label null = no answer, counts as wrong")
    p.add_argument("--labels", metavar="FILE", help="the true labels for --preds: JSON list of strings, in the same order")
    # data
    p.add_argument("--data", help="data set name, file or folder; labels are matched by name (default: the first run's own)")
    p.add_argument("--split", default="test", choices=["test", "val", "train"], help="which part of the data (default test)")
    p.add_argument("--val", metavar="FILE", help="validation rows that go with --data")
    p.add_argument("--test", metavar="FILE", help="test rows that go with --data; without --data, score every row of FILE")
    p.add_argument("--text_col", metavar="NAME", help="column of the text in --data or --test (default: guessed)")
    p.add_argument("--label_col", metavar="NAME", help="column of the label in --data or --test (default: guessed)")
    p.add_argument("--data_dir", metavar="DIR", help="folder to look in for data before the cache (default: the run's)")
    # generative runs
    p.add_argument("--method", default="exact", choices=["exact", "loss"], help="how texts are scored: exact sums, or one text at "
                   "a time the mean loss times the number of tokens, which is slow and must agree")
    p.add_argument("--calibrated", action="store_true", help="decide by the calibrated probabilities, not by Bayes' rule alone")
    # output
    p.add_argument("--plot", metavar="DIR", help="write curves.png, confusion.png, reliability.png there (needs matplotlib)")
    p.add_argument("--json", metavar="FILE", help="write all the numbers there; - = to stdout, the tables then go to stderr")
    # system
    p.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps")
    p.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
                   help="precision of the matrix products; auto: the fastest native one")
    args, given = p.parse(argv)

    if bool(args.run) == bool(args.preds):
        raise UserError("give either run folders or --preds with --labels, and not both")
    if bool(args.preds) != bool(args.labels):
        raise UserError("--preds and --labels go together: one file of predictions, one of true labels")
    for flag in ("data", "split", "val", "test", "text_col", "label_col", "data_dir", "device", "dtype", "method", "calibrated"):
        if args.preds and flag in given:
            raise UserError(f"--{flag} has no meaning with --preds, which loads no data and no model: leave it out")
    for flag in ("val", "text_col", "label_col"):
        if flag in given and not (args.data or args.test and flag != "val"):
            raise UserError(f"--{flag} needs --data: the run's own data is made again with the run's own arguments")
    if args.test and not args.data and "split" in given:
        raise UserError("--split has no meaning with --test alone, which scores every row of that file: leave it out")
    if args.plot:
        figure_class()                                                        # missing: said before the work, not after
        try:
            os.makedirs(args.plot, exist_ok=True)
        except OSError as e:
            raise UserError(f"--plot {args.plot} cannot be made a folder ({e.strerror}): give the name of a folder")

    out = sys.stderr if args.json == "-" else sys.stdout
    if args.preds:
        labels, y, probs, pred = read_preds(args.preds, args.labels)
        names, every, results, tests = [args.preds], [probs], [metrics(probs, y, labels, pred=pred)], []
        what = dict(data=args.labels, split=None)
    else:
        ds, labels, y, every = score(args, out)
        names, (results, every, preds) = args.run, zip(*every)
        tests = [compare(preds[0] == y, pred == y) for pred in preds[1:]]
        what = dict(data=ds.name, split=args.split)
    print(side_by_side(names, results, tests) if tests else report(results[0], labels), file=out)

    if len(args.run) == 1 and args.split == "test" and not args.data and not args.test:
        data.write_json(os.path.join(args.run[0], "eval_results.json"), results[0])
    if args.plot:
        logs = [os.path.join(run, "log.jsonl") for run in args.run]
        logs = [read_log(path) if os.path.isfile(path) else {} for path in logs]
        for path in plot(args.plot, names, labels, y, every, results, logs):
            print(f"wrote {path}", file=out)
    if args.json:
        numbers = dict(what, labels=labels, runs=[dict(m, run=name) for name, m in zip(names, results)],
                       comparisons=[dict(t, run=name, against=names[0]) for name, t in zip(names[1:], tests)])
        if args.json == "-":
            print(json.dumps(numbers, indent=2))
        else:
            data.write_json(args.json, numbers)


if __name__ == "__main__":
    if "RANK" in os.environ:                                                # under torchrun; else torch is imported when it is needed
        import model as gpt

        main = gpt.under_torchrun(main)
    data.cli(main)
