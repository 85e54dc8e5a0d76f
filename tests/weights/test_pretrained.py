"""Loading pretrained models from folders: sizes, shards, slices per device, errors."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastslm_jax import sharding
from fastslm_jax.data import prompts
from fastslm_jax.errors import UserError
from fastslm_jax.weights import engine, layouts, pretrained, tensors

ROOT = pathlib.Path(__file__).parents[2]
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
WHISPER = {
    "model_type": "whisper",
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 1,
    "encoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": 20,
}


def llm_shapes(config):
    llm = pretrained.decoder_from_config(config)
    return jax.eval_shape(
        llm.init,
        jax.random.key(0),
        np.zeros((1, 2, llm.width), np.float32),
        np.zeros((1, 2), np.int32),
    )["params"]


def whisper_shapes(config):
    encoder = pretrained.whisper_from_config(config)
    mel = np.zeros((1, 2 * encoder.max_positions, encoder.num_mels), np.float32)
    return jax.eval_shape(encoder.init, jax.random.key(0), mel)["params"]


def random_tensors(shapes, layout, dtype=ml_dtypes.bfloat16):
    """Random tensors in the given layout."""
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), shapes)
    return dict(engine.store(tree, layout))


def write(folder, config, weights):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def llm_folder(tmp_path):
    return write(tmp_path / "llm", QWEN3, random_tensors(llm_shapes(QWEN3), layouts.hf_decoder()))


@pytest.fixture
def whisper_folder(tmp_path):
    return write(
        tmp_path / "whisper", WHISPER, random_tensors(whisper_shapes(WHISPER), layouts.hf_whisper())
    )


# ---- Sharding ----


def with_shardings(shapes, mesh, prefix):
    leaves = {f"{prefix}/{path}": leaf for path, leaf in engine.flatten(shapes).items()}
    shardings = sharding.parameter_shardings(leaves, mesh)
    leaves = {
        path.removeprefix(f"{prefix}/"): jax.ShapeDtypeStruct(
            leaf.shape, ml_dtypes.bfloat16, sharding=shardings[path]
        )
        for path, leaf in leaves.items()
    }
    return engine.unflatten(leaves)


class Reads(dict):
    """Counts the elements read of each tensor."""

    def watch(self, monkeypatch):
        read = tensors.SafetensorsSource.read

        def counted(source, key, index=()):
            value = read(source, key, index)
            self[key] = self.get(key, 0) + value.size
            return value

        monkeypatch.setattr(tensors.SafetensorsSource, "read", counted)
        return self


@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}],
    ids=str,
)
def test_every_element_is_read_once_for_all_devices(axes, llm_folder, whisper_folder, monkeypatch):
    mesh = sharding.make_mesh(**{"data": 1} | axes)
    for folder, load, config, shapes, prefix in (
        (llm_folder, pretrained.load_decoder, QWEN3, llm_shapes, "llm"),
        (whisper_folder, pretrained.load_whisper, WHISPER, whisper_shapes, "encoder"),
    ):
        reads = Reads().watch(monkeypatch)
        tree = with_shardings(shapes(config), mesh, prefix)
        params = load(folder, tree)
        weights = load_file(folder / "model.safetensors")
        assert reads == {key: value.size for key, value in weights.items()}
        for path, leaf in engine.flatten(params).items():
            assert leaf.sharding == engine.flatten(tree)[path].sharding
        monkeypatch.undo()
        back = dict(
            engine.store(params, layouts.hf_decoder() if prefix == "llm" else layouts.hf_whisper())
        )
        assert back.keys() == weights.keys()
        for key, value in weights.items():
            np.testing.assert_array_equal(
                back[key].view(np.uint16), value.view(np.uint16), err_msg=key
            )


TWO_PROCESSES = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
import pytest
sys.path.insert(0, "tests/weights")
import test_pretrained as t
reads = t.Reads().watch(pytest.MonkeyPatch())
mesh = t.sharding.make_mesh(data=1, fsdp=8)
t.pretrained.load_decoder(sys.argv[3], t.with_shardings(t.llm_shapes(t.QWEN3), mesh, "llm"))
print(json.dumps(reads))
"""


