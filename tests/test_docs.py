"""The documentation: every command runs, or at least parses; links lead somewhere; the reference is up to date.

In README.md and docs/, what stands in a ``shell`` block is run, in a folder of the page's own and in the order of the
page, each command in this process. What a test cannot have is said in a comment before the block, visible in the
source: ``<!-- needs: hub -->``; then every command in it must parse. Evaluations and experiments are made smaller.

A ``text`` block behind a ``shell`` block is what the commands print: every line must be among what they printed, to
2 % of each number. ``<!-- file: NAME -->`` before a block puts it into the folder. ``python`` blocks are run.
"""

import ast
import importlib.util
import io
import math
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sparc3_pl.cli import execute

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NEEDS = ("hub", "network", "cluster", "gpus", "real model", "time", "browser")
"""What a block may say that it needs and a test does not have."""
SET_UP = (("python3", "-m", "venv"), (".venv/bin/pip",), (".venv/bin/pytest",), ("source", ".venv/bin/activate"))
"""The README's set-up, which CI runs in a fresh environment."""
HARMLESS = ("cat", "cp", "head", "ls", "mkdir")
SERVERS = ("curl", "llama-perplexity", "llama-quantize", "llama-server", "lm-eval", "vllm")
ELSEWHERE = ("export", "hf", "pip", "python", "rsync", "tensorboard", "unset", *SERVERS, *HARMLESS)
"""Programs that a marked block may call besides our own and ``sbatch``; they are not run."""

ONE_PROCESS = [
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
]
SMALLER = {
    "score": ONE_PROCESS,
    "eval": [
        *ONE_PROCESS,
        *("--data.num_prompts", "8", "--model.max_new_tokens", "8", "--data.text_max_bytes", "3000"),
    ],
    "elicit": [
        *("--data.num_prompts", "64", "--model.max_new_tokens", "16"),
        *("--trainer", "{accelerator: cpu, devices: 1, enable_progress_bar: false}"),
    ],
    "run": [
        *("--seeds", "[0, 1]", "--counts", "null", "--controls", "[random]", "--general.num_samples", "8"),
        *("--behaviour.num_samples", "8", "--eval_data.num_prompts", "4", "--eval_data.text_max_bytes"),
        *("2000", "--eval_model.max_new_tokens", "4"),
    ],
}
"""What is added to a command so that it takes a second."""


