"""What `make demo` promises: each head learns the toy scenes from random weights on a CPU."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mask2former", "upernet"])
def test_demo_reaches_its_scores(tmp_path, monkeypatch, head):
    def python(*command) -> None:
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    python("-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "train.py",
           "--data", "toy", "--size", "tiny", "--head", head, "--device", "cpu")
    scores = []
    for mode in ([], ["--ms"]):
        python(ROOT / "evaluate.py", *mode, "--json", "scores.json")
        scores.append(json.loads((tmp_path / "scores.json").read_text())["mean_iou"])
    assert scores[0] >= 0.80 and scores[1] >= scores[0] - 0.01
