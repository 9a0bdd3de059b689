"""The environment in which Slurm's clients are called."""

import re
from collections.abc import Mapping


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without variables of an outer job and without those that filter or format answers of Slurm's clients.

    Variables that select the cluster or authenticate the user (`SLURM_CONF`, `SLURM_CONF_SERVER`, `SLURM_JWT`) stay."""
    outer = re.compile(
        r"^(SLURM_(?!CONF$|CONF_SERVER$|JWT$)|SBATCH_|SRUN_|SALLOC_|SQUEUE_|SACCT_|SACCTMGR_|SINFO_|SCONTROL_|SCANCEL_|SPRIO_|SSHARE_|SREPORT_|SSTAT_|PMI|PMIX|MASTER_ADDR$|MASTER_PORT$|RANK$|WORLD_SIZE$|LOCAL_RANK$|LOCAL_WORLD_SIZE$|HOLDFAST_(?:ATTEMPT|RUN_DIR|JOB_ID|RANK_LOG|LOG_OFFSET|STARTED)$)"
    )
    return {name: value for name, value in environ.items() if not outer.match(name)}
