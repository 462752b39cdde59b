"""Take pictures of every page of the dashboard: light and dark, on a desk and on a phone.

``python docs/screenshots.py --out DIR`` invents a few runs to show; ``--home DIR`` shows others. Those that README and
docs use lie in ``docs/images``. Needs Chromium.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from common.store import RunStore
from tests.benchmarks.fill_store import fill
from tests.browser import DESK, PHONE, Scheme, Visit, chromium, dashboard, picture, settle, visit

SIZES = {"desk": DESK, "phone": PHONE}
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
PRIVATE, COMPARED = 2, 8
"""Of the invented runs, the one that spends a privacy budget, and how many are compared."""


def addresses(runs: list[str]) -> dict[str, str]:
    """Return each page's address, with something chosen where that shows more; ``runs`` from old to new."""
    shown, private = runs[0], runs[min(PRIVATE, len(runs) - 1)]
    return {
        "runs": f"/runs?run={shown}",
        "run": f"/run?run={shown}",
        "clients": f"/clients?run={shown}",
        "privacy": f"/privacy?run={private}",
        "layers": f"/layers?run={shown}",
        "compare": f"/compare?run={shown}&runs={','.join(runs[:COMPARED])}",
    }


def pictures(reader: Visit, runs: list[str], out: Path, kind: str, whole: bool) -> None:
    """Show page after page and take a picture of each."""
    for name, address in addresses(runs).items():
        reader.page.goto(address)
        reader.page.get_by_test_id("stMain").get_by_role("heading", level=1).wait_for()
        settle(reader.page, 0.5)
        picture(reader.page, out / f"{name}-{kind}.png", whole)
        sys.stdout.write(f"{out / f'{name}-{kind}.png'}\n")


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--home", type=Path, help="home of the runs that are shown")
    parser.add_argument("--whole", action="store_true", help="pages as long as they are, not only their first screen")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        home = given.home or Path(folder, "lorafleet-home")
        if not given.home:
            fill(home, runs=9, clients=8, rounds=24, layers=6, statistics_every=1)
        with RunStore.open(home, read_only=True) as store:
            runs = [run.id for run in reversed(store.runs())]
        with dashboard(home) as served, chromium() as browser:
            for (size, window), scheme in product(SIZES.items(), SCHEMES):
                with visit(browser, window, scheme, served.url) as reader:
                    pictures(reader, runs, given.out, f"{size}-{scheme}", given.whole)


if __name__ == "__main__":
    main()
