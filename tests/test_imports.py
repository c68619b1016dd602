"""What is imported with the package, beyond what Lightning imports, in a process of its own."""

import json
import subprocess
import sys

# Each takes a while to import, and is needed by some calls only
LEFT_FOR_LATER = (
    "torch.distributed.checkpoint",
    "torch.distributed.elastic",
    "torch.utils.benchmark",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
)
_ADDED = """
import json, sys
import lightning.pytorch
before = set(sys.modules)
import lightning_easier
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_the_package_imports_no_other_than_lightning_does_and_nothing_of_torch_that_few_calls_need():
    result = subprocess.run([sys.executable, "-c", _ADDED], capture_output=True, text=True, check=True)
    added = json.loads(result.stdout.splitlines()[-1])
    assert "lightning_easier.callbacks.files" in added
    packages = {name.partition(".")[0] for name in added} - sys.stdlib_module_names
    assert packages <= {"lightning_easier", "lightning", "torch", "torchmetrics"}
    assert [name for name in added if name.startswith(LEFT_FOR_LATER)] == []
