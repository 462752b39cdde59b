"""The pages, one module each; every module has a function ``page``."""

from dashboard.views import clients, compare, layers, privacy, run, runs

__all__ = ["clients", "compare", "layers", "privacy", "run", "runs"]
