# What becomes of the job when the program has ended; the templates source this file.
#
# end_job CODE SAVE
#   CODE  the program's exit code (docs/operations.md)
#   SAVE  the run's folder
# Requeues the job and exits where going on makes sense; exits with CODE where somebody has to look first.

DONE=0 PREEMPTED=75
# Crashes in a row without a new checkpoint between them, after which the job stops for somebody to look.
MAX_CRASHES=${MAX_CRASHES:-3}

end_job() {
    local code=$1 save=$2
    case $code in
    "$DONE")
        echo "$(date +%FT%T) done" ;;
    "$PREEMPTED")
        requeue "preempted; all is saved" "$code" ;;
    1 | 129 | 13[0-9] | 14[0-9] | 247 | 253)
        # A traceback, or a rank that a signal ended (128 + its number; 247 from DeepSpeed's launcher, 253 out of memory): a sick node
        # or network, most often. What was saved last is sound, so the job goes on from there, unless it gets nowhere.
        local crashes=1 last at
        at=$(cat "$save/latest" 2>/dev/null || true)
        if read -r crashes last <"$save/crashes-$SLURM_JOB_ID" 2>/dev/null && [ "$last" = "$at" ]; then
            crashes=$((crashes + 1))
        else
            crashes=1
        fi
        [ ! -d "$save" ] || echo "$crashes $at" >"$save/crashes-$SLURM_JOB_ID"
        if [ "$crashes" -ge "$MAX_CRASHES" ]; then
            echo "$(date +%FT%T) code $code: crashed $crashes times without a new checkpoint; the job stops. The log above says why." >&2
            exit "$code"
        fi
        requeue "code $code: a rank crashed" "$code" ;;
    *)
        # Flags, data, checkpoints, a stop on purpose: the same would happen again.
        echo "$(date +%FT%T) code $code: the job stops. The program's last line says what to change; then submit it again." >&2
        exit "$code" ;;
    esac
}

# requeue WHY CODE: puts this very job back into the queue; on its next start it appends to the same log and resumes from SAVE.
requeue() {
    echo "$(date +%FT%T) $1; requeued (start ${SLURM_RESTART_COUNT:-0} + 1)"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "$(date +%FT%T) cannot requeue job $SLURM_JOB_ID here; the same sbatch command goes on from where the run stands" >&2
    exit "$2"
}
