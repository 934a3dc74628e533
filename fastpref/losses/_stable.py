"""Functions whose slope keeps its precision in fp32 where autograd's own loses it."""

import torch
from torch import Tensor
from torch.nn import functional as F


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)); its slope is sigmoid(x) sigmoid(-x): autograd takes s (1 - s), 0 from x = 17 on."""
    return F.logsigmoid(x).exp()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)), x <= 0; at x = 0 it is -46, and its slope is finite."""
    # fp32 has room for 1 - exp(x) down to 1e-38, but not for the slope 1 / (1 - exp(x)) times another of its kind
    return torch.log(-torch.expm1(x.clamp(max=0)) + 1e-20)
