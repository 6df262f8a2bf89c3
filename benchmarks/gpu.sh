#!/usr/bin/env bash
# The benchmarks on this machine's GPU, each within its time, ten minutes in all: bash benchmarks/gpu.sh [FOLDER]
# Figures go to FOLDER, by default benchmarks/results. What fails or runs out of time is named, the rest goes on, and the
# exit status is 1.
set -uo pipefail
folder="${1:+$(realpath -m "$1")}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${folder:-benchmarks/results}"
stamp="$(date -u +%Y-%m-%d-%H%M)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
device="$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')" || {
    echo "gpu.sh: no GPU here, or no torch that sees one."
    exit 1
}
report=()
failed=0

run() { # run SECONDS SUBJECT SCRIPT OPTION...: one benchmark, its figures in FOLDER/STAMP-DEVICE-SUBJECT.json
    local limit="$1" subject="$2" script="benchmarks/$3" from="$SECONDS" status=0
    shift 3
    if [ ! -f "$script" ]; then
        report+=("$subject: $script is not there")
        failed=1
        return
    fi
    printf '\n=== %s\n' "$subject"
    timeout -k 5 "$limit" "$python" "$script" --device cuda --out "$folder/$stamp-$device-$subject.json" "$@" || status=$?
    [ "$status" -eq 0 ] || failed=1
    case "$status" in
        0) report+=("$subject: done, $((SECONDS - from)) s") ;;
        124 | 137) report+=("$subject: stopped after $limit s") ;;
        *) report+=("$subject: failed with status $status") ;;
    esac
}

run 60 step step.py --precision bf16
run 150 frequency frequency.py --quick
run 40 prototypes prototypes.py
run 40 cams cams.py
run 50 refinement refinement.py
run 50 crf crf.py --limit 2 --rounds 2
run 20 energy energy.py --rounds 3
run 90 step-compiled step.py --precision bf16 --compile blocks
run 80 inference inference.py --precision bf16
printf '\n'
printf '%s\n' "${report[@]}"
exit "$failed"
