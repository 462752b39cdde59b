"""Keep libraries from printing between our own lines."""

from __future__ import annotations

import os
import warnings

# Read by the libraries when they are imported; what the user has set stays.
_SETTINGS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # also those of transformers
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",  # as without it, but no warning when a process is started
}
_LIBRARIES = ("accelerate", "datasets", "flwr", "huggingface_hub", "opacus", "peft", "torch", "transformers")


def quiet_libraries() -> None:
    """Switch off progress bars and warnings of the libraries; call it before they are imported."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(_LIBRARIES)})(\.|$)")
