"""Several processes of one run, started by torchrun: which of them this one is, and what they
exchange. Called by the scripts and by all that writes files or sums over the ranks."""

import contextlib
import os
import re
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lib import cli, files
from lib.files import UserError

LOST = re.compile(  # what gloo and NCCL say when another process is gone
    r'connection (closed|reset|refused)|broken pipe|socket closed|remote process exited'
    r'|gloo.*(timed out|timeout)|nccl.*(timed out|timeout|aborted|remote)',
    re.IGNORECASE | re.DOTALL,
)


def under_torchrun(main):
    """-> main, run as one of the processes of torchrun if that started it. They share every batch
    and every evaluation (gloo on CPUs, NCCL between GPUs); only rank 0 prints and writes. If one
    dies, the next exchange of the others fails, and torchrun stops them."""

    def run():
        if not {'RANK', 'WORLD_SIZE', 'MASTER_ADDR'} <= set(os.environ):
            return main()
        local = int(os.environ.get('LOCAL_RANK', 0))
        gpu = torch.cuda.is_available() and torch.cuda.device_count() > local
        if gpu:
            torch.cuda.set_device(local)
        store, me, n = next(dist.rendezvous('env://'))
        backend = 'cpu:gloo,cuda:nccl' if gpu else 'gloo'
        dist.init_process_group(backend, store=store, rank=me, world_size=n)
        files.WRITES = me == 0
        if me:
            sys.stdout = open(os.devnull, 'w')
        try:
            code = cli.exit_code(main())
            wait_for_all(store, me, n)
        except KeyboardInterrupt:
            code = 130
        except (UserError, RuntimeError) as e:
            code = report(e, me)
        sys.stdout.flush()
        os._exit(code)  # threads of gloo and NCCL may abort a process that exits normally

    return run


def wait_for_all(store, me, n):
    """Wait for all ranks: a connection that closes early can break the last exchange of the others.
    Rank 0 hosts the store, so it leaves last."""
    for mark in ('done', 'leaving'):
        store.add(mark, 1)
        while store.add(mark, 0) < n and (mark == 'done' or me == 0):
            time.sleep(0.05)


def report(e, me):
    """Print the error that ends this rank. -> exit code. Raises e if it is a bug."""
    if not isinstance(e, UserError) and not LOST.search(str(e)):
        raise e
    if me or not isinstance(e, UserError):
        time.sleep(3)  # torchrun stops all at the first exit: the rank with the cause speaks first
    if not isinstance(e, UserError):
        first = str(e).splitlines()[0][:200]
        e = f'rank {me} has lost another process of this run; see the error of that one ({first})'
    print(f'error: {e}', file=sys.stderr)
    return 2


def world_size():
    """Number of processes that share this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Number of this process among them; rank 0 prints and writes."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(t):
    """Sum of the tensors of all ranks, on the CPU, to avoid a GPU synchronization."""
    if world_size() > 1:
        t = t.cpu()
        dist.all_reduce(t)
    return t


def barrier():
    """Wait until all ranks are here: what rank 0 wrote before is there for the others."""
    all_reduce(torch.zeros(1))


def any_rank(flag):
    """Is the flag true in any rank? The same answer in all of them."""
    return bool(all_reduce(torch.tensor(float(flag))))


def from_rank_zero(fn):
    """fn(), called in rank 0 alone -> its value, in all ranks."""
    if world_size() == 1:
        return fn()
    box = [fn() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def first_of_machine():
    """Run the body on local rank 0 first, then on the others, which find what it downloaded."""
    waits = world_size() > 1 and os.environ.get('LOCAL_RANK', '0') != '0'
    if waits:
        barrier()
    yield
    if not waits:
        barrier()


def wrap(model):
    """The model as the loop calls it: with several ranks its DistributedDataParallel, which
    averages their gradients during backward."""
    if world_size() == 1:
        return model
    device = model.wte.weight.device
    return DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)


def sync_gradients(net, last):
    """Context of a backward pass: ranks exchange gradients in the last one of a step only."""
    return contextlib.nullcontext() if last or world_size() == 1 else net.no_sync()


def rank_part(rows):
    """Rows of a step, sorted by length -> those of this rank, and the factor of their loss: the
    step is a sum, but DistributedDataParallel averages. A rank without rows takes one with factor
    0, since all ranks must take part in backward."""
    own = rows[rank() :: world_size()]
    return (own, float(world_size())) if len(own) else (rows[:1], 0.0)
