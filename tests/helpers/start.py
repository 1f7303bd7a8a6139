"""What a start of training does before it trains, in this process."""

from dnt_scale import config
from dnt_scale.train.recorded import Typed
from dnt_scale.train.resume import changes, starting_state
from dnt_scale.train.run_start import begin
from dnt_scale.train.stages import load_stages


def start(overrides: list[str], from_step: int | None = None) -> list[str]:
    """What a start on one rank says; nothing is written."""
    begun = begin(config.load(overrides), Typed(overrides), from_step=from_step)
    stages = load_stages(begun.run)
    starting_state(begun, stages, 1)
    return [*begun.notes, *changes(begun, stages)]
