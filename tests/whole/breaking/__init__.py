"""Breaks the program from outside, with signals and bytes alone: kills, flipped bits, full disks, hostile files.

`python -m tests.whole.breaking --minutes 60` is the long run, whose counts stand in docs/faults.md. Tests run a few
seconds of each. Nothing here uses a hook of the program: commands are run as a user runs them, and files are what a
disk or a stranger might leave. A seed and a number name every attempt, so that one can be repeated alone.
"""
