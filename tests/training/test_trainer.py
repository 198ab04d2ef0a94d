"""The training loop: it learns, is deterministic, stops on divergence, and can be interrupted and resumed."""

import functools
import signal
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests_support import OBJECTIVE, decoder_spec, make_documents

from cm3leon.config.schema import SFTConfig, TrainConfig
from cm3leon.data.batches import SampleStream, TokenStream, collate, length_of, share_of
from cm3leon.data.sequences import PretrainingSamples, Sample
from cm3leon.data.tokens import TokenStore, write_tokens
from cm3leon.models.decoder import Decoder, stored_weights
from cm3leon.sequence.cm3 import Masked
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training import trainer
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.loop import DivergenceError
from cm3leon.training.optimizer import learning_rate_at, make_optimizers
from cm3leon.training.run import first_batches
from cm3leon.training.trainer import LOG_EVERY, fit, setup, train_step, validate

VOCABULARY = Vocabulary(text_size=100, image_size=50, sentinels=8, tokens_per_image=16)
CONFIG = TrainConfig(
    steps=30, batch_size=8, warmup_steps=5, validate_every=15, checkpoint_every=250, optimizer="adamw", learning_rate=5e-3, precision="fp32"
)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokens")
    write_tokens(directory, "train", make_documents(16), 16, 100)
    store = TokenStore(directory)
    samples = PretrainingSamples(store, store, {}, VOCABULARY, OBJECTIVE, [1.0], 80, 0)
    return SampleStream(samples, len(store), 8, 0)


def make_model():
    torch.manual_seed(0)
    return Decoder(decoder_spec(layers=2, width=32, heads=2, context=80, init_std=0.02, image_positions=True), VOCABULARY)


def train(stream, config=CONFIG):
    logged = []
    model = make_model()
    metrics = fit(setup(model, config), stream, config, {"": [stream(100)]}, "test", lambda metrics, step: logged.append((step, metrics)))
    return model, metrics, logged


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns_and_is_deterministic(stream, optimizer):
    config = CONFIG.model_copy(update={"optimizer": optimizer})
    before = validate(setup(make_model(), config), [stream(100)], config)
    model, metrics, logged = train(stream, config)
    assert metrics["val_loss"] < before["loss"] - 0.5
    assert {"val_loss", "val_loss_text", "val_loss_image"} == set(metrics)
    assert [step for step, found in logged if "val_loss" in found] == [15, 30]
    again, same, _ = train(stream, config)
    assert same == metrics
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_loss_at_initialization_is_that_of_a_uniform_distribution(stream):
    assert validate(setup(make_model(), CONFIG), [stream(0)], CONFIG)["loss"] == pytest.approx(np.log(VOCABULARY.size), rel=0.02)


