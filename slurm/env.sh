# shellcheck shell=bash
# What the batch scripts need to know of your site, and nothing else does. Every line gives way to a value from outside:
#
#   LAVIC_VENV=$HOME/venvs/lavic RDZV_PORT=29400 sbatch slurm/train.sbatch ...
#
# Edit the values, or keep a file of your own elsewhere and name it in LAVIC_ENV. It is read by bash on the first node of
# the job, in the folder that you submitted from. docs/slurm.md has the settings of three kinds of site.

# -- Software ---------------------------------------------------------------------------------------------------------

# module load cuda/12.8 python/3.12

# A virtual environment with lavic, seen by every node. Left alone where it is not there: lavic may come from a module, a
# container or PATH.
: "${LAVIC_VENV:=$PWD/.venv}"

: "${LAVIC_PYTHON:=python}"

# What stands before every program that runs on a node, split at blanks: a container, a profiler, numactl.
# LAVIC_PREFIX="apptainer exec --nv --bind /scratch lavic.sif"
: "${LAVIC_PREFIX:=}"

# More flags for every srun, split at blanks, such as those of pyxis.
# LAVIC_SRUN="--container-image=lavic.sqsh --container-mounts=/scratch,$PWD --container-workdir=$PWD"
: "${LAVIC_SRUN:=}"

# -- Places -----------------------------------------------------------------------------------------------------------

# Where each restart's log goes, seen by every node.
: "${LAVIC_LOGS:=$PWD/logs}"

# Fast disk of a node; here programs put what only they read.
# export TMPDIR=/scratch/$USER

# Where Ray makes a folder on each node, gone after the job. Its sockets stand in it, so the path must be short.
: "${RAY_TMPDIR:=/tmp}"

# Nodes without internet read the base model from a cache that was filled on a login node.
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1

# -- Network ----------------------------------------------------------------------------------------------------------

# Where the nodes meet: the job's first node, at ports that two jobs on one node are unlikely to share and that lie below
# those Linux hands out by itself.
: "${RDZV_HOST:=$(first_address)}"
: "${RDZV_PORT:=$((20000 + SLURM_JOB_ID % 12000))}"
: "${RAY_PORT:=$RDZV_PORT}"

# On nodes with several networks name the one that they share.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# -- Processes --------------------------------------------------------------------------------------------------------

# How the ranks are started: torchrun (one on each node), or srun (one task for each rank).
: "${LAVIC_LAUNCHER:=torchrun}"

# Ranks on each node: one per GPU, one in all where there is none.
: "${RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"

# -- Stopping and going on --------------------------------------------------------------------------------------------

# How often a job that stopped with a checkpoint (exit code 75) puts itself into the queue again.
: "${LAVIC_REQUEUES:=100}"

# While this file is there, the job saves, ends and is not put into the queue again.
: "${LAVIC_STOP_FILE:=$PWD/lavic-$SLURM_JOB_ID.stop}"

# Seconds for the look at the nodes before the start; 0 leaves it out.
: "${LAVIC_PREFLIGHT:=120}"
