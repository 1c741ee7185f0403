"""`dist-qft bench`: ours beside the usual alternatives, on the same work in one run, and beside the bound.

Each benchmark is one file with a `run(options)` that returns a `Report`. A side that needs ranks runs in processes of
its own (`processes`, `worker`). Nothing here is needed by training; the peers are the optional extra `bench`.
"""
