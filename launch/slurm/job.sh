# shellcheck shell=bash
# What pretrain.sbatch and finetune.sbatch share; sourced by the batch shell, which runs on the first node of a job.
#
# The batch shell starts one job step, passes a request to stop on to the run, and decides at the end whether the job
# goes back to the queue. It believes the run's own summary.json first: launchers lose exit codes (torchrun turns all
# into 1, deepspeed turns a killed launcher into 0, srun reports the highest of all tasks, killed ones included).
#
#   TUBELET_LAUNCHER       srun: one task a GPU; deepspeed, torchrun: one launcher a node        (srun)
#   TUBELET_REQUEUE        1: the job goes back to the queue by itself; 0: it ends               (1)
#   TUBELET_MAX_FAILURES   failures in a row without a further step after which it gives up      (3)
#   TUBELET_SRUN_OPTIONS   further options of srun, such as pyxis' --container-image=…           (none)
#   TUBELET_HOME           folder in which launch/ lies                                          (.)
#   TUBELET_CONTAINER_RUN  command before python, such as: apptainer exec --nv tubelet.sif       (none)
set -uo pipefail

readonly DONE=0 FAILED=1 WRONG_USAGE=2 STOPPED=75
# Seconds between two tries to send the job back to the queue, how long to try where its end is not known, between two
# looks at when that is, and for which a run that Slurm ends is given to say that it has saved (by default Slurm kills
# after 30).
readonly AGAIN_S=${TUBELET_AGAIN_S:-10} TRY_S=${TUBELET_TRY_S:-600} LOOK_S=${TUBELET_LOOK_S:-60} SAY_S=25

say() { printf '%s [job %s, start %s] %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$*" >&2; }

run_job() { # SCRIPT ARGUMENT...
    read_settings "$@"
    mkdir -p "$run_dir" || exit $FAILED
    trap on_stop USR1
    trap on_term TERM
    # The program itself notes wrong usage: srun says 2 as well where it finds no interpreter, wrapper or shared folder.
    export TUBELET_USAGE_NOTE=$run_dir/wrong_usage
    rm -f "$TUBELET_USAGE_NOTE"
    # With the number of ranks, or what only they can show is raised by each of them and taken for a crash.
    WORLD_SIZE=$(rank_count) in_step --ntasks=1 --nodes=1 -- python "$@" --check || finish "$(of_usage $?)"
    agree_on_meeting_point
    find_end_time
    local before status
    before=$(summary_stamp)
    start_ranks "$@" &
    step=$!
    watch_end_time &
    wait_for_step
    status=$?
    # Slurm ends a job's steps before it signals this shell: who did it is known a moment after the ranks are gone.
    if [ "$status" != 0 ]; then sleep 1; fi
    wait_for_word "$before"
    if holds_folder; then rm -f "$run_dir/stop"; fi
    finish "$(of_usage "$(outcome "$status" "$before")")"
}

rank_count() { echo $((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))})); }

# Another job may run in the folder while this one waits for it: its stop file is not this one's to touch.
holds_folder() {
    local holder=''
    if [ -f "$run_dir/.holder" ]; then read -r holder <"$run_dir/.holder"; fi
    [ "$holder" = "$SLURM_JOB_ID" ]
}

# Wrong usage is what the program says it is, whatever srun makes of the codes of all tasks.
of_usage() { # STATUS
    if [ -e "$TUBELET_USAGE_NOTE" ]; then
        echo $WRONG_USAGE
    elif [ "$1" = $WRONG_USAGE ]; then
        say "2 without a word of the program: an interpreter, a wrapper or the shared folder is missing on a node"
        echo $FAILED
    else
        echo "$1"
    fi
}

read_settings() {
    : "${TUBELET_LAUNCHER:=srun}" "${TUBELET_REQUEUE:=1}" "${TUBELET_MAX_FAILURES:=3}"
    # A job that comes back has the same number and another end.
    this_start=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    run_dir='' end_time=0 term_seen=0 interrupted=0 step=$$
    local word
    for word in "$@"; do
        case $word in run.dir=*) run_dir=${word#run.dir=} ;; esac
    done
    if [ -z "$run_dir" ]; then
        say "run.dir=FOLDER is missing among the arguments: this script touches FOLDER/stop and reads FOLDER/summary.json"
        exit $WRONG_USAGE
    fi
    case $TUBELET_LAUNCHER in srun | deepspeed | torchrun) return ;; esac
    say "TUBELET_LAUNCHER: found $TUBELET_LAUNCHER, allowed: srun, deepspeed, torchrun"
    exit $WRONG_USAGE
}

