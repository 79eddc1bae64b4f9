"""A GPU that does not exist: tensors named `cuda:N` whose numbers lie on the CPU, where everything is computed.

    with FakeGPU() as gpu:
        learn(...)              # pick_device() finds a GPU
    gpu.waits                   # what made the CPU wait for it: Counter of "file.py:line operation"

What CUDA refuses is refused: operands on two devices, a generator of another device, `.numpy()`. What makes the CPU
wait is counted by the line of the project that asks: reading a value, sizes that depend on values, and copies between
CPU and GPU, unless from pinned memory with `non_blocking`. `FakeGPU(memory=...)` runs out of memory at products whose
result in training has more bytes than that.

How: a dispatch mode sees every operation below autograd, and computes it on the CPU values; a function mode sees
calls from Python before C++, for which tensors lie on the CPU, could take `.to("cpu")` for nothing to do.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "bincount"}
"""Operations after which the CPU knows a value: it waits."""
BETWEEN = {"_to_copy", "copy_", "index", "index_put_", "_index_put_impl_", "set_"}
"""Operations that may have operands on two devices."""


class OnGPU(Tensor):
    """A CPU tensor under the name of a GPU."""

    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.place)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self) -> Any:
        FakeGPU.active.wait("tolist")
        return Tensor.tolist(self)

    # with these, nn.Module.to makes new parameters: it cannot give a CPU parameter a GPU's values
    def __tensor_flatten__(self) -> Any:
        raise NotImplementedError

    def __tensor_unflatten__(self) -> Any:
        raise NotImplementedError


def on_gpu(tensor: Tensor, place: torch.device) -> Tensor:
    made = Tensor._make_subclass(OnGPU, tensor)
    made.place = place
    return made


def place_of(tensor: Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, OnGPU) else CPU


class Calls(TorchFunctionMode):
    """Python's calls: `cuda` means `cuda:0`, and `.to(place)` has something to do."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)

        def named(value: Any) -> Any:
            cuda = (isinstance(value, str) and value.startswith("cuda")) or isinstance(value, torch.device)
            value = torch.device(value) if cuda else value
            return torch.device("cuda", 0) if cuda and value.type == "cuda" and value.index is None else value

        args, kwargs = [named(value) for value in args], {key: named(value) for key, value in kwargs.items()}
        if func is Tensor.pin_memory:
            args[0].pinned = True
            return args[0]
        if func is Tensor.cpu:
            func, args = Tensor.to, [args[0], CPU]
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            args[1:2] = [args[1].device, args[1].dtype]
        if func is Tensor.to:
            return self._to(args, kwargs)
        cpu = any(value in (CPU, "cpu") for value in [*args, *kwargs.values()] if isinstance(value, str | torch.device))
        before, self.gpu.asked_cpu = self.gpu.asked_cpu, cpu
        try:
            return func(*args, **kwargs)
        finally:
            self.gpu.asked_cpu = before

    def _to(self, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        x, *rest = args
        flags = dict(zip(("non_blocking", "copy"), (v for v in rest if isinstance(v, bool)), strict=False))
        options = {"dtype": next((v for v in rest if isinstance(v, torch.dtype)), None), **flags, **kwargs}
        place = options.pop("device", None) or next((v for v in rest if isinstance(v, torch.device | str)), x.device)
        place, free = torch.device(place), options.pop("non_blocking", False) and getattr(x, "pinned", False)
        if place.type == "meta":
            return Tensor.to(x, place, **options)
        if place != x.device:
            assert not (x.requires_grad and torch.is_grad_enabled()), "its gradient would be lost"
            x = self.gpu.copied(x, place, free)
        return Tensor.to(x, **{name: value for name, value in options.items() if value is not None})


class FakeGPU(TorchDispatchMode):
    """Args:
    bfloat16: whether they compute in it.
    memory: bytes of the largest result of a product in training; None: any.
    """

    active: FakeGPU
    asked_cpu = False

    def __init__(self, bfloat16: bool = True, memory: int | None = None) -> None:
        super().__init__()
        self.bfloat16, self.memory = bfloat16, memory
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> Any:
        self.stack = ExitStack()
        state = torch.get_rng_state()

        def set_rng_state(new: Tensor, device: Any = None) -> None:
            assert type(new) is Tensor and new.dtype == torch.uint8, "RNG state must be a torch.ByteTensor"

        for name, value in {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "_lazy_init": lambda: None, "is_bf16_supported": lambda including_emulation=True: self.bfloat16,
            "get_rng_state": lambda device=None: state.clone(), "set_rng_state": set_rng_state,
            "synchronize": lambda device=None: None, "empty_cache": lambda: None,
            "get_device_name": lambda device=None: "Fake GPU", "manual_seed_all": lambda seed: None,
            "get_device_capability": lambda device=None: (9, 0), 
            "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
            "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 1,
            "reset_peak_memory_stats": lambda device=None: None,
        }.items():  # fmt: skip
            self.stack.enter_context(patch.object(torch.cuda, name, value))
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self.stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        self.stack.enter_context(patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped))
        self.stack.enter_context(Calls(self))
        FakeGPU.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def wait(self, what: str) -> None:
        """Count a wait under the innermost line of the project, or else of a library, that causes it."""
        frame: Any = sys._getframe(1)
        library = ""
        while frame:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and ".venv" not in path.parts and path.name != "fake_gpu.py":
                self.waits[f"{path.name}:{frame.f_lineno} {what}{library}"] += 1
                return
            if not library and "transformers" in path.parts:
                library = f" in transformers' {path.name}"
            frame = frame.f_back

    def copied(self, x: Tensor, place: torch.device, free: bool = False) -> Tensor:
        """A copy on another device."""
        if not free and {x.device.type, place.type} == {"cpu", "cuda"}:
            self.wait(f"copy to the {'CPU' if place == CPU else 'GPU'}")
        with torch._C._DisableTorchDispatch():
            plain = x.as_subclass(Tensor).detach().clone()
        return plain if place == CPU else on_gpu(plain, place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        asked = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        places = {place_of(t) for t in tensors if t.dim() or isinstance(t, OnGPU)}
        gpus = [place for place in places if place.type == "cuda"]
        for generator in (leaf for leaf in leaves if isinstance(leaf, torch.Generator)):
            want = asked or next(iter(places), CPU)
            if generator.device.type != want.type:
                raise RuntimeError(f"Expected a '{want.type}' device type for generator but found a CPU one ({name})")
        if len(places) > 1 and name not in BETWEEN and not name.startswith("_foreach"):
            shapes = [(list(t.shape), str(place_of(t))) for t in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {shapes} ({name})")
        if name in BETWEEN and "index" in name and gpus:
            if place_of(args[0]) == CPU:
                raise RuntimeError(f"indices should be on the same device as the indexed tensor, the CPU ({name})")
            if len(places) > 1 or any(t.dtype == torch.bool for t in tree_leaves(args[1])):
                self.wait(f"{name} by a mask or by the CPU's indices")
        if asked is not None and (asked.type != "cpu" or self.asked_cpu or not gpus):
            place = torch.device("cuda", asked.index or 0) if asked.type == "cuda" else asked
        else:
            place = place_of(args[0]) if name == "copy_" else gpus[0] if gpus else CPU
        if name in ("_to_copy", "copy_"):
            source = place_of(args[1] if name == "copy_" else args[0])
            if {source.type, place.type} == {"cpu", "cuda"}:
                self.wait(f"copy to the {'CPU' if place == CPU else 'GPU'}")
        if gpus and name in READS:
            self.wait(name)

        def cpu(value: Any) -> Any:
            return CPU if isinstance(value, torch.device) and value.type == "cuda" else value

        kwargs = {key: False if key == "pin_memory" else cpu(value) for key, value in kwargs.items()}
        if func is torch.ops.aten.mm.dtype:  # exists for CUDA alone
            made = torch.ops.aten.mm.default(args[0].float(), args[1].float())
        else:
            made = func(*map(cpu, args), **kwargs)
        if self.memory and gpus and torch.is_grad_enabled() and name == "mm" and made.nbytes > self.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {made.nbytes} bytes.")

        def renamed(value: Any) -> Any:
            if not isinstance(value, Tensor) or (any(value is old for old in tensors) and place_of(value) == place):
                return value
            if name == "_to_copy" and any(value.data_ptr() == old.data_ptr() for old in tensors if value.numel()):
                value = Tensor.clone(value)
            if place.type == "cuda":
                return on_gpu(value, place)
            return value if type(value) is Tensor else value.as_subclass(Tensor)

        return tree_map(renamed, made)


def grouped(lists: Any, with_indices: bool = False) -> Any:
    """torch._C._group_tensors_by_device_and_dtype, by the devices that tensors name."""
    groups: dict[Any, Any] = {}
    for index, column in enumerate(zip(*lists, strict=True)):
        first = next(t for t in column if t is not None)
        made, indices = groups.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for to, t in zip(made, column, strict=True):
            to.append(t)
        indices.append(index)
    return groups
