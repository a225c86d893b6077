"""Several runs in one set of processes, because a start takes longer than a run; and accidents at chosen moments.

    deepspeed toy_driver.py RECIPE PLAN.json

The plan is a list of {"overrides": [...], "accidents": [[forward pass, rank, what], ...], "turns": [...]}; forward
passes are counted from 1 in each run. Each part of the model that `turns` names has an update of its own. `"on_rank":
{"1": [...]}` gives a rank more overrides, as a host with files of its own has. Exit codes, or errors, of the runs are
printed as a JSON line.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def accident(what: str, output, module, run_dir: Path):
    """Let something happen in a forward pass; returns its output, changed or not."""
    if what == "nan":
        return output._replace(loss=output.loss * float("nan"))
    if what == "inf":  # its gradient stays finite
        return output._replace(loss=output.loss + float("inf"))
    if what == "gradient":  # a finite loss with a gradient that is not
        token = module.model.mask_token
        return output._replace(loss=output.loss + (token - token.detach()).abs().sqrt().sum())
    if what == "spike":
        return output._replace(loss=output.loss * 50)
    if what == "stop file":
        (run_dir / "stop").touch()
    elif what == "rename the folder":
        run_dir.rename(f"{run_dir} moved")
    elif what == "delete the metrics":
        (run_dir / "metrics.jsonl").unlink()
    elif what == "kill a data worker":
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    elif what == "kill while hashing":
        from pretrain.checkpoint import save

        save.describe_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang":
        time.sleep(3600)
    elif what == "kill in the middle of publishing":
        from pretrain.checkpoint import folders

        folders.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    else:
        os.kill(os.getpid(), getattr(signal, what))
    return output


def decode_once() -> None:
    """Keep every clip that a run has decoded for the runs after it: they are about the engine, and see the same."""
    from pretrain.samples.clip import ClipSamples

    plain, known = ClipSamples._videos, {}

    def videos(self, place, source, members, each):
        what = (self._seed, repr(self._options), place, source.options.stride, members.files["mp4"])
        if what not in known:
            known[what] = plain(self, place, source, members, each)
        return known[what]

    ClipSamples._videos = videos


def drive(recipe_path: str, plan: list[dict]) -> list:
    """Train run after run."""
    from pretrain.engine.loop import train
    from pretrain.errors import TubeletError
    from pretrain.objectives.base import method_of
    from pretrain.objectives.videomae import VideoMAEObjective
    from pretrain.recipe.load import load_recipe
    from pretrain.runtime.process_group import join

    decode_once()
    rank = join().rank
    plain_forward, plain_rule, plain_turns = VideoMAEObjective.forward, VideoMAEObjective.rule, VideoMAEObjective.turns

    def rule(self, name, shape):
        by_part = name.split(".")[1] if name.split(".")[1] in self.turns else self.turns[0]
        return replace(plain_rule(self, name, shape), turn=by_part)

    results = []
    for entry in plan:
        VideoMAEObjective.turns, VideoMAEObjective.rule = tuple(entry.get("turns", plain_turns)), rule
        recipe = load_recipe(recipe_path, entry["overrides"] + entry.get("on_rank", {}).get(str(rank), []))
        calls = 0

        def forward(self, batch, entry=entry, recipe=recipe):
            nonlocal calls
            calls += 1
            output = plain_forward(self, batch)
            for when, who, what in entry.get("accidents", []):
                if (when, who) == (calls, rank):
                    output = accident(what, output, self, Path(recipe.run.dir))
            return output

        VideoMAEObjective.forward = forward
        try:
            results.append(train(method_of(recipe), entry.get("resume", "auto")))
        except TubeletError as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and this one under nohup
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    outcome = drive(words[0], json.loads(Path(words[1]).read_text()))
    if os.environ.get("RANK", "0") == "0":
        print("RESULTS " + json.dumps(outcome), flush=True)
