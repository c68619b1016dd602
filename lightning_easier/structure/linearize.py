"""Make activations linear, reversibly, and give a model the structure that a state dict is marked with."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_easier.measure.affines import AffineFit
from lightning_easier.sites.activations import isolate, plan_isolation, replace_activation, unwrap
from lightning_easier.sites.discovery import IsolationPlan
from lightning_easier.sites.rectifiers import GATES, activation_kind
from lightning_easier.structure.block_operators import dtype_of_values
from lightning_easier.structure.padding import PaddingShift, apply_shifts, check_undoable, possible_shift, undo_shifts
from lightning_easier.structure.stand_in import (
    LEAVES,
    MARK_KEY,
    OPERATOR,
    STAND_INS,
    AffineStandIn,
    BlockStandIn,
    IdentityStandIn,
    Mark,
    OperatorStandIn,
    StandIn,
)
from lightning_easier.structure.substitution import Absorbed, ChainFit, Form, Substitution
from lightning_easier.support.arguments import check_bool, check_choice


def linearize(
    model: nn.Module,
    names: Iterable[str],
    *,
    stand_in: str = "identity",
    statistics: Mapping[str, AffineFit] | Mapping[str, ChainFit] | None = None,
    shift_padding: bool = True,
    trainable: bool = False,
) -> nn.Module:
    """Make the named activations linear, in place.

    Args:
        model: Any module; its activations are isolated first.
        names: Qualified names as :func:`~lightning_easier.isolate_activations` returns them, those of gates among
            them. Names that are linear already stay so.
        stand_in: What takes the place of an activation: ``"identity"``, or ``"affine"``, a scale and an offset for each
            channel. Both are linear, and an exact collapse folds them into their neighbours. Or ``"fitted"``: one
            operator takes the place of the operators around it, too. It moves into the first of them, whose parameters
            stay the same objects; the others become identities.
        statistics: For ``"affine"``: name -> scale and offset, as :func:`~lightning_easier.measure_affines` returns
            them. For ``"fitted"``: name -> operator, as :func:`~lightning_easier.fit_chains` returns them for the
            model as it is.
        shift_padding: Where a convolution before the activation and one after it would meet, move the padding of the
            second to the first: with strides s₁ and paddings p₁, p₂ the first then pads p₁ + s₁·p₂ and the second
            nothing. The function changes at the borders, and the two can be merged exactly. Operators of other kinds,
            with other padding modes or with a second reader keep theirs.
        trainable: Whether scale and offset of ``"affine"`` are parameters, which an optimizer that is made afterwards
            trains; by default they are buffers.

    Returns:
        The same model.

    Raises:
        TypeError: If ``names`` is a string, or ``model`` is not a Module.
        ValueError: If a name or ``stand_in`` is unknown, or ``statistics`` do not go with it or are not finite.

    Source: EASIER, arXiv 2404.18949, for the identity. Moving the padding:
        Kim et al., Efficient Latency-Aware CNN Depth Compression (ICML 2023).

    Example:
        >>> from torch import nn
        >>> linearize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1"])
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): IdentityStandIn(in place of ReLU())
        )
    """
    check_choice("stand_in", stand_in, (*STAND_INS, "fitted"))
    check_bool("shift_padding", shift_padding)
    check_bool("trainable", trainable)
    if trainable and stand_in == "identity":
        raise ValueError("Expected argument `trainable` to be False with stand_in='identity', which has no parameters")
    inner = unwrap(model)
    linear = stand_ins(inner)
    names = [name for name in _as_names(names) if name not in linear]
    fits = _checked(statistics, stand_in, names, _floating(inner).dtype)
    wanted: dict[str, _Wanted] = {}
    taken: set[str] = set()
    for name in names:
        fit = fits.get(name)
        if isinstance(fit, ChainFit):
            taken |= _check_fit(inner, name, fit, taken)
            order = len(wanted) + max((each.form.order + 1 for each in _substitutions(inner).values()), default=0)
            form = replace(fit.form, order=order)
            wanted[name] = _Wanted(fit.affine, trainable, form, fit.tensors)
        else:
            wanted[name] = _Wanted(fit, trainable)
    _make_linear(inner, wanted, shift_padding and stand_in != "fitted")
    return model


def bypass(model: nn.Module, names: Iterable[str], leaves: str = "identity", returns: int = 0) -> nn.Module:
    """Take modules out, in place: activations, or blocks whose output has the shape of their input.

    A state dict marks them, and :func:`restore` brings them back, as it does after :func:`linearize`.

    Args:
        model: Any module.
        names: Qualified names of modules.
        leaves: What they leave: ``"identity"``, the first tensor that they are called with, or ``"zeros"`` like it.
        returns: How many values they return, if that is a tuple, the first of them that value; 0 otherwise.

    Returns:
        The same model.

    Raises:
        ValueError: If there is no module of a name, or it is gone already, or ``leaves`` is unknown.
    """
    check_choice("leaves", leaves, LEAVES)
    inner, names = unwrap(model), list(dict.fromkeys(_as_names(names)))
    _check_modules(inner, names)
    with _operators_as_built(inner):
        for name in names:
            replace_activation(inner, name, BlockStandIn(inner.get_submodule(name), leaves, returns))
    return model


def replace_block(model: nn.Module, name: str, operator: nn.Module, returns: int = 0) -> nn.Module:
    """Put an operator in the place of a block whose output has the shape of its input, in place.

    A state dict marks it, and :func:`restore` brings the block back, as it does after :func:`bypass`.

    Args:
        model: Any module.
        name: Qualified name of the block.
        operator: A Linear, a convolution, a scale and an offset for each channel, or several in a row; it reads the
            first tensor that the block is called with. Its parameters are the model's from then on, trained if anything
            in the block was; it keeps its dtype if the model has anything of that, else it gets that of the block.
        returns: How many values the block returns, if that is a tuple, the first of them the value; 0 otherwise.

    Returns:
        The same model.

    Raises:
        ValueError: If there is no module of that name, or it is gone already.
    """
    inner = unwrap(model)
    _check_modules(inner, [name])
    with _operators_as_built(inner):
        block = inner.get_submodule(name)
        like = next((each for each in block.parameters() if each.is_floating_point()), _floating(inner))
        seen = next((each.dtype for each in operator.parameters()), None)
        operator.to(like.device, dtype_of_values(block, inner, seen))
        replace_activation(inner, name, OperatorStandIn(block, operator, returns))
    return model


def _check_modules(inner: nn.Module, names: Sequence[str]) -> None:
    """Refuse to take out what is not there, or what something outside was changed with."""
    there = dict(inner.named_modules())
    for name in names:
        if name not in there or not name:
            raise ValueError(f"Expected argument `names` to hold names of modules, but got {name!r}")
        if isinstance(there[name], StandIn):  # no model would have what a mark of it names
            raise ValueError(
                f"Expected argument `names` to hold modules that are there, but got {name!r}, which is gone: "
                f"{there[name]}. Restore it first."
            )
    inside = tuple(f"{name}." for name in names)
    for site, stand_in in stand_ins(inner).items():
        around = {other for other in stand_in.names_around(site) if other in names or other.startswith(inside)}
        if around and site not in names and not site.startswith(inside):
            raise ValueError(
                f"Expected argument `names` to hold modules that nothing outside of them was changed with, but where "
                f"{site!r} became linear {sorted(around)} were changed, too. Restore {site!r} first."
            )


class _Wanted(NamedTuple):
    """What is to take the place of an activation.

    Attributes:
        affine: The affine; None for an identity.
        trainable: Whether it is trained.
        form: What becomes of the chain around the activation, if anything does.
        tensors: The values that belong to it; None while they are to be loaded.
    """

    affine: AffineFit | None = None
    trainable: bool = False
    form: Form | None = None
    tensors: Mapping[str, torch.Tensor] | None = None

    def substitution(self, model: nn.Module, site: str) -> Substitution | None:
        """Return what carries out its form; None if it has none."""
        if self.form is None:
            return None
        if self.tensors is None:
            return Substitution.blank(self.form, model, site)
        return Substitution(self.form, self.tensors)


def _check_fit(model: nn.Module, site: str, fit: ChainFit, taken: Collection[str]) -> set[str]:
    """Refuse a fit to a chain that is not there as it was; return the names of its operators.

    Args:
        model: The model.
        site: Name of the activation.
        fit: The fit.
        taken: The operators that other fits of the same call take.

    Raises:
        ValueError: If an operator is missing, or another fit takes it.
    """
    modules = dict(model.named_modules())
    names = Substitution(fit.form, fit.tensors).names(site)
    gone = [name for name in names if name not in modules or isinstance(modules[name], Absorbed) or name in taken]
    if gone:
        raise ValueError(
            f"Expected argument `statistics` to hold operators fitted to the model as it is, but that of {site!r} "
            f"needs {gone}, which are not there, or gone into another operator. Linearize one of the two, and fit "
            f"again with `fit_chains`."
        )
    return set(names)


def _make_linear(model: nn.Module, wanted: Mapping[str, _Wanted], shift_padding: bool) -> None:
    """Put stand-ins in the place of activations that are not linear yet.

    Args:
        model: The model.
        wanted: Name -> what takes its place.
        shift_padding: As for :func:`linearize`.
    """
    plan, gates = _plan_for(model, wanted)
    for name in wanted:
        if name not in plan.found:
            close = get_close_matches(name, plan.found, n=3) or list(plan.found)[:5]
            raise ValueError(
                f"Expected argument `names` to hold names of activations, but got {name!r}. Did you mean one of "
                f"{close}? `isolate_activations(model)` lists all {len(plan.found)}."
            )
    sites = {site.name: site for site in plan.sites} if shift_padding else {}
    shifts = {name: possible_shift(name, sites[name].neighbourhood) for name in wanted if shift_padding}
    fitted = {name for site, each in _substitutions(model).items() for name in each.names(site)}
    for name, shift in shifts.items():
        if shift is not None and {*shift.names(name)} & fitted:  # a fit has a padding of its own
            shifts[name] = None
    if gates:  # only those that are named become modules
        plan = plan_isolation(model, gates)
    isolate(model, plan)
    activations = {name: module for name, (module, _) in plan.found.items()}
    like = _floating(model)
    with _operators_as_built(model):
        for name, want in wanted.items():
            made: StandIn
            around = shifts.get(name), want.substitution(model, name)
            if want.affine is None:
                made = IdentityStandIn(activations[name], *around)
            else:
                made = AffineStandIn(activations[name], want.affine, want.trainable, *around).to(like)
            replace_activation(model, name, made)


def _checked(
    statistics: Mapping[str, AffineFit] | Mapping[str, ChainFit] | None,
    stand_in: str,
    names: Iterable[str],
    dtype: torch.dtype,
) -> Mapping[str, AffineFit | ChainFit]:
    """Return what was measured for each name; nothing for identities."""
    if stand_in == "identity":
        if statistics is not None:
            raise ValueError("Expected argument `statistics` to be None: the identity stand-in takes no statistics")
        return {}
    what, measured, kind = {
        "affine": ("affine", "measure_affines", AffineFit),
        "fitted": ("operator", "fit_chains", ChainFit),
    }[stand_in]
    for name in names:
        if not isinstance((statistics or {}).get(name), kind):
            raise ValueError(
                f"Expected argument `statistics` to hold the {what} of {name!r}, as `{measured}(model, batches)` "
                f"returns it, but got {(statistics or {}).get(name)!r}"
            )
    for name in names:
        if not (statistics or {})[name].is_finite_in(dtype):
            raise ValueError(
                f"Expected argument `statistics` to hold finite numbers in the dtype of the model, {dtype}, but those "
                f"of {name!r} are not. Measure with data and weights that are finite, or leave {name!r} out of `names`."
            )
    return statistics or {}


def _floating(model: nn.Module) -> torch.Tensor:
    """Return a tensor of the model's dtype, on its device."""
    return next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.empty(0))


