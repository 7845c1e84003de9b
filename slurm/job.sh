# shellcheck shell=bash
# Functions of the batch scripts, which source this file. On its own it only reads env.sh and opens the log.
#
#   run_ranks COMMAND ...   one rank per GPU on every node; with `preflight`, only the check of the nodes
#   run_once COMMAND ...    one process on the first node
#   run_on_ray COMMAND ...  a Ray cluster on all nodes, and one process on the first
#   run_with_servers ...    a server of SERVE_MODEL on every node, and one process on the first
#
# Each ends the script with the command's exit code, or requeues the job.
set -euo pipefail

say() { echo "$(date '+%F %T') $*"; }

# The address by which SLURM itself reaches a node; its name does not resolve on every site.
address_of() { scontrol show node "$1" -o | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'; }
first_address() { address_of "$first_node"; }

# free_port PORT: the first port from PORT on that nothing listens on, on this node: a job's batch script runs on its
# first node, where the ranks meet. Another job, or a process that an earlier start left behind, may have the port.
free_port() {
  local port=$1
  while (: <>"/dev/tcp/127.0.0.1/$port" || : <>"/dev/tcp/$(first_address)/$port") 2>/dev/null; do
    port=$((port + 1))
  done
  echo "$port"
}

# -- Job steps --------------------------------------------------------------------------------------------------------

# start_step NAME [srun's flags] -- PROGRAM ...: starts a job step in the background; its process id is in `step_pid`.
# The program ignores USR1 until it installs a handler: a stop request that comes while a model loads must not kill it.
start_step() {
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

# The id of the running step with a name.
step_id() {
  squeue --noheader --steps --jobs="$job" --format='%i %j' | awk -v name="$1" '$2 == name {print $1}'
}

# signal_step SIGNAL NAME: to the step's processes on all nodes. A signal sent to srun instead may end the step.
signal_step() {
  local id
  id=$(step_id "$2")
  [[ -z $id ]] || scancel --signal="$1" "$id" 2>/dev/null || true # it may have ended by now
}

# wait_for_step NAME: waits for the step that was started last and forwards stop requests; its exit code is in `code`.
wait_for_step() {
  local name=$1 pid=$step_pid sent=-99
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1 &
    wait $! || true # a signal ends this wait
    if ((!stop_requested)) && [[ -e $LAVIC_STOP_FILE ]]; then
      say "$LAVIC_STOP_FILE exists"
      stop_requested=1
    fi
    # repeated, since a rank handles the signal only once it is training
    if ((stop_requested && SECONDS - sent >= 15)); then
      sent=$SECONDS
      say "asking the ranks to save and stop"
      signal_step USR1 "$name"
    fi
  done
  code=0
  wait "$pid" || code=$?
}

# -- Preflight --------------------------------------------------------------------------------------------------------

# preflight KIND COMMAND ...: checks all nodes, and ends the job if one fails. KIND: ranks, ray or cpu.
preflight() {
  local kind=$1 word nodes addresses='' data=() prefix=() more=() port=$RDZV_PORT
  local shared_file=$LAVIC_LOGS/.seen-$SLURM_JOB_ID
  shift
  ((LAVIC_PREFLIGHT)) || return 0
  if [[ $kind == ray ]]; then port=$RAY_PORT; fi
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' ')
  for word in $nodes; do addresses+=" $(address_of "$word")"; done
  for word in "${@:2}"; do if [[ -e $word ]]; then data+=("$word"); fi; done
  read -ra prefix <<<"$LAVIC_PREFIX"
  read -ra more <<<"$LAVIC_SRUN"
  : >"$shared_file"
  # Every node prints its results, and one process on the first node reads them: only its exit code counts. A node that
  # hangs is one that prints nothing.
  code=0
  # shellcheck disable=SC2086
  (
    set +o pipefail
    timeout --kill-after=10 $((LAVIC_PREFLIGHT + 10)) \
      srun --job-name=probe --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
      --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 ${more[@]+"${more[@]}"} ${prefix[@]+"${prefix[@]}"} \
      "$LAVIC_PYTHON" -m lavic preflight --probe --kind "$kind" --nodes $nodes --addresses $addresses --port "$port" \
      --gpus "${SLURM_GPUS_ON_NODE:-0}" --ranks "$RANKS_PER_NODE" --within "$LAVIC_PREFLIGHT" --seen "$shared_file" \
      ${data[@]+--data "${data[@]}"} </dev/null |
      {
        srun --job-name=report --overlap --nodes=1 --ntasks=1 --nodelist="$first_node" \
          ${more[@]+"${more[@]}"} ${prefix[@]+"${prefix[@]}"} \
          "$LAVIC_PYTHON" -m lavic preflight --read --nodes $nodes --within "$LAVIC_PREFLIGHT" || code=$?
        ((!code)) || signal_step KILL probe # do not wait for a node that hangs
        exit "$code"
      }
  ) || code=$?
  rm -f "$shared_file"
  if ((code)); then finish 1; fi
  if ((stop_requested)); then finish 75; fi # nothing is lost by not starting
}

# -- Three ways of starting a command ---------------------------------------------------------------------------------

run_ranks() {
  local ranks=$RANKS_PER_NODE
  # A task of an array: each reads files of its own.
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then set -- "${@//@TASK@/$SLURM_ARRAY_TASK_ID}"; fi
  preflight ranks "$@"
  case ${1:-} in
    preflight) finish 0 ;;
    # the ranks of these do not wait for each other: one node may be done hours before another
    describe | embed | evaluate) : "${LAVIC_WAIT:=0}" ;;
  esac
  export MASTER_ADDR=$RDZV_HOST MASTER_PORT=$RDZV_PORT
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus / ranks > 0 ? cpus / ranks : 1))}
  say "lavic $*: $ranks ranks per node, $SLURM_JOB_NUM_NODES nodes, rendezvous at $RDZV_HOST:$RDZV_PORT"
  case $LAVIC_LAUNCHER in
    torchrun)
      start_step ranks --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --cpus-per-task="$cpus" --wait="${LAVIC_WAIT:-60}" --kill-on-bad-exit=1 -- \
        "$LAVIC_PYTHON" -m lavic.launch.ranks.torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks" \
        --master-addr "$RDZV_HOST" --master-port "$RDZV_PORT" --module lavic.launch.ranks.local "$@"
      ;;
    srun)
      start_step ranks --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * ranks)) \
        --ntasks-per-node="$ranks" --cpus-per-task=$((cpus / ranks > 0 ? cpus / ranks : 1)) \
        --wait="${LAVIC_WAIT:-60}" --kill-on-bad-exit=1 -- \
        "$LAVIC_PYTHON" -m lavic.launch.ranks.local "$@"
      ;;
    *)
      say "LAVIC_LAUNCHER=$LAVIC_LAUNCHER: must be torchrun or srun" >&2
      finish 2
      ;;
  esac
  wait_for_step ranks
  finish "$code"
}

