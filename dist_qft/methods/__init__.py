"""The fine-tuning methods: what trains beside the frozen base.

`schedule` decides which layer gets which adapter (no torch, no weights), `tile_adapter` is the one adapter
class of all four methods, `attach` hooks adapters onto a base from outside. A method never imports an engine.
"""
