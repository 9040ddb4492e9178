"""Measures of samples against closed forms and sets whose answer is known; extractors by name; samples from files."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ddpm_fast.evaluation import evaluate_quality, inception_score, load_features, precision_recall, quality, quality_from_features
from ddpm_fast.evaluation.features import Features, digits_classifier
from ddpm_fast.evaluation.quality import load_samples
from ddpm_fast.io.sample_writer import write_samples
from ddpm_fast.training import ImageData, load_data


def gaussian(n, mean, factor, seed=0):
    """(n, F) features whose sample mean and covariance are exactly ``mean`` and ``factor @ factor.T``."""
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return white @ factor.T + mean


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.sqrt() @ vectors.T


# Far from 0 the sums of squares of the features are 10^8 times their covariance.
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_fid_is_the_distance_of_gaussians(offset):
    factors = torch.randn(2, 6, 6, dtype=torch.float64)
    shift = torch.arange(6, dtype=torch.float64) / 3
    a, b = (factor @ factor.T for factor in factors)
    expected = float(shift.square().sum() + (a + b - 2 * root(root(a) @ b @ root(a))).trace())
    real, generated = gaussian(300, torch.full((6,), offset).double(), factors[0]), gaussian(200, shift + offset, factors[1], seed=1)
    assert quality_from_features(real, generated, kid_subsets=2)["fid"] == pytest.approx(expected, rel=1e-9)


def test_kid_of_one_distribution_is_zero_on_average_and_of_two_is_not():
    draws = torch.randn(40, 2, 60, 8)
    kid = torch.tensor([quality_from_features(real, generated, kid_subsets=3)["kid_mean"] for real, generated in draws]).double()
    assert abs(kid.mean()) < 4 * kid.std() / 40**0.5
    shifted = quality_from_features(draws[0, 0], draws[0, 1] + 1.0, kid_subsets=20)
    assert shifted["kid_mean"] > 10 * kid.std() and shifted["kid_mean"] > 3 * shifted["kid_std"] > 0


def test_kid_is_the_published_kernels_distance():
    # Both sets constant: the kernel has three values, and no choice of subsets matters.
    real, generated = torch.tensor([[1.0, 0.0]]).expand(8, 2), torch.tensor([[1.0, 2.0]]).expand(8, 2)
    expected = (1 / 2 + 1) ** 3 + (5 / 2 + 1) ** 3 - 2 * (1 / 2 + 1) ** 3
    found = quality_from_features(real, generated, kid_subsets=3)
    assert found["kid_mean"] == pytest.approx(expected, rel=1e-12) and found["kid_std"] == pytest.approx(0, abs=1e-12)


def test_precision_and_recall_of_sets_with_known_answers():
    near, far = torch.randn(50, 4), torch.randn(50, 4) + 100
    assert precision_recall(near, near) == (1.0, 1.0)
    assert precision_recall(near, far) == (0.0, 0.0)
    # All samples in one of the data's two halves: each is good, and half of the data has none.
    assert precision_recall(torch.cat([near, far]), near) == (1.0, 0.5)
    assert precision_recall(near, torch.cat([near, far])) == (0.5, 1.0)
    # On a line, by hand: with k = 1 the balls of 0, 1, 3 reach 1, 1, 2, so that 5 is just inside and -1.5 is not.
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[5.0], [-1.5]])
    assert precision_recall(real, generated, neighbours=1) == (0.5, 1.0)
    # Equal points are neighbours of each other, at no distance.
    assert precision_recall(torch.zeros(5, 2), torch.cat([torch.zeros(4, 2), torch.ones(4, 2)])) == (0.5, 1.0)


def test_distances_in_pieces_are_the_same(monkeypatch):
    real, generated = torch.randn(70, 3), 1.5 * torch.randn(40, 3)
    whole = precision_recall(real, generated)
    monkeypatch.setattr(quality, "_DISTANCES", 100)
    assert precision_recall(real, generated) == whole and 0 < whole[0] < 1


def test_inception_score_is_one_for_the_undecided_and_the_number_of_classes_for_the_sure(monkeypatch):
    assert inception_score(torch.zeros(50, 10)) == (pytest.approx(1.0), None)
    sure = 100.0 * torch.eye(10).repeat(6, 1)
    assert inception_score(sure) == (pytest.approx(10.0), None)
    assert inception_score(sure[:1].expand(60, -1))[0] == pytest.approx(1.0)
    monkeypatch.setattr(quality, "_IMAGES_PER_SPLIT", 20)
    mean, deviation = inception_score(sure)
    assert 1 < mean < 10 and deviation > 0


def test_random_state_is_left_alone_and_results_repeat():
    real, generated = torch.randn(40, 4), torch.randn(40, 4)
    state = torch.get_rng_state()
    first, again = (quality_from_features(real, generated, kid_subsets=5) for _ in range(2))
    assert first == again and torch.equal(torch.get_rng_state(), state)
    assert quality_from_features(real, generated, kid_subsets=5, seed=1)["kid_mean"] != first["kid_mean"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(9), torch.zeros(9, 2)), r"real must be floats of shape \(N, F\), got torch.float32 \(9,\)"),
        ((torch.zeros(9, 3), torch.zeros(9, 2)), r"generated must be floats of shape \(N, 3\), got torch.float32 \(9, 2\)"),
        ((torch.zeros(9, 2).long(), torch.zeros(9, 2)), r"real must be floats of shape \(N, F\), got torch.int64"),
        ((torch.zeros(9, 2), torch.zeros(3, 2)), "generated must have more than 3 images, each with 3 neighbours, got 3"),
        ((torch.full((9, 2), torch.nan), torch.zeros(9, 2)), "real must be finite, got 18 NaN or infinite of 18 values"),
    ],
)
def test_features_that_cannot_be_compared(arguments, message):
    for measure in (precision_recall, quality_from_features):
        with pytest.raises(ValueError, match=message):
            measure(*arguments)


def test_other_bad_arguments():
    x, zeros = torch.randn(9, 2), torch.zeros(9, 1, 8, 8)
    for call, message in (
        (lambda: precision_recall(x, x, 0), "neighbours must be at least 1, got 0"),
        (lambda: quality_from_features(x, x[:3], neighbours=1), "at least 4 images of each kind, got 9 and 3"),
        (lambda: inception_score(x[0]), r"logits must be finite, of shape \(N, K\), got \(2,\)"),
        (lambda: evaluate_quality(zeros, DIGITS, MEANS, reference="all"), "reference must be one of train, test, got 'all'"),
        (lambda: evaluate_quality(zeros.expand(-1, 3, 8, 8), DIGITS, MEANS), r"must be \(1, 8, 8\) images .*, got \(3, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


DIGITS = load_data("digits")
MEANS = Features("means", lambda images: images.mean(3).flatten(1))


def test_digits_classifier_knows_held_out_digits_and_is_the_same_each_time():
    state = torch.get_rng_state()
    classifier, again = digits_classifier(), digits_classifier.__wrapped__()
    assert torch.equal(torch.get_rng_state(), state)
    images, labels = DIGITS.batch("test", slice(None))
    assert float((classifier.logits(classifier(images)).argmax(1) == labels).float().mean()) >= 0.97
    assert all(torch.equal(a, b) for a, b in zip(classifier.state_dict().values(), again.state_dict().values(), strict=True))
    train = classifier(DIGITS.batch("train", slice(None))[0])
    assert train.shape == (1437, 64) and float(train.square().mean()) == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(ValueError, match=r"'digits' are of \(1, 8, 8\) images, got \(3, 32, 32\)"):
        classifier(torch.zeros(1, 3, 32, 32))


def test_digits_are_told_from_noise_beside_real_ones():
    features = load_features("digits")
    images = DIGITS.batch("test", slice(None))[0]
    good, real = evaluate_quality(images[:200], DIGITS, features)
    assert (good["name"], good["images"], real["name"], real["images"]) == ("samples", 200, "real (test)", 200)
    assert good["fid"] < 0.5 and good["precision"] > 0.8 and good["recall"] > 0.7 and good["inception_score"] > 8
    assert real["fid"] < 0.5 and real["inception_score_std"] is None
    noise = evaluate_quality(torch.rand(100, 1, 8, 8) * 2 - 1, DIGITS, features)[0]
    assert noise["fid"] > 5 * good["fid"] and noise["kid_mean"] > good["kid_mean"] + 3 * good["kid_std"] and noise["recall"] < 0.2


def test_rows_have_equal_numbers_to_compare():
    samples = DIGITS.batch("train", slice(0, 500))[0]
    rows = evaluate_quality(samples, DIGITS, MEANS)
    assert [(row["name"], row["images"]) for row in rows] == [("samples", 500), ("real (test)", 360), ("first 360 samples", 360)]
    assert rows[0]["precision"] == 1.0 and "inception_score" not in rows[0]  # samples that are in the reference; no classifier
    rows = evaluate_quality(samples, DIGITS, MEANS, reference="test", batch=7)
    assert [(row["name"], row["images"]) for row in rows] == [("samples", 500), ("real (train)", 500)]


def test_real_images_are_taken_from_all_of_a_part_in_order_of_class():
    dark, bright = torch.zeros(50, 1, 2, 2, dtype=torch.uint8), torch.full((50, 1, 2, 2), 255, dtype=torch.uint8)
    data = ImageData("two", torch.cat([dark, bright]), torch.cat([dark, bright]))
    samples = data.batch("train", slice(40, 60))[0]  # ten of each
    good, real = evaluate_quality(samples, data, MEANS)
    assert real["recall"] == good["recall"] == 1.0 and real["fid"] == pytest.approx(good["fid"], rel=1e-6)


class Pooled(nn.Module):
    """An extractor with all that one can have."""

    def forward(self, images):
        return images.mean((2, 3))

    def logits(self, features):
        return features * torch.tensor([1.0, -1.0])


def rows_of(images):
    return images.flatten(1)


def test_extractors_by_dotted_name(tmp_path, monkeypatch):
    x = torch.rand(5, 1, 3, 3)
    for name in (f"{__name__}:Pooled", f"{__name__}.Pooled"):
        features = load_features(name)
        assert features.name == name and not features.extract.training and features.logits(torch.ones(2, 1)).shape == (2, 2)
        torch.testing.assert_close(features(x, 2), x.mean((2, 3)).double())
    assert load_features(f"{__name__}:rows_of")(x).dtype == torch.float64 and load_features(f"{__name__}:rows_of").logits is None
    (tmp_path / "own_features_of_a_user.py").write_text("def ones(x):\n    return x.new_ones(len(x), 3)\n")
    monkeypatch.chdir(tmp_path)
    assert load_features("own_features_of_a_user.ones")(x).tolist() == [[1.0] * 3] * 5
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "features must be digits, inception or package.module:attribute, got 'nothing'"),
        ("no_such_module.f", "features 'no_such_module.f' cannot be imported: No module named 'no_such_module'"),
        ("torch:no_such_thing", "features 'torch:no_such_thing' cannot be imported: .*no_such_thing"),
        ("torch:float32", "features 'torch:float32' must be callable, got dtype"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(ValueError, match=message):
        load_features(name)


@pytest.mark.parametrize(
    "extract, message",
    [
        (lambda x: x, r"must turn \(5, 1, 3, 3\) images into \(5, F\) floats, got torch.float32 \(5, 1, 3, 3\)"),
        (lambda x: x.flatten(1)[:2], r"into \(5, F\) floats, got torch.float32 \(2, 9\)"),
        (lambda x: x.flatten(1).long(), "floats, got torch.int64"),
        (lambda x: None, "floats, got NoneType"),
        (lambda x: x.flatten(1) / 0, "features 'f' must be finite, got 45 NaN or infinite values"),
    ],
)
def test_extractors_that_do_not_extract(extract, message):
    with pytest.raises(ValueError, match=message):
        Features("f", extract)(torch.ones(5, 1, 3, 3))


def test_inception_without_its_package_or_its_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match="'inception' need the package torch-fidelity .*'digits' and package.module:attribute do without"):
        load_features("inception")
    with pytest.raises(ValueError, match="Inception's weights go with the features 'inception', got 'digits'"):
        load_features("digits", inception_weights=tmp_path / "w.pth")
    stand_in(monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*w\.pth"):
        load_features("inception", inception_weights=tmp_path / "w.pth")


def stand_in(monkeypatch):
    """torch-fidelity's network without its weights: it takes what that takes, and keeps it."""

    class FeatureExtractorInceptionV3(nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None):
            super().__init__()
            assert (name, features_list) == ("inception-v3-compat", ["2048"])
            self.fc, self.weights = nn.Linear(3, 7), feature_extractor_weights_path

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            self.seen = x
            return (x.float().mean((2, 3)),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_gets_bytes_of_three_channels(monkeypatch, tmp_path):
    stand_in(monkeypatch)
    (tmp_path / "w.pth").write_bytes(b"")
    features = load_features("inception", inception_weights=tmp_path / "w.pth")
    found = features(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1))
    network = features.extract.network
    assert network.seen[:, :, 0, 0].tolist() == [[0] * 3, [128] * 3, [255] * 3] and network.weights == str(tmp_path / "w.pth")
    torch.testing.assert_close(features.logits(found.float()), found.float() @ network.fc.weight.T)
    assert features(torch.zeros(2, 3, 4, 4)).shape == (2, 3)


