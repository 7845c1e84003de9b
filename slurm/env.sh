# shellcheck shell=bash
# What the batch scripts need to know of your site. Edit the defaults, or give values from outside:
#
#   RDZV_PORT=29400 LAVIC_VENV=$HOME/venvs/lavic sbatch slurm/train.sbatch ...

# Where lavic is installed. Put `module load` lines here if your site has them.
: "${LAVIC_VENV:=$PWD/.venv}"
if [[ -f $LAVIC_VENV/bin/activate ]]; then
  # shellcheck source=/dev/null
  source "$LAVIC_VENV/bin/activate"
fi
for program in lavic torchrun; do
  if ! command -v "$program" >/dev/null; then
    echo "env.sh: no $program on PATH; set LAVIC_VENV to a virtual environment that has it (now $LAVIC_VENV)" >&2
    exit 2
  fi
done

# Processes on each node: one per GPU, one in all where there is none.
: "${RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"

# Where the nodes meet: the job's first node, at a port that two jobs on it are unlikely to share and that lies below
# those Linux hands out by itself.
: "${RDZV_HOST:=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}"
: "${RDZV_PORT:=$((10000 + SLURM_JOB_ID % 20000))}"

# Since SLURM 22.05 srun does not take this over from sbatch.
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}
threads=$((SRUN_CPUS_PER_TASK / RANKS_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

# How long torchrun waits for the ranks to save and leave once it was told to stop. Older ones wait 30 s whatever this says.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}

# Compute nodes without internet read the base model from a folder that was filled on a login node.
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1

# On a node with several networks name the one the nodes share.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
