"""The training loop: reproducible, resumable in principle, safe on disk."""

import json

import pytest
import torch
from tiny_training import TINY, config, images

from ddpm_fast.data.images import ImageData
from ddpm_fast.noise import Noise
from ddpm_fast.training import TrainConfig, Trainer, load_trained
from ddpm_fast.training.checkpoint import CheckpointError, save_checkpoint
from ddpm_fast.training.trainer import resolve_device


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_same_seed_same_weights_and_global_generator_untouched():
    before = torch.random.get_rng_state()
    runs = [Trainer(config(network={**TINY["network"], "dropout": 0.3}), images()) for _ in range(2)]
    torch.rand(7)  # what others draw meanwhile does not matter
    for trainer in runs:
        trainer.run()
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    torch.random.set_rng_state(before)
    Trainer(config(), images()).run()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_gives_other_weights():
    a, b = (Trainer(config(seed=seed), images()) for seed in (0, 1))
    assert not torch.equal(weights(a), weights(b))


@pytest.mark.slow
def test_training_lowers_the_loss():
    # Images of one grey each: all but their level is noise, which a short training can learn to see.
    x = torch.arange(24, dtype=torch.uint8).remainder(17).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    trainer = Trainer(config(steps=80, batch=24, learning_rate=5e-3, timestep_sampler="stratified"), ImageData("grey", x, x[:6], 17))
    losses = [line["loss"] for line in trainer.run(log_every=1)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])  # the target is unit noise: the loss starts at 1


def test_hybrid_loss_learns_a_variance_that_lowers_the_bound():
    x = torch.arange(24, dtype=torch.uint8).remainder(17).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    betas = dict(beta_start=5e-3, beta_end=0.5)
    changes = dict(variance="learned_range", loss="hybrid", timestep_sampler="stratified", schedule_options=betas, ema=0.9)
    trainer = Trainer(config(steps=60, batch=24, learning_rate=5e-3, **changes), ImageData("grey", x, x[:6], 17))
    trainer.run()
    model = trainer.averaged_model()

    def frozen(x_t, t):  # the variance of the first step, halfway between the two fixed ones: the head starts at zero
        out = model(x_t, t)
        return torch.cat([out[:, :1], torch.zeros_like(x_t)], 1)

    x_start = trainer.data.batch("train", slice(None))[0]
    learned, start = (trainer.diffusion.bits_per_dim(m, x_start).mean() for m in (model, frozen))
    assert learned < 0.95 * start  # 0.88 of it here: the mean is the same, and so is the noise


@pytest.mark.parametrize(
    "variance, loss", [("fixed_small", "simple"), ("fixed_large", "vlb"), ("learned", "vlb"), ("learned_range", "hybrid")]
)
@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v", "mean"])
def test_every_parameterisation_trains(prediction, variance, loss):
    trainer = Trainer(config(prediction=prediction, variance=variance, loss=loss, steps=2), images())
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in trainer.run(log_every=1))


