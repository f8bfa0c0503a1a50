"""Where a run is: one line, drawn over again, on a terminal only."""

import sys


def redraw(text: str = "") -> None:
    """Show a line on stderr in the place of the last one; without a text take that away."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}\r", end="", file=sys.stderr, flush=True)
