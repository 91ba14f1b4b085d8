"""The Trainer: what it takes for the cluster, for the device, and which of Lightning's private names it leans on."""

import importlib
import logging

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.accelerators import CPUAccelerator, MPSAccelerator

from sparc3_pl.errors import InputError
from sparc3_pl.runtime.trainer import Trainer

VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK")
SHELL = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2"}
TASK = SHELL | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
JSRUN = {"LSB_JOBID": "1", "JSM_NAMESPACE_LOCAL_RANK": "0", "JSM_NAMESPACE_SIZE": "2", "LSB_DJOB_RANKFILE": "missing"}


@pytest.fixture
def trainer(monkeypatch, tmp_path):
    """Makes a Trainer in a shell with these variables."""

    def make(variables: dict[str, str], **arguments: object) -> Trainer:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return Trainer(**{"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path} | arguments)

    return make


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (SHELL, "SLURM_NTASKS=2"),
        (SHELL | {"SLURM_NTASKS_PER_NODE": "2"}, "SLURM_NTASKS=2"),
        (SHELL | {"SLURM_NTASKS": "1"}, None),
        (TASK | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"TORCHELASTIC_RUN_ID": "left over"}, "torchrun has not started this process"),
        ({}, None),
    ],
    ids=["slurm", "slurm per node", "slurm, one task", "srun, one task", "torchrun", "nothing"],
)
@pytest.mark.parametrize("devices", [1, 2])
def test_a_shell_with_a_clusters_variables_runs_on_its_own(trainer, caplog, variables, said, devices):
    with caplog.at_level(logging.INFO):
        made = trainer(variables, devices=devices)
    assert isinstance(made._accelerator_connector.cluster_environment, LightningEnvironment)
    assert (made.world_size, made.global_rank) == (devices, 0)
    assert [said in record.message for record in caplog.records if "on its own" in record.message] == [True] * bool(
        said
    )


@pytest.mark.parametrize(
    ("variables", "kind"),
    [(TASK | {"SLURM_NTASKS_PER_NODE": "2"}, SLURMEnvironment), (TORCHRUN, TorchElasticEnvironment)],
    ids=["srun", "torchrun"],
)
def test_processes_that_others_started(trainer, variables, kind):
    made = trainer(variables, devices=2)
    assert isinstance(made._accelerator_connector.cluster_environment, kind)
    assert (made.world_size, made.global_rank) == (2, 1)


@pytest.mark.parametrize(
    ("variables", "devices", "said"),
    [
        (TASK | {"SLURM_NTASKS_PER_NODE": "2"}, 1, "srun"),
        (TASK, 2, "--ntasks-per-node"),  # Lightning needs that variable
        (TORCHRUN, 1, "torchrun .WORLD_SIZE. says that 2"),
        (TORCHRUN, 4, "4 processes, but torchrun"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1, "WORLD_SIZE says that 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, 1, "WORLD_SIZE says that 2"),  # a pod of Kubeflow's
        (JSRUN, 2, "trainer.devices=2"),
    ],
    ids=["srun", "srun without per node", "torchrun", "torchrun more", "by hand", "kubeflow", "jsrun"],
)
def test_another_number_of_processes_is_one_line(trainer, variables, devices, said):
    with pytest.raises(InputError, match=said) as error:
        trainer(variables, devices=devices)
    assert "\n" not in str(error.value)


def test_apple_silicon(trainer, monkeypatch, caplog):
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    with caplog.at_level(logging.INFO):
        assert isinstance(trainer({}, accelerator="auto", devices=1).accelerator, CPUAccelerator)
    assert [record.message.count("float64") for record in caplog.records] == [1]
    for name in ("mps", "gpu"):
        with pytest.raises(InputError, match=f"trainer.accelerator='{name}'.* float64.*; give cpu"):
            trainer({}, accelerator=name)


PRIVATE = [
    "lightning.fabric.utilities.distributed:_set_num_threads_if_needed",
    "jsonargparse:ArgumentParser._apply_actions",
    "jsonargparse:ArgumentParser._load_config_parser_mode",
    "jsonargparse._actions:_ActionConfigLoad",
    "jsonargparse._link_arguments:ActionLink",
    "lightning.pytorch.cli:LightningCLI._set_seed",
    "lightning.pytorch.loops:_EvaluationLoop",
    "lightning.pytorch.loops:_PredictionLoop",
    "lightning.pytorch.strategies.launchers.subprocess_script:_SubprocessScriptLauncher",
    "lightning.pytorch.strategies.launchers.subprocess_script:_SubprocessScriptLauncher._call_children_scripts",
    "lightning.pytorch.trainer.connectors.accelerator_connector:_AcceleratorConnector",
    "lightning.pytorch.trainer.connectors.signal_connector:_SignalConnector.register_signal_handlers",
    "torch.distributed:ProcessGroup.get_group_store",
]
"""Names that no release promises, each with where this package finds it."""


@pytest.mark.parametrize("name", PRIVATE)
def test_private_names_are_there(name):
    module, _, path = name.partition(":")
    owner = importlib.import_module(module)
    for part in path.split("."):
        owner = getattr(owner, part)


@pytest.mark.parametrize("name", ["strategy._timeout", "strategy._launcher", "_signal_connector"])
def test_private_attributes_of_a_trainer_are_there(trainer, name):
    owner = trainer({}, devices=2, strategy="ddp")
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    assert last in vars(owner)


def test_private_attributes_of_a_module_are_there():
    from lightning.pytorch import LightningModule

    assert "_trainer" in vars(LightningModule())


def test_private_attributes_of_model_parallel_are_there():
    from lightning.pytorch.strategies import ModelParallelStrategy

    made = vars(ModelParallelStrategy())
    assert {"_data_parallel_size", "_tensor_parallel_size", "_timeout", "_launcher"} <= made.keys()


def test_private_attributes_of_parsers_are_there():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--number", type=int | None)
    (action,) = [action for action in parser._actions if action.dest == "number"]
    assert action._typehint == int | None


def test_private_attributes_of_the_bar_are_there():
    from lightning.pytorch.callbacks import TQDMProgressBar

    assert {"_predict_progress_bar", "_test_progress_bar"} <= vars(TQDMProgressBar()).keys()
