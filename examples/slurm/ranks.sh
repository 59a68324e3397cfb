# How a job starts its ranks, and what becomes of it when they have ended. The templates source this file.

# start_ranks PROGRAM [FLAG...]: runs the program on all tasks of the job; LAUNCHER says how. Returns the program's exit code.
start_ranks() {
    # When a rank ends, the others have half a minute to end too, and Slurm's KillWait (half a minute) from then on: so one dead rank ends
    # the job, on all nodes, within a minute. Not --kill-on-bad-exit: it would end ranks that are just leaving, and give their code (143)
    # instead of the program's.
    local together=(--wait=30 --kill-on-bad-exit=0)
    # srun does not take this over from sbatch by itself since Slurm 22.05; all threads of a rank would share one core.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export TOKENIZERS_PARALLELISM=false
    # Not SLURM_NTASKS, which stays what it was when the job was submitted, even where it has been given another number of nodes.
    local ranks=$((SLURM_NNODES * SLURM_NTASKS_PER_NODE))
    events_before=$(wc -c 2>/dev/null <"$SAVE/events.jsonl") || events_before=0
    echo "$(date +%FT%T) job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $ranks ranks on $SLURM_JOB_NODELIST by $LAUNCHER"
    case $LAUNCHER in
    srun)
        # Each rank learns its place, and where rank 0 is, from Slurm's own variables.
        srun --ntasks="$ranks" "${together[@]}" python -u "$@"
        ;;
    deepspeed)
        # --launcher slurm is srun again: no node needs ssh to another, and every rank gets Slurm's signals itself.
        local hostfile code=0
        hostfile=$(mktemp)
        scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$SLURM_NTASKS_PER_NODE/" >"$hostfile"
        deepspeed --hostfile "$hostfile" --launcher slurm --launcher_args "${together[*]}" --force_multi --no_ssh_check \
            --master_addr "$(head -n 1 "$hostfile" | cut -d ' ' -f 1)" "$@" || code=$?
        rm "$hostfile"
        return "$code"
        ;;
    *)
        echo "LAUNCHER=$LAUNCHER: srun and deepspeed are allowed; change it and submit again" >&2
        return 2
        ;;
    esac
}

# end_job CODE SAVE: requeues the job where going on makes sense, and ends with the program's code where somebody has to look first.
# docs/operations.md says what the codes mean.
end_job() {
    local code=$1 save=$2
    if [ "$code" = 0 ] && began_and_did_not_end "$save"; then
        # DeepSpeed's launcher says 0 where a signal has ended its srun.
        code=1
    fi
    case $code in
    0)
        echo "$(date +%FT%T) done"
        ;;
    75)
        # Where a step was taken there is a new checkpoint. Ten starts without one: the time limit is too short for the run to begin.
        if without_progress "$save/idle-$SLURM_JOB_ID" "$save" "${MAX_IDLE:-10}"; then
            echo "$(date +%FT%T) preempted ${MAX_IDLE:-10} times without a new checkpoint, so the job stops; give it more time, and submit" \
                "it again" >&2
            exit "$code"
        fi
        requeue "preempted, all is saved" "$code"
        ;;
    1 | 76 | 129 | 1[3-5][0-9] | 253)
        # A traceback, a hang, or a rank that a signal ended (128 + its number; 253: out of memory): most often a sick node or network. The
        # last checkpoint is sound, so the job goes on from there, unless it gets nowhere.
        if without_progress "$save/crashes-$SLURM_JOB_ID" "$save" "${MAX_CRASHES:-3}"; then
            echo "$(date +%FT%T) code $code: crashed ${MAX_CRASHES:-3} times without a new checkpoint, so the job stops; the log above" \
                "says why" >&2
            exit "$code"
        fi
        wait_for_nodes
        requeue "code $code, a rank crashed or hung" "$code"
        ;;
    *)
        # Flags, data, a checkpoint, sick training, ranks that disagree: the same would happen again.
        echo "$(date +%FT%T) code $code: the job stops; the program's last line says what to change, then submit it again" >&2
        exit "$code"
        ;;
    esac
}

# without_progress COUNTER SAVE LIMIT: counts ends without a new checkpoint between them in a file; whether there are as many as LIMIT.
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

# began_and_did_not_end SAVE: whether this start has told of itself in events.jsonl, and not that it is done.
began_and_did_not_end() {
    local events=$1/events.jsonl now
    now=$(wc -c 2>/dev/null <"$events") || return 1
    [ "$now" -gt "$events_before" ] && ! tail -n 1 "$events" | grep -q '"type": "end".*"code": 0'
}

# wait_for_nodes: returns when every node of the job runs a task. Slurm needs minutes to notice a dead node (SlurmdTimeout); then it ends this
# script and requeues the job itself. Requeued before that, a job with GPUs loses track of them (Slurm 22.05) and cannot start its ranks.
wait_for_nodes() {
    local attempt
    for attempt in {1..20}; do
        timeout 300 srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true && return
        echo "$(date +%FT%T) not all nodes answer (attempt $attempt)" >&2
        sleep 30
    done
}

# requeue WHY CODE: puts this very job back into the queue; started again it appends to the same log and resumes from SAVE.
requeue() {
    echo "$(date +%FT%T) $1: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "$(date +%FT%T) job $SLURM_JOB_ID cannot be requeued here; the same sbatch command goes on where the run stands" >&2
    exit "$2"
}
