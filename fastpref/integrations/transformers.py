"""A transformers causal LM whose own forward computes losses.

A loss computed outside `model(...)` misses what happens around that call: DDP does not see the gradients of
the backbone, FSDP2 has the head sharded again, autocast is off. So the head runs inside:

    model(input_ids, ..., head=fn)  ->  base model  ->  lm_head(hidden, head=fn)  ->  fn(hidden, weight, **options)

Both hops are ordinary module calls: whoever hooks the model or its head (DDP, FSDP2, ZeRO-3, PEFT's saved
modules) has its hooks run, and the weight is whole when fn reads it. The model and its `lm_head` become
subclasses of their classes, not wrappers, so parameter names, checkpoints and `isinstance` stay as they are.

Nothing here imports transformers.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastpref.integrations._lm_head import FusedLinear, call_head, is_sharded, why_not_low_rank

Model = TypeVar("Model", bound=nn.Module)

# config attribute -> power at which it multiplies the logits
SCALES = {"logit_scale": 1, "output_multiplier": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class HeadOutput(NamedTuple):
    """What `head` returned, and the router loss of a mixture of experts: `aux_loss`, 0-d, not yet weighted."""

    result: Any
    aux_loss: Tensor


def fused_lm_head(model: Model) -> Model:
    """The same model, changed in place: `model(..., head=fn)` returns fn(hidden, weight, **options) of its own forward.

        model = fused_lm_head(AutoModelForCausalLM.from_pretrained(name))
        targets = torch.where(completion_mask, input_ids, -100).roll(-1, dims=1)  # chosen first, then rejected
        targets[:, -1] = -100
        head = partial(linear_preference_loss, targets=targets, ref_logps=ref_logps)
        model(input_ids=input_ids, attention_mask=attention_mask, head=head).loss.backward()

    hidden is (B, T, H), the input of the LM head; weight is (V, H). options are those of the model's logits, where it
    has them: `bias` (V,), `logit_scale` and `softcap`, so that softcap(logit_scale * (hidden @ weight.T + bias)) are
    its logits; the `linear_*` functions take all three. Without `head` the model does what it did, bit for bit.

    A head that a tensor-parallel plan has split over the vocabulary is not gathered: weight and bias are this process's
    rows, and `process_group`, which the `linear_*` functions take as well, is among the options. A head under LoRA
    comes as [hidden, scaling * hidden A^T] and a copy of [weight, B], made for the call: to a loss it is a trained
    head, and 2 V H bytes the dearer in 16 bits, though A and B alone get gradients.

    A mixture of experts asked for its router loss (`output_router_logits`, as an argument or in its config) returns
    HeadOutput(result, aux_loss); add `router_aux_loss_coef * aux_loss` to the loss, as the model does under `labels`.

    `use_cache` is False under `head` unless given. fn should return a tensor, or tuples, named tuples or dicts of them:
    DDP with a static graph looks for gradients in nothing else. Tensors that fn closes over are neither moved nor cast
    by who wraps the model.

    Call it before DDP, FSDP2 or accelerate wrap the model; before or after PEFT does. Calling it again does nothing,
    unless the head was replaced in between (`resize_token_embeddings`), which makes it needed.

    Args:
        model: a transformers causal LM whose logits are an nn.Linear of its base model's last hidden state, or a
            PeftModel around one. That nothing else happens to the logits is checked by running both ways
            on four tokens; parameters that are on the meta device or sharded cannot be run, and are not checked.
    Raises:
        TypeError: not a causal LM of transformers.
        ValueError: the logits are something else; `forward` was replaced on the instance, so that nobody would call
            ours; the LM head carries an adapter that is more than a term of low rank (DoRA).
        At the call, TypeError: head is not callable, or comes with `labels` or `logits_to_keep`.
    """
    whole: Any = model
    causal_lm = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    wanted = "a transformers causal LM or a PeftModel around one, not yet wrapped by DDP, FSDP1 or torch.compile"
    if not all(hasattr(causal_lm, name) for name in ("get_output_embeddings", "base_model", "config")):
        raise TypeError(f"fused_lm_head: model must be {wanted}; got {type(causal_lm).__name__}")
    name = type(causal_lm).__name__
    if (
        causal_lm.get_output_embeddings() is None
        or causal_lm.config.is_encoder_decoder
        or decoder_of(causal_lm) is causal_lm
    ):
        raise ValueError(f"fused_lm_head: model must be {wanted}; got {name}, which is not a decoder under an LM head")
    if "forward" in vars(causal_lm):
        raise ValueError(
            f"fused_lm_head: the forward of {name} was replaced on the instance (accelerate and Liger do that); "
            "call fused_lm_head before them"
        )
    linears = _linears(causal_lm)
    if not hasattr(causal_lm, "_fused_from"):
        if not any(p.is_meta or p.numel() == 0 or type(p).__name__ == "DTensor" for p in causal_lm.parameters()):
            _check_logits(causal_lm)
        causal_lm.__class__ = _fused_class(causal_lm.__class__)
    for linear in linears:
        if not isinstance(linear, FusedLinear):
            linear.__class__ = FusedLinear
    return model


def decoder_of(causal_lm: Any) -> Any:
    """What the LM head stands on; the model itself if nothing else is found."""
    base = causal_lm.base_model
    # Llama 4's prefix names a module that its text model has not
    return getattr(causal_lm, "model", base) if base is causal_lm else base


def _linears(model: Any) -> list[nn.Module]:
    """The head of a causal LM as the linear layers it may run: one, or PEFT's copies; an error if it is neither."""
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer"):
        if reason := why_not_low_rank(head):
            raise ValueError(
                f"fused_lm_head: the LM head of {type(model).__name__} {reason}, so that its output is not that of a "
                "linear layer; leave it out of target_modules, or train it whole by modules_to_save"
            )
        head = head.base_layer
    copies = getattr(head, "modules_to_save", None)
    linears = [head] if copies is None else [head.original_module, *copies.values()]
    for linear in linears:
        replaced = "forward" in vars(linear) and not is_sharded(linear)  # by a tensor-parallel plan, which is known
        if not isinstance(linear, FusedLinear) and (type(linear) is not nn.Linear or replaced):
            raise ValueError(
                f"fused_lm_head: the LM head of {type(model).__name__} must be an nn.Linear with its own forward; "
                f"got {type(linear).__name__}"
            )
    return linears


