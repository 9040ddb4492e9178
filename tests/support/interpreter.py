"""Triton's interpreter as a layer of the suite: ``TRITON_INTERPRET=1 pytest`` runs the kernels on CPU tensors, without compiling them."""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def round_to_bfloat16() -> None:
    """Mends the interpreter: its conversion of fp32 to bf16 cuts off what compiled code rounds to nearest even."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_and_round(x, from_dtype, to_dtype, rounding):
        if from_dtype == tl.float32 and to_dtype == tl.bfloat16:
            return torch.from_numpy(np.array(x)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return convert(x, from_dtype, to_dtype, rounding)

    interpreter._convert_float = convert_and_round
