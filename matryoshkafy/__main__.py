"""python -m matryoshkafy: the command line."""

from matryoshkafy_cli.main import main

main()
