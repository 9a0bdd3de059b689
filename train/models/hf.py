"""Models of transformers, from a local folder or config.json; nothing is fetched and no code of theirs is run.

`hf:FOLDER` loads the weights if the folder has safetensors, else draws new ones from its config; `hf:FILE.json` always
draws new ones. Two kinds: causal language models, and sequence classifiers where `architectures` in the config says so.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.core.errors import SettingError
from jobs.core.imports import nearest
from train.models.contract import IGNORE, never_empty
from train.models.hf_blocks import FusedDecoder, compile_regions
from train.models.loss import Terms, chunk_terms, chunked_loss_sum


class HFCausalLM(nn.Module):
    """tokens, targets int64 [B, T], already shifted by one against each other -> sum of token cross entropies."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        refuse_noncausal(model)
        self.own_loss = adds_to_cross_entropy(model)
        self._body_and_head = None if self.own_loss else _plain_head(model)
        # The fused forward pass, where train/models/hf_blocks.py has one that computes the same.
        self.fused: FusedDecoder | None = None
        self.terms: Terms = chunk_terms

    def forward(self, tokens: Tensor, targets: Tensor, loss_mask: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        if self.fused is not None:
            return self.fused.loss_sum(tokens, targets, loss_mask, attention_mask)
        if self.own_loss:
            counted = (targets if loss_mask is None else torch.where(loss_mask != 0, targets, IGNORE)).contiguous()
            count = (counted != IGNORE).sum()
            counted = never_empty({"targets": counted}, count)["targets"]
            mean = self.model(input_ids=tokens, attention_mask=attention_mask, labels=counted, shift_labels=counted, use_cache=False).loss
            return mean.float() * count
        if self._body_and_head is not None:
            body, head = self._body_and_head
            hidden = getattr(self.model, body)(input_ids=tokens, attention_mask=attention_mask, use_cache=False).last_hidden_state
            return chunked_loss_sum(hidden, self.model.get_submodule(head).weight, targets, loss_mask, terms=self.terms)
        logits = self.logits(tokens, attention_mask).float().flatten(0, 1)
        losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
        return losses.sum() if loss_mask is None else (losses * loss_mask.flatten()).sum()

    def logits(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, V], held whole."""
        if self.fused is not None:
            return self.fused.logits(tokens, attention_mask)
        return self.model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits  # type: ignore[no-any-return]

    def compile_regions(self, **options: Any) -> None:
        """torch.compile each decoder layer and the loss of a chunk, in place."""
        compile_regions(self, **options)


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
def _evaluated(model: Any, tokens: Tensor, **arguments: Any) -> Any:
    """Output for a few tokens in evaluation mode."""
    training = model.training
    model.eval()
    try:
        return model(input_ids=tokens, use_cache=False, **arguments)
    finally:
        model.train(training)


def _probe(model: Any, length: int) -> Tensor:
    weight = model.get_input_embeddings().weight
    return (torch.arange(length, device=weight.device) % max(weight.shape[0] - 1, 1)).unsqueeze(0)


def refuse_noncausal(model: Any) -> None:
    """Raises SettingError for a model whose logits at a position depend on later tokens: as a next-token model it would read its own answer."""
    tokens = _probe(model, 8)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    first, second = (_evaluated(model, ids).logits[:, :-1].float() for ids in (tokens, other))
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5):
        name = type(model).__name__
        raise SettingError(
            f"model 'hf:': {name} sees later tokens, so it cannot be trained to predict the next one. An encoder is trained as a classifier"
            f" (MODEL_OPTIONS='{{architectures: [{name.removesuffix('LMHeadModel').removesuffix('ForCausalLM')}ForSequenceClassification]}}'),"
            " or by MODEL=package.module:build with a loss of its own; MODEL_OPTIONS='{is_decoder: true}' makes it causal."
        )


def adds_to_cross_entropy(model: Any) -> bool:
    """Whether the model's own loss has more than the cross entropy, such as the balancing loss of a router.

    Raises SettingError where it has and cannot be asked for the loss of targets that are already shifted."""
    tokens = _probe(model, 8)
    try:
        own = _evaluated(model, tokens, labels=tokens)
    except (TypeError, ValueError, RuntimeError, IndexError):  # a forward without labels, or with labels of another shape
        return False
    if getattr(own, "loss", None) is None:
        return False
    logits = own.logits[0].float()
    plain = F.cross_entropy(logits[:-1], tokens[0, 1:])
    # Decoders of translation models take labels that are already shifted.
    if any(torch.allclose(own.loss.float(), known, rtol=1e-4, atol=1e-5) for known in (plain, F.cross_entropy(logits, tokens[0]))):
        return False
    shifted = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], dim=1)
    try:
        again = _evaluated(model, tokens, labels=shifted, shift_labels=shifted).loss
    except TypeError:
        again = None
    if again is None or not torch.allclose(own.loss, again, rtol=1e-4, atol=1e-5):
        raise SettingError(
            f"model 'hf:': the own loss of {type(model).__name__} is {float(own.loss):.6g} where the cross entropy is {float(plain):.6g}, and it takes no"
            " shift_labels; use MODEL=package.module:build and return the loss yourself"
        )
    return True


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


def _refuse_other_weights(location: str, path: Path) -> None:
    """Raises SettingError for a folder whose weights are there, but in a form that is not read: random ones would be trained instead."""
    if not path.is_dir():
        return
    if (path / "adapter_config.json").is_file():
        raise SettingError(
            f"model 'hf:{location}': the folder holds an adapter, not a model; merge it first (peft: merge_and_unload(), then save_pretrained())"
        )
    if any(path.glob("*.safetensors")):
        return
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf") for file in path.glob(pattern))
    others = [name for name in others if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")]
    if others:
        raise SettingError(
            f"model 'hf:{location}': its weights are in {others[0]}, a format that can run code while it is read; only safetensors are loaded. Convert them once"
            f" where you trust the file: python -c \"import transformers as t; t.AutoModel.from_pretrained('{location}').save_pretrained('{location}', safe_serialization=True)\","
            " with the AutoModel class of the task. A folder with config.json alone starts from new weights."
        )


def _refuse_missing(location: str, model: Any, loading: dict[str, Any]) -> None:
    """Raises SettingError when the folder's weights lack some of the model's, which would be random. A new classification head may be."""
    body = getattr(model, "base_model_prefix", "")
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    missing = sorted(name for name in loading["missing_keys"] if not is_classifier or name.startswith(f"{body}.") and "pooler" not in name)
    if missing:
        raise SettingError(
            f"model 'hf:{location}': its weights lack {len(missing)} of the model's tensors ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}), which"
            " would start at random. Save the folder with save_pretrained() of the same class; a folder with config.json alone starts from new weights."
        )


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
            f" MODEL_OPTIONS='{{architectures: [{type(config).__name__.removesuffix('Config')}ForSequenceClassification]}}' trains it as a classifier,"
            " MODEL=package.module:build with a loss that you return yourself"
        )
    _refuse_other_weights(location, path)
    if path.is_dir() and any(path.glob("*.safetensors")):
        # safetensors only: the other format can run code while it is read.
        model, loading = auto.from_pretrained(path, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True)
        _refuse_missing(location, model, loading)
    else:
        model = auto.from_config(config)
    # Stored as bf16 or not, weights are fp32 here; autocast is what computes in less.
    return wrapper(model.float().train())
