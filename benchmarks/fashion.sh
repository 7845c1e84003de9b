#!/usr/bin/env bash
# The demo's pipeline on real product photos: serve, crawl, pretrain a miniature, describe, distil, embed, tune a
# retriever, retrieve, tune, evaluate.
#
#   FASHION_CATALOG=converter.py benchmarks/fashion.sh DATA [OUT]
#
# DATA holds images/<id>.jpg and styles.csv of the Fashion Product Images set. FASHION_CATALOG is your own Python script
# that converts them into a catalogue: docs/benchmarks.md says what it must write. Writes OUT/summary.json and
# OUT/evaluation/report.html. docs/benchmarks.md has the results, docs/real_photos.md says how the settings were chosen.
#
# FASHION_CATALOG the converter; not needed with FASHION_REUSE
# FASHION_SEED    seed of everything (0)
# FASHION_REUSE   OUT of a finished run: its catalogue, shards and base model are used, so that FASHION_SEED is the seed of
#                 stage 1, of the retriever and of stage 2 alone; leaves out `base_photos`, which depends on none of
#                 them, and tuning on retrieved lists. Several such runs may run at the same time
# FASHION_DENSE   folder of a sentence-transformers model: adds the arm `dense`
#
# Run the same line again after a stop: finished steps are not repeated (a stopped pretraining starts from the beginning).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=${1:-}
out=${2:-fashion-out}
tool=${FASHION_CATALOG:-}
port=${FASHION_PORT:-8765}
seed=${FASHION_SEED:-0}
threads=${FASHION_THREADS:-2}
reuse=${FASHION_REUSE:-}

usage="usage: FASHION_CATALOG=converter.py $0 DATA [OUT]"
if [[ ! -f $data/styles.csv || ! -d $data/images ]]; then
  echo "$usage: no styles.csv and images/ in DATA '$data'" >&2
  exit 2
fi
if [[ -z $reuse && ! -f $tool ]]; then
  echo "$usage: no catalogue converter at FASHION_CATALOG '$tool'" >&2
  exit 2
fi
[[ -x $here/../.venv/bin/lavic ]] && PATH=$here/../.venv/bin:$PATH

mkdir -p "$out"
if [[ -f $out/seed && $(<"$out/seed") != "$seed" ]]; then
  echo "$out was begun with FASHION_SEED=$(<"$out/seed"): use that seed, or choose another OUT" >&2
  exit 2
fi
echo "$seed" >"$out/seed"
if [[ -n $reuse ]]; then
  for part in catalog shards base; do
    [[ -e $out/$part ]] || ln -s "$(realpath "$reuse/$part")" "$out/$part"
  done
fi
log=$out/seconds.tsv
step() { # NAME COMMAND...: prints a command, runs it and logs its seconds
  local name=$1 began
  shift
  began=$(date +%s)
  echo
  echo "\$ $*"
  "$@"
  printf '%s\t%s\n' "$name" "$(($(date +%s) - began))" >>"$log"
}

catalog=$out/catalog
base=$out/base
sets=("$out/shards/train" "$out/shards/valid" "$out/shards/test")
crawl=(lavic crawl --config crawl-mini --set fashion --photos-per-shard 1000)
if [[ -z $reuse ]]; then
  if [[ ! -f $catalog/looks_all.jsonl ]]; then
    step catalog python "$tool" --images "$data/images" --styles "$data/styles.csv" --out "$catalog" \
      --base-url "http://127.0.0.1:$port" --conversations 40000 --seed "$seed"
    step catalog python "$here/fashion_catalogue.py" "$catalog" --styles "$data/styles.csv" \
      --images "$data/images" --seed "$seed"
  fi

  lavic mini serve --folder "$data/images" --port "$port" &
  server=$!
  trap 'kill $server' EXIT
  sleep 2
  kill -0 $server # another server on the port: it would have ended by now

  step crawl "${crawl[@]}" --items "$catalog/item2meta_train.json" --out "$out/shards/train"
  step crawl "${crawl[@]}" --items "$catalog/item2meta_valid.jsonl" --out "$out/shards/valid" --split valid
  step crawl "${crawl[@]}" --items "$catalog/item2meta_test.json" --out "$out/shards/test" --split test
  step verify lavic verify "$out/shards/train"

  [[ -f $base/model.safetensors ]] || step pretrain lavic mini pretrain --shards "$out/shards/train" \
    --valid "$out/shards/valid" --train "$catalog/base.jsonl" --looks "$catalog/looks.jsonl" --out "$base" \
    --start mini --minimum 3 --threads "$threads" --pretrain.seed "$seed" --pretrain.batch-size 16 --pretrain.augment \
    --pretrain.language-steps 2500 --pretrain.mastery 0.75 --pretrain.final-mastery 0.95 --pretrain.vision-steps 2500 \
    --pretrain.neighboring-ids 0.5 --pretrain.text-lookup-every 4 --pretrain.describe-as-items 0.5 \
    --pretrain.title-weight 1 --pretrain.photo-lookup-start 20 --pretrain.photo-lookup-every 1 \
    --pretrain.photo-lookup-extra-requests 4 --pretrain.photo-lookup-as-items --pretrain.photo-lookup-max-distance 0 \
    --pretrain.photo-lookup-alignment 1 --pretrain.photo-lookup-mastery 0.6 --pretrain.weight-decay 0.05

  step describe lavic describe --config describe-mini --model.name "$base" --max-new-tokens 40 \
    --shards "$out/shards/train"
