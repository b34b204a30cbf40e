"""Compiling for topologies: the reports, the search, the command; by the TPU's own compiler where libtpu is."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from fot import cli, sharding, train_step
from fot.compile import __main__ as command
from fot.compile import generations, report, search, table
from fot.compile.__main__ import Flags
from fot.compile.report import Report
from fot.config import CrossbatchConfig, DataConfig, ExperimentConfig, MeshConfig, ModelConfig, accelerators
from fot.config.accelerators import GENERATIONS, GIB
from fot.errors import ConfigError, UserError

FULL = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the temporaries (94.19G) exceed available HBM (30.75G)."
libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra `tpu`")


SMALL = ExperimentConfig(
    model=ModelConfig(layers=2, memory_layers=(1,), dim=32, head_dim=8, mlp_dim=64, attention_block=16),
    data=DataConfig(tokenizer="bytes", context=16, min_document_tokens=(32,)),
    mesh=MeshConfig(fsdp=4, tensor=2),
)


def of_mesh(**axes: int) -> ExperimentConfig:
    return dataclasses.replace(SMALL, mesh=MeshConfig(**axes))


@pytest.fixture
def cpus_for_tpus(monkeypatch):
    """Topologies have the 8 CPU devices, and their compiler compiles."""
    monkeypatch.setattr(generations, "devices", lambda topology, slices=1: jax.devices())


@pytest.fixture(scope="module")
def fitting() -> Report:
    """A report of a step really compiled, for CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generations, "devices", lambda topology, slices=1: jax.devices())
        return report.examine(SMALL, "v4:2x2x1", 2, 0.0)


@pytest.fixture
def too_large(monkeypatch, cpus_for_tpus, fitting):
    """Steps of less than 2 microbatches don't fit; gives the configs that were examined."""
    examined = []

    def examine(config, topology, d, effort, slices):
        examined.append(config)
        count = config.train.accumulation
        full = {} if count > 1 else {"fits": False, "program": None, "needed": report.exhausted(FULL), "compiler": FULL}
        return dataclasses.replace(fitting, accumulation=count, topology=topology, **full)

    monkeypatch.setattr(report, "examine", examine)
    return examined


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v4p:2x2x1", "unknown generation 'v4p'; did you mean 'v4'"),
        ("gpu:8", "unknown generation 'gpu'; choose from v2, v3"),
        ("v4:4x4", "chips of v4 come in shapes up to 16x16x16, such as 'v4:4x4x4'"),
        ("v4", "such as 'v4:2x2x1'"),
        ("v5e:500x2", "up to 16x16, such as"),
        ("v5e:0x2", "up to 16x16, such as"),
        ("v6e:a", "up to 16x16, such as 'v6e:2x2'"),
    ],
)
def test_topologies_that_do_not_exist_are_named_with_the_nearest(topology, message):
    with pytest.raises(UserError, match=message):
        accelerators.check(topology)


def test_the_topologies_of_all_exist():
    for topology in accelerators.TOPOLOGIES:
        assert accelerators.check(topology) in GENERATIONS.values()


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu, is not installed: pip install .*'\.\[tpu\]'"):
        generations.devices("v4:2x2x1")


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (FULL, int(94.19 * GIB)),
        ("Ran out of memory in memory space hbm. Used 16.29G of 15.75G hbm.", int(16.29 * GIB)),
        ("Used 512.00M of", 512 * 2**20),
        ("nothing said", 0),
    ],
)
def test_the_size_that_did_not_fit_is_the_compilers(message, size):
    assert report.exhausted(message) == size


def test_a_report_of_a_compiled_step(fitting):
    done = fitting
    assert done.fits and done.compiler == "" and done.usable == int(30.75 * GIB)
    assert (done.devices, done.mesh["fsdp"], done.mesh["tensor"]) == (8, 4, 2)
    memory, bound = done.program.memory, done.program.bound
    assert memory.live == memory.arguments + memory.outputs - memory.aliased + memory.temporaries
    assert done.needed == memory.live + memory.code
    assert memory.aliased > 0
    assert done.model_flops == train_step.step_flops(SMALL, 2)
    assert bound.compute == done.model_flops / 8 / GENERATIONS["v4"].peak
    assert bound.step == max(bound.compute, bound.hbm, bound.interconnect) > 0
    axes = {axis for each in done.program.collectives for axis in each.axes.split(" × ")}
    assert axes <= {"fsdp", "tensor", "none"} and {"fsdp", "tensor"} <= axes
    assert "fits: 0.00 GiB of 30.75 a device" in table.full(done)


