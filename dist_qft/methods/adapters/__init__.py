"""Tile adapters: `schedule` decides which layer gets which (no torch, no weights), `tile_adapter` is the one class of
all tile methods, `attach` hooks adapters onto a base from outside, `exact_fold` folds dW into a format's zeros.
"""
