"""The optimizer of a classifier, and its learning rate over epochs."""

from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from utils.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """SGD with momentum, or Adam, with the rates of `config`."""
    if config.client_optimizer == "adam":
        return Adam(model.parameters(), config.lr, weight_decay=config.wd)
    return SGD(model.parameters(), config.lr, config.sgd_momentum, weight_decay=config.wd)


def make_schedule(optimizer: Optimizer, config: TrainConfig) -> LRScheduler:
    """A cosine to 0 over all epochs, or constant; stepped once an epoch."""
    if config.lr_scheduler == "CosineAnnealingLR":
        return CosineAnnealingLR(optimizer, config.epochs)
    return LambdaLR(optimizer, lambda _: 1.0)
