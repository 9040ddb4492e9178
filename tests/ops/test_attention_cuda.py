"""csrc/cuda/attention*.cu, proved without a GPU: compiled PTX in the simulator, under the plans that the launchers use.

The simulator stops at races, at accesses out of bounds or misaligned and at reads of what was never written, the results too.
"""

import re
import shutil
import subprocess

import pytest
import torch
from attention_checks import CUTS, check, inputs
from attention_simulator import CUDA, Result, Sources, attention_formula, plan, ptx, simulate, with_gradient
from machine import SIMULATED_ARCHS, nvcc_missing
from numerics import assert_as_accurate, assert_bits_equal, assert_close_to_exact

from ddpm_fast.backends import missing, native

DTYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
# (samples, tokens, heads, channels)
SHAPES = [
    (2, 1, 1, 8),  # the smallest: the softmax of one logit
    (1, 17, 3, 8),  # a tail in a tile, and less channels than the smallest kernel has
    (2, 64, 1, 40),  # whole blocks, and channels that end in the middle of a row
    (1, 65, 2, 64),  # a second block with one token
    (1, 64, 2, 128),
    (1, 33, 1, 256),  # grad_k and grad_v in two launches
]
LONG = [  # many tiles; one dtype each, since they take long
    ((1, 256, 1, 64), torch.bfloat16),
    ((1, 256, 1, 32), torch.float32),
    ((1, 129, 1, 160), torch.float16),
    ((1, 256, 1, 256), torch.bfloat16),  # Ho et al. at 16x16: one head over all channels
]


@pytest.fixture(scope="module", params=SIMULATED_ARCHS)
def sources(request):
    return Sources(request.param)


def check_large(result, qkv, scale, grad_out):
    """check, where logits are in the hundreds: fp32's gradients are allowed what their rounding makes of P, as a relative error:
    half an ulp of logsumexp, which is kept in fp32, and as much on average for each time that a logit is cut off."""
    if qkv.dtype != torch.float32:
        return check(result, qkv, scale, grad_out)
    check(result, qkv, scale)
    _, logsumexp, grad = with_gradient(qkv.double(), scale, grad_out)
    for actual, exact in zip(result.grad_qkv.unbind(2), grad.unbind(2)):
        assert_close_to_exact(actual, exact, ulps=4, atol=float((1 + CUTS) * 2.0**-24 * logsumexp.abs().max() * exact.abs().max()))


def check_traffic(result, qkv, shape):
    samples, tokens, heads, channels = shape
    row_bytes = channels * qkv.element_size()
    slack = 1.1 if row_bytes % 32 == 0 else 1 + 32 / row_bytes  # a row that ends in a sector, of which the rest is q's, k's or v's
    data, row = qkv.nbytes // 3, 4 * samples * tokens * heads
    sector = 64 * samples * heads  # what the logsumexp of each head may share with its neighbours'
    for name, report in result.reports.items():
        assert report.shared_load.conflict_degree == report.shared_store.conflict_degree == 1.0, name
        if "delta" in name:
            reads, writes = 2 * data, row
        elif "backward" in name:
            reads, writes = 4 * data + 2 * row, data * (2 if name.endswith(" 3>") else 1)
        else:
            reads, writes = 3 * data, data + row
        assert report.global_load.unique_bytes <= slack * reads + sector, name
        assert report.global_store.unique_bytes <= slack * writes + sector, name
        assert set(report.global_load.bytes_by_width) | set(report.global_store.bytes_by_width) <= {4, 16}, name
        assert report.global_store.bytes_requested == writes, name  # each byte once
        assert report.global_store.bytes_by_width.get(4, 0) <= row, name
        assert report.global_load.bytes_by_width.get(4, 0) <= 8 * row * -(-tokens // 32), name  # logsumexp and delta alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_simulated(shape, dtype, sources):
    qkv, grad_out, scale = inputs(shape, dtype)
    result = simulate(sources, qkv, scale, grad_out)
    check(result, qkv, scale, grad_out)
    check_traffic(result, qkv, shape)


@pytest.mark.parametrize("shape, dtype", LONG, ids=str)
def test_simulated_with_many_tiles(shape, dtype):
    qkv, grad_out, scale = inputs(shape, dtype)
    result = simulate(Sources("sm_80"), qkv, scale, grad_out)
    check(result, qkv, scale, grad_out)
    check_traffic(result, qkv, shape)


def test_fp32_error_does_not_grow_with_the_number_of_keys():
    """512 of them: sums kept in a tensor core's accumulator err ten times as much as PyTorch's here, and more the more there are."""
    qkv, grad_out, scale = inputs((1, 512, 1, 64), torch.float32)
    result = simulate(Sources("sm_80"), qkv, scale, grad_out, first_block=True)
    exact_out, _, exact_grad = with_gradient(qkv.double(), scale, grad_out)
    out, _, grad = with_gradient(qkv, scale, grad_out)
    found = [result.out, *result.grad_qkv.unbind(2)]
    for name, x, plain, exact in zip(
        ("out", "grad_q", "grad_k", "grad_v"), found, (out, *grad.unbind(2)), (exact_out, *exact_grad.unbind(2))
    ):
        assert_as_accurate(x[:, :64], plain[:, :64], exact[:, :64], what=name)


@pytest.mark.parametrize("scale", [-0.5, 0.0], ids=str)
def test_any_scale(scale):
    qkv, grad_out, _ = inputs((1, 70, 1, 32), torch.float32)
    check(simulate(Sources("sm_80"), qkv, scale, grad_out), qkv, scale, grad_out)


def test_logsumexp_may_be_left_out():
    qkv, _, scale = inputs((1, 17, 1, 8), torch.bfloat16)
    whole, without = (simulate(Sources("sm_80"), qkv, scale, logsumexp=wanted) for wanted in (True, False))
    assert_bits_equal(without.out, whole.out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_do_not_overflow(dtype):
    """Logits of some thousands, each tile with a higher one than the tile before: e^x has long overflowed."""
    shape = (1, 130, 1, 32)
    qkv, grad_out, scale = inputs(shape, dtype, spread=1000.0)
    qkv[:, :, 1] = (qkv[:, :, 1].float() * torch.linspace(0.1, 1, 130)[None, :, None, None]).to(dtype)
    check_large(simulate(Sources("sm_80"), qkv, scale, grad_out), qkv, scale, grad_out)
    assert attention_formula(qkv.double(), scale)[1].max() > 1000


def far_from_zero(shape, dtype, sign):
    """Logits of about ±180: what does not exist has logit 0, far above or far below what does."""
    qkv, grad_out, scale = inputs(shape, dtype)
    channels = shape[-1]
    qkv[:, :, 0] = 8.0 + qkv[:, :, 0] / 8
    qkv[:, :, 1] = sign * (4.0 + qkv[:, :, 1] / 8) * (32 / channels) ** 0.5
    return qkv, grad_out, scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("shape", [(1, 17, 1, 32), (2, 65, 2, 64)], ids=str)
def test_tokens_that_do_not_exist(shape, sign, dtype):
    """Rows and columns of tiles past the last token: neither keys, nor queries, nor another head's or sample's tokens in their place."""
    qkv, grad_out, scale = far_from_zero(shape, dtype, sign)
    check_large(simulate(Sources("sm_80"), qkv, scale, grad_out), qkv, scale, grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_keys_far_below_zero(dtype):
    """q = 8 and k = -4 everywhere: P is 1/17 and grad_q is 0 but for rounding."""
    qkv, grad_out, scale = inputs((1, 17, 1, 32), dtype)
    qkv[:, :, 0], qkv[:, :, 1] = 8.0, -4.0
    result = simulate(Sources("sm_80"), qkv, scale, grad_out)
    check(result, qkv, scale)
    _, logsumexp, grad = with_gradient(qkv.double(), scale, grad_out)
    ulp = torch.finfo(dtype if dtype != torch.float32 else torch.float32).eps
    rounded = 17 * ulp + 2.0**-23 * float(logsumexp.abs().max())  # of dS, which is rounded to the dtype, and of P
    size = float((grad_out.double() @ qkv[:, :, 2].double().transpose(-1, -2)).abs().max())
    for i in range(2):
        assert_close_to_exact(result.grad_qkv[:, :, i], grad[:, :, i], ulps=1, atol=scale * 8 * size * rounded)
    assert_close_to_exact(result.grad_qkv[:, :, 2], grad[:, :, 2], ulps=2, atol=float(rounded * grad_out.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nonfinite_inputs_end_where_pytorchs_do(dtype):
    """A NaN in q takes its row, one in k or v every row of the head; a key of logit -inf drops out, the first tile's too."""
    shape = (1, 70, 1, 32)
    for place in range(3):
        qkv, _, scale = inputs(shape, dtype)
        qkv[0, 5, place, 0, 3] = torch.nan
        result, exact = simulate(Sources("sm_80"), qkv, scale), attention_formula(qkv.double(), scale)
        assert exact[0].isnan().any()
        assert torch.equal(result.out.isnan(), exact[0].isnan())
        assert torch.equal(result.logsumexp.isnan(), exact[1].isnan())
    for last in (1, 69):  # 69: all keys of the first tile
        qkv, _, scale = inputs(shape, dtype)
        qkv[:, :, 0, :, 0] = 1.0
        qkv[:, :last, 1, :, 0] = -torch.inf
        check(simulate(Sources("sm_80"), qkv, scale), qkv, scale)


@pytest.mark.parametrize("file", ["attention.cu", "attention_backward.cu"])
@pytest.mark.parametrize("arch", SIMULATED_ARCHS)
def test_ptx_is_deterministic_and_does_not_spill(arch, file, tmp_path):
    """No atomics anywhere; ptxas keeps all variants up to 128 channels in registers, two blocks of 128 threads an SM."""
    if nvcc_missing():
        pytest.skip(nvcc_missing())
    text = ptx(str(CUDA / file), arch)
    assert not re.search(r"^\s*(@%p\d+ )?(atom|red)\.", text, re.M)
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas is not on PATH")
    path = tmp_path / "attention.ptx"
    path.write_text(text)
    done = subprocess.run(
        ["ptxas", f"-arch={arch}", "-v", str(path), "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True, check=True
    )
    found = re.findall(
        r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores.*\n.*Used (\d+) registers", done.stderr
    )
    assert len(found) == len(re.findall(r"\.entry", text)) == {"attention.cu": 12, "attention_backward.cu": 30}[file]
    for name, stack, spills, registers in found:
        assert int(registers) <= 255
        if "Li256" not in name:
            assert (stack, spills) == ("0", "0"), name
        else:  # fp32 forward on sm_90: 16 bytes a thread
            assert int(spills) <= 16, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [8, 32, 40, 64, 72, 128, 136, 256])
def test_launch_plans(channels, dtype):
    """Kernels that exist, in grids that the hardware takes, with the shared memory that every GPU since sm_80 has."""
    padded = next(size for size in (32, 64, 128, 256) if channels <= size)
    name = DTYPES[dtype]
    for shape in ((1, 1, 1, channels), (128, 256, 1, channels), (65536, 64, 16, channels), (1, 2**20, 3, channels)):
        samples, tokens, heads, _ = shape
        forward, backward = plan(shape, dtype), plan(shape, dtype, backward=True)
        assert [one["kernel"] for one in forward["launches"]] == [f"attention_kernel<{name}, {padded}>"]
        assert [one["kernel"] for one in backward["launches"]] == [
            f"attention_delta_kernel<{name}>",
            *(f"attention_backward_keys_kernel<{name}, {padded}, {gradient}>" for gradient in ((2, 1) if padded == 256 else (3,))),
            f"attention_backward_queries_kernel<{name}, {padded}>",
        ]
        assert forward["workspace"] == 0 and backward["workspace"] == samples * tokens * heads
        for one in forward["launches"] + backward["launches"]:
            x, y, z = one["grid"]
            assert 0 < x < 2**31 and y == z == 1
            assert one["block"] in (64, 128, 256) and one["shared_bytes"] <= 99 * 1024


def test_launchers_refuse_what_they_cannot_run():
    """Before anything asks for a device, so that it is seen here too; an empty input returns at once."""
    if native is None or not hasattr(native, "cuda_attention"):
        pytest.skip("ddpm_fast._C was built without CUDA")
    memory = torch.zeros(1024)
    aligned, misaligned = memory[:512], memory[1:513]
    results = dict(out=aligned, logsumexp=aligned)
    gradients = dict(grad_out=aligned, grad_qkv=aligned, workspace=aligned)
    where = dict(scale=1.0, device=0, stream=0)
    for samples, tokens, heads, channels, qkv, message in (
        (1, 1, 1, 12, aligned, "multiple of 8"), (1, 1, 1, 264, aligned, "at most 256"), (1, 1, 1, 8, misaligned, "multiple of 16 bytes"),
        (2**31, 1, 1, 8, aligned, "too many rows"),
    ):  # fmt: skip
        sizes = dict(samples=samples, tokens=tokens, heads=heads, head_channels=channels)
        with pytest.raises(RuntimeError, match=f"{samples} samples of {tokens} tokens, {heads} heads of {channels} channels: .*{message}"):
            native.cuda_attention(**sizes, qkv=qkv, **results, **where)
        with pytest.raises(RuntimeError, match=f"^attention_backward: .*{message}"):
            native.cuda_attention_backward(**sizes, qkv=qkv, **results, **gradients, **where)
    native.cuda_attention(samples=0, tokens=5, heads=1, head_channels=8, qkv=memory[:0], **results, **where)
    native.cuda_attention_backward(samples=5, tokens=0, heads=1, head_channels=8, qkv=memory[:0], **results, **gradients, **where)


def on_device(qkv, scale, grad_out):
    samples, tokens, _, heads, channels = qkv.shape
    shape = (samples, tokens, heads, channels)
    common = dict(
        samples=samples,
        tokens=tokens,
        heads=heads,
        head_channels=channels,
        scale=scale,
        qkv=qkv,
        device=0,
        stream=torch.cuda.current_stream().cuda_stream,
    )
    out, grad_qkv = torch.full_like(grad_out, torch.nan), torch.full_like(qkv, torch.nan)
    logsumexp = torch.full((samples, heads, tokens), torch.nan, device="cuda")
    workspace = torch.empty(plan(shape, qkv.dtype, backward=True)["workspace"], device="cuda")
    native.cuda_attention(**common, out=out, logsumexp=logsumexp)
    native.cuda_attention_backward(**common, out=out, logsumexp=logsumexp, grad_out=grad_out, grad_qkv=grad_qkv, workspace=workspace)
    return out, logsumexp, grad_qkv


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 256, 1, 256), (2, 1000, 4, 64)], ids=str)
def test_on_the_device(shape, dtype):
    if missing("cuda"):
        pytest.skip(f"backend cuda: {missing('cuda')}")
    qkv, grad_out, scale = inputs(shape, dtype)
    out, logsumexp, grad_qkv = on_device(qkv.cuda(), scale, grad_out.cuda())
    again = on_device(qkv.cuda(), scale, grad_out.cuda())
    for one, two in zip((out, logsumexp, grad_qkv), again):
        assert_bits_equal(two.cpu(), one.cpu())
    check(Result(out.cpu(), logsumexp.cpu(), grad_qkv.cpu(), {}), qkv, scale, grad_out)


def test_device_launch_is_captured_in_a_graph():
    if missing("cuda"):
        pytest.skip(f"backend cuda: {missing('cuda')}")
    qkv, grad_out, scale = inputs((1, 65, 1, 128), torch.bfloat16)
    qkv, grad_out = qkv.cuda(), grad_out.cuda()
    expected = on_device(qkv, scale, grad_out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = on_device(qkv, scale, grad_out)
    graph.replay()
    torch.cuda.synchronize()
    for one, two in zip(captured, expected):
        assert_bits_equal(one.cpu(), two.cpu())
