"""csrc/cuda/randn.cu in the simulator, under the plan that the launcher uses."""
import numpy as np
import pytest
import torch
from ptxsim import Device

from ddpm_fast import Noise
from ddpm_fast.backends import native, native_missing
from ddpm_fast.noise.philox import noise_reference

DTYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
KEY = Noise(seed=2**63 + 5, stream=2**31 + 1, first_sample=2**32 - 2)


def plan(samples, elements):
    if native is None or not hasattr(native, "cuda_randn_plan"):
        pytest.skip(f"the launch plan is not there: {native_missing or 'ddpm_fast._C was built without CUDA'}")
    return native.cuda_randn_plan(samples, elements)


def simulate(module, shape, key, dtype=torch.float32, **changes):
    """The kernel's output as a tensor, and the simulator's report."""
    launch = plan(*shape) | changes
    out = Device().empty(shape, np.float32 if dtype == torch.float32 else np.uint16)
    arguments = [out, *shape, key.seed, key.stream, key.first_sample]
    report = module.launch(f"randn_kernel<{DTYPES[dtype]}>", launch["grid"], launch["block"], arguments)
    values = out.numpy()
    return torch.from_numpy(values if dtype == torch.float32 else values.view(np.int16)).view(dtype), report


def expected(shape, key, dtype=torch.float32):
    return noise_reference(shape, key.seed, key.stream, key.first_sample, torch.device("cpu")).to(dtype)
