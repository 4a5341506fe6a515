"""The README keeps its word: its example prints what it says, and the files and targets it names exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_prints_what_the_readme_says() -> None:
    ((code, said),) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert printed.stdout == said


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z][a-z-]*)", README))))
def test_the_targets_it_names_exist(target: str) -> None:
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README)) | set(re.findall(r"^\| `((?:\w+/)+\w*)`", README, re.MULTILINE)))
)
def test_the_files_it_names_exist(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists()
