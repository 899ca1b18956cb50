"""What `make demo` promises: each head learns the toy scenes from random weights on a CPU."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def run(folder, *command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mask2former", "upernet"])
def test_demo_reaches_its_scores(tmp_path, head):
    train = ("train.py", "--data", "toy", "--size", "tiny", "--head", head, "--device", "cpu")
    run(tmp_path, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / train[0]), *train[1:])
    scores = {}
    for mode in ([], ["--ms"]):
        run(tmp_path, str(ROOT / "evaluate.py"), *mode, "--json", "scores.json")
        scores[bool(mode)] = json.loads((tmp_path / "scores.json").read_text())["mean_iou"]
    assert scores[False] >= 0.80
    assert scores[True] >= scores[False] - 0.01
