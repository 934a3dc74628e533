"""What FSDP2 spreads over the processes, made whole for a checkpoint; without FSDP2, what is there already.

Under FSDP2 every process calls these, though one of them writes.
"""

from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole_weights(accelerator: Accelerator, model: Any) -> dict[str, Tensor] | None:
    """The weights for `save_pretrained(folder, state_dict=...)`; None: those that the model holds."""
    if not accelerator.is_fsdp2:
        return None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = model.state_dict()
    wholes: dict[int, Tensor] = {}
    weights = {}
    for name, tensor in state.items():
        owner = id(parameters.get(name, tensor))  # tied weights stay one tensor: they are then saved once
        if owner not in wholes:
            whole = _whole(tensor)
            wholes[owner] = whole if accelerator.is_main_process else tensor
        weights[name] = wholes[owner]
    return weights


class WholeOptimizer:
    """The state_dict of an optimizer whose state is sharded, as if it were not."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer.optimizer  # without accelerate's wrapper

    def state_dict(self) -> dict[str, Any]:
        state = self._optimizer.state_dict()
        of_parameters = {i: {key: _whole(x) for key, x in found.items()} for i, found in state["state"].items()}
        return {**state, "state": of_parameters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        of_parameters = {
            i: {key: _like(x, parameters[i]) for key, x in found.items()} for i, found in state["state"].items()
        }
        self._optimizer.load_state_dict({**state, "state": of_parameters})


def _whole(x: Any) -> Any:
    return x.full_tensor().cpu() if isinstance(x, DTensor) else x


def _like(x: Any, parameter: Tensor) -> Any:
    """x in parts, as the parameter is; what has another shape (a count of steps) stays as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(x, Tensor) or x.shape != parameter.shape:
        return x
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements)