def test_samples_from_files(tmp_path):
    levels = torch.arange(128).remainder(17).view(2, 1, 8, 8).to(torch.uint8)
    expected = levels / 8 - 1.0
    np.savez(tmp_path / "samples.npz", images=levels.numpy())
    (tmp_path / "png").mkdir()
    for i, image in enumerate(levels):
        Image.fromarray((image[0].double() * 255 / 16).round().to(torch.uint8).numpy()).save(tmp_path / "png" / f"{i}.png")
    draw = lambda first, count: expected[first : first + count]  # noqa: E731
    for name, formats in (("a", ("npz", "grid")), ("b", ("png", "grid"))):
        write_samples(draw, tmp_path / name, count=2, formats=formats, levels=17, settings={})
    for path in (tmp_path / "samples.npz", tmp_path / "png", tmp_path / "a", tmp_path / "b"):
        torch.testing.assert_close(load_samples(path, DIGITS), expected, rtol=0, atol=0)
    np.save(tmp_path / "x.npy", np.zeros((2, 9, 9), np.uint8))
    with pytest.raises(ValueError, match=r"x.npy must hold \(1, 8, 8\) images like the data, got \(1, 9, 9\)"):
        load_samples(tmp_path / "x.npy", DIGITS)
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*nowhere"):
        load_samples(tmp_path / "nowhere", DIGITS)


def test_of_two_forms_the_one_with_more_samples_is_measured(tmp_path):
    from PIL import Image

    from ddpm_fast.evaluation.quality import load_samples

    (tmp_path / "images").mkdir()
    (tmp_path / "samples.json").write_text("{}")
    for i in range(3):
        Image.fromarray(np.full((8, 8), 17 * i, np.uint8)).save(tmp_path / "images" / f"{i:08}.png")
    assert len(load_samples(tmp_path, DIGITS)) == 3
    np.savez(tmp_path / "samples.npz", images=np.zeros((2, 1, 8, 8), np.uint8))
    assert len(load_samples(tmp_path, DIGITS)) == 3
    np.savez(tmp_path / "samples.npz", images=np.zeros((5, 1, 8, 8), np.uint8))
    assert len(load_samples(tmp_path, DIGITS)) == 5
    (tmp_path / "samples.npz").write_bytes((tmp_path / "samples.npz").read_bytes()[:-30])
    with pytest.raises(ValueError, match="cannot read .*samples.npz"):
        load_samples(tmp_path, DIGITS)
