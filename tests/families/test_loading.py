"""A skeleton is the loaded model without its numbers, and every wrong source says what is wrong."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.families import zoo
from weft.errors import InputError, UnknownOptionError
from weft.families.loading import (
    DEFAULT_LOADING,
    LoadOptions,
    Source,
    differences,
    load,
    load_options,
    load_tokenizer,
    skeleton,
)
from weft.families.sampling import sampling_of


def save(net, folder):
    """`save_pretrained` as anyone does it, without its progress bar."""
    transformers.utils.logging.disable_progress_bar()
    net.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(zoo.build("llama"), tmp_path / "llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_skeleton_is_the_loaded_model_without_numbers(name, dtype, tmp_path):
    net = zoo.build(name, dtype=dtype)
    source = Source.of(save(net, tmp_path))
    tree, loaded = skeleton(source), load(source)
    assert differences(tree, loaded) == []
    assert all(tensor.is_meta for tensor in (*tree.parameters(), *tree.buffers()))
    assert not any(m.training for m in (*tree.modules(), *loaded.modules()))
    assert type(tree) is type(loaded) is type(net)
    assert next(loaded.parameters()).dtype is dtype
    saved = dict(net.named_parameters())
    for path, parameter in loaded.named_parameters():
        assert torch.equal(parameter, saved[path])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "bloom"])
def test_tied_weights_are_tied_in_the_skeleton_as_in_the_model(name, tied, tmp_path):
    source = Source.of(save(zoo.build(name, tie_word_embeddings=tied), tmp_path))
    tree, loaded = skeleton(source), load(source)
    assert differences(tree, loaded) == []
    for net in (tree, loaded):
        one = net.get_input_embeddings().weight is net.get_output_embeddings().weight
        assert one == tied


def test_a_skeleton_generates_by_default_as_the_model_does(tmp_path):
    net = zoo.build("llama")
    net.generation_config.update(eos_token_id=[7, 9], repetition_penalty=1.5, pad_token_id=3)
    source = Source.of(save(net, tmp_path))
    chosen = sampling_of({}, skeleton(source).generation_config)
    assert chosen == sampling_of({}, load(source).generation_config)
    assert (chosen.eos_token_id, chosen.repetition_penalty) == ((7, 9), 1.5)
    (tmp_path / "generation_config.json").unlink()
    chosen = sampling_of({}, skeleton(source).generation_config)
    assert chosen == sampling_of({}, load(source).generation_config)


def test_options_reach_both(folder):
    options = load_options(dtype="bfloat16", attn_implementation="eager")
    tree, loaded = skeleton(Source.of(folder), options), load(Source.of(folder), options)
    assert differences(tree, loaded) == []
    for net in (tree, loaded):
        assert net.dtype is torch.bfloat16
        assert net.config._attn_implementation == "eager"


def test_a_device_map_reaches_the_loaded_model(folder):
    loaded = load(Source.of(folder), load_options(device_map="meta"))
    assert all(parameter.is_meta for parameter in loaded.parameters())


def test_the_revision_is_the_models_not_that_of_another_tokenizer(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name, **given: asked.append(given)
    )
    options = load_options(revision="v2")
    load_tokenizer(Source.of(folder), None, options)
    load_tokenizer(Source.of(folder), folder, options)
    assert [given.get("revision") for given in asked] == ["v2", None]
    assert all(given["trust_remote_code"] is False for given in asked)


def test_an_expert_kernel_reaches_both(tmp_path):
    source = Source.of(save(zoo.build("mixtral"), tmp_path))
    options = load_options(experts_implementation="eager")
    for net in (skeleton(source, options), load(source, options)):
        assert net.config._experts_implementation == "eager"


def test_a_dtype_that_the_configuration_does_not_name_is_that_of_the_weights(tmp_path):
    save(zoo.build("gpt2", dtype=torch.float16), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    tree, loaded = skeleton(Source.of(tmp_path)), load(Source.of(tmp_path))
    assert tree.dtype is loaded.dtype is torch.float16
    assert differences(tree, loaded) == []


def test_differences_are_named():
    first, second = zoo.build("llama"), zoo.build("llama", num_hidden_layers=2)
    assert any(line.startswith("module model.layers.2: ") for line in differences(first, second))
    half = zoo.build("llama", dtype=torch.float16)
    assert any("float32" in line and "float16" in line for line in differences(first, half))
    tied = zoo.build("llama", tie_word_embeddings=True)
    assert any("lm_head.weight" in line for line in differences(first, tied))


def test_a_module_is_its_own_skeleton_and_is_left_as_it_is():
    net = zoo.build("llama").train()
    source = Source.of(net)
    assert skeleton(source) is load(source) is net
    assert net.training
    assert load_tokenizer(source) is None
    with pytest.raises(UnknownOptionError, match="dtype: a module that is there already"):
        load(source, load_options(dtype="float16"))


# --- tokenizers ----------------------------------------------------------------------------------


def test_a_tokenizer_is_an_object_a_folder_or_the_models_own(folder, tmp_path):
    made = zoo.tokenizer()
    made.save_pretrained(folder)
    source = Source.of(folder)
    assert load_tokenizer(source)("w5 w6")["input_ids"] == [1, 5, 6]
    assert load_tokenizer(source, made) is made
    other = tmp_path / "other"
    zoo.tokenizer(bos=False).save_pretrained(other)
    for place in (other, str(other)):
        assert load_tokenizer(source, place)("w5 w6")["input_ids"] == [5, 6]
        assert load_tokenizer(Source.of(zoo.build("llama")), place)("w5")["input_ids"] == [5]
    with pytest.raises(InputError, match="an id, a folder or callable, not 3"):
        load_tokenizer(source, 3)
    with pytest.raises(InputError, match="no model folder at"):
        load_tokenizer(source, tmp_path / "nowhere")


def test_a_folder_without_tokenizer_says_so(folder):
    with pytest.raises(InputError, match="cannot get a tokenizer from folder"):
        load_tokenizer(Source.of(folder))


# --- refusals ------------------------------------------------------------------------------------


def test_unknown_options_raise_with_the_list():
    with pytest.raises(
        UnknownOptionError, match=r"unknown option 'dtpye'; valid: dtype, .*\n.*dtype"
    ):
        load_options(dtpye="float16")
    with pytest.raises(UnknownOptionError, match=r"trust_remote_code(.|\n)*give the module"):
        load_options(trust_remote_code=True)
    with pytest.raises(UnknownOptionError, match=r"(?s)torch_dtype.*dtype="):
        load_options(torch_dtype=torch.float16)
    for wrong in ("int8", "cat", torch.int8, 16):
        with pytest.raises(UnknownOptionError, match=f"dtype {wrong!r}"):
            load_options(dtype=wrong)
    assert load_options() == load_options(dtype="auto") == DEFAULT_LOADING
    assert load_options(dtype="float16") == LoadOptions(dtype=torch.float16)


def test_a_path_that_is_not_there(tmp_path):
    for what in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "~/no/where"):
        with pytest.raises(InputError, match=r"no model folder at .*: it is not there\n.*config"):
            Source.of(what)
    file = tmp_path / "weights.bin"
    file.write_text("")
    with pytest.raises(InputError, match="it is a file"):
        Source.of(file)
    with pytest.raises(InputError, match="not int"):
        Source.of(3)


def test_a_folder_or_an_id_without_a_model(tmp_path):
    for make in (skeleton, load):
        with pytest.raises(InputError, match=rf"(?s)from folder {tmp_path}: .*fix: give a folder"):
            make(Source.of(tmp_path))
        with pytest.raises(InputError, match="from id 'nobody/nothing'"):
            make(Source.of("nobody/nothing"), load_options(local_files_only=True))


def test_a_model_that_is_no_language_model(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot get a causal language model from"):
        skeleton(Source.of(tmp_path))


def test_code_of_a_repository_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "homegrown"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("import sys; sys.modules['ran_it'] = sys")
    for make in (skeleton, load):
        with pytest.raises(InputError):
            make(Source.of(folder))
    assert "ran_it" not in sys.modules


def test_a_checkpoint_with_missing_weights_is_not_filled_with_random_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights .*: model\.layers\.1\.mlp\.up_proj"):
        load(Source.of(folder))


def test_weights_without_a_place_are_told(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.vision.weight"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 weights .* no place in the model: model\.vision"):
        load(Source.of(folder))


def test_weights_of_another_shape_are_told(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight is \[2\] .*, \[32\] in the"):
        load(Source.of(folder))


def test_an_attention_that_the_model_does_not_have(tmp_path):
    source = Source.of(save(zoo.build("gemma2"), tmp_path))
    for make in (skeleton, load):
        with pytest.raises(InputError, match=r"from folder .*: Gemma2"):
            make(source, load_options(attn_implementation="sdpa"))


def test_a_quantised_checkpoint_has_no_skeleton(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is quantised"):
        skeleton(Source.of(folder))


def test_without_transformers_the_install_command_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for make in (skeleton, load, load_tokenizer):
        with pytest.raises(ImportError, match=r'pip install "weft\[hf\]"'):
            make(Source.of(str(folder)))


def test_importing_the_families_does_not_import_transformers():
    modules = "any_module, call, forward, loading, names, prepare, tokens"
    code = f"from weft.families import {modules}; import sys; print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


# --- quiet ---------------------------------------------------------------------------------------


def test_loading_is_silent_and_leaves_the_settings_of_transformers(folder, capfd):
    chatter = transformers.utils.logging
    chatter.enable_progress_bar()
    before = chatter.get_verbosity()
    chatter.set_verbosity_info()
    try:
        skeleton(Source.of(folder))
        load(Source.of(folder))
        with pytest.raises(InputError):
            load_tokenizer(Source.of(folder))
        assert chatter.get_verbosity() == chatter.INFO
        assert chatter.is_progress_bar_enabled()
    finally:
        chatter.set_verbosity(before)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_plain_module_is_a_source_too():
    net = nn.Linear(2, 2)
    assert load(Source.of(net)) is net
