# Starts the ranks of a job, and requeues or ends the job when they have ended. The templates source this file.

# start_ranks PROGRAM [FLAG...]: runs the program on all tasks of the job with LAUNCHER. Returns the program's exit code.
start_ranks() {
    # When a rank ends, the others have 30 seconds to end, and then Slurm's KillWait (30 seconds), so one dead rank ends the job on all
    # nodes within a minute. --kill-on-bad-exit would kill ranks that are ending regularly, and return their code (143) instead of the
    # program's.
    local together=(--wait=30 --kill-on-bad-exit=0)
    # Since Slurm 22.05, srun does not inherit this from sbatch; without it all threads of a rank share one core.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export TOKENIZERS_PARALLELISM=false
    # SLURM_NTASKS keeps its value from the submission, even if the job has been given another number of nodes.
    local ranks=$((SLURM_NNODES * SLURM_NTASKS_PER_NODE))
    events_before=$(wc -c 2>/dev/null <"$SAVE/events.jsonl") || events_before=0
    echo "$(date +%FT%T) job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $ranks ranks on $SLURM_JOB_NODELIST by $LAUNCHER"
    case $LAUNCHER in
    srun)
        # Each rank reads its number and the address of rank 0 from Slurm's variables.
        srun --ntasks="$ranks" "${together[@]}" python -u "$@"
        ;;
    deepspeed)
        # --launcher slurm also uses srun: nodes need no ssh, and every rank gets Slurm's signals.
        local hostfile code=0
        hostfile=$(mktemp)
        scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$SLURM_NTASKS_PER_NODE/" >"$hostfile"
        deepspeed --hostfile "$hostfile" --launcher slurm --launcher_args "${together[*]}" --force_multi --no_ssh_check \
            --master_addr "$(head -n 1 "$hostfile" | cut -d ' ' -f 1)" "$@" || code=$?
        rm "$hostfile"
        return "$code"
        ;;
    *)
        echo "LAUNCHER=$LAUNCHER is unknown; set it to srun or deepspeed and submit again" >&2
        return 2
        ;;
    esac
}

# end_job CODE SAVE: requeues the job if a restart can help; otherwise ends with the program's exit code, and a person must act first.
# docs/operations.md lists the exit codes.
end_job() {
    local code=$1 save=$2
    if [ "$code" = 0 ] && started_but_not_finished "$save"; then
        # DeepSpeed's launcher returns 0 if a signal has ended its srun.
        code=1
    fi
    case $code in
    0)
        echo "$(date +%FT%T) the run is finished"
        ;;
    75)
        # A start that takes a step leaves a new checkpoint. Ten starts without one: the time limit is too short.
        if without_progress "$save/idle-$SLURM_JOB_ID" "$save" "${MAX_IDLE:-10}"; then
            echo "$(date +%FT%T) preempted ${MAX_IDLE:-10} times without a new checkpoint, so the job stops; raise its time limit and submit" \
                "it again" >&2
            exit "$code"
        fi
        requeue "preempted, the run is saved" "$code"
        ;;
    1 | 76 | 129 | 1[3-5][0-9] | 253)
        # A traceback, a hang, or a rank that a signal ended (128 + its number; 253: out of memory). The usual cause is a faulty node or
        # network. The last checkpoint is valid, so the job resumes from it, unless it makes no progress.
        if without_progress "$save/crashes-$SLURM_JOB_ID" "$save" "${MAX_CRASHES:-3}"; then
            echo "$(date +%FT%T) code $code: crashed ${MAX_CRASHES:-3} times without a new checkpoint, so the job stops; see the log" \
                "above for the cause" >&2
            exit "$code"
        fi
        wait_for_nodes
        requeue "code $code, a rank crashed or hung" "$code"
        ;;
    *)
        # Wrong flags, data, a checkpoint, sick training, ranks that disagree: a restart would fail in the same way.
        echo "$(date +%FT%T) code $code: the job stops; fix the problem that the program's last lines describe, then submit it again" >&2
        exit "$code"
        ;;
    esac
}

# without_progress COUNTER SAVE LIMIT: counts consecutive ends without a new checkpoint in a file; succeeds when there are LIMIT of them.
without_progress() {
    local counter=$1 save=$2 limit=$3 count before newest
    newest=$(cat "$save/latest" 2>/dev/null) || newest=none
    read -r count before 2>/dev/null <"$counter" || before=
    [ "$before" = "$newest" ] || count=0
    count=$((count + 1))
    [ "$count" -lt "$limit" ] || return 0
    mkdir -p "$save" && echo "$count $newest" >"$counter"
    return 1
}

# started_but_not_finished SAVE: succeeds if this start has written to events.jsonl, but not that the run is finished.
started_but_not_finished() {
    local events=$1/events.jsonl now
    now=$(wc -c 2>/dev/null <"$events") || return 1
    [ "$now" -gt "$events_before" ] && ! tail -n 1 "$events" | grep -q '"type": "end".*"code": 0'
}

# wait_for_nodes: returns when every node of the job can run a task. Slurm needs minutes to notice a dead node (SlurmdTimeout); then it ends
# this script and requeues the job. If the job is requeued earlier, Slurm 22.05 loses track of its GPUs and the ranks cannot start.
wait_for_nodes() {
    local attempt
    for attempt in {1..20}; do
        timeout 300 srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true && return
        echo "$(date +%FT%T) not all nodes respond (attempt $attempt of 20)" >&2
        sleep 30
    done
}

# requeue REASON CODE: requeues this job; when it starts again it appends to the same log and resumes from SAVE.
requeue() {
    echo "$(date +%FT%T) $1: requeued"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "$(date +%FT%T) job $SLURM_JOB_ID cannot be requeued; submit the same sbatch command to resume the run" >&2
    exit "$2"
}
