"""What must never stand in a run directory: which variables hold a secret, what one looks like, which files keep them.

Settings are frozen into job.yaml and submit.sbatch, code into code/ and code.diff, and all of them may be read by others.
A secret reaches the nodes another way: Slurm hands the submitting shell's environment on, and a file that SETUP_SCRIPT
names is sourced by every attempt.
"""

import re
from collections.abc import Mapping
from pathlib import PurePath

from jobs.config.settings import Job
from jobs.core.errors import SettingError

# The last word of a name decides: WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY; not TOKENIZERS_PARALLELISM, HF_TOKEN_PATH, MAX_TOKENS, NCCL_IB_PKEY.
_NAME = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|PAT|APIKEY|KEY(?:_ID)?|WEBHOOK(?:_URL)?)\d*$", re.I)
# How well-known ones begin, and a password inside a URL.
_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|wandb_v1_\w{20,})"
    r"|(?<=://)[^/\s:@'\"]*:[^/\s@'\"]+(?=@)"
)
_KEY_BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S)

# Files that exist to keep secrets: of their names, and of their endings.
_FILES = frozenset({".env", ".envrc", ".netrc", "_netrc", ".pypirc", ".npmrc", ".git-credentials", ".pgpass", ".htpasswd", "credentials", "credentials.json", "secrets.json", "secrets.yaml", "secrets.yml", "secrets.toml", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519"})  # fmt: skip
_ENDINGS = frozenset({".pem", ".key", ".p12", ".pfx", ".jks", ".keystore", ".ppk"})
_HARMLESS = ("example", "sample", "template", "dist")
# Shorter values are found everywhere: in `true`, in a version, in a word.
_LEAST_LENGTH = 8

HOW_TO_HAND_OVER = "Export it in the shell that submits (Slurm hands its environment on), or in a file that SETUP_SCRIPT names and only you can read."


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name is taken for a secret."""
    return _NAME.search(name) is not None


def is_secret_file(path: PurePath) -> bool:
    """Whether a file is one that keeps secrets: .env and .env.local, but not .env.example; private keys; credentials."""
    name = path.name.lower()
    if name.startswith(".env.") or name.endswith(".env"):
        return not name.endswith(_HARMLESS)
    return name in _FILES or path.suffix.lower() in _ENDINGS


def looks_secret(text: str) -> bool:
    """Whether a text holds something of the shape of a well-known token, a password in a URL or a private key."""
    return _VALUE.search(text) is not None or _KEY_BLOCK.search(text) is not None


def masked(text: str) -> str:
    """The text with everything that looks secret replaced by ***."""
    return _KEY_BLOCK.sub("*** (private key)", _VALUE.sub("***", text))


def secrets_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Name -> value of the variables that hold a secret and can be told from an ordinary word when they are looked for."""
    return {
        name: value
        for name, value in environ.items()
        if is_secret_name(name) and len(value) >= _LEAST_LENGTH and not value.startswith("/") and not value.isalpha()
    }


def check(job: Job, origins: Mapping[str, str], secrets: Mapping[str, str]) -> None:
    """Raises SettingError with one line for each setting that would carry a secret into job.yaml and submit.sbatch.

    `secrets` are those of the environment (`secrets_of`), found once for all runs that are submitted together."""
    faults = []
    for name, value in job.node_env.items():
        if is_secret_name(name) or looks_secret(value):
            faults.append(
                f"NODE_ENV: {name} looks like a secret ({origins.get('node_env', 'default')}); it would stand in job.yaml and submit.sbatch, where others may read it. {HOW_TO_HAND_OVER}"
            )
    # What nobody gave is no secret.
    for name in (name for name, origin in origins.items() if origin not in ("default", "derived") and name in Job.model_fields):
        text = job.text(name)
        held = [variable for variable, value in secrets.items() if value in text]
        if name != "node_env" and (held or looks_secret(text)):
            what = f"holds the value of {held[0]}" if held else "holds something that looks like a secret"
            faults.append(f"{name.upper()} {what} ({origins.get(name, 'default')}); settings stand in job.yaml, where others may read them. {HOW_TO_HAND_OVER}")
    if faults:
        raise SettingError("\n".join(faults))
