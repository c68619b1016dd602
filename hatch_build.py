"""The README as an index of packages shows it: there is none of the pages beside it that its links lead to."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(\(?)!?\[([^\]]*)\]\((?!\w+:)([^)#]*)[^)]*\)")
_NOTE = "Files in brackets, such as `docs/start.md`, are those of the source distribution."


class LongDescription(MetadataHookInterface):
    """Makes the README the long description of what is built."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add it."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": without_relative_links(readme)}


def without_relative_links(text: str) -> str:
    """Name the file that a relative link or a picture leads to, in the place of the link; code stays as it is."""
    prose = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    prose[::2] = [_LINK.sub(_named, each) for each in prose[::2]]
    return "".join(prose).replace("\n## ", f"\n{_NOTE}\n\n## ", 1)


def _named(link: re.Match[str]) -> str:
    before, text, path = link.groups()
    if not path:  # a heading of the same page
        return f"{before}{text}"
    return f"{before}{text}, `{path}`" if before else f"{text} (`{path}`)"
