"""What every backend's linear_divergence is given: the two heads, and what is done with both."""

from typing import NamedTuple

from torch import Tensor

from fastpref.kernels.shard import Shard


class Side(NamedTuple):
    hidden: Tensor  # (M, H)
    weight: Tensor  # (V, H) in the dtype of hidden, or fp32: read in that of hidden
    bias: Tensor | None  # (V,)


class Form(NamedTuple):
    jsd_beta: float | None  # None: KL(p || q)
    softcap: float | None
    logit_scale: float
    workspace: int  # bytes for the buffers of a chunk
    most_rows: int  # of the weights; where the vocabulary is in parts, of the largest
    shard: Shard | None  # weights and biases are this process's rows of the vocabulary
