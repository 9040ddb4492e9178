"""Every argument of the public functions of schedules, diffusion, sampling and the bound, of the wrong type: one line that names it."""

import numpy as np
import pytest
import torch

from ddpm_fast import GaussianDiffusion, Noise, NoiseSchedule, Sampler, sample
from ddpm_fast.diffusion.samplers import make_table, spaced_timesteps
from ddpm_fast.evaluation import evaluate_bound, rate_distortion

SCHEDULE = NoiseSchedule.linear(6, 1e-3, 0.5)
DIFFUSION = GaussianDiffusion(SCHEDULE)
X = torch.zeros(2, 1, 4)
T = torch.tensor([0, 3])
OUT = dict(model_output=X, x_t=X, t=T)


def model(x, t, labels=None):
    return 0.5 * x


model.num_classes = 3
SAMPLER = Sampler(model, DIFFUSION)

# What each kind of argument may not be. A text is a sequence and an array has operators: both get far where nothing looks.
TENSOR = (None, 3, "x", [0.5], np.zeros((2, 1, 4), np.float32), X.int(), X.to(torch.complex64), torch.zeros(()))
LIKE = (*TENSOR, X[:1], X.double())
OUTPUT = (*TENSOR[:-2], (X, X), torch.zeros(2, 3, 4), X[:1])
ALONE = T[:1]  # of a batch of one
TIME = (None, 3, 1.0, "x", [0, 3], T.float(), T.int(), ALONE, T.bool(), torch.tensor([0, 6]), torch.tensor([0, -1]), T.view(2, 1))
NOISE = (None, 0, "x", [0.5], X[:1], X.int())
MANY = np.full((40, 40), 0.5)  # whose text has lines
INTEGER = (MANY, "9" * 10**5, "3", 1.5, True, [1], 1j, np.float64(2.0), np.bool_(True), torch.tensor(1.0), torch.tensor(True), -1)
SEED = INTEGER[:-3] + INTEGER[-1:]  # of Noise, which has its own tests
NUMBER = (MANY, "1" * 10**5, "1", True, [1.0, 2.0], 1j, float("nan"), torch.ones(2), np.bool_(True))
FLAG = (MANY, torch.from_numpy(MANY), "x", 1, None, 0.0, [True], torch.tensor(True))
CHOICE = (MANY, "n" * 10**5, None, 3, "nope", ["linear"], {})
FUNCTION = (None, 3, "x", X)
BETAS = (
    MANY, None, 3, 0.1, "x", ["x"], [1j], [True], [[0.1]], [0.1, 2.0], [0.1, None],
    torch.tensor([0.1j]), torch.tensor([1, 0]), torch.zeros(0),
)  # fmt: skip
TIMESTEPS = (MANY, 3, "x", [0.5], ["x"], [True], [[1]], [3, 1], [0, 6], [-1, 2], np.array([0.0, 1.0]), [None], {})
STEPS = (MANY, "3", 1.5, True, [0.5, 1.0], [3, 1], ["x"], [True, False], 0, 7, 1j, {}, torch.tensor([0.5]), [[1]])
LABELS = (3, 1.0, "x", [0, 1], T.float(), T.int(), T[:1], T.view(2, 1), torch.tensor([0, 4]), torch.tensor([-1, 0]), np.array([0, 1]))
SHAPE = (MANY, None, 3, "x", (2,), (2, 0), (2.0, 1, 4), ("a", 1), (True, 1), [], {})
KNOWN = (3, "xy", (X,), (X, None), (None, X), (X, torch.ones(4)), (X + 3, torch.ones(4, dtype=torch.bool)))
WEIGHTS = (MANY, None, 0.5, "x", [], ["x"], [1.5], [True], [float("nan")], [[0.5]])
DEVICE = (MANY, "d" * 10**5, 3.5, "gpu?", [], True)
NOT_NONE = (3, "x", [1], X)

