"""A device that is not the CPU, for machines that have no other: `make device` runs what needs one with it.

A plugin of pytest. It compiles `elsewhere.cpp` (half a minute, once) and makes that torch's accelerator: what mixes
devices, or waits for one in a hook, fails there as it would on a GPU. It tells nothing of time.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.cpp_extension import load

_built = load("easier_elsewhere", [str(Path(__file__).with_name("elsewhere.cpp"))], extra_cflags=["-O0"])

set_reading_is_an_error = _built.set_reading_is_an_error


class _Device:
    """Has the only one be the current one."""

    def __init__(self, device: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _module() -> ModuleType:
    """Return what `torch.cuda` is for CUDA."""
    module, generator = ModuleType("torch.elsewhere"), _built.default_generator()
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "get_rng_state": lambda device=0: generator.get_state(),
        "set_rng_state": lambda state, device=0: generator.set_state(state),
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "_is_in_bad_fork": lambda: False,
        "device": _Device,
    }
    vars(module).update(functions)
    return module


torch.utils.rename_privateuse1_backend("elsewhere")
_built.register_hooks()
torch._register_device_module("elsewhere", _module())
torch.utils.generate_methods_for_privateuse1_backend()
torch.__future__.set_swap_module_params_on_conversion(True)  # a module that moves keeps its parameters, as to a GPU


class Elsewhere(Accelerator):
    """It, as Lightning knows one."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("elsewhere", 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "elsewhere"


def trainer_options() -> dict[str, Any]:
    """Return what a Trainer is given to run there; made anew for each, since a strategy belongs to one."""
    strategy = SingleDeviceStrategy(torch.device("elsewhere", 0), Elsewhere())
    return {"accelerator": "auto", "strategy": strategy, "devices": 1}
