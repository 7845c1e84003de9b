# shellcheck shell=bash
# What the batch scripts share. They source it; it does nothing by itself but read env.sh and open the log.
#
#   run_ranks COMMAND ...   one rank per GPU on every node
#   run_once COMMAND ...    one process on the first node
#   run_on_ray COMMAND ...  a Ray over all nodes, then one process on the first
#
# Each ends the script with the command's exit code, or puts the job into the queue again.
set -euo pipefail

say() { echo "$(date '+%F %T') $*"; }

# The address SLURM itself uses for a node; a name need not resolve on every site.
address_of() { scontrol show node "$1" -o | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'; }
first_address() { address_of "$first_node"; }

# -- One program on the nodes -----------------------------------------------------------------------------------------

# step NAME [srun's flags] -- PROGRAM ...: starts a job step and leaves its process id in `step_pid`. USR1 means nothing
# to what it starts until that asks for it: a request to stop that comes while a model is loading must not kill.
step() {
  local name=$1 flags=() more=() prefix=()
  shift
  while [[ $1 != -- ]]; do
    flags+=("$1")
    shift
  done
  shift
  read -ra more <<<"$LAVIC_SRUN"
  read -ra prefix <<<"$LAVIC_PREFIX"
  srun --job-name="$name" --overlap "${flags[@]}" ${more[@]+"${more[@]}"} \
    bash -c 'trap "" USR1; exec "$@"' "$name" ${prefix[@]+"${prefix[@]}"} "$@" &
  step_pid=$!
}

# The number of the running step of a name.
step_id() {
  squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j' | awk -v name="$1" '$2 == name {print $1}'
}

# To the processes of a step on all nodes; through srun a signal may end the step instead.
signal_step() {
  local id
  id=$(step_id "$2")
  [[ -z $id ]] || scancel --signal="$1" "$id" 2>/dev/null || true # it may be gone by now
}

# until_done NAME: waits for the step of that name, hands on requests to stop, and leaves the exit code in `code`.
until_done() {
  local name=$1 pid=$step_pid told=-99
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1 &
    wait $! || true # a signal ends this wait
    if ((!asked)) && [[ -e $LAVIC_STOP_FILE ]]; then
      say "$LAVIC_STOP_FILE is there"
      asked=1
    fi
    # More than once, since a rank hears it only when it has begun its steps.
    if ((asked && SECONDS - told >= 15)); then
      told=$SECONDS
      say "asking the ranks to save and leave"
      signal_step USR1 "$name"
    fi
  done
  code=0
  wait "$pid" || code=$?
}

# -- A look at the nodes before the start -----------------------------------------------------------------------------

# look KIND COMMAND ...: ends the job, naming the bad node, where one cannot do its part. KIND: ranks, ray or cpu.
look() {
  local kind=$1 word nodes addresses='' data=() prefix=() more=() port=$RDZV_PORT
  local seen=$LAVIC_LOGS/.seen-$SLURM_JOB_ID
  shift
  ((LAVIC_PREFLIGHT)) || return 0
  if [[ $kind == ray ]]; then port=$RAY_PORT; fi
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' ')
  for word in $nodes; do addresses+=" $(address_of "$word")"; done
  for word in "${@:2}"; do if [[ -e $word ]]; then data+=("$word"); fi; done
  read -ra prefix <<<"$LAVIC_PREFIX"
  read -ra more <<<"$LAVIC_SRUN"
  : >"$seen"
  # The nodes say what they find, one process on the first judges, and only its verdict counts. A node that hangs is one
  # that says nothing.
  code=0
  # shellcheck disable=SC2086
  (
    set +o pipefail
    timeout --kill-after=10 $((LAVIC_PREFLIGHT + 10)) \
      srun --job-name=look --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
      --kill-on-bad-exit=0 --wait=0 ${more[@]+"${more[@]}"} ${prefix[@]+"${prefix[@]}"} \
      "$LAVIC_PYTHON" -m lavic preflight --probe --kind "$kind" --nodes $nodes --addresses $addresses --port "$port" \
      --gpus "${SLURM_GPUS_ON_NODE:-0}" --ranks "$RANKS_PER_NODE" --within "$LAVIC_PREFLIGHT" --seen "$seen" \
      ${data[@]+--data "${data[@]}"} </dev/null |
      {
        srun --job-name=judge --overlap --nodes=1 --ntasks=1 --nodelist="$first_node" \
          ${more[@]+"${more[@]}"} ${prefix[@]+"${prefix[@]}"} \
          "$LAVIC_PYTHON" -m lavic preflight --read --nodes $nodes --within "$LAVIC_PREFLIGHT" || code=$?
        ((!code)) || signal_step KILL look # a node that hangs is waited for no longer
        exit "$code"
      }
  ) || code=$?
  rm -f "$seen"
  if ((code)); then finish 1; fi
  if ((asked)); then finish 75; fi # meanwhile told to stop: nothing is lost by not starting
}

# -- The three ways of starting a command -----------------------------------------------------------------------------

run_ranks() {
  local ranks=$RANKS_PER_NODE
  look ranks "$@"
  export MASTER_ADDR=$RDZV_HOST MASTER_PORT=$RDZV_PORT
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus / ranks > 0 ? cpus / ranks : 1))}
  say "lavic $*: $ranks ranks on each of $SLURM_JOB_NUM_NODES nodes, meeting at $RDZV_HOST:$RDZV_PORT"
  case $LAVIC_LAUNCHER in
    torchrun)
      step ranks --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \
        --wait="$LAVIC_WAIT" --kill-on-bad-exit=1 -- \
        "$LAVIC_PYTHON" -m lavic.launch.ranks.torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks" \
        --master-addr "$RDZV_HOST" --master-port "$RDZV_PORT" --module lavic.launch.ranks.local "$@"
      ;;
    srun)
      step ranks --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * ranks)) --ntasks-per-node="$ranks" \
        --cpus-per-task=$((cpus / ranks > 0 ? cpus / ranks : 1)) --wait="$LAVIC_WAIT" --kill-on-bad-exit=1 -- \
        "$LAVIC_PYTHON" -m lavic.launch.ranks.local "$@"
      ;;
    *)
      say "LAVIC_LAUNCHER=$LAVIC_LAUNCHER: torchrun or srun" >&2
      finish 2
      ;;
  esac
  until_done ranks
  finish "$code"
}