CALLS = {
    NoiseSchedule: (dict(betas=[0.1, 0.2]), dict(betas=BETAS, timesteps=TIMESTEPS[:7])),
    NoiseSchedule.linear: (
        dict(T=5),
        dict(T=(None, *INTEGER, 0), beta_start=((None, *NUMBER, 0, 1), "beta"), beta_end=((None, *NUMBER, 2), "beta"), rescale=FLAG),
    ),
    NoiseSchedule.quadratic: (
        dict(T=5),
        dict(T=(None, *INTEGER, 0), beta_start=((None, *NUMBER, 0, 1), "beta"), beta_end=((None, *NUMBER, 2), "beta")),
    ),
    NoiseSchedule.sigmoid: (
        dict(T=5),
        dict(T=(None, *INTEGER, 0), beta_start=((None, *NUMBER, 0, 1), "beta"), beta_end=((None, *NUMBER, 2), "beta")),
    ),
    NoiseSchedule.constant: (dict(T=5), dict(T=(None, *INTEGER, 0), beta=(None, *NUMBER, 0, 1))),
    NoiseSchedule.jsd: (dict(T=5), dict(T=(None, *INTEGER, 0), max_beta=(None, *NUMBER))),
    NoiseSchedule.cosine: (dict(T=5), dict(T=(None, *INTEGER, 0), s=(None, *NUMBER), max_beta=(None, *NUMBER))),
    NoiseSchedule.from_name: (dict(name="linear", T=5), dict(name=(CHOICE, "schedule"), T=(None, *INTEGER))),
    SCHEDULE.respace: (dict(timesteps=[0, 5]), dict(timesteps=(None, *TIMESTEPS))),
    GaussianDiffusion: (
        dict(schedule=SCHEDULE),
        dict(schedule=(None, 3, "linear", [0.1]), prediction=CHOICE, variance=CHOICE, levels=(None, *INTEGER, 1, 2001), cdf=CHOICE),
    ),
    DIFFUSION.q_sample: (dict(x_start=X, t=T, noise=Noise(0)), dict(x_start=TENSOR, t=TIME, noise=NOISE, out=NOT_NONE[:3])),
    DIFFUSION.model_time: (dict(t=T), dict(t=(*(t for t in TIME if t is not ALONE), torch.tensor(1)))),
    DIFFUSION.q_step: (dict(x_previous=X, t=T, noise=Noise(0)), dict(x_previous=TENSOR, t=TIME, noise=NOISE)),
    DIFFUSION.q_mean_variance: (dict(x_start=X, t=T), dict(x_start=TENSOR, t=TIME)),
    DIFFUSION.q_posterior: (dict(x_start=X, x_t=X, t=T), dict(x_start=LIKE, x_t=TENSOR, t=TIME)),
    DIFFUSION.p_mean_variance: (OUT, dict(model_output=(OUTPUT, "output"), x_t=TENSOR, t=TIME, clip=FLAG)),
    DIFFUSION.p_step: (
        dict(OUT, noise=Noise(0)),
        dict(model_output=(OUTPUT, "output"), x_t=TENSOR, t=TIME, noise=NOISE, clip=FLAG, x_next=NOT_NONE[:3]),
    ),
    DIFFUSION.predict_x_start: (OUT, dict(model_output=(OUTPUT, "output"), x_t=TENSOR, t=TIME)),
    DIFFUSION.target: (dict(x_start=X, t=T, noise=Noise(0)), dict(x_start=TENSOR, t=TIME, noise=NOISE)),
    DIFFUSION.simple_loss: (
        dict(model_output=X, x_start=X, t=T, noise=Noise(0)),
        dict(model_output=(OUTPUT, "output"), x_start=TENSOR, t=TIME, noise=NOISE, weight=CHOICE),
    ),
    DIFFUSION.vlb_terms: (
        dict(OUT, x_start=X),
        dict(model_output=(OUTPUT, "output"), x_start=LIKE, x_t=TENSOR, t=TIME, clip=FLAG, detach_mean=FLAG),
    ),
    DIFFUSION.loss: (
        dict(OUT, x_start=X, noise=Noise(0), weight="p2"),
        dict(model_output=(OUTPUT, "output"), x_start=TENSOR, t=TIME, noise=NOISE, kind=CHOICE, weight=CHOICE, gamma=NUMBER),
    ),
    DIFFUSION.prior_bpd: (dict(x_start=X), dict(x_start=TENSOR)),
    DIFFUSION.bits_per_dim: (dict(model=model, x_start=X), dict(model=FUNCTION, x_start=(*TENSOR, X + 3), clip=FLAG, noise=(3, "x", X))),
    DIFFUSION.bound_terms: (
        dict(model=model, x_start=X, timesteps=[T]),
        dict(
            model=FUNCTION, x_start=TENSOR, timesteps=((3, [], ["x"], [1.0], [T.float()]), r"\bt\b|timesteps"), clip=FLAG, report=FUNCTION,
        ),
    ),
    DIFFUSION.x_start_mse: (dict(OUT, x_start=X), dict(model_output=(OUTPUT, "output"), x_start=LIKE, x_t=TENSOR, t=TIME, clip=FLAG)),
    Sampler: (
        dict(model=model, diffusion=DIFFUSION),
        dict(
            model=FUNCTION, diffusion=(None, 3, "x", SCHEDULE), sampler=CHOICE, steps=STEPS, spacing=CHOICE,
            eta=(None, *NUMBER, -1, 2, 0.5), clip=FLAG, threshold=(*NUMBER, 0, 2), guidance=(None, *NUMBER, "2"),
            null_label=INTEGER, graph=("yes", 1, 0.0, [True]),
        ),
    ),
    SAMPLER.__call__: (
        dict(shape=(2, 1, 4)),
        dict(
            shape=SHAPE, seed=(None, *SEED), labels=LABELS, known=(KNOWN, "known|mask"), first_sample=(None, *SEED), device=DEVICE,
            callback=NOT_NONE, keep=FLAG,
        ),
    ),
    SAMPLER.interpolate: (
        dict(a=X, b=X, weights=[0.5], t=3),
        dict(
            a=(*TENSOR, X[:1], X + 3), b=(*LIKE[:-1], X + 3), weights=WEIGHTS, t=(None, *INTEGER, 6, T), seed=(None, *SEED), labels=LABELS,
            first_sample=(None, *SEED),
        ),
    ),
    sample: (
        dict(model=model, diffusion=DIFFUSION, shape=(2, 1, 4)),
        dict(model=FUNCTION, diffusion=(None, 3), shape=SHAPE, labels=LABELS, sampler=CHOICE),
    ),
    make_table: (dict(chain=DIFFUSION), dict(sampler=CHOICE, steps=STEPS, eta=(None, *NUMBER), spacing=CHOICE)),
    spaced_timesteps: (dict(T=6, steps=3), dict(T=(None, *INTEGER), steps=(None, *INTEGER), spacing=CHOICE)),
    evaluate_bound: (
        dict(model=model, diffusion=DIFFUSION, x_start=X),
        dict(
            model=FUNCTION, diffusion=(None, 3, SCHEDULE), x_start=(*TENSOR[:-1], X + 3), terms_per_image=(INTEGER, "terms"),
            batch=(None, *INTEGER, 0), seed=(None, *SEED), clip=FLAG, parts=NOT_NONE, ranks=NOT_NONE, report=FUNCTION,
        ),
    ),
    rate_distortion: (dict(bound=evaluate_bound(model, DIFFUSION, X)), dict(bound=FUNCTION)),
}  # fmt: skip


