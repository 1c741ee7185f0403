"""The fine-tuning methods: the parameters that train beside the frozen base.

`trainable` and `forward` are the contract, `adapters` and `qst` its two families, `plans` the door to both. A method
never imports an engine.
"""
