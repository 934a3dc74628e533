#!/usr/bin/env bash
# The committed figures of head and GAE on a CPU, and README's table and plot from them, by one command on an idle machine:
#
#     bash benchmarks/run_cpu.sh [PART ...]        none: all, in the order below
#
# head       DPO and PPO, bf16, SmolLM2-135M's head          scaling    cost as N, V and T grow
# fp32       the same in fp32                                selective  log-probs from logits that exist
# wide       DPO and PPO, bf16, 2048x32000, Qwen2.5-0.5B's   ablation   one optimisation off at a time
# losses     GRPO, KTO, SFT, log-probs, SmolLM2-135M's       gae        beside the loops of others
# longest    the longest DPO pair in 1 GiB                   accuracy   real hidden states, which are fetched
# memory     resident memory by workspace, Qwen2.5-0.5B's    readme     tables, plot and baseline.json from the rows
#
# Each part writes benchmarks/results/PART_cpu_KERNEL.jsonl anew, a line a row with device, versions and commit.
# $PYTHON: the interpreter with torch and the peers: pip install '.[bench]', and --no-deps verl==0.9.1, whose own needs
# are many (default python3). A peer that is not installed is a row that says so.
# Exit status: 0, or 1 if a part failed (the others still run), or 2 for a wrong part.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
ALL=(head fp32 wide losses longest memory scaling selective ablation gae accuracy readme)
for part in "$@"; do
  [[ " ${ALL[*]} " == *" $part "* ]] || { echo "run_cpu.sh: parts are ${ALL[*]}; got $part" >&2; exit 2; }
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
kernel=$("$PYTHON" -c 'from fastpref.kernels.cpu.head import isa; print(isa())') || exit 1

bench() { "$PYTHON" -m fastpref bench --device cpu "$@"; }
rows() { echo "--rounds 5 --longest 10 --json $file"; }  # one contender is given 10 s, or one round

head() { bench head --loss dpo ppo --dtype bfloat16 $(rows); }
fp32() { bench head --loss dpo ppo --dtype float32 $(rows); }
# without who takes a minute a step here, and without a second way to call Liger
FEW="fastpref naive naive-compiled liger-whole liger-ce trl torch-lce cce quack"
wide() {
  bench head --shape 2048x32000 Qwen2.5-0.5B --pairs 4 --length 256 --loss dpo ppo --dtype bfloat16 $(rows) --contenders $FEW
}
losses() { bench head --loss score logps grpo kto sft --head trained --dtype bfloat16 $(rows) --contenders $FEW; }
longest() { bench memory --dtype bfloat16 --json "$file"; }
memory() { "$PYTHON" -m fastpref.benchmarks.memory_cpu --rounds 1 --json "$file"; }
scaling() { bench scaling --dtype bfloat16 --rounds 3 --json "$file"; }
selective() { bench selective --json "$file"; }
ablation() { bench ablation --rounds 3 --json "$file"; }
gae() { bench gae --json "$file"; }
accuracy() { bench accuracy --json "$file"; }
readme() { "$PYTHON" -m fastpref.benchmarks.readme && "$PYTHON" -m fastpref.benchmarks.check --update; }

failed=()
for part in "${@:-${ALL[@]}}"; do
  start=$SECONDS file=benchmarks/results/${part}_cpu_$kernel.jsonl
  echo "== $part"
  rm -f "$file"
  "$part" || failed+=("$part")
  echo "== $part: $((SECONDS - start)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "run_cpu.sh: failed: ${failed[*]}" >&2; exit 1; }
