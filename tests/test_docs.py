"""Everything that README and docs tell a reader to run is run, page by page."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

# Rules of modules that a page imports stay: they are registered once, when they are imported.
import examples.fmrlrec.nesting  # noqa: F401
from tests.docs_blocks import Block, blocks_of, code_of
from tests.rules.kept import rules_kept

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if any(b.language == "python" for b in blocks_of(page))
)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run top to bottom in one namespace, in an empty folder.

    Shell blocks marked `sh` run in between, in the same folder: pages may mix the two.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    module = types.ModuleType("__page__")
    monkeypatch.setitem(sys.modules, "__page__", module)
    with rules_kept():
        for block in blocks_of(page):
            if not block.skipped:
                run(block, module, tmp_path)


def run(block: Block, module: types.ModuleType, folder: Path) -> None:
    """Execute a block; other languages than Python and sh are for reading."""
    if block.language == "python":
        exec(compile(code_of(block), str(block.page), "exec"), module.__dict__)
    elif block.language == "sh":
        for line, command in commands(block):
            shell(command, folder, f"{block.page.name}:{line}")


def commands(block: Block) -> list[tuple[int, str]]:
    """Return (line of the page, command) of a shell block: one command a line."""
    numbered = enumerate(block.text.splitlines(), block.line)
    stripped = ((n, line.split("  #")[0].strip()) for n, line in numbered)
    return [(n, line) for n, line in stripped if line and not line.startswith("#")]


def shell(command: str, folder: Path, place: str) -> None:
    """Run a command with the environment's own `python` and `matryoshkafy` first on the path."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{place}: {command}\n{done.stdout}\n{done.stderr}"


def test_a_failing_block_is_reported_at_its_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nfine = 1\n\nraise RuntimeError('here')\n```\n")
    with pytest.raises(RuntimeError) as caught:
        run(blocks_of(page)[0], types.ModuleType("page"), tmp_path)
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 6)


def test_blocks_know_their_language_line_and_why_they_are_left_out(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n<!-- not executed: needs a GPU -->\n```python title='x'\na\n```\n\n"
        "- item\n\n    ```sh\n    echo b\n    ```\n"
    )
    first, second = blocks_of(page)
    assert (first.language, first.line, first.text, first.skipped) == (
        "python", 5, "a\n", "needs a GPU",
    )  # fmt: skip
    assert (second.language, second.line, second.text) == ("sh", 11, "echo b\n")


def test_an_open_block_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n")
    with pytest.raises(ValueError, match="line 1: the block is never closed"):
        blocks_of(page)


def test_the_readme_shows_the_results_as_their_pages_have_them() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "readme.py", "--check"])
    assert done.returncode == 0, "run: python docs/readme.py"


def test_a_section_of_the_readme_is_what_its_page_shares(tmp_path: Path) -> None:
    copier = runpy.run_path(str(ROOT / "docs" / "readme.py"))
    (tmp_path / "page.md").write_text("a\n<!-- readme -->\n| 95 % |\n<!-- /readme -->\nb\n")
    before = "x\n<!-- from page.md: generated -->\nold\n<!-- /from -->\ny\n"
    after = copier["filled"](before, tmp_path)
    assert after == before.replace("old", "| 95 % |")


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([\w./-]+)\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken


def test_from_scratch_stays_within_150_lines_of_plain_torch() -> None:
    text = "".join(b.text for b in blocks_of(ROOT / "docs" / "from_scratch.md"))
    assert len([line for line in text.splitlines() if line.strip()]) <= 150
    assert "matryoshkafy" not in text
