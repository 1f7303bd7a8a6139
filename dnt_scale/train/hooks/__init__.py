"""What a run does beside its steps: a hook a file, and their order. See docs/extend/hook.md."""

from dnt_scale.train.hooks.agreement import Agreement
from dnt_scale.train.hooks.bad_steps import BadSteps
from dnt_scale.train.hooks.base import Hook
from dnt_scale.train.hooks.compilation import Compilation
from dnt_scale.train.hooks.diagnose import Diagnose
from dnt_scale.train.hooks.eval_tasks import EvalTasks
from dnt_scale.train.hooks.garbage import GarbageCollection
from dnt_scale.train.hooks.predictions import Predictions
from dnt_scale.train.hooks.profiler import ProfilerWindow
from dnt_scale.train.hooks.records import Records
from dnt_scale.train.hooks.replicas import ReplicaChecks
from dnt_scale.train.hooks.rollback import Rollback
from dnt_scale.train.hooks.saving import Saving
from dnt_scale.train.hooks.snapshots import Snapshots
from dnt_scale.train.hooks.stage_begins import StageBegins
from dnt_scale.train.hooks.tensor_rms import TensorRMS
from dnt_scale.train.hooks.timeline import Timeline
from dnt_scale.train.hooks.validation import Validation

# The story of a step: what measures and adds to the step's line, the line itself, and then what may
# end the run, with a step that is on record.
HOOKS: tuple[type[Hook], ...] = (
    StageBegins,  # before the first step of a later stage: its micro-batch, a line that tells
    Diagnose,  # every diagnose.every steps: tails of gradients, sizes of updates, by tensor
    Rollback,  # a step unlike the last ones is undone, where that is asked for
    Validation,  # every eval.every steps, and before the first: the loss on held-out rows
    TensorRMS,  # before every measure.every-th step: how large weights and optimizer buffers are
    Records,  # the step's line in metrics.jsonl, from there in MLflow, and what a person sees
    Compilation,  # after the first step: how long torch.compile took
    Predictions,  # after a validation: a few images with what they are taken for, as a picture
    BadSteps,  # tells of a step unlike the last ones, ends a run that has too many
    Agreement,  # the one exchange of a step: signals, writers at work, a line that was not written
    Saving,  # puts a checkpoint in place that all have written, begins the next one
    EvalTasks,  # every eval.tasks.every steps: the harness's tasks on a checkpoint that is in place
    Snapshots,  # a copy in memory to go back to, every health.snapshot_every steps
    ReplicaChecks,  # every health.check_every steps, and before the first: the same bits on all?
    GarbageCollection,  # Python's, every garbage.every steps
    ProfilerWindow,  # ends or begins the window of profile.steps, so that it holds all of the above
    Timeline,  # how far the run is, and where its seconds went
)

__all__ = ["HOOKS", "Hook"]
