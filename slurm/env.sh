# shellcheck shell=bash
# Settings of your site, for all batch scripts. A variable of the environment overrides the value in this file:
#
#   LAVIC_VENV=$HOME/venvs/lavic RDZV_PORT=29400 sbatch slurm/gpu.sbatch ...
#
# Edit the values, or name a copy of this file in LAVIC_ENV. bash reads it on the first node of the job, in the folder
# from which the job was submitted. docs/slurm.md has the settings of three kinds of site.

# -- Software ---------------------------------------------------------------------------------------------------------

# module load cuda/12.8 python/3.12

# A virtual environment with lavic on a file system that all nodes share. Skipped where it does not exist: lavic may
# come from a module, a container or PATH.
: "${LAVIC_VENV:=$PWD/.venv}"

: "${LAVIC_PYTHON:=python}"

# Put in front of every program that runs on a node, split at spaces: a container, a profiler, numactl.
# LAVIC_PREFIX="apptainer exec --nv --bind /scratch lavic.sif"
: "${LAVIC_PREFIX:=}"

# More flags for every srun, split at spaces, such as those of pyxis.
# LAVIC_SRUN="--container-image=lavic.sqsh --container-mounts=/scratch,$PWD --container-workdir=$PWD"
: "${LAVIC_SRUN:=}"

# -- Folders ----------------------------------------------------------------------------------------------------------

# Logs, one per start of a job, on a file system that all nodes share.
: "${LAVIC_LOGS:=$PWD/logs}"

# A fast local disk of each node, for temporary files.
# export TMPDIR=/scratch/$USER

# Ray's folder on each node, removed after the job. Its sockets are in it, so the path must be short.
: "${RAY_TMPDIR:=/tmp}"

# Nodes without internet access read the base model from a cache that was filled on a login node.
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1

# -- Network ----------------------------------------------------------------------------------------------------------

# Where the ranks meet: the job's first node, at a free port below Linux's ephemeral ports. The search starts at a port
# that depends on the job's id.
: "${RDZV_HOST:=$(first_address)}"
: "${RDZV_PORT:=$(free_port $((20000 + SLURM_JOB_ID % 12000)))}"
: "${RAY_PORT:=$RDZV_PORT}"

# On nodes with several networks: the one that they share.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# -- Processes --------------------------------------------------------------------------------------------------------

# How ranks are started: torchrun (one per node), or srun (one task per rank).
: "${LAVIC_LAUNCHER:=torchrun}"

# Ranks per node: one per GPU, or one.
: "${RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"

# -- Model servers of describe.sbatch ---------------------------------------------------------------------------------

# How a server is started; the model and its port are added.
: "${SERVE_COMMAND:=vllm serve}"
: "${SERVE_FLAGS:=--data-parallel-size ${SLURM_GPUS_ON_NODE:-1}}"
: "${SERVE_PORT:=$((RDZV_PORT + 1))}"

# Seconds that it may take to load the model.
: "${SERVE_STARTUP:=1800}"

# -- Stopping and continuing ------------------------------------------------------------------------------------------

# How often a job that stopped with a checkpoint (exit code 75) may requeue itself.
: "${LAVIC_REQUEUES:=100}"

# While this file exists, the job saves, ends and is not requeued.
: "${LAVIC_STOP_FILE:=$PWD/lavic-$SLURM_JOB_ID.stop}"

# Time limit of the preflight before each start, seconds; 0 skips it.
: "${LAVIC_PREFLIGHT:=120}"
