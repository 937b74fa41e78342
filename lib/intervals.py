"""How sure a number is: intervals and tests. Called by eval.py, lib/metrics.py, lib/page.py,
lib/repeat.py and lib/seeds.py."""

import math
from collections import namedtuple

import numpy as np

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(right, n):
    """95 % interval of the fraction right / n (Wilson 1927). Never a point, not even at 0 or 1, and
    close to 95 % coverage for small n (Brown, Cai and DasGupta 2001)."""
    p, z2 = right / n, Z * Z / n
    half = Z * math.sqrt((p * (1 - p) + z2 / 4) / n)
    low, high = (p + z2 / 2 - half) / (1 + z2), (p + z2 / 2 + half) / (1 + z2)
    return [max(0.0, low), min(1.0, high)]


def bootstrap(scores, n, keys):
    """-> {key: [low, high]}, the same every time: 95 % intervals of scores that have no formula, as
    percentiles of 500 bootstrap samples (Efron and Tibshirani 1993). scores: a function of row
    numbers (n,) -> {key: number}"""
    rng = np.random.default_rng(0)
    drawn = [scores(rng.integers(0, n, n)) for _ in range(500)]
    return {key: np.percentile([s[key] for s in drawn], (2.5, 97.5)).tolist() for key in keys}


def rows_difference(d):
    """Mean of the differences d (N,), each in -1 .. 1, of two sides on the same rows, and its
    variance, after adding one row for either side (Bonett and Price 2012): so the variance is not 0
    where no row differs."""
    d = np.append(d, (1.0, -1.0))
    return float(d.mean()), float(d.var() / len(d))


def difference_interval(mean, variance, quantile=Z):
    half = quantile * math.sqrt(variance)
    return [max(-1.0, mean - half), min(1.0, mean + half)]


def compare(first, other):
    """Is `other` better than `first`? Two bool arrays (N,) over the same rows: which rows each of
    them got right.

    McNemar's test on the rows that only one got right: exact binomial below 25 such rows, else
    chi-squared with continuity correction. ci95: adjusted Wald interval of the accuracy difference
    of paired rows (Bonett and Price 2012), which is not [0, 0] where no row differs."""
    n, a, b = len(first), int((first & ~other).sum()), int((other & ~first).sum())
    if a + b < 25:
        tail = sum(math.comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b)
        test, p = 'exact binomial', min(1.0, 2 * tail)
    else:
        chi2 = max(abs(a - b) - 1, 0) ** 2 / (a + b)
        test, p = 'chi-squared', math.erfc(math.sqrt(chi2 / 2))  # upper tail, 1 degree of freedom
    ci95 = difference_interval(*rows_difference(other.astype(float) - first))
    return dict(
        difference=(b - a) / n, ci95=ci95, only_first_right=a, only_other_right=b, test=test, p=p
    )


# --- several seeds ---

Mean = namedtuple('Mean', 'mean half')  # half: of its 95 % interval, None of a single run


def mean_interval(x):
    """Values of k runs -> Mean, by Student's t with k - 1 degrees of freedom."""
    k = len(x)
    half = t_quantile(k - 1) * float(np.std(x, ddof=1)) / math.sqrt(k) if k > 1 else None
    return Mean(float(np.mean(x)), half)


def compare_means(first, other):
    """Is the method `other` better than `first`? Two bool arrays (runs, N) over the same rows, two
    runs or more of each method with different seeds: which rows each run got right.

    Both the seeds and the test rows are a sample, as in the Multi-Bootstrap of Sellam et al. 2021
    (arXiv 2106.16163), which with a few seeds gives too narrow an interval. Here the variances are
    added, s^2 / runs of either method's accuracies and that of the paired rows, and Welch's t test
    (1947) has the degrees of freedom of Welch and Satterthwaite. Slightly cautious: chance in a
    single row of a single run counts in both. Runs are not paired by seed: a seed does not make
    the runs of two methods alike."""
    mean, rows = rows_difference(other.mean(0) - first.mean(0))
    parts = [(runs.mean(1).var(ddof=1) / len(runs), len(runs) - 1) for runs in (first, other)]
    parts.append((rows, first.shape[1] + 1))
    variance = float(sum(v for v, _ in parts))
    df = variance**2 / sum(v**2 / f for v, f in parts)
    return dict(
        difference=float(other.mean() - first.mean()),
        ci95=difference_interval(mean, variance, t_quantile(df)),
        test=f'Welch t over seeds and rows, {df:.1f} df',
        p=t_tails(abs(mean) / math.sqrt(variance), df),
    )


def t_tails(t, df):
    """P(|T| > t) of Student's t with df degrees of freedom, whole or not."""
    return incomplete_beta(df / (df + t * t), df / 2, 0.5)


def t_quantile(df):
    """97.5 % quantile of Student's t with df >= 1 degrees of freedom, by bisection."""
    low, high = 0.0, 13.0  # 12.7 at df = 1
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tails(middle, df) > 0.05 else (low, middle)
    return high


def incomplete_beta(x, a, b):
    """Regularized incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22)."""
    if x <= 0:
        return 0.0
    if x > (a + 1) / (a + b + 2):  # there it converges slowly
        return 1 - incomplete_beta(1 - x, b, a)
    f = 1.0
    for m in range(40 + int(3 * math.sqrt(max(a, b))), 0, -1):  # from the inside
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        f = 1 + m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) / (1 + odd / f)
    log = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a)
    return math.exp(log - math.lgamma(b)) / a / (1 - (a + b) * x / ((a + 1) * f))
