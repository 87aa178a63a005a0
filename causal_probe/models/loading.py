"""Loading a model by the name that the command line is given: a folder, a GGUF file, or a name on the Hugging Face hub.

Only weights that are plain numbers are read (safetensors, GGUF). A pickle can run any code when it is opened, so none is ever
opened; and code that comes with a model is never run (``trust_remote_code`` is always off).
"""

# transformers' Module.eval and its logging carry no types.
# mypy: allow-untyped-calls

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError, CausalProbeWarning, show_path
from causal_probe.models.disentangled import DisentangledTransformer
from causal_probe.models.files import DTYPES, is_saved_model, load
from causal_probe.results import read_json

__all__ = ["LoadedModel", "load_model"]

#: Files that hold pickles, by how their names end.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

#: One of these is there where there is a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)

#: Files that are fetched from the hub: configuration, tokenizer and safetensors at the top of the repository; no pickles, no code.
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
NOT_HUB_FILES = ("*/*", "consolidated*")

#: ``name`` or ``owner/name``, and perhaps ``@revision``.
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}(?:/[\w.-]{1,96})?)(?:@([\w./-]{1,200}))?")

#: Surplus weights that say nothing: masks and tables that older versions of transformers saved with the weights.
TABLES = re.compile(r"(attn|attention)\.(masked_)?bias$|\binv_freq$|\bposition_ids$")

#: One part of a GGUF file that was split.
GGUF_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf")


class LoadedModel(NamedTuple):
    """A model as it was loaded; ``to_hooked(*load_model(source))`` gives it TransformerLens' hooks.

    Attributes
    ----------
    model
        A :class:`~causal_probe.models.DisentangledTransformer` or a Hugging Face causal language model.
    tokenizer
        Its Hugging Face tokenizer; None where there is none.
    name
        The model's name: the hub's name, or that of the folder or GGUF file without the way there.
    """

    model: Any
    tokenizer: Any
    name: str


@checked
def load_model(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    device_map: Any = None,
    any_kind: bool = False,
) -> LoadedModel:
    """Load the model that ``source`` names.

    Parameters
    ----------
    source
        A folder that a :class:`~causal_probe.models.DisentangledTransformer` was saved in; a folder with a Hugging Face causal
        language model in safetensors or GGUF form; a GGUF file; or the name of a model on the Hugging Face hub, ``owner/name`` or
        ``owner/name@revision``. Only a hub name asks the network, and only where no folder or file has that name.
    revision
        Of a name on the hub: a branch, a tag or a commit, such as the checkpoint ``"step1000"``.
    dtype
        Of the weights: ``"float64"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``. By default a DisentangledTransformer keeps
        its own, and everything else is read as float32, into which half precision goes without loss.
    device
        Where the weights go.
    device_map
        Instead of ``device``, where each part of a Hugging Face model goes, as transformers takes it: ``"auto"`` spreads the model
        over all GPUs and then the memory of the machine, ``{"model.layers.0": 0, ...}`` says it by name.
    any_kind
        Load a Hugging Face model as the class of transformers that its configuration names, encoders and classifiers among
        them, instead of a causal language model.

    Raises
    ------
    CausalProbeError
        If there is no such model, it can't be read, its weights are pickles, it needs code of its own, it is not a causal
        language model, weights are missing or of layers that its configuration doesn't have, there are two sets of weights, or it
        is an adapter or comes with one.

    Warns
    -----
    CausalProbeWarning
        If weights are left out that this kind of model has no place for: a head for another task, say.

    Examples
    --------
    >>> import tempfile
    >>> from causal_probe.models import DisentangledTransformer, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(DisentangledTransformer(d_vocab=3, n_positions=4), folder)
    ...     type(load_model(folder).model).__name__
    'DisentangledTransformer'
    """
    if dtype is not None and dtype not in DTYPES:
        raise CausalProbeError(f"The dtype {dtype!r} was asked for; there are {', '.join(DTYPES)}.")
    path = Path(os.path.expanduser(source))
    if revision is not None and os.path.exists(path):
        raise CausalProbeError(f"The revision {revision!r} was asked for; {path} is on this machine and has none.")
    if str(source) and os.path.isdir(path):
        loaded = _load_folder(path, path.resolve().name, dtype, device_map=device_map, any_kind=any_kind)
    elif os.path.isfile(path):
        if path.suffix != ".gguf":
            raise CausalProbeError(
                f"{path} is a file. A model is a folder, a GGUF file, or a name on the Hugging Face hub: name the folder that "
                "the file is in."
            )
        loaded = _load_hugging_face(path.parent, path.stem, dtype, device_map=device_map, gguf_file=path.name)
    elif (named := HUB_NAME.fullmatch(str(source))) and (revision is None or named[2] is None):
        revision = revision or named[2]
        if os.path.exists(named[1]):
            raise CausalProbeError(
                f"The revision {revision!r} was asked for; {named[1]} is on this machine and has none."
            )
        name = named[1] if revision is None else f"{named[1]}@{revision}"
        folder = _download(named[1], revision)
        loaded = _load_folder(folder, name, dtype, device_map=device_map, any_kind=any_kind)
    else:
        raise CausalProbeError(
            f"There is no model {show_path(source)!r}: no such folder or file, and no name that a hub has."
        )
    if device_map is not None:  # accelerate has put every part where it belongs
        return loaded
    try:
        return loaded._replace(model=loaded.model.to(device))
    except (RuntimeError, AssertionError) as error:
        raise CausalProbeError(f"The model can't be moved to the device {device!r}: {_first_line(error)}") from error


