"""Fixtures shared by all rooms."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from tiny_models import FAMILIES, tiny

if "PYTEST_XDIST_WORKER" in os.environ:  # test processes share the cores: more threads than cores slow all of them
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def tiny_model(request: pytest.FixtureRequest):
    """A tiny random model of each supported family, float32, in eval mode."""
    return tiny(request.param)


@pytest.fixture(params=FAMILIES)
def tiny_model64(request: pytest.FixtureRequest):
    """The same in float64."""
    return tiny(request.param, dtype=torch.float64)


@pytest.fixture
def tiny_llama():
    """A tiny random Llama, float32, in eval mode."""
    return tiny("llama")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text that SPARC3_REAL_DATA names."""
    folder = os.environ.get("SPARC3_REAL_DATA")
    if not folder:
        pytest.skip("SPARC3_REAL_DATA is not set: it names the folder of real data")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file: SPARC3_SMOLLM2, or where the project's own script puts it."""
    name = os.environ.get("SPARC3_SMOLLM2", "models/SmolLM2-135M-Instruct.Q4_1.gguf")
    if not Path(name).is_file():
        pytest.skip(f"{name} is not there: SPARC3_SMOLLM2 names the GGUF file of SmolLM2-135M-Instruct")
    return Path(name).resolve()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Real processes, forked from one that has imported everything."""
    with Ranks(tmp_path_factory.mktemp("ranks")) as started:
        yield started