def test_a_step_that_does_not_fit_is_a_report(monkeypatch, cpus_for_tpus):
    class Full:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(FULL)

    monkeypatch.setattr(train_step, "lower_step", lambda config, mesh, d: Full())
    done = report.examine(SMALL, "v4:2x2x1", 2, 0.0)
    assert not done.fits and done.program is None and done.needed == int(94.19 * GIB)
    assert "does not fit: Ran out of memory on HBM, the temporaries (94.19G)" in table.full(done)


def test_a_step_that_compiled_to_more_than_there_is_does_not_fit(monkeypatch, cpus_for_tpus, fitting):
    class Compiled:
        def compile(self, compiler_options):
            return self

    memory = dataclasses.replace(fitting.program.memory, live=40 * GIB, code=0)
    monkeypatch.setattr(train_step, "lower_step", lambda config, mesh, d: Compiled())
    monkeypatch.setattr(report, "read", lambda *_: dataclasses.replace(fitting.program, memory=memory))
    done = report.examine(SMALL, "v4:2x2x1", 2, 0.0)
    assert not done.fits and done.program is not None
    assert "does not fit: 40.00 GiB of 30.75 a device, 9.25 too many" in table.full(done)


def test_candidates_divide_the_devices_and_begin_near_the_config():
    config = of_mesh(data=2, fsdp=2, tensor=2)
    found = search.candidates(config, 8, 1)
    shapes = []
    for candidate in found:
        mesh = sharding.make_mesh(candidate.mesh, jax.devices())
        sharding.check_mesh(mesh, candidate)
        assert candidate.data == config.data and candidate.crossbatch == config.crossbatch
        shapes.append((mesh.shape_tuple, candidate.model.remat, candidate.train.accumulation))
    assert len(set(shapes)) == len(shapes)
    own = dict(data=2, fsdp=2, tensor=2, sequence=1)
    assert (tuple(own.items()), config.model.remat, 1) not in shapes
    first = [dict(mesh) for mesh, remat, factor in shapes[:8] if (remat, factor) == (config.model.remat, 1)]
    assert own | dict(data=4, tensor=1) in first and own | dict(data=1, fsdp=4) in first
    assert own | dict(data=1, tensor=4) in first


def test_a_mesh_that_splits_rows_too_often_gets_tensor():
    config = dataclasses.replace(of_mesh(data=-1, fsdp=4), data=dataclasses.replace(SMALL.data, batch_size=4))
    near = search.candidates(config, 8, 1)[0]
    assert near.mesh == MeshConfig(data=-1, fsdp=4, tensor=2) and near.train == config.train


def test_candidates_that_can_not_be_enough_are_left_out():
    for candidate in search.candidates(SMALL, 8, 3.1):
        sizes = sharding.make_mesh(candidate.mesh, jax.devices()).shape
        factor = candidate.train.accumulation * max(sizes["tensor"] / 2, 1) * max(sizes["fsdp"] / 4, 1)
        assert factor >= 3.1 or candidate.model.remat != SMALL.model.remat


