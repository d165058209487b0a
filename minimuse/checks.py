"""What notebooks lean on: `show` the package's source, and instant checks for exercises.

    check_guide(my_guide) -> which property of a right answer fails, with the smallest counter-example

Not here: the exercises (`notebooks/`).
"""

import inspect
import textwrap
from pathlib import Path
from typing import Any


class Source(str):
    """Python source that Jupyter shows in colour, and `print` as it is."""

    def _repr_markdown_(self) -> str:
        return f"```python\n{self}\n```"

    __repr__ = str.__str__


def show(*things: Any) -> Source:
    """Functions, classes or methods of the package -> their source, each under the name of its file.

    >>> print(show(guide))
    # minimuse/cfg.py
    def guide(cond: Tensor, uncond: Tensor, t: float) -> Tensor:
    ...
    """
    parts = []
    for thing in things:
        path = Path(inspect.getsourcefile(thing))
        parts.append(f"# {path.parent.name}/{path.name}\n{textwrap.dedent(inspect.getsource(thing)).rstrip()}")
    return Source("\n\n\n".join(parts))
