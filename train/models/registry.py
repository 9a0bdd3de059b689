"""Models by name: the presets, and `build_model`, which turns the setting `model` into a module.

nano 124m 350m 1b 3b 8b    presets of the built-in language model (jobs/specs/model_presets.py); options are fields of GPTConfig
convnet                    a small image classifier; options num_classes, channels, width
hf:PATH                    a local transformers folder or config.json; options are fields of its config
package.module:build       your own: a callable (vocab_size=, seq_len=, **options) -> nn.Module
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from jobs.core.errors import SettingError
from jobs.core.imports import call_with_accepted, import_callable, unknown
from jobs.specs import model_presets
from jobs.specs.model_presets import MODEL_SPECS
from train.models.contract import MeanLossModel
from train.models.convnet import ConvNet
from train.models.gpt import GPT, GPTConfig

PRESETS: Mapping[str, GPTConfig] = {name: GPTConfig(**fields) for name, fields in model_presets.PRESETS.items()}

_VOCAB_MULTIPLE = 128


def preset_config(name: str, *, vocab_size: int | None = None, seq_len: int | None = None, overrides: Mapping[str, Any] | None = None) -> GPTConfig:
    """A preset's config for data of `vocab_size` tokens and samples of `seq_len` tokens.

    A vocabulary larger than the preset's enlarges it, to a multiple of 128; a smaller one leaves the shape alone.
    `overrides` come last and may name any field of GPTConfig; others are a SettingError."""
    if name not in PRESETS:
        raise unknown("model", name, MODEL_SPECS)
    config, options = PRESETS[name], dict(overrides or {})
    allowed = [f.name for f in fields(GPTConfig)]
    for option in options:
        if option not in allowed:
            raise unknown(f"model_options of {name}", option, allowed)
    if vocab_size is not None and vocab_size > config.vocab_size:
        options.setdefault("vocab_size", -(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE)
    if seq_len is not None:
        options.setdefault("seq_len", seq_len)
    config = replace(config, **options)
    if vocab_size is not None and config.vocab_size < vocab_size:
        raise SettingError(f"model_options: vocab_size {config.vocab_size} is below the {vocab_size} of the data")
    return config


def build_model(spec: str, *, vocab_size: int | None = None, seq_len: int = 128, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """The model that `spec` names, under the contract of train/models/contract.py, on torch's default device.

    vocab_size, seq_len: what the data has (`convnet`: vocab_size is the number of classes). overrides: options of the
    model, see the top of this file. New weights come from torch's global generator: seed it first.
    Raises SettingError for an unknown spec or option, or a shape that does not fit the data."""
    options = dict(overrides or {})
    kind, colon, argument = spec.partition(":")
    if spec in PRESETS:
        return GPT(preset_config(spec, vocab_size=vocab_size, seq_len=seq_len, overrides=options))
    if spec == "convnet":
        if vocab_size is not None:
            options.setdefault("num_classes", vocab_size)
        model: nn.Module = call_with_accepted("model_options of convnet", ConvNet, {}, options)
        return model
    if kind == "hf" and argument:
        from train.models.hf import build_hf  # transformers takes seconds to import

        return build_hf(argument, vocab_size=vocab_size, seq_len=seq_len, overrides=options)
    if colon and argument.isidentifier():
        build = import_callable("model", spec)
        found = call_with_accepted("model", build, {"vocab_size": vocab_size, "seq_len": seq_len}, options)
        if not isinstance(found, nn.Module):
            raise SettingError(f"model: {spec!r} returned a {type(found).__name__}; it must return a torch.nn.Module")
        return found if getattr(found, "returns_loss_sum", False) else MeanLossModel(found)
    raise unknown("model", spec, MODEL_SPECS)
