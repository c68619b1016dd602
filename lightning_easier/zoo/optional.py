"""Packages that only some of the zoo needs."""

from importlib import import_module
from typing import Any


def needed(name: str, what: str) -> Any:
    """Import a package that comes with the extra ``zoo``.

    Args:
        name: The package, or a module in it.
        what: What needs it, for the message.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    package = name.partition(".")[0]
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is there, and lacks something itself
            raise
        message = f"{what} needs {package}: `pip install 'lightning-easier[zoo]'`"
        raise ModuleNotFoundError(message, name=package) from error
    return import_module(name)
