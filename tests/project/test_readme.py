"""The README's Python is a program that runs, and does what its comments say."""

import re
from pathlib import Path

import pytest
import torch
from numerics import assert_bits_equal

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.slow
def test_the_python_block_does_what_it_says():
    (block,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    names = {}
    exec(compile(block, README.name, "exec"), names)
    assert names["step"] == 9 and names["loss"].isfinite()
    assert names["bound"].shape == (16,) and (names["bound"] > 0).all()
    for name, shape in {"images": (4, 3, 32, 32), "halves": (4, 3, 32, 32), "between": (3, 2, 3, 32, 32)}.items():
        assert names[name].shape == shape and names[name].isfinite().all(), name
    left = names["left"]
    assert_bits_equal(names["halves"][..., left], names["x_start"][:4][..., left])
    assert not torch.equal(names["halves"][..., ~left], names["x_start"][:4][..., ~left])
