"""Docstrings as the reference shows them: Sphinx's roles as links, doctests as code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`(~?)([\w.]+)`")
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)  # griffe reads doctests of `Examples` alone


class Roles(griffe.Extension):
    """Rewrite the docstrings of all that is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", _ROLE.sub(_link, obj.docstring.value))


def _link(match: re.Match[str]) -> str:
    shortened, name = match.groups()
    shown = name.rpartition(".")[2] if shortened or name.startswith("lightning_easier.") else name
    if not name.startswith("lightning_easier."):
        return f"`{shown}`"
    return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'
