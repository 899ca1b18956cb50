"""prepare.py: the command line of data.py."""

import subprocess
import sys
from pathlib import Path

import pytest

import data
from tools import prepare


@pytest.mark.parametrize("arguments", [
    "check nowhere", "prepare-context --voc nowhere --json x.json", "toy --train 0", "nonsense",
    "fetch nonsense", "fetch",
    "from-folders --images nowhere --labels nowhere --classes 3",
])
def test_a_wrong_command_is_one_line_and_status_2(arguments: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as leaving:
        prepare.main(arguments.split())
    printed = capsys.readouterr()
    assert leaving.value.code == 2 and "error: " in printed.err.splitlines()[-1] and not printed.out


def test_data_py_hands_its_commands_over() -> None:
    done = subprocess.run([sys.executable, data.__file__, "check", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no data at nowhere, which is no folder")


def test_toy_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prepare.main(["toy", "--out", f"{tmp_path}/t", "--train", "2", "--val", "1", "--size", "64", "80"])
    assert capsys.readouterr().out == f"toy data at {tmp_path}/t\n"
    assert data.open_dataset(tmp_path / "t", "train").image(1).shape == (64, 80, 3)
