"""What a server does with adapters: pure functions of tensors, without Flower and without files."""

from __future__ import annotations

from typing import Any

from strategies.aggregation import AGGREGATION, AggregationStrategy

__all__ = ["AGGREGATION", "AggregationStrategy", "aggregation_strategy"]


def aggregation_strategy(name: str, **options: Any) -> AggregationStrategy:
    """Build an aggregation strategy by name.

    Parameters
    ----------
    name : str
        File name of a module of ``strategies/aggregation``, such as ``flora``, or a plug-in of the user's.
    **options
        The strategy's hyper-parameters.

    Raises
    ------
    UnknownNameError, ConfigurationError
        If the name or an option is not known or out of range.
    """
    return AGGREGATION.create(name, options)
