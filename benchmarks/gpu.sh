#!/usr/bin/env bash
# The tests that need a GPU and the benchmarks on it, in BUDGET seconds at most; then one table, and OUT/gpu.json and
# OUT/gpu.log. In the root of the repository:
#   bash benchmarks/gpu.sh
#   PARTS="tests sampling" bash benchmarks/gpu.sh
#   DEVICE=cpu TINY=1 bash benchmarks/gpu.sh              tries the script itself
# ENCODER_ROOT: folder with models/PACK of the checkpoint's encoder, for the identity loss. COMPILE=1: also compiled
# training, which takes minutes.
set -uo pipefail
DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu} BUDGET=${BUDGET:-480} TESTS=${TESTS:-6}
PARTS=${PARTS:-tests sampling published fifty training recognizer generation}
START=$(date +%s) ROWS=$(mktemp -d) GROUP= SMI=
mkdir -p "$OUT" && : > "$OUT/gpu.log"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 UIFACE_TEST_DEVICE=$DEVICE UIFACE_CUDA_REPORT=$ROWS/tests.json

kill_group() { # what a part has started and not ended: nothing may run beside the next one
  [ -n "$GROUP" ] && kill -KILL -- "-$GROUP" 2> /dev/null
  GROUP=
}
trap 'kill_group; [ -n "$SMI" ] && kill "$SMI" 2> /dev/null' EXIT
trap 'exit 130' INT TERM

part() { # NAME SECONDS COMMAND...: skipped where the budget is used up, interrupted after so many seconds
  local name=$1 limit=$2 began now status
  began=$(date +%s)
  shift 2
  case " $PARTS " in *" $name "*) ;; *) return ;; esac
  now=$((BUDGET - began + START))
  [ "$now" -lt 15 ] && { echo "== $name: skipped, no time is left"; return; }
  echo "== $name" >> "$OUT/gpu.log"
  # a session of its own, whose group is killed as a whole: `timeout` ends as soon as its own child has ended
  setsid timeout -k 10 -s INT $((limit < now ? limit : now)) "$@" >> "$OUT/gpu.log" 2>&1 &
  GROUP=$!
  wait "$GROUP"
  status=$?
  kill_group
  echo "== $name: ended with $status after $(($(date +%s) - began)) s"
}
rates() { # NAME SECONDS SCRIPT OPTIONS...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" "benchmarks/$1.py" "${@:2}" --device "$DEVICE" --output "$ROWS/$name.json"
}

if [ "$DEVICE" = cuda ]; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  nvidia-smi --query-gpu=power.draw,clocks.sm,temperature.gpu --format=csv,noheader,nounits -lms 500 > "$ROWS/power.csv" &
  SMI=$!
fi
if [ "${TINY:-0}" = 1 ]; then
  SMALL="--num-inference-steps 2 --rounds 1" ALL="float32 bf16" B1="1 2" B2=1 B3=1 B4=2 B5=2 B6=1 STEPS=2 PICTURES="--identities 2 --images 2"
  SELECT="parity and float32"
else
  SMALL="--num-inference-steps 10 --rounds 3" ALL="float32 tf32 bf16" B1="16 64 256 1024" B2="64 256" B3=256 B4="64 512 1024 2048"
  B5=512 B6="16 256" STEPS=50 PICTURES="--identities 16 --images 64" SELECT=""
fi
part tests 200 "$PYTHON" -m pytest -q -n "$TESTS" -p no:cacheprovider tests/test_cuda.py --durations=10 -k "$SELECT"
rates sampling 100 sampling $SMALL --precision $ALL --batch-sizes $B1
if [ "${TINY:-0}" != 1 ]; then
  rates published 120 sampling --model published $SMALL --precision $ALL --batch-sizes $B2 --plain
  rates fifty 60 sampling --model published --num-inference-steps 50 --rounds 1 --precision bf16 --batch-sizes $B3
fi
rates training 150 training --rounds 15 --precision bf16 --batch-sizes $B4 --decoded-samples 64 \
  ${ENCODER_ROOT:+--encoder-root "$ENCODER_ROOT"} ${COMPILE:+--compile}
rates recognizer 60 training --rounds 10 --precision bf16 --batch-sizes $B5 --recognizer '{"layers": 50}'
rates generation 120 generation rates --num-inference-steps $STEPS --precision float32 bf16 --batch-sizes $B6 $PICTURES
"$PYTHON" - "$ROWS" "$OUT/gpu.json" <<'P'
import json, statistics, sys
from pathlib import Path

rows, everything = Path(sys.argv[1]), {}
for file in sorted(rows.glob("*.json"), key=lambda file: file.stat().st_mtime):
    everything[file.stem] = found = json.loads(file.read_text())
    print(f"== {file.stem}")
    table = found["rows"] if file.stem != "tests" else [{"test": name, **row} for name, row in found.items()]
    for row in table:
        figures = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        print("  " + "  ".join(f"{name} {value}" for name, value in figures.items()))
if (rows / "power.csv").exists():
    watts = [line.split(",")[0] for line in (rows / "power.csv").read_text().splitlines()[:-1]]
    watts = [float(each) for each in watts if each.replace(".", "").isdigit()] or [0.0]
    everything["watts"] = {"mean": round(statistics.fmean(watts)), "most": round(max(watts))}
    print(f"== watts: {everything['watts']}")
Path(sys.argv[2]).write_text(json.dumps(everything, indent=1) + "\n")
P
grep -aE "^(FAILED|ERROR|XFAIL|SKIPPED)|^[0-9]+ (passed|failed)|^[A-Za-z.]*Error" "$OUT/gpu.log"
echo "total $(($(date +%s) - START)) s"
