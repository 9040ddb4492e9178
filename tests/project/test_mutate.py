"""Bugs planted in the kernels are caught by the tests: a sample of mutations.py. ``python tests/mutate.py`` runs all."""

from pathlib import Path

import pytest
from interpreter import INTERPRETED
from machine import nvcc_missing, triton_missing
from mutate import ROOT, Tree, mutated, place
from mutations import MUTATIONS

from ddpm_fast.backends import native, native_missing

# Of eight kinds, in kernels that are compiled in seconds. Without a bug the same tests are the suite's own.
SAMPLE = [mutation for mutation in MUTATIONS if mutation.quick]


def name(mutation):
    return f"{Path(mutation.file).name}: {mutation.what}"


def device_missing(mutation):
    if mutation.file.startswith("ddpm_fast/ops/triton"):
        return triton_missing() or ("TRITON_INTERPRET=1: nothing is compiled" if INTERPRETED else "")
    if native is None or not hasattr(native, "cuda_group_norm_plan"):
        return f"the launch plan is not there: {native_missing or 'ddpm_fast._C was built without CUDA'}"
    return nvcc_missing()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return Tree(tmp_path_factory.mktemp("mutate") / "tree", built=False)


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize("mutation", SAMPLE, ids=name)
def test_a_planted_bug_is_caught(mutation, tree):
    if device_missing(mutation):
        pytest.skip(device_missing(mutation))
    with tree.planted(mutation):
        assert tree.failures(mutation.quick) == [mutation.quick]


def test_the_sample_is_of_eight_kinds():
    assert len({mutation.kind for mutation in SAMPLE}) == len(SAMPLE) == 8


@pytest.mark.parametrize("mutation", MUTATIONS, ids=name)
def test_there_is_one_place_for_each(mutation):
    text = (ROOT / mutation.file).read_text()
    assert mutated(text, mutation) != text
    for word in mutation.tests.split():
        assert not word.endswith(".py") or place(word)
