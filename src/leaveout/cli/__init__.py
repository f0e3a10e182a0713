"""The command line: thin commands over the public API, torch imported only by the commands that need it.

Standard output holds the answer (a table, or JSON with --json), standard error the progress. Exit 0, 1 for an error
(one sentence), 2 for wrong usage. Importing a module of commands adds them to `app`, in the order of `--help`.
"""

from __future__ import annotations

from leaveout.cli import readout

# isort: split
from leaveout.cli import asking

# isort: split
from leaveout.cli import deletion

# isort: split
from leaveout.cli import evaluation

# isort: split
from leaveout.cli import checks

# isort: split
from leaveout.cli import show
from leaveout.cli.program import app, main

__all__ = ["app", "asking", "checks", "deletion", "evaluation", "main", "readout", "show"]
