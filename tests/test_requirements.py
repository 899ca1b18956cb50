"""requirements.txt, requirements.lock and the README's "Versions" do not contradict each other."""

import re

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements(name: str) -> dict[str, Requirement]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "#-"]
    return {canonicalize_name(line.name): line for line in map(Requirement, lines)}


def exact(name: str) -> dict[str, str]:
    return {package: str(line.specifier).removeprefix("==") for package, line in requirements(name).items()}


def test_the_locked_versions_lie_in_the_ranges():
    """Every package has a lower bound, and a tested version at or above it."""
    ranges, locked = requirements("requirements.txt"), exact("requirements.lock")
    for name, line in ranges.items():
        assert any(bound.operator == ">=" for bound in line.specifier), f"{name} has no lower bound"
        assert locked[name] in line.specifier
    assert {"torch", "torchvision", "safetensors"} <= ranges.keys()


def test_the_readme_names_versions_in_the_ranges():
    """One version of torch or torchvision lies in its range; "A to B" begins where the range begins."""
    ranges = requirements("requirements.txt")
    paragraph = re.search(r"\* \*\*Versions\*\*:.*?(?=\n\n|\n\* |\Z)", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    named = re.findall(r"\b(torch|torchvision) (\d[\d.]*\d)(?:\s+to\s+(\d[\d.]*\d))?", paragraph)
    assert "torch" in {name for name, *_ in named}
    for name, first, last in named:
        assert first in ranges[name].specifier and (last or first) in ranges[name].specifier
        assert not last or f">={first}" in map(str, ranges[name].specifier)
