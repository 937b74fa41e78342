"""Numbers about predictions: arrays in, plain numbers out. Called by eval.py, both train scripts
and other rooms."""

import math

import numpy as np

from lib.intervals import wilson


def divide(a, b):
    """a / b of arrays, 0 where b is 0 (scikit-learn's zero_division=0)."""
    return np.divide(a, b, out=np.zeros(a.shape), where=b > 0)


def softmax(logits):
    """Logits (N, K) -> probabilities (N, K) in float64."""
    e = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reliability(probs, y, bins=15):
    """Rows by their top probability, in bins ((i-1)/15, i/15]
    -> count, mean top probability, accuracy, each (bins,)."""
    top = probs.max(1)  # (N,)
    index = np.clip(np.ceil(top * bins).astype(int) - 1, 0, bins - 1)  # (N,) bin of each row
    right, count = (probs.argmax(1) == y).astype(float), np.bincount(index, minlength=bins)
    mean, accuracy = (divide(np.bincount(index, x, bins), count) for x in (top, right))
    return count, mean, accuracy


def metrics(probs, y, labels, pred=None):
    """All numbers about one set of predictions, as a dict for JSON.

    probs (N, K), or None if only labels were predicted (then nll, brier and ece are None);
    y (N,) class ids; labels: K names; pred (N,) predicted ids, -1 = no answer (counts as wrong),
    default the most probable class.
    macro_f1    mean over the classes in y or pred (like scikit-learn); weighted_f1: by rows in y
    mcc         multi-class Matthews correlation (Gorodkin 2004); no answer is one more class
    nll         nats per text, mean of -log p(true class)
    brier       mean over texts of the SUM over classes of (p - truth)^2: 0 to 2, for two classes
                twice the one-sided score
    ece         expected calibration error of the top class, 15 bins of equal width (Guo et al.
                2017, arXiv 1706.04599)
    ci95        95 % interval of the accuracy (Wilson 1927)
    majority_accuracy   of always answering the most frequent class in y
    coverage    fraction of texts with an answer
    confusion   rows = truth, columns = prediction, in the order of labels; without unanswered texts
    """
    y, n, k = np.asarray(y), len(y), len(labels)
    if probs is not None:
        probs = np.asarray(probs, dtype=np.float64)  # (N, K)
    assert n > 0 and (probs is None or probs.shape == (n, k)), (n, k)
    pred = probs.argmax(1) if pred is None else np.asarray(pred)
    answered = pred >= 0
    confusion = np.bincount(y[answered] * k + pred[answered], minlength=k * k).reshape(k, k)
    support = np.bincount(y, minlength=k)
    m, per_class = scores(confusion, support, labels)
    m.update(dict(nll=None, brier=None, ece=None) if probs is None else quality(probs, y))
    m.update(
        n=n,
        majority_accuracy=float(support.max() / n),
        ci95=wilson(int(np.trace(confusion)), n),
        coverage=float(answered.mean()),
        per_class=per_class,
        confusion=confusion.tolist(),
    )
    return m


def selection(m, name):
    """metrics() -> the score --select asks for, as a tuple of which the larger is the better."""
    return (-m['nll'],) if name == 'nll' else (m[name], -m['nll'])


def scores(confusion, support, labels):
    """Confusion matrix (K, K), rows of each true class (K,)
    -> accuracy, macro_f1, weighted_f1, mcc; {label: precision, recall, f1, support}."""
    n, hit, predicted = support.sum(), np.diag(confusion).astype(float), confusion.sum(0)
    precision, recall = divide(hit, predicted), divide(hit, support)
    f1, accuracy = divide(2 * hit, predicted + support), hit.sum() / n
    p = np.append(predicted, n - confusion.sum()) / n  # (K + 1,) fraction of each prediction
    t = support / n  # (K,) fraction of each true class
    spread = (1 - p @ p) * (1 - t @ t)
    m = dict(
        accuracy=accuracy,
        macro_f1=f1[predicted + support > 0].mean(),
        weighted_f1=f1 @ t,
        mcc=(accuracy - p[:-1] @ t) / math.sqrt(spread) if spread > 1e-15 else 0.0,
    )
    keys = ('precision', 'recall', 'f1', 'support')
    rows = zip(precision.tolist(), recall.tolist(), f1.tolist(), support.tolist())
    per_class = {label: dict(zip(keys, row)) for label, row in zip(labels, rows)}
    return {name: float(value) for name, value in m.items()}, per_class


def quality(probs, y):
    """nll, brier and ece of probabilities (N, K) for classes y (N,); see metrics()."""
    n, k = probs.shape
    count, top, right = reliability(probs, y)
    p = np.maximum(probs[np.arange(n), y], np.finfo(np.float64).tiny)  # (N,) of the true class
    return dict(
        nll=float(-np.log(p).mean()),
        brier=float(((probs - np.eye(k)[y]) ** 2).sum(1).mean()),
        ece=float(count @ np.abs(right - top) / n),
    )


def auc(scores, positive):
    """Area under the ROC curve of scores (n,): the fraction of pairs (positive, negative) in which
    the positive one has the larger score; ties count half. positive (n,) bool."""
    own, others = scores[positive], np.sort(scores[~positive])
    below, upto = (np.searchsorted(others, own, side) for side in ('left', 'right'))
    return float((below + upto).sum() / (2 * len(own) * len(others)))


def run_metrics(run, logits, y, labels):
    """Logits (N, K) of an opened run, columns in the run's order; y (N,) in the order of `labels`
    -> metrics(), probs (N, K) in that order. Where calibrated probabilities decide, 'uncalibrated'
    holds nll, brier and ece before calibration."""
    order = [run.labels.index(name) for name in labels]
    probs = run.probs(logits)[:, order]
    m = dict(metrics(probs, y, labels), dtype=str(run.dtype)[6:])
    if run.rule == 'calibrated':
        m['uncalibrated'] = quality(softmax(logits[:, order]), np.asarray(y))
    return m, probs
