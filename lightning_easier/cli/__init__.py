"""The command line: LightningCLI's subcommands, joined by ours."""

try:
    import jsonargparse  # noqa: F401
    import rich  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The command line needs {error.name}: `pip install 'lightning-easier[cli]'`", name=error.name
    ) from error

from lightning_easier.cli.easier import EasierCLI
from lightning_easier.cli.errors import one_line_errors
from lightning_easier.cli.reading import read_pruning_report
from lightning_easier.cli.subcommands import EasierSubcommands

__all__ = ["EasierCLI", "EasierSubcommands", "one_line_errors", "read_pruning_report"]
