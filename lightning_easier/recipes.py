"""Configs that come with the package: whole runs, and the models, data and recipes that they are composed of.

In a checkout they are its folder ``configs``; a wheel has the same files in the package.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

_TAKES_ONE = ("-c", "--config", "--model", "--data", "--trainer")


def recipes() -> dict[str, Path]:
    """List what there is: name -> file. A name is the file's place, without its suffix.

    >>> recipes()["recipe/easier"].name
    'easier.yaml'
    """
    folder = _folder()
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def copy_recipe(name: str, folder: str | Path = "configs", *, overwrite: bool = False) -> list[Path]:
    """Copy a recipe, and those that it is composed of, to files of one's own.

    Args:
        name: One of :func:`recipes`.
        folder: Where to copy them; it is made if need be.
        overwrite: Whether files that are there are replaced.

    Returns:
        The files, the one of the recipe first.

    Raises:
        ValueError: If there is no such recipe.
        FileExistsError: If one of the files is there already; then none is written.
    """
    known = recipes()
    if name not in known:
        raise ValueError(
            f"Expected argument `name` to be a recipe, but got {name!r}. "
            f"Did you mean one of {get_close_matches(name, known) or list(known)}?"
        )
    files = {Path(folder) / path.relative_to(_folder()): path for path in _with_parts(known[name])}
    there = [str(target) for target in files if target.exists()]
    if there and not overwrite:
        raise FileExistsError(f"There is {', '.join(there)} already: copy to another folder, or overwrite")
    for target, source in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return list(files)


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Put paths in the places of recipes' names in arguments of the command line; a file of that name goes first."""
    known = recipes()
    named = list(arguments)
    for place, argument in enumerate(named):
        option, sign, value = argument.partition("=")
        if option not in _TAKES_ONE:
            continue
        if sign and _is_name(value, known):
            named[place] = f"{option}={known[value]}"
        elif not sign and place + 1 < len(named) and _is_name(named[place + 1], known):
            named[place + 1] = str(known[named[place + 1]])
    return named


def command(arguments: Sequence[str]) -> str:
    """Run ``lightning-easier recipes``.

    Args:
        arguments: Those after ``recipes``.

    Returns:
        What to show.

    Raises:
        SystemExit: If the arguments are not understood, or a recipe can't be copied; with code 2, and one line on why.
    """
    parser = argparse.ArgumentParser(
        "lightning-easier recipes", description="Configs that come with the package, to run by name or to copy."
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    tasks.add_parser("list", help="list what there is")
    copying = tasks.add_parser("copy", help="copy a recipe, and those that it is composed of, to files of your own")
    copying.add_argument("name", help="its name, as it is listed")
    copying.add_argument("--to", metavar="FOLDER", default="configs", help="where to copy it (default: %(default)s)")
    copying.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(arguments)
    if options.task == "list":
        return _listed()
    try:
        copied = copy_recipe(options.name, options.to, overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        copying.error(str(error))
    return "\n".join(map(str, copied))


def _folder() -> Path:
    """Return where the files are: a wheel has them in the package, a checkout beside it."""
    package = Path(__file__).parent
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def _with_parts(path: Path) -> Iterator[Path]:
    yield path
    for value in yaml.safe_load(path.read_text()).values():
        if isinstance(value, str) and value.endswith(".yaml"):
            yield from _with_parts(path.parent / value)


def _is_name(value: str, known: dict[str, Path]) -> bool:
    return value in known and not Path(value).is_file()


def _listed() -> str:
    known = recipes()
    width = max(map(len, known))
    return "\n".join(f"{name:{width}}  {_about(path)}" for name, path in known.items())


def _about(path: Path) -> str:
    """Return the title of a file, its first line."""
    return path.read_text().partition("\n")[0].removeprefix("# ")
