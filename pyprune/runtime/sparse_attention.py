"""`nn.MultiheadAttention` whose projection of queries, keys and values is packed."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.ops.sparse_linear import sparse_linear_unchecked
from pyprune.runtime.sparse_layer import SparseLayer


class SparseMultiheadAttention(SparseLayer, nn.MultiheadAttention):
    """An `nn.MultiheadAttention` that attends to its own input by a packed projection, in evaluation.

    Called otherwise, it computes what the dense module does, by a dense weight that is made anew.
    """

    packed_name = "in_proj_weight"
    in_proj_weight = property(SparseLayer.dense)

    def shape(self) -> tuple[int, int]:
        """Return outputs and inputs."""
        return 3 * self.embed_dim, self.embed_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `nn.MultiheadAttention` does."""
        if not attends_itself(self, query, key, value) or (is_causal and attn_mask is None):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        x = query.unsqueeze(0) if query.dim() == 2 else query if self.batch_first else query.transpose(0, 1)
        batch, length, _ = x.shape
        projected = sparse_linear_unchecked(x, self.packed(), self.in_proj_bias)
        q, k, v = projected.view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self._mask(attn_mask, key_padding_mask, batch, x)
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if query.dim() == 2 else weights
        else:
            attended = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        output = self.out_proj(attended.transpose(1, 2).reshape(batch, length, self.embed_dim))
        if query.dim() == 2:
            return output.squeeze(0), weights
        return output if self.batch_first else output.transpose(0, 1), weights

    def _mask(self, mask: Tensor | None, padding: Tensor | None, batch: int, like: Tensor) -> Tensor | None:
        """Return what is added to scores (batch, heads, queries, keys); bool masks say what is left out."""
        found = []
        if mask is not None:
            found.append(mask if mask.dim() == 2 else mask.view(batch, self.num_heads, *mask.shape[1:]))
        if padding is not None:
            found.append(padding.view(batch, 1, 1, -1))
        sums = [
            torch.zeros_like(one, dtype=like.dtype).masked_fill_(one, -math.inf) if one.dtype is torch.bool else one
            for one in found
        ]
        return None if not sums else sums[0] if len(sums) == 1 else sums[0] + sums[1]


def attends_itself(module: nn.MultiheadAttention, query: Any, key: Any, value: Any) -> bool:
    """Whether a call is one that packed projections are for: queries, keys and values of one dense input."""
    more = module.bias_k is not None or module.add_zero_attn or module.training
    return query is key and key is value and not more and not query.is_nested
