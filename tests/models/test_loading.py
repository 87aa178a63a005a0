from __future__ import annotations

import json
import os
import pickle
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from causal_probe.errors import CausalProbeError, CausalProbeWarning
from causal_probe.hooks import to_hooked
from causal_probe.hooks.tokens import special_tokens
from causal_probe.models import DisentangledTransformer, load_model, save
from tests import tiny_huggingface as tiny


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with a tokenizer, as Hugging Face saves it."""
    folder = tmp_path / "tiny-llama"
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def refusal(source, **options):
    with pytest.raises(CausalProbeError) as error:
        load_model(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_a_hugging_face_folder_is_loaded_with_eager_attention_and_computes_the_same(kind, tmp_path):
    original = tiny.CAUSAL[kind]()
    original.save_pretrained(tmp_path / kind)
    loaded = load_model(tmp_path / kind)
    assert loaded.name == kind
    assert loaded.tokenizer is None
    assert loaded.model.config._attn_implementation == "eager"
    assert not loaded.model.training
    torch.testing.assert_close(loaded.model(tiny.tokens()).logits, original(tiny.tokens()).logits)


def test_the_tokenizer_comes_with_the_folder(folder):
    assert load_model(folder).tokenizer("t7 t9")["input_ids"] == [7, 9]


def test_a_saved_disentangled_transformer_is_loaded_in_its_own_dtype(tmp_path):
    model = DisentangledTransformer(3, 5, dtype=torch.float64)
    torch.nn.init.normal_(model.W_U)
    save(model, tmp_path / "mine")
    loaded = load_model(tmp_path / "mine")
    assert (type(loaded.model), loaded.tokenizer, loaded.name) == (DisentangledTransformer, None, "mine")
    assert torch.equal(loaded.model.W_U, model.W_U)
    assert load_model(tmp_path / "mine", dtype="float32").model.W_U.dtype == torch.float32


def test_half_precision_is_read_as_float32_unless_asked_otherwise(tmp_path):
    tiny.gpt2().bfloat16().save_pretrained(tmp_path / "half")
    loaded = load_model(tmp_path / "half").model
    saved = load_file(tmp_path / "half" / "model.safetensors")["transformer.wpe.weight"]
    assert saved.dtype == torch.bfloat16
    assert torch.equal(loaded.transformer.wpe.weight, saved.float())
    assert load_model(tmp_path / "half", dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(tmp_path / "half", dtype="float64").model.dtype == torch.float64


def gguf_file(path):
    """A tiny Llama as GGUF, with a tokenizer of its own."""
    import gguf

    config = tiny.llama().config
    weights = tiny.llama().state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(tiny.N_CTX)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(2)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(tiny.D_VOCAB)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<s>", "</s>", *(chr(33 + i) for i in range(tiny.D_VOCAB - 4)), '!"'])
    writer.add_token_types([3, 3, 3] + [1] * (tiny.D_VOCAB - 3))
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in weights.items():
        stem, suffix = name.rsplit(".", 1)
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the halves that rotary positions turn
            heads = 4 if "q_proj" in name else 2
            values = values.reshape(heads, 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_loaded_by_its_folder_or_by_itself(tmp_path):
    gguf_file(tmp_path / "tiny.gguf")
    expected = tiny.llama()(tiny.tokens()).logits
    for source in (tmp_path, tmp_path / "tiny.gguf"):
        loaded = load_model(source)
        assert loaded.name == "tiny"
        torch.testing.assert_close(loaded.model(tiny.tokens()).logits, expected)
        assert special_tokens(to_hooked(*loaded)).bos == 1


def test_nothing_is_printed_and_the_bars_are_as_they_were(tmp_path, capfd):
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    gguf_file(tmp_path / "tiny.gguf")
    capfd.readouterr()
    bar, level = modeling_gguf_pytorch_utils.tqdm, logging.get_verbosity()
    load_model(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert modeling_gguf_pytorch_utils.tqdm is bar
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (True, level)


def test_of_several_gguf_files_one_must_be_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    assert refusal(tmp_path) == f"{tmp_path} holds several GGUF files, a.gguf, b.gguf: name one of them."


# --------------------------------------------------------------------------------------------------------- what is refused


class Bomb:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def plant(path, target):
    path.write_bytes(pickle.dumps(Bomb(target)))


def test_a_pickle_is_refused_with_the_reason_and_never_opened(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    plant(folder / "pytorch_model.bin", tmp_path / "exploded")
    plant(tmp_path / "bomb", tmp_path)
    with pytest.raises(FileExistsError):  # the bomb works
        pickle.loads((tmp_path / "bomb").read_bytes())
    assert refusal(folder) == (
        "The weights of tiny-llama are pickles (pytorch_model.bin), and a pickle can run any code when it is opened, so it is not "
        "opened. Save the model as safetensors where you trust it: model.save_pretrained(folder)."
    )
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_beside_safetensors_is_not_opened(folder, tmp_path):
    plant(folder / "pytorch_model.bin", tmp_path / "exploded")
    load_model(folder)
    assert not (tmp_path / "exploded").exists()


def test_an_index_that_names_pickles_is_refused(folder, tmp_path):
    plant(folder / "evil.bin", tmp_path / "exploded")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "evil.bin"}}))
    assert "names files that are not safetensors, evil.bin: they are not opened" in refusal(folder)
    index.write_text("{}")
    assert "is damaged: it has no weight_map" in refusal(folder)
    assert not (tmp_path / "exploded").exists()


def test_code_that_comes_with_a_model_is_never_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\n")
    assert refusal(folder) == (
        "tiny-llama can't be loaded as a causal language model: it needs Python code that comes with it, and such code is never run."
    )
    assert not (tmp_path / "exploded").exists()


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path):
    config = {"model_type": "vit", "architectures": ["ViTModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "can't be loaded as a causal language model: " in refusal(tmp_path)


def test_weights_that_are_missing_or_damaged_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "tiny-llama can't be loaded as a causal language model: " in refusal(folder)
    weights.unlink()
    assert refusal(folder) == "tiny-llama lacks weights in safetensors or GGUF form."


def test_a_model_that_does_not_fill_its_shape_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert refusal(folder) == (
        "tiny-llama can't be loaded: its weights don't fit its configuration. Missing: model.layers.1.self_attn.q_proj.weight."
    )


def test_weights_that_the_configuration_has_no_place_for_are_refused(tmp_path):
    tiny.gpt2().save_pretrained(tmp_path / "short")
    change_config(tmp_path / "short", n_layer=1)
    assert refusal(tmp_path / "short").startswith(
        "short can't be loaded: its weights don't fit its configuration, which has no place for transformer.h.1."
    )
    tiny.llama(attention_bias=True).save_pretrained(tmp_path / "biases")
    change_config(tmp_path / "biases", attention_bias=False)
    assert "no place for model.layers.0.self_attn.k_proj.bias, " in refusal(tmp_path / "biases")
    tiny.llama().save_pretrained(tmp_path / "head")
    add_weights(tmp_path / "head", **{"lm_head.bias": torch.zeros(3)})
    assert "no place for lm_head.bias." in refusal(tmp_path / "head")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def add_weights(folder, **weights):
    path = folder / "model.safetensors"
    save_file({**load_file(path), **weights}, path, metadata={"format": "pt"})


def test_weights_of_another_task_are_left_out_with_a_warning_and_old_tables_without(folder):
    add_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)})
    load_model(folder)
    add_weights(folder, **{"score.weight": torch.zeros(2, 16)})
    with pytest.warns(
        CausalProbeWarning, match=r"^tiny-llama: weights that a LlamaForCausalLM has no place for were left out: score"
    ):
        load_model(folder)


def test_two_sets_of_weights_are_refused(folder, tmp_path):
    sharded = tmp_path / "sharded"
    tiny.llama().save_pretrained(sharded, max_shard_size="5KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    load_model(sharded)
    shutil.copy(folder / "model.safetensors", sharded)
    assert refusal(sharded).startswith("sharded holds two sets of weights: model-00001-of-")
    assert refusal(sharded).endswith(" that its index names, and model.safetensors. Move one of them away.")
    (sharded / "model.safetensors").unlink()
    next(iter(sorted(sharded.glob("*.safetensors")))).unlink()
    assert refusal(sharded).startswith("sharded lacks model-00001-of-")
    (folder / "model.gguf").touch()
    assert "two sets of weights, model.safetensors and model.gguf" in refusal(folder)
    (folder / "model.gguf").rename(folder / "other.safetensors")
    assert refusal(folder).endswith(
        "two sets of weights: model.safetensors, and other.safetensors. Move one of them away."
    )


def test_an_adapter_is_never_applied_unasked(folder, tmp_path):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert refusal(folder).startswith("tiny-llama comes with an adapter (LoRA, say), which is never applied unasked.")
    only = tmp_path / "only"
    only.mkdir()
    save_file({"x": torch.zeros(1)}, only / "adapter_model.safetensors")
    (folder / "adapter_config.json").rename(only / "adapter_config.json")
    assert refusal(only).startswith("only is an adapter (LoRA, say), ")
    assert "merge_and_unload()" in refusal(only)


def test_what_is_no_weights_says_what_it_is(folder, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (folder / "model.safetensors").write_bytes(pointer)
    assert refusal(folder).endswith(
        "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull` in that repository."
    )
    (tmp_path / "a.gguf").write_bytes(pointer)
    assert "is a pointer of Git LFS" in refusal(tmp_path / "a.gguf")
    (tmp_path / "a-00001-of-00003.gguf").touch()
    assert refusal(tmp_path / "a-00001-of-00003.gguf") == (
        "a-00001-of-00003.gguf is one part of a split GGUF file: put the parts together with llama.cpp's `llama-gguf-split --merge`."
    )


def test_a_broken_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text('{"version":')
    assert refusal(folder).startswith("The tokenizer of tiny-llama can't be loaded (tokenizer.json): ")


def test_names_that_no_file_system_takes_are_refused_briefly(folder, monkeypatch):
    for name in ("x" * 5000, "x/" * 2500, "~nouser/x", "a/b@" + "c" * 5000, "nul\0"):
        assert refusal(name).startswith("There is no model ")
        assert len(refusal(name)) < 500
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model("~/tiny-llama").name == "tiny-llama"


def test_a_folder_without_a_model_says_what_was_looked_for(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no model: no model.json of a saved DisentangledTransformer, no config.json with safetensors, no GGUF file."
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert refusal(tmp_path).endswith(" lacks config.json, which says what the model is.")


def test_a_file_is_not_a_folder(folder):
    assert "name the folder that the file is in" in refusal(folder / "config.json")


@pytest.mark.parametrize("source", ["", "./nowhere", "a/b/c", "out of/order"])
def test_what_is_no_folder_and_no_hub_name_is_said_at_once(source):
    assert refusal(source) == f"There is no model {source!r}: no such folder or file, and no name that a hub has."


def test_unknown_dtypes_and_devices_are_refused(folder):
    assert refusal(folder, dtype="int8").startswith("The dtype 'int8' was asked for; there are float64, float32")
    assert refusal(folder, device="nowhere").startswith("The model can't be moved to the device 'nowhere': ")


# ------------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_name_without_network_says_so_in_one_line(offline, tmp_path, monkeypatch):
    # Nothing listens there, as where there is no network.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert refusal("nobody/no-model") == (
        "There is no folder nobody/no-model, and the Hugging Face hub can't be reached (nor is the model in its cache): give a "
        "local folder, or a network."
    )


def test_what_the_hub_refuses_is_passed_on_in_one_line(monkeypatch):
    def refuse(name, **options):
        raise huggingface_hub.errors.HFValidationError("no such name\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert refusal("nobody/no-model") == (
        "There is no folder nobody/no-model, and the Hugging Face hub does not give a model of that name: no such name"
    )


def test_a_local_folder_never_asks_the_hub(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    to_hooked(*load_model(folder))  # and conftest fails a test that opens a connection


def test_of_the_hub_neither_pickles_nor_code_are_asked_for(folder, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_model("owner/model")
    assert (loaded.name, asked["name"], asked["revision"]) == ("owner/model", "owner/model", None)
    loaded = load_model("owner/model", revision="step1000")
    assert (loaded.name, asked["revision"]) == ("owner/model@step1000", "step1000")
    loaded = load_model("owner/model@step1000")  # as results write it
    assert (loaded.name, asked["name"], asked["revision"]) == ("owner/model@step1000", "owner/model", "step1000")
    files = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model",
        "vocab.json", "merges.txt", "chat_template.jinja", "pytorch_model.bin", "model.pt", "modeling_mine.py", "tf_model.h5",
        "consolidated.safetensors", "onnx/model.safetensors", "README.md",
    ]  # fmt: skip
    wanted = list(
        filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    )
    assert wanted == files[:8]


def test_a_folder_wins_over_a_hub_name(folder, monkeypatch):
    shutil.copytree(folder, folder.parent / "gpt2")
    monkeypatch.chdir(folder.parent)
    assert load_model("gpt2").model.config.model_type == "llama"
