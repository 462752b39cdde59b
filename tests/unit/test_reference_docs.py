"""The configuration reference: up to date, complete, and each row what the code really takes."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from common.experiment import ClientSettings, Experiment, PluginChoice
from common.privacy.settings import Budget
from strategies.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def sections() -> dict[str, str]:
    """Return the page's tables by their heading."""
    parts = re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def models() -> Iterator[tuple[str, type[BaseModel]]]:
    """List every heading with the model it describes."""
    yield "Top level", Experiment
    for name, field in Experiment.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and not issubclass(kind, PluginChoice):
            yield f"[{name}]", kind
    yield "[clients.NAME]", ClientSettings
    yield "[clients.NAME.budget]", Budget
    for section, family in SECTIONS.items():
        for name in family.names():
            yield f'[{section}.options] with name = "{name}"', family.plugin(name)


MODELS = dict(models())


def rows(text: str) -> dict[str, list[str]]:
    """Return a table's rows by key: values, default and meaning."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): row[1:] for row in cells}


def reference() -> ModuleType:
    """Load the script that writes the page."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    assert reference().main() == 0, capsys.readouterr().err


def test_every_model_has_a_table_and_every_table_a_model() -> None:
    assert sections().keys() == MODELS.keys()


@pytest.mark.parametrize("heading", MODELS)
def test_every_key_is_there_with_values_default_and_meaning(heading: str) -> None:
    found = rows(sections()[heading])
    assert list(found) == list(MODELS[heading].model_fields)
    for key, cells in found.items():
        assert len(cells) == 3, f"{heading} {key}: a cell holds a bar"
        values, default, meaning = cells
        assert values
        assert meaning.endswith((".", ")")), f"{heading} {key}: {meaning}"
        assert (default == "required") == MODELS[heading].model_fields[key].is_required()


@pytest.mark.parametrize(
    ("heading", "key", "values", "default"),
    [
        ("[training]", "steps", "whole number ≥ 1", "`20`"),
        ("Top level", "task", "table", "required"),
        ("Top level", "clients", "table", "see below"),
        ("[training]", "schedule", "`constant` · `cosine` · `linear`", '`"constant"`'),
        ("[training]", "learning_rate", "number > 0", "`0.005`"),
        ("[federation]", "cohort_fraction", "number > 0 ≤ 1", "`1.0`"),
        ("[federation]", "cohort_size", "whole number ≥ 1", "none"),
        ("[evaluation]", "on", "list of `clients` · `server`", '`["clients"]`'),
        ("[evaluation]", "certificate", "true or false", "`true`"),
        ("[simulation]", "ranks", "list of whole number", "`[]`"),
        ("[clients.NAME]", "rank", "whole number ≥ 1 or `auto`", "none"),
        ("[clients.NAME]", "data", "text", "none"),
        ('[adapter.options] with name = "lora"', "target_modules", "list of text or `all-linear`", None),
        ('[strategy.options] with name = "flora"', "global_energy", "number > 0 < 1", "none"),
    ],
)
def test_a_row_says_what_the_code_takes(heading: str, key: str, values: str, default: str | None) -> None:
    found = rows(sections()[heading])[key]
    assert found[0] == values
    assert default is None or found[1] == default


def test_a_plugin_without_options_says_so() -> None:
    assert "No options." in sections()['[strategy.options] with name = "fedavg"']


def test_a_stale_page_is_found_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, page = reference(), tmp_path / "configuration.md"
    monkeypatch.setattr(script, "SETTINGS", page)
    monkeypatch.setattr(script, "PLUGINS", tmp_path / "plugins.md")
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    assert script.main() == 1
    page.write_text(PAGE.replace("Optimizer steps per round.", "Steps."))
    assert script.main() == 1
    assert (
        "configuration.md, docs/plugins.md out of date; run: .venv/bin/python docs/reference.py"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(sys, "argv", ["reference.py"])
    assert script.main() == 0
    assert page.read_text() == PAGE
