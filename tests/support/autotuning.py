"""What the tests of the autotuner share: candidates, and timings given by name in place of the clock."""
import torch

from ddpm_fast.autotune import Autotuner

CPU = torch.device("cpu")
KEY = ((2, 256, 64), torch.float32, False)


class Times:
    """A stand-in for `measure`: the seconds of each name, and which names were asked for, call by call."""

    def __init__(self, **seconds):
        self.seconds = seconds
        self.asked = []

    def __call__(self, candidates, device):
        self.asked.append(list(candidates))
        return {name: self.seconds[name] for name in candidates}


def gives(value, shape=(4,), dtype=torch.float32):
    return lambda: torch.full(shape, float(value)).to(dtype)


def raises(error):
    def function():
        raise error

    return function


EQUAL = {"ours": gives(1), "torch": gives(1)}


def tuner(path, **seconds):
    return Autotuner(path, Times(**seconds))


def choose(made, candidates=EQUAL, default="ours", op="attention", key=KEY, device=CPU, **options):
    return made.choose(op, key, candidates, default, device=device, **options)