def name_of(function):
    owner = getattr(function, "__self__", None)
    return function.__qualname__ if owner is None or isinstance(owner, type) else f"{type(owner).__name__}.{function.__name__}"


def cases():
    for function, (good, arguments) in CALLS.items():
        for argument, bad in arguments.items():
            values, named = bad if len(bad) == 2 and isinstance(bad[1], str) and isinstance(bad[0], tuple) else (bad, argument)
            yield pytest.param(function, good, argument, values, named, id=f"{name_of(function)}-{argument}")


@pytest.mark.parametrize("function, good, argument, values, named", list(cases()))
def test_a_wrong_argument_is_named_in_one_line(function, good, argument, values, named):
    function(**good)
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"(?:{named})") as raised:
            function(**{**good, argument: value})
            pytest.fail(f"{argument}={value!r} was taken")
        message = str(raised.value)
        assert "\n" not in message and len(message) < 400, message
        assert "got" in message or "must" in message, message


OUTPUTS = (None, 3.0, [X], (X, X), X.int(), X[:1], torch.zeros(2, 3, 4), "x", np.zeros((2, 1, 4), np.float32))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, dict(sampler="dpmpp_2m"), dict(threshold=0.9), dict(guidance=2.0, labels=torch.tensor([0, 1])), dict(graph=True)],
    ids=str,
)
def test_a_model_that_returns_something_else_is_told_so(options, learned):
    diffusion = GaussianDiffusion(SCHEDULE, "epsilon", "learned_range" if learned else "fixed_large")

    def broken(out):
        function = lambda x, t, labels=None: out  # noqa: E731
        function.num_classes = 2
        return function

    options = dict(options)
    labels = options.pop("labels", None)
    for out in (*OUTPUTS, X) if learned and options.get("sampler") is None else OUTPUTS:
        draw = Sampler(broken(out), diffusion, **options)
        draw._capture = lambda body, device: body
        with pytest.raises((TypeError, ValueError), match="the model output must"):
            draw((2, 1, 4), labels=labels)
        with pytest.raises((TypeError, ValueError), match="the model output must"):
            diffusion.bits_per_dim(broken(out), X)
        with pytest.raises((TypeError, ValueError), match="the model output must"):
            evaluate_bound(broken(out), diffusion, X)


