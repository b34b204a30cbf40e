"""The command: round trips, what an export says, what can't be exported, memory, and fine-tuning what was imported."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import llama_files
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from fot import checkpoint, cli, model, train, trained
from fot import config as config_lib
from fot.config import ExperimentConfig, ModelConfig
from fot.convert import __main__ as command
from fot.convert import export, hf_config, huggingface
from fot.data.tokenizer import file_tokenizer, trained_tokenizer
from fot.errors import ConfigError, ConversionError, UserError

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).parent / "data"


def convert(*words: str) -> None:
    """Runs the command line in this process; raises what it would print."""
    parsed = cli.parse(words, command.Flags, command.__doc__, command.load)
    command.main(parsed.config, parsed.flags)


def failure(capsys, *words: str) -> str:
    """Returns the one line of an error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run(command.main, command.Flags, command.__doc__, command.load, words)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {
        name: array
        for path in sorted(folder.glob("*.safetensors"))
        for name, array in safetensors.numpy.load_file(path).items()
    }


def values(folder: pathlib.Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def tokenizer() -> tokenizers.Tokenizer:
    """A byte-level tokenizer of 96 pieces, enough for printable ASCII."""
    pieces = ["<|endoftext|>", *(chr(c) for c in range(33, 127)), "Ġ"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    """llama/ and qwen2/ as transformers saves them, with files of a tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    for name in ("llama", "qwen2"):
        llama_files.saved(name, folder / name)
        tokenizer().save(str(folder / name / "tokenizer.json"))
        (folder / name / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5}')
    return folder


@pytest.mark.parametrize(("name", "shard"), [("llama", 10_000), ("qwen2", 10**9)])
def test_round_trip_through_a_workdir_is_bit_identical(name, shard, folders, tmp_path):
    source = folders / name
    convert("--from=hf", f"--source={source}", "--to=fot", f"--target={tmp_path}/run", "--memory_layers=1")
    convert(
        "--from=fot", f"--source={tmp_path}/run", "--to=hf", f"--target={tmp_path}/out", f"--max_shard_bytes={shard}"
    )
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for tensor in before:
        np.testing.assert_array_equal(before[tensor], after[tensor])
    assert all(path.stat().st_size < 2 * shard for path in (tmp_path / "out").glob("*.safetensors"))
    same = ["architectures", "model_type", "max_position_embeddings", "rope_parameters", "tie_word_embeddings", "dtype"]
    assert [values(source).get(each) for each in same] == [values(tmp_path / "out").get(each) for each in same]
    for file in ("tokenizer.json", "generation_config.json"):
        left, right = ((folder / file).read_text() for folder in (source, tmp_path / "out"))
        assert json.loads(left) == json.loads(right)


def test_an_export_needs_no_mesh_of_the_run(folders, tmp_path):
    config = huggingface.open_source(folders / "llama", 0).config
    config = dataclasses.replace(config, mesh=config_lib.MeshConfig(data=512, fsdp=3))
    params = llama_files.load(huggingface.open_source(folders / "llama", 0))
    with checkpoint.Checkpointer(tmp_path / "run" / "checkpoints", config.train) as checkpoints:
        checkpoints.save(3, {"params": params, "step": np.int32(3)}, {}, config)
    convert("--from=fot", f"--source={tmp_path}/run", "--to=hf", f"--target={tmp_path}/out")
    before, after = tensors(folders / "llama"), tensors(tmp_path / "out")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_tokenizer_that_a_run_trained_goes_with_its_export(folders, tmp_path):
    opened = huggingface.open_source(folders / "llama", 0)
    (tmp_path / "documents").mkdir()
    for number in range(8):
        (tmp_path / "documents" / f"{number}.txt").write_text(f"all the words of document {number}\n" * 20)
    data = config_lib.DataConfig(task=("files",), files=(f"{tmp_path}/documents/*",), cache_dir=f"{tmp_path}/cache")
    own = trained_tokenizer(data, ModelConfig())
    with checkpoint.Checkpointer(tmp_path / "run" / "checkpoints", opened.config.train) as checkpoints:
        run = dataclasses.replace(opened.config, data=data)
        checkpoints.save(3, {"params": llama_files.load(opened)}, {}, run)
    trained.keep_tokenizer(tmp_path / "run", own)
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "documents")
    convert("--from=fot", f"--source={tmp_path}/moved", "--to=hf", f"--target={tmp_path}/out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == own.trained
    again = file_tokenizer(trained.load_config(tmp_path / "moved").data, ModelConfig())
    assert again.key == own.key and again.decode(again.encode("the words")) == "the words"
    inherited = trained.inherit({"train": {"init_from": str(tmp_path / "moved")}})
    assert inherited["data"]["tokenizer_file"] == str(tmp_path / "moved" / "tokenizer" / "tokenizer.model")


@pytest.mark.parametrize("name", ["llama3", "linear", "wide_heads", "qwen2"])
def test_transformers_reads_an_export_as_the_same_model(name, tmp_path):
    made = llama_files.saved(name, tmp_path / "in")
    import transformers

    convert("--from=hf", f"--source={tmp_path}/in", "--to=hf", f"--target={tmp_path}/out", "--max_shard_bytes=20000")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    inputs = llama_files.tokens(2 * llama_files.CONTEXT)
    np.testing.assert_array_equal(*(llama_files.torch_logits(each, inputs) for each in (made, again)))


def test_mistral_comes_out_as_llama_and_dtypes_are_asked_for(tmp_path):
    llama_files.saved("mistral", tmp_path / "in")
    convert("--from=hf", f"--source={tmp_path}/in", "--to=hf", f"--target={tmp_path}/out", "--dtype=f16")
    assert (values(tmp_path / "out")["model_type"], values(tmp_path / "out")["dtype"]) == ("llama", "float16")
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert all(np.array_equal(before[name].astype(np.float16), after[name]) for name in before)


def test_longllama_says_what_it_is(folders, tmp_path):
    words = ["--memory_layers=0,2", "--last_context_length=24", "--mem_dtype=f32", "--context=16", "--dtype=bf16"]
    convert("--from=hf", f"--source={folders}/llama", "--to=longllama", f"--target={tmp_path}/out", *words)
    found = values(tmp_path / "out")
    assert found["model_type"] == "longllama"
    assert (found["mem_layers"], found["mem_positionals"], found["mem_dtype"]) == ([0, 2], True, "float32")
    assert (found["last_context_length"], found["max_position_embeddings"]) == (24, 16)
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 1e4
    assert found["auto_map"]["AutoConfig"] == "configuration_longllama.LongLlamaConfig"
    assert found["auto_map"]["AutoModelForCausalLM"] == "modeling_longllama.LongLlamaForCausalLM"
    code = {path.name for path in export.CODE.glob("*.py")} - {"__init__.py"}
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == code

    convert("--from=hf", f"--source={tmp_path}/out", "--to=fot", f"--target={tmp_path}/run")
    config = trained.load_config(str(tmp_path / "run"))
    assert (config.model.memory_layers, config.model.memory_positions, config.data.context) == ((0, 2), "zero", 16)
    convert("--from=fot", f"--source={tmp_path}/run", "--to=longllama", f"--target={tmp_path}/again")
    assert values(tmp_path / "again") == found


def test_the_released_longllama_is_imported(tmp_path):
    """Config and weights as the released code saves them: no count of key heads, no head_dim, rope_theta on its own."""
    released = json.loads((GOLDEN / "longllama_base_config.json").read_text())
    state = dict(np.load(GOLDEN / "longllama_state_dict.npz"))
    (tmp_path / "in").mkdir()
    changes = {"model_type": "longllama", "mem_layers": [1, 3], "mem_dtype": "float32"}
    (tmp_path / "in" / "config.json").write_text(json.dumps({**released, **changes}))
    safetensors.numpy.save_file(state, tmp_path / "in" / "model.safetensors")
    source = huggingface.open_source(tmp_path / "in", 0)
    assert (source.config.model.memory_layers, source.origin.last_context_length) == ((1, 3), 32)
    params = llama_files.load(source)
    np.testing.assert_array_equal(params["head"].T, state["lm_head.weight"])
    convert("--from=hf", f"--source={tmp_path}/in", "--to=longllama", f"--target={tmp_path}/out")
    again = tensors(tmp_path / "out")
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[name], state[name]) for name in state)


def test_easylm_takes_its_shape_from_a_config(tmp_path):
    made = llama_files.torch_model("code")
    llama_files.save_easylm(tmp_path / "streaming", llama_files.easylm_arrays(made))
    (tmp_path / "shape.json").write_text(
        json.dumps({**llama_files.SHAPE, "model_type": "llama", "num_key_value_heads": 4})
    )
    words = ["--from=easylm", f"--source={tmp_path}/streaming", "--to=hf"]
    convert(*words, f"--target={tmp_path}/out", f"--model_config={tmp_path}/shape.json")
    state = {name: value.detach().numpy() for name, value in made.state_dict().items()}
    found = tensors(tmp_path / "out")
    assert found.keys() == state.keys()
    assert all(np.array_equal(found[name], state[name]) for name in state)


def test_easylm_takes_its_shape_from_a_config_of_ours(tmp_path):
    made = llama_files.torch_model("code")
    llama_files.save_easylm(tmp_path / "streaming", llama_files.easylm_arrays(made))
    shape = dict(vocab_size=96, dim=32, mlp_dim=64, layers=3, heads=4, kv_heads=4, head_dim=8, memory_layers=(1,))
    lines = [
        f"    config.model.{name} = {value!r}"
        for name, value in {**shape, "rope_theta": 1e6, "norm_epsilon": 1e-5}.items()
    ]
    text = [
        "from configs import base",
        "def get_config():",
        "    config = base.longllama()",
        *lines,
        "    return config",
    ]
    (tmp_path / "config.py").write_text("\n".join(text))
    words = ["--from=easylm", f"--source={tmp_path}/streaming", f"--config={tmp_path}/config.py", "--to=fot"]
    convert(*words, f"--target={tmp_path}/run", "--context=16", "--config.mesh.tensor=2")
    config = trained.load_config(str(tmp_path / "run"))
    assert (config.model.memory_layers, config.model.rope_theta, config.data.context) == ((1,), 1e6, 16)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="float32"))
    params = trained.load(str(tmp_path / "run"), config).params
    inputs = llama_files.tokens(llama_files.CONTEXT)
    logits = llama_files.our_logits(params, config.model, inputs)
    np.testing.assert_allclose(logits, llama_files.torch_logits(made, inputs), atol=1e-4, rtol=0)


def test_wrong_flags_are_one_line(folders, tmp_path, capsys):
    llama, target = f"--source={folders}/llama", f"--target={tmp_path}/out"
    right = ["--from=hf", llama, "--to=fot", target]
    assert "--from is required" in failure(capsys, *right[1:])
    assert "--from=hg is not one of hf" in failure(capsys, "--from=hg", *right[1:])
    assert "--to=hff is not one of" in failure(capsys, *right, "--to=hff")
    assert "--dtype=f64 is not one of" in failure(capsys, *right, "--dtype=f64")
    assert "--dtype=bf16: a workdir holds float32" in failure(capsys, *right, "--dtype=bf16")
    assert "exists" in failure(capsys, *right[:3], f"--target={tmp_path}")
    assert "config.json" in failure(capsys, "--from=hf", f"--source={tmp_path}/none", "--to=fot", target)
    assert "no complete checkpoint" in failure(capsys, "--from=fot", f"--source={tmp_path}", "--to=hf", target)
    assert "--model_config is for --from=easylm" in failure(capsys, *right, "--model_config=x")
    assert "give --model_config=FILE" in failure(capsys, "--from=easylm", *right[1:])
    assert "layer 3 does not exist" in failure(capsys, *right, "--memory_layers=3")
    assert "model.rope_theta: 10000.0 → 20000.0" in failure(capsys, *right, "--config.model.rope_theta=2e4")
    assert "can't read --tokenizer" in failure(capsys, *right, f"--tokenizer={tmp_path}/none.model")
    assert list(tmp_path.iterdir()) == []


LLAMA = dict(mlp="swiglu", qk_norm=False, memory_positions="zero")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mlp": "gelu"}, "model.mlp=gelu"),
        ({"qk_norm": True}, "model.qk_norm=true"),
        ({"memory_gate": True}, "model.memory_gate=true"),
        ({"memory_positions": "none"}, "model.memory_positions=none"),
    ],
)
def test_what_llama_cannot_express_is_refused(changes, told):
    config = ModelConfig(**{**LLAMA, **changes})
    with pytest.raises(ConversionError, match=told):
        hf_config.write(config, hf_config.Origin("llama", 8), 8, "float32")


def test_memory_without_positions_is_longllamas_alone():
    config = ModelConfig(**{**LLAMA, "memory_positions": "none"})
    found = hf_config.write_longllama(config, hf_config.Origin("llama", 8), 8, "float32")
    assert found["mem_positionals"] is False
    plain = dataclasses.replace(config, memory_layers=())
    assert hf_config.write(plain, hf_config.Origin("llama", 8), 8, "float32")["model_type"] == "llama"


def test_an_export_that_fails_leaves_nothing(folders, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.safetensors_file, "write", fail)
    with pytest.raises(UserError, match="No space left"):
        convert("--from=hf", f"--source={folders}/llama", "--to=hf", f"--target={tmp_path}/out")
    assert list(tmp_path.iterdir()) == []


def test_fine_tuning_takes_the_shape_from_the_checkpoint(folders, tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"word{number} " * 40)
    convert("--from=hf", f"--source={folders}/llama", "--to=fot", f"--target={tmp_path}/imported")
    words = [
        f"--config={ROOT}/configs/finetune.py",
        f"--workdir={tmp_path}/tuned",
        f"--config.train.init_from={tmp_path}/imported",
        "--config.model.memory_layers=1",
        f"--config.data.files={tmp_path}/*.txt",
        f"--config.data.cache_dir={tmp_path}/cache",
        "--config.data.context=16",
        "--config.data.batch_size=8",
        "--config.data.min_document_tokens=8",
        "--config.model.compute_dtype=float32",
        "--config.train.steps=1",
        "--config.train.evaluate_every=0",
        "--config.model.remat=none",
        "--config.mesh.tensor=2",
    ]
    parsed = cli.parse(words, train.Flags, train.__doc__, complete=trained.inherit)
    stored = trained.load_config(str(tmp_path / "imported"))
    names = {line.split(":")[0] for line in config_lib.differences(stored, parsed.config) if line.startswith("model.")}
    assert names == {"model.memory_layers", "model.attention_block"}
    assert parsed.config.optimizer.learning_rate == 2e-5
    lines: list[str] = []
    train.train(parsed.config, tmp_path / "tuned", lines.append)
    assert any("beginning with the parameters of step 0" in line for line in lines)
    convert("--from=fot", f"--source={tmp_path}/tuned", "--to=longllama", f"--target={tmp_path}/out")
    assert values(tmp_path / "out")["mem_layers"] == [1]


def test_fine_tuning_without_a_checkpoint_says_what_to_give():
    with pytest.raises(ConfigError, match="--config.train.init_from"):
        cli.parse([f"--config={ROOT}/configs/finetune.py", "--workdir=x"], train.Flags, "", complete=trained.inherit)


MEASURE = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
from fot import sharding
from fot.config import MeshConfig
from fot.convert import huggingface, weights
mesh = sharding.make_mesh(MeshConfig(), jax.devices())
jax.block_until_ready(jax.device_put(np.ones(1000), jax.devices()[0]))
source = huggingface.open_source(__import__("pathlib").Path(sys.argv[1]), 0)
read = source.weights(source.config.model)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
params = weights.load(read, source.config.model, mesh)
jax.block_until_ready(params)
print(peak() - before, len(params))
"""


def test_import_takes_the_memory_of_the_model_and_one_tensor(tmp_path):
    """200 MB of parameters, of which the embedding, the largest tensor, is 67 MB; limit: once these, and 1.3 × that."""
    shape = dict(vocab_size=32768, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, head_dim=64)
    values = {**llama_files.SHAPE, **shape, "num_attention_heads": 8, "model_type": "llama"}
    values |= {"torch_dtype": "float32", "rope_theta": 1e4}
    config, origin = hf_config.read(values, "config.json", 0)
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    total = sum(leaf.size for leaf in jax.tree.leaves(abstract)) * 4
    largest = 32768 * 512 * 4
    assert 150e6 < total < 300e6
    opened = huggingface.Source(ExperimentConfig(), origin, {}, lambda _: None)
    zeros = {path: leaf for path, leaf in _leaves(abstract).items()}

    def read(path: str, layer: int) -> np.ndarray:
        shape = zeros[path].shape
        return np.ones(shape[1:] if path.startswith("layers/") else shape, np.float32)

    export.write(tmp_path / "in", opened, config, values | {"dtype": "float32"}, read, {}, 10**8)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "in")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    used = int(done.stdout.split()[0]) * 1024
    assert 0.8 * total < used < total + 1.3 * largest, f"{used / 1e6:.0f} MB for {total / 1e6:.0f} MB of parameters"


def _leaves(tree) -> dict:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
