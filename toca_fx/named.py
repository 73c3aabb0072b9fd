"""What commands are given by name: a function in a module or in a file of the user's."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType

from toca_fx.diagnostics import did_you_mean


class UnknownModelError(LookupError):
    """No model goes by that name; the message says what does."""


def function_named(name: str) -> Callable[..., object]:
    """What ``module:function`` or ``file.py:function`` names.

    Raises:
        UnknownModelError: nothing goes by that name.
    """
    source, _, attribute = name.rpartition(":")
    module = _file(source) if source.endswith(".py") else _module(source)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UnknownModelError(
            f"{source} has no function `{attribute}`{did_you_mean(attribute, known)}"
        )
    found: Callable[..., object] = function
    return found


def _module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with `python -m`
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and something that it imports is not
        raise UnknownModelError(
            f"there is no module `{name}` (looked in the current folder and on sys.path)"
        ) from error


def _file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("toca_fx_named", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise UnknownModelError(f"there is no file `{path}`")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
