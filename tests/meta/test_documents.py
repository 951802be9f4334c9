"""The pages: paths that they name exist, and each experiment says what follows from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megaproof.tests.support.runs import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
EXPERIMENTS = sorted(page for page in (DOCS / "performance").glob("*.md") if page.name != "README.md")
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*(?:/|\.(?:py|cuh|cu|hpp|md|json|svg|txt|toml|yml|safetensors))")
"""A file or, with a slash at its end, a folder."""
INDEX_LINES = 40


def named(page: Path) -> list[str]:
    """Paths in the inline code of a page, but for what a run leaves in reports/.

    The first column of the page on migration is what is there no more.
    """
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    if page.name == "migration.md":
        prose = re.sub(r"^\| .+? \|", "", prose, flags=re.MULTILINE)
    paths = [code for code in re.findall(r"`([^`\n]+)`", prose) if PATH.fullmatch(code)]
    return [path for path in paths if not path.startswith("reports/")]


def exists(path: str) -> bool:
    """A path with folders counts from the root; a bare name may lie in any folder of the project."""
    bare = "/" not in path.rstrip("/")
    return any(found for found in (ROOT.rglob if bare else ROOT.glob)(path.rstrip("/")) if ".venv" not in found.parts)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_paths_that_are_named_exist(page: Path) -> None:
    assert {path for path in named(page) if not exists(path)} == set()


@pytest.mark.parametrize(("path", "there"), [("kernel/api.py", True), ("kernel/apis.py", False), ("oracle/", True)])
def test_a_path_that_is_wrong_is_found(path: str, there: bool) -> None:
    assert exists(path) is there


def test_pages_name_paths() -> None:
    """So that a change of style does not leave the check without anything to check."""
    assert sum(len(named(page)) for page in PAGES) >= 60


@pytest.mark.parametrize("page", EXPERIMENTS, ids=[page.stem for page in EXPERIMENTS])
def test_each_experiment_says_what_follows(page: Path) -> None:
    """The last paragraph of every section begins with 'So: '."""
    before, *sections = page.read_text(encoding="utf-8").strip().split("\n## ")
    for section in sections or [before]:
        assert section.strip().split("\n\n")[-1].startswith("So: "), section.splitlines()[0]


def test_the_index_of_experiments_is_short_and_whole() -> None:
    index = (DOCS / "performance" / "README.md").read_text(encoding="utf-8")
    assert len(index.splitlines()) <= INDEX_LINES
    assert [page.name for page in EXPERIMENTS if f"]({page.name})" not in index] == []


def test_every_page_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f"](docs/{page.name})" not in readme] == []
