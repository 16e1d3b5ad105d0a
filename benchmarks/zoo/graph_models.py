"""Four graph networks of torch_geometric: messages are gathered and scattered along the nodes, channels pass."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import models

from zoo.case import Case


def graph(nodes: int = 20, edges: int = 60, features: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(nodes, features), torch.randint(nodes, (2, edges))


def network(kind: str, **options: Any) -> Case:
    """Return three layers of a kind; only the biases of the classes are no hidden parameters, so half must go."""
    make = partial(getattr(models, kind), 12, 32, 3, 5, **options)
    return Case(make, graph, left=0.5)


CASES: dict[str, Case] = {
    "gcn": network("GCN"),
    "graphsage": network("GraphSAGE"),
    "gat": network("GAT", heads=4),
    "gin": network("GIN", norm="batch_norm"),
}
