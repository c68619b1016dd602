"""The checkpoints that a run writes: one of every round that was kept, and the best for each number of removals.

A file is written under another name first, and renamed when it is whole. What is read may have been replaced since: it
is read as plain data, unless the user has passed ``weights_only=False`` to the Trainer, or it is, byte for byte, what
this very run has written.
"""

import errno
import hashlib
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.serialization import get_safe_globals, get_unsafe_globals_in_checkpoint

from lightning_easier.pruning.state import BestCheckpoint, RunState
from lightning_easier.report import Round
from lightning_easier.structure.linearize import MARK_KEY, restructure_as_marked
from lightning_easier.support import loading, storage
from lightning_easier.support.arguments import check_bool

if TYPE_CHECKING:
    from filelock import FileLock

_LOCK = ".in_use"
_OWN_NAME = re.compile(r"(round|best_removed)_(0|[1-9][0-9]*)\.ckpt")
_OPT_IN = "pass `weights_only=False` to `trainer.fit` with its `ckpt_path`"
_REMEDY = (
    "Make room there, or pass another `dirpath` that can be written to; the run goes on from a checkpoint that was "
    "saved before (`ckpt_path`)."
)


@dataclass(frozen=True)
class Files:
    """Where a run keeps its checkpoints, and which.

    Args:
        dirpath: Folder of the rounds' checkpoints; ``entropy_pruning`` in the logger's folder by default. All processes
            have to reach it. A new run does not write where another has or is about to: its folder ends in ``-v1``,
            ``-v2``, ... A run that is resumed goes on in the folder where its checkpoints are. What lies there is read
            as plain data, see `Security` in docs/supported.md.
        best_per_depth: Whether the best checkpoint for each number removed, of activations for example, is kept there,
            too, as ``best_removed_<number>.ckpt``.

    Raises:
        TypeError: If an argument is of another type.
    """

    dirpath: str | Path | None = None
    best_per_depth: bool = False

    def __post_init__(self) -> None:
        if self.dirpath is not None and (not isinstance(self.dirpath, str | Path) or not str(self.dirpath)):
            raise TypeError(f"Expected argument `dirpath` to be a path, but got {self.dirpath!r}")
        check_bool("best_per_depth", self.best_per_depth)


