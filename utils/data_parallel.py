"""One training in several processes: each has its rows of a batch, gradients are averaged."""

import torch
import torch.distributed
from torch import Tensor, nn

from utils.processes import rank, world_size


def data_parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """`network` with gradients averaged over the processes of a job; itself where there is one."""
    if world_size() == 1:
        return network
    own = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=own)


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes of a job."""
    torch.distributed.all_reduce(value := value.clone())
    return value / world_size()


def local_rows(batch: Tensor) -> Tensor:
    """This process's rows of a batch that all processes hold."""
    return batch[rank() :: world_size()]
