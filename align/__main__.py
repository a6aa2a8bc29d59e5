"""`python -m align` and `accelerate launch -m align`: the same command as `align`."""

from align.cli import main

main()
