"""`python -m forebay.cli` is the `forebay` command. It refuses to do anything else."""

from forebay.cli import main

main()
