"""The way from the user's files to the micro-batches of one rank. Nothing here knows of processes or models.

The road, one module a stage: `sources` (records and where they were read) -> `formats` (what a record's
fields mean) -> `tokens` (token ids and which of them are predicted) -> `packing` (several samples in a row)
-> `dataset` (flat arrays in one file), all driven by `prepare`, -> `batches` (the order, and a rank's share).
"""
