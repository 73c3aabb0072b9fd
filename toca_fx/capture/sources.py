"""Dynamo's names of inputs and modules, and what Dynamo is capturing right now."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import dropwhile
from types import CodeType
from typing import Any

import torch
from torch import fx

from toca_fx.graph.roles import is_part
from toca_fx.torch_private import CompileContext, InstructionTranslator

# "L['self'].__dict__['_modules']['blocks'].0.attn" and "L['self']._modules['blocks']._modules['0']"
# -> blocks.0.attn
_PATH_TOKEN = re.compile(r"\['?([^'\]]+)'?\]|([A-Za-z0-9_]+)")
_PATH_NOISE = frozenset({"__dict__", "_modules", "_orig_mod"})
_CALL_NOISE = frozenset({"L", "G", "self", "_call_impl", "forward", "fn"})
_OF_A_SHAPE = re.compile(r"\.(?:size|stride|storage_offset)\(\)")
_SOURCES = "toca_fx_input_sources"


def clean_path(source: str, model: str = "L['self']") -> str:
    """The module path inside Dynamo's name of a module, where ``model`` is that of the model.

    ``L['self']._modules['blocks'].0.attn`` -> ``blocks.0.attn``. With several models (``model`` is
    "") the path begins with the name of one.
    """
    own = is_part(source, model)
    found = _PATH_TOKEN.findall(source[len(model) if own else 0 :])
    tokens = [token for pair in found for token in pair if token and token not in _PATH_NOISE]
    return ".".join(tokens if own else dropwhile(_CALL_NOISE.__contains__, tokens))


_TORCH = os.path.dirname(torch.__file__) + os.sep
_LINE = re.compile(r'^ *File "(.+)", line ([0-9]+), in .*\n *(.*)$', re.MULTILINE)


def user_line(node: fx.Node) -> str:
    """The line of the user's code that a node was captured from: ``model.py:12 (x.item())``.

    It is the name of the node, if Dynamo does not know the line.
    """
    return line_in(str(node.meta.get("stack_trace") or "")) or str(node)


def line_in(trace: str) -> str:
    """The line that a stack trace ends in: the innermost whose file, named in full, is not torch's.

    It is "" if the trace names no file.
    """
    found = _LINE.findall(trace)
    own = [entry for entry in found if not entry[0].startswith(_TORCH)]
    if not found:
        return ""
    file, line, code = (own or found)[-1]
    return f"{file}:{line} ({code.strip()})"


def _frame() -> Any:
    """What Dynamo is capturing right now; None if it captures nothing."""
    try:
        return InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return None


def captured_code() -> CodeType | None:
    """The code that Dynamo is capturing right now; None if it captures nothing."""
    frame = _frame()
    return None if frame is None else frame.f_code


def captured_model() -> torch.nn.Module | None:
    """The model that Dynamo is capturing right now.

    That is the first argument of what Dynamo captures, whatever it is called. It is None if Dynamo
    captures nothing, or if that is no module.
    """
    frame = _frame()
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount] if frame is not None else ()
    owner = frame.f_locals.get(names[0]) if frame is not None and names else None
    return owner if isinstance(owner, torch.nn.Module) else None


def model_class() -> str:
    """The class name of the model that Dynamo is capturing right now; "" if there is none."""
    model = captured_model()
    return "" if model is None else type(model).__name__


def frame_id() -> int | None:
    """The number of the code that Dynamo is capturing right now; None if it captures nothing.

    The same code has the same number across recompilations.
    """
    compile_id = CompileContext.current_compile_id()
    return None if compile_id is None else compile_id.frame_id


def input_sources(captured: fx.GraphModule) -> tuple[str, ...]:
    """The name of the argument or parameter that each placeholder of Dynamo's graph comes from.

    It is "" if unknown. Dynamo forgets the names when it has compiled: the first call has to be
    made in the backend, and later ones return the same.
    """
    if _SOURCES not in captured.meta:
        placeholders = captured.graph.find_nodes(op="placeholder")
        captured.meta[_SOURCES] = tuple(map(_source, placeholders))
    found: tuple[str, ...] = captured.meta[_SOURCES]
    return found


def is_of_shape(source: str) -> bool:
    """Whether an input of that name is a number that Dynamo takes from a tensor's shape."""
    return _OF_A_SHAPE.search(source) is not None


def name_inputs(made: fx.GraphModule, sources: Sequence[str]) -> None:
    """Name the inputs of a graph that was made of Dynamo's: see ``input_sources``."""
    made.meta[_SOURCES] = tuple(sources)


def is_python_float(placeholder: fx.Node) -> bool:
    """Whether an input is a Python float that Dynamo found to vary, handed over as a tensor [].

    Dynamo forgets it when it has compiled.
    """
    return bool(getattr(placeholder.meta.get("grapharg"), "pass_arg_as_tensor", False))


def _source(placeholder: fx.Node) -> str:
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    # It was a method in earlier releases of PyTorch, and is a property now.
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)
