"""Dropout on a CPU, drawn by the gaps between the dropped values. Called by lib/packed.py."""

import math

import numpy as np
import torch
import torch.nn.functional as F


def generator():
    """numpy's random numbers, seeded by torch's."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    return np.random.Generator(np.random.SFC64(seed))


def dropped(n, p, rng=None):
    """Positions of the values that dropout with probability p drops among n, ascending, int64.
    bernoulli_ draws one number per value on a CPU; the gaps between dropped values are geometric,
    so one draw per dropped value is enough: floor(log(u) / log(1 - p)), u uniform."""
    rng, parts, last = rng or generator(), [], -1
    while last < n:  # nearly always once
        size = int(n * p + 6 * math.sqrt(n * p)) + 16
        bits = rng.bit_generator.random_raw((size + 1) // 2).view(np.uint32)
        u = torch.from_numpy(bits.astype(np.float32)).add_(0.5).mul_(2.0**-32)  # never 0
        gaps = u.log_().mul_(1 / math.log1p(-p)).long().add_(1)
        gaps[0] += last
        parts.append(gaps.cumsum(0))
        last = int(parts[-1][-1])
    positions = torch.cat(parts) if len(parts) > 1 else parts[0]
    return positions[: int(torch.searchsorted(positions, n))]


class Dropout(torch.autograd.Function):
    """F.dropout(x, p) in training, on a CPU."""

    @staticmethod
    def forward(ctx, x, p):
        positions = dropped(x.numel(), p)
        ctx.p = p
        ctx.save_for_backward(positions)
        return Dropout.masked(x, p, positions)

    @staticmethod
    def backward(ctx, g):
        return Dropout.masked(g, ctx.p, *ctx.saved_tensors), None

    @staticmethod
    def masked(x, p, positions):
        return (x.reshape(-1) * (1 / (1 - p))).index_fill_(0, positions, 0).view(x.shape)


def dropout(x, p):
    """F.dropout(x, p) in training."""
    return Dropout.apply(x, p) if x.device.type == 'cpu' else F.dropout(x, p)
