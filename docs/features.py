"""Log P(text | class) of a generative run as features of logistic regression, beside tau and b_c.

    python docs/features.py RUN...

Both are fitted on the run's validation rows and scored on its test rows. tau and b_c are K + 1
numbers, the regression has K (K + 1) (EACL Findings 2024.74)."""

import os
import sys

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if TOP not in sys.path:
    sys.path.insert(0, TOP)

import torch
import torch.nn.functional as F

from lib import cli
from lib.metrics import metrics, run_metrics
from lib.rundata import own_data
from lib.runs import open_run


def regression(x, y, k, decay=1e-3):
    """Multinomial logistic regression with L2 decay: x (N, D) standardized here, y (N,)
    -> function of rows (M, D) that returns probabilities (M, k)"""
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y)
    mean, std = x.mean(0), x.std(0) + 1e-9
    W = torch.zeros(x.shape[1] + 1, k, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([W], max_iter=200, line_search_fn='strong_wolfe')

    def logits(rows):
        z = (torch.as_tensor(rows).double() - mean) / std
        return F.pad(z, (0, 1), value=1.0) @ W

    def loss():
        opt.zero_grad()
        value = F.cross_entropy(logits(x), y) + decay * W[:-1].square().sum()
        value.backward()
        return value

    opt.step(loss)
    return lambda rows: logits(rows).softmax(1).detach().numpy()


def main(argv=None):
    p = cli.Parser(description=__doc__, prog='features.py')
    p.add_argument('runs', nargs='+', metavar='RUN', help='generative runs')
    for path in p.parse(argv)[0].runs:
        run = open_run(path)
        ds = own_data(run.info)
        val, test = (run.logits(rows.texts) for rows in (ds.val, ds.test))  # (N, K) nats
        found = {}
        for run.rule, name in (('bayes', "Bayes' rule"), ('calibrated', 'tau and b_c')):
            found[name] = run_metrics(run, test, ds.test.y, ds.labels)[0]
        probs = regression(val, ds.val.y, len(ds.labels))(test)
        found['regression'] = metrics(probs, ds.test.y, ds.labels)
        for name, m in found.items():
            print(f'{path}  {name:12} accuracy {m["accuracy"]:.4f}  nll {m["nll"]:.4f}  ', end='')
            print(f'ece {m["ece"]:.4f}')


if __name__ == '__main__':
    cli.run(main)
