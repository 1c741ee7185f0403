"""`python -m dist_qft.launch`: the ranks of this node, started by torchrun with honest exit codes; see `command`."""

from typing import NoReturn

from dist_qft.ranks import process


def run() -> NoReturn:
    """Run the launcher as this process's only work, and exit with its code."""
    process.begin(stops_early=True)  # before the imports below, which take seconds
    from dist_qft.launch.command import main

    process.leave(main())


if __name__ == "__main__":
    run()
