"""Several runs in one set of processes: [deepspeed] driver.py PLAN.json, in the root of a copy of the checkout.

The plan is a list of {"program", "recipe", "overrides"}. Exit codes of the runs are printed as a JSON line.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())


def run(entry: dict) -> int:
    """Train one recipe, and test it where its task tests."""
    from finetune.recipe import PROGRAMS
    from pretrain.engine.loop import train
    from pretrain.objectives.base import method_of, problems_of
    from pretrain.plan.dry_run import dry_run
    from pretrain.plan.trace import trace_step
    from pretrain.recipe.load import load_recipe
    from pretrain.runtime.process_group import join

    method = method_of(load_recipe(entry["recipe"], entry["overrides"], PROGRAMS[entry["program"]]))
    problems = problems_of(method)
    assert problems == [], problems
    assert dry_run(method) and trace_step(method, method.recipe.batch.micro).forward_flops > 0
    code = train(method)
    method.test(join())
    return code


if __name__ == "__main__":
    from pretrain.runtime.process_group import join

    join()
    plan = next(word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    codes = [run(entry) for entry in json.loads(Path(plan).read_text())]
    if os.environ.get("RANK", "0") == "0":
        print("CODES " + json.dumps(codes), flush=True)
