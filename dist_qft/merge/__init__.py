"""Exports of a trained model: merged into its base, or as adapters, always with a certificate.

`recipe` holds the request and the decision how to carry it out, made from shapes alone. `target` is the contract of a
kind of result; each file in `writers` that keeps it is one kind, and `targets` is the door to them. `merged_weight` is
the arithmetic on one layer, `collective` walks over the layers with all ranks, `certificate` states the difference
between result and live model, `verify` computes that difference again from the files, and `run` is the stage itself.
"""
