"""The scoring benchmark at toy size: it compares before it times, and prints and keeps what was measured."""

import json

import bench_growth
import bench_scoring
import numpy as np
import pytest
import torch

TOY = ["--hidden", "32", "--intermediate", "48", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--vocab", "60"]
TOY += ["--seq-len", "12", "--prompts", "5", "--prompt-min", "2", "--prompt-max", "6", "--batch-size", "3"]
TOY += ["--repeats", "2"]


def test_figures_are_printed_and_kept(tmp_path, capsys):
    path = tmp_path / "figures.json"
    bench_scoring.main([*TOY, "--json", str(path), "--samples", "2"])
    out, err = capsys.readouterr()
    assert err.count("scores differ by") == len(bench_scoring.WORKS)
    figures = json.loads(path.read_text())
    assert figures.keys() >= {"hardware", "threads", "versions", "commit", "command", "date", "matmul_flops"}
    assert [result["samples"] for result in figures["results"]] == [2, 2, 2, 5, 2]
    for result in figures["results"]:
        assert result["difference"] <= 1e-5
        assert len(result["seconds_plain"]) == len(result["seconds_ours"]) == 2
        assert all(result[key] > 0 for key in ("ratio", "flops", "share_ours", "tokens_per_second_ours"))
        assert f"{result['ratio']:.2f}" in out


def test_the_plain_procedure_may_keep_to_the_targets(capsys):
    bench_scoring.main([*TOY, "--work", "signed", "--plain-layers", "targets"])
    assert capsys.readouterr().err.count("scores differ by") == 1


def test_scores_that_differ_are_not_timed(monkeypatch, capsys):
    right = bench_scoring.PlainGradients.scores
    monkeypatch.setattr(bench_scoring.PlainGradients, "scores", lambda self, name: 1.001 * right(self, name))
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench_scoring.main([*TOY, "--work", "unsigned"])
    assert "1/2: plain" not in capsys.readouterr().err


def test_ours_alone_has_a_row_without_the_plain_procedure(tmp_path, capsys):
    path = tmp_path / "figures.json"
    bench_scoring.main([*TOY, "--work", "weights", "--alone", "7", "--json", str(path)])
    compared, alone = json.loads(path.read_text())["results"]
    assert (compared["samples"], alone["samples"]) == (1, 7)
    assert alone["flops"] == 7 * compared["flops"]
    assert len(alone["seconds_ours"]) == 1
    assert alone["peak_bytes_ours"] > 0
    assert not any("plain" in key or key in ("ratio", "difference") for key in alone)
    assert "- -> " in capsys.readouterr().out


def test_both_explain_the_same_token_and_it_must_be_the_largest(monkeypatch, capsys):
    right = bench_scoring.Ours.add

    def add(self, samples):
        right(self, samples)
        self.targets[2] += 1

    monkeypatch.setattr(bench_scoring.Ours, "add", add)
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench_scoring.main([*TOY, "--work", "prompts"])


@pytest.mark.parametrize(("bound", "status"), [(1.99, 1), (2.01, 0)])
def test_what_grows_faster_than_its_bound_fails(bound, status, monkeypatch, capsys):
    def product(n):
        return lambda: torch.ones(n, n) @ torch.ones(n, 1)

    sizes = {n: lambda n=n: product(n) for n in (8, 16, 64, 65)}
    growth = bench_growth.Growth("a product", sizes, (9.0, 9.0, bound))
    monkeypatch.setattr(bench_growth, "growths", lambda: [growth])
    assert bench_growth.main(["--counts"]) == status
    out = capsys.readouterr().out
    assert "| a product | 8, 16, 64 | " in out
    assert ("2.00 (at most" in out) and ("**above**" in out) == status


def test_the_power_is_the_slope_of_the_logarithms():
    sizes, costs = [1.0, 2.0, 4.0, 8.0], [3.0, 7.0, 19.0, 50.0]
    x, y = np.log(sizes), np.log(costs)
    assert bench_growth.power(sizes, costs) == pytest.approx(np.polyfit(x, y, 1)[0])
