"""Commands of a guide, line by line in this process: guide_program.py LINES.json, in the folder that they are run in.

Starting a process for each would take longer than what they do. LINES is a list of command lines without "python" or
"deepspeed"; the exit code of each is printed as a line of JSON, beside what the command itself prints.
"""

import importlib
import json
import re
import sys
from pathlib import Path

from pretrain.runtime import process_group


def run(words: list[str]) -> int:
    """Run one command; `step_…` is the newest that there is."""
    script = Path(words[0]).stem
    package = "finetune" if script in ("finetune", "evaluate", "predict", "export", "segment") else "pretrain"
    main = importlib.import_module(f"{package}.commands.{script}").main
    return int(main([found(word) for word in words[1:]]))


def found(word: str) -> str:
    """Put the folder of the checkpoint that was tested in the place of the guide's."""
    parts = re.fullmatch(r"(.*)/step_\d+(/.*)", word)
    return f"{max(Path(parts[1]).glob('step_*'))}{parts[2]}" if parts else word


if __name__ == "__main__":
    # DeepSpeed keeps groups of the first process group and would ask them after another had taken its place.
    process_group.leave = lambda ranks: None
    for line in json.loads(Path(sys.argv[1]).read_text()):
        print("RUN " + json.dumps(line), flush=True)
        code = run(line)
        print(f"CODE {code}", flush=True)
        if code:
            sys.exit(code)
