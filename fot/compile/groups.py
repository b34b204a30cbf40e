"""Which devices a collective lets exchange with each other, and along which axes of a mesh."""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

Groups = tuple[tuple[int, ...], ...]


def groups(attributes: str, devices: int) -> Groups:
    """Returns who exchanges with whom, from any of the ways in which the text says it.

    `{{0,1},{2,3}}`; `{}` for all; `[2,2]<=[4]` and `[2,2]<=[2,2]T(1,0)`, counting on reshaped and transposed;
    `mesh['a'=2,'b'=2] {'b'}`, along the axes of a mesh; or a permute's pairs of source and target.

    Args:
      attributes: of the instruction.
      devices: of the program.

    Raises:
      ValueError: a form that isn't among these.
    """
    text = re.search(r"(?:replica_groups|source_target_pairs)=(.*)", attributes)
    if text is None or text[1].startswith("{}"):
        return (tuple(range(devices)),)
    if listed := re.match(r"\{(\{[\d,]*\}(?:,\s*\{[\d,]*\})*)\}", text[1]):
        found = re.findall(r"\{([\d,]*)\}", listed[1])
        return tuple(tuple(map(int, filter(None, group.split(",")))) for group in found)
    if counted := re.match(r"\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text[1]):
        return _tuples(_counted(counted[3]).reshape(int(counted[1]), int(counted[2])))
    if mesh := re.match(r"mesh\[([^\]]*)\](?:,? ?device_ids=\(?([^)]*\)?)\)?)?\s*\{([^}]*)\}", text[1]):
        return _along_mesh(mesh[1], mesh[2], mesh[3])
    raise ValueError(f"replica groups of an unknown form: {text[1][:80]}")


def _counted(text: str) -> np.ndarray:
    """Returns the numbers of `[2,4]` or `[2,4]T(1,0)`, flattened."""
    dims, permutation = (
        list(map(int, re.findall(r"\d+", part))) for part in (text.split("T")[0], text.partition("T")[2])
    )
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return (numbers.transpose(permutation) if permutation else numbers).reshape(-1)


def _along_mesh(axes: str, ids: str | None, wanted: str) -> Groups:
    """Returns the groups along some axes, or parts of axes `'a':(4)2`: after the first 4 parts of it, 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    shape, chosen = [], []
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", wanted)
    for name, size in sizes.items():
        # An axis falls into what is before, in and after each part.
        cuts = {1, size}
        mine = [(int(before or 1), int(count or size)) for other, before, count in parts if other == name]
        for before, count in mine:
            cuts |= {before, before * count}
        for low, high in itertools.pairwise(sorted(cuts)):
            if any(before <= low and high <= before * count for before, count in mine):
                chosen.append(len(shape))
            shape.append(high // low)
    numbers = _counted(ids) if ids else np.arange(math.prod(shape))
    others = [axis for axis in range(len(shape)) if axis not in chosen]
    count = math.prod(shape[axis] for axis in chosen)
    return _tuples(numbers.reshape(shape).transpose([*others, *chosen]).reshape(-1, count))


def _tuples(numbers: np.ndarray) -> Groups:
    return tuple(tuple(map(int, row)) for row in numbers)


def mesh_axes(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes of a mesh along which devices of one group differ, in the mesh's order.

    Args:
      groups: devices numbered as in the flattened mesh.
      mesh: size of each axis.
    """
    differ = np.zeros(len(mesh), bool)
    for group in groups:
        places = np.array(np.unravel_index(np.array(group, int), tuple(mesh.values())))
        if places.shape[1] > 1:
            differ |= (places != places[:, :1]).any(1)
    return tuple(axis for axis, seen in zip(mesh, differ, strict=True) if seen)
