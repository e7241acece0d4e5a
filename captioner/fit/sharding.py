"""Each process holds a part of every parameter (FSDP, Zhao et al. 2023, arXiv 2304.11277)."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from captioner.processes import is_main, world_size

if TYPE_CHECKING:
    from captioner.models.model import Captioner


@contextmanager
def sharded(captioner: Captioner, device: str, bfloat16: bool) -> Generator[None, None, None]:
    """In the body each rank holds a part of every parameter; a layer is whole only while it runs.

    ``device`` is the kind of device to train on; the model may be on the CPU. Computes in ``bfloat16`` where
    asked. After it rank 0 has the whole model on the CPU, the others one without weights.
    """
    model = captioner.model
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    whole = copy.deepcopy(model, empty)  # torch cannot undo fully_shard on a model
    mesh = init_device_mesh(device, (world_size(),))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if bfloat16 else MixedPrecisionPolicy()
    for part in (*captioner.layers["vision"], *captioner.layers["language"], model):
        # the root, too, after a forward: `parameters()` gives the parts whenever it is asked
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # accelerate would wrap it for DDP; its own FSDP does not run on the CPU
    model._is_accelerate_prepared = True
    yield
    state = gathered(model.named_parameters())
    for name, parameter in whole.named_parameters():
        if is_main():
            torch.utils.swap_tensors(parameter, nn.Parameter(state[name], parameter.requires_grad))
    captioner.model = whole


def gathered(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name; what is sharded is whole on rank 0, in its memory, and empty on the others.

    All ranks have to ask.
    """
    found = {}
    for name, tensor in tensors:
        if isinstance(tensor, DTensor):
            full = tensor.full_tensor().detach()
            found[name] = full.cpu() if is_main() else full.new_empty(0)
        else:
            found[name] = tensor.detach()
    return found


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, sharded as ``like`` is if it is."""
    if not isinstance(like, DTensor):
        return tensor
    on = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(on, like.device_mesh, like.placements, src_data_rank=None)
