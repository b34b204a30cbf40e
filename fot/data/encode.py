"""Texts to tokens: in this process or in several, in the order of the documents, in bounded memory."""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from fot.config import DataConfig, ExperimentConfig, ModelConfig
from fot.data import tasks, tokenizer
from fot.errors import DataError

CHUNK_DOCUMENTS = 64  # a chunk is what a process gets at once, and what one update of the progress bar counts
CHUNK_CHARACTERS = 1_000_000
CHUNKS_AHEAD = 3  # chunks under way or waiting, for each process


class Encoded(NamedTuple):
    """A document's name and its tokens, `<bos> tokens <eos>`, int32."""

    name: str
    tokens: np.ndarray


def encoded(
    documents: Iterable[tasks.Document], encoder: tokenizer.Tokenizer, config: ExperimentConfig
) -> Iterator[list[Encoded]]:
    """Yields the tokens of documents, some at a time, in their order, by this process or `data.workers` others.

    Raises:
      DataError: a process was killed.
    """
    chunks = _chunks(documents)
    if config.data.workers == 1:
        for chunk in chunks:
            yield _encode(chunk, encoder)
        return
    # Not forked: this process may have started jax, whose threads don't survive it.
    with concurrent.futures.ProcessPoolExecutor(
        config.data.workers, multiprocessing.get_context("spawn"), _start_worker, (config.data, config.model)
    ) as workers:
        waiting = collections.deque()
        try:
            for chunk in chunks:
                waiting.append(workers.submit(_encode_in_worker, chunk))
                if len(waiting) >= CHUNKS_AHEAD * config.data.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process that tokenizes was killed, perhaps for want of memory: lower data.workers"
            ) from None
        finally:
            workers.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[tasks.Document]) -> Iterator[list[tasks.Document]]:
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if len(chunk) == CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode(chunk: list[tasks.Document], encoder: tokenizer.Tokenizer) -> list[Encoded]:
    ids = encoder.encode_batch([document.text for document in chunk])
    return [
        Encoded(document.name, np.concatenate([[encoder.bos], tokens, [encoder.eos]], dtype=np.int32))
        for document, tokens in zip(chunk, ids, strict=True)
    ]


_worker: list[tokenizer.Tokenizer] = []  # a worker's tokenizer, loaded once: it can't be sent to another process


def _start_worker(data: DataConfig, model: ModelConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the process that waits for the tokens sees to it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.append(tokenizer.load(data, model))


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, by SIGKILL too."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(chunk: list[tasks.Document]) -> list[Encoded]:
    return _encode(chunk, _worker[0])
