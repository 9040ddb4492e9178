"""The Triton kernels in Triton's interpreter: every backend test of every op, and what autograd and torch.compile ask of ops.

The interpreter takes the place of the compiler for a whole process (TRITON_INTERPRET=1 before Triton is imported), so the
same test files run again in a process of their own, where CPU tensors go to the Triton kernels.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from interpreter import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed, so there is no interpreter")

TESTS = Path(__file__).resolve().parents[1]
# Files, which of their tests (all of them force or default to the Triton kernels there), and how many must have run at least.
RUNS = {
    "noise": (["ops/test_randn.py", "noise/test_noise.py"], "triton", 60),
    "q_sample and simple_loss": (["ops/test_q_sample.py", "ops/test_q_sample_grad.py", "ops/test_simple_loss.py"], "triton", 150),
    "p_step": (["ops/test_p_step.py"], "triton", 55),
    "gaussian_kl and vlb_terms": (["ops/test_gaussian_kl.py", "ops/test_vlb_terms.py"], "triton", 80),
    # The noise given as a tensor: to draw it is what takes the interpreter long, and the other files do.
    "autograd": (["ops/test_ops_gradients.py"], "(tensor or gaussian or vlb) and not float16", 80),
    "torch.library and torch.compile": (["ops/test_ops_compile.py"], "Noise or gaussian or vlb or not tensor", 60),
}


def run(what):
    files, chosen, _ = RUNS[what]
    # Without inductor, which is what is slow in them: it compiles what is around an op, the same whatever runs the op.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", "-k", chosen, "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", *options, *(str(TESTS / file) for file in files)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def runs(request):
    """Gives what each run came to. In a worker of the suite each is made when it is asked for, else all that were chosen, two at a time."""
    if hasattr(request.config, "workerinput"):
        yield run
        return
    with ThreadPoolExecutor(2) as pool:
        chosen = [item.callspec.params["what"] for item in request.session.items if item.originalname == "test_in_the_interpreter"]
        started = {what: pool.submit(run, what) for what in chosen}
        yield lambda what: started[what].result()


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.slow
@pytest.mark.parametrize("what", RUNS)
def test_in_the_interpreter(what, runs):
    done = runs(what)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= RUNS[what][2], done.stdout[-500:]
