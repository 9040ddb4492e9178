"""The generator's integers: every backend has the reference's, which Noise.integers and uniform are made of."""

import pytest
import torch
from interpreter import INTERPRETED
from machine import triton_missing
from numerics import assert_bits_equal

from ddpm_fast import Noise
from ddpm_fast.backends import native, native_missing
from ddpm_fast.noise import words
from ddpm_fast.noise.words import words_reference

CPU = torch.device("cpu")
KEYS = [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**64 - 2), (2**63 + 5, 7, 2**32 - 2), (12345, 2**31, 2**63 - 1)]
COUNTS = [0, 1, 127, 128, 129, 1000]


@pytest.mark.backends("words", without=("reference",))
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_words_are_the_references(key, count, backend):
    made = words.backends.choose(backend.device, torch.float32, backend.name)(count, *key, backend.device)
    assert made.dtype == torch.int64 and made.device.type == backend.device.type
    assert_bits_equal(made.cpu(), words_reference(count, *key, CPU))


@pytest.mark.simulator
@pytest.mark.skipif(bool(triton_missing()) or INTERPRETED, reason=triton_missing() or "nothing is compiled in this process")
@pytest.mark.parametrize("count", COUNTS[1:])
def test_words_in_the_simulator(count):
    from simulator import simulated

    for key in KEYS:
        with simulated(80) as launches:
            made = words.backends.choose(CPU, torch.float32, "triton")(count, *key, CPU)
        assert_bits_equal(made, words_reference(count, *key, CPU))
        (launch,) = launches  # one kernel, and nothing around it
        assert launch.report.global_store.bytes_requested == 8 * count


def test_integers_and_uniform_are_made_of_them():
    key = Noise(*KEYS[2])
    expected = words_reference(50, *KEYS[2], CPU)
    assert key.integers(50, 1000).tolist() == [(word * 1000) >> 32 for word in expected.tolist()]
    assert key.uniform(50).tolist() == [word / 2**32 for word in expected.tolist()]


def test_compiled_they_are_the_same():
    compiled = torch.compile(lambda: Noise(*KEYS[1]).integers(9, 77), fullgraph=True, backend="eager")
    assert compiled().tolist() == Noise(*KEYS[1]).integers(9, 77).tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2),), TypeError, "noise_words takes a tensor of torch.int64, a seed, a stream and a first sample"),
        ((torch.zeros(2), 0, 0, 0), TypeError, "noise_words takes a tensor of torch.int64"),
        ((torch.zeros(4, dtype=torch.int64)[::2], 0, 0, 0), ValueError, "words must be contiguous"),
        ((torch.zeros(2, dtype=torch.int64), -1, 0, 0), OverflowError, "negative"),
        ((torch.zeros(2, dtype=torch.int64), 0.5, 0, 0), TypeError, "float"),
    ],
)
def test_what_the_kernel_refuses(arguments, error, message):
    if native is None:
        pytest.skip(native_missing)
    with pytest.raises(error, match=message):
        native.noise_words(*arguments)
