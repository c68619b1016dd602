"""What is imported with the package, beyond what Lightning imports, in a process of its own."""

import sys

from tests.fresh import begun

# Each takes a while to import, and is needed by some calls only
LEFT_FOR_LATER = (
    "torch.distributed.checkpoint",
    "torch.distributed.elastic",
    "torch.utils.benchmark",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
)


def test_the_package_imports_no_other_than_lightning_does_and_nothing_of_torch_that_few_calls_need(tmp_path_factory):
    added = begun(tmp_path_factory, "")["added"]
    assert "lightning_easier.callbacks.files" in added
    packages = {name.partition(".")[0] for name in added} - sys.stdlib_module_names
    assert packages <= {"lightning_easier", "lightning", "torch", "torchmetrics"}
    assert [name for name in added if name.startswith(LEFT_FOR_LATER)] == []
