"""One answer for all processes."""

from collections.abc import Callable
from typing import TypeVar

from lightning.pytorch import Trainer

T = TypeVar("T")


def from_rank_zero(trainer: Trainer, ask: Callable[[], T]) -> T:
    """Return what rank 0 is told, on all processes, each of which has to call this.

    Args:
        trainer: The Trainer.
        ask: What rank 0 calls.

    Raises:
        Exception: On rank 0, what was raised.
        RuntimeError: On the others, if rank 0 has failed: they would wait for its answer.
    """
    answer: T | None = None
    failure: Exception | None = None
    if trainer.is_global_zero:
        try:
            answer = ask()
        except Exception as error:  # whatever it is
            failure = error
    reason = None if failure is None else f"{type(failure).__name__}: {failure}"
    answer, reason = trainer.strategy.broadcast((answer, reason))
    if failure is not None:
        raise failure
    if reason is not None:
        raise RuntimeError(f"Rank 0 has failed: {reason}")
    return answer  # type: ignore[return-value]
