"""Configs that come with the package: whole runs, and the models, data and recipes that they are composed of.

In a checkout they are its folder ``configs``; a wheel has the same files in the package. A part is what one option
takes (``--model``, ``--data``, ``--trainer``), or a config itself where it tells other parts something, too: data tell
a model how many classes there are. Beside them are the curves that the EASIER paper published (arXiv 2404.18949), and
of which parts each of its settings is composed.
"""

import argparse
import csv
import io
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lightning_easier.report import Table

_SECTIONS = {"model": "model", "data": "data", "recipe": "trainer"}  # folder -> what a part of it is in a config
_WHOLE = ("-c", "--config")
_TAKES_ONE = (*_WHOLE, *(f"--{section}" for section in _SECTIONS.values()))


def recipes() -> dict[str, Path]:
    """List what there is: name -> file. A name is the file's place, without its suffix.

    >>> recipes()["recipe/easier"].name
    'easier.yaml'
    """
    folder = _folder()
    files = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), path))
    return {_name(path): path for path in files}


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
    files = {Path(folder) / path.relative_to(_folder()): path for path in _with_parts(_found(name))}
    there = [str(target) for target in files if target.exists()]
    if there and not overwrite:
        raise FileExistsError(f"There is {', '.join(there)} already: copy to another folder, or overwrite")
    for target, source in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return list(files)


def composed(names: Sequence[str]) -> dict[str, Any]:
    """Compose a config of several, as ``--config`` does: of what two of them tell, the later one holds.

    Args:
        names: Of :func:`recipes`.

    Raises:
        ValueError: If there is no such recipe.

    Example:
        >>> composed(["model/swin_t", "data/pacs"])["model"]["init_args"]["num_classes"]
        7
    """
    whole: dict[str, Any] = {}
    for name in names:
        path = _found(name)
        content = _read(path)
        section = _section(name, content)
        if section is not None:
            content = {section: content}
        parts = {key: _read(path.parent / value) if _is_reference(value) else value for key, value in content.items()}
        whole = _merged(whole, parts)
    return whole


def published(names: Sequence[str]) -> dict[tuple[str, str], dict[int, float]]:
    """Read the curves that the EASIER paper published for models, for data, or for models on data.

    Args:
        names: Of :func:`recipes`; of a composed one its parts tell. Those that are no model and no data tell nothing.

    Returns:
        Data set and network -> number of activations removed -> top-1 in percent; empty where none is published.

    Raises:
        ValueError: If there is no such recipe.

    Example:
        >>> published(["model/swin_t", "data/pacs"])["PACS", "Swin-T"][11]
        86.2
    """
    parts = {_name(path) for name in names for path in _with_parts(_found(name))}
    asked = {kind: {part for part in parts if part.startswith(f"{kind}/")} for kind in ("model", "data")}
    curves: dict[tuple[str, str], dict[int, float]] = {}
    if not any(asked.values()):
        return curves
    for setting in _rows("settings.csv"):
        if all(not wanted or wanted == {setting[kind]} for kind, wanted in asked.items()):
            curves[setting["dataset"], setting["network"]] = {}
    for row in _rows("published.csv"):
        if (row["dataset"], row["network"]) in curves:
            curves[row["dataset"], row["network"]][int(row["removed"])] = float(row["top1"])
    return curves


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Put paths in the places of recipes' names in arguments of the command line; a file of that name goes first.

    A part is taken by ``--config`` and by the option of its section alike; which of them becomes the one that its file
    is for.
    """
    known = recipes()
    named = list(arguments)
    for place, argument in enumerate(named):
        option, sign, value = argument.partition("=")
        if option not in _TAKES_ONE:
            continue
        if sign and _is_name(value, known):
            named[place] = f"{_option(option, value, known)}={known[value]}"
        elif not sign and place + 1 < len(named) and _is_name(named[place + 1], known):
            named[place] = _option(option, named[place + 1], known)
            named[place + 1] = str(known[named[place + 1]])
    return named


def command(arguments: Sequence[str], program: str = "lightning-easier") -> str:
    """Run ``lightning-easier recipes``.

    Args:
        arguments: Those after ``recipes``.
        program: Whose subcommand it is.

    Returns:
        What to show.

    Raises:
        SystemExit: If the arguments are not understood, or a recipe can't be copied or shown; with code 2, and one line
            on why.
    """
    parser = _Parser(f"{program} recipes", description="Configs that come with the package, to run by name or to copy.")
    tasks = parser.add_subparsers(dest="task", required=True)
    tasks.add_parser("list", help="list what there is")
    showing = tasks.add_parser("show", help="show a recipe, or what several are composed to, and the published curve")
    showing.add_argument("names", metavar="name", nargs="+", help="its name, as it is listed")
    copying = tasks.add_parser("copy", help="copy a recipe, and those that it is composed of, to files of your own")
    copying.add_argument("name", help="its name, as it is listed")
    copying.add_argument("--to", metavar="FOLDER", default="configs", help="where to copy it (default: %(default)s)")
    copying.add_argument("--overwrite", action="store_true", help="replace files that are there")
    options = parser.parse_args(arguments)
    if options.task == "list":
        return _listed()
    if options.task == "show":
        try:
            return _shown(options.names)
        except ValueError as error:
            showing.error(str(error))
    try:
        copied = copy_recipe(options.name, options.to, overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        copying.error(str(error).replace("or overwrite", "or pass `--overwrite`"))
    return "\n".join(map(str, copied))


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line; the parsers of its tasks do, too."""

    def error(self, message: str) -> NoReturn:
        """Write the line, and leave with 2."""
        sys.stderr.write(f"{self.prog}: error: {message} (`{self.prog} --help` lists what there is)\n")
        self.exit(2)


