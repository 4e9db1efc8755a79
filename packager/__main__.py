"""`python -m packager` is the `packager` command."""

from packager.cli import main

main()
