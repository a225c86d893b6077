"""Standard streams that are closed, gone or full: a program ends with the code of its work."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import logging, os, sys
from pretrain.runtime.logging import set_up_logging
from pretrain.runtime.terminal import guard_streams

guard_streams()
set_up_logging(0)
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2, "a file in the place of a stream gets what is printed"
    input_gone = os.environ.get("WAIT")
    if input_gone:
        sys.stdin.read()
    for _ in range(3):
        print("x" * 100_000, flush=True)
        print("Größe", file=sys.stderr)
        logging.getLogger("a").warning("Größe")
    os.write(2, b"from C")
    file.write("done")
guard_streams()
"""


@pytest.mark.parametrize(
    "words", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "| true", "> /dev/full", "2> /dev/full", "> /dev/full 2>&1"]
)
def test_a_lost_stream_changes_nothing(words: str, tmp_path: Path) -> None:
    # Of a pipe the status of the program, not of its reader.
    words, piped = (words, "") if "|" not in words else ("", words)
    line = f'"{sys.executable}" -c "$PROGRAM" "{tmp_path / "out"}" {words} {piped}; exit ${{PIPESTATUS[0]}}'
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PROGRAM": PROGRAM}
    done = subprocess.run(["bash", "-c", line], env=environ, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out").read_text() == "done"


def test_a_terminal_that_is_closed_changes_nothing(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT), "WAIT": "1"},
    )
    os.close(theirs)
    os.close(ours)
    process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "out").read_text() == "done"


def test_a_locale_without_umlauts_shows_them_in_another_way(tmp_path: Path) -> None:
    environ = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("Größe", "Gr\\u00f6\\u00dfe"), str(tmp_path / "out")],
        env={**os.environ, **environ},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and rb"Gr\xf6\xdfe" in done.stderr


def test_names_that_are_no_text_are_printed_and_logged(tmp_path: Path) -> None:
    """Of files on disks of old systems, and umlauts where the terminal has none."""
    program = (
        "import logging, sys; from pathlib import Path; from pretrain.runtime.logging import set_up_logging; "
        "from pretrain.runtime.terminal import take_any_name; take_any_name(); set_up_logging(0, Path(sys.argv[1])); "
        "print('caf\\udce9', 'Größe'); logging.getLogger('a').info('caf\\udce9 %s', 'Größe')"
    )
    environ = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == "caf\\udce9 Gr\\xf6\\xdfe\n" and "Traceback" not in done.stderr
    assert "caf\\udce9 Größe" in (tmp_path / "rank_00000.log").read_text(encoding="utf-8")
