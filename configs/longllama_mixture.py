"""LongLLaMA 3B on its mixture: RedPajama as JSONL, and The Stack's Python as files (FoT, section 5).

Expects `redpajama/` as published (JSONL with a field "text") and `the_stack/python/` in the current folder. `mixture`
sets the same sources for another model.
"""

import ml_collections

from configs import longllama_3b

# Source -> (task, files, sampling %, shortest document in tokens).
SOURCES = {
    "arxiv": ("files", "redpajama/arxiv/**/*.jsonl*", 25.0, 0),
    "python": ("directories", "the_stack/python/**/*.py", 25.0, 4096),
    "book": ("files", "redpajama/book/**/*.jsonl*", 10.0, 0),
    "common_crawl": ("files", "redpajama/common_crawl/**/*.jsonl*", 29.0, 0),
    "c4": ("files", "redpajama/c4/**/*.jsonl*", 5.0, 1024),
    "github": ("files", "redpajama/github/**/*.jsonl*", 2.0, 2048),
    "stackexchange": ("files", "redpajama/stackexchange/**/*.jsonl*", 2.0, 1024),
    "wikipedia": ("files", "redpajama/wikipedia/**/*.jsonl*", 2.0, 1024),
}


def get_config() -> ml_collections.ConfigDict:
    config = longllama_3b.get_config()
    mixture(config)
    return config


def mixture(config: ml_collections.ConfigDict) -> None:
    """Sets the sources, their shares of the tokens, and their shortest documents."""
    data = config.data
    data.task, data.files, data.weights, data.min_document_tokens = zip(*SOURCES.values(), strict=True)
    data.field = ("text",)
    data.weight_unit = "tokens"
