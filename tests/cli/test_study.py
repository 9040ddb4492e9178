"""examples/learned_variance.py at a size at which figures mean nothing: what it measures, that it goes on where it was, what it writes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_fast
from ddpm_fast import GaussianDiffusion, NoiseSchedule
from ddpm_fast.evaluation import evaluate_bound
from ddpm_fast.training import Trainer, load_data

SCRIPT = Path(ddpm_fast.__file__).resolve().parents[1] / "examples" / "learned_variance.py"
sys.path.insert(0, str(SCRIPT.parent))
from learned_variance import VARIANTS, run_study, shortened, table  # noqa: E402

OPTIONS = dict(train_steps=2, count=8, lengths=(30, 4), terms=4, quiet=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, run_study(out, **OPTIONS)


@pytest.mark.slow
def test_every_figure_is_there(study):
    out, result = study
    assert [(row["variant"], row["steps"]) for row in result.bounds] == [(v, n) for v in VARIANTS for n in (30, 4)]
    kinds = [(row["variant"], row["sampler"], row["steps"]) for row in result.quality]
    assert kinds == [("real", None, None)] + [(v, s, n) for v in VARIANTS for s in ("ddpm", "ddim", "dpmpp_2m") for n in (30, 4)]
    with (out / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13 and float(rows[1]["kid_mean"]) == result.quality[1]["kid_mean"]
    assert json.loads((out / "study.json").read_text())["bounds"] == result.bounds
    heading, *lines = table(result.bounds, result.quality)
    assert len(heading) == 9 and [line[0] for line in lines] == ["30", "4"]
    assert all(path.stat().st_size > 100 for path in result.paths.values())


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(study, monkeypatch):
    out, result = study
    monkeypatch.setattr(Trainer, "train_step", None)
    again = run_study(out, **OPTIONS)
    assert again.bounds == result.bounds and again.quality == result.quality


def test_another_study_in_its_folder_is_refused(study):
    with pytest.raises(ValueError, match="holds a run of other settings; choose another folder with --out"):
        run_study(study[0], **{**OPTIONS, "train_steps": 3})


def test_the_bound_of_a_shortened_chain_asks_the_model_its_own_times():
    diffusion = GaussianDiffusion(NoiseSchedule.linear(100), "epsilon", "fixed_small", 17)
    short, told = shortened(diffusion, 5), set()

    def model(x, t):
        told.update(t.tolist())
        return 0.5 * x

    x = load_data("digits").batch("test", slice(0, 3))[0]
    bound = evaluate_bound(model, short, x)
    assert told == {0, 25, 50, 74, 99} and bound.terms.shape == (3, 5)
    # The last noise level is the chain's, and so is what it has left of the data.
    assert float(bound.prior.mean()) == pytest.approx(float(diffusion.prior_bpd(x).mean()), rel=1e-5)


@pytest.mark.slow
def test_as_a_user_runs_it(study):
    """The script itself: what it refuses is one line that names the option."""
    out, _ = study
    for options, message in (
        (["--count", "7"], "--count must be at least 8, got 7"),
        (["--out", str(out)], "holds a run of other settings; choose another folder with --out"),
    ):
        result = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
