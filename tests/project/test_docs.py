"""docs/math.md names functions and tests: every one of them must exist."""

import re
from pathlib import Path

import pytest

import ddpm_fast
import ddpm_fast.evaluation  # not imported with the package, and named in the page
import ddpm_fast.io.sample_writer
import ddpm_fast.training
from ddpm_fast.diffusion.schedules import NoiseSchedule

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", TEXT)))
FUNCTIONS = sorted(set(re.findall(r"`((?:diffusion|sampling|noise|ops|data|training|evaluation|io)(?:\.\w+)+)`", TEXT)))


@pytest.mark.parametrize("name", TESTS)
def test_named_test_exists(name):
    path, test = name.split("::")
    source = ROOT / path
    assert source.is_file(), f"{path} is named in docs/math.md and does not exist"
    assert re.search(rf"^def {test}\(", source.read_text(encoding="utf-8"), re.M), f"{path} has no {test}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_named_function_exists(name):
    value = ddpm_fast
    for part in name.split("."):
        owner = NoiseSchedule.linear(30) if value is NoiseSchedule else value  # its tables are attributes of an instance
        assert hasattr(owner, part), f"docs/math.md names {name}, but {value!r} has no {part}"
        value = getattr(owner, part)


def test_something_is_named():
    assert len(TESTS) > 40 and len(FUNCTIONS) > 20
    assert "tests/" not in re.sub(r"`tests/[\w/]+\.py(?:::\w+)?`", "", TEXT)  # nothing is named in a way that is not checked


def test_links_lead_to_files():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


PATHS = re.compile(r"\b(?:ddpm_fast|csrc|tests|benchmarks|docs|examples)/[\w/]+\.(?:py|pyi|h|cpp|cu|cuh|json|md|png)\b")


def test_files_that_are_named_are_there():
    """In the pages, and in what the sources say of one another."""
    sources = [path for folder in ("ddpm_fast", "csrc", "docs", "examples", "benchmarks") for path in (ROOT / folder).rglob("*")]
    sources = [*ROOT.glob("*.md"), *(path for path in sources if path.suffix in {".py", ".md", ".h", ".cpp", ".cu", ".cuh"})]
    named = {(str(path.relative_to(ROOT)), name) for path in sources for name in PATHS.findall(path.read_text(encoding="utf-8"))}
    assert len(named) > 20 and [pair for pair in sorted(named) if not (ROOT / pair[1]).exists()] == []
