"""While an assignment is graded, the packaged answers refuse to be called from a notebook.

    MINIMUSE_STUBS=masking,eval_metrics.jackknife
    place()    all functions of masking, and one function of eval_metrics, now raise

Calls from within the package pass, and whatever the zoo runs: worlds and mutants need the true functions. `checks`
keeps its own, and may call no stub: what it calls is what a student handed in.
This keeps a call from being an answer. It does not, and cannot, keep the source from being copied: it is public.
"""

import functools
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable

USERS = ("editing", "muse", "lab", "lab_samplers", "train")  # import what is replaced, and may be imported from


class Packaged(RuntimeError):
    """An answer was called, not written."""


def _from_within() -> bool:
    """Is the stub called by the package, or by anything that the zoo runs?"""
    frame = sys._getframe(2)
    caller = frame.f_globals.get("__name__", "")
    if caller.startswith("minimuse."):
        return True
    while frame is not None and frame.f_globals.get("__name__") != "zoo":
        frame = frame.f_back
    return frame is not None


def _stub(fn: Callable) -> Callable:
    @functools.wraps(fn)
    def stub(*args, **kwargs):
        if not _from_within():
            raise Packaged(f"{fn.__module__}.{fn.__name__} is an answer, and not to be called here: write your own")
        return fn(*args, **kwargs)

    del stub.__wrapped__  # `wraps` keeps the true function there, for everybody to call
    return stub


def _functions(room: str, only: str | None = None) -> list[Callable]:
    """What a room defines, or one function of it."""
    module = importlib.import_module(f"minimuse.{room}")
    own = {k: f for k, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    return [own[only]] if only else list(own.values())


def place(rooms: str | None = None) -> None:
    """Replace functions ("masking,eval_metrics.jackknife"; default MINIMUSE_STUBS) wherever the package holds them."""
    warnings.simplefilter("ignore")  # nbgrader takes a line on stderr for a failure
    rooms = os.environ.get("MINIMUSE_STUBS", "") if rooms is None else rooms
    importlib.import_module("checks")  # imported first, so it keeps the true functions
    own = [f for room in filter(None, rooms.split(",")) for f in _functions(*room.split("."))]
    stubs = {f: _stub(f) for f in own}
    for user in USERS if stubs else ():
        importlib.import_module(f"minimuse.{user}")
    names = [name for name in sys.modules if name.startswith("minimuse.")]
    holders = [vars(sys.modules[name]) for name in names]
    holders += [table for held in holders for table in held.values() if type(table) is dict]  # sampler.ORDERS
    for held in holders:
        held.update({name: stubs[f] for name, f in held.items() if inspect.isfunction(f) and f in stubs})
