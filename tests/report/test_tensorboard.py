"""What TensorBoard shows of the two passes: the event files are read back."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparc3_pl.cli import main
from sparc3_pl.scores.folder import ScoreFolder

SMALL = ["--data.num_samples", "6", "--data.seq_len", "16", "--data.batch_size", "2"]
ONE_PROCESS = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]


def events(folder: Path) -> EventAccumulator:
    """All that was written below ``folder``."""
    (file,) = folder.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(file), size_guidance={"histograms": 0, "scalars": 0, "tensors": 0, "images": 0})
    return read.Reload()


@pytest.fixture(scope="module")
def score_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    options = ["--output", str(folder / "scores"), "--trainer.default_root_dir", str(folder)]
    assert main(["score", *SMALL, *ONE_PROCESS, *options]) == 0
    return folder


def test_score(score_run):
    read, folder = events(score_run), ScoreFolder.open(score_run / "scores")
    tags = read.Tags()
    wanted = {
        f"score/{name}" for name in ("samples_per_second", "tokens_per_second", "total_relevance", "standard_error")
    }
    assert wanted <= set(tags["scalars"])
    last = read.Scalars("score/total_relevance")[-1]
    assert last.step == 6
    assert last.value == pytest.approx(folder.manifest.total_relevance, rel=1e-5)
    assert set(tags["histograms"]) == {f"score/{layer}" for layer in folder.layers}
    for layer in folder.layers:
        assert read.Histograms(f"score/{layer}")[-1].histogram_value.num == folder.load(layer).numel()
    assert tags["images"] == ["score/relevance_by_layer"]
    assert read.Scalars("score/final_total_relevance")[-1].value == pytest.approx(folder.manifest.total_relevance)
    assert_settings(read, "model/method", "lrp")
    assert_settings(read, "data/seq_len", 16)


def test_eval(tmp_path):
    data = ["--data.num_prompts", "4", "--data.text_max_bytes", "600", "--model.max_new_tokens", "5"]
    options = ["--output", str(tmp_path / "evaluation"), "--trainer.default_root_dir", str(tmp_path)]
    assert main(["eval", *data, *ONE_PROCESS, *options]) == 0
    read = events(tmp_path)
    tags = read.Tags()
    figures = {"eval/perplexity/value", "eval/toxicity/mean", "eval/completions/num_prompts", "eval/running_perplexity"}
    assert figures <= set(tags["scalars"])
    assert read.Scalars("eval/completions/num_prompts")[-1].value == 4
    assert tags["histograms"] == ["eval/toxicity"]
    assert read.Histograms("eval/toxicity")[-1].histogram_value.num == 4
    assert tags["images"] == ["eval/toxicity_of_completions"]
    assert "eval/completions/text_summary" in tags["tensors"]
    assert len(read.Tensors("eval/completions/text_summary")) == 4
    assert all(name.startswith("eval/") for name in tags["scalars"])
    assert_settings(read, "model/max_new_tokens", 5)


def assert_settings(read: EventAccumulator, key: str, value: object) -> None:
    """The table of runs holds the setting."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    held = found[key]
    assert value in (held.number_value, held.string_value)
