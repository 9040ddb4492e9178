"""Checkpoints: one ``.safetensors`` file that is complete by itself, and a ``.json`` to read.

One file has the tensors and, in its header, everything else (configuration, step). It is replaced in one step: whatever happens while
saving, a complete checkpoint is there, the old one or the new one. The JSON beside it is a copy of the header for people and scripts. Both
have the same random id, and loading compares them: a pair from two different saves is refused.

The header has a checksum of the whole content. Without it a flipped bit would not be noticed: it would only make samples a little worse.
Nothing is pickled: loading a checkpoint runs no code from it.
"""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddpm_fast.io.files import atomic_write

FORMAT = "ddpm_fast"
FORMAT_VERSION = 1
CHECKPOINT_FILES = ("checkpoint.safetensors", "checkpoint.json")
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_KEYS_SHOWN = 5
# safetensors reads headers of up to 100 MB, after escaping, but writes longer ones without an error.
_META_BYTES = 40_000_000


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found, trusted or loaded into a network; the message says what was expected."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, as `load_checkpoint` returns it.

    Attributes:
        tensors: flat names (``"model.conv_in.weight"``) to tensors.
        meta: the JSON values given to `save_checkpoint`; tuples have become lists.
        path: the ``.safetensors`` file.
    """

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    path: Path


def add_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``add_prefix("ema", {"w": x})`` is ``{"ema.w": x}``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def strip_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries under ``prefix.``, without it; empty where there are none."""
    start = f"{prefix}."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def save_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
) -> Path:
    """Writes ``checkpoint.safetensors`` and ``checkpoint.json`` into a folder, replacing an earlier save.

    The earlier one survives any failure before the new one is complete, and no temporary file stays behind.

    Args:
        folder: created if missing.
        tensors: flat names to tensors of any dtype, device and layout; shared storage is written once for each name.
        meta: JSON values; keys become strings and tuples become lists.

    Returns:
        Path of the ``.safetensors`` file.

    Raises:
        CheckpointError: `meta` is not JSON, a tensor cannot be stored, or the tensor file could not be written.
        OSError: the folder cannot be written.
    """
    try:
        meta_json = json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"meta must hold JSON values (dict with str keys, list, str, int, float, bool, None): {error}") from error
    if len(meta_json) > _META_BYTES:
        raise CheckpointError(f"meta must take at most {_META_BYTES} bytes as JSON, got {len(meta_json)}")
    tensors = _storable(tensors)
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "id": secrets.token_hex(16), "meta": meta_json}
    header["crc32"] = _checksum(header, tensors)
    tensor_path, json_path = (Path(folder) / name for name in CHECKPOINT_FILES)
    with atomic_write(json_path) as json_temporary:
        json_temporary.write_text(json.dumps(_document(header), indent=2) + "\n", "utf-8")
        with atomic_write(tensor_path) as tensor_temporary:
            try:
                save_file(tensors, tensor_temporary, metadata=header)
            except (SafetensorError, KeyError) as error:
                raise CheckpointError(f"could not write {tensor_path}: {error}") from error
            # Gone before the tensors change: a process killed between the two replacements leaves a tensor file without a copy of its
            # header, never with the copy of another.
            json_path.unlink(missing_ok=True)
    return tensor_path


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads what `save_checkpoint` wrote, into the host's memory.

    Args:
        path: the folder (its ``checkpoint.safetensors`` is read), the ``.safetensors`` file or the ``.json`` beside it.

    Raises:
        CheckpointError: nothing there; not a checkpoint of this library, or a pickle; damaged, in a single bit too; written by a newer
            format; or the JSON beside it belongs to another save.
    """
    tensor_path = _resolve(Path(path))
    try:
        with safe_open(tensor_path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            _check_header(tensor_path, header)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CheckpointError(_damaged(tensor_path, error)) from error
    if header["crc32"] != (found := _checksum(header, tensors)):
        raise CheckpointError(
            f"{tensor_path} is damaged: its checksum must be {header['crc32']}, got {found}; use a copy, or an earlier checkpoint"
        )
    try:
        document = _document(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(_damaged(tensor_path, error)) from error
    if not isinstance(document["meta"], dict):
        raise CheckpointError(f"{tensor_path} is damaged: the meta of its header is not a JSON object")
    _check_json(tensor_path, document)
    return Checkpoint(tensors, document["meta"], tensor_path)


def load_into(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], what: str = "model") -> None:
    """Copies `tensors` into the parameters and buffers of `module`, all of them or none.

    Args:
        module: keeps its dtypes, devices and memory formats.
        tensors: names as in ``module.state_dict()``.
        what: name of the module for the error message.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes differ; no weight is changed.
    """
    check_fits(module, tensors, what)
    module.load_state_dict(dict(tensors))


def check_fits(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], what: str = "model") -> None:
    """Checks that names and shapes of `tensors` are those of `module`, which may be on the meta device and so take no memory.

    Args:
        module, tensors, what: as `load_into`.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes differ.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    both = [(name, tuple(tensors[name].shape), tuple(own[name].shape)) for name in own if name in tensors]
    shapes = [f"{name} {given} for {expected}" for name, given, expected in both if given != expected]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if lines := [f"{len(names)} {kind}: {_shortened(names)}" for kind, names in kinds.items() if names]:
        counts = f"{len(own)} tensors expected, {len(tensors)} given"
        raise CheckpointError(f"the checkpoint does not fit the {what} ({counts}); {'; '.join(lines)}")


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts tensors to what the format can store: dense and contiguous, and no two on one storage."""
    result, storages = {}, set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"tensors[{name!r}] must be a tensor, got {type(tensor).__name__}; put it into meta")
        if tensor.layout != torch.strided:
            raise CheckpointError(f"tensors[{name!r}] must be dense, got layout {tensor.layout}")
        tensor = tensor.detach().cpu().contiguous()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        result[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return result


def _checksum(header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of the header's texts and of each tensor's name, type, shape and bytes: it never misses a burst of up to 32 bits."""
    value = 0
    for name in ("format", "format_version", "id", "meta"):
        value = zlib.crc32(f"{name} {header[name]}\0".encode(), value)
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _document(header: Mapping[str, str]) -> dict[str, Any]:
    """The JSON file's content, from the tensor file's header."""
    return {
        "format": header["format"], "format_version": int(header["format_version"]), "id": header["id"], "crc32": header["crc32"],
        "meta": json.loads(header["meta"]),
    }  # fmt: skip


