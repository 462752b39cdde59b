"""What can be set, read from the models themselves: names, defaults, bounds and descriptions."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from common.experiment_file import toml_value

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Setting:
    """One key of an experiment, or one option of a plug-in.

    Parameters
    ----------
    name : str
        Its key.
    default : object
        As TOML would give it: lists for tuples. None where it has none of its own.
    required : bool
        Whether it must be given.
    allowed : str
        What it may be, in words; empty where the description says it all.
    description : str
        A sentence.
    """

    name: str
    default: Any
    required: bool
    allowed: str
    description: str

    @property
    def sentence(self) -> str:
        """The description, and what is allowed as a second sentence."""
        allowed = f"{self.allowed[0].upper()}{self.allowed[1:]}." if self.allowed else ""
        return f"{self.description} {allowed}".strip()


def settings_of_model(model: type[BaseModel]) -> list[Setting]:
    """List what can be set in a pydantic model, in its order."""
    return [
        Setting(name, _default(field), field.is_required(), _allowed(field), field.description or "")
        for name, field in model.model_fields.items()
    ]


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return None
    return to_jsonable_python(field.get_default(call_default_factory=True, validated_data={}), fallback=str)


def _allowed(field: FieldInfo) -> str:
    choices = list(dict.fromkeys(_choices(field.annotation)))
    if choices:
        return f"one of {', '.join(map(toml_value, choices))}"
    bounds = [
        f"{words} {getattr(bound, name):,}"
        for bound in field.metadata
        for name, words in _BOUNDS.items()
        if getattr(bound, name, None) is not None
    ]
    return ", ".join(bounds)


def _choices(annotation: Any) -> Iterator[Any]:
    """Find the literals of a type, also inside unions and tuples; none where anything else is allowed too."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from arguments
    elif origin in (Union, types.UnionType, tuple, list, Annotated):
        members = [item for item in arguments if item not in (type(None), Ellipsis)]
        found = [list(_choices(item)) for item in members]
        if all(found):
            yield from (choice for choices in found for choice in choices)
