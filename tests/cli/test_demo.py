"""The demo, as a user runs it, against its promises."""

import json

import pytest
from PIL import Image

from ddpm_fast.cli.demo import run_demo

FILES = {
    "samples.png", "forward.png", "reverse.gif", "bound.png",
    "results.json", "metrics.jsonl", "checkpoint.json", "checkpoint.safetensors",
}  # fmt: skip


@pytest.mark.slow
def test_demo_keeps_its_promises(tmp_path):
    result = run_demo(tmp_path, quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == FILES
    for name in ("samples.png", "forward.png", "reverse.gif", "bound.png"):
        with Image.open(tmp_path / name) as image:
            image.load()
            assert min(image.size) > 200
    assert json.loads((tmp_path / "results.json").read_text())["bits_per_dim"] == result.bound.total
    assert result.bound.total + 2 * result.bound.standard_error <= 3.1
    assert sum(result.classes) == 100 and min(result.classes) >= 1
    # Below 1 by far would mean copies of the training set.
    assert 0.75 <= result.neighbour_ratio <= 1.25


def test_demo_does_not_replace_another_run(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"someone's")
    with pytest.raises(ValueError, match="holds another run"):
        run_demo(tmp_path, quiet=True)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == b"someone's"
