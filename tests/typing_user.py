"""A user's code as mypy sees it in ``make lint``: functions that return the model they were given keep its type."""

from typing import Any

from torch import Tensor, nn

import pyprune
import pyprune.torch_prune as torch_prune
from pyprune import Method, granularity, importance, schedules, scope


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(batch).sum()
    return loss


def keeps_the_type(net: Net, batches: list[Tensor], config: dict[str, Any]) -> Net:
    method = Method(importance.magnitude(), granularity.channel(), scope.model())
    net = pyprune.prune(net, method, ratio=schedules.cubic(0.5, start=0, end=10)(10))
    net = pyprune.snip(net, batches, ratio=0.5, loss_fn=loss_fn)
    net = pyprune.batch_norm_adaptation(net, batches)
    net = pyprune.load_from_config(net, config)
    layer: nn.Linear = torch_prune.l1_unstructured(net.layer, "weight", 0.5)
    layer = torch_prune.remove(layer, "weight")
    return pyprune.strip(net)
