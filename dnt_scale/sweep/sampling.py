"""Values that a sampler of Optuna's chooses, for `dnt sweep --sampler random` and `tpe`.

No study is stored: what a trial tries is a function of its number and of the results of those
before it, so a sweep that was killed goes on with the trials that it would have had.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dnt_scale.config import ConfigError
from dnt_scale.sweep.combinations import Override

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DIGITS = 4  # of a number that is chosen: enough for a setting, few enough for a run's name
INSTALL = "pip install 'dnt-scale[sweep]'"


def check(overrides: Sequence[Override], sampler: str) -> None:
    """Raise ConfigError where the sampler cannot choose among these, or Optuna is not here."""
    varying = [each for each in overrides if each.varies]
    if not varying:
        raise ConfigError(
            f"--sampler {sampler}: no override leaves a choice; give an interval, such as "
            "'optim.lr=tag(log,interval(0.001,0.1))', or several values KEY=A,B,C"
        )
    for each in varying:
        if each.key.lstrip("+") == "run.seed":
            raise ConfigError(
                f"{each.line}: a sampler would choose the luckiest seed; give one seed, then train "
                "the best values with several seeds (--sampler grid)"
            )
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"--sampler {sampler} needs Optuna, which is not installed: {INSTALL}; a grid "
            "(--sampler grid) needs nothing"
        ) from None


def propose(
    overrides: Sequence[Override],
    sampler: str,
    history: Sequence[tuple[Sequence[str], float]],
    number: int,
) -> list[str]:
    """Return the values that trial ``number`` tries, one for each override that varies, as they
    stand behind KEY=.

    Args:
        history: of earlier trials their values, and what they led to: the lower the better,
            infinite where the run failed.
        number: from 0.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {each.key: _distribution(each) for each in overrides if each.varies}
    # The first draws of generators with seeds 0, 1, 2 ... are near each other; of these not.
    seed = random.Random(number).getrandbits(32)
    chooses = (
        optuna.samplers.TPESampler(seed=seed)
        if sampler == "tpe"
        else optuna.samplers.RandomSampler(seed=seed)
    )
    study = optuna.create_study(sampler=chooses)
    for values, loss in history:
        params = {
            key: _from_text(text, space[key]) for key, text in zip(space, values, strict=True)
        }
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=loss))
    trial = study.ask(space)
    return [_to_text(trial.params[key], space[key]) for key in space]


def _distribution(override: Override) -> BaseDistribution:
    """Return what Optuna is to choose from. Raises ConfigError for an interval that is none."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found = override.interval
    if found is None:
        return CategoricalDistribution(override.values)
    low: Any = found.start  # whole numbers where they stand in int(interval(1,5))
    high: Any = found.end
    log = "log" in found.tags
    try:
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low), float(high), log=log)
    except ValueError as error:
        raise ConfigError(f"{override.line}: {' '.join(str(error).split())}") from None


def _to_text(value: Any, among: BaseDistribution) -> str:
    from optuna.distributions import FloatDistribution

    if not isinstance(among, FloatDistribution):
        return str(value)
    return repr(min(max(float(f"{value:.{DIGITS}g}"), among.low), among.high))


def _from_text(text: str, among: BaseDistribution) -> Any:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(among, CategoricalDistribution):
        return text
    return int(text) if isinstance(among, IntDistribution) else float(text)
