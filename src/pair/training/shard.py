"""Models too large for one GPU: weights, gradients and moments cut into pieces (FSDP).

Each process holds a piece of every weight and fetches the rest of a block while it computes it.
What is written to disk is always whole, so a run may go on with or without sharding, and on
another number of GPUs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from pair.training.parallel import World


def shard(world: World, module: nn.Module) -> None:
    """Cut the weights of ``module`` in place: block by block, then what is left.

    Blocks are the members of the module lists of ``module``; it must be used by calling it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in list(module.children()):
        for block in part if isinstance(part, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _is_piece(value: Any) -> bool:
    """Whether a tensor is cut. What cuts tensors is slow to import: where it is not, none is."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(value, known.DTensor)


def whole(tree: Any) -> Any:
    """A copy of nested dicts and lists with every piece made whole; all processes must call."""
    if _is_piece(tree):
        return tree.full_tensor().detach().cpu()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree


def piece(value: Any, like: Any) -> Any:
    """This process's piece of a whole tensor, cut as ``like`` is; other values as they are."""
    if not _is_piece(like) or not isinstance(value, Tensor) or value.ndim != like.ndim:
        return value
    from torch.distributed.tensor import distribute_tensor

    there = value.to(like.device, like.dtype)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def load_weights(module: nn.Module, state: dict[str, Tensor]) -> None:
    """``load_state_dict`` of whole weights into a module that may be cut."""
    own = module.state_dict()
    module.load_state_dict({k: piece(v, own[k]) if k in own else v for k, v in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    """``load_state_dict`` of a whole optimiser, whose parameters may be cut."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {
            key: piece(value, parameters[number]) if number < len(parameters) else value
            for key, value in entry.items()
        }
        for number, entry in kept["state"].items()
    }
    optimizer.load_state_dict({**kept, "state": state})
