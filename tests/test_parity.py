"""Both training scripts step for step beside transformers and peft."""

import torch

from tests.helpers import SMALL
from tests.parity import curve_differences


def check_curves(kind):
    """The same batches and weights, no dropout, float32: 50 steps of the script are 50 steps of
    transformers, peft and torch's AdamW."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for matrices this small two that wait for each other are slower
    try:
        for method, rate in (('full', 1e-3), ('lora', 3e-3)):  # so large that the weights go far
            loss, lr, way, losses = curve_differences(kind, method, SMALL, rate)
            assert loss < 1e-4 and lr < 1e-9 and way < 2e-4, (method, loss, lr, way)
            assert max(losses) - min(losses) > 0.02 * max(losses), (method, losses)  # it trains
    finally:
        torch.set_num_threads(threads)


def test_cls_loss_curve_equals_transformers():
    check_curves('cls')


def test_gen_loss_curve_equals_transformers():
    check_curves('gen')
