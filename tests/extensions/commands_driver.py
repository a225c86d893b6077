"""Commands of launch/ in one process: commands_driver.py PLAN.json, in the root of a copy of the checkout.

The plan is a list of [module, words]. What came of each is printed as a JSON line: exit code, and all that it printed.
"""

import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())


def run(module: str, words: list[str]) -> tuple[int, str]:
    """Run one command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = importlib.import_module(module).main(words)
    return code, printed.getvalue()


if __name__ == "__main__":
    results = [run(*entry) for entry in json.loads(Path(sys.argv[1]).read_text())]
    print("RESULTS " + json.dumps(results), flush=True)
