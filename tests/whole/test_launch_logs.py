"""torchrun's options about the ranks' output, which need a folder of logs and are given none."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import launcher_of

# In one write: the ranks share a pipe.
RANK = "import os; os.write(1, f'rank {os.environ[\"RANK\"]}\\n'.encode())\n"


@pytest.mark.parametrize(
    ("words", "variables", "told", "kept"),
    [
        ([], {}, {"rank 0", "rank 1"}, None),
        (["--tee", "3"], {}, {"[default0]:rank 0", "[default1]:rank 1"}, 2),
        ([], {"PET_REDIRECTS": "3"}, set(), 2),
        (["--tee", "3", "--local-ranks-filter", "1"], {}, {"[default1]:rank 1"}, 2),
        (["--local-ranks-filter", "1"], {}, {"rank 1"}, 0),
    ],
)
def test_options_about_logs_have_their_effect_without_a_folder(tmp_path, words, variables, told, kept):
    (tmp_path / "ranks.py").write_text(RANK)
    launcher, ours = launcher_of("ranks", tmp_path)
    environment = os.environ | ours | {"TMPDIR": str(tmp_path)} | variables
    command = [*launcher, "--nproc-per-node", "2", *words, "--"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert {*done.stdout.splitlines()} == told
    named = re.search(r"the ranks' logs are in (\S+);", done.stderr)
    found = sorted(tmp_path.glob("dist_qft_*"))
    assert found == ([] if kept is None else [Path(named[1])])
    if found:
        logs = [path.read_text() for path in found[0].rglob("stdout.log")]
        assert len([text for text in logs if text.startswith("rank ")]) == kept