def _load_folder(folder: Path, name: str, dtype: str | None, *, device_map: Any, any_kind: bool) -> LoadedModel:
    if is_saved_model(folder):
        if device_map is not None:
            raise CausalProbeError(
                "A device_map was given, and a DisentangledTransformer fits on one device: name that."
            )
        model: DisentangledTransformer = load(folder)
        return LoadedModel(model if dtype is None else model.to(DTYPES[dtype]), None, name)
    files = sorted(path.name for path in folder.iterdir())
    weights = [file for file in files if file.endswith(".safetensors")]
    ggufs = [file for file in files if file.endswith(".gguf")]
    if "adapter_config.json" in files or "adapter_model.safetensors" in files:
        raise CausalProbeError(
            f"{name} {'comes with' if 'config.json' in files else 'is'} an adapter (LoRA, say), which is never applied unasked. With the "
            "package peft, load the model that it was trained on and the adapter, and save what merge_and_unload() gives with "
            "save_pretrained(folder); or move adapter_config.json and the adapter's weights away."
        )
    if weights and "config.json" in files:
        _check_weights(folder, name, weights)
        if ggufs:
            raise CausalProbeError(
                f"{name} holds two sets of weights, {weights[0]} and {ggufs[0]}: name the GGUF file, or move it away."
            )
        return _load_hugging_face(folder, name, dtype, device_map=device_map, any_kind=any_kind)
    if len(ggufs) == 1:
        return _load_hugging_face(folder, Path(ggufs[0]).stem, dtype, device_map=device_map, gguf_file=ggufs[0])
    if ggufs:
        raise CausalProbeError(f"{folder} holds several GGUF files, {', '.join(ggufs)}: name one of them.")
    if pickles := [file for file in files if file.endswith(PICKLES)]:
        raise CausalProbeError(
            f"The weights of {name} are pickles ({', '.join(pickles[:3])}), and a pickle can run any code when it is opened, so "
            "it is not opened. Save the model as safetensors where you trust it: model.save_pretrained(folder)."
        )
    if weights or "config.json" in files:
        missing = "config.json, which says what the model is" if weights else "weights in safetensors or GGUF form"
        raise CausalProbeError(f"{name} lacks {missing}.")
    raise CausalProbeError(
        f"{folder} holds no model: no model.json of a saved DisentangledTransformer, no config.json with safetensors, no GGUF file."
    )