def test_labels_within_the_models_classes_and_the_null_label_are_taken():
    for labels in ([0, 2], [3, 1]):  # 3 is the null label
        SAMPLER((2, 1, 4), labels=torch.tensor(labels))
    Sampler(model, DIFFUSION, null_label=7)((2, 1, 4), labels=torch.tensor([7, 0]))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, or be the null label, got labels\[1\] = 4"):
        SAMPLER((2, 1, 4), labels=torch.tensor([0, 4]))
    unconditional = lambda x, t, labels=None: x  # noqa: E731
    unconditional.num_classes = None
    with pytest.raises(ValueError, match="labels must be None for a model without classes"):
        sample(unconditional, DIFFUSION, (2, 1, 4), labels=T)


@pytest.mark.parametrize("of", [np.int64, np.uint8, np.int32, np.array, torch.tensor], ids=["int64", "uint8", "int32", "array", "tensor"])
def test_integers_of_numpy_and_torch_are_integers(of):
    draw = Sampler(model, DIFFUSION, steps=of(4), null_label=of(2))
    assert len(draw.table) == 4
    draw((of(2), of(1), of(4)), seed=of(3), first_sample=of(1))
    draw.interpolate(X, X, np.array([0.5], np.float32), of(5))
    assert GaussianDiffusion(SCHEDULE, levels=of(17)).levels == 17
    bound = evaluate_bound(model, DIFFUSION, X, terms_per_image=of(3), batch=of(1), seed=of(0))
    assert bound.terms.shape == (2, 3)


@pytest.mark.parametrize(
    "steps", [np.array([0, 2, 5]), torch.tensor([0, 2, 5]), np.array([0, 2, 5], np.uint16), (0, 2, 5), range(0, 6, 2)], ids=str
)
def test_lists_of_steps_may_be_arrays(steps):
    assert Sampler(model, DIFFUSION, steps=steps).table.timesteps.tolist() == [int(step) for step in steps]


def test_numbers_of_numpy_are_numbers():
    draw = Sampler(model, DIFFUSION, "ddim", eta=np.float32(0.5), threshold=np.float64(0.9), guidance=np.float32(1), clip=np.bool_(True))
    assert draw.clip is True
    draw((2, 1, 4))
    NoiseSchedule.linear(5, np.float64(0.1), np.float32(0.5))


def test_a_bound_of_no_images_is_refused():
    with pytest.raises(ValueError, match="x_start must have at least one sample"):
        GaussianDiffusion(NoiseSchedule.linear(5)).bits_per_dim(lambda x, t: x, torch.zeros(0, 1, 4))
