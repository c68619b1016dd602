"""What can be told of a forward from its bytecode: the names it uses, and questions that a tracer does not hear."""

import dis
import inspect
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

# Asked of a proxy, these give an answer that says nothing of the value that will come.
_GLOBALS = ("type", "hasattr", "callable", "issubclass", "vars", "id")
_NAMES = ("is_tensor", "is_compiling", "is_exporting", "is_dynamo_compiling", "children", "named_children", "modules",
          "named_modules", "parameters", "named_parameters", "buffers", "named_buffers", "state_dict")  # fmt: skip
_GRADIENT_MODES = (torch.is_grad_enabled, torch.is_inference_mode_enabled)
_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_GLOBAL", "LOAD_NAME")
_PART_OF_TWO = re.compile("(?:LOAD|STORE)_FAST(?:_BORROW)?")


class Instruction(NamedTuple):
    """What of an instruction is read here.

    Attributes:
        opname: Its name.
        argval: What it is about: the name of a variable, a constant, where it jumps to.
        offset: Where it is.
    """

    opname: str
    argval: Any
    offset: int


class ExecutedCode:
    """Collect the functions of some packages that run in this context.

    Others may run too without being called: finalizers, for one.

    Args:
        packages: Names of top-level packages.
    """

    def __init__(self, packages: Collection[str]) -> None:
        self._packages = frozenset(packages) - {"torch", "builtins", "lightning_easier"}
        self.codes: dict[CodeType, None] = {}
        self.recomputes = False
        self.asks_for_gradients = False

    def __enter__(self) -> "ExecutedCode":
        before: Any = sys.getprofile()
        if hasattr(before, "disable"):  # cProfile's own, which sys.setprofile can't put back
            before.disable()
        self._before = before
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        if hasattr(self._before, "enable"):
            self._before.enable()
        else:
            sys.setprofile(self._before)

    def _note(self, frame: FrameType, event: str, called: object) -> None:
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        if event == "c_call":
            self.asks_for_gradients |= called in _GRADIENT_MODES and package not in ("torch", "lightning_easier")
        elif event != "call":
            return
        elif module == "torch.utils.checkpoint":
            self.recomputes = True
        elif package in self._packages:
            self.codes[frame.f_code] = None


def why_unfaithful(executed: ExecutedCode, forward: Any) -> str | None:
    """Give the reason why code that was traced may do something else when it runs; None if there is none.

    Args:
        executed: The code that ran.
        forward: The forward that was traced.
    """
    if executed.recomputes:
        return "it recomputes activations (`torch.utils.checkpoint`)"
    if executed.asks_for_gradients:
        return "its forward asks whether gradients are enabled"
    optional = {p.name for p in inspect.signature(forward).parameters.values() if p.default is None}
    own = getattr(inspect.unwrap(forward), "__code__", None)
    for code in executed.codes:
        arguments = optional if code is own else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        reason = _why_unfaithful(code, frozenset(arguments))
        if reason is not None:
            return reason
    return None


@lru_cache(maxsize=4096)
def _why_unfaithful(code: CodeType, may_be_none: frozenset[str]) -> str | None:
    if not code.co_flags & inspect.CO_GENERATOR and _handles_exceptions(code):
        return "it handles exceptions or enters a context (`try`, `with`)"
    instructions = in_singles(dis.get_instructions(code))
    if any(each.opname.startswith("MATCH_") for each in instructions):
        return "it matches a value against patterns (`match`)"
    names = [name for name in _NAMES if name in code.co_names]
    names += [each.argval for each in instructions if each.opname == "LOAD_GLOBAL" and each.argval in _GLOBALS]
    if names:
        return f"it asks for what a recording can't know (`{names[0]}`)"
    return "it asks whether a value is None" if asks_for_none(instructions, may_be_none) else None


def _handles_exceptions(code: CodeType) -> bool:
    bytecode: Any = dis.Bytecode(code)  # typeshed doesn't know its exception_entries
    return handles_exceptions(list(bytecode), bytecode.exception_entries)


