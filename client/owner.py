"""What a node's owner decides: ``client.toml`` on the node, which no experiment overrules."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import Field, ValidationError

from common.errors import ConfigurationError
from common.plugins import explain
from common.privacy.settings import Budget
from common.section import Name, Section


class Owner(Section):
    """The owner's file."""

    name: Name | None = Field(None, description="The node's name in the federation.")
    budget: Budget | None = Field(None, description="Limit of privacy for the node's data, over all experiments.")


def read_owner(path: Path) -> Owner:
    """Read an owner's file.

    Raises
    ------
    ConfigurationError
        If it cannot be read, or with every unknown key and wrong value at once.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigurationError(f"the owner's file {path} cannot be read: {reason}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"the owner's file {path} is not TOML: {str(error)[:200]}") from None
    try:
        return Owner.model_validate(table)
    except ValidationError as error:
        raise ConfigurationError(explain(error, f"the owner's file {path}", Owner)) from None