def _resolve(path: Path) -> Path:
    """Path of the tensor file for a folder, a .safetensors or a .json file."""
    if path.is_dir():
        tensor_path = path / CHECKPOINT_FILES[0]
    elif path.suffix in _PICKLE_SUFFIXES:
        raise CheckpointError(_pickle_message(path))
    elif path.suffix in (".safetensors", ".json"):
        tensor_path = path.with_suffix(".safetensors")
    elif path.exists():
        raise CheckpointError(f"expected a folder, a .safetensors or a .json file, got {path}")
    else:
        raise CheckpointError(f"no checkpoint at {path}: no such file or folder")
    if not tensor_path.is_file():
        json_path = tensor_path.with_suffix(".json")
        if json_path.is_file():
            raise CheckpointError(f"{json_path} is there, but its tensor file {tensor_path.name} is missing beside it")
        raise CheckpointError(f"no checkpoint in {tensor_path.parent}: expected {tensor_path.name} (and {json_path.name} beside it)")
    return tensor_path


def _check_header(path: Path, header: Mapping[str, str]) -> None:
    found = header.get("format")
    if found != FORMAT:
        says = "no 'format' entry" if found is None else f"'format' is {found!r}"
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of ddpm_fast: {says} in its header, expected {FORMAT!r}")
    version = header.get("format_version", "")
    if version.isdecimal() and len(version) < 10 and int(version) > FORMAT_VERSION:
        raise CheckpointError(f"{path} was written by a newer ddpm_fast: format_version {version}, this one reads up to {FORMAT_VERSION}")
    if version != str(FORMAT_VERSION) or not {"id", "meta", "crc32"} <= header.keys():
        raise CheckpointError(f"{path} is damaged: its header lacks format_version, id, meta or crc32")


def _check_json(tensor_path: Path, document: Mapping[str, Any]) -> None:
    """Compares the JSON beside the tensor file, if there is one, with the tensor file's header."""
    path = tensor_path.with_suffix(".json")
    if not path.is_file():
        return
    remedy = f"{tensor_path.name} is complete by itself: remove {path.name} to load it"
    try:
        beside = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}). {remedy}") from error
    found = beside.get("id") if isinstance(beside, dict) else None
    if found != document["id"]:
        raise CheckpointError(
            f"{path} and {tensor_path.name} come from two different saves: id {found}, expected {document['id']}. {remedy}"
        )
    if not _holds(beside, document):
        raise CheckpointError(f"{path} was changed after it was saved, which would have no effect. {remedy}")


def _holds(beside: Any, document: Any) -> bool:
    """True if the JSON file's content has everything that the document has. It may have more: a note, or a later version's entry."""
    if isinstance(document, dict):
        return isinstance(beside, dict) and all(key in beside and _holds(beside[key], value) for key, value in document.items())
    # Compared as texts: a diverged run's meta may hold NaN, which is not equal to itself.
    return json.dumps(beside, sort_keys=True) == json.dumps(document, sort_keys=True)


def _damaged(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_PICKLE_STARTS):
        return _pickle_message(path)
    return f"{path} is damaged or cut short: {error}"


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, or named like one: pickles can run any code and are not loaded; "
        "expected a .safetensors file written by ddpm_fast"
    )


def _shortened(names: list[str]) -> str:
    rest = len(names) - _KEYS_SHOWN
    return ", ".join(names[:_KEYS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
