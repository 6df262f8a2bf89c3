"""A device that is not the CPU, for where there is no GPU. Its tensors are tensors of the CPU inside, and meet none.

What runs there takes the ways that the library has for a GPU, its Triton kernels excepted: forward, backward and with
values. `torch.autocast("far")` casts what it casts on CUDA; it keeps no copies of weights. Importing this file changes
what torch takes for the machine's accelerator: do so in a process of its own. torch calls devices in Python
experimental.
"""

import re
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map


class Module(backend_registration._DummyBackendModule):
    """What torch asks a device for; becomes `torch.far`."""

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("far", backend_module=Module())


class Far(Tensor):
    """A tensor there."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        size = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.size(), **size, dtype=held.dtype, device="far:0")
        made.held = held.detach()
        return made

    def __repr__(self):
        return f"Far({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def is_far(device):
    return device is not None and torch.device(device).type == "far"


def computed(func, args, kwargs):
    """An operator's result, computed on the CPU; an error where tensors of both devices meet."""
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    held = {id(x.held): x for x in tensors if isinstance(x, Far)}
    bound = args[:1] + args[2:] if name in ("index", "index_put", "index_put_") else args  # not the places
    bound = [x for x in tree_iter((bound, kwargs)) if isinstance(x, Tensor)]
    if not func._schema.is_mutable and (torch.Tag.pointwise in func.tags or name == "where"):
        bound = [x for x in bound if x.dim()]  # a number may come from the host
    if held and name not in ("copy_", "_to_copy") and not all(isinstance(x, Far) for x in bound):
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, found far and cpu.")
    if func.namespace == "ffr":  # what it consists of runs there, not it as a whole
        with On():
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)

    def here(x):
        return x.held if isinstance(x, Far) else torch.device("cpu") if isinstance(x, torch.device) else x

    def there(x):
        return held.get(id(x), Far(x)) if isinstance(x, Tensor) else x

    result = func(*tree_map(here, args), **tree_map(here, kwargs))
    device = kwargs.get("device")
    return tree_map(there, result) if (held if device is None else is_far(device)) else result


class On(TorchDispatchMode):
    """New tensors of the device: operators that are given none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def without_cuda(x):
    return "far" if isinstance(x, (str, torch.device)) and str(x).startswith("cuda") else x


class Functions(TorchFunctionMode):
    """What torch does to tensors without an operator; and what is sent to a GPU goes there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(without_cuda, (args, kwargs or {}))
        if func is torch.tensor and is_far(kwargs.get("device")):
            return Far(torch.tensor(*args, **(kwargs | {"device": "cpu"})))
        if func is Tensor.__getitem__ and isinstance(args[0], Far):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor(x) if isinstance(x, list) else x for x in places)
        if func is Tensor.tolist and isinstance(args[0], Far):
            return args[0].held.tolist()
        return func(*args, **kwargs)


@contextmanager
def reachable():
    """A block in which the device is there."""
    with On(), Functions():
        yield


# --- autocast, by the lists of torch's own header ---

LISTS = {"LOWER_PRECISION_FP": "low", "FP32": "float32", "FP32_SET_OPT_DTYPE": "result", "PROMOTE": "widest"}
KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_LIBRARIES = [torch.library.Library("_", "IMPL", "AutocastPrivateUse1")]  # they hold until they are collected
_LIBRARIES[0].fallback(torch.library.fallthrough_kernel)
_LIBRARIES.append(torch.library.Library("aten", "IMPL", "AutocastPrivateUse1"))


def cast(tensors, dtype):
    def one(x):
        floating = isinstance(x, Tensor) and is_far(x.device) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if floating else x

    return tree_map(one, tensors)


def register(name, overload, way):
    """Cast an operator's inputs before it, or ask it for a result in float32."""
    operator = getattr(getattr(torch.ops.aten, name), overload or "default")

    def autocast(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(KEYS):
            dtypes = [x.dtype for x in tree_iter((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
            if way == "result":
                said = "dtype" in kwargs or any(isinstance(x, torch.dtype) for x in args)
                low = any(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)
                return operator(*args, **kwargs, **({"dtype": torch.float32} if low and not said else {}))
            wide = torch.float32 if torch.float32 in dtypes or way == "float32" else torch.get_autocast_dtype("far")
            dtype = torch.get_autocast_dtype("far") if way == "low" else wide
            return operator(*cast(args, dtype), **cast(kwargs, dtype))

    _LIBRARIES[1].impl(f"{name}.{overload}" if overload else name, autocast)


def listed():
    """Name, overload and way of every operator that CUDA casts."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    text = header.read_text(encoding="utf-8").replace("\\\n", " ")
    for title, way in LISTS.items():
        (line,) = re.findall(rf"^#define AT_FORALL_{title}\(_\)(.*)$", text, re.MULTILINE)
        for name, overload in re.findall(r"_\((\w+)(?:, (\w+))?\)", line):
            yield name, overload, way


for entry in listed():
    register(*entry)


# --- scripts ---


def run(script, *options):
    """Run a script that believes to see a GPU; the times that it measures there are made up."""
    from accelerate import PartialState
    from recipe import config

    def state(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.device = torch.device("far:0")

    made, config.on_cpu, PartialState.__init__ = PartialState.__init__, lambda device, precision: False, state
    event = mock.Mock(elapsed_time=lambda end: 1.0)
    numbers = {"memory_allocated": 0, "max_memory_allocated": 1000, "get_device_name": "FAR"}
    calls = dict.fromkeys(("synchronize", "_sleep", "reset_peak_memory_stats", "set_sync_debug_mode"))
    answers = {name: mock.Mock(return_value=value) for name, value in (numbers | calls).items()}
    sys.argv = [script, *options]
    with mock.patch.multiple(torch.cuda, Event=lambda **_: event, **answers), reachable():
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    run(*sys.argv[1:])