# All ranks meet at the address by which Slurm itself reaches the first node. The port differs between starts, since the
# one of a killed start may be held for a while, and lies below the range that systems hand out by themselves.
agree_on_meeting_point() {
    local first address
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR=${MASTER_ADDR:-${address:-$first}}
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 12000))
}

# Older releases of Slurm don't tell a job when it ends, and what is set may be of the job from which this one was
# submitted. The run stops by itself before that time, even without a signal.
find_end_time() {
    end_time=$(ask_end_time)
    if [ "$end_time" -gt 0 ]; then export SLURM_JOB_END_TIME=$end_time; fi
}

ask_end_time() {
    local text
    # Of a running job only: that of a cancelled one is the present.
    text=$(squeue --noheader --jobs="$SLURM_JOB_ID" --states=RUNNING --Format=EndTime:40 2>/dev/null | tr -d ' ')
    date --date="${text:-none}" +%s 2>/dev/null || echo 0 # of no text date makes midnight
}

# Somebody may prolong the job: the run, which may have no Slurm in its container, looks here before it stops for the end.
watch_end_time() {
    local known=$end_time now waited=0
    while sleep 1 && kill -0 "$step" 2>/dev/null; do
        waited=$((waited + 1))
        if [ "$waited" -lt "$LOOK_S" ]; then continue; fi
        waited=0 now=$(ask_end_time)
        if [ "$now" -gt 0 ] && [ "$now" != "$known" ] && holds_folder; then
            say "the job ends at $(date --date="@$now" +%FT%T) now"
            echo "$this_start $now" >"$run_dir/.end_time.new" && mv "$run_dir/.end_time.new" "$run_dir/.end_time"
            known=$now
        fi
    done
}

latest_end_time() {
    local start='' told=0
    if [ -f "$run_dir/.end_time" ]; then read -r start told <"$run_dir/.end_time"; fi
    if [ "$start" = "$this_start" ]; then end_time=$told; fi
}

in_step() { # SRUN_OPTION... -- COMMAND...
    local -a options=() site wrap
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    read -ra site <<<"${TUBELET_SRUN_OPTIONS:-}"
    read -ra wrap <<<"${TUBELET_CONTAINER_RUN:-}"
    shift
    srun --kill-on-bad-exit=1 "${options[@]}" ${site[@]+"${site[@]}"} ${wrap[@]+"${wrap[@]}"} "$@"
}

start_ranks() { # SCRIPT ARGUMENT...
    local nodes=$SLURM_JOB_NUM_NODES cpus=${SLURM_CPUS_PER_TASK:-1} per_node
    per_node=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / nodes))}
    say "$TUBELET_LAUNCHER: $nodes nodes with $per_node ranks each meet at $MASTER_ADDR:$MASTER_PORT"
    if [ "$TUBELET_LAUNCHER" = srun ]; then
        in_step --nodes="$nodes" --ntasks-per-node="$per_node" --cpus-per-task="$cpus" -- python -u "$@"
        return
    fi
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$per_node/" >"$run_dir/hostfile"
    in_step --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task=$((cpus * per_node)) -- \
        bash "$TUBELET_HOME/launch/slurm/node.sh" "$TUBELET_LAUNCHER" "$run_dir/hostfile" "$per_node" "$@"
}

# A run removes the file when it starts, so a request that comes early is repeated until the ranks have left.
on_stop() {
    interrupted=1
    say "asked to stop: touching $run_dir/stop"
    while kill -0 "$step" 2>/dev/null; do
        if holds_folder; then touch "$run_dir/stop"; fi
        sleep 2
    done &
}

