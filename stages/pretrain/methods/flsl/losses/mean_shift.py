"""FLSL's clustering step: one step of mean-shift from a query to its mode, as attention without parameters.

Source: docs/methods.md#flsl-terms (Eq. 4 and 12).

Shape legend: B images, Q queries, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_shift(query_BQD: Tensor, tokens_BND: Tensor, temperature: float) -> Tensor:
    """The modes softmax(temperature * q Z^T) Z of the queries q among the tokens Z: (B, Q, D).

    With the tokens of the query's own view this is FLSL's self-attention, with those of another view its
    cross-attention. Nothing is l2-normalised, and both queries and tokens get a gradient. `temperature` multiplies, as
    in the paper: it is the inverse of a temperature.
    """
    return torch.bmm(attend(query_BQD, tokens_BND, temperature), tokens_BND)


def attend(query_BQD: Tensor, tokens_BND: Tensor, temperature: float) -> Tensor:
    """The attention of queries to tokens, softmax(temperature * q Z^T): (B, Q, N)."""
    return torch.softmax(temperature * torch.bmm(query_BQD, tokens_BND.transpose(1, 2)), dim=-1)


def sharpened(attention_BQN: Tensor, sharpness: float) -> Tensor:
    """A soft mask of the tokens that a query attends to more than to the average one; rows sum to 1."""
    mean_BQ1 = attention_BQN.mean(dim=-1, keepdim=True)
    return _rows_to_one(torch.sigmoid(sharpness * (attention_BQN - mean_BQ1)))


def mixed(attention_BQN: Tensor, previous_BQN: Tensor, share: float) -> Tensor:
    """The attention with weight `share`, plus an earlier teacher's with weight 1 - share; rows sum to 1."""
    return _rows_to_one(share * attention_BQN + (1 - share) * previous_BQN)


def _rows_to_one(weights_BQN: Tensor) -> Tensor:
    return weights_BQN / weights_BQN.sum(dim=-1, keepdim=True)