def restore(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Bring back activations that were made linear, in place.

    Args:
        model: A model that :func:`linearize`, :func:`bypass` or :func:`replace_block` has changed.
        names: Which ones; all of them by default, those among them that had gone in a block before the block went.

    Returns:
        The same model.

    Raises:
        TypeError: If ``names`` is a string, or ``model`` is not a Module.
        ValueError: If a name is not that of a linearized activation, or of one inside a block that stays away.

    Example:
        >>> from torch import nn
        >>> restore(linearize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1"]))
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): ReLU()
        )
    """
    inner = unwrap(model)
    gone = _gone(inner)
    if names is None:
        chosen = gone
    else:
        names = set(_as_names(names))
        _check_names_can_come_back(gone, names)
        _check_nothing_builds_on(gone, names)
        chosen = [each for each in gone if each.name in names]
    with _operators_as_built(inner):
        for each in chosen:
            _put_original(inner, each)
    return model


class _Gone(NamedTuple):
    """Something that was made linear or taken out.

    Attributes:
        name: Its qualified name.
        stand_in: What is in its place.
        inside: Name of the block that it went with after that; None if the stand-in is in the model.
    """

    name: str
    stand_in: StandIn
    inside: str | None


def _gone(
    model: nn.Module, marks: Mapping[str, Mark] | None = None, prefix: str = "", inside: str | None = None
) -> list[_Gone]:
    """List what is gone, each block before what had gone inside of it.

    Args:
        model: The model, or a block that was taken out of one.
        marks: Leave out what is gone as these say, with all that is inside of it.
        prefix: Of the names; that of the block and a dot.
        inside: The name of the block; None for a model.
    """
    found = []
    for local, stand_in in stand_ins(model).items():
        name = f"{prefix}{local}".removesuffix(".")
        if marks is None or marks.get(name) != stand_in.mark:
            found += [_Gone(name, stand_in, inside), *_gone(stand_in.activation, marks, f"{name}.", name)]
    return found


def _put_original(inner: nn.Module, gone: _Gone) -> None:
    """Put back what a stand-in is in the place of; operators have to be as they were built meanwhile."""
    stand_in = gone.stand_in
    original = stand_in.activation
    original.train(stand_in.training)
    if isinstance(stand_in, BlockStandIn):
        stand_in.bring_along()
    elif next(original.parameters(), None) is not None:  # it was not moved or cast with the model
        original.to(_floating(inner))
    replace_activation(inner, gone.name, original)


def _check_names_can_come_back(gone: Sequence[_Gone], names: Collection[str]) -> None:
    """Refuse names of what is not gone, or of what would come back into a block that stays away."""
    around = {each.name: each.inside for each in gone}
    for name in names:
        if name not in around:
            linear = [each.name for each in gone if each.inside is None]
            raise ValueError(
                f"Expected argument `names` to hold names of linearized activations, but got {name!r}; linear are "
                f"{linear}"
            )
        block = around[name]
        if block not in {None, name, *names}:
            raise ValueError(
                f"Expected argument `names` to hold {block!r} besides {name!r}, which is inside of that block, and the "
                f"block was taken out after it. Restore the block first, or both at once."
            )


def _check_nothing_builds_on(gone: Sequence[_Gone], names: Collection[str]) -> None:
    """Refuse to restore what a later fit, which is in the model then, was made on top of."""
    fits = {
        each.name: each.stand_in.substitution
        for each in gone
        if each.stand_in.substitution is not None and (each.inside is None or each.inside in names)
    }
    for name in names & fits.keys():
        mine = fits[name]
        for other, later in fits.items():
            if (
                later.form.order > mine.form.order
                and other not in names
                and {*later.names(other)} & {*mine.names(name)}
            ):
                raise ValueError(
                    f"Expected argument `names` to hold {other!r} besides {name!r}: the operator in its place was "
                    f"fitted to the one in the place of {name!r}"
                )


@contextmanager
def _operators_as_built(model: nn.Module) -> Iterator[None]:
    """Take fitted operators and shifts of padding back, and carry out those of the stand-ins that are there then."""
    _check_whole(model)
    for name, substitution in reversed(_substitutions(model).items()):
        substitution.undo(model, name)
    undo_shifts(model, _shifts(model))
    try:
        yield
    finally:
        apply_shifts(model, _shifts(model))
        for name, substitution in _substitutions(model).items():
            substitution.apply(model, name)


def _check_whole(model: nn.Module) -> None:
    """Refuse a part of a model if what was done to it reaches beyond.

    Raises:
        ValueError: If an operator that was changed with an activation is not there.
    """
    there = dict(model.named_modules(remove_duplicate=False))
    for name, stand_in in stand_ins(model).items():
        if not there.keys() >= stand_in.names_around(name):
            raise ValueError(
                f"Expected argument `model` to be a whole model, but where {name!r} became linear, operators outside "
                f"of it were changed, too: {stand_in}. Pass the model that they are in."
            )
    check_undoable(model, _shifts(model))


def _substitutions(model: nn.Module) -> dict[str, Substitution]:
    """Return name -> substitution, in the order in which they were made."""
    found = {name: each.substitution for name, each in stand_ins(model).items() if each.substitution is not None}
    return dict(sorted(found.items(), key=lambda item: item[1].form.order))


def _shifts(model: nn.Module) -> dict[str, PaddingShift]:
    return {name: each.shift for name, each in stand_ins(model).items() if each.shift is not None}


def stand_ins(model: nn.Module) -> dict[str, StandIn]:
    """Return qualified name -> stand-in for every linearized activation."""
    return {name: module for name, module in unwrap(model).named_modules() if isinstance(module, StandIn)}


def read_marks(state_dict: Mapping[str, Any]) -> dict[str, Mark]:
    """Return qualified name -> mark for every linearized activation that a state dict knows of."""
    marks = {}
    for key, value in state_dict.items():
        if key == MARK_KEY or key.endswith(f".{MARK_KEY}"):
            mark = Mark.decode(value)
            if mark is not None:
                marks[key.removesuffix(MARK_KEY).removesuffix(".")] = mark
    return marks


class Restructuring(NamedTuple):
    """What was done to give a model another structure.

    Attributes:
        linearized: The marks of the names that were made linear.
        restored: What was brought back before, each block before what had gone inside of it.
    """

    linearized: dict[str, Mark]
    restored: list[_Gone]

    def undo(self, model: nn.Module) -> None:
        """Give the model the structure that it had, in place, with the same stand-ins and their numbers."""
        inner = unwrap(model)
        with _operators_as_built(inner):
            for each in [each for each in _gone(inner) if each.inside is None and each.name in self.linearized]:
                _put_original(inner, each)
            for each in reversed(self.restored):
                replace_activation(inner, each.name, each.stand_in)


@contextmanager
def brought_back(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Have some of what is gone back for a while, to look at it; all is as it was afterwards.

    It is not moved or cast as the model was since.

    Args:
        model: The model.
        names: What is to be back. Of those that are not gone, or that are inside of what stays away, nothing comes.
    """
    inner = unwrap(model)
    chosen = Restructuring({}, [])
    for each in _gone(inner):
        if each.name in names and each.inside in {None, *(other.name for other in chosen.restored)}:
            chosen.restored.append(each)
    if not chosen.restored:
        yield
        return
    with _operators_as_built(inner):
        for each in chosen.restored:
            replace_activation(inner, each.name, each.stand_in.activation)
    try:
        yield
    finally:
        chosen.undo(inner)


