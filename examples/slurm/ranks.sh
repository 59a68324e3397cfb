# shellcheck shell=bash
# Starts the ranks of a job, and requeues or ends the job when they have ended. The templates source this file, with bash 4.2 or newer.
#
# Others may write to the run's folder. Bash runs commands that stand in the text of a number ("a[$(command)]"), so whatever comes from a
# file or a variable is text here, and must match is_number before it is calculated with. Files are read and replaced, and links are not
# followed.

# is_number TEXT: succeeds if the text is a whole number of at most nine digits. $((10#TEXT)) is its value: a zero in front means octal.
is_number() {
    [[ $1 =~ ^[0123456789]{1,9}$ ]]
}

# read_start FILE [OFFSET]: prints up to 4096 bytes from an offset, without NUL. A missing file, a link, a pipe without a writer and a device
# are empty.
read_start() {
    [ -f "$1" ] || return 0
    dd if="$1" skip="${2:-0}" bs=4096 count=1 iflag=nofollow,nonblock,skip_bytes 2>/dev/null | tr -d '\0' || true
}

# size_of FILE: prints the number of bytes of a file, and 0 if it does not exist.
size_of() {
    stat -c %s -- "$1" 2>/dev/null || echo 0
}

# check_settings: succeeds if the variables that are numbers are numbers; otherwise names the one that is not.
check_settings() {
    local name
    for name in SLURM_JOB_ID SLURM_NNODES SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK MAX_IDLE MAX_CRASHES; do
        if [ -n "${!name-}" ] && ! is_number "${!name}"; then
            printf '%s=%q is not a whole number of at most nine digits; correct it and submit again\n' "$name" "${!name}" >&2
            return 1
        fi
    done
    for name in SLURM_JOB_ID SLURM_NNODES SLURM_NTASKS_PER_NODE SLURM_JOB_NODELIST SAVE LAUNCHER; do
        if [ -z "${!name-}" ]; then
            echo "$name is not set; submit one of the templates in examples/slurm with sbatch" >&2
            return 1
        fi
    done
}

# start_ranks PROGRAM [FLAG...]: runs the program on all tasks of the job with LAUNCHER. Returns the program's exit code.
# Where there is no such file, the installed package trains: the folder is not a checkout.
start_ranks() {
    check_settings || return 2
    local python=("$1") module=("$1")
    if [ ! -e "$1" ]; then
        python=(-m megatron_patch.pretrain)
        module=(--module megatron_patch.pretrain)
    fi
    shift
    # When a rank ends, the others have 30 seconds to end, and then Slurm's KillWait (30 seconds), so one dead rank ends the job on all
    # nodes within a minute. --kill-on-bad-exit would kill ranks that are ending regularly, and return their code (143) instead of the
    # program's.
    local together=(--wait=30 --kill-on-bad-exit=0)
    # Since Slurm 22.05, srun does not inherit this from sbatch; without it all threads of a rank share one core.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export TOKENIZERS_PARALLELISM=false
    # SLURM_NTASKS keeps its value from the submission, even if the job has been given another number of nodes.
    local ranks=$((10#$SLURM_NNODES * 10#$SLURM_NTASKS_PER_NODE))
    # shellcheck disable=SC2153 # SAVE is a variable of the templates, save is one of the functions below.
    events_before=$(size_of "$SAVE/events.jsonl")
    printf '%s job %s, start %q: %s ranks on %q by %q\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$ranks" \
        "$SLURM_JOB_NODELIST" "$LAUNCHER"
    case $LAUNCHER in
    srun)
        # Each rank reads its number and the address of rank 0 from Slurm's variables.
        srun --ntasks="$ranks" "${together[@]}" python -u "${python[@]}" "$@"
        ;;
    deepspeed)
        # --launcher slurm also uses srun: nodes need no ssh, and every rank gets Slurm's signals.
        local hostfile code=0
        hostfile=$(mktemp)
        scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$SLURM_NTASKS_PER_NODE/" >"$hostfile"
        deepspeed --hostfile "$hostfile" --launcher slurm --launcher_args "${together[*]}" --force_multi --no_ssh_check \
            --master_addr "$(head -n 1 "$hostfile" | cut -d ' ' -f 1)" "${module[@]}" "$@" || code=$?
        rm "$hostfile"
        return "$code"
        ;;
    *)
        printf 'LAUNCHER=%q is unknown; set it to srun or deepspeed and submit again\n' "$LAUNCHER" >&2
        return 2
        ;;
    esac
}

# end_job CODE SAVE: requeues the job if a restart can help; otherwise ends with the program's exit code, and a person must act first.
# docs/operations.md lists the exit codes.
end_job() {
    local code=$1 save=$2 idle=${MAX_IDLE:-10} crashes=${MAX_CRASHES:-3}
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
        if without_progress "$save/idle-$SLURM_JOB_ID" "$save" "$idle"; then
            echo "$(date +%FT%T) preempted $idle times without a new checkpoint, so the job stops; raise its time limit and submit" \
                "it again" >&2
            exit "$code"
        fi
        requeue "preempted, the run is saved" "$code"
        ;;
    1 | 76 | 129 | 1[3-5][0-9] | 253)
        # A traceback, a hang, or a rank that a signal ended (128 + its number; 253: out of memory). The usual cause is a faulty node or
        # network. The last checkpoint is valid, so the job resumes from it, unless it makes no progress.
        if without_progress "$save/crashes-$SLURM_JOB_ID" "$save" "$crashes"; then
            echo "$(date +%FT%T) code $code: crashed $crashes times without a new checkpoint, so the job stops; see the log" \
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

# without_progress COUNTER SAVE LIMIT: counts consecutive ends without a new checkpoint in a file; succeeds when there are LIMIT of them, or
# when they cannot be counted, because such a job could start forever.
without_progress() {
    local counter=$1 save=$2 limit=$3 count before newest new
    is_number "$limit" || return 0
    read -r newest _ < <(read_start "$save/latest") || true
    [[ $newest =~ ^step-[0123456789]{1,19}$ ]] || newest=none
    read -r count before _ < <(read_start "$counter") || true
    if ! is_number "$count" || [ "$before" != "$newest" ]; then
        count=0
    fi
    count=$((10#$count + 1))
    [ "$count" -lt "$((10#$limit))" ] || return 0
    # The new file replaces the name: if the name is a link, the file that it leads to stays as it is.
    if ! { mkdir -p -- "$save" && new=$(mktemp -- "$counter.XXXXXXXXXX") && echo "$count $newest" >"$new" && mv -fT -- "$new" "$counter"; }; then
        rm -f -- "${new-}"
        printf 'cannot write %q, which counts the starts of the job\n' "$counter" >&2
        return 0
    fi
    return 1
}

# started_but_not_finished SAVE: succeeds if this start has written to events.jsonl, but not that the run is finished.
started_but_not_finished() {
    local events=$1/events.jsonl now from
    now=$(size_of "$events")
    from=$((now > 4096 ? now - 4096 : 0))
    [ "$now" -gt "$events_before" ] && ! read_start "$events" "$from" | tail -n 1 | grep -q '"type": "end".*"code": 0[,}]'
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
