"""The trials of a sweep, kept by Optuna: made once, claimed by one process at a time, finished once.

A trial is an Optuna trial with two attributes, its id and its overrides. Whoever holds the claim on an id, and finds
the trial not finished, is the only one to run it; a trial that is RUNNING without a claim was a dead process's.
"""

import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, final

from fot import bucket, metrics
from launch import points, storage
from launch.claims import Claims, FolderClaims, ServerClaims, waited
from launch.space import Adaptive, Sweep

ASKS = 50  # suggestions in a row that are known already, until the search counts as over
_MAKING = "making"  # the claim of who adds trials


class Trial(NamedTuple):
    """A trial as the storage has it.

    Attributes:
      number: Optuna's.
      id: of the trial.
      overrides: {field: text} of the fields that differ between trials.
      state: WAITING, RUNNING, COMPLETE, PRUNED or FAIL.
      value: the metric at its end, None without.
      curve: {step: metric} so far.
      why: it failed; "" if it didn't.
      params: {field: value} as Optuna has them.
    """

    number: int
    id: str
    overrides: dict[str, str]
    state: str
    value: float | None
    curve: dict[int, float]
    why: str
    params: dict[str, Any]

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in ("COMPLETE", "PRUNED", "FAIL")


@final
class Trials:
    """The trials of one sweep; a context manager, at whose end no claim is held."""

    def __init__(self, sweep: Sweep, fixed: points.Texts, name: str, workdir: pathlib.Path, url: str):
        """Opens the storage, or makes it, with the trials that are known beforehand.

        Args:
          sweep: checked.
          fixed: overrides that all trials share.
          name: of the study.
          workdir: of the sweep; has the storage if there is no URL.
          url: postgresql+psycopg://…, or "" for a file.

        Raises:
          UserError: Optuna is missing, or the storage can't be used.
        """
        self._optuna = optuna = storage.library()
        self._sweep, self._fixed, self._exhausted = sweep, fixed, False
        self._claims: Claims = ServerClaims(storage.server(url), name) if url else FolderClaims(workdir / "claims")
        with storage.told(), waited(self._claims, _MAKING):
            self._storage = storage.opened(optuna, workdir, url)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction=sweep.goal,
                pruner=storage.pruner_of(optuna, sweep.pruner),
                load_if_exists=True,
            )
            self._study_id = self._storage.get_study_id_from_name(name)
            self._enqueue()

    @staticmethod
    def read(name: str, workdir: pathlib.Path, url: str) -> list[Trial]:
        """Returns the trials of a study, which nobody needs to hold; raises UserError as the constructor does."""
        optuna = storage.library()
        with storage.told():
            opened = storage.opened(optuna, workdir, url)
            try:
                return _trials(opened.get_all_trials(opened.get_study_id_from_name(name), deepcopy=False))
            finally:
                storage.close(opened)

    def __enter__(self) -> "Trials":
        return self

    def __exit__(self, *_: Any) -> None:
        storage.close(self._storage)
        self._claims.close()

    def all(self) -> list[Trial]:
        """Returns every trial, in the order in which they were made."""
        with storage.told():
            return _trials(self._storage.get_all_trials(self._study_id, deepcopy=False))

    def claim(self, but: Collection[str]) -> Trial | None:
        """Returns a trial, none of these ids, that is now this process's to run, those of dead ones first, or None."""
        unfinished = [trial for trial in self.all() if not trial.over and trial.id not in but]
        for trial in sorted(unfinished, key=lambda trial: (trial.state == "WAITING", trial.number)):
            taken = self._take(trial)
            if taken is not None:
                return taken
        return self._suggested() if isinstance(self._sweep.space, Adaptive) else None

    def release(self, trial: Trial) -> None:
        """Gives a trial back, to be claimed again."""
        self._claims.release(trial.id)

    def over(self) -> bool:
        """Returns whether every trial is finished."""
        found = self.all()
        wanted = self._sweep.space.trials if isinstance(self._sweep.space, Adaptive) else 0
        return all(trial.over for trial in found) and (len(found) >= wanted or self._exhausted)

    def report(self, trial: Trial, curve: Mapping[int, float]) -> bool:
        """Stores metrics by step; returns whether the trial should end now. Raises UserError: the claim is lost."""
        self._claims.check()
        with storage.told():
            number = self._number(trial)
            known = self._storage.get_trial(number).intermediate_values
            for step, value in curve.items():
                if step not in known:
                    self._storage.set_trial_intermediate_value(number, step, value)
                    # A pruner looks at the last step alone.
                    if self._study.pruner.prune(self._study, self._storage.get_trial(number)):
                        return True
        return False

    def finish(self, trial: Trial, state: str, value: float | None, why: str = "") -> None:
        """Finishes a trial and gives it back: COMPLETE and PRUNED with a value, FAIL with the reason."""
        self._claims.check()
        with storage.told():
            number = self._number(trial)
            if why:
                self._storage.set_trial_user_attr(number, "why", why)
            values = None if value is None or state == "FAIL" else [value]
            self._storage.set_trial_state_values(number, self._optuna.trial.TrialState[state], values)
        self._claims.release(trial.id)

    def check(self) -> None:
        """Raises UserError if claims may have been lost."""
        self._claims.check()

    def _number(self, trial: Trial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)

    def _take(self, trial: Trial) -> Trial | None:
        """Returns the trial, RUNNING, if it can be claimed and isn't finished."""
        if not self._claims.take(trial.id):
            return None
        try:
            with storage.told():
                number = self._number(trial)
                now = _trial(self._storage.get_trial(number))
                if now.state == "WAITING":
                    self._storage.set_trial_state_values(number, self._optuna.trial.TrialState.RUNNING)
        except BaseException:
            self._claims.release(trial.id)
            raise
        if now.over:
            self._claims.release(trial.id)
            return None
        return now._replace(state="RUNNING")

    def _enqueue(self) -> None:
        """Adds the trials that are known beforehand and aren't there; who was killed at it is completed so."""
        there = {trial.id for trial in self.all()}
        found = points.points(self._sweep.space)
        choices = {name: storage.plain_values(point[name] for point in found) for name in (found[0] if found else ())}
        distribution = self._optuna.distributions.CategoricalDistribution
        for point in found:
            texts = points.texts(point)
            key = points.trial_id(self._sweep.base, self._fixed, texts)
            if key in there:
                continue
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    state=self._optuna.trial.TrialState.WAITING,
                    params={name: storage.plain(value) for name, value in point.items()},
                    distributions={name: distribution(choices[name]) for name in point},
                    user_attrs={"id": key, "overrides": texts},
                )
            )

    def _suggested(self) -> Trial | None:
        """Returns a new trial of an adaptive space, claimed; None if there are enough, or others are making one."""
        space = self._sweep.space
        if not self._claims.take(_MAKING):
            return None
        try:
            with storage.told():
                return self._new(space)
        finally:
            self._claims.release(_MAKING)

    def _new(self, space: Adaptive) -> Trial | None:
        state = self._optuna.trial.TrialState
        found = self._storage.get_all_trials(self._study_id, deepcopy=False)
        there = {each.user_attrs["id"] for each in found if "id" in each.user_attrs}
        for each in found:
            if "id" not in each.user_attrs and not each.state.is_finished():
                # Only who makes trials leaves one without an id, for a moment: this one's maker is dead.
                self._storage.set_trial_state_values(each._trial_id, state.FAIL)
        if len(there) >= space.trials:
            return None
        for attempt in range(ASKS):
            # A seed of its own for each trial: after a restart the draws go on, and don't begin again.
            seed = (space.seed * 1_000_003 + len(found) + attempt) % 2**32
            sampler = self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=space.random_trials)
            self._study.sampler = self._optuna.samplers.RandomSampler(seed) if attempt > ASKS // 2 else sampler
            asked = self._study.ask(
                {name: storage.distribution(self._optuna, each) for name, each in space.fields.items()}
            )
            texts = points.texts(
                {name: storage.value_of(space.fields[name], each) for name, each in asked.params.items()}
            )
            key = points.trial_id(self._sweep.base, self._fixed, texts)
            if key in there or not self._claims.take(key):
                self._study.tell(asked, state=state.FAIL)
                continue
            asked.set_user_attr("overrides", texts)
            asked.set_user_attr("id", key)
            return _trial(self._storage.get_trial(asked._trial_id))
        self._exhausted = True
        return None


def _trials(found: Collection[Any]) -> list[Trial]:
    return [_trial(each) for each in found if "id" in each.user_attrs]


def _trial(found: Any) -> Trial:
    own = found.user_attrs
    value = found.values[0] if found.values else None
    curve = dict(sorted(found.intermediate_values.items()))
    return Trial(
        found.number, own["id"], own["overrides"], found.state.name, value, curve, own.get("why", ""), found.params
    )


def read_curve(path: str, metric: str) -> dict[int, float]:
    """Returns {step: value} of a metric in a metrics.jsonl that may still grow; {} if there is none; null is NaN.

    Raises:
      UserError: the bucket can't be read, or the file is damaged.
    """
    if bucket.is_bucket(path):
        found = bucket.read(path)
        text = found.data.decode() if found else ""
    else:
        text = pathlib.Path(path).read_text(encoding="utf-8") if os.path.exists(path) else ""
    return {values["step"]: float(values[metric]) for values in metrics.parsed(path, text) if metric in values}
