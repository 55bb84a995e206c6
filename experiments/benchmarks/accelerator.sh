#!/bin/bash
# Times each engine and training step at the shape of an 8B model, with random weights in bfloat16, on
# the accelerators of this machine: tokens/s, and the share of what large matrix products reach there.
#
#     bash experiments/benchmarks/accelerator.sh [OUT]
#
# One call takes at most SECONDS_AT_MOST (540). A program that has no time left or no room is left out,
# and the table says so. OUT (accelerator/ by default) gets a JSON file a program, table.txt and where it
# was measured. MODEL names another shape or config, TOKENS and PROGRAMS what else to run.
set -euo pipefail
out=${1:-accelerator}
end=$((SECONDS + ${SECONDS_AT_MOST:-540}))
model=${MODEL:---shape=llama31_8b}
programs=${PROGRAMS:-loss exact exact16 exact_lora factored projected_lora projected_lora_sparse
    mean_gradient lora_step full_step}
mkdir -p "$out"
{
    git rev-parse HEAD 2>/dev/null || echo "no commit"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || true
    python -c 'import jax; print("jax", jax.__version__, jax.devices())'
} | tee "$out/where.txt"
for tokens in ${TOKENS:-1024 4096}; do
    for program in $programs; do
        left=$((end - SECONDS))
        file="$out/$program-$tokens.json"
        if [ "$left" -lt 20 ]; then
            echo "$program, $tokens tokens: left out, no time" | tee -a "$out/where.txt"
        elif ! timeout "$left" python -m diq_jax plan --measured "$model" --json \
            --rows=$((8192 / tokens > 0 ? 8192 / tokens : 1)) --tokens="$tokens" \
            --programs="$program" > "$file.part" 2> "$out/$program-$tokens.log"; then
            echo "$program, $tokens tokens: left out, see $program-$tokens.log" | tee -a "$out/where.txt"
        else
            mv "$file.part" "$file"
        fi
        rm -f "$file.part"
    done
done
python - "$out" <<'PYTHON' | tee "$out/table.txt"
import json, pathlib, sys

from diq_jax.pods import plan

rows = []
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.json"), key=lambda f: f.stat().st_mtime):
    tokens = file.stem.rpartition("-")[2]
    for row in json.loads(file.read_text())["rows"]:
        rows.append(row | {"program": f"{row['program']}, {tokens}"})
print(plan.table(rows) if rows else "nothing was measured")
PYTHON
