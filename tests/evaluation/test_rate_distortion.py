"""The progressive code: its curve by hand, for an estimate, and the files that hold it and the bound."""

import csv
import json
import math

import pytest
import torch
from PIL import Image

import ddpm_fast as df
from ddpm_fast.evaluation import Bound, evaluate_bound, rate_distortion, write_bound
from ddpm_fast.io.files import write_csv, write_json

# Two images, three steps: easy numbers.
FULL = Bound(
    prior=torch.tensor([0.1, 0.3], dtype=torch.float64),
    terms=torch.tensor([[4.0, 2.0, 1.0], [8.0, 2.0, 3.0]], dtype=torch.float64),
    mse=torch.tensor([[0.0, 0.25, 1.0], [0.02, 0.25, 3.0]], dtype=torch.float64),
    first=torch.arange(3),
    counts=torch.ones(3, dtype=torch.int64),
)


def test_curve_by_hand():
    curve = rate_distortion(FULL)
    assert curve.t.tolist() == [2, 1, 0]
    # Having x_2 costs the prior alone; L_2 then buys x_1, and L_1 buys x_0, whose guess has the error of t = 0.
    assert curve.rate.tolist() == pytest.approx([0.2, 2.2, 4.2])
    assert curve.distortion.tolist() == pytest.approx([127.5 * math.sqrt(2.0), 127.5 * 0.5, 127.5 * 0.1])
    # Of two values a and b the standard error is |a - b| / 2; that of a root is by the chain rule.
    assert curve.rate_standard_error.tolist() == pytest.approx([0.1, 1.1, 1.1])
    assert curve.distortion_standard_error.tolist() == pytest.approx([127.5 * 1.0 / (2 * math.sqrt(2.0)), 0.0, 127.5 * 0.01 / 0.2])
    # What is left is the decoder's: the code without loss.
    assert float(curve.rate[-1]) + FULL.decoder == pytest.approx(FULL.total)


def test_perfect_guess_has_no_distortion():
    curve = rate_distortion(Bound(FULL.prior, FULL.terms, torch.zeros(2, 3, dtype=torch.float64), FULL.first, FULL.counts))
    assert curve.distortion.tolist() == curve.distortion_standard_error.tolist() == [0, 0, 0]


def test_curve_of_an_estimate_is_at_the_ends_of_its_intervals():
    # t = 0; 1; 2..3; 4..8. The error is linear in t, so that its interpolation between the middles is exact.
    first, counts = torch.tensor([0, 1, 2, 4]), torch.tensor([1, 1, 2, 5])
    mse = (0.01 * (first + (counts - 1) / 2)).double()
    bound = Bound(torch.full((3,), 0.5).double(), torch.tensor([7.0, 3.0, 2.0, 1.0]).double().expand(3, 4), mse.expand(3, 4), first, counts)
    curve = rate_distortion(bound)
    assert curve.t.tolist() == [8, 3, 1, 0]
    assert curve.rate.tolist() == pytest.approx([0.5, 0.5 + 5, 0.5 + 5 + 4, 0.5 + 5 + 4 + 3])
    assert curve.distortion.tolist() == pytest.approx([127.5 * math.sqrt(e) for e in (0.06, 0.03, 0.01, 0.0)])


def test_estimated_curve_agrees_with_the_full_one():
    diffusion = df.GaussianDiffusion(df.NoiseSchedule.linear(30, 1e-3, 0.3), levels=17)
    x = (torch.randint(0, 17, (1, 1, 4, 4)) / 8 - 1.0).expand(500, -1, -1, -1).contiguous()
    full, estimate = (rate_distortion(evaluate_bound(lambda x, t: 0.3 * x, diffusion, x, terms_per_image=terms)) for terms in (None, 8))
    at = 29 - estimate.t  # where the full curve has these t
    error = 4 * torch.hypot(full.rate_standard_error[at], estimate.rate_standard_error)
    assert ((full.rate[at] - estimate.rate).abs() <= error + 1e-12).all()
    # Beyond the last middle it is only held.
    assert ((full.distortion[at] - estimate.distortion).abs() < 0.1 * full.distortion[at])[1:].all()
    assert (full.rate.diff() >= 0).all()  # bits are never given back


def test_files_say_what_was_measured(tmp_path):
    paths = write_bound(tmp_path / "new", FULL, about=dict(data="digits"), title="held-out digits")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {path.name for path in paths.values()}
    with paths["table"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["first_t"]) for row in rows] == [0, 1, 2] and {row["count_t"] for row in rows} == {"1"}
    for name, values in (
        ("mean_term", [6.0, 2.0, 2.0]), ("term_standard_error", [2.0, 0.0, 1.0]),
        ("mean_mse", [0.01, 0.25, 2.0]), ("mse_standard_error", [0.01, 0.0, 1.0]),
    ):  # fmt: skip
        assert [float(row[name]) for row in rows] == pytest.approx(values)
    summary = json.loads(paths["summary"].read_text())
    assert summary["data"] == "digits" and summary["rmse"] == pytest.approx(12.75)
    assert summary["mean_term"] == [float(row["mean_term"]) for row in rows]  # every digit is kept
    assert summary["bits_per_dim"] == FULL.total and summary["standard_error"] == FULL.standard_error
    with paths["rate/distortion"].open(newline="") as file:
        curve = list(csv.DictReader(file))
    assert [(int(row["t"]), float(row["rate"])) for row in curve] == list(zip([2, 1, 0], rate_distortion(FULL).rate.tolist()))
    for name in ("picture", "its picture"):
        with Image.open(paths[name]) as image:
            assert min(image.size) > 300


def test_one_image_has_no_standard_error_in_any_file(tmp_path):
    one = Bound(FULL.prior[:1], FULL.terms[:1], FULL.mse[:1], FULL.first, FULL.counts)
    paths = write_bound(tmp_path, one)
    assert json.loads(paths["summary"].read_text(), parse_constant=pytest.fail)["standard_error"] is None
    assert paths["table"].read_text().splitlines()[1] == "0,1,4.0,,0.0,"


def test_tables_and_json_hold_numbers_only(tmp_path):
    write_csv(tmp_path / "a.csv", dict(t=[1, 2], name=["a,b", 'c"'], x=[math.nan, 0.1]))
    assert (tmp_path / "a.csv").read_bytes() == b't,name,x\n1,"a,b",\n2,"c""",0.1\n'
    with pytest.raises(ValueError):
        write_csv(tmp_path / "b.csv", dict(t=[1], x=[]))
    write_json(tmp_path / "a.json", dict(x=[math.inf, (1, {"y": math.nan})]))
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, [1, {"y": None}]]}
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "a.json"}
