"""The noise contract: published vectors, pinned values, accuracy of the polynomials, and what a Noise accepts.

Its statistics are in test_noise_statistics.py.
"""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_bits_equal, assert_close_to_exact

import ddpm_fast
from ddpm_fast import Noise
from ddpm_fast.noise import philox
from ddpm_fast.noise.philox import philox4x32_10
from ddpm_fast.ops import randn

GOLDEN = json.loads(Path(__file__).with_name("golden_noise.json").read_text())

# Random123's kat_vectors for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter, key, expected):
    assert list(philox4x32_10(*words(counter), *words(key))) == words(expected)
    as_tensors = philox4x32_10(*(torch.tensor([word]) for word in words(counter)), *words(key))
    assert [int(word) for word in as_tensors] == words(expected)


@pytest.mark.backends("randn")
@pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda run: run["why"])
def test_golden_values(run, backend):
    key = Noise(run["seed"], run["stream"], run["first_sample"])
    values = randn(run["shape"], key, device=backend.device, backend=backend.name).flatten().cpu()
    expected = torch.from_numpy(np.array([int(bits, 16) for bits in run["bits"]], np.uint32).view(np.float32))
    assert_bits_equal(values[run["at"]], expected)


def test_golden_file_reaches_where_integers_wrap():
    runs = GOLDEN["runs"]
    assert GOLDEN["contract"] == 1
    assert any(run["seed"] >= 2**63 for run in runs)
    assert any(run["first_sample"] < 2**32 < run["first_sample"] + run["shape"][0] for run in runs)
    assert any(run["first_sample"] == 2**64 - 1 for run in runs)
    assert any(run["shape"][1] % 4 for run in runs)


@pytest.fixture(scope="module")
def generated_words():
    """Words for radius and angle: many of the generator's, and the edges."""
    radius, angle, *_ = philox4x32_10(torch.arange(1 << 16), 0, 0, 0, 5, 0)
    edges = torch.tensor([0, 1, 2, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1])
    return torch.cat([radius, edges]), torch.cat([angle, edges])


def test_logarithm_is_within_an_ulp(generated_words):
    radius, _ = generated_words
    u = radius.float() * 2.0**-32 + 2.0**-33
    assert_close_to_exact(philox._log_unit(u), u.double().log(), rtol=2.0**-23)


def test_cosine_and_sine_are_within_two_roundings(generated_words):
    _, angle = generated_words
    turn = (angle >> 8).float() * 2.0**-24
    cosine, sine = philox._cos_sin_turn(turn)
    exact = 2 * math.pi * turn.double()
    assert_close_to_exact(cosine, exact.cos(), atol=2 * 2.0**-24)
    assert_close_to_exact(sine, exact.sin(), atol=2 * 2.0**-24)


def test_box_muller_against_float64(generated_words):
    radius, angle = generated_words
    u = (radius.float() * 2.0**-32 + 2.0**-33).double()
    r, a = (-2 * u.log()).clamp_min(0).sqrt(), 2 * math.pi * (angle >> 8).double() * 2.0**-24
    # Half an ulp of the logarithm survives the root; the root, the cosine (one ulp) and the product add 0.5 + 1 + 0.5.
    for value, exact in zip(philox._box_muller(radius, angle), (r * a.cos(), r * a.sin()), strict=True):
        unit = r.clamp_min(1e-30)
        assert_close_to_exact(value / unit.float(), exact / unit, atol=3 * 2.0**-23)


def test_extreme_words():
    zero = torch.zeros(1, dtype=torch.int64)
    largest, _ = philox._box_muller(zero, zero)
    assert_close_to_exact(largest, torch.tensor([math.sqrt(66 * math.log(2))], dtype=torch.float64), ulps=1)  # 6.76
    none, _ = philox._box_muller(zero + 2**32 - 1, zero)
    assert float(none) == 0  # u rounds to 1; a logarithm a little above 0 must not become NaN
    every_angle = torch.arange(0, 2**32, 2**24)
    cosine, sine = philox._box_muller(zero.expand_as(every_angle), every_angle)
    assert_close_to_exact(cosine.double().hypot(sine.double()).float(), largest.double().expand_as(every_angle), ulps=2)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(seed=-1), ValueError, r"seed must lie in 0\.\.2\^64-1, got -1"),
        (dict(seed=2**64), ValueError, r"seed must lie in 0\.\.2\^64-1, got 18446744073709551616"),
        (dict(seed=0, stream=2**32), ValueError, r"stream must lie in 0\.\.2\^32-1, got 4294967296"),
        (dict(seed=0, stream=-1), ValueError, r"stream must lie in 0\.\.2\^32-1, got -1"),
        (dict(seed=0, first_sample=2**64), ValueError, r"first_sample must lie in 0\.\.2\^64-1, got"),
        (dict(seed=1.0), TypeError, "seed must be an integer, got float"),
        (dict(seed=None), TypeError, "seed must be an integer, got NoneType"),
        (dict(seed=True), TypeError, "seed must be an integer, got bool"),
        (dict(seed=0, stream="1"), TypeError, "stream must be an integer, got str"),
        (dict(seed=torch.tensor(1.5)), TypeError, "integer"),
    ],
    ids=str,
)
def test_argument_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        Noise(**arguments)


@pytest.mark.parametrize("seed", [np.int64(7), np.uint64(7), torch.tensor(7)], ids=["int64", "uint64", "tensor"])
def test_integers_of_other_libraries_are_taken(seed):
    assert Noise(seed) == Noise(7)
    assert type(Noise(seed).seed) is int


