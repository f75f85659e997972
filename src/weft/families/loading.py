"""Where a language model comes from: its tree without weights, its weights, its tokenizer.

    source = Source.of("openai-community/gpt2")  # or a folder, or a module that is there already
    tree = skeleton(source)                      # on the meta device: milliseconds, no weights
    net = load(source)                           # the real one, in eval mode
    tokenizer = load_tokenizer(source)

The skeleton has the module paths and the parameters (names, shapes, dtypes) of the loaded model:
`differences` says where not. Code from a repository is never run: `trust_remote_code` is off and
not offered.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.errors import InputError, UnknownOptionError
from weft.families.forward import unknown_option

# --- options -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded. None leaves the choice to `transformers` and the checkpoint.

    dtype: a torch dtype or its name (`"bfloat16"`); None or `"auto"`: the dtype of the checkpoint.
    device_map: a device, `"auto"`, or a dict of devices by module path; None: the CPU.
    attn_implementation: `"eager"` (has attention patterns), `"sdpa"`, ...
    experts_implementation: the kernel of expert layers, `"batched_mm"`, `"grouped_mm"`, `"eager"`.
    revision, token, cache_dir, local_files_only: where on the hub, as in `from_pretrained`.
    """

    dtype: torch.dtype | str | None = None
    device_map: Any = None
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _dtype(self.dtype))

    def hub(self) -> dict[str, Any]:
        """The options that say where files are found."""
        return self._given("revision", "token", "cache_dir", "local_files_only")

    def kernels(self) -> dict[str, Any]:
        """The options that choose kernels."""
        return self._given("attn_implementation", "experts_implementation")

    def chosen(self) -> tuple[str, ...]:
        """Names of the options that differ from their default."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != f.default)

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


LOAD_OPTION_NAMES = tuple(f.name for f in fields(LoadOptions))

_INSTEAD = {
    "trust_remote_code": "load it with your own code, and give the module: LanguageModel(net)",
    "torch_dtype": "dtype=...",
    "device": "device_map=...",
    "quantization_config": "load it with transformers, and give the module: LanguageModel(net)",
}


def load_options(**given: object) -> LoadOptions:
    """`LoadOptions` from keywords; UnknownOptionError with the list of valid ones for any other."""
    for name in given:
        if name not in LOAD_OPTION_NAMES:
            raise unknown_option(name, LOAD_OPTION_NAMES, _INSTEAD)
    return LoadOptions(**given)  # type: ignore[arg-type]


def _dtype(given: object) -> torch.dtype | None:
    """A dtype from itself or its name; None where the checkpoint decides."""
    if given in (None, "auto"):
        return None
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UnknownOptionError(
            f"dtype {given!r} is no floating-point dtype of torch",
            fix="dtype=torch.bfloat16, or its name",
        )
    return dtype


DEFAULT_LOADING = LoadOptions()

# --- sources -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Where a model comes from: `name` is a hub id or a folder, or `module` is the model itself."""

    name: str | None = None
    module: nn.Module | None = None

    @classmethod
    def of(cls, what: object) -> Source:
        """A source from a hub id, a folder or a module; InputError for a folder not there."""
        if isinstance(what, Source):
            return what
        if isinstance(what, nn.Module):
            return cls(module=what)
        if isinstance(what, Path):
            return cls(name=_folder(what))
        if isinstance(what, str):
            path = Path(what).expanduser()
            return cls(name=_folder(path) if path.exists() or _is_path(what) else what)
        raise InputError(
            f"a model is a hub id, a folder or a torch.nn.Module, not {type(what).__name__}",
            fix="give one of these",
        )

    @property
    def folder(self) -> Path | None:
        """The local folder, if it is one."""
        path = None if self.name is None else Path(self.name)
        return path if path is not None and path.is_dir() else None


def _is_path(text: str) -> bool:
    """A hub id is `name` or `owner/name`; all else was meant as a path."""
    return text.startswith(("/", "./", "../", "~")) or text.count("/") > 1 or "\\" in text


def _folder(path: Path) -> str:
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        raise InputError(
            f"no model folder at {path}: it is {what}",
            fix="give the folder that holds config.json, or the model's id on the hub",
        )
    return str(path)


# --- loading -------------------------------------------------------------------------------------


