"""What `make demo` promises: each head learns the toy scenes from random weights on a CPU."""
import json
import shutil
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


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize(("head", "explained"), [("mask2former", 1), ("upernet", 0)])
def test_demo_ends_with_the_report_and_a_sheet_of_queries(head, explained):
    dry = subprocess.run(["make", "-n", "--no-print-directory", "demo", f"HEAD={head}"], cwd=ROOT, check=True,
                         capture_output=True, text=True)
    *_, report, files, _ = lines = dry.stdout.splitlines()
    assert report.endswith("python -m tools.report")
    assert "report/index.html" in files and ("val_0000_explain.png" in files) == explained
    assert sum("predict.py" in line and "--explain" in line for line in lines) == explained
