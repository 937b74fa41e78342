"""CUDA graphs for the training step (--cuda_graphs). Called by both train scripts."""

import torch

from lib import ranks
from lib.device import pick_device
from lib.files import UserError
from lib.tensors import unchanged

GRAPH_WIDTH = 8  # tokens; recorded batches are as wide as a multiple of it: fewer shapes to record


def check_device(args):
    """Raise UserError if --device is not there, or cannot run --cuda_graphs."""
    device = pick_device(args.device, args.dtype)[0]
    if args.cuda_graphs and device.type != 'cuda':
        raise UserError(f'--cuda_graphs needs a GPU, but this run is on {device}')
    others = {
        '--compile': args.compile,
        '--batch_tokens': args.batch_tokens,  # each batch has a shape of its own
        '--gradient_checkpointing': args.gradient_checkpointing,
        'several processes': ranks.world_size() > 1,
    }
    for name, used in others.items():
        if args.cuda_graphs and used:
            raise UserError(f'--cuda_graphs cannot be combined with {name}')


class Graphs:
    """graphs(scale, *batch) does `loss = fn(*batch) * scale; loss.backward()` and returns the loss.

    Each shape of the batch is recorded once as a CUDA graph and then replayed: a step of a small
    model is a thousand kernels of microseconds, which Python launches more slowly than a GPU runs
    them. A graph replays operations on fixed addresses, so inputs are copied there, gradients are
    accumulated in place (zero_grad(set_to_none=False)), and fn must not synchronize the GPU."""

    def __init__(self, fn, model, scaler, counts=()):
        """counts: tensors to which fn adds."""
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.fn, self.scaler, self.counts = fn, scaler, [*counts, *model.buffers()]
        self.recorded, self.pool = {}, None
        for p in self.params:
            p.grad = torch.zeros_like(p)

    def __call__(self, *inputs):  # tensors
        shapes = tuple(t.shape for t in inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = self.record([t.clone() for t in inputs])
        places, replay, loss = self.recorded[shapes]
        for place, t in zip(places, inputs):
            place.copy_(t)
        replay()
        return loss

    def once(self, scale, *batch):
        loss = self.fn(*batch) * scale
        self.scaler.scale(loss).backward()
        return loss.detach()

    def record(self, places):
        """-> (tensors for the inputs, function that replays, tensor of the loss). Leaves gradients,
        counts and the random state as they were."""
        kept = [p.grad for p in self.params] + self.counts
        with unchanged(kept), torch.random.fork_rng([t.device for t in places[:1] if t.is_cuda]):
            replay, loss = self.capture(places)
        return places, replay, loss

    def capture(self, places):
        """-> (function that replays, tensor of the loss). Warms up on a side stream first, as
        PyTorch's notes on CUDA semantics ask: that chooses kernels and allocates workspaces."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.once(*places)
        current.wait_stream(side)
        with torch.cuda.graph(graph, pool=self.pool):  # one pool: only one shape runs at a time
            loss = self.once(*places)
        self.pool = graph.pool()
        return graph.replay, loss
