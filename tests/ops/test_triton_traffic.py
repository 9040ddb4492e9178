"""What the compiled Triton kernels move and need: bytes, sectors, width of accesses, registers. traffic.py counts."""

import pytest
import torch
from interpreter import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be compiled")
if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)

from traffic import CALLS, SHAPE, measure, resources

from ddpm_fast.ops.triton import _launch

NAMES = ["randn", *CALLS]


def vector_bytes(launch):
    """Bytes that threads access 16 at a time."""
    return sum(traffic.bytes_by_width.get(16, 0) for traffic in (launch.report.global_load, launch.report.global_store))


@pytest.mark.parametrize(
    "dtype, arch",
    [(torch.float32, 80), (torch.bfloat16, 80), (torch.float16, 90)],
    ids=["float32 sm_80", "bfloat16 sm_80", "float16 sm_90"],
)
@pytest.mark.parametrize("name", NAMES)
def test_traffic_is_what_it_must_be(name, dtype, arch):
    for row in measure(name, dtype, arch):
        assert row.unique <= 1.02 * row.needed, row.name
        assert row.unique >= 0.98 * row.needed, f"{row.name}: less than it needs, so what it needs is counted wrong"
        sectors, ideal = row.sectors
        assert sectors <= 1.05 * ideal, row.name
        assert sum(map(vector_bytes, row.launches)) == row.needed, f"{row.name}: all data in accesses of 16 bytes a thread"
        # Beside the first launch there is at most the one that adds up a few sums.
        assert len(row.launches) <= (2 if name.startswith(("simple_loss", "vlb_terms", "gaussian_kl, mean")) else 1), row.name
        for launch in row.launches:
            assert launch.report.local_requests == 0
            needed = resources(launch)
            assert needed["STACK"] == needed["LOCAL"] == 0, f"{row.name}: {needed}"
            # Three blocks of 128 threads, each with 48 to 128 bytes on the way, keep the memory of an SM busy: with 11 KiB, for
            # 2 TB/s and 600 ns on 108 SMs.
            assert needed["REG"] <= 65536 // (3 * 128), f"{row.name}: {needed}"


@pytest.mark.parametrize("shape", [(4, 3, 31, 33), (300, 1, 5, 7), (2, 1, 1, 1)], ids=str)
def test_what_is_not_aligned_still_moves_each_byte_once(shape, monkeypatch):
    """No sector goes twice through memory. That accesses are narrower there, and their sectors shared, is the rows' doing."""
    monkeypatch.setattr("traffic.SHAPE", shape)
    elements = torch.Size(shape).numel()
    for name in ("q_sample", "p_step, fixed", "gaussian_kl"):
        for row in measure(name, torch.float32, 80):
            needed = row.needed * elements // torch.Size(SHAPE).numel()
            arrays = sum(len(launch.reads) + len(launch.writes) for launch in row.launches)
            # Where an array or a row of a table ends in the middle of a sector, the rest of it comes along.
            assert row.unique <= needed + 32 * arrays + 64 * (shape[0] + 1), row.name


def test_narrow_accesses_are_noticed(monkeypatch):
    monkeypatch.setattr(_launch.math, "gcd", lambda *sizes: 1)
    (row,) = measure("randn", torch.float32, 80)
    assert sum(map(vector_bytes, row.launches)) == 0
    assert {"st.global.b32"} <= set(row.launches[0].report.opcodes)


def test_spills_are_noticed(monkeypatch):
    """ptxas is held to fewer registers than the kernel needs."""
    monkeypatch.setitem(_launch.OPTIONS, "maxnreg", 24)
    row, _ = measure("p_step, learned range, multistep, guided", torch.float32, 80)
    assert resources(row.launches[0])["STACK"] > 0
