"""`python -m dist_qft`: the same program as the `dist-qft` command, for launchers that start modules."""

from dist_qft.cli import main

if __name__ == "__main__":
    main()
