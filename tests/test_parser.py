"""Parsers: what an error names, and what parsers that run one inside or after another know of each other."""

import pytest
from jsonargparse import ActionConfigFile, ArgumentParser

from sparc3_pl.experiment.stages import Settings
from sparc3_pl.passes.parser import FunctionParser, OneLineErrors, function_parser


def work(folder: str, names: list[str] | None = None, number: int = 1, again: bool = False) -> None:
    """Do some work.

    Args:
        folder: Where
            it is.
        names: Several.
        number: A number.
        again: Once more.
    """


class Box:
    """Holds a size."""

    def __init__(self, size: int = 1) -> None:
        self.size = size


@pytest.fixture
def parser():
    return function_parser(work, "sparc3 work")


def error_of(parser, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_arguments_of_a_function_are_options(parser):
    given = parser.parse_args(["--folder", "a", "--names", "b", "c", "--again"]).as_dict()
    assert given == {"config": None, "folder": "a", "names": ["b", "c"], "number": 1, "again": True}
    assert "Where it is. (required, type: str)" in parser.format_help()


JUDGE = "{class_path: sparc3_pl.evaluation.judges.DetoxifyJudge, init_args: {checkpoint: a.ckpt}}"


def experiment(completions: Settings | None = None, arms: dict[str, Settings | None] | None = None) -> None:
    """Settings in sections."""


@pytest.mark.parametrize("option", ["--completions.model.judge", "--completions.model", "--completions"])
def test_a_class_within_settings_stays_a_setting(option, tmp_path):
    """It is for the stage that takes it; here nothing is made of it, and it is written as it was given."""
    parser, place = function_parser(experiment, "sparc3 experiment"), option.split(".")[1:]
    judge = {"class_path": "sparc3_pl.evaluation.judges.DetoxifyJudge", "init_args": {"checkpoint": "a.ckpt"}}
    value = {2: JUDGE, 1: f"{{judge: {JUDGE}}}", 0: f"{{model: {{judge: {JUDGE}}}}}"}[len(place)]
    (tmp_path / "x.yaml").write_text(f"completions: {{model: {{judge: {JUDGE}}}}}")
    for words in ([option, value], [f"{option}={value}"], ["--config", str(tmp_path / "x.yaml")]):
        assert vars(parser.instantiate(parser.parse_args(words)))["completions"] == {"model": {"judge": judge}}


def test_keys_deep_within_settings_change_what_the_file_says(tmp_path, capsys):
    parser = function_parser(experiment, "sparc3 experiment")
    (tmp_path / "x.yaml").write_text("completions: {model: {seed: 1, top_p: 0.5}}\narms: {lrp: {score: {method: lrp}}}")
    words = ["--config", str(tmp_path / "x.yaml"), "--completions.model.seed", "2", "--completions.data.source=a.txt"]
    result = parser.parse_args([*words, "--arms.wanda.score.method", "wanda"])
    assert result.completions == {"model": {"seed": 2, "top_p": 0.5}, "data": {"source": "a.txt"}}
    assert result.arms == {"lrp": {"score": {"method": "lrp"}}, "wanda": {"score": {"method": "wanda"}}}
    assert "expected a value for --completions.model.seed" in error_of(parser, ["--completions.model.seed"], capsys)
    assert "is no YAML" in error_of(parser, ["--completions.model.seed", "{a: [}"], capsys)


@pytest.mark.parametrize("option", ["--config=", "--config ", "-c ", "-c"])
def test_an_error_names_the_file_however_it_was_given(parser, option, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("folder: a\nnumber: many\n")
    words = f"{option}{tmp_path / 'x.yaml'}".split(" ")
    assert f"(in {tmp_path / 'x.yaml'})" in error_of(parser, words, capsys)


def test_an_error_names_no_file_of_an_earlier_run(parser, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("folder: a\nnumber: 2\n")
    assert parser.parse_args(["--config", str(tmp_path / "x.yaml")]).number == 2
    assert "x.yaml" not in error_of(parser, ["--folder", "a", "--number", "many"], capsys)


def test_a_run_before_the_error_does_not_hide_the_file(parser, tmp_path, capsys):
    """Another parser is made and used between the making of a parser and its use."""
    (tmp_path / "x.yaml").write_text("folder: a\nnumber: many\n")
    function_parser(work, "sparc3 other").parse_args(["--folder", "a"])
    assert "x.yaml" in error_of(parser, ["--config", str(tmp_path / "x.yaml")], capsys)


def test_the_nearest_key_is_named(parser, capsys):
    assert "did you mean folder?" in error_of(parser, ["--foldr", "a"], capsys)
    assert "did you mean number?" in error_of(parser, ["--folder", "a", "--numbr=2"], capsys)


def test_a_misspelt_key_of_a_group_in_a_file_is_named_with_its_group(tmp_path, capsys):
    parser = FunctionParser()
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_class_arguments(Box, "box")
    (tmp_path / "x.yaml").write_text("box:\n  sise: 3\n")
    error = error_of(parser, ["-c", str(tmp_path / "x.yaml")], capsys)
    assert "'box.sise'" in error
    assert "x.yaml" in error
    assert "did you mean box.size?" in error


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("boxx: {}", "boxx"),
        ("box: {sise: {}}", "box.sise"),
        ("box: {a: {b: {}}}", "box.a.b"),
        ("held: {class_path: test_parser.Box, init_args: {sise: {}}}", "sise"),
        ("size: {}", None),
    ],
)
def test_an_unknown_key_that_holds_nothing_is_refused_as_any_other(tmp_path, capsys, text, key):
    parser = FunctionParser()
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_class_arguments(Box, "box")
    parser.add_argument("--size", type=Settings | None)
    parser.add_argument("--held", type=Box | None)
    (tmp_path / "x.yaml").write_text(text)
    words = ["-c", str(tmp_path / "x.yaml")]
    if key is None:  # a key whose value may be an empty mapping
        assert parser.parse_args(words).size == {}
    else:
        error = error_of(parser, words, capsys)
        assert f"there is no key '{key}'" in error
        assert f"(in {tmp_path / 'x.yaml'})" in error


@pytest.fixture
def linked():
    """A parser of a pass in small: ``--size`` stands for ``--box.size``."""
    parser = FunctionParser()
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_class_arguments(Box, "box")
    parser.add_argument("--size", type=int | None, default=1)
    parser.link_arguments("size", "box.size")
    return parser


@pytest.mark.parametrize("words", [["--size", "3"], ["--box.size", "3"], ["--box.size=3"], ["-c", "box: {size: 3}"]])
def test_a_key_may_be_given_with_its_section_and_without(linked, words, tmp_path):
    if words[0] == "-c":
        (tmp_path / "x.yaml").write_text(words[1])
        words = ["-c", str(tmp_path / "x.yaml")]
    given = linked.parse_args(words)
    assert (given.size, given.box.size) == (3, 3)


def test_a_later_option_wins_over_a_file_that_names_the_section(linked, tmp_path):
    (tmp_path / "x.yaml").write_text("box: {size: 3}")
    assert linked.parse_args(["-c", str(tmp_path / "x.yaml"), "--size", "4"]).box.size == 4


def test_a_key_given_twice_or_in_a_file_of_the_section_is_refused(linked, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("box: {size: 3}\nsize: 4\n")
    error = error_of(linked, ["-c", str(tmp_path / "x.yaml")], capsys)
    assert '"box.size": is 3, but size is 4; give only one' in error and "x.yaml" in error
    assert '"box.size" is given as "size"' in error_of(linked, ["--box", '{"size": 3}'], capsys)


def test_the_mixin_does_for_any_parser(capsys):
    class Plain(OneLineErrors, ArgumentParser):
        pass

    parser = Plain()
    parser.add_argument("--size", type=int, default=1)
    assert error_of(parser, ["--size", "null"], capsys).count("\n") == 1
