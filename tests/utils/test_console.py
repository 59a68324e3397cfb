"""Text that others chose is text: it commands neither the terminal nor rich, and is no formula in a figure."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_patch.cli.command_line import run_tool
from megatron_patch.errors import DataError
from megatron_patch.utils.console import for_terminal, labeled, make_console, one_line, print_line, print_lines, shell_word, visible
from megatron_patch.utils.figures import legend_label, save_figure
from megatron_patch.utils.spelling import accept_all_text
from megatron_patch.utils.tables import FittingTable

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "a\x1b]52;c;Y3VybA==\x07b\x1b[2J\x9b31m\r\x08[bold]c[/bold][link=http://evil]d[/link]:warning:\u202egnp\udcff"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def commands(text: str) -> list[str]:
    """Returns the characters that a terminal obeys, and those that no output accepts."""
    return [char for char in text if (unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n") or char in "\u202e\u2066"]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("stderr", [True, False])
def test_a_console_prints_text_and_no_commands(monkeypatch, terminal, stderr):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr" if stderr else "stdout", out)
    console = make_console(width=400, stderr=stderr)
    console.print(HOSTILE, soft_wrap=True)
    console.print(labeled("label", HOSTILE), soft_wrap=True)
    console.print(Text(HOSTILE), HOSTILE, style="bold", soft_wrap=True)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    with Live(Text(HOSTILE), console=console, auto_refresh=False):
        pass
    print_line(HOSTILE, stderr=stderr)
    print_lines(HOSTILE, stderr=stderr)
    text = out.getvalue()
    assert not commands(text)
    assert text.count("[link=http://evil]d[/link]:warning:") >= 5 and text.count("a\\x1b]52;c;Y3VybA==") >= 5 and "\\udcff" in text
    text.encode()


def test_a_live_console_may_still_move_the_cursor(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    console = make_console()
    with Live("one\ntwo", console=console, auto_refresh=False) as live:
        live.update("three", refresh=True)
    assert "\x1b[" in sys.stdout.getvalue()


def test_ordinary_text_stays_as_it_is():
    text = "a\tb\nnaïve café 漢字 שלום עולם 🙂 \u200d λ/K"
    assert visible(text) == text and not any(visible(chr(code)) == chr(code) for code in (0, 7, 8, 13, 27, 127, 0x85, 0x9B, 0xDC80))


def test_a_name_with_line_ends_stays_on_its_line(monkeypatch):
    name = "a\nexit code 0: done\r\u2028b\tc"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print_line(name)
    make_console().print(labeled("Data", name))
    assert one_line(name) == "a\\nexit code 0: done\\r\\u2028b\\tc"
    assert sys.stdout.getvalue() == f"{one_line(name)}\nData {one_line(name)}\n"


def test_a_line_end_in_an_error_begins_no_line_of_its_own():
    error = DataError("a\nexit code 0: done does not exist", "b\nc", "d")
    assert str(error) == "a\n    exit code 0: done does not exist\n  Allowed: b\n    c\n  What to do: d"


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", "lambda/K x 2 ... - \\u6f22 \\xe9 #"), ("latin-1", "lambda/K × 2 ... · \\u6f22 é #")]
)
def test_an_output_without_a_code_for_a_character_gets_another_spelling(monkeypatch, encoding, expected):
    """Also a table, whose lines are then dashes and bars; a live view; print() of other code."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    out.isatty = lambda: True
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", out)
    text = "λ/K × 2 … · 漢 é █"
    table = FittingTable("λ", ["name"])
    table.add_row(text)
    make_console().print(text, table)
    with Live(Text(text), console=make_console(), auto_refresh=False):
        pass
    print_line(text)
    accept_all_text()
    print(text)
    written = raw.getvalue().decode(encoding)
    assert written.count(expected) >= 5 and "+---" in written


def test_narrow_consoles_get_whole_values():
    table = FittingTable("Stages", ["stage", "tokens per step", "path"], left=["stage"], folded=["path"])
    table.add_row("patch", "1,234,567", "data/web_text_document")
    table.add_section()
    table.add_row("run\n[/b]", "89", "data/code_text_document")

    def lines(width: int) -> list[str]:
        console = make_console(width)
        with console.capture() as captured:
            console.print(table)
        return [line.rstrip() for line in captured.get().splitlines()]

    for width in (120, 60, 53, 45, 40, 36):
        assert max(map(len, lines(width))) <= width
        text = "".join(lines(width))
        assert "…" not in text and all(value in text for value in ("1,234,567", "89", "run\\n[/b]", "stage", "tokens per step"))
    assert len(lines(120)) == 8 and lines(120)[2].startswith("┃ stage ")
    assert sum("┏" in line for line in lines(40)) == 2, "two tables that share the columns"
    assert any(line.startswith("│ tokens per step │ ") for line in lines(36)), "as a list"


