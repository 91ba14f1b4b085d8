"""PruningCallback in every kind of Trainer run, with a model that exists early or late."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from plans import plan_for, same_bits, state
from tiny_models import tiny, tokens
from torch.utils.data import DataLoader

from sparc3_pl.errors import InputError
from sparc3_pl.model.structure import mlps
from sparc3_pl.pruning.callback import PruningCallback, find_model

STAGES = ("fit", "validate", "test", "predict")


class Boom(Exception):
    """What a step raises."""


class Module(pl.LightningModule):
    """A user's module: knows nothing of pruning; looks at its weights in every step."""

    def __init__(self, late: bool = True, crash: bool = False, optimizer=torch.optim.SGD) -> None:
        super().__init__()
        self.model = None if late else tiny("llama")
        self.crash, self.optimizer, self.seen = crash, optimizer, []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = tiny("llama")

    def step(self, batch, *_):
        self.seen.append(state(self.model))
        if self.crash:
            raise Boom
        return self.model(input_ids=batch, labels=batch).loss

    training_step = validation_step = test_step = predict_step = step

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.1)


def loader():
    return DataLoader(tokens(4, 6), batch_size=1)


def trainer(*callbacks, **kwargs):
    return pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **kwargs,
    )


def run(stage: str, module: Module, callback: PruningCallback, **kwargs) -> None:
    getattr(trainer(callback, **kwargs), stage)(module, loader())


def zeros_of(plan, weights) -> float:
    """Largest magnitude where the plan's zeros belong."""
    blocks = {mlp.up: mlp for mlp in mlps(tiny("llama"))}
    found = []
    for neuron in plan.neurons:
        mlp = blocks[neuron.layer]
        rows = [weights[f"{name}.{kind}"][neuron.index] for name in (mlp.up, mlp.gate) for kind in ("weight", "bias")]
        found += [*rows, weights[f"{mlp.down}.weight"][:, neuron.index]]
    return max(float(values.abs().max()) for values in found)


@pytest.fixture
def plan(tiny_llama):
    return plan_for(tiny_llama)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("late", [True, False])
def test_every_step_sees_the_pruned_model(plan, stage, late):
    module = Module(late)
    run(stage, module, PruningCallback(plan))
    assert len(module.seen) == 4
    assert all(zeros_of(plan, seen) == 0 for seen in module.seen)
    assert zeros_of(plan, state(module.model)) == 0


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("crash", [False, True])
def test_reverts_bit_for_bit(plan, stage, crash):
    module = Module(crash=crash)
    if crash:
        with pytest.raises(Boom):
            run(stage, module, PruningCallback(plan, revert=True))
    else:
        run(stage, module, PruningCallback(plan, revert=True))
    assert zeros_of(plan, module.seen[0]) == 0
    assert same_bits(state(module.model), state(tiny("llama")))


@pytest.mark.parametrize("crash", [False, True])
def test_revert_after_fit_brings_the_removed_values_back(plan, crash):
    module = Module(crash=crash)
    if crash:
        with pytest.raises(Boom):
            run("fit", module, PruningCallback(plan, revert=True))
    else:
        run("fit", module, PruningCallback(plan, revert=True))
    original, now = state(tiny("llama")), state(module.model)
    neuron = plan.neurons[0]
    for kind in ("weight", "bias"):
        name = f"{neuron.layer}.{kind}"
        assert torch.equal(now[name][neuron.index], original[name][neuron.index])
    if crash:
        assert same_bits(now, original)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_zeros_are_held_during_fit(plan, accumulate, optimizer):
    module = Module(optimizer=optimizer)
    run("fit", module, PruningCallback(plan), accumulate_grad_batches=accumulate)
    assert [zeros_of(plan, seen) for seen in module.seen] == [0, 0, 0, 0]
    assert zeros_of(plan, state(module.model)) == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(module.seen[0][name], module.seen[-1][name])


def test_zeros_are_free_if_not_held(plan):
    """The column of down stays at zero gradient only while the rows are zero too; AdamW's step moves biases."""
    plan = plan_for(tiny("llama"), [("model.layers.0.self_attn.q_proj", 3)])
    moved = {}
    for hold in (True, False):
        module = Module()
        run("fit", module, PruningCallback(plan, hold=hold))
        moved[hold] = module.model.model.layers[0].self_attn.q_proj.weight[3].abs().max().item()
    assert moved[True] == 0 < moved[False]


def test_validation_within_fit_sees_the_pruned_model(plan):
    module = Module()
    trainer(PruningCallback(plan)).fit(module, loader(), loader())
    assert len(module.seen) > 4
    assert all(zeros_of(plan, seen) == 0 for seen in module.seen)


def test_two_runs_with_one_callback(plan):
    module, callback = Module(), PruningCallback(plan)
    for stage in ("validate", "test", "predict"):
        run(stage, module, callback)
    assert all(zeros_of(plan, seen) == 0 for seen in module.seen)
    module, callback = Module(), PruningCallback(plan, revert=True)
    for stage in ("validate", "test"):
        run(stage, module, callback)
    assert same_bits(state(module.model), state(tiny("llama")))


def test_no_hook_is_left_behind(plan):
    module = Module()
    run("fit", module, PruningCallback(plan))
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


def test_takes_a_path_and_logs(plan, tmp_path, caplog):
    path = plan.save(tmp_path / "plan.json")
    with caplog.at_level(logging.INFO, logger="sparc3_pl.pruning.callback"):
        run("test", Module(), PruningCallback(str(path), revert=True))
    assert "pruned 6 neurons in 2 layers (edit zero)" in caplog.text
    assert "back in place" in caplog.text


def test_plan_of_another_model_stops_the_run(plan):
    module = Module(late=False)
    module.model = tiny("llama", seed=5)
    before = state(module.model)
    with pytest.raises(InputError, match="was made for"):
        run("test", module, PruningCallback(plan))
    assert module.seen == []
    assert same_bits(state(module.model), before)


def test_finds_the_model():
    model = tiny("llama")
    assert find_model(torch.nn.Sequential(torch.nn.Linear(1, 1), model)) is model
    holder = Module(late=False)
    assert find_model(holder) is holder.model
    with pytest.raises(InputError, match="holds 0 Hugging Face models"):
        find_model(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="holds 2 Hugging Face models"):
        find_model(torch.nn.Sequential(model, tiny("llama")))
