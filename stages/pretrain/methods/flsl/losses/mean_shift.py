"""FLSL's clustering step: a query's mean-shift mode, as attention without parameters
(docs/methods.md#flsl-terms, Eq. 4 and 12).

Shape legend: B images, Q queries, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_shift(query_BQD: Tensor, tokens_BND: Tensor, temperature: float) -> Tensor:
    """The modes softmax(temperature * q Z^T) Z of the queries among the tokens: (B, Q, D).

    With a view's own tokens this is FLSL's self-attention, with another view's its cross-attention. Nothing is
    l2-normalised; the gradient goes to queries and tokens. `temperature` multiplies: it is an inverse temperature.
    """
    return torch.bmm(attend(query_BQD, tokens_BND, temperature), tokens_BND)


def attend(query_BQD: Tensor, tokens_BND: Tensor, temperature: float) -> Tensor:
    """softmax(temperature * q Z^T), (B, Q, N)."""
    return torch.softmax(temperature * torch.bmm(query_BQD, tokens_BND.transpose(1, 2)), dim=-1)


def sharpened(attention_BQN: Tensor, sharpness: float) -> Tensor:
    """A soft mask of the tokens that a query attends to more than on average, rows summing to 1 (multi-stage)."""
    mean_BQ1 = attention_BQN.mean(dim=-1, keepdim=True)
    return _rows_to_one(torch.sigmoid(sharpness * (attention_BQN - mean_BQ1)))


def mixed(attention_BQN: Tensor, previous_BQN: Tensor, share: float) -> Tensor:
    """`share` of the present attention and the rest of an earlier stage's, rows summing to 1."""
    return _rows_to_one(share * attention_BQN + (1 - share) * previous_BQN)


def _rows_to_one(weights_BQN: Tensor) -> Tensor:
    return weights_BQN / weights_BQN.sum(dim=-1, keepdim=True)
