"""Adapters of PEFT as task vectors, read without PEFT.

    LoRA          delta = scaling * B A,     scaling = lora_alpha / r, or lora_alpha / sqrt(r)
    SHiRA         delta[row, column] = shira_weight
    Super-Tuning  delta.flat[indices] = supertuning_values, and a LoRA where `r` is set

An adapter's folder holds `adapter_config.json` and `adapter_model.safetensors`, whose names are
those of the base behind `base_model.model.`. Tensors that PEFT saves whole (trained biases,
`modules_to_save`) become their difference from the base.

Sources: Hu et al. 2021, arXiv 2106.09685; Bhardwaj et al. 2024, arXiv 2406.13175 (SHiRA);
arXiv 2607.09287 (Super-Tuning).
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talos.errors import TalosOSError, TalosValueError
from talos.files import Checkpoint
from talos.files.reader import parse_json
from talos.masks import Mask
from talos.names import listed, named_tensors, resolve_names
from talos.options import as_real
from talos.task_vectors.fingerprints import fingerprint
from talos.task_vectors.namings import Weights
from talos.task_vectors.sums import joined
from talos_kernels import TensorIndex

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "read_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_KINDS = ("LORA", "SHIRA", "SUPERTUNING")
# What a name of the file ends with, and the part of an adapter that it holds.
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".shira_weight": "values",
    ".shira_indices": "places",
    ".supertuning_values": "values",
    ".supertuning_indices": "positions",
    ".supertuning_lora_A.weight": "a",
    ".supertuning_lora_B.weight": "b",
}
_FACTORS = ("a", "b", "embedding_a", "embedding_b")
# Options of a config that change nothing about what the file's tensors add to the base.
_HARMLESS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "init_weights"),
    *("layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "mask_type"),
    *("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r"),
    *("random_seed", "rank_pattern", "revision", "runtime_config", "save_precomputed_indices"),
    *("select_top", "sparsity", "target_modules", "task_type", "use_rslora"),
}
# Of a regular expression from a file: what makes it take exponential time, or a high power of it.
_REPEAT, _REPEATED_GROUP = re.compile(r"[*+{]"), re.compile(r"\)[*+{]")
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base


@dataclass(frozen=True)
class _Adapter:
    """The config and the tensors of an adapter's folder."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Checkpoint

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "_Adapter":
        folder = Path(folder)
        if not (folder / WEIGHTS).is_file():
            raise TalosOSError(
                f"folder must hold {WEIGHTS}, got {folder} without it; other forms are not read: "
                "save the adapter with save_pretrained"
            )
        try:
            config = parse_json((folder / CONFIG).read_bytes())
            kind = config["peft_type"]
        except OSError as error:
            raise TalosOSError(f"folder must hold a readable {CONFIG}, got {error}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TalosValueError(
                f"{folder / CONFIG}: must be the config of an adapter, got {error!r}; save it again"
            ) from None
        if kind not in _KINDS:
            raise TalosValueError(
                f"{folder}: must hold a LoRA, SHiRA or Super-Tuning adapter, got {kind}; merge it "
                "with PEFT and use TaskVector.from_models"
            )
        refused = {name: config[name] for name in config if name not in _HARMLESS and config[name]}
        if config.get("init_lora_weights") not in _INITS:
            refused["init_lora_weights"] = config["init_lora_weights"]
        if refused:
            name, value = next(iter(refused.items()))
            raise TalosValueError(
                f"{folder}: must be a plain adapter, got {name}={value!r}, with which its tensors "
                "mean something else; merge it with PEFT and use TaskVector.from_models"
            )
        return cls(folder, config, Checkpoint(folder / WEIGHTS))

    def named(self) -> dict[str, dict[str, str]]:
        """Return the file's names by weight of the base and by part; `whole`: a full tensor."""
        found: dict[str, dict[str, str]] = {}
        for key in self.tensors:
            if not key.startswith(PREFIX):
                raise TalosValueError(
                    f"{self.folder}: its tensors must have names with {PREFIX}, got {key}; save it "
                    "with PEFT's save_pretrained"
                )
            name = key.removeprefix(PREFIX)
            end = max((end for end in _PARTS if name.endswith(end)), key=len, default="")
            part = _PARTS.get(end, "whole")
            if part == "whole":
                weight = name.replace(".base_layer.", ".")
            else:
                weight = f"{name.removesuffix(end)}.weight"
            found.setdefault(weight, {})[part] = key
        return found

    def scaling(self, name: str, rank: int) -> float:
        """Return what multiplies B A of a weight."""
        module = name.removesuffix(".weight")
        alpha = self.config.get("lora_alpha")
        patterns = self.config.get("alpha_pattern") or {}
        try:
            for each in patterns:
                if len(_REPEAT.findall(each)) > 2 or _REPEATED_GROUP.search(each):
                    raise TalosValueError(
                        f"{self.folder}: alpha_pattern must repeat two parts at most and no group, "
                        f"got {each!r:.100}, which may take for ever; name the modules in full"
                    )
            fitting = (a for each, a in patterns.items() if re.match(rf"(.*\.)?({each})$", module))
            alpha = next(fitting, alpha)
        except (re.error, AttributeError, RecursionError, TypeError) as error:
            raise TalosValueError(
                f"{self.folder}: alpha_pattern must map regular expressions to numbers, got "
                f"{patterns!r} ({error}); save the adapter again"
            ) from None
        number = as_real(alpha)
        if number is None or not rank:
            raise TalosValueError(
                f"{self.folder}: lora_alpha of {module} must be a number and its rank positive, "
                f"got {alpha!r} and {rank}; save the adapter again"
            )
        return number / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_adapter(
    folder: str | os.PathLike[str], base: Weights
) -> tuple[Mask, Tensor, dict[str, str], dict[str, Any]]:
    """Return mask, values, fingerprints and metadata; see `TaskVector.from_adapter`."""
    adapter, ours = _Adapter.load(folder), named_tensors("base", base)
    named = adapter.named()
    known = resolve_names(named, ours)
    lacking = [name for name in named if name not in known]
    if lacking:
        raise TalosValueError(
            f"base must have the weights that the adapter changes, lacks {len(lacking)}: "
            + listed(lacking, ours)
        )
    shapes: dict[str, tuple[int, ...]] = {}
    indices: dict[str, TensorIndex] = {}
    values: list[Tensor] = []
    bases: dict[str, str] = {}
    for name, keys in named.items():
        weight = ours[known[name]].detach()
        parts = {part: adapter.tensors[key] for part, key in keys.items()}
        for part, each in parts.items():
            if each.is_complex() or (part in _FACTORS and each.dim() < 2):
                raise _misfit(adapter, name, weight, parts)
        shapes[name] = tuple(weight.shape)
        indices[name], delta = _delta(adapter, name, weight, parts)
        values.append(delta)
        if len(delta):
            bases[name] = fingerprint(weight)
    about = {
        "method": str(adapter.config["peft_type"]).lower(),
        "base_model": adapter.config.get("base_model_name_or_path"),
    }
    return Mask(shapes, indices), joined(values), bases, about


