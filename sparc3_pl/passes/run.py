"""A pass: the Trainer, module and data of ``score`` or ``eval``, made from files and options by LightningCLI."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy

from sparc3_pl.data.evaluation_data import EvaluationData
from sparc3_pl.data.reference import ReferenceData
from sparc3_pl.document.needs import Need, refuse_what_cannot_fit, table_of
from sparc3_pl.document.terminal import print_result, print_summary
from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.module import EvaluationModule
from sparc3_pl.evaluation.needs import needs_of as needs_of_evaluation
from sparc3_pl.io.provenance import redacted
from sparc3_pl.io.yaml_format import dump_yaml, load_yaml
from sparc3_pl.model.footprint import skeleton_in_dtype, weight_bytes_by_device
from sparc3_pl.model.loading import models_are_kept
from sparc3_pl.passes.parser import FLAG, OneLineErrors, argument_texts, secrets_left_out
from sparc3_pl.pruning.callback import PruningCallback
from sparc3_pl.pruning.plan import PrunePlan
from sparc3_pl.runtime.memory import free_by_place
from sparc3_pl.runtime.noise import quiet
from sparc3_pl.runtime.processes import is_supervised
from sparc3_pl.runtime.progress import ProgressBar
from sparc3_pl.runtime.run_config import RunConfig
from sparc3_pl.runtime.timing import measuring, table_text, timing
from sparc3_pl.runtime.trainer import Trainer
from sparc3_pl.scoring.module import ScoringModule
from sparc3_pl.scoring.monitor import ScoringMonitor
from sparc3_pl.scoring.needs import needs_of as needs_of_scoring

log = logging.getLogger(__name__)

__all__ = ["PASSES", "Forecast", "Pass", "PassCLI", "check_pass", "forecast_of", "make_pass", "run_pass"]


@dataclass(frozen=True)
class Pass:
    """What a pass consists of; its name is the Trainer's verb for it."""

    module: type[LightningModule]
    data: type[LightningDataModule]
    needs: Callable[[Any, Any, Mapping[str, int | None]], list[Need]]
    """What module and data would take in a process, from what is free by place; loads no weight."""
    callbacks: Sequence[type[Callback]] = ()
    shortcuts: Sequence[str] = ("output", "overwrite")
    """Arguments of the module that may also be given without the ``model.`` prefix."""


DRY_RUN = "Say what would be loaded and how much memory it takes, and refuse what cannot fit; load and run nothing."


PASSES = {
    "score": Pass(
        ScoringModule,
        ReferenceData,
        lambda module, data, free: needs_of_scoring(module.request, module.source, data.batch_size, data.longest),
        (ScoringMonitor,),
        ("output", "overwrite", "checkpoint_every", "part", "shard"),
    ),
    "eval": Pass(
        EvaluationModule,
        EvaluationData,
        needs_of_evaluation,
        (),
        ("output", "overwrite", "allow_overlap"),
    ),
}


class PassParser(OneLineErrors, LightningArgumentParser):
    """Parser of a pass."""