# Slurm ends the job: at its time limit, or since somebody cancels, requeues or preempts it.
on_term() {
    # Slurm may signal more than once, and all that is started from here on inherits this: what a run has said is read
    # by programs, and a killed one would read nothing.
    trap '' TERM
    term_seen=1
    on_stop
    latest_end_time
    local now
    printf -v now '%(%s)T' -1
    if [ "$end_time" -gt 0 ] && [ "$now" -ge "$end_time" ]; then
        requeue "the time limit came before the run had stopped"
    fi
}

wait_for_step() {
    local status=127 now
    while interrupted=0; wait "$step"; now=$?; [ "$now" != 127 ]; do
        status=$now
        if [ "$interrupted" = 0 ]; then break; fi # else a trap cut the wait short: the step is still there
    done
    return "$status"
}

# srun leaves as soon as Slurm ends the job, and the ranks when they have saved.
wait_for_word() { # BEFORE
    local now until stamp
    printf -v now '%(%s)T' -1
    until=$((now + SAY_S))
    # Rank 0 has the lock as long as it lives. (squeue is no help: it does not list the steps of a job that ends.)
    while [ "$now" -lt "$until" ] && holds_folder && ! flock --nonblock "$run_dir/.lock" true; do
        stamp=$(summary_stamp)
        case $stamp in "$1" | none | '') ;; *) return ;; esac
        sleep 0.5
        printf -v now '%(%s)T' -1
    done
}

summary_stamp() { stat --format='%i %y' "$run_dir/summary.json" 2>/dev/null || echo none; }

outcome() { # STATUS BEFORE
    local told
    told=$(sed -n 's/^ *"exit_code": *\([0-9]*\).*/\1/p' "$run_dir/summary.json" 2>/dev/null)
    if [ "$(summary_stamp)" != "$2" ]; then
        echo "${told:-$FAILED}"
    elif [ "$1" = $DONE ] && [ "$told" != $DONE ]; then
        echo $FAILED # nothing was written, and the run was not done before
    else
        echo "$1"
    fi
}

finish() { # OUTCOME
    case $1 in
    "$DONE")
        rm -f "$run_dir/failures"
        say "done"
        ;;
    "$STOPPED") go_on "stopped with a checkpoint" ;;
    "$WRONG_USAGE") say "wrong usage: the job does not go back to the queue" ;;
    *)
        if [ "$term_seen" = 1 ]; then
            go_on "ended without a word of the run that it has saved" # what Slurm itself ends has not failed
        elif may_try_again; then
            go_on "failed with $1"
        else
            say "failed with $1, for good"
        fi
        ;;
    esac
    exit "$1"
}

# A crash that repeats at the same step would otherwise hold its nodes for ever. $run_dir/failures: count, most steps.
may_try_again() {
    local count=0 best=0 steps=0
    if [ -f "$run_dir/failures" ]; then read -r count best <"$run_dir/failures"; fi
    if [ -f "$run_dir/metrics.jsonl" ]; then steps=$(wc -l <"$run_dir/metrics.jsonl"); fi
    if [ "$steps" -gt "$best" ]; then count=0 best=$steps; fi
    count=$((count + 1))
    echo "$count $best" >"$run_dir/failures"
    say "failure $count without going beyond step $best, $TUBELET_MAX_FAILURES are allowed"
    [ "$count" -le "$TUBELET_MAX_FAILURES" ]
}

go_on() { # WHY
    if [ "$term_seen" = 1 ]; then
        say "$1; Slurm ended this job and decides itself whether it comes back"
    else
        requeue "$1"
    fi
}

requeue() { # WHY
    if [ "$TUBELET_REQUEUE" = 1 ]; then
        say "$1: back to the queue"
        local until=$(($(date +%s) + TRY_S))
        latest_end_time
        if [ "$end_time" -gt 0 ]; then until=$((end_time - 2 * AGAIN_S)); fi
        # A controller that restarts answers nobody for a minute; the allocation is there as long as this shell is.
        until scontrol requeue "$SLURM_JOB_ID"; do
            if [ "$(date +%s)" -ge "$until" ]; then
                say "the job can't be requeued: submit the same command again, which continues"
                return
            fi
            say "the controller does not answer; trying again in $AGAIN_S s"
            sleep "$AGAIN_S"
        done
    else
        say "$1: the next job of the chain, or the same command, continues"
    fi
}
