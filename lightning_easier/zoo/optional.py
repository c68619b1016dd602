"""Packages that only some of the zoo needs."""

from importlib import import_module
from typing import Any


def needed(name: str, what: str, install: str = "'lightning-easier[zoo]'") -> Any:
    """Import a package that comes with the extra ``zoo``.

    Args:
        name: The package, or a module in it.
        what: What needs it, for the message.
        install: What pip is to install.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    package = name.partition(".")[0]
    try:
        import_module(package)  # first: a module in it may have been imported before
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (package, name):  # it is there, and lacks something itself
            raise
        raise ModuleNotFoundError(f"{what} needs {package}: `pip install {install}`", name=package) from error
