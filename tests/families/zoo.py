"""The zoo: one small random language model for each architecture at hand.

    from tests.families import zoo

    net = zoo.build("gpt2")                # the same weights at every call, eval mode, CPU
    zoo.layers("gpt2", net)                # ("transformer.h", 3)
    zoo.paths("gpt2").layer(1)             # "transformer.h.1"
    zoo.paths("llama").attention(-1)       # "model.layers.2.self_attn"

Weights are drawn wide (see `randomize`): no logit row is near-uniform, biases and norms are not
the identity, and an edit at any layer is visible in the logits, far above rounding.
The table of paths is written by hand and checked by a test: it does not come from our own code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

VOCAB = 128
LAYERS = 3
POSITIONS = 64  # learned positions: longer inputs are refused (GPT-2, OPT)

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Windows shorter than the test prompts, so that sliding attention really slides.
_WINDOW = {"sliding_window": 6}

# name -> (prefix of its configuration class, arguments of it)
_CONFIGS: dict[str, tuple[str, dict]] = {
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": POSITIONS,
        },
    ),
    "gpt_neox": (
        "GPTNeoX",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
        },
    ),
    "gptj": (
        "GPTJ",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 4},
    ),
    "opt": (
        "OPT",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": 32,
        },
    ),
    "bloom": (
        "Bloom",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    ),
    "llama": ("Llama", _LLAMA_LIKE),
    "mistral": ("Mistral", _LLAMA_LIKE | _WINDOW),
    "qwen2": ("Qwen2", _LLAMA_LIKE),
    "qwen3": ("Qwen3", _LLAMA_LIKE | {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        _LLAMA_LIKE | _WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "Gemma3",
        _LLAMA_LIKE
        | _WINDOW
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3", _LLAMA_LIKE),
    "olmo2": ("Olmo2", _LLAMA_LIKE),
    "mixtral": (
        "Mixtral",
        _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        _LLAMA_LIKE | _EXPERTS | {"shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": ("Qwen3Moe", _LLAMA_LIKE | _EXPERTS | {"head_dim": 8}),
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
EXPERT_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")

# Only the text half of Gemma 3 is a causal language model of its own, and its config says so.
_CONFIG_CLASS = {"gemma3": "Gemma3TextConfig"}


@dataclass(frozen=True)
class Paths:
    """Module paths of one architecture; `layer`, `attention` and `mlp` take a layer number."""

    embedding: str
    layer_list: str
    attention_name: str
    mlp_name: str
    norm: str
    head: str

    def layer(self, index: int) -> str:
        return f"{self.layer_list}.{index % LAYERS}"

    def attention(self, index: int) -> str:
        return f"{self.layer(index)}.{self.attention_name}"

    def mlp(self, index: int) -> str:
        return f"{self.layer(index)}.{self.mlp_name}"


_LLAMA_PATHS = Paths(
    "model.embed_tokens", "model.layers", "self_attn", "mlp", "model.norm", "lm_head"
)
_GPT2_PATHS = Paths(
    "transformer.wte", "transformer.h", "attn", "mlp", "transformer.ln_f", "lm_head"
)
_PATHS = {
    "gpt2": _GPT2_PATHS,
    "gptj": _GPT2_PATHS,
    "gpt_neox": Paths(
        "gpt_neox.embed_in",
        "gpt_neox.layers",
        "attention",
        "mlp",
        "gpt_neox.final_layer_norm",
        "lm_head",
    ),
    # OPT has no MLP module: `fc2` gives what the MLP adds to the residual.
    "opt": Paths(
        "model.decoder.embed_tokens",
        "model.decoder.layers",
        "self_attn",
        "fc2",
        "model.decoder.final_layer_norm",
        "lm_head",
    ),
    "bloom": Paths(
        "transformer.word_embeddings",
        "transformer.h",
        "self_attention",
        "mlp",
        "transformer.ln_f",
        "lm_head",
    ),
}


def paths(name: str) -> Paths:
    """The module paths of one architecture."""
    return _PATHS.get(name, _LLAMA_PATHS)


def layers(name: str, model: nn.Module) -> tuple[str, int]:
    """(path of the list of decoder layers, how many there are)."""
    path = paths(name).layer_list
    return path, len(model.get_submodule(path))  # type: ignore[arg-type]


def config(name: str, **changes: object):
    """A fresh small configuration; `changes` go to its constructor.

    Experts run as `batched_mm`, the one way that also runs under `FakeTensorMode` in float32.
    """
    import transformers

    prefix, arguments = _CONFIGS[name]
    kind = getattr(transformers, _CONFIG_CLASS.get(name, f"{prefix}Config"))
    arguments = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | arguments | changes
    if name in EXPERT_FAMILIES:
        arguments.setdefault("experts_implementation", "batched_mm")
    return kind(**arguments)


def build(
    name: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attn_implementation: str | None = None,
    **changes: object,
) -> nn.Module:
    """A model `[batch, pos] -> logits [batch, pos, VOCAB]`, in eval mode, about 20 ms.

    The same `name`, `dtype` and `seed` give the same weights; the global random state is kept.
    `attn_implementation` is `"eager"`, `"sdpa"` or None for the architecture's own default.
    """
    import transformers

    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(
            config(name, **changes), dtype=dtype, attn_implementation=attn_implementation
        )
    randomize(model, seed)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draw all weights anew: matrices ~ N(0, 0.2), norms and biases moved from their start value by
    N(0, 0.1)."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float32)
        if parameter.ndim > 1:
            parameter.copy_(0.2 * noise)
        else:
            parameter.add_(0.1 * noise.to(parameter.dtype))


def tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Rows of random token ids of the given lengths, without the special ids 0, 1, 2."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=draw).tolist() for n in lengths]


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def tokenizer(*, bos: bool = True, chat: bool = True, **special: str):
    """A tokenizer of the words `w3` ... `w124` and three roles, ids below VOCAB, made in memory.

    Like many real ones it puts `<s>` (id 1) before a text if `bos`; it names no pad token, unless
    `pad_token="<pad>"` is given. `w5` has id 5.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB - 3))]
    words += ["system", "user", "assistant"]
    rust = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="</s>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        rust.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token="<s>", eos_token="</s>", **special
    )
    made.chat_template = CHAT_TEMPLATE if chat else None
    return made
