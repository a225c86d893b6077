"""Commands of the README and of guides exist and mean what they say: plans made, arguments parsed, targets resolved."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


#: Pages whose shell blocks are run as the README's.
PAGES = (
    "README.md",
    *(f"docs/systems/{page}.md" for page in ("sparseformer_bootstrap", "snclr", "speed_coaug", "tvtsv2")),
)


def commands() -> Iterator[list[str]]:
    """Every line of the pages' shell blocks, as words."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def local(words: list[str], folder: Path) -> list[str]:
    """The same words with the cluster's places moved into `folder`."""
    return [word.replace("s3://bucket", str(folder)).replace("/shared", str(folder)) for word in words]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_command(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    assert words[0] in ("python", "deepspeed") and (ROOT / words[1]).is_file()
    arguments = local(words[2:], tmp_path)
    script = Path(words[1]).stem
    if "--check" in arguments:
        assert check(script, arguments) == 0 and "no problems found" in capsys.readouterr().out
    elif script == "evaluate":
        assert check(script, [*arguments, "--check"]) == 0 and "no problems found" in capsys.readouterr().out
    elif script in ("pretrain", "finetune"):
        assert plan(script, arguments) == 0, capsys.readouterr().err
        assert "parameters" in capsys.readouterr().out
    elif script == "plan":
        from pretrain.commands.plan import main

        assert main(arguments) == 0
        assert "largest micro-batch" in capsys.readouterr().out
    else:
        parse(script, arguments)


def plan(script: str, arguments: list[str]) -> int:
    """Everything up to the first step."""
    return check(script, arguments if "--dry-run" in arguments else [*arguments, "--dry-run"])


def check(script: str, arguments: list[str]) -> int:
    if script == "pretrain":
        from pretrain.commands.pretrain import main
    elif script == "evaluate":
        from finetune.commands.evaluate import main
    else:
        from finetune.commands.finetune import main
    return main(arguments)


def parse(script: str, arguments: list[str]) -> None:
    """Arguments as the command's own parser takes them; it leaves with SystemExit where it does not."""
    if script == "submit":  # the rest is the program's, and the same as that of the other commands
        from pretrain.commands.submit import make_parser

        make_parser().parse_known_args(arguments)
        return
    if script == "pack":
        from pretrain.commands.pack_arguments import make_parser
    elif script == "export":
        from finetune.commands.export import make_parser
    elif script == "predict":
        from finetune.commands.predict import make_parser
    elif script == "zero_shot":
        from pretrain.commands.zero_shot import make_parser
    elif script == "sound_statistics":
        from pretrain.commands.sound_statistics import make_parser
    elif script == "retrieve":
        from pretrain.commands.retrieve import make_parser
    elif script == "video_text":
        from pretrain.commands.video_text import make_parser
    else:
        from pretrain.commands.reconstruct import make_parser
    make_parser().parse_args(arguments)


def test_table_of_methods_is_what_the_dry_run_says() -> None:
    """Trained parameters and states of ViT-B on one GPU."""
    from finetune.recipe import load_tune_recipe
    from pretrain.objectives.base import method_of
    from pretrain.plan.dry_run import dry_run

    text = (ROOT / "README.md").read_text()
    table = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d,]+) \| ([\d.]+ [GM]B) \|", text, re.M)
    assert {row[0] for row in table} == {"full", "linear", "adaptformer", "vpt", "lora", "bitfit"}
    for method, trained, states in table:
        sections = dry_run(method_of(load_tune_recipe("vit_b_k400", [f"tune.method={method}", "zero.stage=0"])))
        rows = {row[0].strip(): row[1] for section in sections for row in section.rows}
        assert (rows.get("trained", rows["parameters"]), rows["together"]) == (trained, states), method
