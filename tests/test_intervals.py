"""lib/intervals.py: intervals and tests, beside scipy and by simulation."""

import math

import numpy as np

from lib import intervals
from lib.intervals import compare, compare_means, mean_interval, t_quantile, t_tails, wilson
from lib.metrics import metrics
from tests.helpers import close, skip


def pair(a, b, rest=50):
    """compare() of two runs: a rows only the first got right, b only the other, rest both."""
    first = np.array([1] * a + [0] * b + [1] * rest, bool)
    return compare(first, np.array([0] * a + [1] * b + [1] * rest, bool))


def test_wilson_by_hand():
    z2 = 1.959963984540054**2
    assert close(wilson(195, 195), [195 / (195 + z2), 1])  # at 100 % its bound is n / (n + z^2)
    assert close(wilson(0, 195), [0, z2 / (195 + z2)])
    m = metrics(None, np.zeros(195, int), ['a', 'b'], pred=np.zeros(195, int))
    assert m['accuracy'] == 1 and close(m['ci95'], wilson(195, 195)) and m['ci95'][0] < 0.99
    assert close(wilson(1, 1), [1 / (1 + z2), 1])
    low, high = wilson(81, 263)  # Newcombe 1998, table I
    assert abs(low - 0.2553) < 1e-4 and abs(high - 0.3662) < 1e-4


def test_intervals_of_accuracy_hold_the_truth():
    rng = np.random.default_rng(0)
    for n, true in ((200, 0.8), (50, 0.97), (20, 0.5)):  # the bootstrap: 0.70 at 50 rows, 97 %
        found = [wilson(k, n) for k in rng.binomial(n, true, 2000).tolist()]
        inside = np.mean([low <= true <= high for low, high in found])
        assert 0.93 <= inside <= 0.985, (n, true, inside)
    again = [metrics(None, [0, 1, 1], ['a', 'b'], pred=[0, 1, 0])['ci95'] for _ in range(2)]
    assert again[0] == again[1]


def test_intervals_equal_scipy():
    try:
        from scipy import stats
    except ImportError:
        skip('scipy is not installed')
    for k, n in ((0, 1), (1, 1), (195, 195), (0, 7), (3, 10), (872, 900), (12345, 25000)):
        want = stats.binomtest(k, n).proportion_ci(method='wilson')
        assert close(wilson(k, n), [want.low, want.high]), (k, n)
    for df in (1, 1.3, 2, 3, 7.5, 29, 300, 1e5):
        assert close(t_quantile(df), stats.t.ppf(0.975, df), 1e-9), df
        for t in (0, 1e-3, 0.5, 1.7, 1.75, 3, 10, 30):
            want = 2 * stats.t.sf(t, df)
            assert abs(t_tails(t, df) - want) <= 1e-7 * want, (df, t)
    x = [0.97, 0.961, 0.978]
    low, high = stats.t.interval(0.95, 2, np.mean(x), stats.sem(x))
    mean, half = mean_interval(x)
    assert close([mean - half, mean + half], [low, high], 1e-9)
    assert close(pair(1, 9)['p'], stats.binomtest(1, 10).pvalue)
    assert close(pair(40, 60)['p'], stats.chi2.sf(19**2 / 100, 1), 1e-9)


def test_student_t_by_hand():
    for t in (0.3, 1.0, 12.706):  # closed forms: 1 degree of freedom is Cauchy's, 2 is algebraic
        assert close(t_tails(t, 1), 1 - 2 / math.pi * math.atan(t), 1e-11), t
        assert close(t_tails(t, 2), 1 - t / math.sqrt(2 + t * t), 1e-11), t
    assert t_tails(0, 5) == 1 and t_tails(1e200, 3) == 0
    table = {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 1e6: 1.960}
    assert all(abs(t_quantile(df) - want) < 6e-4 for df, want in table.items())
    mean, half = mean_interval([0.1, 0.2, 0.3])
    assert close(mean, 0.2) and close(half, t_quantile(2) * 0.1 / math.sqrt(3))
    assert mean_interval([0.5]) == (0.5, None) and mean_interval([0.5] * 3) == (0.5, 0.0)


def test_mcnemar():
    t = pair(1, 9)
    assert close(t['p'], 2 * (1 + 10) / 1024) and t['test'] == 'exact binomial'
    assert close(t['difference'], 8 / 60) and t['ci95'][0] < 8 / 60 < t['ci95'][1]
    assert (t['only_first_right'], t['only_other_right']) == (1, 9)
    assert pair(0, 0)['p'] == 1 and pair(5, 5)['p'] == 1 and close(pair(0, 6)['p'], 2 / 64)
    t = pair(121, 59)  # a textbook example
    assert t['test'] == 'chi-squared' and close(t['p'], 5.450e-6, 1e-3) and t['ci95'][1] < 0
    assert close(pair(40, 60)['p'], 0.0574, 1e-3)  # chi2 = 19^2 / 100 = 3.61
    assert pair(30, 30)['p'] == 1  # the correction must not turn 0 into 1 / 60


def test_paired_interval_at_the_extremes():
    """Where no row differs, or all do, the interval of the difference is no point."""
    t, half = (pair(0, 0, 195), intervals.Z * math.sqrt(2) / 197)
    assert close(t['ci95'], [-half, half]) and t['difference'] == 0
    t = pair(0, 20, 0)
    assert t['difference'] == 1 and t['ci95'][1] == 1 and 0.6 < t['ci95'][0] < 1
    rng = np.random.default_rng(1)
    for a, b in ((0.02, 0.05), (0.005, 0.005), (0.2, 0.1)):
        inside = []
        for na, nb, rest in rng.multinomial(200, [a, b, 1 - a - b], 500):
            low, high = pair(na, nb, rest)['ci95']
            inside.append(low <= b - a <= high)
        assert 0.92 <= np.mean(inside), (a, b, np.mean(inside))


def test_methods_compared_over_seeds_and_rows():
    """Two methods that are equal, three seeds each: at most about 5 % are called different. A test
    over the rows alone, as if the seeds were all there are, is wrong in more than a third."""
    rng, called, rows_alone = np.random.default_rng(0), [], []

    def runs(difficulty):  # seeds differ, rows differ, and each run has luck of its own
        luck = rng.normal(0, 0.5, (3, 1)) + rng.normal(0, 0.5, (3, 300))
        return difficulty + luck + rng.normal(0, 0.7, 300) > 0

    for _ in range(300):
        difficulty = rng.normal(1.5, 1.5, 300)
        first, other = runs(difficulty), runs(difficulty)
        t, d = compare_means(first, other), other.mean(0) - first.mean(0)
        called.append(t['p'] < 0.05)
        rows_alone.append(abs(d.mean()) > 1.96 * d.std() / math.sqrt(300))
        assert (t['p'] < 0.05) == (t['ci95'][0] > 0 or t['ci95'][1] < 0), t
    assert np.mean(called) < 0.09 and np.mean(rows_alone) > 0.33, np.mean([called, rows_alone], 1)


def test_methods_compared_at_the_extremes():
    y = np.ones((3, 100), bool)
    t = compare_means(y, y)  # nothing differs anywhere
    assert t['p'] == 1 and t['difference'] == 0 and t['ci95'][0] < -0.01 and t['ci95'][1] > 0.01
    t = compare_means(~y, y)
    assert t['difference'] == 1 and t['p'] < 1e-9 and t['ci95'][1] == 1
    worse = y.copy()
    worse[:, :20] = False
    assert compare_means(y, worse)['p'] < 1e-4 and compare_means(y, worse)['ci95'][1] < 0
