"""Where does the time go? What torch's profiler says of measuring, and of ``compress``.

Part ``profile`` of ``python -m benchmarks``: ``python -m benchmarks profile measuring`` or ``... profile compress``.
"""

from functools import partial

import torch
from fitting import compressions, tiny
from measuring import cifar_resnet18, validations
from questions import Effort
from torch.profiler import ProfilerActivity, profile

from lightning_easier.collapsing.exact.prices import Objective
from lightning_easier.report import Table
from lightning_easier.zoo import CifarResNet


def hot_spots(what: str, effort: Effort, device: torch.device, rows: int = 25) -> Table:
    """Profile ``measuring`` after a warm-up, or ``compress``, and list the operators by the time spent in them alone.

    Args:
        what: Which.
        effort: How large it is.
        device: Where.
        rows: How many are listed.
    """
    torch.manual_seed(0)
    if what == "measuring":
        make = effort.pick(cifar_resnet18, cifar_resnet18, partial(CifarResNet, 8))
        sample = validations(make, (effort.pick(128, 32, 4), 3, 32, 32), effort.pick(12, 3, 2), device)["all"].sample
        sample()  # warm-up
    else:
        make = effort.pick(partial(CifarResNet, 56), partial(CifarResNet, 20), tiny)
        images, size = effort.pick(1000, 64, 16), effort.pick(32, 32, 8)
        objective: Objective = effort.pick("latency", "latency", "macs")
        sample = compressions(make, images, size, device, objective)["compress"].sample
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        sample()
    averages = profiled.key_averages()
    seconds = {
        each.key: (each.self_device_time_total if on_gpu else each.self_cpu_time_total) / 1e6 for each in averages
    }
    calls = {each.key: each.count for each in averages}
    whole = sum(seconds.values())
    lines = [
        (key, f"{seconds[key]:.4f}", f"{100 * seconds[key] / max(whole, 1e-9):.1f}", str(calls[key]))
        for key in sorted(seconds, key=seconds.__getitem__, reverse=True)[:rows]
    ]
    where = "on the device" if on_gpu else "on the CPU"
    title = f"{what}: {whole:.2f} s in operators {where}, each without those that it calls"
    return Table(title, ("operator", "seconds", "%", "calls"), lines)
