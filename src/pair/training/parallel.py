"""Several processes as one: plain data parallelism under ``torchrun``.

Each process holds the whole model and computes its slices of every batch; gradients are averaged
before the optimisers step, so all processes hold the same weights at all times. The gradients are
averaged by hand, in one buffer, because tasks call many methods of their module, which a
``DistributedDataParallel`` wrapper would not see.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

CPU = torch.device("cpu")
WAIT = timedelta(hours=3)  # the others wait while process 0 validates


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size``, working on ``device``."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


def join(device: str = "cpu") -> World:
    """Join the processes that ``torchrun`` started; alone where there are none.

    ``device``: "cpu", "cuda" (with several processes: one GPU each) or "cuda:1".
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("this torch sees no CUDA GPU: use --device cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:1") from error
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=chosen)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if chosen.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} has no GPU of its own: there are {torch.cuda.device_count()}"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=WAIT)
    return World(dist.get_rank(), size, chosen)


def leave(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def average_gradients(world: World, parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by the sum over the processes (each holds its share of the mean)."""
    if world.size == 1:
        return
    wanted = [p for p in parameters if p.requires_grad]
    for p in wanted:
        if p.grad is None:  # unused by this process's slices, perhaps not by another's
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in wanted if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


def average_buffers(world: World, module: nn.Module) -> None:
    """Running statistics (batch norm) become their mean over the processes."""
    if world.size == 1:
        return
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for buffer in (part.running_mean, part.running_var):
                if buffer is not None:
                    dist.all_reduce(buffer)
                    buffer.div_(world.size)


def total(world: World, value: Tensor) -> Tensor:
    """Sum of a scalar over the processes."""
    if world.size > 1:
        value = value.detach().clone()
        dist.all_reduce(value)
    return value


def check_equal(world: World, module: nn.Module) -> None:
    """Refuse to start from different weights (another seed, another file on another machine)."""
    if world.size == 1:
        return
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    found: list[str | None] = [None] * world.size
    dist.all_gather_object(found, digest.hexdigest())
    if len(set(found)) > 1:
        raise ValueError("the processes start from different weights: give all the same files")
