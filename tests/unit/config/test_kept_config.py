"""The copy of its config that a run keeps replaces the copy before it, and no text that somebody wrote there."""

from dist_qft.config.load import keep_config, load_config

WRITTEN = "# my notes on this run\nmodel: {path: b}   # the small one\noutput_dir: a\n"


def test_a_text_by_hand_is_copied_before_it_is_replaced(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(WRITTEN)
    config = load_config(path, ["train.seed=5"])
    assert keep_config(config, path) == tmp_path / "config.yaml.before"
    assert (tmp_path / "config.yaml.before").read_text() == WRITTEN and load_config(path) == config
    path.write_bytes(b"caf\xe9: 1")  # no config at all
    assert keep_config(config, path) == tmp_path / "config.yaml.before1"
    assert (tmp_path / "config.yaml.before1").read_bytes() == b"caf\xe9: 1"
    assert (tmp_path / "config.yaml.before").read_text() == WRITTEN


def test_a_runs_own_copy_is_replaced(tmp_path):
    path = tmp_path / "config.yaml"
    (tmp_path / "run.yaml").write_text(WRITTEN)
    for seed in (1, 2):
        config = load_config(
            tmp_path / "run.yaml", [f"train.seed={seed}", "method.schedule=[{layers: [q_proj], rank: 8}]"]
        )
        assert keep_config(config, path) is None and load_config(path) == config
    assert {file.name for file in tmp_path.iterdir()} == {"run.yaml", "config.yaml"}