def _folder() -> Path:
    """Return where the files are: a wheel has them in the package, a checkout beside it."""
    package = Path(__file__).parent
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def _name(path: Path) -> str:
    return path.relative_to(_folder()).with_suffix("").as_posix()


def _found(name: str) -> Path:
    known = recipes()
    if name not in known:
        raise ValueError(
            f"Expected argument `name` to be a recipe, but got {name!r}. "
            f"Did you mean one of {get_close_matches(name, known) or list(known)}?"
        )
    return known[name]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def _rows(name: str) -> list[dict[str, str]]:
    """Read a table."""
    with (_folder() / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _with_parts(path: Path) -> Iterator[Path]:
    yield path
    for value in _read(path).values():
        if _is_reference(value):
            yield from _with_parts(path.parent / value)


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".yaml")


def _section(name: str, content: Mapping[str, Any]) -> str | None:
    """Return the section of a config that a part is; None if it is a config itself."""
    return None if content.keys() & set(_SECTIONS.values()) else _SECTIONS[name.partition("/")[0]]


def _option(given: str, name: str, known: Mapping[str, Path]) -> str:
    """Return the option that takes the file of a recipe, which was given to another of those that take it by name."""
    section = _section(name, _read(known[name]))
    own = f"--{_SECTIONS.get(name.partition('/')[0])}"
    if given not in (*_WHOLE, own) or (section is None and given in _WHOLE):
        return given
    return "--config" if section is None else own


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two configs: arguments of another class are no arguments of the one that takes its place."""
    if "class_path" in first and second.get("class_path", first["class_path"]) != first["class_path"]:
        return dict(second)
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _is_name(value: str, known: dict[str, Path]) -> bool:
    return value in known and not Path(value).is_file()


def _listed() -> str:
    known = recipes()
    width = max(map(len, known))
    return "\n".join(f"{name:{width}}  {_about(path)}" for name, path in known.items())


def _about(path: Path) -> str:
    """Return the title of a file, its first line."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _shown(names: Sequence[str]) -> str:
    """Show the file of one recipe, or what several are composed to, and the published curves."""
    paths = [part for name in names for part in _with_parts(_found(name))]
    text = paths[0].read_text(encoding="utf-8") if len(paths) == 1 else yaml.safe_dump(composed(names), sort_keys=False)
    curves = published(names)
    return f"{text.rstrip()}\n\n{_table(curves)}" if curves else text.rstrip()


def _table(curves: Mapping[tuple[str, str], Mapping[int, float]]) -> str:
    """Render curves of one network, or on one data set, side by side."""
    datasets, networks = {dataset for dataset, _ in curves}, {network for _, network in curves}
    of = f" of {min(networks)}" if len(networks) == 1 else ""
    on = f" on {min(datasets)}" if len(datasets) == 1 else ""
    title = f"Published top-1 [%]{of}{on} (EASIER, arXiv 2404.18949)"
    columns = [
        dataset if len(datasets) > 1 else network if len(networks) > 1 else "top-1" for dataset, network in curves
    ]
    rows = [
        [str(removed), *(f"{curve[removed]:.2f}" if removed in curve else "" for curve in curves.values())]
        for removed in sorted({removed for curve in curves.values() for removed in curve})
    ]
    if find_spec("rich") is None:
        return Table(title, ["removed", *columns], rows).to_markdown()
    return f"{title}\n{_with_rich(columns, rows)}"


def _with_rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render the curves wide enough for all of their numbers."""
    from rich import get_console
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable()
    table.add_column("removed", justify="right", no_wrap=True)
    for title in columns:
        table.add_column(title.replace("-", "-\n") if len(title) > 10 else title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=max(get_console().width, 80), color_system=None).print(table)
    return text.getvalue().rstrip()
