"""The README's first screen has the two commands, each a line to paste."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_first_screen_has_exactly_two_set_up_commands():
    first = "\n".join(README.splitlines()[:40])
    commands = re.findall(r"```shell\n(.*?)\n```", first, flags=re.DOTALL)
    assert len(commands) == 2
    assert all(command.startswith("python3 -m venv .venv && ") and "\n" not in command for command in commands)
    assert "score --config configs/lrp.yaml" in commands[0]
    assert "pytest" in commands[1]