def _head_options(model: Any) -> dict[str, float]:
    """logit_scale and softcap of a model's logits, those that its config has."""
    config = model.config.get_text_config()
    options: dict[str, float] = {}
    for name, power in SCALES.items():
        if getattr(config, name, None) is not None:
            options["logit_scale"] = options.get("logit_scale", 1.0) * float(getattr(config, name)) ** power
    for name in SOFTCAPS:
        if getattr(config, name, None) is not None:
            options["softcap"] = float(getattr(config, name))
    return options


@functools.cache
def _fused_class(cls: Any) -> Any:
    """A subclass of a causal LM's class whose forward knows `head`; the same one for every model of that class."""
    original = cls.forward
    signature = inspect.signature(original)
    positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    defaults = {"use_cache": False} if "use_cache" in positional else {}
    # the very function that the model's own forward calls
    router_loss = inspect.unwrap(original).__globals__.get("load_balancing_loss_func")

    def forward(self: Any, *args: Any, head: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if head is None:
            return original(self, *args, **kwargs)
        named = dict(zip(positional, args, strict=False))
        if len(named) < len(args) or named.keys() & kwargs.keys():
            raise TypeError(f"{cls.__name__}.forward: too many arguments, or one given twice; it takes {signature}")
        # PEFT passes every argument it knows, as None
        given = {key: value for key, value in (named | kwargs).items() if value is not None}
        return _forward_with_head(self, head, router_loss, defaults | given)

    # transformers, Trainer and PEFT read the signature. No __wrapped__: accelerate's unwrap_model follows it to the
    # innermost function and installs that one, which would swallow `head`
    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    body = {"forward": forward, "__reduce_ex__": _reduce, "_fused_from": cls}
    # the name stays: it is written into config.json as the architecture
    return type(
        cls.__name__, (cls,), body | {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    )


def _reduce(model: Any, protocol: int) -> tuple[Any, ...]:
    """pickle and deepcopy: they cannot name a class made at run time, so name the one it was made from."""
    state = object.__reduce_ex__(model, protocol)[2:]
    return (_empty, (model._fused_from,), *state)


def _empty(cls: Any) -> Any:
    fused = _fused_class(cls)
    return fused.__new__(fused)


def _forward_with_head(model: Any, head: Callable[..., Any], router_loss: Any, kwargs: dict[str, Any]) -> Any:
    name = f"{type(model).__name__}.forward"
    if not callable(head):
        raise TypeError(f"{name}: head must be a function of (hidden, weight, **options); got {type(head).__name__}")
    kwargs.pop("return_dict", None)  # what head returns is returned as it is
    if "labels" in kwargs:
        raise TypeError(f"{name}: labels cannot be given with head; let head close over its targets, already shifted")
    keep = kwargs.pop("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep != 0:
        raise TypeError(f"{name}: logits_to_keep cannot be given with head; head skips targets that are -100")
    # both may have come since: an adapter by PEFT, a plain head by resize_token_embeddings
    if not all(isinstance(linear, FusedLinear) for linear in _linears(model)):
        raise ValueError(f"{name}: the LM head was replaced after fused_lm_head(model); call fused_lm_head again")
    aux_by_default = getattr(model.config.get_text_config(), "output_router_logits", False)
    wants_aux = kwargs.get("output_router_logits", aux_by_default)
    if wants_aux:
        if router_loss is None or not hasattr(model, "num_experts_per_tok"):
            raise ValueError(
                f"{name}: output_router_logits with head wants a model whose router loss is "
                "load_balancing_loss_func(router_logits, num_experts, num_experts_per_tok, attention_mask)"
            )
        kwargs["output_router_logits"] = True

    outputs = decoder_of(model)(**kwargs)
    result = call_head(model.get_output_embeddings(), outputs[0], head, _head_options(model))
    if not wants_aux:
        return result
    mask = kwargs.get("attention_mask")
    return HeadOutput(result, router_loss(outputs.router_logits, model.num_experts, model.num_experts_per_tok, mask))


def _probe_logits(vocab_size: int, device: torch.device) -> Tensor:
    """(V,) logits in [-100, 100]: far enough apart that any softcap in use shows."""
    return torch.linspace(-100, 100, vocab_size, device=device)


@torch.no_grad()
def _check_logits(model: Any) -> None:
    """Raise unless the model's logits are the known function of its base model's last hidden state.

    Two things are compared on four tokens: what reaches the LM head in the model's own forward with what the base
    model returns; and what becomes of known logits on their way from the LM head to the output with the options.
    """
    lm_head = model.get_output_embeddings()
    seen = []

    def replace_logits(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        seen.append(args[0])
        return _probe_logits(logits.shape[-1], logits.device).to(logits.dtype).expand_as(logits)

    training = [module for module in model.modules() if module.training]
    hook = lm_head.register_forward_hook(replace_logits)
    try:
        model.eval()
        embedding = model.get_input_embeddings().weight
        input_ids = torch.arange(4, device=embedding.device)[None] % embedding.shape[0]
        # a fresh cache is no part of the answer, and some models cannot make one outside generate()
        no_cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        output = model(input_ids=input_ids, **no_cache)
        # a model output may begin with a loss (the routers'); a plain tuple begins with the logits
        logits = output.logits if hasattr(output, "logits") else output[0]
        hidden = decoder_of(model)(input_ids=input_ids, **no_cache)[0]
    finally:
        hook.remove()
        for module in training:
            module.training = True

    options = _head_options(model)
    eps = max(torch.finfo(x.dtype).eps for x in (*seen, hidden, logits))
    expected = _probe_logits(logits.shape[-1], logits.device) * options.get("logit_scale", 1.0)
    if "softcap" in options:
        expected = options["softcap"] * torch.tanh(expected / options["softcap"])
    if len(seen) != 1 or seen[0].shape != hidden.shape or not _close(seen[0], hidden, eps):
        what = "what reaches its LM head is not its base model's last hidden state"
    elif not _close(logits, expected.expand_as(logits), eps):
        what = f"its logits are not its LM head's with the options in its config ({options or 'none'})"
    else:
        return
    formula = "softcap(logit_scale * (hidden @ weight.T + bias))"
    raise ValueError(f"fused_lm_head: the logits of {type(model).__name__} must be {formula}; {what}")


def _close(actual: Tensor, expected: Tensor, eps: float) -> bool:
    # the same operations twice: a few roundings apart at most, as where experts add up in another order
    error = (actual.float() - expected.float()).abs().max()
    return bool(error <= max(1e-4, 4 * eps) * expected.float().abs().max())
