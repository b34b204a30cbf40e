"""Runs one evaluation of a trained model.

python -m fot.evaluate NAME --workdir=DIR
python -m fot.evaluate NAME --help
"""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from fot import cli, trained
from fot.config.checks import nearest
from fot.errors import UserError
from fot.evaluate import dictionary, distraction, passkey, perplexity, retrieval

# Each module has `Flags`, `workdir` among them, and `main(config, flags)`, as `fot.cli.run` takes them.
EVALUATIONS: dict[str, ModuleType] = {
    "perplexity": perplexity,
    "dictionary": dictionary,
    "passkey": passkey,
    "distraction": distraction,
    "retrieval": retrieval,
}


def main(argv: Sequence[str]) -> NoReturn:
    """Runs the evaluation that the first argument names, with the flags after it, and exits."""
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        sys.exit(cli.exit_code(lambda: print(usage())))
    if name not in EVALUATIONS:
        sys.exit(cli.exit_code(lambda: unknown(name)))
    module = EVALUATIONS[name]
    cli.run(module.main, module.Flags, module.__doc__, trained.config_named, rest)


def usage() -> str:
    """Returns the text of `--help`: the evaluations, a line each."""
    width = max(map(len, EVALUATIONS))
    lines = [f"  {name:{width}}  {(module.__doc__ or '').splitlines()[0]}" for name, module in EVALUATIONS.items()]
    return "\n".join([(__doc__ or "").rstrip(), "", "Evaluations:", *lines])


def unknown(name: str) -> NoReturn:
    """Raises UserError for a first argument that names no evaluation."""
    known = ", ".join(EVALUATIONS)
    if not name or name.startswith("-"):
        raise UserError(f"the first argument must name an evaluation: {known}")
    raise UserError(f"unknown evaluation {name!r}{nearest(name, EVALUATIONS) or f'; choose from {known}'}")


if __name__ == "__main__":
    main(sys.argv[1:])