class RunFiles:
    """The files of one run: whose folder it is, how they are written, and how they are read."""

    def __init__(self) -> None:
        self._weights_only = True  # as the Trainer was told to load the checkpoint that the run is taken up at
        self._digests: dict[Path, str] = {}  # of what this run has written and what can't be read as plain data
        self._lock: FileLock | None = None
        self._folder: Path | None = None  # that this process has claimed

    # Whose folder it is

    def claim(
        self, trainer: Trainer, dirpath: str | Path | None, state: RunState, state_key: str, *, writes: bool = True
    ) -> str:
        """Return where a run keeps its checkpoints, the same on all processes, and keep other runs out of it.

        A new run leaves alone what another has written, or is about to. One that is resumed goes on where its
        checkpoints are, if they are there: a record may name any folder, and nothing is written on its word alone.

        Args:
            trainer: The Trainer.
            dirpath: What the user has asked for.
            state: Where the run stands, with the folder where it kept them so far.
            state_key: Of the callback.
            writes: Whether it will write there; else it keeps nobody out.

        Raises:
            MisconfigurationException: If a run that is resumed is going on somewhere else, or if its checkpoints are
                neither in the folder of its record nor in that of the user.
            OSError: If the folder can't be written to.
        """
        # Every process has to ask for log_dir, which Lightning broadcasts.
        asked = Path(dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "entropy_pruning")
        outcome: Path | Exception = Path()
        if trainer.is_global_zero:
            try:
                outcome = self._choose(trainer, asked, bool(dirpath), state, state_key, writes)
            except (OSError, MisconfigurationException) as error:
                outcome = error
        outcome = trainer.strategy.broadcast(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        self._folder = outcome if writes else None
        return str(outcome)

    def _choose(
        self, trainer: Trainer, asked: Path, by_user: bool, state: RunState, state_key: str, writes: bool
    ) -> Path:
        known = None if state.folder is None else Path(state.folder)
        if not writes:
            return known if known is not None and known.exists() else asked
        if known is None:
            return self._claim_new(asked)
        if known.exists() and known == self._folder:  # this process has claimed it before
            return self._claim_own(known)
        if state.snapshot.file is None:  # nothing was kept that the run could need
            holds_best = any(self._holds(known / best.file, state_key, n, best) for n, best in state.best.items())
            return self._claim_own(known) if holds_best else self._claim_new(asked)
        missing = {}
        for folder in (known, asked):
            missing[folder] = self._why_not_in(trainer, folder, state, state_key)
            if missing[folder] is None:
                if by_user and not _is_version_of(folder, asked):
                    rank_zero_warn(
                        f"The run goes on in {folder}, where its checkpoints are, and not in `dirpath` {asked}. To "
                        f"have it there, move the folder there first."
                    )
                return self._claim_own(folder)
        if (by_user or not known.exists()) and not _holds_checkpoints(asked):
            return self._claim_own(asked)
        folder = known if known.exists() else asked
        raise MisconfigurationException(
            f"Expected {folder} to hold the checkpoints of the run that is resumed, but {missing[folder]}. Nothing was "
            f"written there. Pass a `dirpath` that holds them; or an empty one, to go on without them."
        )

    def _why_not_in(self, trainer: Trainer, folder: Path, state: RunState, state_key: str) -> str | None:
        """Say why the last good checkpoint of a run is not in a folder; None if it is.

        The rounds that a checkpoint has seen have to be the first ones of the run.
        """
        path = folder / str(state.snapshot.file)
        if not path.exists():
            path = storage.put_aside(path)  # by a process that was killed while it replaced it
        if not path.exists():
            return f"{state.snapshot.file} is not there"
        try:
            _check_leads_nowhere_else(path)
            in_torch_format = isinstance(trainer.strategy.checkpoint_io, TorchCheckpointIO)
            reads = in_torch_format or loads_into_model(trainer)
            checkpoint = self._read_on_cpu(path) if reads else self.load(trainer, path)
            rounds = _check_form(path, checkpoint, state_key, with_weights=False)["rounds"]
        except (OSError, ValueError) as error:
            return str(error).rstrip(".")
        known = [asdict(this) for this in state.rounds[: len(rounds)]]
        is_own = bool(rounds) and [*map(_as_it_began, rounds)] == [*map(_as_it_began, known)]
        return None if is_own else f"{state.snapshot.file} is of another run"

    def _claim_own(self, folder: Path) -> Path:
        if not self._take(folder):
            raise MisconfigurationException(
                f"{folder} holds the checkpoints of the run that is resumed, and another process has taken up that "
                f"run, too. Wait until it is over, or end it."
            )
        storage.clean_up(folder, _is_own_name)
        return folder

    def _claim_new(self, folder: Path) -> Path:
        for free in _versions(folder):
            if _holds_checkpoints(free) or not self._take(free):
                continue
            if _holds_checkpoints(free):  # since it was looked at
                self.release()
                continue
            if free != folder:
                rank_zero_warn(f"{folder} holds the checkpoints of another run, so those of this one go to {free}.")
            storage.clean_up(free, _is_own_name)
            return free
        raise AssertionError("there are always more names")

    def _take(self, folder: Path) -> bool:
        """Lock a folder, until :meth:`release` or the end of the process; tell whether it was free."""
        from filelock import FileLock, Timeout

        self.release()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / _LOCK, thread_local=False)
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):  # the file system has no locks
                rank_zero_warn(f"{folder} can't be locked ({error}): see to it that no other run writes there.")
                return True
            raise storage.not_written(folder / _LOCK, error, "Pass a `dirpath` that can be written to.") from error
        self._lock = lock
        return True

    def release(self) -> None:
        """Let others have the folder; a second call does nothing."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # Writing

    def save(self, trainer: Trainer, path: Path) -> None:
        """Save everything; every process has to call this, and has to be able to read what was written.

        Raises:
            OSError: On all processes, if it can't be written; what was there before is there still.
            MisconfigurationException: If a process can't see the file.
        """
        new = storage.temporary(path)
        if trainer.is_global_zero:
            storage.remove(new)
        trainer.strategy.barrier()
        with _failure_of_saving(trainer) as failures:
            trainer.save_checkpoint(new, weights_only=False)
        self._agree(trainer, path, failures)
        digest = None
        if trainer.is_global_zero:
            try:
                digest = _digest_if_unsafe(trainer, new)
                storage.put_in_place(new, path)
            except (OSError, RuntimeError) as error:  # RuntimeError: it is not whole
                failures.append(error)
        self._agree(trainer, path, failures)
        digest = trainer.strategy.broadcast(digest)
        if digest is None:
            self._digests.pop(path, None)
        else:
            if self._weights_only and not self._digests:
                rank_zero_warn(
                    f"{path} holds more than tensors and plain data ({', '.join(loading.unsafe_objects(path))}): "
                    f"objects among the hyperparameters, perhaps. This run can go back to it, since it has written it "
                    f"itself. To resume it, {_OPT_IN}, or allow these classes with "
                    f"`torch.serialization.add_safe_globals`."
                )
            self._digests[path] = digest
        if not trainer.strategy.reduce_boolean_decision(path.exists(), all=True):
            raise MisconfigurationException(
                f"Pruning goes back to checkpoints of its own, but not every process can read {path}. "
                f"Pass a `dirpath` that all nodes share."
            )

    @staticmethod
    def _agree(trainer: Trainer, path: Path, failures: Sequence[BaseException]) -> None:
        """Raise on all processes if there was a failure on one."""
        if trainer.strategy.reduce_boolean_decision(not failures, all=True):
            return
        if trainer.is_global_zero:
            storage.remove(storage.temporary(path))
        if not failures:
            raise storage.not_written(path, RuntimeError("another process has failed"), _REMEDY)
        if not isinstance(failures[0], (OSError, RuntimeError, _failure_of_a_folder())):  # it can't be pickled, say
            raise failures[0]
        raise storage.not_written(path, failures[0], _REMEDY) from failures[0]

    # Reading

    def find(
        self,
        trainer: Trainer,
        path: Path | None,
        state_key: str,
        kept: Sequence[Round],
        what: str = "last good checkpoint",
        purpose: str = "go back to it",
    ) -> tuple[Path, Mapping[str, Any]]:
        """Find the checkpoint of a round that was kept, the last good one by default, and read it.

        Args:
            trainer: The Trainer.
            path: Of the checkpoint, if it is known.
            state_key: Of the callback.
            kept: The rounds that it has to know.
            what: What it is, for an error.
            purpose: What it is needed for.

        Returns:
            The path, and all that it holds; without the weights for a strategy that loads them into the model.

        Raises:
            FileNotFoundError: If it is gone.
            ValueError: If it can't be read, or has not the form of a checkpoint of a run.
            RuntimeError: If it is of another run.
        """
        if path is None or not path.exists():
            raise FileNotFoundError(
                f"The {what} {path} is gone, so the model can't {purpose}. Keep the folder of argument `dirpath` until "
                f"the run is over."
            )
        _check_leads_nowhere_else(path)
        into_model = loads_into_model(trainer)
        if path.is_dir() and self._weights_only:
            from lightning_easier.support.folders import check_folder

            with explained(path):
                check_folder(path)  # torch will unpickle it as it is
        checkpoint = self._read_on_cpu(path) if into_model else self.load(trainer, path)
        there = _check_form(path, checkpoint, state_key, with_weights=not into_model)
        if [*map(_as_it_began, there["rounds"])] != [_as_it_began(asdict(this)) for this in kept]:
            raise RuntimeError(
                f"The {what} {path} is of another run, so the model can't {purpose}. Give every run a `dirpath` of its "
                f"own."
            )
        return path, checkpoint

    def load(self, trainer: Trainer, path: Path) -> Mapping[str, Any]:
        """Have the strategy load a checkpoint that was found, the weights into the model if that is what it does.

        Raises:
            ValueError: If it can't be read.
        """
        with explained(path):
            return trainer.strategy.load_checkpoint(path, weights_only=self._weights_only_of(path))

    def still_best(
        self, trainer: Trainer, folder: str | None, state_key: str, best: Mapping[str, BestCheckpoint]
    ) -> dict[str, BestCheckpoint]:
        """Return those of the best checkpoints that are on disk still, the same on all processes.

        A run that is taken up at an older checkpoint may find that it has written better ones since: those are of a
        model that it has yet to become, or never will.
        """
        held = {
            number: each
            for number, each in best.items()
            if self._holds(Path(str(folder), each.file), state_key, number, each)
        }
        return dict(trainer.strategy.broadcast(held))

    def _holds(self, path: Path, state_key: str, number: str, best: BestCheckpoint) -> bool:
        if not path.exists():
            return False
        try:
            _check_leads_nowhere_else(path)
            then = _check_form(path, self._read_on_cpu(path), state_key, with_weights=False).get("best")
        except (OSError, ValueError) as error:
            rank_zero_warn(f"The best checkpoint of {number} removals does not count any more: {error}")
            return False
        return isinstance(then, Mapping) and bool(then.get(number) == asdict(best))

    def _read_on_cpu(self, path: Path) -> Mapping[str, Any]:
        """Read a checkpoint; of one that a sharding strategy has written as a folder, all but the weights."""
        return _read_on_cpu(path, self._weights_only_of(path))

    def _weights_only_of(self, path: Path) -> bool:
        """Tell whether a file is to be read as plain data: not if the user trusts it, or this run has written it."""
        known = self._digests.get(path)
        return self._weights_only and (known is None or _digest(path) != known)

    # The checkpoint that a run is taken up at

    def watch_loading(self, trainer: Trainer, model: nn.Module) -> None:
        """Note how the Trainer is told to load, name a file that can't be read, and bring the structure first.

        The latter is for strategies that load into the model. Nothing else is told before: Lightning's hooks come when
        the weights are there.
        """
        load, is_first = type(trainer.strategy).load_checkpoint, trainer.state.fn == TrainerFn.FITTING

        def note_and_load(path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            nonlocal is_first
            safely = weights_only is not False
            if is_first:  # others are those of finders, of what they have saved themselves
                self._weights_only, is_first = safely, False
            if loads_into_model(trainer):  # which may fail for other reasons than a file that can't be read
                restructure_as_marked(model, read_marks_of(Path(path), safely))
                return load(trainer.strategy, path, weights_only=weights_only)
            with loading.explained(
                Path(path), "argument `ckpt_path` to be a checkpoint", "pass `weights_only=False` with it"
            ):
                return load(trainer.strategy, path, weights_only=weights_only)

        trainer.strategy.load_checkpoint = note_and_load  # type: ignore[method-assign,assignment]

    @staticmethod
    def stop_watching_loading(trainer: Trainer) -> None:
        """Undo :meth:`watch_loading`."""
        vars(trainer.strategy).pop("load_checkpoint", None)


def round_file(number: int) -> str:
    """Return the name of a round's checkpoint."""
    return f"round_{number}.ckpt"


