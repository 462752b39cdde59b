r"""PEFT's tables of layers, such as ``alpha_pattern``: whose keys are regular expressions that a stranger wrote.

PEFT matches ``(.*\.)?(key)$`` and takes the first key that fits. A hostile key can make that last for ever, so only
names, ``.``, ``\.``, ``\d``, ``\w``, ``.*``, ``.+``, ``^`` and ``$`` are read. What lies between two ``.*`` has a
fixed length; to take the first place where it fits is then as good as any other, and nothing has to be tried twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from common.errors import DataError, shortened

LONGEST = 256
"""Characters of a key, and of a layer's name."""
MOST = 4_000_000
"""Keys times layers; PEFT itself would take minutes."""

_PART = re.compile(r"\\[.dw]|[\w-]|\.(?:[*+]\??)?")
_KEY = re.compile(rf"\^?(?:{_PART.pattern})*\$?")


class LayerTable:
    """A table of layers: values by pattern.

    Parameters
    ----------
    what : str
        Its name in the configuration.
    table : object
        What the configuration holds.
    layers : int
        How many layers there are to be looked up.

    Raises
    ------
    DataError
        If it is no table, or has a key that is not understood.
    """

    def __init__(self, what: str, table: object, layers: int) -> None:
        table = {} if table is None else table
        if not isinstance(table, Mapping):
            raise DataError(f"{what} is {shortened(table)}; expected a table of layers")
        if len(table) * layers > MOST:
            raise DataError(f"{what} has {len(table)} keys for {layers} layers; expected at most {MOST // layers} keys")
        self._values = [(_compiled(what, key), value) for key, value in table.items()]

    def get(self, layer: str, default: object) -> object:
        """Return the value of the first key that fits, as PEFT does."""
        return next((value for pattern, value in self._values if pattern.match(layer)), default)


def _compiled(what: str, key: str) -> re.Pattern[str]:
    if len(key) > LONGEST or not _KEY.fullmatch(key):
        raise DataError(
            f"{what} has a key that is no regular expression to read safely: {shortened(key)}; expected at most "
            rf"{LONGEST} characters: names, '.', '\.', '\d', '\w', '.*', '.+', '^' and '$'; write the layers' names out"
        )
    pieces = [""]
    for part in _PART.findall(key.removeprefix("^").removesuffix("$")):
        if part[1:2] in ("*", "+"):
            pieces[-1] += "." * (part[1] == "+")
            pieces.append("")
        else:
            pieces[-1] += part
    first, *others = pieces
    if not others:
        return re.compile(rf"{first}$" if key.startswith("^") else rf"(?:.*\.)?{first}$")
    start = first if key.startswith("^") else rf"{first}|.*?\.{first}"
    *middle, last = others
    between = "".join(f"(?>.*?{piece})" for piece in middle)
    return re.compile(f"(?>{start}){between}.*{last}$")
