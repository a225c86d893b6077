"""Several runs in one set of processes: [deepspeed] driver.py PLAN.json, in the root of a copy of the checkout.

The plan is a list of {"program", "recipe", "overrides", "planned"}; the last is whether it is planned, too. What each
run ended with, [exit code, scores of its test] or an error, is printed as a JSON line.
"""

import json
import os
import sys

sys.path.insert(0, os.getcwd())


def run(entry: dict) -> list | str:
    """Train one recipe, plan it before, and test it where its method tests."""
    from finetune.recipe import PROGRAMS
    from pretrain.engine.loop import train
    from pretrain.errors import TubeletError
    from pretrain.objectives.base import method_of, problems_of
    from pretrain.plan.dry_run import dry_run
    from pretrain.plan.trace import trace_step
    from pretrain.recipe.load import load_recipe
    from pretrain.runtime.process_group import join

    method = method_of(load_recipe(entry["recipe"], entry["overrides"], PROGRAMS[entry["program"]]))
    problems = problems_of(method)
    assert problems == [], problems
    if entry["planned"]:
        assert dry_run(method) and trace_step(method, method.recipe.batch.micro).forward_flops > 0
    try:
        return [train(method), method.test(join())]
    except TubeletError as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    from pretrain.runtime.process_group import join

    join()
    plan = next(word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    with open(plan) as file:
        ends = [run(entry) for entry in json.load(file)]
    if os.environ.get("RANK", "0") == "0":
        print("ENDS " + json.dumps(ends), flush=True)
