"""The engines, which spread the frozen base over the ranks: the contract (`engine`), one file per engine, `engines`."""
