"""`python -m leaveout.cli` is the command `leaveout`."""

from leaveout.cli import main

main()
