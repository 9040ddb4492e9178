"""Inputs of the ops, as their own tests and op_cases.py take them: by seed, with both ends of t."""

import torch

from ddpm_fast.ops._p_step import COLUMNS

# Timesteps of the tables that belong to the inputs.
Q_SAMPLE_STEPS, SIMPLE_LOSS_STEPS, P_STEP_STEPS, VLB_TERMS_STEPS = 1000, 7, 12, 30

Q_SAMPLE_SHAPES = [
    (1, 1),  # the smallest
    (2,),  # no dimension but the batch
    (2, 3),  # less than a counter block
    (3, 1023),  # one short of the kernel's run of 1024 elements
    (2, 1024),  # just a run
    (4, 4099),  # a prime of several runs, rows that are not aligned
    (5, 3, 32, 32),  # a small batch of images
]


def q_sample_tables(dtype=torch.float32):
    """√ᾱ and √(1-ᾱ) of Ho's linear schedule, rounded last."""
    alphas_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, Q_SAMPLE_STEPS, dtype=torch.float64), 0)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return alphas_bar.sqrt().to(kind), (1 - alphas_bar).sqrt().to(kind)


def q_sample_timesteps(count):
    """t = 0 and T-1 are always there, as far as there is room."""
    t = torch.randint(Q_SAMPLE_STEPS, (count,))
    t[0], t[-1] = 0, Q_SAMPLE_STEPS - 1
    return t


def q_sample_inputs(shape, dtype, device="cpu"):
    """[x_start, t, signal, sigma]; x_start and t of torch's global generator."""
    x = (torch.rand(shape, dtype=torch.float64) * 2 - 1).to(dtype)
    return [value.to(device) for value in (x, q_sample_timesteps(shape[0]), *q_sample_tables(dtype))]


def exact_q_sample(x, t, signal, sigma, epsilon):
    """The formula in float64 from the values that the kernel is given."""
    broad = (-1, *[1] * (x.ndim - 1))
    return signal.double()[t].view(broad) * x.double() + sigma.double()[t].view(broad) * epsilon.double()


def simple_loss_inputs(shape, dtype=torch.float32, device="cpu", doubled=False, seed=0):
    """(out, x_start, t with both ends, tables, noise tensor)."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1] * (2 if doubled else 1)
    out = torch.randn(shape[0], channels, *shape[2:], generator=generator)
    x_start = torch.rand(shape, generator=generator) * 2 - 1
    noise = torch.randn(shape, generator=generator)
    t = torch.arange(shape[0]) * (SIMPLE_LOSS_STEPS - 1) // max(shape[0] - 1, 1)
    tables = [torch.rand(SIMPLE_LOSS_STEPS, generator=generator) + 0.5 for _ in range(3)]
    return (out.to(device, dtype), x_start.to(device, dtype), t.to(device), [table.to(device) for table in tables], noise.to(device, dtype))


def p_step_inputs(shape, dtype=torch.float32, device="cpu", kind="fixed", seed=0):
    """(x_t, out, t with both ends, random table whose row 0 takes no noise, noise tensor)."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1] * (1 if kind == "fixed" else 2)
    x_t, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    out = torch.randn(shape[0], channels, *shape[2:], generator=generator)
    t = torch.arange(shape[0]) * (P_STEP_STEPS - 1) // max(shape[0] - 1, 1)
    table = torch.randn(P_STEP_STEPS, len(COLUMNS), generator=generator)
    table[:, COLUMNS.index("noise")] = 1.0
    table[0, COLUMNS.index("noise")] = 0.0
    return x_t.to(device, dtype), out.to(device, dtype), t.to(device), table.to(device), noise.to(device, dtype)


def gaussian_kl_inputs(shape, dtype=torch.float64, device="cpu", seed=0):
    """(mean1, logvar1, mean2, logvar2)."""
    generator = torch.Generator().manual_seed(seed)
    mean1, logvar1, mean2, logvar2 = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    return tuple(x.to(dtype).to(device) for x in (mean1, 2 * logvar1 - 2, mean2, 2 * logvar2 - 2))


def vlb_terms_inputs(shape, diffusion, dtype=torch.float64, device="cpu", seed=0, t=None):
    """(out, x_start on the grid with pixels at both ends, x_t, t with both ends)."""
    generator = torch.Generator().manual_seed(seed)
    top = diffusion.levels - 1
    pixels = torch.randint(-top // 8, top + top // 8 + 1, shape, generator=generator).clamp(0, top)
    x_start = pixels.double() / top * 2 - 1
    t = torch.arange(shape[0]) * (len(diffusion) - 1) // max(shape[0] - 1, 1) if t is None else torch.as_tensor(t)
    noise, error = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x_t = diffusion.q_sample(x_start, t, noise)
    out = diffusion.target(x_start, t, noise) + 0.1 * error
    if diffusion.learns_variance:
        centre = -3.0 if diffusion.variance == "learned" else 0.0
        out = torch.cat([out, centre + torch.randn(shape, generator=generator, dtype=torch.float64)], 1)
    return out.to(device, dtype), x_start.to(device, dtype), x_t.to(device, dtype), t.to(device)
