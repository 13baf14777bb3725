#!/bin/bash
# Separate songs on all nodes of a Slurm job. Arguments are those of `kmdx separate`:
#   sbatch --nodes=4 --gpus-per-node=8 recipes/cluster/slurm.sh /music -o /stems --ensemble htdemucs_ft
#SBATCH --job-name=kmdx
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail

port=${RAY_PORT:-6379}
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
if ray get-auth-token --generate >/dev/null 2>&1; then # older versions of Ray have no tokens
    export RAY_AUTH_MODE=token                         # the token is in the home folder, which all nodes share
fi
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

srun --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --node-ip-address="$ip" --port="$port" --include-dashboard=false --block &
for _ in {1..60}; do
    ray health-check --address "$ip:$port" 2>/dev/null && break
    sleep 1
done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
    srun --nodes=$others --ntasks=$others --exclude="$head" ray start --address="$ip:$port" --block &
fi
kmdx separate "$@" --cluster "$ip:$port"
