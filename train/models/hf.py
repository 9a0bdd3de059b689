"""Models of transformers, from a local folder or config.json; nothing is fetched and no code of theirs is run.

`hf:FOLDER` loads the weights if the folder has safetensors, else draws new ones from its config; `hf:FILE.json` always
draws new ones. Two kinds: causal language models, and sequence classifiers where `architectures` in the config says so.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.errors import SettingError
from jobs.names import nearest
from train.models.contract import IGNORE
from train.models.loss import chunked_loss_sum


class HFCausalLM(nn.Module):
    """tokens, targets int64 [B, T], already shifted by one against each other -> sum of token cross entropies."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._body_and_head = _plain_head(model)

    def forward(self, tokens: Tensor, targets: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        if self._body_and_head is not None:
            body, head = self._body_and_head
            hidden = getattr(self.model, body)(input_ids=tokens, use_cache=False).last_hidden_state
            return chunked_loss_sum(hidden, self.model.get_submodule(head).weight, targets, loss_mask)
        logits = self.logits(tokens).float().flatten(0, 1)
        losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
        return losses.sum() if loss_mask is None else (losses * loss_mask.flatten()).sum()

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, T, V], held whole."""
        return self.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]


class HFClassifier(nn.Module):
    """tokens int64 [B, T], targets int64 [B], attention_mask [B, T] -> sum of cross entropies over samples."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = self.logits(tokens, attention_mask).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    def logits(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, num_labels]."""
        return self.model(input_ids=tokens, attention_mask=attention_mask).logits  # type: ignore[no-any-return]


@torch.no_grad()
def _plain_head(model: Any) -> tuple[str, str] | None:
    """Names of body and head, if logits are nothing but head(body(tokens)); then the loss can be made in chunks.

    Some families scale or cap their logits. Four tokens through both ways tell, for every family there will ever be."""
    body, head = getattr(model, "base_model_prefix", ""), model.get_output_embeddings()
    if not body or not hasattr(model, body) or type(head) is not nn.Linear or head.bias is not None:
        return None
    name = next(n for n, m in model.named_modules() if m is head)
    training = model.training
    model.eval()
    probe = torch.arange(4, device=head.weight.device).unsqueeze(0) % head.weight.shape[0]
    try:
        states = getattr(model, body)(input_ids=probe, use_cache=False).last_hidden_state
        same = torch.allclose(head(states), model(input_ids=probe, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    except (AttributeError, TypeError):  # a body with other arguments or results than most
        same = False
    model.train(training)
    return (body, name) if same else None


def build_hf(location: str, *, vocab_size: int | None, seq_len: int, overrides: dict[str, Any]) -> nn.Module:
    """The model that `hf:location` names, with fp32 weights; overrides are fields of its config.

    Raises SettingError for a missing path, an unknown field, another kind of model, or one too small for the data."""
    try:
        import transformers  # type: ignore[import-not-found,unused-ignore]
    except ImportError as err:
        raise SettingError("model 'hf:': transformers is not installed; install holdfast with its 'hf' group") from err
    path = Path(location).expanduser()
    if not path.exists() or (path.is_dir() and not (path / "config.json").is_file()):
        raise SettingError(f"model 'hf:{location}': not found; give a local folder with a config.json, or a config.json: models are not fetched")
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    for name, value in overrides.items():
        if not hasattr(config, name):
            close = nearest(name, config.to_dict())
            hint = f" Did you mean {close!r}?" if close else ""
            raise SettingError(f"model 'hf:{location}': its config has no {name!r}.{hint}")
        setattr(config, name, value)
    for name, need in (("vocab_size", vocab_size), ("max_position_embeddings", seq_len)):
        has = getattr(config, name, None)
        if has is not None and need is not None and has < need:
            raise SettingError(f"model 'hf:{location}': its {name} is {has}, this job needs {need}")
    architecture = next(iter(config.architectures or []), "ForCausalLM")
    auto: Any
    wrapper: type[nn.Module]
    if architecture.endswith("ForSequenceClassification"):
        auto, wrapper = transformers.AutoModelForSequenceClassification, HFClassifier
    elif architecture.endswith(("ForCausalLM", "LMHeadModel")):
        auto, wrapper = transformers.AutoModelForCausalLM, HFCausalLM
    else:
        raise SettingError(
            f"model 'hf:{location}': {architecture} is neither a causal language model nor a sequence classifier;"
            " use MODEL=package.module:build and return the loss yourself"
        )
    if path.is_dir() and any(path.glob("*.safetensors")):
        # safetensors only: the other format can run code while it is read.
        model = auto.from_pretrained(path, config=config, local_files_only=True, use_safetensors=True)
    else:
        model = auto.from_config(config)
    # Stored as bf16 or not, weights are fp32 here; autocast is what computes in less.
    return wrapper(model.float().train())