run_once() {
  preflight cpu "$@"
  say "lavic $*"
  start_step once --nodes=1 --ntasks=1 --nodelist="$first_node" --cpus-per-task="$cpus" -- "$LAVIC_PYTHON" -m lavic "$@"
  wait_for_step once
  finish "$code"
}

run_on_ray() {
  local name log address folder=$RAY_TMPDIR/ray-$SLURM_JOB_ID others=$((SLURM_JOB_NUM_NODES - 1)) ray=() nodes=ray.nodes
  if [[ $1 == serve ]]; then
    nodes=scale.nodes
    # Ray runs its workers at niceness 15: a request would wait for every other busy process of the node.
    export RAY_worker_niceness=${RAY_worker_niceness:-0}
  fi
  preflight ray "$@"
  # Anyone who connects to Ray's port can run programs as this user, so only the nodes of this job get the token.
  export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
  if [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} ]]; then
    RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
    export RAY_AUTH_TOKEN
  fi
  address=$(getent ahostsv4 "$RDZV_HOST" | awk '{print $1; exit}') # Ray needs an IP address
  export RAY_ADDRESS=$address:$RAY_PORT
  log=$LAVIC_LOGS/$SLURM_JOB_ID-$restart-ray.log
  say "lavic $*: Ray on $SLURM_JOB_NUM_NODES nodes with $cpus CPUs each, head at $RAY_ADDRESS; its log is $log"
  start_step ray-head --nodes=1 --ntasks=1 --nodelist="$first_node" --cpus-per-task="$cpus" -- \
    "$LAVIC_PYTHON" -m ray.scripts.scripts start --block --head --node-ip-address="$address" --port="$RAY_PORT" \
    --num-cpus="$cpus" --temp-dir="$folder" --include-dashboard=false >>"$log" 2>&1
  ray+=("$step_pid")
  if ((others)); then
    start_step ray-workers --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="$first_node" \
      --cpus-per-task="$cpus" -- \
      "$LAVIC_PYTHON" -m ray.scripts.scripts start --block --address="$RAY_ADDRESS" --num-cpus="$cpus" >>"$log" 2>&1
    ray+=("$step_pid")
  fi
  start_step job --nodes=1 --ntasks=1 --nodelist="$first_node" --cpus-per-task="$cpus" -- \
    "$LAVIC_PYTHON" -m lavic "$@" "--$nodes" "$SLURM_JOB_NUM_NODES"
  wait_for_step job
  # Ray is killed: nothing in it is needed any more, and a shutdown takes half a minute on each node.
  say "stopping Ray"
  for name in ray-workers ray-head; do signal_step KILL "$name"; done
  wait "${ray[@]}" || true
  start_step clean --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 -- \
    rm -rf "$folder"
  wait "$step_pid" || true
  finish "$code"
}

