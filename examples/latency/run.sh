#!/usr/bin/env bash
# Tests whether the model of docs/speedup.md predicts the cost of a slow network: two ranks in network namespaces
# that are joined by a wire with a given delay, compared with one rank; needs root and /dev/net/tun.
#
#   examples/latency/run.sh FOLDER
#
# A few minutes on two cores. The machine should be otherwise idle. docs/speedup.md shows report.txt.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "$1"
cd "$1"
[[ -e kjv.h5 ]] || hfmpi prepare --corpus kjv kjv.h5

# UCX would detect that both ranks share this machine's memory, and bypass the wire.
export UCX_TLS=tcp,self MPIR_CVAR_NOLOCAL=1 OPENBLAS_NUM_THREADS=1
joined=(ip netns exec hfmpi0 mpirun -localhost 10.77.0.1 -launcher ssh -launcher-exec "$here/in_namespace"
    -hosts "10.77.0.1,10.77.0.2" -n)
job=(--optimizer shf --max-steps 6 --threads 1 --evaluate-every 1000000 --checkpoint-every 1000000)

delays=(0 0.002 0.02)
batches=(--batch 1 --batch 2 --batch 4 --batch 8 --batch 16 --batch 32)

[[ -e alone/DONE ]] || hfmpi train kjv.h5 "${job[@]}" --out alone >>train.log
[[ -e products.json ]] || hfmpi bench products --model mlstm --data kjv.h5 "${batches[@]}" --json >products.json
[[ -e gradients.json ]] || hfmpi bench gradients --model mlstm --data kjv.h5 "${batches[@]}" --json >gradients.json
for delay in "${delays[@]}"; do
    wire=(python "$here/wire.py" --delay "$delay")
    [[ -e link-$delay.json ]] ||
        "${wire[@]}" "${joined[@]}" 2 hfmpi bench allreduce --model mlstm --data kjv.h5 --json >"link-$delay.json"
    [[ -e wire-$delay/DONE ]] ||
        "${wire[@]}" "${joined[@]}" 2 hfmpi train kjv.h5 "${job[@]}" --out "wire-$delay" >>train.log
done
python "$here/report.py" "${delays[@]}" | tee report.txt
