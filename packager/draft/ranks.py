"""The processes that train one head together: one, or several started by `torchrun`.

Each holds a shard of the parameters, gradients and optimizer moments (FSDP2, `fully_shard`), over NCCL where
there is CUDA and over gloo on CPUs, and computes its share of every batch. All must see the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packager.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def leads() -> bool:
    """Whether this process is the one that writes and speaks. Needs no torch."""
    return os.environ.get("RANK", "0") == "0"


def processes_here() -> int:
    """How many processes of this run share the machine. Needs no torch."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: Any = None
    """torch.distributed.device_mesh.DeviceMesh; None for a single process."""

    def shard(self, module: nn.Module) -> None:
        """Shard the parameters of `module` over the processes, as one unit; nothing for a single one."""
        if self.mesh is not None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(module, mesh=self.mesh)

    def reshard(self, module: nn.Module) -> None:
        """Make the parameters of `module` shards again after a forward that no backward follows."""
        if self.mesh is not None:
            from torch.distributed.fsdp import FSDPModule

            assert isinstance(module, FSDPModule)
            module.reshard()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes, in place."""
        if self.mesh is not None:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: int, what: str) -> None:
        """Raise BadInput unless all processes have the same `value`."""
        if self.mesh is None:
            return
        import torch

        bounds = torch.tensor([value, -value], device=self.device)
        import torch.distributed as dist

        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        if int(bounds[0]) != -int(bounds[1]):
            raise BadInput(
                f"the processes disagree about {what}: between {-int(bounds[1])} and {int(bounds[0])}",
                "All processes need the same work directory, on storage that they share.",
            )


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor, on the CPU. Every process must call it, in the same order."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()


def like(full: Tensor, model: Tensor) -> Tensor:
    """A copy of `full` on the device of `model` and sharded as it is."""
    if hasattr(model, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(model, DTensor)
        return distribute_tensor(full.to(model.device), model.device_mesh, model.placements)
    return full.to(model.device, copy=True)


def alone() -> Ranks:
    """A single process, on the first CUDA device if there is one."""
    import torch

    return Ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that `torchrun` started (WORLD_SIZE, RANK, LOCAL_RANK), else alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield alone()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(device, dist.get_rank(), size, init_device_mesh(device.type, (size,)))
        dist.barrier()  # nobody leaves while another still waits for it
    finally:
        dist.destroy_process_group()
