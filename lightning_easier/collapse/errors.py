"""Why something is not merged."""


class CannotMergeError(Exception):
    """Operators that don't become one exactly; the message is the reason."""