def test_bf16_autocast_trains_close_to_fp32():
    losses = [Trainer(config(precision=precision), images()).run(log_every=1)[0]["loss"] for precision in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # the same first step, 8 bits of mantissa


def test_loss_aware_draws_follow_the_losses_and_the_logged_loss_estimates_the_same():
    trainer = Trainer(config(timesteps=3, batch=30, steps=12, loss="vlb", timestep_sampler="loss_aware"), images(30))
    values = torch.tensor([2.0, 0.5, 0.1])

    def loss(out, x_start, x_t, t, noise, *, kind, weight):
        assert (kind, weight) == ("vlb", "uniform")
        return values[t] + 0.0 * out.flatten(1).sum(1)

    trainer.diffusion.loss = loss
    lines = trainer.run(log_every=1)
    counts = trainer.timestep_sampler.draw(12)[0].bincount(minlength=3)
    assert counts.tolist() == pytest.approx((30 * values / values.sum()).tolist(), abs=2)
    # Uniform at first; then the factor takes all the variance away, as these losses depend on t alone.
    assert [line["loss"] for line in lines] == pytest.approx([values.mean().item()] * 12, rel=0.02)


def test_loss_vlb_brings_its_recipe():
    recipe = TrainConfig.for_data("digits")
    assert (recipe.timestep_sampler, recipe.weight) == ("stratified", "p2")
    vlb = TrainConfig.for_data("digits", loss="vlb")
    assert (vlb.timestep_sampler, vlb.weight) == ("loss_aware", "uniform")
    assert TrainConfig.for_data("photos", loss="vlb", timestep_sampler="uniform").timestep_sampler == "uniform"
    with pytest.raises(ValueError, match="weight is of the simple loss and has no part in loss 'vlb', got 'p2'"):
        TrainConfig.for_data("digits", loss="vlb", weight="p2")


@pytest.mark.parametrize(
    "variance, loss", [("fixed_small", "simple"), ("fixed_large", "simple"), ("learned", "hybrid"), ("learned_range", "hybrid")]
)
@pytest.mark.parametrize("data", ["digits", "photos"])
def test_a_variance_brings_the_loss_that_trains_it(data, variance, loss):
    assert TrainConfig.for_data(data, variance=variance).loss == loss
    assert TrainConfig.for_data(data, variance=variance, loss="vlb").loss == "vlb"


def test_timesteps_cover_the_chain():
    drawn, _ = Trainer(config(batch=20), images()).timestep_sampler.draw(0)
    assert drawn.shape == (20,) and drawn.min() >= 0 and drawn.max() < 20
    stratified, _ = Trainer(config(batch=40, timestep_sampler="stratified"), images()).timestep_sampler.draw(3)
    assert stratified.bincount(minlength=20).tolist() == pytest.approx([2] * 20, abs=1)  # two strata to each t


def test_learning_rate_warms_up_and_decays():
    trainer = Trainer(config(decay="cosine", steps=100, warmup=10, learning_rate=1.0), images())
    assert trainer.learning_rate(0) == pytest.approx(0.1)
    assert trainer.learning_rate(50) == pytest.approx(0.5)
    assert trainer.learning_rate(100) == pytest.approx(0.0)
    assert Trainer(config(learning_rate=0.5), images()).learning_rate(1000) == 0.5


def test_flips_mirror_about_half_of_the_images():
    trainer = Trainer(config(flip=True, batch=64), images(64))
    plain = Trainer(config(batch=64), images(64)).batch(5)[0]
    flipped = trainer.batch(5)[0]
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    assert (mirrored | (flipped == plain).flatten(1).all(1)).all()
    assert 16 <= mirrored.sum() <= 48  # four standard deviations of a fair coin


def test_labels_reach_a_conditional_network_and_some_are_dropped():
    trainer = Trainer(config(class_conditional=True, label_dropout=0.5, batch=64), images(64))
    labels = trainer.batch(0)[1]
    dropped = (labels == 3).sum()
    assert 16 <= dropped <= 48
    assert len(trainer.run(log_every=1)) == 4


def test_run_writes_metrics_and_a_checkpoint_that_loads(tmp_path):
    trainer = Trainer(config(variance="learned_range", loss="hybrid"), images())
    trainer.run(tmp_path, log_every=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert {"loss", "grad_norm", "lr", "images_per_s", "elapsed_s"} <= set(lines[0])
    trained = load_trained(tmp_path)
    assert trained.step == 4 and trained.image_shape == (1, 8, 8) and trained.config == trainer.config
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 19])
    assert torch.equal(trained.model(x, t), trainer.averaged_model()(x, t))
    last = load_trained(tmp_path, averaged=False)
    assert torch.equal(last.model(x, t), trainer.model.eval()(x, t))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.json", "checkpoint.safetensors", "metrics.jsonl"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    trainer = Trainer(config(), images())
    trainer.run(tmp_path)
    kept = (tmp_path / "checkpoint.safetensors").read_bytes()
    broken = Trainer(config(), images())
    with torch.no_grad():
        broken.model.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan and the gradient's norm nan at step 1"):
        broken.run(tmp_path, log_every=1)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == kept


def test_interruption_saves_what_was_trained(tmp_path):
    trainer = Trainer(config(steps=100), images())

    def interrupt(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path, report=interrupt)
    assert load_trained(tmp_path).step == 3


def test_checkpoint_of_something_else_is_refused(tmp_path):
    save_checkpoint(tmp_path, {"x": torch.zeros(1)}, {"step": 3})
    with pytest.raises(CheckpointError, match="not of a training run: it has no network"):
        load_trained(tmp_path)