run_once() {
  look cpu "$@"
  say "lavic $*"
  step once --nodes=1 --ntasks=1 --nodelist="$first_node" --cpus-per-task="$cpus" -- "$LAVIC_PYTHON" -m lavic "$@"
  until_done once
  finish "$code"
}

run_on_ray() {
  local name log address folder=$RAY_TMPDIR/ray-$SLURM_JOB_ID others=$((SLURM_JOB_NUM_NODES - 1)) ray=()
  look ray "$@"
  # Whoever reaches the port could run programs as you: the nodes of this job share a token that nobody else has.
  export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
  if [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} ]]; then
    RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
    export RAY_AUTH_TOKEN
  fi
  address=$(getent ahostsv4 "$RDZV_HOST" | awk '{print $1; exit}') # Ray wants no name
  export RAY_ADDRESS=$address:$RAY_PORT
  log=$LAVIC_LOGS/$SLURM_JOB_ID-$restart-ray.log
  say "lavic $*: Ray on $SLURM_JOB_NUM_NODES nodes of $cpus CPUs, head at $RAY_ADDRESS; its words are in $log"
  step ray-head --nodes=1 --ntasks=1 --nodelist="$first_node" --cpus-per-task="$cpus" -- \
    "$LAVIC_PYTHON" -m ray.scripts.scripts start --block --head --node-ip-address="$address" --port="$RAY_PORT" \
    --num-cpus="$cpus" --temp-dir="$folder" --include-dashboard=false >>"$log" 2>&1
  ray+=("$step_pid")
  if ((others)); then
    step ray-workers --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="$first_node" \
      --cpus-per-task="$cpus" -- \
      "$LAVIC_PYTHON" -m ray.scripts.scripts start --block --address="$RAY_ADDRESS" --num-cpus="$cpus" >>"$log" 2>&1
    ray+=("$step_pid")
  fi
  step job --nodes=1 --ntasks=1 --nodelist="$first_node" --cpus-per-task="$cpus" -- \
    "$LAVIC_PYTHON" -m lavic "$@" --ray.nodes "$SLURM_JOB_NUM_NODES"
  until_done job
  # Nothing in it is worth keeping, and asked politely each node takes half a minute to leave.
  say "ending Ray"
  for name in ray-workers ray-head; do signal_step KILL "$name"; done
  wait "${ray[@]}" || true
  step clean --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 -- rm -rf "$folder"
  wait "$step_pid" || true
  finish "$code"
}

# -- The end ----------------------------------------------------------------------------------------------------------

# finish CODE: ends the script. 75, stopped on request with a checkpoint, is the only one that goes into the queue again.
finish() {
  local code=$1
  trap '' TERM # SLURM ends what it queues again: first this has to be said
  case $code in
    0) say "done" ;;
    75)
      if [[ -e $LAVIC_STOP_FILE ]]; then
        say "stopped; not queued again while $LAVIC_STOP_FILE is there"
      elif ((restart >= LAVIC_REQUEUES)); then
        say "stopped; not queued again after $restart restarts (LAVIC_REQUEUES)"
      elif scontrol requeue "$SLURM_JOB_ID"; then
        say "stopped; queued again, restart $((restart + 1)) of at most $LAVIC_REQUEUES"
      else
        say "stopped; SLURM does not queue it again: submit the same line once more to go on"
      fi
      ;;
    2) say "exit code 2: mend what is said above, then submit the same line again" ;;
    *) say "failed with exit code $code, see above; submit the same line again to go on" ;;
  esac
  exec >&- 2>&- # so that the log is whole before SLURM ends what is left
  wait "$log_pid" || true
  exit "$code"
}

# -- The beginning ----------------------------------------------------------------------------------------------------

restart=${SLURM_RESTART_COUNT:-0}
cpus=${SLURM_CPUS_PER_TASK:-1}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
asked=0
trap 'asked=1' USR1

# shellcheck source=slurm/env.sh
source "${LAVIC_ENV:-$LAVIC_SLURM/env.sh}"
if [[ -f $LAVIC_VENV/bin/activate ]]; then
  # shellcheck source=/dev/null
  source "$LAVIC_VENV/bin/activate"
fi
if [[ -z $LAVIC_PREFIX$LAVIC_SRUN ]] && ! "$LAVIC_PYTHON" -c 'import lavic.launch' 2>/dev/null; then
  say "no lavic in $(command -v "$LAVIC_PYTHON" || echo "$LAVIC_PYTHON (not on PATH)"): set LAVIC_VENV or edit $LAVIC_SLURM/env.sh" >&2
  exit 2
fi
: "${LAVIC_WAIT:=60}"

# All that follows goes to SLURM's own log, which holds every start, and to one of this start alone.
mkdir -p "$LAVIC_LOGS"
exec > >(trap '' USR1 TERM && exec tee -a "$LAVIC_LOGS/$SLURM_JOB_ID-$restart.log") 2>&1
log_pid=$!
say "job $SLURM_JOB_ID, start $restart, on $SLURM_JOB_NODELIST"
if [[ -e $LAVIC_STOP_FILE ]]; then
  say "$LAVIC_STOP_FILE is there: nothing is started"
  finish 75
fi