def best_file(removed: int) -> str:
    """Return the name of the best checkpoint for a number of removals."""
    return f"best_removed_{removed}.ckpt"


def _is_own_name(name: str) -> bool:
    """Tell whether a run writes files of that name."""
    return _OWN_NAME.fullmatch(name) is not None


def _holds_checkpoints(folder: Path) -> bool:
    """Tell whether there are any in a folder, of this library or of others, or one that was put aside."""
    left = storage.left_behind(folder, _is_own_name)
    return any(folder.glob("*.ckpt")) or any(storage.put_aside(path).exists() for path in left)


def _versions(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}-v{number}") for number in count(1))


def _is_version_of(version: Path, folder: Path) -> bool:
    """Tell whether a run that asked for a folder may have got this one."""
    version, folder = version.resolve(), folder.resolve()
    is_numbered = re.fullmatch(re.escape(folder.name) + "-v[0-9]+", version.name) is not None
    return version == folder or (version.parent == folder.parent and is_numbered)


def _failure_of_a_folder() -> type[BaseException]:
    from torch.distributed.checkpoint.api import CheckpointException  # takes a while to import, and few runs need it

    return CheckpointException


@contextmanager
def _failure_of_saving(trainer: Trainer) -> Iterator[list[BaseException]]:
    """Keep what goes wrong while a strategy saves, so that all processes leave the barrier after it."""
    own, save = vars(trainer.strategy).get("save_checkpoint"), trainer.strategy.save_checkpoint
    failures: list[BaseException] = []

    def try_to_save(*args: Any, **kwargs: Any) -> None:
        try:
            save(*args, **kwargs)
        except (Exception, _failure_of_a_folder()) as error:  # the latter is no Exception
            failures.append(error)

    trainer.strategy.save_checkpoint = try_to_save  # type: ignore[method-assign]
    try:
        yield failures
    finally:
        del trainer.strategy.save_checkpoint
        if own is not None:
            trainer.strategy.save_checkpoint = own  # type: ignore[method-assign]


