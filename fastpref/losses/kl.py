"""Estimators of KL(pi || ref) from sampled tokens, and the exponential that the policy losses use.

Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html). With r = ref / pi at a token drawn from
pi:  k1 = -log r,  k2 = (log r)^2 / 2,  k3 = r - 1 - log r.  k1 and k3 are unbiased in value, k2 and k3 never negative;
as a loss, only k2 has the gradient of KL in expectation when pi itself drew the tokens (that of k1 averages to 0).
"""

from collections.abc import Callable

from torch import Tensor

LIMIT = 20.0  # nats: exp(20) is 5e8


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x) up to LIMIT, its tangent beyond: a ratio of 200 nats stays finite, grows, and keeps its slope's sign."""
    capped = x.clamp(max=LIMIT)
    return capped.exp() * (1 + (x - capped))


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log pi - log ref."""
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2."""
    return 0.5 * (logps - ref_logps).square()


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi)."""
    log_ratio = ref_logps - logps
    capped = log_ratio.clamp(max=LIMIT)
    # expm1: near 0 the three terms cancel, and a 1 that was rounded away with exp would be most of what is left
    return capped.expm1() + capped.exp() * (log_ratio - capped) - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {f.__name__: f for f in (k1, k2, k3)}


def kl_estimator_named(fn: str, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if not isinstance(name, str) or name not in KL_ESTIMATORS:
        raise ValueError(f"{fn}: kl_estimator must be one of {', '.join(KL_ESTIMATORS)}; got {name!r}")
    return KL_ESTIMATORS[name]
