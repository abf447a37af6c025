"""Makes the page of a record again: report.html, which shows what the run did and why.

python utils/report.py record/NAME
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from utils.config import UserError, command_line


def find_folder(text: str) -> Path:
    """A folder as given, or below record/."""
    from utils.storage.record import RECORDS

    for path in (Path(os.path.expanduser(text)), RECORDS / text):
        if path.is_dir():
            return path.resolve()
    raise UserError(f"{text}: no such folder, and no such record in {RECORDS}")


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Make the page of one record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = "record/NAME, NAME, or an output folder of defense/purify.py"
    parser.add_argument("folder", nargs="+", metavar="FOLDER", help=words)
    folders = parser.parse_args(argv).folder
    if len(folders) > 1:
        other = "benchmarks/compare.py compares several in one table"
        raise UserError(f"report: a page shows one record; {other}")
    from utils.page.record_page import write_page

    print(write_page(find_folder(folders[0])))


if __name__ == "__main__":
    main()
