"""Every config file is valid, and the full sizes have the paper's shapes and parameter counts."""

import gzip
import json
import math
import pathlib

import jax
import pytest

from fot import cli
from fot import config as config_lib
from fot.data import tasks

ROOT = pathlib.Path(__file__).parent.parent
# "finetune" leaves out what comes with a checkpoint; tests/test_convert.py trains with it.
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "finetune"))


def load(name: str) -> config_lib.ExperimentConfig:
    return config_lib.from_dict(cli.load_file(str(ROOT / "configs" / f"{name}.py")))


# FoT, section 4: name -> (layers, memory layers, dim, heads, head dim, mlp dim, vocabulary, context, loss tokens of a
# batch, parameters, of which outside embedding and head).
SIZES = {
    "37m": (12, (8,), 512, 8, 64, 2048, 64, 256, 32_768, 37_794_400, 37_761_632),
    "184m": (12, (8,), 1024, 8, 128, 4096, 32_000, 512, 32_768, 183_788_640, 151_020_640),
    "600m": (12, (8,), 2048, 16, 128, 8192, 64_000, 2048, 262_144, 735_103_168, 604_031_168),
    "1_2b": (12, (8,), 2048, 32, 128, 16384, 64_000, 2048, 262_144, 1_339_083_136, 1_208_011_136),
    "longllama_3b": (26, (6, 12, 18), 3200, 32, 100, 8640, 32_000, 2048, 262_144, 3_426_473_600, 3_221_673_600),
    "longllama_7b": (32, (8, 16, 24), 4096, 32, 128, 11008, 32_000, 2048, 262_144, 6_738_415_616, 6_476_271_616),
    "longllama_code_7b": (32, (8, 16, 24), 4096, 32, 128, 11008, 32_016, 4096, 262_144, 6_738_546_688, 6_476_271_616),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_a_valid_config(name):
    config = load(name)
    assert config_lib.from_dict(config_lib.to_dict(config)) == config


def test_base_is_the_defaults():
    assert load("base") == config_lib.ExperimentConfig()


def test_every_size_of_the_paper_is_there():
    assert set(SIZES) <= set(NAMES)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_papers(name):
    layers, memory_layers, dim, heads, head_dim, mlp_dim, vocabulary, context, tokens, _, _ = SIZES[name]
    config = load(name)
    model, rows = config.model, config.data.batch_size
    assert (model.layers, model.memory_layers, model.dim, model.heads) == (layers, memory_layers, dim, heads)
    assert (model.head_dim, model.mlp_dim, model.vocab_size) == (head_dim, mlp_dim, vocabulary)
    assert config.data.context == context
    if config.crossbatch.loss_rows == "last":
        rows //= config.crossbatch.packing
    assert rows * context == tokens


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_full_sizes(name):
    from fot import model as model_lib

    layers, _, dim, heads, head_dim, mlp_dim, vocabulary, _, _, count, count_inside = SIZES[name]
    config = load(name).model
    params = jax.eval_shape(lambda key: model_lib.init(key, config), jax.random.key(0))
    expected = {
        "embedding": (vocabulary, dim),
        "final_norm": (dim,),
        "layers/attention_norm": (layers, dim),
        "layers/mlp_norm": (layers, dim),
        "layers/attention/query": (layers, dim, heads, head_dim),
        "layers/attention/key": (layers, dim, heads, head_dim),
        "layers/attention/value": (layers, dim, heads, head_dim),
        "layers/attention/output": (layers, heads, head_dim, dim),
        "layers/mlp/up": (layers, dim, mlp_dim),
        "layers/mlp/down": (layers, mlp_dim, dim),
    }
    if name.startswith("longllama"):
        expected |= {"head": (dim, vocabulary), "layers/mlp/gate": (layers, dim, mlp_dim)}
    else:
        expected |= {"layers/attention/temperature": (layers, heads)}
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert shapes == expected
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    assert sum(math.prod(shape) for path, shape in shapes.items() if path not in ("embedding", "head")) == count_inside
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(params))


def test_mixture_has_the_papers_sources():
    # FoT, section 5: name -> (sampling %, shortest document in tokens).
    paper = {
        "arxiv": (25, 0),
        "python": (25, 4096),
        "book": (10, 0),
        "common_crawl": (29, 0),
        "c4": (5, 1024),
        "github": (2, 2048),
        "stackexchange": (2, 1024),
        "wikipedia": (2, 1024),
    }
    sources = load("longllama_mixture").data.sources
    assert [(source.weight, source.min_document_tokens) for source in sources] == list(paper.values())
    assert all(name in source.files for name, source in zip(paper, sources, strict=True))
    assert sum(source.weight for source in sources) == 100
    assert {source.field for source in sources} == {"text"}


def test_mixture_reads_files_in_redpajamas_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("arxiv/a.jsonl", "book/book.jsonl", "common_crawl/2023-06/en.jsonl.gz", "c4/c4-train.jsonl"):
        path = tmp_path / "redpajama" / name
        path.parent.mkdir(parents=True)
        lines = "".join(json.dumps({"text": f"{name} {i}", "meta": {"url": ""}}) + "\n" for i in range(100))
        path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    for name in [f"{i}/{j}.py" for i in range(100) for j in range(2)]:
        (tmp_path / "the_stack" / "python" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "the_stack" / "python" / name).write_text(name)
    data = load("longllama_mixture").data
    for source in data.sources[:5]:
        documents = [each for split in tasks.SPLITS for each in tasks.documents(source, data, split)]
        assert len({document.name for document in documents}) == 100
