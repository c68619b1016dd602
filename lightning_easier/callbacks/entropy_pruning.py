"""EASIER's loop inside a Trainer: measure, make the least important activation linear, train on, judge.

Two moments matter. The *decision* falls at the end of a training epoch, when validation is over and every score is
known, and before ModelCheckpoint saves: a checkpoint pairs the score with the structure it belongs to, and holds the
decision. The *operation* follows at the start of the next epoch (or when a run is taken up again).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_easier.activations import ActivationSite, isolated_sites, match_names, planned_sites
from lightning_easier.arguments import as_globs, check_choice, check_integer, check_non_negative
from lightning_easier.callbacks import wiring
from lightning_easier.callbacks.optimizers import Position, drop_parameters, put_back_parameters
from lightning_easier.checkpoint import restructure_on_load, warn_if_rejected
from lightning_easier.criteria import lowest_entropy
from lightning_easier.dashboard import Dashboard, entropy_key
from lightning_easier.linearize import linearize, restore, stand_ins
from lightning_easier.probe import EntropyProbe
from lightning_easier.rectifiers import as_gates
from lightning_easier.report import PruningReport, Round

REMOVED_KEY = "removed"
# A fall that float32 can't tell from the tolerance is not beyond it.
_SCORE_RESOLUTION = torch.finfo(torch.float32).eps


class EntropyPruningCallback(Callback):
    """Make the activations of lowest entropy linear, round by round, while the score allows.

    The first round trains the dense model for ``warmup_epochs + epochs_per_round`` epochs; its score is the reference.
    Every further round starts by making activations linear, trains for ``epochs_per_round`` epochs, and is judged on
    the first validation at its end. If the score has fallen by more than ``tolerance`` from the dense score, structure,
    weights, optimizer and schedulers go back to those of the last good round, and the run stops. It stops as well when
    nothing is left to remove, or ``max_removals`` is reached. A round that the end of the run cuts short is judged on
    its last score.

    Logged: ``entropy/<activation>`` in bits for every activation that is not linear yet, and ``removed``. In
    TensorBoard, besides, one chart of all entropies, the score against the number removed, and an event per round.
    The model of every round that was kept is a checkpoint ``round_<number>.ckpt`` in ``dirpath``, the last of them
    :attr:`last_good`; :func:`~lightning_easier.load_pruned` loads it.

    Args:
        monitor: Name of the score, logged in a validation or training step or at the end of validation. (What is logged
            in the module's ``on_train_epoch_end`` comes too late.)
        mode: Whether a higher score is better (``"max"``) or a lower one (``"min"``).
        tolerance: By how much the score may fall below the dense score, in the score's own unit.
        epochs_per_round: Training epochs between two removals.
        removals_per_round: How many activations become linear at once.
        max_removals: How many may become linear in this run; no limit by default.
        warmup_epochs: Epochs before the dense round.
        include: Name globs of the activations that may become linear; all by default.
        exclude: Name globs of those that may not; they are not measured either.
        measure_on: Which batches the entropy is measured on.
        neuron_dim: Axis of the neurons by name glob, where the one found is not the one wanted.
        gates: Whether activations that bound their output (sigmoid, tanh, ...) may become linear too: all, or those
            named, see :func:`~lightning_easier.isolate_activations`.
        shift_padding: Whether the padding of a convolution behind a removed activation moves to the one before it,
            where the two would meet: training goes on with the very function that a collapse merges exactly. See
            :func:`~lightning_easier.linearize`.
        dirpath: Folder of the rounds' checkpoints; ``entropy_pruning`` in the logger's folder by default.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument has a value out of range.
        MisconfigurationException: When training starts, if there is no activation or a glob matches none, if there is
            nothing to measure on, or a strategy or another callback does not go with it; after the first epoch, if
            ``monitor`` was not logged.

    Source: EASIER, arXiv 2404.18949.

    Note:
        EASIER restarts optimizer and schedule every round; here both go on. A model that comes with linear activations
        keeps them; the score of this run's first round is the reference. The Trainer's ``min_epochs`` keeps it training
        when pruning is over, without judging what follows.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> pruning = EntropyPruningCallback(monitor="val_acc", mode="max", tolerance=0.01)
        >>> trainer = Trainer(callbacks=[pruning], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "max",
        tolerance: float = 0.01,
        epochs_per_round: int = 1,
        removals_per_round: int = 1,
        max_removals: int | None = None,
        warmup_epochs: int = 0,
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
        measure_on: Literal["validation", "training"] = "validation",
        neuron_dim: dict[str, int] | None = None,
        gates: bool | list[str] = False,
        shift_padding: bool = True,
        dirpath: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(monitor, str) or not monitor:
            raise ValueError(f"Expected argument `monitor` to be the name of a logged score, but got {monitor!r}")
        check_choice("mode", mode, ("min", "max"))
        check_choice("measure_on", measure_on, ("validation", "training"))
        check_non_negative("tolerance", tolerance)
        check_integer("epochs_per_round", epochs_per_round, 1)
        check_integer("removals_per_round", removals_per_round, 1)
        check_integer("warmup_epochs", warmup_epochs, 0)
        if max_removals is not None:
            check_integer("max_removals", max_removals, 1)
        self.monitor = monitor
        self.mode = mode
        self.tolerance = tolerance
        self.epochs_per_round = epochs_per_round
        self.removals_per_round = removals_per_round
        self.max_removals = max_removals
        self.warmup_epochs = warmup_epochs
        self.include = as_globs("include", include)
        self.exclude = as_globs("exclude", exclude)
        self.measure_on = measure_on
        if neuron_dim is not None and not isinstance(neuron_dim, Mapping):
            raise TypeError(f"Expected argument `neuron_dim` to map name globs to axes, but got {neuron_dim!r}")
        self.neuron_dim = dict(neuron_dim or {})
        self.gates = sorted(as_gates(gates))
        if not isinstance(shift_padding, bool):
            raise TypeError(f"Expected argument `shift_padding` to be a bool, but got {shift_padding!r}")
        self.shift_padding = shift_padding
        if dirpath is not None and not isinstance(dirpath, str | Path):
            raise TypeError(f"Expected argument `dirpath` to be a path, but got {dirpath!r}")
        self.dirpath = None if dirpath is None else str(dirpath)

        self._candidates: list[str] | None = None  # None: the activations were not looked for yet
        self._sites: list[ActivationSite] | None = None  # None: the structure may have changed
        self._active = False
        self._stage: str | None = None  # of the Trainer, while it runs
        self._load_handle: RemovableHandle | None = None
        self._probe: EntropyProbe | None = None
        self._dashboard: Dashboard | None = None
        self._not_called: dict[str, RemovableHandle] = {}  # hooks that go away when training calls the activation
        self._reset()

    def _reset(self) -> None:
        """Set what a checkpoint carries to the start of a run."""
        self._rounds: list[Round] = [Round([], {}, None, None, None, 0)]
        self._epochs = 0  # finished in the round
        self._measured: dict[str, float] | None = None  # entropies of the structure as it is, if measured
        self._validated = False  # whether the structure as it is was
        self._validated_this_epoch = False
        self._pending: dict[str, Any] | None = None  # decided, not carried out
        self._finished = False  # nothing more will be decided
        self._last_good: str | None = None
        self._dropped: list[Position] = []  # where the parameters removed in this round were

    # What a user may ask for

    @property
    def rounds(self) -> list[Round]:
        """The rounds so far, the dense one first."""
        return list(self._rounds)

    @property
    def removed(self) -> list[str]:
        """The activations that are linear by now, in the order of their removal."""
        return [name for this in self._rounds if this.accepted is not False for name in this.removed]

    @property
    def last_good(self) -> Path | None:
        """Checkpoint of the last round that was kept; None before the first was judged."""
        return None if self._last_good is None else Path(self._last_good)

    def report(self) -> PruningReport:
        """Return what the run did, round by round."""
        return PruningReport(self.monitor, self.rounds)

    def select(self, entropies: Mapping[str, float], count: int) -> list[str]:
        """Choose the activations that become linear next; override for another criterion.

        Args:
            entropies: Name -> entropy in bits of the candidates, in execution order, the same on all processes.
            count: How many to choose at most.
        """
        return lowest_entropy(entropies, count)

    # Start of a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Isolate the activations before weights are loaded and the strategy wraps the model."""
        twins = [callback for callback in trainer.callbacks if isinstance(callback, EntropyPruningCallback)]  # type: ignore[attr-defined]
        if len(twins) > 1:
            raise MisconfigurationException(
                f"Expected one EntropyPruningCallback in the Trainer, but got {len(twins)}; give one of them all globs"
            )
        self._active = not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._candidates = self._sites = None
        self._stage = stage
        if stage == TrainerFn.FITTING and trainer.current_epoch == 0:  # else a Trainer that goes on
            self._reset()
        # A model that is built in `setup` or `configure_model` is looked at when it is whole, in on_fit_start.
        if not any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model")):
            self._discover(trainer, pl_module)
        self._load_handle = restructure_on_load(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Isolate the activations of a model that was not whole before."""
        if self._candidates is None:
            self._discover(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._remove_hooks()
        self._stage = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        self._detach()
        self._stop_watching()
        if self._load_handle is not None:
            self._load_handle.remove()
            self._load_handle = None

    def _discover(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find and isolate the activations; check globs and wiring before anything is changed."""
        sites = {site.name: site.module for site in planned_sites(pl_module, self.gates)}
        names = list(sites)
        linear = list(stand_ins(pl_module))
        if not names and not linear:
            raise MisconfigurationException(
                f"Expected {type(pl_module).__name__} to call at least one rectifier, but found none. Rectifiers are "
                f"the activations of torch.nn from ReLU to Softplus; see `isolate_activations`."
            )
        try:
            known = names + linear
            chosen = match_names(known, self.include, self.exclude)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        for glob in self.neuron_dim:
            if not any(fnmatchcase(name, glob) for name in known):
                raise MisconfigurationException(
                    f"Expected argument `neuron_dim` to hold globs that match activations, but {glob!r} matches none "
                    f"of {known}"
                )
        if not chosen:
            raise MisconfigurationException(
                f"Expected arguments `include` {self.include} and `exclude` {self.exclude} to leave activations to "
                f"prune, but they leave none of {known}"
            )
        if trainer.state.fn == TrainerFn.FITTING:
            live = {name: sites[name] for name in chosen if name in sites}
            wiring.check(trainer, live, self.measure_on, self.dirpath)
        self._candidates = chosen
        if self._active:
            isolated_sites(pl_module, self.gates)

    # Measuring

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        if not self._active or trainer.sanity_checking:
            return
        if self._probe is not None:  # training batches are counted, these are not
            self._probe.paused = True
        elif self.measure_on == "validation" or trainer.state.fn != TrainerFn.FITTING:
            self._attach(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the entropies and the number removed."""
        if not self._active or trainer.sanity_checking:
            return
        self._validated = self._validated_this_epoch = True
        if self._probe is not None and not self._probe.paused:
            self._measured = self._read(trainer, pl_module)
        on_all = trainer.world_size > 1
        pl_module.log(REMOVED_KEY, float(len(stand_ins(pl_module))), prog_bar=True, sync_dist=on_all)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count training batches again, if those are counted."""
        if self._probe is not None:
            self._probe.paused = False

    def _live_sites(self, pl_module: LightningModule) -> list[ActivationSite]:
        """Return the activations that are not linear; looking for them costs time, so it is done once."""
        if self._sites is None:
            self._sites = isolated_sites(pl_module, self.gates)
        return [site for site in self._sites if pl_module.get_submodule(site.name) is site.module]

    def _attach(self, pl_module: LightningModule) -> None:
        self._detach()
        excluded = self.exclude or ()
        sites = [s for s in self._live_sites(pl_module) if not any(fnmatchcase(s.name, glob) for glob in excluded)]
        neuron_dim = {  # what an axis was given for may be linear by now
            glob: axis for glob, axis in self.neuron_dim.items() if any(fnmatchcase(site.name, glob) for site in sites)
        }
        self._probe = EntropyProbe(sites, neuron_dim)
        self._probe.attach()
        wiring.forget_compiled_code(pl_module)

    def _detach(self) -> None:
        if self._probe is not None:
            self._probe.detach()
            self._probe = None

    def _stop_watching(self) -> None:
        for handle in self._not_called.values():
            handle.remove()
        self._not_called = {}

    def _watch_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notice which activations training does not call; each hook goes away at the first call."""
        self._stop_watching()
        for site in self._live_sites(pl_module):

            def note(module: nn.Module, args: Any, name: str = site.name) -> None:
                if not trainer.validating and name in self._not_called:
                    self._not_called.pop(name).remove()

            self._not_called[site.name] = site.module.register_forward_pre_hook(note)

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        assert self._probe is not None
        self._probe.detach()
        wiring.forget_compiled_code(pl_module)
        entropies = self._probe.entropies()
        self._probe = None
        values = {entropy_key(name): value for name, value in entropies.items()}
        pl_module.log_dict(values, sync_dist=trainer.world_size > 1)
        return entropies

    # The loop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Carry out what was decided before the run was interrupted."""
        if not self._active:
            return
        self._dashboard = Dashboard(trainer.loggers, self.monitor)
        self._dashboard.write_layout()
        given = len(stand_ins(pl_module)) - len(self.removed)
        if given > 0:
            rank_zero_info(f"{given} activations are linear from the start; they stay so and are not judged.")
        if self._finished:
            trainer.should_stop = True
            rank_zero_info("Pruning was over when this run was saved; remove EntropyPruningCallback to train on.")
        self._operate(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Carry out what was decided at the end of the last epoch."""
        if not self._active:
            return
        self._validated_this_epoch = False
        self._operate(trainer, pl_module)
        if self._finished:
            return
        if self.measure_on == "training":
            self._attach(pl_module)
        elif not wiring.is_compiled(pl_module):  # hooks would cost it a compilation
            self._watch_training(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the round, if this was its last epoch, and decide on the next."""
        if not self._active or self._finished:
            return
        if self._probe is not None:
            self._measured = self._read(trainer, pl_module)
        idle = list(self._not_called)
        self._stop_watching()
        if not trainer.is_last_batch:  # the run ends inside an epoch; on_train_end judges
            return
        self._epochs += 1
        self._check_validation_ran(trainer)
        score = self._score(trainer)
        judgeable = self._validated_this_epoch or not trainer.enable_validation
        if score is not None and judgeable and self._measured is not None and self._epochs >= self._length_of_round():
            self._judge(trainer, score)
            self._decide(trainer, idle)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge a round that the end of the run has cut short, and go back if that is what was decided."""
        if not self._active:
            return
        self._detach()
        self._stop_watching()
        this = self._rounds[-1]
        if this is self._rounds[0] and this.accepted is None:
            rank_zero_warn(
                f"Nothing was pruned: the run ended before its first round, {self._length_of_round()} epochs with a "
                f"validation at their end."
            )
        if this.removed and this.accepted is None:
            score = self._score(trainer) if self.monitor in trainer.callback_metrics else None
            if score is None:
                this.accepted = False
                rank_zero_info(f"Round {len(self._rounds) - 1} ended without a score.")
            else:
                self._judge(trainer, score)
            if this.accepted:
                self._save(trainer)
            else:
                self._pending = {"action": "go_back"}
        if self._pending is not None and self._pending["action"] == "go_back":
            self._operate(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when there was nothing to train on."""
        if (
            self._active
            and trainer.num_training_batches == 0
            and trainer.limit_train_batches != 0
            and trainer.max_epochs
        ):
            raise MisconfigurationException(
                "EntropyPruningCallback needs training batches, but the training loader yielded none. Check its "
                "dataset and batch size (`drop_last` drops an incomplete batch)."
            )

    def _length_of_round(self) -> int:
        return self.epochs_per_round + (self.warmup_epochs if len(self._rounds) == 1 else 0)

    def _check_validation_ran(self, trainer: Trainer) -> None:
        every = trainer.check_val_every_n_epoch
        due = every is not None and (trainer.current_epoch + 1) % every == 0
        if self.measure_on == "validation" and due and not self._validated_this_epoch:
            raise MisconfigurationException(
                f"EntropyPruningCallback measures on validation batches, but validation in epoch "
                f"{trainer.current_epoch} ran none: the validation loader yielded nothing. Check its dataset, or "
                f"pass measure_on='training'."
            )

    def _score(self, trainer: Trainer) -> float | None:
        """Return the score of the structure as it is, None if there is none yet."""
        if trainer.enable_validation and not self._validated:
            return None
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"Expected argument `monitor` to be a logged score, but {self.monitor!r} is not among "
                f"{sorted(trainer.callback_metrics)}. Log it with `self.log({self.monitor!r}, ...)` in the validation "
                f"step."
            )
        # Processes may hold values of their own, if the user logs without sync_dist; rank 0 decides for all.
        score = float(trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor])))
        if not math.isfinite(score):
            if self._last_good is not None and self._rounds[-1].removed:
                self._rounds[-1].accepted = False
                self._go_back(trainer, trainer.lightning_module)
            raise ValueError(
                f"Expected the score of argument `monitor` {self.monitor!r} to be finite, but got {score} in epoch "
                f"{trainer.current_epoch}. The training has diverged: lower the learning rate. The last good model is "
                f"{self._last_good or 'an earlier checkpoint'}."
            )
        return score

    def _judge(self, trainer: Trainer, score: float) -> None:
        """Compare a round with the dense model."""
        dense, this = self._rounds[0], self._rounds[-1]
        this.score_after = score
        if this is not dense:
            assert dense.score_after is not None
            fall = (dense.score_after - score) * (1 if self.mode == "max" else -1)
            this.accepted = fall <= self.tolerance + _SCORE_RESOLUTION * abs(dense.score_after)
        else:
            this.accepted = True
        number = len(self._rounds) - 1
        if self._dashboard is not None:
            self._dashboard.write_score(score, len(stand_ins(trainer.lightning_module)))
            self._dashboard.write_event(self.report().event(number), trainer.global_step)
        what = ", ".join(f"`{name}` ({this.entropies[name]:.4f} bit)" for name in this.removed) or "nothing (dense)"
        what += "".join(f"; {shift}" for shift in this.shifts.values())
        verdict = (
            "kept" if this.accepted else f"beyond the tolerance {self.tolerance:g} of the dense {dense.score_after:.4f}"
        )
        rank_zero_info(f"Round {number}: made linear {what}; {self.monitor} {score:.4f}: {verdict}.")

    def _decide(self, trainer: Trainer, idle: list[str]) -> None:
        """Decide what happens at the start of the next epoch; ``idle`` activations were not called in training."""
        if not self._rounds[-1].accepted:
            self._pending = {"action": "go_back"}
            self._stop(trainer)
            return
        assert self._measured is not None
        candidates = {name: value for name, value in self._measured.items() if name in (self._candidates or ())}
        unused = [name for name in candidates if name in idle]
        if unused:
            rank_zero_warn(
                f"Training does not call {unused}, which validation calls: they are left alone. Does `training_step` "
                f"call other methods than the model's forward?"
            )
            candidates = {name: value for name, value in candidates.items() if name not in unused}
        allowed = math.inf if self.max_removals is None else self.max_removals - len(self.removed)
        count = int(min(self.removals_per_round, allowed, len(candidates)))
        names = list(self.select(candidates, count))[:count] if count > 0 else []
        names = trainer.strategy.broadcast(names)
        if not set(names) <= set(candidates):
            raise ValueError(f"Expected `select` to choose among {list(candidates)}, but it returned {names}")
        if names:
            self._pending = {
                "action": "remove",
                "names": list(names),
                "entropies": {name: candidates[name] for name in names},
            }
        else:
            rank_zero_info(f"{len(self.removed)} activations are linear and no more may become so: pruning is over.")
            self._stop(trainer)
        self._save(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self._finished = True
        trainer.should_stop = True

    def _operate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Carry out what was decided, once."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending["action"] == "go_back":
            self._go_back(trainer, pl_module)
            return
        names = pending["names"]
        modules = {name: pl_module.get_submodule(name) for name in names}
        score = self._rounds[-1].score_after
        linearize(pl_module, names, shift_padding=self.shift_padding)
        linear = stand_ins(pl_module)
        shifts = {name: str(linear[name].shift) for name in names if linear[name].moves_padding}
        live = set(pl_module.parameters())
        gone = [p for module in modules.values() for p in module.parameters() if p not in live]
        self._dropped = drop_parameters(trainer.optimizers, gone)
        self._rounds.append(
            Round(list(names), dict(pending["entropies"]), score, None, None, trainer.current_epoch, shifts)
        )
        self._epochs, self._measured, self._validated = 0, None, False

    def _save(self, trainer: Trainer) -> None:
        """Save the state of a round that was kept on disk, where it costs no device memory.

        Each round has a file of its own: a run that is taken up at an older checkpoint still finds the one it needs.
        """
        folder = self.dirpath or str(Path(trainer.log_dir or trainer.default_root_dir) / "entropy_pruning")
        folder = trainer.strategy.broadcast(folder)
        self._last_good = str(Path(folder) / f"round_{len(self._rounds) - 1}.ckpt")
        trainer.save_checkpoint(self._last_good, weights_only=False)

    def _go_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back structure, weights, optimizer and schedulers of the last good round."""
        if self._last_good is None or not Path(self._last_good).is_file():
            raise FileNotFoundError(
                f"The last good checkpoint {self._last_good} is gone, so the model can't go back to it. Keep the "
                f"folder of argument `dirpath` until the run is over."
            )
        checkpoint = trainer.strategy.load_checkpoint(self._last_good, weights_only=False)
        if checkpoint["callbacks"][self.state_key]["rounds"] != [asdict(this) for this in self._rounds[:-1]]:
            raise RuntimeError(
                f"The last good checkpoint {self._last_good} is of another run, so the model can't go back to it. Give "
                f"every run a `dirpath` of its own."
            )
        names = self._rounds[-1].removed
        linear = stand_ins(pl_module)
        live = set(pl_module.parameters())
        gone = [p for name in names for p in linear[name].activation.parameters() if p not in live]
        restore(pl_module, names)
        self._sites = None
        put_back_parameters(trainer.optimizers, gone, self._dropped)
        trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
            config.scheduler.load_state_dict(state)
        self._dropped, self._finished = [], True
        for logger in trainer.loggers:
            logger.log_metrics({REMOVED_KEY: float(len(stand_ins(pl_module)))}, trainer.global_step)
        rank_zero_info(
            f"Went back to the last good model, {self._last_good}, with {len(self.removed)} linear activations."
        )

    # What a checkpoint carries

    def state_dict(self) -> dict[str, Any]:
        """Return plain data: it loads with ``weights_only=True``."""
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "rounds": [asdict(this) for this in self._rounds],
            "epochs": self._epochs,
            "measured": self._measured,
            "validated": self._validated,
            "validated_this_epoch": self._validated_this_epoch,
            "pending": self._pending,
            "finished": self._finished,
            "last_good": self._last_good,
            "dropped": [list(position) for position in self._dropped],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a run where its checkpoint left it; the structure comes with the model's own state dict.

        To validate, test or predict with a checkpoint is not to take up its run: rounds and report stay as they are.

        Raises:
            MisconfigurationException: If the run was judged on another score.
        """
        if self._stage not in (None, TrainerFn.FITTING):
            warn_if_rejected(state_dict)
            return
        judged_on = (state_dict["monitor"], state_dict["mode"])
        if judged_on != (self.monitor, self.mode):
            raise MisconfigurationException(
                f"Expected arguments `monitor` and `mode` to be {judged_on}, those of the run that is resumed, but got "
                f"{(self.monitor, self.mode)}: its rounds can't be compared on another score."
            )
        self._rounds = [Round(**this) for this in state_dict["rounds"]]
        self._epochs = state_dict["epochs"]
        self._measured = state_dict["measured"]
        self._validated = state_dict["validated"]
        self._validated_this_epoch = state_dict["validated_this_epoch"]
        self._pending = state_dict["pending"]
        self._finished = state_dict["finished"]
        self._last_good = state_dict["last_good"]
        self._dropped = [list(position) for position in state_dict["dropped"]]
