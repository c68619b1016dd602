"""Why something is not merged, or not even read."""


class CannotMergeError(Exception):
    """Operators that don't become one exactly; the message is the reason."""


class CaptureError(Exception):
    """A model whose data flow can't be captured; the message is the reason."""


class CollapseError(RuntimeError):
    """A collapse that can't be carried out, or whose result is not the same function; nothing was changed."""