def test_checkpoint_with_unknown_configuration_is_refused(tmp_path):
    trainer = Trainer(config(), images())
    meta = dict(
        step=1,
        network=trainer.model.config,
        levels=17,
        image_shape=[1, 8, 8],
        images=1,
        fingerprints=dict(train="", test=""),
        train={"from_the_future": 1},
    )
    save_checkpoint(tmp_path, {"x": torch.zeros(1)}, meta)
    with pytest.raises(CheckpointError, match="from_the_future"):
        load_trained(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(learning_rate=float("nan")), "learning_rate must be positive, got nan"),
        (dict(loss="l2"), "loss must be one of simple, vlb, hybrid, got 'l2'"),
        (dict(preset="big"), "preset must be one of .*, got 'big'"),
        (dict(label_dropout=2.0), r"label_dropout must lie in \[0, 1\], got 2.0"),
        (dict(timestep_sampler="importance"), "timestep_sampler must be one of uniform, stratified, loss_aware, got 'importance'"),
        (dict(precision="fp8"), "precision must be one of fp32, bf16, got 'fp8'"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    "changes, data, message",
    [
        (dict(variance="learned"), images(), "loss 'simple' does not train a variance, got variance 'learned'"),
        (dict(loss="hybrid"), images(), "loss 'hybrid' trains a learned variance, got variance 'fixed_large'"),
        (
            dict(class_conditional=True),
            ImageData("plain", images().train, images().test, 17),
            "class_conditional needs labels, and plain has none",
        ),
        (dict(schedule="straight"), images(), "schedule must be one of .*, got 'straight'"),
        (dict(schedule_options=dict(slope=1.0)), images(), "schedule 'linear' does not take these options"),
        (dict(device="cuda:99"), images(), "device 'cuda:99' is not there"),
        (dict(device="tpu9"), images(), "device must be auto, cpu or cuda"),
    ],
)
def test_configuration_that_does_not_fit(changes, data, message):
    with pytest.raises(ValueError, match=message):
        Trainer(config(**changes), data)


def test_auto_device():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_noise_of_training_does_not_meet_that_of_sampling():
    from ddpm_fast import noise

    folds = [getattr(noise, name) for name in dir(noise) if name.startswith("FOLD_")]
    assert len(set(folds)) == len(folds) >= 8
    assert len({Noise(0).fold_in(k).seed for k in folds}) == len(folds)


def test_infinite_gradient_is_noticed_before_the_checkpoint(tmp_path):
    # Clipping turns it into NaN weights while the loss itself is still finite.
    trainer = Trainer(config(), images())
    trainer.model.conv_out.bias.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match="the gradient's norm (nan|inf) at step 1"):
        trainer.run(tmp_path, log_every=100, save_every=1)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_loading_and_averaging_leave_the_global_generator_alone(tmp_path):
    trainer = Trainer(config(), images())
    trainer.run(tmp_path)
    before = torch.random.get_rng_state()
    trainer.averaged_model()
    load_trained(tmp_path)
    trainer.train_step()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "preset, size, attention", [("photos32", 64, [16]), ("photos32", 28, [7]), ("cifar10", 64, [32]), ("digits", 16, [])]
)
def test_preset_fits_the_image_size(preset, size, attention):
    # Attention stays at the preset's level: half of the side for cifar10, a quarter for photos32.
    model = TrainConfig(preset=preset, network=dict(base_channels=32)).make_network(images(8, 3, size, 256))
    assert model.config["attention_resolutions"] == attention and model.config["image_size"] == size


def test_image_size_that_cannot_be_halved():
    with pytest.raises(ValueError, match="'cifar10' halves images 3 times and needs sides divisible by 8, got 28"):
        TrainConfig(preset="cifar10").make_network(images(8, 3, 28, 256))


def test_chain_of_another_length_destroys_as_much():
    recipe, longer = TrainConfig.for_data("digits"), TrainConfig.for_data("digits", timesteps=1000)
    assert TrainConfig.for_data("digits", timesteps=recipe.timesteps).schedule_options == recipe.schedule_options
    ends = [c.make_diffusion(17).schedule.alphas_bar[-1].log().item() for c in (recipe, longer)]
    assert ends[0] == pytest.approx(ends[1], rel=0.05)  # both about -T·mean(beta), up to terms of beta²
    assert TrainConfig.for_data("digits", schedule="cosine").schedule_options == {}
    assert TrainConfig.for_data("a folder", timesteps=500).schedule_options == dict(beta_start=2e-4, beta_end=0.04)