def handles_exceptions(instructions: Sequence[Any], entries: Iterable[Any]) -> bool:
    """Tell whether a function has a handler of exceptions: `try` or `with`.

    Since Python 3.12 a comprehension is part of the function that it stands in (PEP 709). It has a handler too, which
    gives the comprehension's variables the values back that they had outside, and raises again: that is none.

    Args:
        instructions: Of the function, as ``dis`` gives them.
        entries: Of its exception table, as ``dis.Bytecode(code).exception_entries`` gives them.
    """
    places = {instruction.offset: place for place, instruction in enumerate(instructions)}
    return any(not _restores(instructions[places[entry.target] :]) for entry in entries)


def _restores(handler: Sequence[Any]) -> bool:
    """Tell whether a handler does nothing but give variables their values back, and raise again.

    Every other handler begins by making the exception the current one: a ``finally`` or a ``with``, too.
    """
    names = [instruction.opname for instruction in handler if instruction.opname != "EXTENDED_ARG"]
    end = names.index("RERAISE") if "RERAISE" in names else 0
    drops, stores = names[:3], names[3:end]
    return drops == ["SWAP", "POP_TOP", "SWAP"] and bool(stores) and all(name == "STORE_FAST" for name in stores)


def in_singles(instructions: Iterable[Any]) -> list[Instruction]:
    """List instructions; those that read or write two variables, which there are since Python 3.13, as two.

    Args:
        instructions: As ``dis`` gives them.
    """
    singles = []
    for each in instructions:
        parts = _PART_OF_TWO.findall(each.opname)
        if len(parts) == 2:
            singles += [Instruction(part, name, each.offset) for part, name in zip(parts, each.argval, strict=True)]
        else:
            singles.append(Instruction(each.opname, each.argval, each.offset))
    return singles


def asks_for_none(instructions: Sequence[Instruction], may_be_asked: frozenset[str]) -> bool:
    """Tell whether a function compares something with None that is neither an attribute nor one of these arguments.

    Args:
        instructions: Of the function, from :func:`in_singles`.
        may_be_asked: Names of arguments.
    """
    set_to_none = {
        after.argval
        for before, after in pairwise(instructions)
        if before.opname == "LOAD_CONST" and before.argval is None and after.opname == "STORE_FAST"
    }
    for place, instruction in enumerate(instructions):
        if instruction.opname.startswith("POP_JUMP") and instruction.opname.endswith("NONE"):
            asked = instructions[place - 1]
        elif instruction.opname == "IS_OP" and instructions[place - 1].argval is None:
            asked = instructions[place - 2]
        else:
            continue
        if asked.opname.startswith("LOAD_FAST"):
            if asked.argval not in may_be_asked | set_to_none:
                return True
        elif asked.opname not in ("LOAD_ATTR", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CONST"):
            return True
    return False


def names_used(codes: Iterable[CodeType], weight: int = 1) -> Counter[str]:
    """Count the names that functions use, those of functions inside them too; inside a loop a use counts twice.

    To ask whether something is None is not a use.
    """
    names: Counter[str] = Counter()
    for code in codes:
        names += _names_used(code, weight)
    return names


@lru_cache(maxsize=4096)
def _names_used(code: CodeType, weight: int) -> Counter[str]:
    names: Counter[str] = Counter()
    instructions = in_singles(dis.get_instructions(code))
    loops = [
        range(instruction.argval, instruction.offset)
        for instruction in instructions
        if "JUMP" in instruction.opname and instruction.argval < instruction.offset
    ]
    for instruction, after in pairwise(instructions):
        if instruction.opname in _LOADS and not after.opname.endswith("NONE"):
            in_a_loop = any(instruction.offset in loop for loop in loops)
            names[instruction.argval] += 2 if in_a_loop else weight
    names += names_used((constant for constant in code.co_consts if isinstance(constant, CodeType)), 2)
    return names


def code_of(function: Any) -> list[CodeType]:
    """Return the code of a function, and of the functions it closes over (a decorator's)."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return []
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_set(cell)]
    return [code, *(inner.__code__ for inner in cells if isinstance(getattr(inner, "__code__", None), CodeType))]


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
