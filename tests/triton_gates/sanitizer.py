"""A sanitizer on Triton's interpreter: `with sanitized(): launch()` raises Fault for what a GPU would do in silence.

    out of bounds   a lane that is not masked addresses nothing of any tensor argument; a view ends where the view ends
    poison          a masked load without `other` gives NaN, where a GPU gives what is in the register
    race            an address that one program stores and another loads, stores or adds to
    order           programs run last to first if asked: a result that depends on it is a race, whatever the values

Fresh memory is NaN if torch.utils.deterministic.fill_uninitialized_memory is on, as tests/conftest.py has it.
"""

from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder


class Fault(AssertionError):
    pass


class _Launch:
    """What the programs of one launch have touched."""

    def __init__(self):
        self.spans, self.touched, self.program = {}, [], 0

    def add_argument(self, name, value):
        if torch.is_tensor(value):
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            size = (last + 1) * value.element_size() if value.numel() else 0
            self.spans[name] = (value.data_ptr(), value.data_ptr() + size)

    def touch(self, kind, pointers, mask):
        address = np.asarray(pointers.data)
        if mask is not None:
            address = address[np.broadcast_to(mask.data, address.shape).astype(bool)]
        address, width = address.ravel().astype(np.int64), pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(address.shape, bool)
        for low, high in self.spans.values():
            inside |= (address >= low) & (address + width <= high)
        if not inside.all():
            first = int(address[~inside][0])
            name = min(self.spans, key=lambda name: min(abs(first - end) for end in self.spans[name]))
            low, high = self.spans[name]
            raise Fault(
                f"out of bounds: {kind} of {int((~inside).sum())} element(s) by program {self.program}; the first is "
                f"byte {first - low:+d} of `{name}`, which has {high - low}"
            )
        if address.size:
            self.touched.append((self.program, kind, np.unique(address)))

    def finish(self):
        stored = [address for _, kind, address in self.touched if kind == "store"]
        if not stored:
            return
        stored = np.unique(np.concatenate(stored))
        address = np.concatenate([address for *_, address in self.touched])
        program = np.concatenate([np.full(address.size, program) for program, _, address in self.touched])
        keep = np.isin(address, stored)
        order = np.lexsort((program[keep], address[keep]))
        address, program = address[keep][order], program[keep][order]
        clash = (address[1:] == address[:-1]) & (program[1:] != program[:-1])
        if clash.any():
            at = address[1:][clash][0]
            name = next((name for name, (low, high) in self.spans.items() if low <= at < high), "?")
            raise Fault(
                f"race: {int(clash.sum())} address(es), one of `{name}`, stored by one program and touched by another "
                f"({program[:-1][clash][0]} and {program[1:][clash][0]})"
            )


def _poison(pointers):
    """NaN, in the interpreter's own representation."""
    kind = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(kind)
    bits = 0x7FC0 if kind == tl.bfloat16 else np.nan
    return interpreter.TensorHandle(np.full(pointers.data.shape, bits, dtype), kind)


@contextmanager
def sanitized(reverse=False):
    """Checks every launch inside."""
    names = "create_load create_store create_masked_load create_masked_store create_atomic_rmw create_atomic_cas"
    saved = {name: getattr(Builder, name) for name in [*names.split(), "set_grid_idx"]}
    execute, launch = interpreter.GridExecutor.__call__, _Launch()

    def everywhere(pointers):
        return interpreter.TensorHandle(np.ones_like(pointers.data, dtype=bool), tl.int1)

    def masked_load(self, pointers, mask, other, *rest, **named):
        launch.touch("load", pointers, mask)
        if other is None and mask is not None and pointers.get_element_ty().is_floating():
            other = _poison(pointers)
        return saved["create_masked_load"](self, pointers, mask, other, *rest, **named)

    def masked_store(self, pointers, value, mask, *rest, **named):
        launch.touch("store", pointers, mask)
        return saved["create_masked_store"](self, pointers, value, mask, *rest, **named)

    def load(self, pointers, *rest):
        return masked_load(self, pointers, everywhere(pointers), None, *rest)

    def store(self, pointers, value, *rest):
        return masked_store(self, pointers, value, everywhere(pointers), *rest)

    def atomic_rmw(self, op, pointers, value, mask, *rest):
        launch.touch("atomic", pointers, mask)
        return saved["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    def atomic_cas(self, pointers, *rest):
        launch.touch("atomic", pointers, None)
        return saved["create_atomic_cas"](self, pointers, *rest)

    def set_grid_idx(self, x, y, z):
        width, height, depth = self.grid_dim
        if reverse:
            x, y, z = width - 1 - x, height - 1 - y, depth - 1 - z
        launch.program = (x * height + y) * depth + z
        return saved["set_grid_idx"](self, x, y, z)

    def call(executor, *arguments, **options):
        nonlocal launch
        launch = _Launch()
        to_host = executor._init_args_hst

        def init(arguments, options):
            here, named = to_host(arguments, options)
            for name, value in [*zip(executor.arg_names, here, strict=False), *named.items()]:
                launch.add_argument(name, getattr(value, "base", value))
            return here, named

        executor._init_args_hst = init
        try:
            execute(executor, *arguments, **options)
        except Exception as error:  # the interpreter wraps what was raised, once a call
            fault = error
            while fault.__cause__ is not None:
                fault = fault.__cause__
            raise (fault if isinstance(fault, Fault) else error) from None
        launch.finish()

    given = (load, store, masked_load, masked_store, atomic_rmw, atomic_cas, set_grid_idx)
    try:
        for name, function in zip(saved, given, strict=True):
            setattr(Builder, name, function)
        interpreter.GridExecutor.__call__ = call
        yield
    finally:
        for name, function in saved.items():
            setattr(Builder, name, function)
        interpreter.GridExecutor.__call__ = execute
