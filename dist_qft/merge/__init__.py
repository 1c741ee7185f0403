"""Merging trainables into the base, and the files that come out.

`recipe` decides what is possible, from shapes alone; `merged_weight` is the arithmetic on one layer; `collective` walks
over the layers with all ranks; `writers` has one file per kind of result; `certificate` states the difference between
result and live model, and `verify` computes that again from the files; `run` is the stage itself.
"""
