"""`align` in a launch whose second process is slow to record when the work began, and whose first cleans up late."""

import os
import sys
import time
from pathlib import Path

from align.cli import main
from align.commands import one_step

link, remove_leftovers = os.link, one_step.remove_leftovers


def late_link(source, target):
    """Keep the temporary file for a while before it gets its name."""
    time.sleep(4)
    link(source, target)


def late_removal(folder, **names):
    """Remove what earlier attempts left after the other process may have begun."""
    time.sleep(1)
    remove_leftovers(folder, **names)


if os.environ["RANK"] == "1":
    os.link = late_link
else:
    one_step.remove_leftovers = late_removal
sys.argv[0] = str(Path(sys.executable).with_name("align"))
main()
