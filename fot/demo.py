"""The main job in small: trains a Focused Transformer and a plain one, and shows what the longer context is worth.

  python -m fot.demo --config=configs/demo.py --workdir=runs/demo

Both models have the same size and see the same tokens; the plain one is trained without crossbatch. Both are evaluated
on held-out documents with memories of growing length. The same command again goes on where it stopped; exit codes are
those of fot.train.
"""

import dataclasses
import pathlib

import jax

from fot import bucket, cli, files, sharding, train
from fot.config import ExperimentConfig, to_dict
from fot.data import corpus
from fot.evaluate import perplexity
from fot.evaluate import perplexity_report as report
from fot.termination import Termination


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
      workdir: folder that receives a run for each model, with its figures, and the plot of both.
    """

    workdir: str


def plain(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the config of the plain transformer: same model, same batches, no crossbatch."""
    return dataclasses.replace(config, crossbatch=dataclasses.replace(config.crossbatch, variant="none"))


def main(config: ExperimentConfig, command: Flags) -> None:
    """Trains both models, evaluates them side by side, prints the tables and says where everything is."""
    workdir = bucket.folder("workdir", command.workdir)
    with files.hold(workdir), Termination() as termination:
        _compare(config, workdir, termination)


def _compare(config: ExperimentConfig, workdir: pathlib.Path, termination: Termination) -> None:
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    documents = corpus.load(config, "held_out").corpus
    results = {}
    for label, each in (("Focused Transformer", config), ("plain transformer", plain(config))):
        run = workdir / label.split()[0].lower()
        _say(f"{label}: training in {run}")
        state = train.train(each, run, _say, termination)
        _say(f"{label}: evaluating on {len(documents)} held-out documents")
        results[label] = perplexity.evaluate(state.params, each, documents, mesh, _say)
        about = {"workdir": str(run), "step": int(state.step), "split": "held_out", "config": to_dict(each)}
        report.save(results[label], about, run)
    for label, each in results.items():
        _say(f"\n{label}\n{report.table(each)}")
    _say(f"\nFocused Transformer by position\n{report.position_table(results['Focused Transformer'])}")
    report.plot(results, workdir / report.PLOT_FILE)
    _say(f"\nplot: {workdir / report.PLOT_FILE}; figures and checkpoints: {workdir}/focused and {workdir}/plain")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    cli.run(main, Flags, usage=__doc__)