def restructure_as_marked(model: nn.Module, state_dict: Mapping[str, Any]) -> Restructuring:
    """Give a model the structure that a state dict is marked with, in place: what is marked is linear, the rest is not.

    What is gone as it is marked stays as it is. A block that comes back may hold what had gone before it: that stays
    gone, or comes back, as it is marked, too.

    Raises:
        ValueError: If a mark names an activation that the model does not have, or another kind of it; the model is as
            it was then.
    """
    marks = read_marks(state_dict)
    inner = unwrap(model)
    restored = _gone(inner, marks)
    if not restored and marks.keys() <= stand_ins(inner).keys():
        return Restructuring({}, [])
    with _operators_as_built(inner):
        for each in restored:
            _put_original(inner, each)
    linear = stand_ins(inner)
    done = Restructuring({name: mark for name, mark in marks.items() if name not in linear}, restored)
    try:
        if done.linearized:
            _check_marks_fit(inner, done.linearized)
            _linearize_as_marked(inner, done.linearized)
    except BaseException:
        done.undo(inner)
        raise
    return done


def _check_marks_fit(model: nn.Module, marks: Mapping[str, Mark]) -> None:
    """Refuse marks of what a model does not have."""
    plan, _ = _plan_for(model, marks)
    sites = {name: module for name, (module, _) in plan.found.items()}
    for name, mark in marks.items():
        found = sites.get(name, _block(model, name))
        kinds = {*STAND_INS, *LEAVES, OPERATOR}
        if found is None or type(found).__name__ != mark.activation or mark.stand_in not in kinds:
            raise ValueError(
                f"Expected the model to have an activation {name!r} of class {mark.activation}, which the checkpoint "
                f"marks as linear ({mark.stand_in}), but got {found}. The model has {[*sites, *stand_ins(model)]}: "
                f"load the checkpoint into a model built as the one that was saved."
            )


