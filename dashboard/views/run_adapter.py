"""What a run leaves: its adapter, how to export it, and what the model makes of the task's prompts."""

from __future__ import annotations

import json
from pathlib import Path

import streamlit as st

from common.errors import StoreError
from common.store import Artefact, Run
from common.store.artefacts import file_of
from common.store.reading import read_artefacts
from common.wording import size
from dashboard.commands import typed
from dashboard.pieces import command, explain
from dashboard.session import source
from dashboard.words import block, code, visible

DOWNLOADED = 200_000_000
"""Bytes of a file that a browser may ask this server for."""
SAMPLES_BYTES = 200_000
SAMPLES = 8


def adapter(run: Run) -> None:
    """Say where the adapter is and how to use it."""
    st.header("Where is the adapter?")
    left, right = st.columns(2)
    with left:
        _place(run)
    with right:
        best = ("--best",) if run.best_round else ()
        if run.adapter_path or run.rounds_done > 0:
            st.markdown(f"Write it for PEFT and transformers{', the best round of all' if best else ''}:")
            command(typed(source().home, "export", run.id, *best, "--format", "peft", "--out", "adapter"))
        else:
            explain("There is nothing to export before the first round is committed.")


def _place(run: Run) -> None:
    if not run.adapter_path:
        explain(
            "It is written when the run completes. Rounds that are committed can be exported before."
            if run.rounds_done > 0
            else "It is written when the run completes."
        )
        return
    try:
        file = file_of(source().home, run.id, run.adapter_path)
    except StoreError:
        explain("The store names a file outside of the run's folder; it is not touched.")
        return
    st.markdown("The adapter after the last round, as one safetensors file:")
    command(str(file))
    found = _size(file)
    told = f"In the home folder it is {code(run.adapter_path)}"
    if found is None:
        explain(f"{told}. It is not on this machine; the machine that ran the server has it.")
        return
    explain(f"{told}: {size(found)}, sha256 {code(run.adapter_sha256 or 'unknown')}")
    if found <= DOWNLOADED:
        st.download_button(
            f"Download ({size(found)})",
            file.read_bytes,
            f"{visible(run.id, 100)}-{file.name}",
            "application/octet-stream",
            key="adapter",
            on_click="ignore",
            icon=":material/download:",
        )
    else:
        explain(f"It is too large to download here (more than {size(DOWNLOADED)}); copy it.")


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size if file.is_file() else None
    except OSError:
        return None


def samples(run: Run) -> None:
    """Show what the model makes of the task's prompts, before and after; nothing where there are no samples."""
    look = source().look(run.id)
    files = [file for file in look.ask(read_artefacts, run.id, "samples", None) if file.round is not None]
    with st.container():
        if not files:
            return
        st.header("What the model makes of it")
        shown = files[:1] if len(files) == 1 else [files[0], files[-1]]
        for file, column in zip(shown, st.columns(2), strict=False):
            with column:
                st.markdown("**Before training**" if file.round == 0 else f"**After round {file.round}**")
                _samples(run, file)


def _samples(run: Run, file: Artefact) -> None:
    found = _read_samples(run, file)
    for prompt, text in found[:SAMPLES]:
        st.code(f"{block(prompt)}▸{block(text)}", language=None, wrap_lines=True)
    if not found:
        explain("The file of samples is not on this machine, or it is not what it should be.")


def _read_samples(run: Run, file: Artefact) -> list[tuple[str, str]]:
    """Read prompts and texts; nothing from a file that is missing, too large or of another form."""
    try:
        path = file_of(source().home, run.id, file.path)
        if not path.is_file():  # to open a pipe would wait for ever
            return []
        with path.open("rb") as opened:
            rows = json.loads(opened.read(SAMPLES_BYTES))
        return [(str(row["prompt"]), str(row["text"])) for row in rows]
    except (OSError, StoreError, ValueError, RecursionError, TypeError, KeyError):
        return []