def _check_weights(folder: Path, name: str, found: list[str]) -> None:
    """Raise unless the safetensors in a folder are those of one model: ``model.safetensors``, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    wanted = _shards(index) if index.is_file() else {"model.safetensors"}
    if lacking := sorted(wanted - set(found)):
        raise CausalProbeError(
            f"{name} lacks {', '.join(lacking[:3])}{' that its index names' if index.is_file() else ''}; it has {', '.join(found[:3])}."
        )
    if strays := sorted(set(found) - wanted):
        raise CausalProbeError(
            f"{name} holds two sets of weights: {', '.join(sorted(wanted)[:3])}"
            f"{' that its index names' if index.is_file() else ''}, and {', '.join(strays[:3])}. Move one of them away."
        )
    for file in found:
        _refuse_pointer(folder / file)


def _refuse_pointer(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise CausalProbeError(
                f"{path} is a pointer of Git LFS, not the weights: fetch them with `git lfs pull` in that repository."
            )


def _shards(index: Path) -> set[str]:
    """The files that an index names: they could be pickles."""
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CausalProbeError(f"{index} is damaged: it has no weight_map from names to files.")
    if others := sorted({shard for shard in shards.values() if not shard.endswith(".safetensors")}):
        raise CausalProbeError(
            f"{index} names files that are not safetensors, {', '.join(others[:3])}: they are not opened."
        )
    return set(shards.values())


def _load_hugging_face(
    folder: Path, name: str, dtype: str | None, *, device_map: Any, gguf_file: str | None = None, any_kind: bool = False
) -> LoadedModel:
    # Late: a hub of several hundred modules, and a DisentangledTransformer needs none of them.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    placed: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if gguf_file is not None:
        if GGUF_PART.fullmatch(gguf_file):
            raise CausalProbeError(
                f"{gguf_file} is one part of a split GGUF file: put the parts together with llama.cpp's `llama-gguf-split --merge`."
            )
        _refuse_pointer(folder / gguf_file)
        _require_gguf()
        options["gguf_file"] = gguf_file
    has_tokenizer = gguf_file is not None or any((folder / file).is_file() for file in TOKENIZER_FILES)
    try:
        with _quiet():
            kind: Any = _kind_of(folder) if any_kind else AutoModelForCausalLM
            found: Any = kind.from_pretrained(
                folder,
                dtype=DTYPES[dtype or "float32"],
                attn_implementation="eager",
                use_safetensors=gguf_file is None or None,
                output_loading_info=True,
                **placed,
                **options,
            )
    except Exception as error:  # what a broken or foreign file raises in transformers is of any kind
        what = "" if any_kind else " as a causal language model"
        raise CausalProbeError(f"{name} can't be loaded{what}: {_reason(error)}") from error
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **options) if has_tokenizer else None
    except Exception as error:  # a broken tokenizer file raises errors of any kind, too
        file = gguf_file or _damaged(folder) or ", ".join(f for f in TOKENIZER_FILES if (folder / f).is_file())
        raise CausalProbeError(f"The tokenizer of {name} can't be loaded ({file}): {_reason(error)}") from error
    model, info = found
    _check_surplus(model, name, info["unexpected_keys"])
    if missing := sorted(info["missing_keys"]):  # transformers would make them up at random
        raise CausalProbeError(
            f"{name} can't be loaded: its weights don't fit its configuration. Missing: {', '.join(missing[:3])}."
        )
    return LoadedModel(model.eval(), tokenizer, name)


def _damaged(folder: Path) -> str | None:
    """The first of a tokenizer's files that is no JSON."""
    for file in TOKENIZER_FILES:
        if file.endswith(".json") and (folder / file).is_file():
            try:
                json.loads((folder / file).read_bytes())
            except (ValueError, RecursionError):
                return file
    return None


def _check_surplus(model: Any, name: str, surplus: Iterable[str]) -> None:
    """Raise where weights that the configuration has no place for belong to a part that the model has: a layer, a bias, a norm."""
    surplus = sorted(key for key in surplus if not TABLES.search(key))
    modules = dict(model.named_modules())

    def is_of_a_part(key: str) -> bool:
        parts = key.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)  # of a layer, say
        owner = ".".join(parts[: len(parts) - 1 if number is None else number])
        part = modules.get(owner) or modules.get(f"{model.base_model_prefix}.{owner}")
        return part is not None and (number is not None or next(part.parameters(recurse=False), None) is not None)

    if wrong := [key for key in surplus if is_of_a_part(key)]:
        raise CausalProbeError(
            f"{name} can't be loaded: its weights don't fit its configuration, which has no place for {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}."
        )
    if surplus:
        warnings.warn(
            f"{name}: weights that a {type(model).__name__} has no place for were left out: {', '.join(surplus[:3])}"
            f"{f' and {len(surplus) - 3} more' if len(surplus) > 3 else ''}.",
            CausalProbeWarning,
            stacklevel=2,
        )


def _kind_of(folder: Path) -> Any:
    """The class of transformers' own that a configuration names first."""
    import transformers

    content = read_json(folder / "config.json")
    names = content.get("architectures") if isinstance(content, dict) else None
    kind = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise CausalProbeError(f"{folder.name} names no model of transformers in its configuration; found {names!r}.")
    return kind


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=[*HUB_FILES], ignore_patterns=[*NOT_HUB_FILES])
        )
    except LocalEntryNotFoundError as error:
        raise CausalProbeError(
            f"There is no folder {name}, and the Hugging Face hub can't be reached (nor is the model in its cache): give a local "
            "folder, or a network."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CausalProbeError(
            f"There is no folder {name}, and the Hugging Face hub does not give a model of that name: {_first_line(error)}"
        ) from error


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CausalProbeError(
            "A GGUF file is read with the package gguf, which is not installed: pip install 'causal-probe[gguf]'."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and notes of transformers; errors are raised all the same."""
    from transformers.utils import logging

    gguf: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bars, level, gguf_bar = logging.is_progress_bar_enabled(), logging.get_verbosity(), gguf.tqdm
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # The bar over a GGUF file's tensors is tqdm's own, which does not listen to transformers' switch; transformers' bar does.
    gguf.tqdm = logging.tqdm
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it needs Python code that comes with it, and such code is never run."
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:500]
