"""Sides of a benchmark that was ended: measured once, unless they failed or their settings are others."""

from dist_qft.bench.kept_sides import KeptSides
from dist_qft.bench.report import Side


def test_only_what_is_missing_is_measured_again(tmp_path, capsys):
    path = tmp_path / "all.jsonl.sides"
    asked: list[str] = []

    def measure(name: str, rows: int, error: str | None = None) -> Side:
        def run() -> Side:
            asked.append(f"{name} {rows}")
            return Side(name, {} if error else {"seconds": float(len(asked))}, error)

        return KeptSides(path, "nodes", 3).measure(name, {"rows": rows}, run)

    first = measure("ours", 1)
    assert measure("peer", 1, "out of memory").error == "out of memory"
    path.write_text(path.read_text() + '{"key": "cut sho')
    assert measure("ours", 1) == first
    assert measure("ours", 2).metrics == {"seconds": 3.0} and measure("peer", 1).metrics == {"seconds": 4.0}
    assert asked == ["ours 1", "peer 1", "ours 2", "peer 1"]
    assert "nodes: 1 of 3: ours: measured before" in capsys.readouterr().err
    assert KeptSides(None, "nodes", 1).measure("ours", {}, lambda: first) == first