fi

step distill lavic distill --config distill-mini --model.name "$base" --max-length 128 \
  --select best --teacher-top-k 16 --teacher-patches 1 --lora.r 64 --loop.steps 800 --loop.seed "$seed" \
  --shards "$out/shards/train" --valid "$out/shards/valid" --out "$out/runs/distill" --nproc 2
embed=(lavic embed --config embed-mini --model.name "$base" --shards "${sets[@]}")
step embed "${embed[@]}" --adapter "$out/runs/distill" --out "$out/store"
step embed "${embed[@]}" --out "$out/store_undistilled"

head -300 "$catalog/valid.jsonl" >"$out/valid.jsonl"
head -1200 "$catalog/test.jsonl" >"$out/test.jsonl"
step tune_retriever lavic tune-retriever --config tune-retriever-mini --model.name "$base" --store "$out/store" \
  --train "$catalog/train.jsonl" --valid "$out/valid.jsonl" --head.seed "$seed" --out "$out/runs/retriever"
retrieve=(lavic retrieve --items "$catalog/meta_Fashion.jsonl" --store "$out/store" --index "$out/index"
  --tokens.retriever "$out/runs/retriever" --draws 1000)
step retrieve "${retrieve[@]}" --methods bm25 tokens --conversations "$out/test.jsonl" --out "$out/retrieval"
step retrieve "${retrieve[@]}" --methods tokens --key candidates_tokens \
  --conversations "$catalog/train.jsonl" "$out/valid.jsonl" "$out/test.jsonl" --out "$out/lists"

tune=(lavic tune --config tune-mini --model.name "$base" --lora.r 64 --lora.alpha 128 --loop.steps 400 --loop.lr 1e-3
  --loop.eval-every 50 --loop.seed "$seed" --nproc 2)
given=(--train "$catalog/train.jsonl" --valid "$out/valid.jsonl")
from_search=(--train "$out/lists/train.jsonl" --valid "$out/lists/valid.jsonl" --candidates candidates_tokens --top 10)
step tune "${tune[@]}" "${given[@]}" --store "$out/store" --out "$out/runs/tune"
step tune_controls "${tune[@]}" "${given[@]}" --store "$out/store" --tokens none --out "$out/runs/tune_text_only"
step tune_controls "${tune[@]}" "${given[@]}" --store "$out/store_undistilled" --out "$out/runs/tune_undistilled"
[[ -n $reuse ]] || step tune_retrieved "${tune[@]}" "${from_search[@]}" --store "$out/store" --out "$out/runs/tune_retrieved"

evaluate=(lavic evaluate --bundle "$out/runs/tune/bundle" --store "$out/store" --nproc 2)
arms=(lavic shuffled blank noise words before_tuning base_titles words_before_tuning
  popularity repeat_last bm25 list_order random)
compared=()
if [[ -z $reuse ]]; then
  arms+=(base_photos)
  compared=(--compare "tuned_on_retrieved=$out/runs/tune_retrieved/bundle")
fi
dense=()
if [[ -n ${FASHION_DENSE:-} ]]; then
  arms+=(dense)
  dense=(--dense.model "$FASHION_DENSE")
fi
step evaluate "${evaluate[@]}" --test "test=$catalog/test.jsonl" "strangers=$catalog/strangers.jsonl" --limit 1200 \
  --arms "${arms[@]}" "${dense[@]}" --words "$catalog/looks_all.jsonl" --train "$catalog/train.jsonl" \
  --items "$catalog/meta_Fashion.jsonl" --compare "text_only=$out/runs/tune_text_only/bundle" \
  "undistilled=$out/runs/tune_undistilled/bundle@$out/store_undistilled" \
  --shards "${sets[@]}" --runs "$out/runs/distill" "$out/runs/tune" --gallery 60 \
  --title "Real photos: does it recommend by looking?" --out "$out/evaluation"
step evaluate "${evaluate[@]}" --test "test=$out/lists/test.jsonl" --candidates candidates_tokens --top 10 \
  --arms lavic list_order random --out "$out/evaluation_retrieved" "${compared[@]}"

python "$here/fashion_summary.py" "$out"