# On every node, a server of SERVE_MODEL with all GPUs of the node. Only this job has the servers' API key.
run_with_servers() {
  local node log urls=() more=() server_pid
  if [[ -z ${SERVE_MODEL:-} ]]; then
    say "SERVE_MODEL is not set: name the model to serve, such as llava-hf/llava-v1.6-mistral-7b-hf" >&2
    finish 2
  fi
  preflight cpu "$@"
  VLLM_API_KEY=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
  export VLLM_API_KEY
  log=$LAVIC_LOGS/$SLURM_JOB_ID-$restart-servers.log
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    urls+=("http://$(address_of "$node"):$SERVE_PORT/v1")
  done
  read -ra more <<<"$SERVE_COMMAND $SERVE_MODEL --host 0.0.0.0 --port $SERVE_PORT $SERVE_FLAGS"
  say "$SERVE_MODEL on $SLURM_JOB_NUM_NODES nodes, port $SERVE_PORT; their log is $log"
  start_step servers --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$cpus" -- "${more[@]}" >>"$log" 2>&1
  server_pid=$step_pid
  say "lavic $*"
  start_step job --nodes=1 --ntasks=1 --nodelist="$first_node" --cpus-per-task="$cpus" -- \
    "$LAVIC_PYTHON" -m lavic "$@" --endpoint.url "${urls[@]}" --endpoint.model "$SERVE_MODEL" \
    --endpoint.api-key env:VLLM_API_KEY --endpoint.startup-s "$SERVE_STARTUP"
  wait_for_step job
  say "stopping the servers"
  signal_step KILL servers
  wait "$server_pid" || true
  finish "$code"
}

# -- The end ----------------------------------------------------------------------------------------------------------

# finish CODE: ends the script. 75, stopped on request with a checkpoint, is the only code with which a job is requeued.
finish() {
  local code=$1
  trap '' TERM # SLURM ends a job that it requeues: the line below must be printed first
  case $code in
    0) say "done" ;;
    75)
      if [[ -e $LAVIC_STOP_FILE ]]; then
        say "stopped; not requeued while $LAVIC_STOP_FILE exists"
      elif ((restart >= LAVIC_REQUEUES)); then
        say "stopped; not requeued after $restart restarts (LAVIC_REQUEUES)"
      elif scontrol requeue "$job"; then
        say "stopped and requeued: restart $((restart + 1)) of at most $LAVIC_REQUEUES"
      else
        say "stopped; SLURM refuses to requeue the job: submit the same line again to continue"
      fi
      ;;
    2) say "exit code 2: fix the error above, then submit the same line again" ;;
    *) say "failed with exit code $code, see above; submit the same line again to continue" ;;
  esac
  exec >&- 2>&- # completes the log before SLURM ends the remaining processes
  wait "$log_pid" || true
  exit "$code"
}

# -- The beginning ----------------------------------------------------------------------------------------------------

# The job as SLURM's commands name it. One task of an array has the id of the whole array: they would act on all tasks.
# SLURM is asked, since the variable may come from the job that submitted this one.
job=''
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  job=$(squeue --noheader --array --jobs="$SLURM_JOB_ID" --format='%A %i' |
    awk -v id="$SLURM_JOB_ID" '$1 == id {print $2}') || true
fi
: "${job:=$SLURM_JOB_ID}"
restart=${SLURM_RESTART_COUNT:-0}
cpus=$((${SLURM_CPUS_PER_TASK:-1} * ${SLURM_NTASKS_PER_NODE:-1})) # of a node
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
stop_requested=0
trap 'stop_requested=1' USR1

# Files of the site, such as those of modules and of conda, may read variables that are not set, and would take the
# command's arguments for theirs.
command_args=("$@")
set --
set +u
# shellcheck source=slurm/env.sh
source "${LAVIC_ENV:-$LAVIC_SLURM/env.sh}"
if [[ -f $LAVIC_VENV/bin/activate ]]; then
  # shellcheck source=/dev/null
  source "$LAVIC_VENV/bin/activate"
fi
set -u
set -- ${command_args[@]+"${command_args[@]}"}
if [[ -z $LAVIC_PREFIX$LAVIC_SRUN ]] && ! "$LAVIC_PYTHON" -c 'import lavic.launch' 2>/dev/null; then
  python=$(command -v "$LAVIC_PYTHON" || echo "$LAVIC_PYTHON (not on PATH)")
  say "lavic is not installed in $python: set LAVIC_VENV, or edit $LAVIC_SLURM/env.sh" >&2
  exit 2
fi

# All later output goes to SLURM's own log, which has every start, and to a log of this start.
mkdir -p "$LAVIC_LOGS"
exec > >(trap '' USR1 TERM && exec tee -a "$LAVIC_LOGS/$SLURM_JOB_ID-$restart.log") 2>&1
log_pid=$!
say "job $SLURM_JOB_ID, start $restart, on $SLURM_JOB_NODELIST"
if [[ -e $LAVIC_STOP_FILE ]]; then
  say "$LAVIC_STOP_FILE exists: nothing is started"
  finish 75
fi
