"""What tests of generated documents share: hosts that read their rows of a batch, each its own."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot.config import ExperimentConfig
from fot.data import corpus, loader, rows


def check_that_hosts_read_alike(config: ExperimentConfig, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that 2 and 4 hosts read, of batches of `count` rows, what one host does, after an interruption too."""
    documents = corpus.load(config, "train").corpus
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows"))

    def read(mine, position, steps):
        monkeypatch.setattr(loader, "host_rows", lambda config, sharding: mine)
        monkeypatch.setattr(loader, "global_batch", lambda batch, sharding, rows: batch)
        with loader.Loader(documents, config, position, sharding, 2) as batches:
            return [next(batches) for _ in range(steps)]

    whole = read(list(range(count)), rows.start(config), 4)
    for hosts in (2, 4):
        for host in range(hosts):
            mine = list(range(host * count // hosts, (host + 1) * count // hosts))
            parts = read(mine, rows.start(config), 2)
            parts += read(mine, rows.position_from_dict(parts[-1].position.to_dict()), 2)
            for one, all_rows in zip(parts, whole, strict=True):
                assert one.position == all_rows.position
                for left, right in zip(one.batch, all_rows.batch, strict=True):
                    np.testing.assert_array_equal(left, right[mine])