class PassCLI(LightningCLI):
    """LightningCLI for one pass: makes its Trainer, module and data, and does not run it.

    Args:
        name: ``score`` or ``eval``.
        words: The options that follow the command's name.
    """

    def __init__(self, name: str, words: Sequence[str]) -> None:
        self.kind = PASSES[name]
        super().__init__(
            self.kind.module,
            self.kind.data,
            trainer_class=Trainer,
            parser_class=PassParser,
            parser_kwargs={"prog": f"sparc3 {name}", "description": inspect.getdoc(getattr(Trainer, name))},
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(words),
            run=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds no ``seed_everything``: every random choice here has a seed of its own."""

    def _set_seed(self) -> None:
        pass

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses as LightningCLI does, without its warning about arguments that come from a caller."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lets ``--output`` stand for ``--model.output``, and so on."""
        module = self.kind.module
        hints, texts = get_type_hints(module.__init__), argument_texts(module)
        for name in self.kind.shortcuts:
            default = inspect.signature(module).parameters[name].default
            flag = FLAG if hints[name] is bool else {}
            parser.add_argument(f"--{name}", type=hints[name], default=default, help=texts[name], **flag)
            parser.link_arguments(name, f"model.{name}")
        parser.add_argument("--dry_run", type=bool, default=False, help=DRY_RUN, **FLAG)
        parser.add_argument("--plan", type=str | None, default=None, help="Plan that is in force during the pass.")

    def before_instantiate_classes(self) -> None:
        """Adds the pass's own callbacks to the user's."""
        callbacks = [ProgressBar()] if self.config.trainer.enable_progress_bar else []
        callbacks += [callback() for callback in self.kind.callbacks]
        if (path := self.config.get("plan")) is not None:
            plan = PrunePlan.load(path)
            # A later stage of the experiment takes the model as it was; many single weights are not kept for that.
            callbacks.append(PruningCallback(plan, revert=models_are_kept() and not plan.num_weights))
        callbacks.append(RunConfig(self.resolved_config()))
        self.trainer_defaults = {"callbacks": callbacks}

    def instantiate_classes(self) -> None:
        """Makes Trainer, module and data; an ``InputError`` of a class that the user chose is raised as it is.

        jsonargparse tries a value as each class that its key may have, and would report all that failed, as a bug.
        """
        refusals: list[InputError] = []

        def make(kind: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return kind(*args, **kwargs)
            except InputError as error:
                refusals.append(error)
                raise

        self.parser.add_instantiator(make, object)
        try:
            super().instantiate_classes()
        except ValueError:
            if refusals:
                raise refusals[0] from None
            raise

    def resolved_config(self) -> str:
        """The configuration as YAML, without its secrets, which are named in the first lines."""
        settings = redacted(load_yaml(self.parser.dump(self.config, skip_unset=False)))
        secrets = list(secrets_left_out(settings))
        note = "# Secrets are left out; before this file runs it again, give: " + ", ".join(secrets) + "\n"
        return (note if secrets else "") + dump_yaml(settings)


def make_pass(name: str, words: Sequence[str]) -> PassCLI:
    """The Trainer, module and data of ``score`` or ``eval``, without running them.

    Args:
        name: Name of the pass.
        words: Its options, as on a command line.

    Raises:
        InputError: if what the user gave is wrong.
        SystemExit: if the options cannot be parsed, or ask for ``--help`` or ``--print_config``.
    """
    if is_supervised():  # by the command line; Lightning has made itself heard again when it was imported
        quiet()
    return PassCLI(name, words)


class _Unmade(PassCLI):
    """Reads the options, and makes no Trainer, module or data."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def check_pass(name: str, words: Sequence[str]) -> None:
    """Refuses options that ``score`` or ``eval`` would not take: unknown keys, and values of another type.

    Args:
        name: Name of the pass.
        words: Its options, as on a command line.

    Raises:
        SystemExit: if the options cannot be parsed.
    """
    _Unmade(name, words)


@dataclass(frozen=True)
class Forecast:
    """What a process of a pass will take, and what is free.

    Attributes:
        needs: What it takes.
        free: Bytes by place; None: unknown.
        is_spread: Whether the model is spread over devices, and what does not fit on one is put on another.
    """

    needs: list[Need]
    free: dict[str, int | None]
    is_spread: bool = False

    def refuse(self) -> None:
        """Refuses what cannot fit.

        Raises:
            InputError: naming the place and both numbers.
        """
        if not self.is_spread:
            refuse_what_cannot_fit(self.needs, self.free)


def _forecast(cli: PassCLI) -> Forecast:
    module, device = cli.model, cli.trainer.strategy.root_device
    free = free_by_place(device, module.output or ".")
    needs = cli.kind.needs(module, cli.datamodule, free)
    if isinstance(cli.trainer.strategy, ModelParallelStrategy):
        needs = _shared_out(needs, cli.trainer.world_size, cli.trainer.num_devices)
    elif module.source.device_map is not None:
        sizes = weight_bytes_by_device(skeleton_in_dtype(module.source), module.source.device_map)
        weights = next(need for need in needs if need.what == "weights")
        each = [Need("weights", "host" if place == "cpu" else place, size) for place, size in sizes.items()]
        each[0] = replace(each[0], note=f"{weights.note}, spread over {', '.join(sizes)}")
        needs = [*each, *(need for need in needs if need is not weights)]
    return Forecast(needs, free, module.source.device_map is not None)


def _shared_out(needs: Sequence[Need], processes: int, on_a_machine: int) -> list[Need]:
    """The needs of a process that holds its part of a model; before it does, it has loaded the whole on the host."""
    result = [
        replace(need, bytes=-(-need.bytes // processes), note=f"{need.note}; this process's part of {processes}")
        if need.what in ("weights", "sums") and need.bytes is not None
        else need
        for need in needs
    ]
    whole = next(need.bytes for need in needs if need.what == "weights")
    return [*result, Need("loading", "host", whole * on_a_machine, f"for a moment, by {on_a_machine} processes")]


def forecast_of(name: str, words: Sequence[str]) -> Forecast:
    """What ``score`` or ``eval`` with these options will take; loads no weight.

    Args:
        name: Name of the pass.
        words: Its options, as on a command line.

    Raises:
        InputError: if what the user gave is wrong.
        SystemExit: if the options cannot be parsed.
    """
    return _forecast(make_pass(name, words))


def run_pass(name: str, words: Sequence[str]) -> None:
    """Runs ``score`` or ``eval`` in this process; says on stdout where the result is, and what it looks like.

    Args:
        name: Name of the pass.
        words: Its options, as on a command line.

    Raises:
        InputError: if what the user gave is wrong.
        SystemExit: if the options cannot be parsed, or ask for ``--help`` or ``--print_config``.
    """
    with measuring():
        cli = make_pass(name, words)
        module = cli.model
        if cli.config.dry_run:
            if cli.trainer.is_global_zero:
                forecast = _forecast(cli)
                print_result(table_of(forecast.needs, forecast.free))
                forecast.refuse()
            return
        getattr(cli.trainer, name)(module, cli.datamodule)
        if cli.trainer.is_global_zero and (times := timing()) is not None:
            log.info(table_text(times, f"Time of {name}"))
    if isinstance(module, ScoringModule):
        if module.manifest is not None:
            print_summary(module.manifest, Path(module.output))
        elif module.part is not None and module.output is not None:
            print_result(module.output)
