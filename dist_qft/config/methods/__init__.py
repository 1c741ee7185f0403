"""The `method` section of a config: one class per method, each with its own settings, defaults and rules.

`method` is the contract, `tile_method` the common part of all tile adapters; the other files hold one method each;
`door` is the union of them all, keyed on `method.name`.
"""
