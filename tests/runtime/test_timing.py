"""The clock against sleeps of known length, and what a stage says it was held by."""

import time

import pytest
import torch
from tiny_models import tiny

from sparc3_pl.io.formats import to_json
from sparc3_pl.model.size import decoder_flops, head_flops
from sparc3_pl.model.structure import linear_layers, output_head
from sparc3_pl.runtime import timing as clocks
from sparc3_pl.runtime.timing import Stage, current, measuring, rows_of_results, table_text, timed, timing


def test_a_stage_inside_another_stops_its_time():
    with measuring() as clock:
        time.sleep(0.02)
        for _ in range(2):
            with timed("outer"):
                time.sleep(0.02)
                with timed("inner"):
                    time.sleep(0.05)
    seconds = {name: one.seconds for name, one in clock.stages.items()}
    assert seconds["outer"] == pytest.approx(0.04, abs=0.02)
    assert seconds["inner"] == pytest.approx(0.1, abs=0.03)
    assert clock.rest >= 0.02
    assert clock.stages["outer"].peak_bytes > 1e6


def test_an_exception_ends_a_stage_and_a_clock():
    with pytest.raises(RuntimeError), measuring() as clock, timed("one"):
        raise RuntimeError
    assert clock.innermost is not clock.stages["one"]
    assert timing() is None


def test_without_a_clock_nothing_is_kept():
    with timed("one") as now:
        now.did(tokens=3)
        current().did(tokens=3)
        assert now.tokens == 3
    assert timing() is None


def test_what_was_done_is_told_beside_the_measured_rate(monkeypatch):
    monkeypatch.setattr(clocks, "_matrix_rate", lambda device, dtype: 1e6)
    with measuring() as clock:
        with timed("fast"):
            current().did(samples=2, like=torch.zeros(2))
            current().did(tokens=10, padded=5, flops=5e4, passes=1)
            time.sleep(0.06)
        with timed("slow") as now:
            now.did(tokens=900, padded=100, flops=1e4, passes=1)
            time.sleep(0.05)
        clock.stages["fast"].seconds, clock.stages["slow"].seconds = 0.1, 0.1
        measured = timing()
    fast, slow, other = measured.stages
    assert measured.matrix_flops == 1e6
    assert (fast.tokens_per_second, fast.share, fast.samples) == (100, 0.5, 2)
    assert "held_by" not in to_json(fast)
    assert slow.share == 0.1
    assert slow.held_by == "padding (10%)"
    assert other.stage == "other"
    lines = table_text(measured, "Time of eval").splitlines()
    assert lines[0].startswith("Time of eval; share: of 0 GFLOP/s")
    assert [line.split()[0] for line in lines[1:]] == ["stage", "fast", "slow", "other"]
    assert "50%" in lines[2]
    rows = rows_of_results({"a": measured, "b": None})
    assert [row.stage for row in rows] == ["a: fast", "a: slow", "a: other"]


def test_what_a_slow_stage_was_held_by():
    assert Stage(seconds=1, tokens=100, sampling=0.4, padded=20).held_by() == "sampling (40%)"
    assert Stage(seconds=1, tokens=60, padded=40, sampling=0.1).held_by() == "padding (40%)"
    few = Stage(seconds=1)
    for _ in range(10):
        few.did(tokens=8, passes=1)
    assert few.held_by().startswith("8 tokens per pass")
    assert Stage(seconds=1, tokens=1000, rows=1000, passes=1).held_by().startswith("work that is no product")


def test_operations_of_a_model_are_those_of_its_matrices():
    model = tiny("llama")
    head = output_head(model)[1]
    matrices = sum(layer.weight.numel() for layer in linear_layers(model).values() if layer is not head)
    vectors = sum(p.numel() for p in model.get_decoder().parameters() if p.dim() == 1)  # biases and norms
    assert decoder_flops(model) == 2 * (matrices + vectors)
    assert head_flops(model) == 2 * 32 * 50


def test_the_rate_is_of_the_size_of_the_machines():
    assert 1e8 < clocks._matrix_rate(torch.device("cpu"), torch.float32) < 1e14
