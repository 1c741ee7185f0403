"""How the frozen base is spread over the ranks: one door (`engine`), one file per engine."""
