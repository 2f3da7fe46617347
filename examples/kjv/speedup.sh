#!/usr/bin/env bash
# The runs and the reports of docs/speedup.md: King James Bible, mLSTM, shf and bhf on 1 and 2 ranks.
#
#   examples/kjv/speedup.sh FOLDER
#
# A few minutes on two cores. The machine should be otherwise idle; load.txt records its load. Copy shf.txt,
# bhf.txt, network.txt, load.txt and speedup.png to docs/results/speedup/.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
sweep="$here/../../bin/sweep"
mkdir -p "$1"
cd "$1"
[[ -e kjv.h5 ]] || hfmpi prepare --corpus kjv kjv.h5

load() { echo "$1, $(date -u '+%d %B %Y %H:%M UTC'): load $(cut -d' ' -f1-3 /proc/loadavg) on $(nproc) cores" >>load.txt; }
load "before"
"$sweep" kjv.h5 shf --ranks "1 2" --repeats 3 --max-steps 6 --optimizer shf >shf.log
load "after the shf runs"
"$sweep" kjv.h5 bhf --ranks "1 2" --max-steps 4 --optimizer bhf --gradient-batch 640 \
    --curvature-batch 320 --set cg_max_steps=10 >bhf.log
load "after the bhf runs"
batches=(--batch 1 --batch 2 --batch 4 --batch 8 --batch 16 --batch 32)
hfmpi bench products --model mlstm --data kjv.h5 "${batches[@]}" --json >products.json
hfmpi bench gradients --model mlstm --data kjv.h5 "${batches[@]}" --json >gradients.json
mpirun -n 2 hfmpi bench allreduce --model mlstm --data kjv.h5 --json >allreduce.json
load "after the benchmarks"

bench=(--bench products.json --bench gradients.json)
hfmpi speedup shf/* --model "${bench[@]}" --bench allreduce.json >shf.txt
hfmpi speedup bhf/* --model "${bench[@]}" --bench allreduce.json >bhf.txt
hfmpi speedup bhf/* "${bench[@]}" --latency 2us --bandwidth 10GB/s | sed -n '/^Model/,$p' >network.txt
hfmpi speedup shf/* --model "${bench[@]}" --bench allreduce.json --out speedup.png >/dev/null
cat load.txt shf.txt bhf.txt network.txt
