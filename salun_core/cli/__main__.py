"""`python -m salun_core.cli`, and `torchrun -m salun_core.cli`: the `salun` command."""

from salun_core.cli.app import main

if __name__ == "__main__":
    main()
