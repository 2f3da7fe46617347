#!/usr/bin/env bash
# The runs of docs/results/kjv.md: King James Bible, full size, two ranks, equal wall time.
#
#   examples/kjv/run.sh FOLDER [SECONDS_LONG SECONDS_SHORT]
#
# About 70 minutes on two cores with the default of 1200 and 600 seconds. The machine should be otherwise idle.
# An interrupted run resumes when the script is started again.
set -euo pipefail
folder="$1" long="${2:-1200}" short="${3:-600}"
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "$folder"
cd "$folder"
[[ -e kjv.h5 ]] || hfmpi prepare --corpus kjv kjv.h5

train() {
    mpirun -n 2 hfmpi train kjv.h5 --out "$1-$2" --model "$1" --optimizer "$2" --max-seconds "$3" >>"$1-$2.log"
    tail -n 1 "$1-$2.log"
}
train mlstm shf "$long"
train lstm sgd "$long"
train mlstm sgd "$short"
train lstm shf "$short"
train lstm adam "$short"

runs=(mlstm-shf lstm-sgd mlstm-sgd lstm-shf lstm-adam)
hfmpi plot "${runs[@]}" --out kjv.png
python "$here/table.py" "${runs[@]}"