class TestCommand:
    def run(self, config, **flags) -> int:
        return cli.exit_code(lambda: command.main(config, Flags(**flags)))

    def test_writes_and_prints_what_it_found(self, cpus_for_tpus, fitting, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(report, "examine", lambda *_, **__: fitting)
        output = tmp_path / "reports.json"
        assert self.run(SMALL, topology="v4:2x2x1", output=str(output)) == 0
        (row,) = json.loads(output.read_text())
        memory = row["report"]["program"]["memory"]
        assert memory["live"] + memory["code"] == row["report"]["needed"] > 0
        assert row["tried"] == [] and row["suggested"] is None and row["reason"] == ""
        printed = capsys.readouterr().out
        for part in (
            "v4:2x2x1: 8 devices, mesh fsdp=4 tensor=2",
            "HBM of a device",
            "roofline bound",
            "not a measurement",
        ):
            assert part in printed

    def test_suggests_what_fits(self, too_large, tmp_path, capsys):
        output = tmp_path / "reports.json"
        assert self.run(SMALL, topology="v4:2x2x1", tries=20, output=str(output)) == 0
        printed = capsys.readouterr().out
        assert "does not fit" in printed and "suggested: --config.mesh.data=" in printed
        assert too_large[-1].train.accumulation == 2
        (row,) = json.loads(output.read_text())
        assert (row["report"]["fits"], row["suggested"]["fits"]) == (False, True)
        assert row["suggested"]["accumulation"] == 2 and len(row["tried"]) == len(too_large) - 1

    def test_says_when_nothing_fits(self, too_large, capsys):
        assert self.run(SMALL, topology="v4:2x2x1", tries=1) == 0
        assert "nothing better was found" in capsys.readouterr().out

    def test_a_mesh_that_does_not_divide_is_one_line_with_another(self, cpus_for_tpus, capsys):
        assert self.run(of_mesh(fsdp=3), topology="v4:2x2x1") == 2
        error = capsys.readouterr().err
        assert "mesh.fsdp=3" in error and "does not fit 8 devices" in error and error.count("\n") == 1
        assert "--config.mesh.tensor=" in error

    def test_all_has_a_table_and_goes_on_after_a_mesh_that_does_not_divide(
        self, cpus_for_tpus, fitting, monkeypatch, capsys
    ):
        def examine(config, topology, d, effort, slices):
            if topology == "v3:8x8":
                raise ConfigError("rows can't be split")
            return dataclasses.replace(fitting, topology=topology)

        monkeypatch.setattr(report, "examine", examine)
        assert self.run(SMALL, topology="all", tries=0) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.startswith("v")][-1] == "v3:8x8:"
        assert sum(line.split()[4:5] == ["yes"] for line in lines) == len(accelerators.TOPOLOGIES) - 1

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"topology": "v5:8x8"}, "unknown generation 'v5'"),
            ({"topology": "v4:2x2x1", "d": 3}, "--d=3 is not among crossbatch.d"),
            ({"topology": "v4:2x2x1", "effort": 2.0}, "--effort=2.0 must be from -1 to 1"),
        ],
    )
    def test_errors_are_one_line(self, flags, message, capsys):
        assert self.run(SMALL, **flags) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@libtpu
def test_the_tpus_compiler_compiles_a_step():
    done = report.examine(of_mesh(fsdp=2, tensor=2), "v4:2x2x1", 2, -1.0)
    assert done.fits and done.devices == 4
    assert done.program.estimate.cycles > 0 and done.program.estimate.unknown_loops == 0
    assert {"fsdp", "tensor"} <= {axis for each in done.program.collectives for axis in each.axes.split(" × ")}


@libtpu
def test_what_is_sent_between_slices_is_told_and_kept_out_of_the_bound():
    def examined(groups: int) -> report.Report:
        config = of_mesh(data=2, fsdp=2, tensor=2)
        config = dataclasses.replace(config, crossbatch=CrossbatchConfig(d=(2,), groups=groups))
        return report.examine(config, "v4:2x2x1", 2, -1.0, slices=2)

    def outside(done: report.Report, kind: str) -> list[report.Moved]:
        return [each for each in done.program.collectives if (each.axes, each.kind) == (report.OUTSIDE, kind)]

    done = examined(groups=1)
    assert (done.slices, done.devices) == (2, 8) and "2 × v4:2x2x1: 8 devices" in table.full(done)
    inside = sum(each.bytes for each in done.program.collectives if each.axes != report.OUTSIDE)
    assert done.program.bound.interconnect == inside / GENERATIONS["v4"].interconnect > 0
    params = jax.tree.leaves(jax.eval_shape(lambda: train_step.init_state(SMALL)).params)
    (gradients,) = outside(done, "all-reduce")
    assert gradients.bytes >= sum(4 * x.size for x in params) / 4  # float32, of which a device has a fourth
    assert outside(done, "ppermute") and not outside(examined(groups=2), "ppermute")


@libtpu
def test_groups_of_a_device_send_no_more_for_more_contexts():
    def sent(d: int) -> list[tuple[str, str, int]]:
        crossbatch = CrossbatchConfig(d=(d,), groups=2)
        config = dataclasses.replace(of_mesh(fsdp=2, tensor=2), crossbatch=crossbatch)
        moved = report.examine(config, "v4:2x2x1", d, -1.0).program.collectives
        return [(each.kind, each.axes, each.bytes) for each in moved]

    assert sent(1) == sent(2)


@libtpu
def test_what_the_tpus_compiler_refuses_is_a_report():
    model = dataclasses.replace(SMALL.model, vocab_size=2**28)
    done = report.examine(dataclasses.replace(of_mesh(), model=model), "v5e:2x2", 2, -1.0)
    assert not done.fits and done.needed > done.usable and "Ran out of memory" in done.compiler


@libtpu
def test_a_topology_that_the_compiler_refuses_is_one_line():
    with pytest.raises(UserError, match=r"topology 'v4:3x3x3': .* try 'v4:2x2x1'"):
        generations.devices("v4:3x3x3")