def load_config(source: Source, options: LoadOptions = DEFAULT_LOADING) -> Any:
    """The configuration of the model. Raises InputError if there is none to be had."""
    if source.module is not None:
        return _module_config(source.module)
    transformers = _transformers()
    with _quiet(), _explained(source, "config.json"):
        return transformers.AutoConfig.from_pretrained(
            source.name, trust_remote_code=False, **options.hub()
        )


def skeleton(source: Source, options: LoadOptions = DEFAULT_LOADING) -> nn.Module:
    """The module tree with parameters on the meta device, in eval mode; a given module is itself.

    Needs the configuration only. With `dtype=None` and a configuration that names none, the dtype
    is that of the first floating-point weight in a local folder, and float32 for a model not yet
    downloaded. Raises InputError for a source without a causal language model, or with a quantised
    one.
    """
    if source.module is not None:
        return _given_module(source.module, options)
    config = load_config(source, options)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{source.name} is quantised: its modules cannot be known from the configuration",
            fix=_INSTEAD["quantization_config"],
        )
    dtype = _resolve_dtype(source, config, options)
    with _quiet(), _explained(source, "a causal language model"), torch.device("meta"):
        net = _kind_of(config).from_config(
            config, dtype=dtype, trust_remote_code=False, **options.kernels()
        )
    _keep_wide(net, dtype)
    _add_generation_config(net, source, options)
    return net.eval()


def _kind_of(config: Any) -> Any:
    """The class of `transformers` that opens a language model of this configuration."""
    transformers = _transformers()
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def _add_generation_config(net: Any, source: Source, options: LoadOptions) -> None:
    """How the model generates by default, where it says so beside its configuration."""
    with _quiet(), suppress(OSError):  # it has no such file
        net.generation_config = _transformers().GenerationConfig.from_pretrained(
            source.name, **options.hub()
        )


def load(
    source: Source, options: LoadOptions = DEFAULT_LOADING, *, safetensors_only: bool = False
) -> nn.Module:
    """The model with its weights, in eval mode; a given module is itself, untouched.

    With `safetensors_only` a checkpoint of another format is refused. Raises InputError if it
    cannot be found, or if the checkpoint lacks weights of the model or has them in another shape:
    `transformers` would go on with random numbers.
    """
    if source.module is not None:
        return _given_module(source.module, options)
    placed = {} if options.device_map is None else {"device_map": options.device_map}
    placed |= {"use_safetensors": True} if safetensors_only else {}
    with _quiet(), _explained(source, "a causal language model with weights"):
        net, report = _kind_of(load_config(source, options)).from_pretrained(
            source.name,
            dtype="auto" if options.dtype is None else options.dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else the error points to a report that is not shown
            **placed,
            **options.kernels(),
            **options.hub(),
        )
    _check_fit(source, report)
    return net.eval()


def load_tokenizer(
    source: Source, tokenizer: object = None, options: LoadOptions = DEFAULT_LOADING
) -> Any:
    """The tokenizer: the given object, or the one at the given id or folder, or the model's own.

    None for a given module without `tokenizer`: whose text it reads, it does not say. A folder
    without tokenizer files raises InputError; so does an id or folder that is not there.
    """
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        if not callable(tokenizer):
            raise InputError(
                f"a tokenizer is an id, a folder or callable, not {tokenizer!r}",
                fix="tokenizer=<id, folder or tokenizer>",
            )
        return tokenizer
    place = Source.of(source if tokenizer is None else tokenizer)
    if place.name is None:
        return None
    # The revision is the model's; a tokenizer from elsewhere has none of that name.
    hub = options.hub()
    if tokenizer is not None:
        hub.pop("revision", None)
    transformers = _transformers()
    with _quiet(), _explained(place, "a tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(
            place.name, trust_remote_code=False, **hub
        )


def differences(tree: nn.Module, loaded: nn.Module) -> list[str]:
    """What tells two models apart as trees: module paths and classes, parameters, tied weights.

    Empty for a skeleton and the model it stands for. Devices and numbers are not compared.
    """
    first, second = _inventory(tree), _inventory(loaded)
    return [
        f"{name}: {first.get(name, 'missing')} / {second.get(name, 'missing')}"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def _inventory(net: nn.Module) -> dict[str, str]:
    found = {f"module {path}": type(m).__name__ for path, m in net.named_modules()}
    tensors = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers())
    first_name: dict[int, str] = {}
    for name, tensor in tensors.items():
        owner = first_name.setdefault(id(tensor), name)
        found[f"tensor {name}"] = f"{tensor.dtype} {list(tensor.shape)} of {owner}"
    return found