def _delta(
    adapter: _Adapter, name: str, weight: Tensor, parts: Mapping[str, Tensor]
) -> tuple[TensorIndex, Tensor]:
    """Return the entries that an adapter changes in a weight, and by how much: float32 `[nnz]`."""
    kinds = set(parts)
    places = {"places", "positions"} & kinds
    if kinds == {"whole"}:
        tuned = parts["whole"].to(weight.device)
        if tuned.shape != weight.shape:
            raise _misfit(adapter, name, weight, {"whole": tuned})
        dense = (tuned.double() - weight.double()).float()
    elif kinds == {"a", "b"}:
        dense = _product(adapter, name, weight, parts["a"], parts["b"])
    elif kinds == {"embedding_a", "embedding_b"}:
        a, b = (parts[part].mT for part in ("embedding_a", "embedding_b"))
        dense = _product(adapter, name, weight, b, a)
    elif (
        "values" in kinds and len(places) == 1 and kinds - places in ({"values"}, {*"ab", "values"})
    ):
        flat = _positions(parts, weight)
        if flat is None or flat.dim() != 1 or flat.shape != parts["values"].shape:
            raise _misfit(adapter, name, weight, parts)
        # As a sum, because indices may come twice.
        where, order = flat.unique(return_inverse=True)
        added = torch.zeros(len(where), dtype=torch.float32, device="cpu")
        added.index_add_(0, order, parts["values"].float())
        if "a" not in kinds:
            there = added != 0
            return TensorIndex.from_positions(where[there], weight.numel()), added[there]
        dense = _product(adapter, name, weight, parts["a"], parts["b"])
        dense.view(-1)[where] += added
    else:
        raise TalosValueError(
            f"{adapter.folder}: must hold a whole adapter of {name}, got only "
            f"{', '.join(sorted(kinds))}; "
            "save it again, with save_precomputed_indices=True"
        )
    return TensorIndex.from_buffers("full", weight.numel()), dense.cpu().reshape(-1)


def _positions(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor | None:
    """Return flat positions: int64, or None if they do not lie in the weight."""
    if "positions" in parts:
        flat = parts["positions"].long()
    elif weight.dim() == 2 and parts["places"].dim() == 2 and len(parts["places"]) == 2:
        rows, columns = parts["places"].long()
        inside = (columns >= 0) & (columns < weight.shape[1])
        flat = torch.where(inside, rows * weight.shape[1] + columns, -1)
    else:
        return None
    return flat if bool(((flat >= 0) & (flat < weight.numel())).all()) else None


def _product(adapter: _Adapter, name: str, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return scaling * B A in the shape of a weight: float32.

    `a` is [r, in] or, of a convolution, [r, in, *kernel]; `b` is [out, r] or [out, r, 1, ...].
    """
    rank = a.shape[0]
    if b.numel() != b.shape[0] * rank:
        raise _misfit(adapter, name, weight, {"lora_A": a, "lora_B": b})
    product = b.float().flatten(1) @ a.float().flatten(1)
    shape = (b.shape[0], *a.shape[1:])
    turned = weight.dim() == 2 and weight.shape == shape[::-1]
    if turned and (weight.shape != shape or adapter.config.get("fan_in_fan_out")):
        product, shape = product.T, shape[::-1]
    if weight.shape != shape:
        raise _misfit(adapter, name, weight, {"lora_A": a, "lora_B": b})
    return product.reshape(shape) * adapter.scaling(name, rank)


def _misfit(
    adapter: _Adapter, name: str, weight: Tensor, parts: Mapping[str, Tensor]
) -> TalosValueError:
    found = ", ".join(f"{part} of shape {tuple(each.shape)}" for part, each in parts.items())
    return TalosValueError(
        f"{adapter.folder}: its tensors must fit {name} of shape {tuple(weight.shape)}, got "
        f"{found}; take the base that it was trained on (grouped convolutions are not supported)"
    )