def prints(source: Path) -> list[str]:
    """Returns the calls in a file that may print other text than `print_line` and the consoles of `make_console` do."""
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name, words = ast.unparse(node.func), node.args
        harmless = all(isinstance(word, ast.Constant) or ast.unparse(word).startswith(("json.dumps(", "for_terminal(")) for word in words)
        # tools/generate.py chooses between the two.
        harmless |= all("json.dumps(" in ast.unparse(word) and " else for_terminal(" in ast.unparse(word) for word in words)
        if (name == "print" and not harmless) or name in (
            "Console",
            "rich.print",
            "rich.get_console",
            "sys.stdout.write",
            "sys.stderr.write",
        ):
            found.append(ast.unparse(node))
        # A console on which brackets are markup, or a text that is made from markup.
        markup = any(keyword.arg == "markup" and ast.unparse(keyword.value) != "False" for keyword in node.keywords)
        if markup or name.endswith(("Text.from_markup", "Text.from_ansi")):
            found.append(ast.unparse(node))
    return found


def test_whatever_is_printed_goes_through_the_functions_that_are_tested_here():
    programs = [ROOT / "pretrain_gpt_patch.py", *(path for folder in ("tools", "examples") for path in (ROOT / folder).rglob("*.py"))]
    # The console itself; its callback of that name; programs that run before the package can be imported, or print only their own text; a
    # table that becomes a part of an error.
    own = {"console.py", "__main__.py", "package_check.py", "gather_corpus.py", "compare_studies.py", "problems.py", "program.py"}
    callbacks = ROOT / "megatron_patch" / "training" / "callbacks" / "__init__.py"
    for source in [*programs, *(ROOT / "megatron_patch").rglob("*.py")]:
        calls = [call for call in prints(source) if source != callbacks or not call.startswith("Console(logging.log_interval")]
        assert not calls or source.name in own, f"{source}: {calls}"


def test_no_text_is_markup_in_any_program():
    """Neither `rich.markup`, nor a console of the benchmarks on which brackets are markup."""
    for source in [
        *(ROOT / "megatron_patch").rglob("*.py"),
        *(path for name in ("tools", "examples", "benchmarks") for path in (ROOT / name).rglob("*.py")),
    ]:
        text = source.read_text()
        assert "rich.markup" not in text and "from_markup" not in text, source
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Console"]
        named = "from rich.console import Console\n" in text or "from rich.console import Console," in text
        assert not named or all("markup=False" in ast.unparse(call) for call in calls), source


@pytest.mark.parametrize("terminal", [True, False])
def test_generated_text_is_changed_for_terminals_only(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stdout", Terminal() if terminal else io.StringIO())
    assert for_terminal("\x1b[2J") == ("\\x1b[2J" if terminal else "\x1b[2J")


def test_the_errors_of_tools_are_text(monkeypatch, capsys):
    def fail(argv):
        raise DataError(f"{HOSTILE} is missing", HOSTILE, HOSTILE)

    assert run_tool(fail) == 3
    assert not commands(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["$x^2$ \\frac{", "$", "_hidden", HOSTILE])
def test_names_in_figures_are_no_formulas(tmp_path, name):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots()
    axis.plot([1, 2], [1, 2], label=legend_label(name))
    axis.set_xlabel(name)
    legend = axis.legend()
    figure.suptitle(name)
    save_figure(figure, Path(tmp_path / "figure.png"))
    plt.close(figure)
    (label,) = legend.get_texts()
    assert label.get_text().strip() == visible(name).strip() and not label.get_parse_math()


@pytest.mark.parametrize("name", ["run", "my run", "it's", "a\x1b[31m'b\\c\n\t", "d\u202ee\x85\U0001f600"])
def test_a_command_to_copy_means_the_name_it_shows(name):
    """In single quotes, the escapes of hidden characters would be other names."""
    word = shell_word(name)
    assert one_line(word) == word
    words = ["bash", "-c", f"printf %s {word}"]
    assert subprocess.run(words, env={"LC_ALL": "C.UTF-8"}, capture_output=True, check=True).stdout == name.encode()
