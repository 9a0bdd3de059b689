"""A causal language model by Hugging Face's Trainer, on the source text of Python's standard library.

    python examples/finetune.py --steps 40                          by hand; a tiny model made on the spot
    holdfast submit examples/finetune.yaml ENTRY_ARGS=--model,/models/my-llama      a model of your own, with its tokenizer

The Trainer saves where and how it always does; three lines of a callback make its checkpoints whole and stop it in time.
"""

import argparse
import json
import sysconfig
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

import holdfast

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder of a model and its tokenizer; left out, a tiny one that reads bytes")
parser.add_argument("--steps", type=int, default=holdfast.setting("max_steps", 60))
parser.add_argument("--save-every", type=int, default=20)
parser.add_argument("--length", type=int, default=64, help="tokens per sample")
args = parser.parse_args()

set_seed(holdfast.setting("seed", 0))
if args.model:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
else:
    tokenizer = None
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=args.length)
    )
text = "".join(Path(sysconfig.get_paths()["stdlib"], name).read_text("utf-8") for name in ("argparse.py", "ast.py", "configparser.py", "textwrap.py"))
tokens = tokenizer(text)["input_ids"] if tokenizer else list(text.encode())
windows = [torch.tensor(tokens[at : at + args.length]) for at in range(0, len(tokens) - args.length, args.length)]
samples = [{"input_ids": window, "labels": window} for window in windows]


class Holdfast(TrainerCallback):
    def on_step_end(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
        holdfast.progress(state.global_step)
        if holdfast.stop_agreed():
            control.should_save = control.should_training_stop = True

    def on_save(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        holdfast.commit(Path(arguments.output_dir, f"checkpoint-{state.global_step}"), state.global_step)

    def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            holdfast.log(step=state.global_step, loss=float(logs["loss"]), lr=float(logs["learning_rate"]))


arguments = TrainingArguments(
    output_dir=str(holdfast.run_dir / "trainer"), max_steps=args.steps, save_strategy="steps", save_steps=args.save_every, logging_steps=5,
    per_device_train_batch_size=8, learning_rate=holdfast.setting("lr", 1e-3), report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[Holdfast()])
found = holdfast.latest_checkpoint()
trainer.train(resume_from_checkpoint=str(found) if found else None)
if trainer.state.global_step < args.steps:
    holdfast.exit_requeue()
if PartialState().is_main_process:
    model.save_pretrained(holdfast.run_dir / "model")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(json.dumps({"step": trainer.state.global_step, "first_loss": losses[0], "last_loss": losses[-1]}), flush=True)
