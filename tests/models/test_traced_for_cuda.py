"""What torch.compile sees on a GPU, without one: tensors that only say that they are there, and a tracer that allows no graph break."""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule, UNet, attention, group_norm
from ddpm_fast.ops import _attention

pytestmark = pytest.mark.skipif(not torch.version.cuda, reason="this PyTorch was built without CUDA")
DIFFUSION = GaussianDiffusion(NoiseSchedule.linear(50), variance="learned_range")


class Called(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *inputs):
        return self.call(*inputs)


def operators(make, call=None):
    """Names of the operators in the one graph of a call; ``make`` gives the call, or a module, and its inputs, on the GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        call, *inputs = make()
        module = call if isinstance(call, torch.nn.Module) else Called(call)
        graph = torch.export.export(module, tuple(inputs), strict=True).graph_module
    nodes = [node for part in graph.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes]
    return {str(node.target).removesuffix(".default") for node in nodes if node.op == "call_function"}


@pytest.mark.parametrize(
    ("dtype", "kernels", "ours"),
    [(torch.float32, "", True), (torch.bfloat16, "", False), (torch.float32, "were not built", False)],
)
def test_attention_is_chosen_without_a_graph_break(dtype, kernels, ours):
    with (
        mock.patch.object(_attention, "missing", lambda *_: kernels),
        mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
    ):
        found = operators(lambda: (attention, torch.empty(2, 16, 3, 1, 64, dtype=dtype)))
    assert ("ddpm_fast.attention" in found) is ours


def test_group_norm_is_one_operator():
    found = operators(lambda: (lambda x, w: group_norm(x, 2, w, w, activation="silu"), torch.empty(2, 8, 4, 4), torch.empty(8)))
    assert found == {"ddpm_fast.group_norm", "<built-in function getitem>"}


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 by autocast"])
@pytest.mark.parametrize("training", [False, True])
def test_a_unet_is_one_graph(training, autocast):
    model = UNet.from_preset("digits", attention_resolutions=(4,), num_classes=3, learned_variance=True).train(training)

    def make():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                module.register_parameter(name, torch.nn.Parameter(torch.empty(p.shape).as_strided(p.shape, p.stride())))
        dropout = Noise(1) if training else None

        def call(x, t, labels):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                return model(x, t, labels, dropout=dropout)

        return call, torch.empty(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)

    found = operators(make)
    assert "ddpm_fast.group_norm" in found


def test_noising_loss_and_step_are_operators():
    def make():
        def call(x, out, t):
            noise = Noise(3, 4)
            x_t = DIFFUSION.q_sample(x, t, noise)
            return DIFFUSION.loss(out, x, x_t, t, noise, kind="hybrid"), DIFFUSION.p_step(x_t, out, t, noise)

        return call, torch.empty(2, 1, 8, 8), torch.empty(2, 2, 8, 8), torch.zeros(2, dtype=torch.int64)

    assert {f"ddpm_fast.{op}" for op in ("q_sample", "simple_loss", "vlb_terms", "p_step")} <= operators(make)