def _digest_if_unsafe(trainer: Trainer, path: Path) -> str | None:
    """Look through what was written, without its weights; return its digest if it is not safe for others to read.

    All that it names is looked at, and nothing is built of it, which takes a sixth of the time of reading it. Where the
    user lets more be built, it is read: what is allowed may be what the safe reader can't fill, such as a deque.

    Raises:
        RuntimeError: If it is not whole.
    """
    if not path.is_dir() and not isinstance(trainer.strategy.checkpoint_io, TorchCheckpointIO):
        return None  # a format of the user's own, which is the plugin's business
    try:
        is_safe = not get_unsafe_globals_in_checkpoint(_held(path))
        if is_safe and _more_is_allowed():
            torch.load(_held(path), mmap=True, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # an instruction that the safe reader does not follow
        is_safe = False
    except (EOFError, ValueError) as error:
        raise RuntimeError(f"{path} is not whole: {error}") from error
    return None if is_safe else _digest(path)


def _more_is_allowed() -> bool:
    """Tell whether `torch.serialization.add_safe_globals` was called for more than what torch itself does that for."""
    allowed = [each[0] if isinstance(each, tuple) else each for each in get_safe_globals()]
    rooms = {str(getattr(each, "__module__", "")).partition(".")[0] for each in allowed}
    return not rooms <= {"torch", "builtins", "traceback"}


def _held(path: Path) -> Path:
    """Return where a checkpoint keeps what is no weight."""
    return path / "meta.pt" if path.is_dir() else path


def _digest(path: Path) -> str:
    with _held(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_leads_nowhere_else(path: Path) -> None:
    """Refuse a link that leads out of the folder.

    Raises:
        ValueError: If it is one.
    """
    if path.resolve().parent != path.parent.resolve():
        raise ValueError(
            f"Expected the checkpoint {path} to be a file in the folder of the run, but it is a link to "
            f"{path.resolve()}. Put the file itself there."
        )


def _check_form(path: Path, checkpoint: Any, state_key: str, with_weights: bool) -> Mapping[str, Any]:
    """Refuse what has not the form of a checkpoint of a run with this callback.

    Returns:
        The state of the callback.

    Raises:
        ValueError: If a part is missing or of another type.
    """
    parts: dict[str, type] = {"callbacks": Mapping}
    if with_weights:
        parts |= {"state_dict": Mapping, "optimizer_states": list, "lr_schedulers": list}
    for key, kind in parts.items():
        if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get(key), kind):
            raise ValueError(f"Expected {path} to be a checkpoint of this run, but it has no {key!r} that are such")
    optimizers = checkpoint["optimizer_states"] if with_weights else []
    if not all(isinstance(each, Mapping) and isinstance(each.get("param_groups"), list) for each in optimizers):
        raise ValueError(f"Expected {path} to be a checkpoint of this run, but its 'optimizer_states' are no such")
    state = checkpoint["callbacks"].get(state_key)
    if not isinstance(state, Mapping) or not isinstance(state.get("rounds"), list):
        raise ValueError(f"Expected {path} to be a checkpoint of this run, but it has no rounds of {state_key}")
    return state


def loads_into_model(trainer: Trainer) -> bool:
    """Tell whether the strategy loads a checkpoint straight into the model, whose structure has to be there before."""
    return trainer.strategy.restore_checkpoint_after_setup


def explained(path: Path) -> Any:
    """Turn what the reading of a checkpoint of a run raises into an error that names it."""
    return loading.explained(path, "a checkpoint of this run", _OPT_IN)


def _read_on_cpu(path: Path, weights_only: bool) -> Mapping[str, Any]:
    with explained(path):
        checkpoint: Mapping[str, Any] = torch.load(
            _held(path), mmap=True, map_location="cpu", weights_only=weights_only
        )
    return checkpoint


def read_marks_of(path: Path, weights_only: bool = True) -> dict[str, Any]:
    """Read what a checkpoint says of linear activations, without its weights.

    Args:
        path: A checkpoint file, or a folder that a sharding strategy has written.
        weights_only: As for :func:`torch.load`.

    Raises:
        ValueError: If it can't be read.
    """
    if not path.is_dir():
        state_dict = _read_on_cpu(path, weights_only)["state_dict"]
        return {key: value for key, value in state_dict.items() if key.endswith(MARK_KEY)}
    from lightning_easier.support.folders import check_folder, read_tensors_of

    with explained(path):
        if weights_only:
            check_folder(path)  # torch is about to unpickle the rest
        marks = read_tensors_of(path, MARK_KEY)
    return {key.removeprefix("state_dict."): value for key, value in marks.items()}


def _as_it_began(this: Mapping[str, Any]) -> dict[str, Any]:
    """Return a round without what epochs add to it after its checkpoint was written."""
    return {name: value for name, value in this.items() if name not in ("measured", "costs")}