def test_equality_hash_repr_and_pickle():
    key = Noise(2**64 - 1, 3, 2**40)
    assert key == Noise(2**64 - 1, 3, 2**40)
    assert hash(key) == hash(Noise(2**64 - 1, 3, 2**40))
    assert len({key, Noise(2**64 - 1, 3, 2**40), Noise(0, 3, 2**40), Noise(2**64 - 1, 4, 2**40), Noise(2**64 - 1, 3, 0)}) == 4
    assert key != (2**64 - 1, 3, 2**40)
    assert eval(repr(key)) == key
    assert pickle.loads(pickle.dumps(key)) == key


def test_immutable():
    key = Noise(1, 2, 3)
    for name in ("seed", "stream", "first_sample", "other"):
        with pytest.raises(AttributeError):
            setattr(key, name, 9)
    assert key == Noise(1, 2, 3) and not hasattr(key, "__dict__")


def test_at_changes_what_it_is_told():
    key = Noise(1, 2, 3)
    assert key.at() == key
    assert key.at(stream=0) == Noise(1, 0, 3)
    assert key.at(first_sample=0) == Noise(1, 2, 0)
    with pytest.raises(ValueError, match="stream must lie in"):
        key.at(stream=-1)


# Pinned: a change here changes the noise of every run that was ever seeded.
FOLDED = {0: 0x8B51BF31545B1D4C, 1: 0x5F86C41CE9CCC336, 2: 0xD6D549772F6BDC88, 2**32: 0xAEC8349056AE5D41, 2**64 - 1: 0x899F27E65866BDA3}


def test_fold_in_pinned():
    for k, seed in FOLDED.items():
        assert Noise(7, 3, 5).fold_in(k) == Noise(seed, 3, 5)
    assert Noise(2**64 - 1).fold_in(1).seed == 0x9CC0AEA31D360D55


def test_fold_in_depends_on_key_and_number_alone_and_never_repeats():
    keys = [Noise(seed).fold_in(k).seed for seed in range(64) for k in range(64)]
    assert len(set(keys)) == len(keys)
    assert Noise(7, 1, 2).fold_in(9).seed == Noise(7).fold_in(9).seed
    assert Noise(7).fold_in(1).fold_in(2) != Noise(7).fold_in(2).fold_in(1)
    flips = [bin(Noise(7).fold_in(0).seed ^ Noise(7).fold_in(1 << bit).seed).count("1") for bit in range(64)]
    assert min(flips) >= 16 and max(flips) <= 48  # 32 expected, standard deviation 4
    with pytest.raises(ValueError, match=r"k must lie in 0\.\.2\^64-1, got -1"):
        Noise(7).fold_in(-1)


def test_purposes_have_keys_of_their_own():
    purposes = {name: value for name, value in vars(ddpm_fast.noise).items() if name.startswith("FOLD_")}
    assert len(purposes) >= 8
    assert len(set(purposes.values())) == len(purposes)


def test_integers_and_uniform_pinned():
    key = Noise(7, 3, 5)
    assert key.integers(8, 1000).tolist() == [612, 233, 56, 775, 564, 437, 583, 141]
    assert key.uniform(4).tolist() == [word / 2**32 for word in (2631787389, 1001848118, 243559708, 3330281115)]
    assert Noise(2**64 - 1, 2**32 - 1, 2**64 - 1).integers(3, 2**31).tolist() == [2019837069, 887763036, 605509245]


def test_integers_and_uniform_kind():
    key = Noise(7)
    assert key.integers(5, 10).dtype == torch.int64
    assert key.uniform(5).dtype == torch.float64
    assert key.integers(0, 10).shape == key.uniform(0).shape == (0,)
    assert key.integers(100, 1).tolist() == [0] * 100
    for high in (0, -1, 2**31 + 1):
        with pytest.raises(ValueError, match=rf"high must lie in 1\.\.2\^31, got {high}"):
            key.integers(3, high)


def test_integers_of_a_slice_are_the_slice():
    key = Noise(7, 3, 2**32 - 4)
    assert key.at(first_sample=2**32).integers(6, 10**6).tolist() == key.integers(10, 10**6)[4:].tolist()
    assert key.at(first_sample=2**32).uniform(6).tolist() == key.uniform(10)[4:].tolist()


@pytest.mark.backends("randn")
@pytest.mark.parametrize("first_sample", [0, 2**32 - 3, 2**63 - 3])
def test_noise_of_a_slice_is_the_slice(backend, first_sample):
    def draw(count, first):
        return randn((count, 3, 37), Noise(11, 4, first), device=backend.device, backend=backend.name)

    whole = draw(7, first_sample)
    parts = [draw(count, first_sample + at) for at, count in ((0, 1), (1, 4), (5, 2))]
    assert_bits_equal(torch.cat(parts), whole)


@pytest.mark.backends("randn")
def test_a_sample_does_not_depend_on_its_shape_or_length(backend):
    def draw(*shape):
        return randn(shape, Noise(11, 4), device=backend.device, backend=backend.name)

    long = draw(2, 3001)
    assert_bits_equal(draw(2, 2998), long[:, :2998].contiguous())
    assert_bits_equal(draw(2, 10, 3, 100).reshape(2, 3000), long[:, :3000].contiguous())


def test_every_part_of_the_key_counts():
    key = Noise(1, 1, 1)
    others = [Noise(2, 1, 1), Noise(1 + 2**32, 1, 1), Noise(1, 2, 1), Noise(1, 1, 2), Noise(1, 1, 1 + 2**32), key.fold_in(1)]
    values = [other.materialize((1, 64)) for other in (key, *others)]
    for i, a in enumerate(values):
        for b in values[:i]:
            assert not (a == b).any()