def test_the_total_is_weighted_by_token(stream):
    batch, model = stream(0), make_model()
    total, losses = model.losses(batch)
    assert total.item() == pytest.approx((losses * batch.weights).sum().item(), rel=1e-5)
    only = torch.zeros_like(batch.weights)
    only[0, 25] = 3.0
    chosen = replace(batch, weights=only, targets=only.flatten().nonzero()[:, 0])
    assert model.losses(chosen)[0].item() == pytest.approx(3 * losses[0, 25].item(), rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_each_tasks_loss_is_the_mean_over_its_tokens_since_it_was_last_logged(stream, packing):
    """With a learning rate of almost zero: compared with the losses of each sample alone."""
    get_sample = stream._samples.get_sample

    def with_task(epoch, row):
        sample = get_sample(epoch, row)
        return sample._replace(task=row % 3, weights=sample.weights * 0.25)

    config = CONFIG.model_copy(update={"steps": 2 * LOG_EVERY, "learning_rate": 1e-30, "micro_batch_size": 3})
    tasks_stream = TokenStream(with_task, 16, 8, 0, 80) if packing else SampleStream(with_task, 16, 8, 0)
    model, logged = make_model(), []
    fit(setup(model, config), tasks_stream, config, {}, "test", lambda metrics, step: logged.append(metrics), tasks=["odd", "even"])
    logged = [metrics for metrics in logged if "loss" in metrics]
    again = TokenStream(with_task, 16, 8, 0, 80) if packing else SampleStream(with_task, 16, 8, 0)
    for window in range(2):
        found = [sample for step in range(LOG_EVERY) for sample in again.samples(window * LOG_EVERY + step)]
        for number, name in enumerate(["odd", "even"], 1):
            own = collate([sample for sample in found if sample.task == number])
            losses = model.losses(own)[1][own.weights > 0]
            assert logged[window][f"loss_{name}"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_divergence_is_an_error_that_leaves_no_checkpoint(stream, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.tokens.weight[0, 0] = float("nan")
        model.tokens.weight[:] = model.tokens.weight + model.tokens.weight[0, 0]
    every = CONFIG.model_copy(update={"checkpoint_every": 1})
    checkpoints = Checkpoints(tmp_path / "run", {}, 2)
    with pytest.raises(DivergenceError, match=r"step 0.*learning_rate"):
        fit(setup(model, every), stream, every, {}, "test", checkpoints=checkpoints)
    assert not checkpoints.names()


def test_a_divergence_is_found_one_step_later(stream):
    model = make_model()
    with torch.no_grad():
        model.tokens.weight[:] = torch.nan
    state = setup(model, CONFIG)
    with pytest.raises(DivergenceError, match="step 0"):
        fit(state, stream, CONFIG, {}, "test")
    assert state.step == 1


def test_losses_are_read_when_they_are_logged_and_no_more_often(stream, monkeypatch):
    """On a GPU each reading waits for it."""
    read_at, read = [], trainer.read_losses

    def noted(state, name):
        read_at.append(state.step)
        read(state, name)

    monkeypatch.setattr(trainer, "read_losses", noted)
    config = CONFIG.model_copy(update={"steps": 2 * LOG_EVERY + 3, "validate_every": 1000, "checkpoint_every": 1000})
    state = setup(make_model(), config)
    fit(state, stream, config, {}, "test")
    assert sorted(set(read_at)) == [LOG_EVERY, 2 * LOG_EVERY, 2 * LOG_EVERY + 3]
    assert len(state.losses) == 2 * LOG_EVERY + 3


def test_the_schedule_warms_up_to_the_peak_and_decays_to_the_final_rate():
    schedule = {
        "peak": CONFIG.learning_rate,
        "steps": CONFIG.steps,
        "warmup_steps": CONFIG.warmup_steps,
        "final": CONFIG.final_learning_rate,
    }
    rates = [learning_rate_at(step, **schedule) for step in range(CONFIG.steps + 1)]
    assert rates[0] == pytest.approx(CONFIG.learning_rate / 5) and max(rates) == rates[5] == CONFIG.learning_rate
    assert rates[-1] == pytest.approx(CONFIG.learning_rate * CONFIG.final_learning_rate)
    assert all(a >= b for a, b in zip(rates[5:], rates[6:], strict=False))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_an_optimizer_once(optimizer):
    model = make_model()
    optimizers = make_optimizers(model, CONFIG.model_copy(update={"optimizer": optimizer}))
    grouped = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    decayed = [p for each in optimizers for group in each.param_groups for p in group["params"] if group["weight_decay"]]
    assert {id(p) for p in decayed} == {id(p) for name, p in model.named_parameters() if name.startswith("blocks")}


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({"activation_checkpointing": True}, 1e-6), ({"micro_batch_size": 3}, 2e-3), ({"precision": "bf16"}, 0.05)],
    ids=["activation-checkpointing", "micro-batches", "bf16"],
)
def test_how_a_step_is_computed_does_not_change_what_it_learns(stream, changes, tolerance):
    expected = train(stream)[1]["val_loss"]
    found = train(stream, CONFIG.model_copy(update=changes))[1]["val_loss"]
    assert found == pytest.approx(expected, abs=tolerance)


def test_z_loss_keeps_log_z_near_zero(stream):
    def log_z(z_loss):
        model, _, _ = train(stream, CONFIG.model_copy(update={"z_loss": z_loss}))
        batch = stream(0)
        with torch.no_grad():
            hidden = model(batch.tokens, batch.image_positions, positions_BT=batch.positions, cu_seqlens=batch.cu_seqlens)
            return model.logits(hidden).logsumexp(-1).abs().mean().item()

    assert log_z(1e-1) < log_z(0.0) - 0.5


def test_divergence_names_the_last_checkpoint(stream, tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", {"a": "1"}, 2)
    config = CONFIG.model_copy(update={"checkpoint_every": 4})
    state = setup(make_model(), config)

    class Broken(SampleStream):
        def samples(self, step):
            if step == 6:
                state.model.tokens.weight.data[:] = float("nan")
            return super().samples(step)

    broken = Broken(stream._samples.get_sample, 16, 8, 0)
    with pytest.raises(DivergenceError, match=r"step 6.*the last checkpoint is .*step-00000004"):
        fit(state, broken, config, {}, "test", checkpoints=checkpoints)
    assert checkpoints.newest() == "step-00000004"


def test_one_sigint_writes_a_checkpoint_and_exits_and_a_second_one_exits_at_once(stream, tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", {"a": "1"}, 2)

    def interrupted(times):
        def log(metrics, step):
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

        return lambda: fit(setup(make_model(), CONFIG), stream, CONFIG, {}, "test", log, checkpoints=checkpoints)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted(2)()
    assert checkpoints.newest() is None
    with pytest.raises(SystemExit) as exited:
        interrupted(1)()
    assert exited.value.code == 130
    assert checkpoints.newest() == f"step-{LOG_EVERY:08d}"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_resumed_run_logs_its_losses_from_the_beginning(stream, tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", {"a": "1"}, 2)
    logged: dict[int, dict[str, float]] = {}

    def train_to(steps):
        config = CONFIG.model_copy(update={"steps": steps, "checkpoint_every": LOG_EVERY})
        fit(
            setup(make_model(), config),
            stream,
            config,
            {},
            "test",
            lambda metrics, step: logged.setdefault(step, metrics),
            checkpoints=checkpoints,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.__class__, "finish", lambda self: None)
        train_to(2 * LOG_EVERY)
    first = {step: found["loss"] for step, found in logged.items() if "loss" in found}
    assert sorted(first) == [LOG_EVERY, 2 * LOG_EVERY]
    logged.clear()
    train_to(3 * LOG_EVERY)
    assert {step: logged[step]["loss"] for step in first} == first
    tokens = [sum(map(length_of, stream.samples(step))) for step in range(3 * LOG_EVERY)]
    assert logged[3 * LOG_EVERY]["tokens"] == sum(tokens), "also those before it was resumed"


def test_a_run_that_was_killed_after_its_last_checkpoint_has_its_metrics_and_sheets(stream, tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", {"a": "1"}, 2)
    config = CONFIG.model_copy(update={"steps": 3})
    sheets: list[int] = []

    def train_to_the_end():
        return fit(
            setup(make_model(), config),
            stream,
            config,
            {"": [stream(100)]},
            "test",
            after_validation=sheets.append,
            checkpoints=checkpoints,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.__class__, "finish", lambda self: None)
        first = train_to_the_end()
    assert set(first) == {"val_loss", "val_loss_text", "val_loss_image"}
    assert train_to_the_end() == first
    assert sheets == [3, 3]


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients(stream, monkeypatch):
    """The blocks are traced and differentiated as a whole; kernels, which take minutes, are not made."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def gradients(**changes):
        config = CONFIG.model_copy(update=changes)
        model = make_model()
        for block in model.blocks:  # else zeros hide what attention and feed-forward compute
            torch.nn.init.normal_(block.attention.out.weight, std=0.2)
            torch.nn.init.normal_(block.down.weight, std=0.2)
        train_step(setup(model, config), share_of(TokenStream(stream._samples.get_sample, 16, 2, 0, 80), 0, 0, 1, None), config, "test")
        return [parameter.grad for parameter in model.parameters()]

    for one, other in zip(gradients(compile=True), gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_sample_sheets_compile_nothing(stream, monkeypatch):
    """Their shapes would use up the number that the compiler takes, and training would go on uncompiled."""
    compiled: list[int] = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    config = CONFIG.model_copy(update={"steps": 1, "compile": True})
    state, found = setup(make_model(), config), []

    def sheets(step):
        before = len(compiled)
        for length in (3, 4, 5):
            state.model(torch.ones(1, length, dtype=torch.long), torch.zeros(1, length, dtype=torch.long))
        found.append((before, len(compiled)))

    fit(state, SampleStream(stream._samples.get_sample, 16, 2, 0), config, {}, "test", after_validation=sheets)
    [(before, after)] = found
    assert before == after > 0


@pytest.mark.parametrize("codebook", [None, torch.randn(50, 8, generator=torch.Generator().manual_seed(1))], ids=["plain", "codebook"])
def test_a_decoder_on_the_meta_device_gets_the_weights_of_a_new_one_with_one_at_a_time_in_memory(codebook):
    spec = decoder_spec(2, 32, 2, 80, image_positions=True, rope=True, previous_token=True)
    torch.manual_seed(3)
    expected = Decoder(spec, VOCABULARY)
    if codebook is not None:
        expected.start_from_codebook(codebook, 0.05)
    with torch.device("meta"):
        model = Decoder(spec, VOCABULARY)
    held: list[weakref.ref[torch.Tensor]] = []

    def weights():
        for name, weight in model.initial_weights(codebook if codebook is None else lambda: codebook, 0.05):
            assert not [earlier for earlier in held if earlier() is not None]
            held.append(weakref.ref(weight))
            yield name, weight
            del weight

    torch.manual_seed(3)
    found = setup(model, CONFIG, weights=weights()).model
    for name, tensor in [*expected.named_parameters(), *expected.named_buffers()]:
        assert torch.equal(dict([*found.named_parameters(), *found.named_buffers()])[name], tensor), name


def test_stored_weights_are_read_one_by_one(tmp_path):
    expected = make_model()
    expected.save(tmp_path)
    model = Decoder.load(tmp_path, "meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    found = setup(model, CONFIG, weights=stored_weights(tmp_path)).model
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    with pytest.raises(ValueError, match="no weights for"):
        setup(Decoder.load(tmp_path, "meta"), CONFIG, weights=iter([]))


@pytest.mark.parametrize("together", [None, 3, 4, 100])
def test_validation_samples_do_not_depend_on_the_size_of_a_micro_batch(together):
    def sample(epoch, index):
        tokens = np.array([1, 10 + index, 1])
        masked = Masked(tokens, np.ones(3, bool), np.zeros(3, int), None, (), "none")
        return Sample(masked, np.ones(3, np.float32), (str(index),))

    section = SFTConfig(batch_size=4, micro_batch_size=together, validation_samples=10)
    batches = first_batches(sample, 40, section, 0)
    tokens = torch.cat([batch.tokens.flatten() for batch in batches])
    whole = first_batches(sample, 40, section.model_copy(update={"micro_batch_size": 10}), 0)
    assert torch.equal(tokens, whole[0].tokens.flatten()) and len(tokens) == 30
    assert max(batch.tokens.numel() for batch in batches) <= 3 * (together or 4)