@dataclass
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    marks: dict[str, str]
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def needs(self) -> list[str]:
        return [need.strip() for need in self.marks["needs"].split(",")] if "needs" in self.marks else []

    def commands(self) -> Iterator[list[str]]:
        """Words of each command; lines may go on after a backslash, and commands be joined by ``&&``.

        A variable is set on a line of its own (``NAME='value'``) and used as a whole word (``"$NAME"``).
        """
        values: dict[str, str] = {}
        for line in self.text.replace("\\\n", " ").splitlines():
            words = [values.get(word, word) for word in shlex.split(line, comments=True)]
            if len(words) == 1 and (variable := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
                values[f"${variable[1]}"] = variable[2]
                continue
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            if words:
                yield words


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, with the marks in the comments right before them."""
    found: list[Block] = []
    marks: dict[str, str] = {}
    is_open = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            if not is_open:
                found.append(Block(page, number, line[3:].strip(), marks))
            marks, is_open = {}, not is_open
        elif is_open:
            found[-1].lines.append(line)
        elif mark := re.fullmatch(r"<!-- (\w+): (.+) -->", line):
            marks[mark[1]] = mark[2]
        elif line.strip():
            marks = {}
    assert not is_open, f"{page}: a fenced block is not closed"
    return found


def arguments(words: list[str]) -> list[str] | None:
    """What follows our own program's name; None for another program."""
    if words[0] == "sparc3":
        return words[1:]
    python = words[0] in ("python", "python3", ".venv/bin/python")
    return words[3:] if python and words[1:3] == ["-m", "sparc3_pl.cli"] else None


# --- what can be run --------------------------------------------------------------------------------------------------


def runnable(page: Path) -> bool:
    return any(block.language in ("shell", "python") for block in blocks_of(page))


@pytest.mark.parametrize("page", filter(runnable, PAGES), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.syspath_prepend(tmp_path)  # for classes that a page writes down
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    printed = ""
    for block in blocks_of(page):
        assert set(block.needs) <= set(NEEDS), f"{block.place}: needs {block.needs}; known are {NEEDS}"
        try:
            printed = use(block, printed, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error


def use(block: Block, printed: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs, parses, writes or compares a block; what a shell block printed."""
    if "file" in block.marks:
        Path(block.marks["file"]).write_text(block.text, encoding="utf-8")
    elif block.language == "shell" and block.needs:
        for words in block.commands():
            parse(words)
    elif block.language == "shell":
        with redirect_stdout(io.StringIO()) as out:
            for words in block.commands():
                run(words, monkeypatch)
        return out.getvalue()
    elif block.language == "python" and not block.needs:
        exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
    elif block.language == "text" and printed:
        compare(block, printed)
    return ""


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command: ours in this process, set-up not at all, and nothing that is not known."""
    ours = arguments(words)
    if ours is not None and ours[-1] == "--print_config":
        parses(ours[:-1])
    elif ours is not None:
        execute([*ours, *SMALLER.get(ours[0], [])])
    elif words[0] == "export":
        monkeypatch.setenv(*words[1].split("=", 1))
    elif words[0] in HARMLESS:
        subprocess.run(words, check=True, capture_output=True)
    else:
        is_set_up = any(tuple(words[: len(known)]) == known for known in SET_UP)
        assert is_set_up, f"{shlex.join(words)} cannot be run by a test; mark the block with <!-- needs: ... -->"


def parse(words: list[str]) -> None:
    """Checks a command that cannot be run here."""
    ours = arguments(words)
    if ours is not None:
        parses(ours)
    elif words[0] == "sbatch":
        for called in calls_of(words[1:]):
            parses(called)
    elif words[0] in ELSEWHERE:
        script = next((word for word in words if word.startswith("scripts/")), None)
        assert script is None or Path(script).is_file(), f"{script} does not exist"
    else:
        raise AssertionError(f"{words[0]}: this program is not known to the test")


def parses(ours: list[str]) -> None:
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        execute([*ours, "--print_config"])
    assert stop.value.code == 0, f"{shlex.join(ours)} does not parse"
    assert out.getvalue()


def calls_of(script: list[str]) -> list[list[str]]:
    """The arguments of each call of ours in a job script, which is run with programs that only write down."""
    fake = Path("fake")
    fake.mkdir(exist_ok=True)
    calls = fake / "calls"
    calls.write_text("")
    (fake / "srun").write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    (fake / "python").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" END >> {shlex.quote(str(calls.absolute()))}\n')
    for program in ("srun", "python"):
        (fake / program).chmod(0o755)
    environment = os.environ | {"PATH": f"{fake.absolute()}:{os.environ['PATH']}"}
    subprocess.run(["bash", *script], check=True, env=environment)
    found = [call.split("\n") for call in calls.read_text().strip().removesuffix("END").strip("\n").split("\nEND\n")]
    ours = [call[call.index("sparc3_pl.cli") + 1 :] for call in found if "sparc3_pl.cli" in call]
    assert ours, f"{script[0]} calls no command of ours"
    return ours


def compare(block: Block, printed: str) -> None:
    """Every line of the block is among the printed ones, to 2 % of each number."""
    lines = [line.split() for line in printed.splitlines()]
    for line in block.lines:
        words = line.split()
        if words and not any(same(words, other) for other in lines):
            raise AssertionError(f"not printed: {line!r}. Printed was:\n{printed}")


def same(one: list[str], other: list[str]) -> bool:
    return len(one) == len(other) and all(map(alike, one, other))


def alike(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        pair = [float(word.rstrip("%,").replace(",", "")) for word in (one, other)]
    except ValueError:
        return set(one) <= set("━┏┳┓┡╇┩└┴┘─│┃")  # borders follow the widths of the numbers
    return math.isclose(*pair, rel_tol=0.02)


# --- what can be read -------------------------------------------------------------------------------------------------


def heading_anchors(page: Path) -> set[str]:
    """As hosts of Markdown make them: lower case, no punctuation, hyphens for spaces."""
    anchors, is_open = set(), False
    for line in page.read_text(encoding="utf-8").splitlines():
        is_open ^= line.startswith("```")
        if not is_open and (heading := re.match(r"#+ (.+)", line)):
            anchors.add(re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target} does not exist"
        assert not anchor or anchor in heading_anchors(path), f"{page.name}: no heading for {target}"


def test_every_page_is_reachable():
    """From the documentation's index, by links."""
    seen, todo = {ROOT / "README.md"}, [ROOT / "docs" / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
        todo += [(page.parent / link).resolve() for link in links if ":" not in link]
    assert not set(PAGES) - seen, "pages that nothing leads to; list them in docs/README.md"


def test_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("build_reference", ROOT / "scripts" / "build_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == module.reference(), "run python scripts/build_reference.py"


def texts_of_program() -> list[str]:
    """Every text in the program's source, with ``...`` for what is filled in."""
    found = []
    for path in (ROOT / "sparc3_pl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_in_troubleshooting_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    texts = texts_of_program()
    messages = re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)
    assert len(messages) >= 25
    patterns = {m: re.compile(".*".join(map(re.escape, m.split("..."))), flags=re.DOTALL) for m in messages}
    assert not [m for m, pattern in patterns.items() if not any(map(pattern.search, texts))]
