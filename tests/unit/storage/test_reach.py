"""A folder that the user may not enter: one line with the key, and exit code 3, of every verb that asks for a path."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from dist_qft.config.load import save_config
from tests.support.tiny_model import tiny_config

_CAPABILITIES = "-dac_override,-dac_read_search"
# The tests may be run by root, who may enter all folders unless these are given up.
BOUND = ["setpriv", f"--bounding-set={_CAPABILITIES}", f"--inh-caps={_CAPABILITIES}"] if os.geteuid() == 0 else []
RUN = """
import json, sys
from dist_qft.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["dist-qft", *words]
    try:
        main()
    except SystemExit as stop:
        print(f"exit {stop.code}", file=sys.stderr)
"""


@pytest.mark.skipif(bool(BOUND) and shutil.which("setpriv") is None, reason="root, and setpriv is not installed")
def test_a_folder_that_may_not_be_entered_is_one_line(tmp_path, tiny_llama):
    closed = tmp_path / "closed"
    (closed / "model").mkdir(parents=True)
    config = tmp_path / "run.yaml"
    save_config(tiny_config(tiny_llama, tmp_path / "out"), config)
    merge = "merge={at_end: peft}"
    refused = [
        (["validate", config, f"model.path={closed}/model"], f"model.path: got '{closed}/model', must be in folders"),
        (["validate", config, f"model.path={closed}"], f"model.path: got '{closed}', must be in folders"),
        (["validate", config, f"model.path={closed}/m.gguf"], f"model.path: got '{closed}/m.gguf', must be in folders"),
        (["validate", config, merge, f"output_dir={closed}/out"], f"output_dir: got '{closed}/out', must be in"),
        (["validate", config, f"merge={{at_end: peft, path: {closed}/out}}"], "-o (merge.path): got"),
        (["train", config, f"method.init_from={closed}/run"], f"method.init_from: got '{closed}/run', must be in"),
        (
            ["train", config, f"output_dir={closed}/out"],
            f"output_dir: cannot write to '{closed}/out': Permission denied",
        ),
        (["init", closed / "new.yaml", "--model", tiny_llama], f"CONFIG: got '{closed}/new.yaml', must be in folders"),
        (["generate", closed / "run", "--prompt", "a"], f"'{closed}/run/config.json': Permission denied"),
    ]
    doctor = ["doctor", config, f"output_dir={closed}/out"]
    words = json.dumps([list(map(str, words)) for words in (*(words for words, _ in refused), doctor)])
    closed.chmod(0)
    done = subprocess.run([*BOUND, sys.executable, "-c", RUN, words], capture_output=True, text=True, timeout=120)
    closed.chmod(0o700)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "exit "))]
    for number, (_, told) in enumerate(refused):
        error, code = lines[2 * number : 2 * number + 2]
        assert error.startswith(f"error: {told}") and code == "exit 3", (error, code)
    assert lines[-1] == "exit 3" and "cannot start: disk" in done.stdout
