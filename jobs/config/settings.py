"""Every setting of a job: name, type, default, unit, bounds and help, declared once.

The YAML key is the field's name, the environment variable and the `KEY=value` word are the name in capitals,
the flag is the name behind two dashes. The types are at home in `jobs.config.types`; docs/reference/settings.md, the JSON schema and `holdfast explain` are made from here.
"""

import types
import typing
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jobs.config.types import (
    AUTO_TRACKER,
    BUCKETS,
    SMALL_BUCKET_MB,
    Arguments,
    Command,
    Environment,
    FileName,
    Fp8Backend,
    Fp8Recipe,
    Interval,
    Line,
    LongOptions,
    Megabytes,
    Minutes,
    Options,
    PrecisionWord,
    ScheduleKind,
    Slug,
    Steps,
    Text,
    Trackers,
    Words,
    format_minutes,
)
from jobs.specs.model_presets import PRESETS
from jobs.specs.precision import Precision


def setting(default: Any, help: str, *, group: str, unit: str | None = None, **bounds: Any) -> Any:
    """A field with its help text; a setting without help cannot be declared."""
    return Field(default, description=help, json_schema_extra={"group": group, "unit": unit or ""}, validate_default=False, **bounds)


class Job(BaseModel):
    """One training job, fully resolved. Made by `jobs.config.resolver.resolve`, frozen into the run directory as job.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # --- the run
    job_name: Slug = setting("", "name of the run and of the Slurm job; left out, the job file's name", group="run")
    run_id: Slug | None = setting(None, "id of the run; left out, a new one at each submit. Given, submitting twice finds the first run", group="run")
    runs_dir: Line = setting("runs", "folder that holds all run directories; must be visible on every node", group="run")
    site: Line = setting("generic", "site file: a name in slurm/sites, or a path to a YAML file", group="run")
    entry: Command | None = setting(None, "your own training script (path/to/train.py or -m module) instead of the built-in one", group="run")
    entry_args: Arguments = setting((), "arguments of your own script", group="run")
    code_include: Words = setting((), "further files or folders to freeze with the code, beside what git tracks", group="run")
    note: Text = setting("", "a remark that is kept with the run", group="run")
    notify_email: Line | None = setting(None, "who gets Slurm's mail when the run is over or an attempt fails", group="run")
    notify_webhook_file: FileName | None = setting(
        None, "file with the address to post to when the run is over; the environment variable HOLDFAST_NOTIFY_WEBHOOK does the same", group="run"
    )
    trackers: Trackers = setting(
        (AUTO_TRACKER,), "where metrics also go: auto (TensorBoard where it is installed), none, or names such as tensorboard,wandb", group="run"
    )

    # --- what to ask of Slurm
    partition: Line | None = setting(None, "Slurm partition", group="slurm")
    account: Line | None = setting(None, "Slurm account to charge", group="slurm")
    qos: Line | None = setting(None, "Slurm quality of service", group="slurm")
    nodes: int = setting(1, "number of nodes", group="slurm", ge=1, le=100_000)
    gpus_per_node: int = setting(1, "GPUs and training processes per node; on a site without GPUs, processes", group="slurm", ge=1, le=1024)
    cpus_per_gpu: int | None = setting(None, "CPU cores per training process", group="slurm", ge=1)
    mem_gb: int | None = setting(None, "memory per node", group="slurm", unit="GB", ge=1)
    time_limit: Minutes = setting(60, "time limit of one attempt: 90, 24:00:00 or 2-12:00:00", group="slurm", unit="min")
    stop_lead_s: int = setting(
        120,
        "warning before the time limit; must cover one step and one checkpoint. Slurm may send it up to 60 s early",
        group="slurm",
        unit="s",
        ge=1,
        le=65_535,
    )
    stop_signal: Literal["auto", "none", "TERM", "INT", "HUP", "USR1", "USR2"] = setting(
        "auto",
        "signal to your own script before the time limit; auto: USR2 if every rank has imported holdfast, otherwise none. Lightning handles USR1",
        group="slurm",
    )
    constraint: Line | None = setting(None, "node features to require", group="slurm")
    reservation: Line | None = setting(None, "Slurm reservation", group="slurm")
    exclude: Words = setting((), "nodes to stay away from", group="slurm")
    launch: Literal["srun", "accelerate"] = setting(
        "srun", "who starts the processes of a node: srun each of them, or accelerate launch all, as its config files need it", group="slurm"
    )
    accelerate_config: Line | None = setting(
        None, "file of `accelerate config` for your own script, with launch=accelerate; left out, none is read", group="slurm"
    )
    array_parallel: int = setting(256, "array tasks that may run at the same time", group="slurm", ge=1)
    sbatch_options: LongOptions = setting({}, "further sbatch options as name: value (without the dashes); an empty value is a bare option", group="slurm")

    # --- the site
    gpu_request: Literal["gpus-per-node", "gres", "none"] = setting("gpus-per-node", "how this site wants GPUs asked for", group="site")
    gpu_type: Line | None = setting(None, "type in the GPU request, as in gpus-per-node=h100:8", group="site")
    gpu_arch: Line | None = setting(None, "compute capability of the site's GPUs, such as sm_90; left out, not checked before queueing", group="site")
    device: Literal["auto", "cuda", "cpu"] = setting("auto", "where to train; auto takes the GPU, and a CPU only where no GPU was asked of Slurm", group="site")
    modules: Words = setting((), "environment modules to load", group="site")
    setup_script: Line | None = setting(None, "shell file on the cluster that each attempt sources first", group="site")
    node_env: Environment = setting(
        {}, "environment variables for the nodes, such as the NCCL ones; no secrets: export those in the shell that submits, or in SETUP_SCRIPT", group="site"
    )
    node_mtbf_days: float = setting(
        250.0, "days that a node runs between failures that give no warning; where checkpoint_every=auto starts from", group="site", unit="days", gt=0
    )
    node_python: Line | None = setting(None, "Python on the nodes; left out, the one that submits", group="site")
    container_image: Line | None = setting(None, "container image to train in", group="site")
    container_runtime: Literal["apptainer", "pyxis"] = setting("apptainer", "what starts the container", group="site")
    container_mounts: Words = setting((), "folders to mount, as host or host:container", group="site")
    container_python: Line = setting("python3", "Python inside the container", group="site")

    # --- what may go wrong how often
    max_node_failure: int = setting(8, "attempts that may end with a lost node", group="retries", ge=0)
    max_killed: int = setting(3, "attempts that may end with a process killed from outside", group="retries", ge=0)
    max_out_of_memory: int = setting(0, "attempts that may end out of memory before the run is given up", group="retries", ge=0)
    max_code_error: int = setting(0, "attempts that may end with an error of the code", group="retries", ge=0)
    max_hang: int = setting(2, "attempts that may end in a hang", group="retries", ge=0)
    max_storage: int = setting(1, "attempts that may end because the disk failed", group="retries", ge=0)
    max_unknown: int = setting(3, "attempts that may end for no reason that can be found", group="retries", ge=0)
    peer_exit_wait_s: int = setting(
        20, "how long the other processes may run on after one failed; in the built-in training, after one ended", group="retries", unit="s", ge=1, le=86_400
    )
    requeue_confirm_s: int = setting(
        8,
        "how long the batch script waits after its requeue until slurmctld has saved it, to repeat a request lost in a crash of slurmctld; 0 exits at once",
        group="retries",
        unit="s",
        ge=0,
        le=3600,
    )
    max_no_progress: int = setting(3, "attempts in a row that may end without a new checkpoint", group="retries", ge=1)

    hang_after_s: int = setting(
        600, "silence after which a step is taken for a hang, unless longer ones were seen; 0 turns the watchdog off", group="retries", unit="s", ge=0
    )
    hang_quiet_s: int = setting(1800, "the same for the start, the first step, and whatever was not yet seen in this run", group="retries", unit="s", ge=1)
    preflight_s: int = setting(30, "time for the checks of every node before an attempt; 0 leaves them out", group="retries", unit="s", ge=0)
    preflight_allreduce: Literal["auto", "on", "off"] = setting(
        "auto", "a small all-reduce over all processes among the checks; auto: on several nodes with GPUs", group="retries"
    )
    preflight_gb_s: float = setting(
        1.0, "what each process must reach in it; a node that is slower than this with all its neighbours is left out", group="retries", unit="GB/s", ge=0
    )
    avoid_node_h: float = setting(24.0, "how long a node that failed is left out", group="retries", unit="h", ge=0)

    # --- what to train
    model: Text = setting("nano", f"model: a preset ({', '.join(PRESETS)}), convnet, hf:PATH, or package.module:build", group="model")
    model_options: Options = setting({}, "options of the model that differ from its preset", group="model")
    grad_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, about a third more work", group="model")
    compile: bool = setting(False, "torch.compile of each block", group="model")
    check_model: Literal["auto", "off"] = setting(
        "auto",
        "at the start, measure what a model's mean loss is over: some samples whole and in two halves. A loss that depends on the cut is refused",
        group="model",
    )
    fused_kernels: bool = setting(
        True, "norm, SwiGLU and rotary positions of the built-in model, and AdamW, by Triton kernels where the GPU has them", group="model"
    )
    hf_fast: Literal["auto", "off"] = setting(
        "auto",
        "causal language models of transformers (hf:) by fused attention, norm, SwiGLU and loss, where these are found to compute the same; off: transformers' own forward pass",
        group="model",
    )
    cudnn_benchmark: bool = setting(
        False,
        "let cuDNN time its convolutions and take the fastest, where all samples have one shape; a resumed run may differ in the last bits",
        group="model",
    )
    init_from: Text | None = setting(None, "checkpoint, or run with the newest that verifies, to take the weights from at step 0", group="model")
    data: Text = setting("stdlib", "data: stdlib, synthetic, text:PATH, tokens:PATH, hfds:PATH, digits, or package.module:build", group="data")
    seq_len: int = setting(128, "tokens per sample", group="data", unit="tokens", ge=2, le=1_048_576)

    data_options: Options = setting(
        {}, "options of the data: column, tokenizer, vocab_size of hfds; for package.module:build its keyword arguments", group="data"
    )
    num_workers: int = setting(
        0, "processes per training process that read samples; 0 reads ahead in one thread, which is enough for token files", group="data", ge=0, le=1024
    )
    prefetch_factor: int = setting(2, "forward passes that each of num_workers reads ahead", group="data", ge=1)
    persistent_workers: bool = setting(True, "keep the reading processes of validation from one validation to the next", group="data")
    pin_memory: bool = setting(True, "hold samples in page-locked memory, from where a GPU takes them while it computes; nothing on a CPU", group="data")

    # --- the batch
    batch_size: int = setting(32, "samples per optimizer step, over all GPUs and accumulation", group="batch", unit="samples", ge=1)
    micro_batch_size: int | None = setting(None, "samples per GPU and forward pass; left out, it follows", group="batch", unit="samples", ge=1)
    grad_accum_steps: int | None = setting(None, "forward passes per optimizer step; left out, it follows", group="batch", ge=1)

    # --- the optimizer
    max_steps: int = setting(1000, "optimizer steps of the whole run", group="optimizer", unit="steps", ge=1)
    lr: float = setting(1e-3, "peak learning rate", group="optimizer", gt=0)
    lr_scheduler: ScheduleKind = setting("cosine", "shape of the learning rate after warm-up", group="optimizer")
    lr_scheduler_params: dict[str, float] = setting(
        {}, "parameters of the schedule: total_iters, T_0, T_max, T_mult, eta_min, num_cycles, decay_steps", group="optimizer"
    )
    warmup_pct: float | None = setting(0.05, "share of the optimizer steps to warm up in: int(max_steps * warmup_pct)", group="optimizer", ge=0, le=1)
    warmup_steps: int | None = setting(None, "optimizer steps to warm up in, instead of warmup_pct", group="optimizer", unit="steps", ge=0)
    weight_decay: float = setting(0.1, "AdamW weight decay of matrices; vectors have none", group="optimizer", ge=0)
    beta1: float = setting(0.9, "AdamW decay of the first moment", group="optimizer", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW decay of the second moment", group="optimizer", ge=0, lt=1)
    eps: float = setting(1e-8, "AdamW epsilon", group="optimizer", gt=0)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0 turns clipping off", group="optimizer", ge=0)

    # --- precision
    precision: PrecisionWord = setting(
        Precision.BF16, "number format of the matrix products; auto takes what holdfast precision recommended", group="precision"
    )
    fp8_backend: Fp8Backend = setting("te", "fp8 by Transformer Engine or by torchao", group="precision")
    fp8_recipe: Fp8Recipe | None = setting(None, "how fp8 scales are found; left out, current (te) or tensorwise (torchao)", group="precision")
    fp8_fast_accum: Literal["forward", "grad_input", "all"] = setting(
        "forward", "fp8 products that add up in the tensor cores alone, faster and with fewer bits: forward, with input gradients, or all", group="precision"
    )
    amp_opt_level: Literal["O0", "O1", "O2"] | None = setting(
        None, "O0: no mixed precision; O1: autocast; O2: 16-bit parameters with fp32 master weights", group="precision"
    )
    grad_scaler_init: float = setting(65536.0, "first loss scale of fp16", group="precision", gt=0)
    grad_scaler_growth_interval: int = setting(2000, "steps without overflow after which the loss scale grows", group="precision", unit="steps", ge=1)
    grad_scaler_growth: float = setting(2.0, "factor by which the loss scale grows", group="precision", gt=1)
    grad_scaler_backoff: float = setting(0.5, "factor by which the loss scale shrinks at an overflow", group="precision", gt=0, lt=1)

    on_overflow: Literal["skip", "abort", "fallback"] = setting(
        "skip", "when an fp16 gradient overflows: try the step again at a lower loss scale, give up, or go on in bf16", group="precision"
    )
    max_overflows: int = setting(16, "overflows in a row before on_overflow gives up (skip) or falls back", group="precision", ge=1)
    debug: bool = setting(
        False,
        "find the operation that makes a NaN (anomaly detection, slow), log every step, and make small what neither command line nor environment gave:"
        " 20 steps, 2 samples per process and step, 32 validation samples, a validation each 10 steps",
        group="precision",
    )

    # --- the loop
    seed: int = setting(0, "seed of the weights, the data order and dropout", group="loop", ge=0, le=2**63 - 1)
    log_every: int = setting(10, "steps between lines in metrics.jsonl", group="loop", unit="steps", ge=1)
    eval_every: int = setting(100, "steps between validations; 0 validates at the end only", group="loop", unit="steps", ge=0)
    eval_samples: int | None = setting(512, "validation samples; none takes all", group="loop", unit="samples", ge=1)
    checkpoint_every: Interval = setting(
        100, "steps between checkpoints, or auto: from the measured cost of a save and the failures of this run", group="loop", unit="steps"
    )
    async_save: bool = setting(True, "write checkpoints in the background; training waits only for the copy to host memory", group="loop")
    keep_last: int = setting(2, "newest checkpoints to keep", group="loop", ge=1)
    keep_every: int = setting(0, "also keep the checkpoints of each N-th step, for good; 0 keeps none for that reason", group="loop", unit="steps", ge=0)
    keep_best: int = setting(0, "also keep this many checkpoints with the lowest validation loss, and save one at each new best", group="loop", ge=0)
    log_samples: bool = setting(False, "write down which samples each step uses, for holdfast verify data", group="loop")
    profile_steps: Steps | None = setting(
        None, "steps to trace with torch's profiler, such as 10-14; the trace is in the attempt's folder, those steps are slower", group="loop"
    )
    parallel: Literal["ddp", "fsdp"] = setting("ddp", "how the model is spread over GPUs: ddp copies it, fsdp shards it", group="loop")
    bucket_cap_mb: Megabytes = setting(
        "auto",
        f"gradients that ddp reduces at once; auto: 1/{BUCKETS} of them on one node, {SMALL_BUCKET_MB} on several; part of the arithmetic with more than two processes",
        group="loop",
        unit="MB",
    )
    cpu_threads: int = setting(1, "threads per process on a CPU; part of the arithmetic, so it is a setting", group="loop", ge=1)

    @property
    def world_size(self) -> int:
        """Training processes of the whole job."""
        return self.nodes * self.gpus_per_node

    def log_number(self, rank: int) -> int:
        """The number of the log that a rank writes to under Slurm: by accelerate launch, a node has one for all of its ranks."""
        return rank // self.gpus_per_node if self.launch == "accelerate" else rank

    def text(self, name: str) -> str:
        """The value of a setting as a person would write it."""
        value = getattr(self, name)
        if value is None:
            return ""
        if name == "time_limit":
            return format_minutes(value)
        if isinstance(value, tuple):
            return ",".join(str(item) for item in value)
        if isinstance(value, dict):
            return ",".join(f"{key}={item}" for key, item in value.items())
        return str(value).lower() if isinstance(value, bool) else str(value)


# Words of other tools, and the setting that each one means here.
NAME_ALIASES: dict[str, str] = {
    "mixed_precision": "precision",
    "fp_precision": "precision",
    "grad_accum": "grad_accum_steps",
    "gradient_accumulation_steps": "grad_accum_steps",
    "grad_ckpt": "grad_checkpointing",
    "gradient_checkpointing": "grad_checkpointing",
    "global_batch_size": "batch_size",
    "learning_rate": "lr",
    "max_grad_norm": "grad_clip",
}

# Not a setting of the job but the word that names the job file.
JOB_WORD = "job"


def names() -> list[str]:
    return list(Job.model_fields)


def group_of(name: str) -> str:
    return str(_extra(name)["group"])


def unit_of(name: str) -> str:
    return str(_extra(name)["unit"])


def help_of(name: str) -> str:
    return Job.model_fields[name].description or ""


def _extra(name: str) -> dict[str, Any]:
    extra = Job.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra


def number_type(name: str) -> type | None:
    """int or float for a setting that is a plain number, else None."""
    kind = bare_type(name)
    return kind if kind in (int, float) else None


@cache
def is_mapping(name: str) -> bool:
    return name in Job.model_fields and typing.get_origin(bare_type(name)) is dict


@cache
def is_mapping_of_numbers(name: str) -> bool:
    """Whether a setting is a mapping that may hold more than text, so that numbers in its one-word form are numbers."""
    return is_mapping(name) and typing.get_args(bare_type(name))[1] is not Line


def is_optional(name: str) -> bool:
    annotation = Job.model_fields[name].annotation
    return typing.get_origin(annotation) in (typing.Union, types.UnionType) and type(None) in typing.get_args(annotation)


def bare_type(name: str) -> Any:
    """The type of a setting without its None and its annotations: int, float, str, tuple[...], dict[...]."""
    annotation = Job.model_fields[name].annotation
    if is_optional(name):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation
