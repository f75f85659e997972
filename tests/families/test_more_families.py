"""Architectures outside the zoo, each run once, small and random: padding is invisible, and the
skeleton is the loaded model.

A type is allowed to be padded (`PADDING_EXACT`) because it stands in this table or in the zoo.
"""

import pytest
import torch
import transformers

from tests.families import zoo
from weft.families.forward import PADDING_EXACT, language_facts
from weft.families.loading import Source, differences, load, skeleton
from weft.families.prepare import prepare_language

# Whichever of these a configuration knows; the same thing has many names.
SMALL = {
    "vocab_size": zoo.VOCAB,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 6,
    "rotary_dim": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {"head_dim": None, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
LATENT |= {"qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
LATENT |= {"n_group": 2, "topk_group": 1}

# type -> what else its configuration needs
MORE: dict[str, dict] = {
    "apertus": {},
    "arcee": {},
    "bert": {},
    "biogpt": {},
    "codegen": {},
    "cohere": {},
    "cohere2": {},
    "deepseek_v2": LATENT | {"topk_method": "greedy", "first_k_dense_replace": 1},
    "deepseek_v3": LATENT,
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {"head_dim": None},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 6},
    "gpt_oss": {},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "ministral3": {},
    "mpt": {},
    "nemotron": {},
    "olmo": {},
    "olmo3": {},
    "olmoe": {},
    "persimmon": {},
    "phi": {},
    "phimoe": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {},
}


def small(model_type):
    cls = transformers.CONFIG_MAPPING[model_type]
    known = cls()
    arguments = {name: value for name, value in SMALL.items() if hasattr(known, name)}
    if getattr(known, "sliding_window", None) is None:
        arguments.pop("sliding_window", None)
    settable = not isinstance(getattr(cls, "layer_types", None), property)
    if (kinds := getattr(known, "layer_types", None)) and settable:
        arguments["layer_types"] = (sorted(set(kinds)) * 3)[:3]
    arguments |= MORE[model_type]
    config = cls(**{name: value for name, value in arguments.items() if value is not None})
    net = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in net.parameters()) < 3e6
    zoo.randomize(net, seed=0)
    return net.eval()


@pytest.mark.parametrize("model_type", MORE)
def test_padded_rows_equal_the_rows_alone(model_type):
    net = small(model_type)
    facts = language_facts(net.config, type(net))
    assert facts.model_type == model_type
    rows = zoo.tokens(25, 24, 23, 20, 5)
    call = prepare_language(rows, None, facts)
    with torch.no_grad():
        together = net(**call.kwargs, output_hidden_states=True)
        assert together.logits.isfinite().all()
        for index, row in enumerate(rows):
            alone = net(torch.tensor([row]), output_hidden_states=True)
            pairs = zip(
                [alone.logits, *alone.hidden_states],
                [together.logits, *together.hidden_states],
                strict=True,
            )
            for one, many in pairs:
                error = (one[0] - many[index, -len(row) :]).abs().max()
                assert error < 1e-5 * one.abs().max()


# Half precision, because some weights are kept in float32 then (the norms of gpt_oss).
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", MORE)
def test_the_skeleton_is_the_loaded_model(model_type, dtype, tmp_path):
    transformers.utils.logging.disable_progress_bar()
    small(model_type).to(dtype).save_pretrained(tmp_path)
    source = Source.of(tmp_path)
    assert differences(skeleton(source), load(source)) == []


def test_no_type_is_allowed_padding_without_a_test():
    tested = {zoo.config(name).model_type for name in zoo.FAMILIES} | MORE.keys()
    assert tested == PADDING_EXACT