# --- details -------------------------------------------------------------------------------------


def _given_module(net: nn.Module, options: LoadOptions) -> nn.Module:
    if chosen := options.chosen():
        raise UnknownOptionError(
            f"{', '.join(chosen)}: a module that is there already is not loaded",
            fix="prepare the module before you give it",
        )
    return net


def _module_config(net: nn.Module) -> Any:
    config = getattr(net, "config", None)
    if not hasattr(config, "get_text_config"):
        raise InputError(
            f"{type(net).__name__} has no transformers configuration",
            fix="use weft.Model(net), which passes arguments as they are",
        )
    return config


def _resolve_dtype(source: Source, config: Any, options: LoadOptions) -> torch.dtype:
    if isinstance(options.dtype, torch.dtype):
        return options.dtype
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return _stored_dtype(source) or torch.float32


def _stored_dtype(source: Source) -> torch.dtype | None:
    """The dtype of the first floating-point weight in a folder, from the header of its file."""
    from safetensors import safe_open

    files = sorted(source.folder.glob("*.safetensors")) if source.folder else []
    for file in files[:1]:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118, not a dict
                kind = stored.get_slice(key).get_dtype()
                if kind in _STORED:
                    return _STORED[kind]
    return None


_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def _keep_wide(net: nn.Module, dtype: torch.dtype) -> None:
    """Give what loading keeps in float32 that dtype on the skeleton too (core_model_loading.py)."""
    plan = getattr(net, "_get_dtype_plan", lambda _: {})(dtype)
    for name, tensor in net.state_dict(keep_vars=True).items() if plan else ():
        for pattern, kept in plan.items():
            if re.search(pattern.replace("*", ".*"), name):
                tensor.data = tensor.data.to(kept)


def _check_fit(source: Source, report: dict[str, Any]) -> None:
    """Missing weights and wrong shapes are errors, weights without a place a warning."""
    if wrong := sorted(report["mismatched_keys"]):
        name, stored, needed = wrong[0]
        raise InputError(
            f"the checkpoint {source.name} does not fit its configuration: {name} is "
            f"{list(stored)} in the file, {list(needed)} in the model",
            fix="give the configuration and the checkpoint of one model",
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"the checkpoint {source.name} lacks {len(missing)} weights of the model: "
            f"{_few(missing)}",
            fix="give a checkpoint of the whole language model, not of its base or of an adapter",
        )
    if unused := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"{len(unused)} weights of the checkpoint {source.name} have no place in the model: "
            f"{_few(unused)}",
            stacklevel=3,
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'language models need transformers: pip install "weft[hf]"', name="transformers"
        ) from error
    return transformers


@contextmanager
def _explained(source: Source, what: str) -> Iterator[None]:
    """Turn the many ways in which `from_pretrained` says no into one, with its first line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        where = f"folder {source.name}" if source.folder else f"id {source.name!r}"
        said = str(error).strip().splitlines() or [type(error).__name__]
        absent = isinstance(error, OSError) or not _has_config(source)
        raise InputError(
            f"cannot get {what} from {where}: {said[0]}",
            fix="give a folder made by save_pretrained, or an id of the hub within reach"
            if absent
            else None,
        ) from error


def _has_config(source: Source) -> bool:
    return source.folder is None or (source.folder / "config.json").is_file()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar and the advice of `transformers`; what matters is raised instead.

    The bar stays where somebody watches.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as chatter

    level, bar = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    hub_bar = not are_progress_bars_disabled()
    chatter.set_verbosity(logging.ERROR)
    if not sys.stderr.isatty():
        chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bar and not chatter.is_progress_bar_enabled():
            with warnings.catch_warnings():  # the environment may forbid the hub's bars for good
                warnings.simplefilter("ignore")
                chatter.enable_progress_bar()
        if not hub_bar:
            disable_progress_bars()