def _linearize_as_marked(model: nn.Module, marks: Mapping[str, Mark]) -> None:
    """Make activations linear, and take blocks out, as they are marked."""
    blocks = [name for name in marks if _block(model, name) is not None]
    for name in blocks:
        mark = marks[name]
        operator = mark.blank_operator()
        if operator is None:
            bypass(model, [name], mark.stand_in, mark.returns)
        else:
            inner = unwrap(model)
            operator.to(dtype_of_values(inner.get_submodule(name), inner))
            replace_block(model, name, operator, mark.returns)
    # What shifts a padding saw the others linear when it did.
    for shifts in (False, True):
        wanted = {name: mark for name, mark in marks.items() if mark.shifts_padding == shifts and name not in blocks}
        if wanted:
            _make_linear(model, {name: _Wanted(m.blank(), m.trainable, m.form) for name, m in wanted.items()}, shifts)


def dense_keys(model: nn.Module) -> set[str]:
    """Return the keys that the state dict of a model has when everything is restored."""
    linear = stand_ins(model)
    own = tuple(f"{name}." for name in linear)
    keys = {key for key in model.state_dict() if not key.startswith(own)}
    for name, stand_in in linear.items():
        keys |= {f"{name}.{key}" for key in dense_keys(stand_in.activation)}
        for absorbed, module in stand_in.absorbed_by_name(name).items():
            keys |= {f"{absorbed}.{key}" for key in dense_keys(module)}
    return keys


def _block(model: nn.Module, name: str) -> nn.Module | None:
    """Return a module that is no activation; None if there is none of that name."""
    found = dict(model.named_modules()).get(name)
    return None if found is None or isinstance(found, StandIn) or activation_kind(found) is not None else found


def _plan_for(model: nn.Module, names: Iterable[str]) -> tuple[IsolationPlan, frozenset[str]]:
    """Look for the activations that names can stand for; return the gates among those named, too."""
    plan = plan_isolation(model)
    if all(name in plan.found for name in names):
        return plan, frozenset()
    plan = plan_isolation(model, gates=True)
    kinds = {activation_kind(plan.found[name][0]) for name in names if name in plan.found}
    return plan, frozenset(GATES.keys() & kinds)


def _as_names(names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"Expected argument `names` to be an iterable of names, but got the string {names!r}")
    if not isinstance(names, Iterable):
        raise TypeError(f"Expected argument `names` to be an iterable of names, but got {names!r}")
    return list(names)