def test_each_process_reads_only_the_slices_of_its_devices(llm_folder):
    """Two processes with four devices each: each reads half of every sharded tensor."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(number), address, str(llm_folder)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    reads = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    for key, value in load_file(llm_folder / "model.safetensors").items():
        expected = value.size if key.endswith("norm.weight") else value.size // 2
        assert [read[key] for read in reads] == [expected, expected], key


# ---- Folders ----


def split(folder, with_index):
    """Splits model.safetensors into two shards."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": keys[i::2] for i in range(2)}
    for name, part in shards.items():
        save_file({key: weights[key] for key in part}, folder / name)
    if with_index:
        weight_map = {key: name for name, part in shards.items() for key in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_with_and_without_an_index(with_index, llm_folder):
    before = pretrained.load_decoder(llm_folder, llm_shapes(QWEN3))
    split(llm_folder, with_index)
    jax.tree.map(
        np.testing.assert_array_equal,
        pretrained.load_decoder(llm_folder, llm_shapes(QWEN3)),
        before,
    )


def test_whisper_prefixes_and_decoder(whisper_folder):
    """Models with and without output layer and bare encoders all load; the decoder is ignored."""
    weights = load_file(whisper_folder / "model.safetensors")
    before = pretrained.load_whisper(whisper_folder, whisper_shapes(WHISPER))
    decoder = np.zeros((3, 3), np.float32)
    for prefix, extra in (
        ("model.", {"model.decoder.layers.0.fc1.weight": decoder, "proj_out.weight": decoder}),
        ("", {}),
    ):
        renamed = {
            key.replace("model.encoder.", f"{prefix}encoder."): value
            for key, value in weights.items()
        }
        write(whisper_folder, WHISPER, renamed | extra)
        jax.tree.map(
            np.testing.assert_array_equal,
            pretrained.load_whisper(whisper_folder, whisper_shapes(WHISPER)),
            before,
        )


def test_tied_head(llm_folder, tmp_path):
    """A head is ignored if it is a copy of tied embeddings, and read if it is untied."""
    weights = load_file(llm_folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    write(llm_folder, QWEN3, weights | {"lm_head.weight": embedding.copy()})
    assert "lm_head" not in pretrained.load_decoder(llm_folder, llm_shapes(QWEN3))
    untied = QWEN3 | {"tie_word_embeddings": False}
    write(tmp_path / "untied", untied, weights | {"lm_head.weight": 2 * embedding})
    head = pretrained.load_decoder(tmp_path / "untied", llm_shapes(untied))["lm_head"]
    np.testing.assert_array_equal(head, (2 * embedding).astype(np.float32))


def test_hub_ids_are_downloaded(llm_folder, monkeypatch):
    import huggingface_hub

    requested = {}

    def snapshot_download(name, **options):
        requested[name] = options
        return str(llm_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert pretrained.resolve("Qwen/Qwen3-4B") == llm_folder
    assert "*.safetensors" in requested["Qwen/Qwen3-4B"]["allow_patterns"]
    pretrained.resolve("Qwen/Qwen3-8B", weights=False)
    assert "*.safetensors" not in requested["Qwen/Qwen3-8B"]["allow_patterns"]
    assert pretrained.resolve(str(llm_folder)) == llm_folder


def test_unreachable_hub_and_missing_folder(monkeypatch):
    import huggingface_hub

    def snapshot_download(name, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="Qwen/Qwen3-4B: not a local folder and not available"):
        pretrained.resolve("Qwen/Qwen3-4B")
    with pytest.raises(UserError, match="/none/at/all: no such folder"):
        pretrained.resolve("/none/at/all")


def test_fingerprint_depends_on_content_only(llm_folder, tmp_path):
    shutil.copytree(llm_folder, tmp_path / "copy")
    assert pretrained.fingerprint(llm_folder) == pretrained.fingerprint(tmp_path / "copy")
    weights = load_file(llm_folder / "model.safetensors")
    write(tmp_path / "copy", QWEN3, weights | {"model.norm.weight": -weights["model.norm.weight"]})
    assert pretrained.fingerprint(llm_folder) != pretrained.fingerprint(tmp_path / "copy")


def test_added_tokens_must_fit_the_embedding_rows(tokenizer_folder):
    assert len(prompts.load_tokenizer(tokenizer_folder, 309)) == 309
    with pytest.raises(UserError, match="added tokens reach id 308"):
        prompts.load_tokenizer(tokenizer_folder, 308)


# ---- config.json that does not fit the weights ----


MISMATCHES = {
    "fewer layers": ({"num_hidden_layers": 2}, r"unexpected tensor model\.layers\.2\.\S+"),
    "more layers": ({"num_hidden_layers": 4}, r"missing tensor model\.layers\.3\.\S+"),
    "other heads": (
        {"num_attention_heads": 2},
        r"o_proj\.weight has shape \(32, 64\), expected \(32, 32\)",
    ),
    "untied": ({"tie_word_embeddings": False}, r"missing tensor lm_head\.weight"),
    "other vocabulary": ({"vocab_size": 65}, r"embed_tokens\.weight has shape \(64, 32\)"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_config_that_does_not_match_its_tensors(name, llm_folder):
    change, message = MISMATCHES[name]
    with pytest.raises(UserError, match=f"{message}.*config.json"):
        pretrained.load_decoder(llm_folder, llm_shapes(QWEN3 | change))


def test_tied_head_that_differs_from_the_embeddings(llm_folder):
    weights = load_file(llm_folder / "model.safetensors")
    write(llm_folder, QWEN3, weights | {"lm_head.weight": -weights["model.embed_tokens.weight"]})
    with pytest.raises(
        UserError, match=r"differs from the embeddings, but config\.json has tie_word_embeddings"
    ):
        pretrained.load_decoder(llm_folder, llm_shapes(QWEN3))


@pytest.mark.parametrize("row", [0, 31, 63])
def test_tied_head_that_differs_anywhere(row, llm_folder):
    """One number of a copy is another: the copy could be trained, and is not the embeddings."""
    weights = load_file(llm_folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].copy()
    before = pretrained.load_decoder(llm_folder, llm_shapes(QWEN3))
    write(llm_folder, QWEN3, weights | {"lm_head.weight": head})
    loaded = pretrained.load_decoder(llm_folder, llm_shapes(QWEN3))
    np.testing.assert_array_equal(loaded["embed_tokens"], before["embed_tokens"])
    head[row, 17] += 1
    write(llm_folder, QWEN3, weights | {"lm_head.weight": head})
    with pytest.raises(UserError, match="differs from the embeddings"):
        pretrained.load_decoder(llm_folder, llm_shapes(QWEN3))


def test_weights_that_are_not_numbers_are_named(llm_folder):
    weights = load_file(llm_folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write(llm_folder, QWEN3, weights)
    message = r"tensor model\.layers\.1\.mlp\.up_proj\.weight contains NaN or infinite values"
    with pytest.raises(UserError, match=message):
        pretrained.load_decoder(llm_folder, llm_shapes(QWEN3))
    leaves = pretrained.open_decoder(llm_folder, engine.flatten(llm_shapes(QWEN3)))
    with pytest.raises(UserError, match=message):
        leaves["layers/up/kernel"].read()


def test_whisper_config_that_does_not_match(whisper_folder):
    with pytest.raises(UserError, match=r"unexpected tensor \S+layers\.1\.\S+.*config.json"):
        pretrained.load_whisper(whisper_folder, whisper_shapes(WHISPER | {"encoder_layers": 1}))
    with pytest.raises(UserError, match="d_model is 64, which is not divisible by its 5 heads"):
        pretrained.whisper_from_config(WHISPER | {"encoder_attention_heads": 5})
