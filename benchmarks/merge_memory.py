"""Peak memory and time of a merge of at least 1 GB of packed weights on two ranks; not a test.

    PYTHONPATH=. python benchmarks/merge_memory.py [LAYERS]     about 42 MB each, default 26

Prints what rank 0 holds, its largest decoder layer, and by how much its memory grew at most: in the fold and the two
forward passes of the certificate, and while the result was gathered and written.
"""

import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from tests.support.merges import GGUF_RUN, measured_merge, write_random_adapters
from tests.support.rank_pool import RankPool
from tests.support.tiny_gguf import save_random_gguf
from tests.support.tiny_model import tiny_config

QALORA = {"name": "qalora", "pool": 32, "rank": 4}


def main(layers: int = 26) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = save_random_gguf(Path(folder) / "random.gguf", layers=layers, hidden=2048, intermediate=8192)
        print(f"{source.stat().st_size / 1e9:.2f} GB, {layers} layers", flush=True)
        config = tiny_config(source, Path(folder) / "run" / "run", **{**GGUF_RUN, "method": QALORA})
        with closing(RankPool(2)) as pool:
            pool.run(write_random_adapters, config=config)
        for target in ("gguf", "quantized"):
            path = Path(folder) / ("merged.gguf" if target == "gguf" else "merged")
            started = time.perf_counter()
            with closing(RankPool(2)) as pool:
                found = pool.run(measured_merge, source=Path(config.output_dir), target=target, path=path)[0]
            sizes = "  ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in found.items())
            ratios = "  ".join(f"{stage}/layer {found[stage] / found['layer']:.2f}" for stage in ("probing", "writing"))
            print(f"{target:9}  {sizes}  {ratios}  {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
