#!/usr/bin/env bash
# The benchmarks on this machine's GPU, ten minutes in all: bash benchmarks/gpu.sh [FOLDER]
# Figures go to FOLDER, by default benchmarks/results. What fails or runs out of time is named, the rest goes on, and the
# exit status is 1; what measures case after case and is stopped keeps the cases it has. SECONDS_IN_ALL, by default 560,
# bounds the whole.
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
    local left=$((${SECONDS_IN_ALL:-560} - SECONDS))
    shift 3
    if [ ! -f "$script" ]; then
        report+=("$subject: $script is not there")
        failed=1
        return
    fi
    if [ "$left" -lt 20 ]; then
        report+=("$subject: no time left")
        failed=1
        return
    fi
    [ "$limit" -le "$left" ] || limit="$left"
    printf '\n=== %s\n' "$subject"
    timeout -k 10 "$limit" "$python" "$script" --device cuda --out "$folder/$stamp-$device-$subject.json" "$@" || status=$?
    [ "$status" -eq 0 ] || failed=1
    case "$status" in
        0) report+=("$subject: done, $((SECONDS - from)) s") ;;
        124 | 137) report+=("$subject: stopped after $limit s") ;;
        *) report+=("$subject: failed with status $status") ;;
    esac
}

# The most wanted first. The compiled refinement is not here: a GPU has a kernel for it.
run 90 step step.py --precision bf16
run 180 frequency frequency.py --quick
run 60 crf crf.py --limit 2 --rounds 2
run 40 refinement refinement.py --no-compile
run 45 energy energy.py --rounds 3
run 45 prototypes prototypes.py
run 45 cams cams.py
run 100 step-compiled step.py --precision bf16 --compile blocks
run 90 inference inference.py --precision bf16
printf '\n'
printf '%s\n' "${report[@]}"
exit "$failed"
