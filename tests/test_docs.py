"""README.md and docs/: the commands are ones that the programs take, the links lead somewhere, the tables agree."""

import importlib
import re
import shlex
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT

import common
from tools.fetch import sources

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAINS = {"data.py": "tools.prepare", "weights.py": "tools.convert"}  # where their main() is


def commands(text: str) -> list[list[str]]:
    """The lines of a page's shell blocks that run a program of ours, as words, without their comments."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("python ", "torchrun "))]


def program(words: list[str]) -> tuple[str, list[str]]:
    """The module with the command's main(), and its arguments."""
    if words[1] == "-m":
        return words[2], words[3:]
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return MAINS.get(words[place], words[place].removesuffix(".py")), words[place + 1:]


class Parsed(Exception):
    """The options were understood; nothing is run."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page: Path) -> None:
    understand = common.Parser.parse_args

    def stop(parser: common.Parser, arguments: list[str]) -> None:
        understand(parser, arguments)
        raise Parsed

    for words in commands(page.read_text()):
        module, arguments = program(words)
        with patch.object(common.Parser, "parse_args", stop), pytest.raises(Parsed):
            importlib.import_module(module).main(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for file, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        target = page.parent / file if file else page
        assert target.exists(), file
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


def test_reproduce_names_every_source() -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text()
    for source in sources().values():
        assert f"`{source.name}`" in page
        assert (source.checksum or "").rpartition(":")[2] in page
