"""Bugs planted in the kernels are caught by the tests: a sample of mutations.py. ``python tests/mutate.py`` runs all."""
from pathlib import Path

import pytest
from mutate import ROOT, mutated
from mutations import MUTATIONS

# One of each kind, by kernels that are compiled in seconds, with the test that is the quickest to catch it.
SAMPLE = {}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{Path(m.file).name}: {m.what}")
def test_there_is_one_place_for_each(mutation):
    text = (ROOT / mutation.file).read_text()
    assert mutated(text, mutation) != text
    assert all((ROOT / "tests" / word).exists() for word in mutation.tests.split() if word.endswith(".py"))
