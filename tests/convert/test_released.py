"""Released files that are damaged or inconsistent: one line of error, exit code 2, no output."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


@pytest.fixture
def broken(released, tmp_path):
    """A folder without weights, and the tensors of `released`: each case writes its own weights."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text((released / "config.json").read_text())
    (folder / "tokenizer").symlink_to(released / "tokenizer")
    return folder, dict(load_file(released / "model.safetensors"))


def truncated(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def with_tensors(change):
    def write(folder, tensors):
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return write


def wrong_dtype(tensors):
    tensors["encoder.llm_proj.weight"] = tensors["encoder.llm_proj.weight"].astype(np.int32)


def missing_layer(tensors):
    for key in [key for key in tensors if ".layers.1." in key]:
        del tensors[key]


def missing_last_encoder_layer(tensors):
    for key in [key for key in tensors if ".blocks.1." in key]:
        del tensors[key]


def extra_key(tensors):
    tensors["encoder.llm_proj.scale"] = np.ones(3, np.float32)


def transposed(tensors):
    tensors["encoder.llm_proj.weight"] = np.ascontiguousarray(tensors["encoder.llm_proj.weight"].T)


def untied_head(tensors):
    tensors["llm.base_model.model.lm_head.weight"] = -tensors["llm.base_model.model.lm_head.weight"]


def not_a_number(tensors):
    tensors["encoder.llm_proj.bias"][3] = np.nan


def infinite_lora(tensors):
    key = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.lora_B.default.weight"))
    tensors[key][0, 0] = -np.inf


def head_differs_in_one_number(tensors):
    head = tensors["llm.base_model.model.lm_head.weight"].copy()
    head[160, 7] += 1
    tensors["llm.base_model.model.lm_head.weight"] = head


def endless_layers(tensors):
    tensors["encoder.out_attn.9999998.norm1.bias"] = np.zeros(64, np.float32)


def narrow_encoder(tensors):
    tensors["encoder.whisper.conv1.weight"] = np.zeros((96, 16, 3), np.float32)


def changed_config(field, value):
    def write(folder, tensors):
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (config["llm"] if field in config["llm"] else config)[field] = value
        (folder / "config.json").write_text(json.dumps(config))

    return write


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def pickle_with_code(folder, tensors):
    import torch

    torch.save(
        {"encoder.llm_proj.weight": torch.zeros(2), "code": Code(folder / "executed")},
        folder / "model.pt",
    )


def plain_pickle(folder, tensors):
    import pickle

    (folder / "model.pt").write_bytes(pickle.dumps({"code": Code(folder / "executed")}))


def truncated_pytorch_file(folder, tensors):
    import torch

    torch.save({key: torch.zeros(100) for key in tensors}, folder / "model.pt")
    data = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(data[: len(data) // 2])


def sparse_pytorch_file(folder, tensors):
    import torch

    state = {key: torch.zeros(value.shape) for key, value in tensors.items()}
    state["encoder.llm_proj.weight"] = state["encoder.llm_proj.weight"].to_sparse()
    torch.save(state, folder / "weights")


def training_checkpoint(folder, tensors):
    import torch

    torch.save({"epoch": 3, "model": {}}, folder / "model.pt")


def index_with_shard(name):
    def write(folder, tensors):
        save_file(tensors, folder / "model-00001-of-00002.safetensors")
        weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {
            "encoder.llm_proj.bias": name
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def duplicated(folder, tensors):
    save_file(tensors, folder / "model-00001-of-00002.safetensors")
    save_file(
        {"encoder.llm_proj.bias": tensors["encoder.llm_proj.bias"]},
        folder / "model-00002-of-00002.safetensors",
    )


CORRUPT = {
    "truncated file": (truncated, "model.safetensors: not a complete safetensors file"),
    "wrong dtype": (
        with_tensors(wrong_dtype),
        "tensor encoder.llm_proj.weight has dtype I32, expected one of F64, F32, F16, BF16",
    ),
    "missing layer": (
        with_tensors(missing_layer),
        "model.layers.1.input_layernorm.weight and 24 more",
    ),
    "missing last layer": (
        with_tensors(missing_last_encoder_layer),
        "the tensors have encoder_layers 1",
    ),
    "extra key": (
        with_tensors(extra_key),
        "unexpected tensor encoder.llm_proj.scale",
    ),
    "transposed matrix": (
        with_tensors(transposed),
        "tensor encoder.llm_proj.weight has shape (64, 32), expected (32, 64)",
    ),
    "untied head": (
        with_tensors(untied_head),
        "lm_head.weight differs from the embeddings",
    ),
    "untied head in one number": (
        with_tensors(head_differs_in_one_number),
        "lm_head.weight differs from the embeddings",
    ),
    "NaN": (with_tensors(not_a_number), "tensor encoder.llm_proj.bias contains NaN or infinite"),
    "infinity": (with_tensors(infinite_lora), "lora_B.default.weight contains NaN or infinite"),
    "endless layers": (with_tensors(endless_layers), "unexpected tensor encoder.out_attn.9999998"),
    "width of the encoder": (with_tensors(narrow_encoder), "encoder width 96 is not a multiple"),
    "sparse tensor": (sparse_pytorch_file, "tensor encoder.llm_proj.weight is sparse"),
    "alpha that is no number": (
        changed_config("lora", {"r": 4, "alpha": float("nan")}),
        "config.json: lora.alpha is NaN",
    ),
    "LoRA of text": (changed_config("lora", "yes"), 'config.json: lora is "yes"'),
    "unknown dtype": (changed_config("dtype", "float7"), 'config.json: dtype is "float7"'),
    "heads of text": (changed_config("encoder_heads", "2"), 'encoder_heads is "2"'),
    "heads that do not divide": (changed_config("encoder_heads", 3), "not divisible by its 3"),
    "endless layers in config.json": (
        changed_config("detail_recovery_layers", 10**7),
        "detail_recovery_layers",
    ),
    "vocabulary of null": (changed_config("vocab_size", None), "vocab_size is null"),
    "config.json of another encoder": (changed_config("encoder_layers", 3), "config.json has 3"),
    "config.json of another decoder": (
        changed_config("num_key_value_heads", 4),
        "k_proj.base_layer.weight has shape (32, 32)",
    ),
    "config.json of other stages": (
        changed_config("stage_tokens", [4, 4, 4]),
        "stage_tokens (4, 4, 5)",
    ),
    "pickle with code": (pickle_with_code, "contains code besides tensors"),
    "pickle that torch did not write": (plain_pickle, "contains code besides tensors"),
    "truncated PyTorch file": (truncated_pytorch_file, "model.pt: "),
    "not a state_dict": (training_checkpoint, "entry 'epoch' is of type int, expected a tensor"),
    "index with a missing shard": (
        index_with_shard("model-00002-of-00002.safetensors"),
        "shard model-00002-of-00002.safetensors is missing",
    ),
    "index with a path outside the folder": (
        index_with_shard("../secret.safetensors"),
        "shard '../secret.safetensors' is outside the folder",
    ),
    "index with an absolute path": (
        index_with_shard("/etc/passwd"),
        "shard '/etc/passwd' is outside the folder",
    ),
    "tensor in two files": (duplicated, "encoder.llm_proj.bias is in more than one file"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_files_are_rejected(name, convert, broken, tmp_path):
    write, message = CORRUPT[name]
    folder, tensors = broken
    write(folder, tensors)
    done = convert("import", f"--from={folder}", f"--out={tmp_path / 'in'}", fails=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]  # no partial output
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("alpha", ["nan", "inf", "-8"])
def test_alpha_is_a_number(alpha, convert, released, tmp_path):
    arguments = (f"--from={released}", f"--out={tmp_path / 'in'}", f"--lora_alpha={alpha}")
    done = convert("import", *arguments, fails=True)
    assert done.stderr.startswith(f"error: --lora_alpha={float(alpha)}: expected a finite number")


def test_a_pytorch_file_of_any_name_in_a_folder(convert, released, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = load_file(released / "model.safetensors")
    folder = tmp_path / "download"
    folder.mkdir()
    for name in ("config.json", "tokenizer"):
        (folder / name).symlink_to(released / name)
    state = {key: torch.from_numpy(value.astype(np.float32)) for key, value in tensors.items()}
    torch.save(state, folder / "stage3-epoch2.ckpt")
    done = convert("import", f"--from={folder}", f"--out={tmp_path / 'in'}")
    assert done.json["tensors"] == len(tensors)
