#!/usr/bin/env bash
# The main job from end to end on one machine: fetch, pack, pre-train, kill, resume, look, fine-tune, compare. Every
# command is shown before it runs, and each is one that you would type yourself. `make demo` calls it inside .venv;
# running it again starts over.
#
#   TUBELET_DEMO_EPOCHS=4   a shorter training, and a shorter fine-tuning after it; 4 at least: the warm-up takes 3
set -euo pipefail
cd "$(dirname "$0")/.."
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TUBELET_DATA=.cache/demo/shards
cache=.cache/demo
run=runs/demo
epochs=${TUBELET_DEMO_EPOCHS:-}
overrides=("run.dir=$run" ${epochs:+schedule.epochs=$epochs})
tuning=(${epochs:+"schedule.epochs=$(((epochs + 3) / 4))" schedule.warmup_epochs=0.2})

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
show() {
    printf '\033[2m$ %s\033[0m\n' "$*"
    "$@"
}
steps_done() { if [ -f $run/metrics.jsonl ]; then wc -l <$run/metrics.jsonl; else echo 0; fi; }

say "1/8 real video: three camera clips from the package index, 486 action clips from this repository"
show python -m pretrain.commands.camera_clips $cache/camera

say "2/8 pack it into shards with an index; performers and scenes of the held-out shards are not trained on"
show python launch/pack.py tests/assets/actions/manifest.csv $TUBELET_DATA/actions --where split=train --copy
show python launch/pack.py $cache/camera/bikes.mp4 $cache/camera/bigbuckbunny.mp4 $TUBELET_DATA/camera --short-side 128
show python launch/pack.py tests/assets/actions/manifest.csv $TUBELET_DATA/held_out --where split=test --copy
show python launch/pack.py tests/assets/actions/manifest.csv $TUBELET_DATA/new_performer \
    --where who=woman --where tone=dark,medium,light --copy
show python launch/pack.py tests/assets/actions/manifest.csv $TUBELET_DATA/new_performer_test \
    --where who=woman --where tone=medium-dark,medium-light,yellow --copy
show python launch/pack.py $cache/camera/carphone_pristine.mp4 $TUBELET_DATA/held_out_camera --short-side 128

say "3/8 the plan, before anything is computed"
show python launch/pretrain.py --recipe demo "${overrides[@]}" --dry-run

say "4/8 pre-train on 2 processes, and kill all of them with SIGKILL on the way"
rm -rf $run
train=(deepspeed --num_accelerators 2 launch/pretrain.py --recipe demo "${overrides[@]}")
set -m # the launcher and all its children become a process group, which can be killed at once
show "${train[@]}" &
launcher=$!
trap 'kill -TERM -- -$launcher 2>/dev/null || true' EXIT
until [ "$(steps_done)" -ge 100 ]; do # the recipe saves every 80 steps: the last ones are lost and done again
    kill -0 $launcher 2>/dev/null || { wait $launcher; exit 1; }
    sleep 0.2
done
kill -KILL -- -$launcher
wait $launcher 2>/dev/null || true
trap - EXIT
set +m
say "killed after $(steps_done) steps"

say "5/8 the same command again: it continues from the newest checkpoint that verifies"
show "${train[@]}"

say "6/8 what the model makes of performers and scenes that it has never seen"
show python launch/reconstruct.py $run $TUBELET_DATA/held_out $TUBELET_DATA/held_out_camera

say "7/8 fine-tune it to name 27 actions of a new performer from 3 clips of each, and the same network from random weights"
tune=(python launch/finetune.py --recipe demo_finetune "${tuning[@]}")
show "${tune[@]}" run.dir=$run/from_scratch >$run/from_scratch.log 2>&1 &
scratch=$!
trap 'kill -TERM $scratch 2>/dev/null || true' EXIT
printf '\033[2m$ %s   (at the same time; its output: %s)\033[0m\n' \
    "${tune[*]} run.dir=$run/from_scratch" $run/from_scratch.log
show "${tune[@]}" run.dir=$run/pretrained run.init_weights=$run
wait $scratch || { cat $run/from_scratch.log; exit 1; }
trap - EXIT

say "8/8 accuracy on 81 other clips, which neither of them has seen, and what the model says of some of them"
show python launch/finetune.py --compare $run/pretrained $run/from_scratch
printf 'picture: %s\n' $run/pretrained/predictions/*/examples.png
