"""One canonical checkpoint, whoever wrote it, on however many ranks.

    checkpoints/step-00001000/
      shard-00001-model-00001-of-00001.safetensors   a rank's parts of the tensors, with offsets
      state.json                                     where the run stands; each file's size, sha256
    checkpoints/latest -> step-00001000

Tensors are keyed model.NAME, momentum_buffer.NAME (exp_avg.NAME and exp_avg_sq.NAME for AdamW),
fp32 but for a momentum in bf16. Each file is plain safetensors; torch.distributed.checkpoint's
``DCP_SHARDING_INFO`` in its head tells where its parts lie in the whole tensors. A rank writes one
file, or up to three where it holds several shards of a tensor, as ZeRO's partitions are: a name
stands once in a file. There is no pickle to load. A checkpoint is written into a hidden folder,
fsynced and renamed, so that a crash leaves the previous one whole; at a URL state.json comes last.

    tensor_shards.py       what a rank holds of a tensor; regions
    safetensors_header.py  the head of a safetensors file
    state.py               state.json
    storage.py             a local folder or a URL
    write.py               Saver: saving while training goes on
    read.py                read_tensors: any ranks, any engine
    replicas.py            whether ranks that share a tensor hold the same
    inspection.py          inspect, verify, diff
    progress.py            bytes done, for a person
"""

from dnt_scale.checkpoint.read import check_files, newest, read_tensors
from dnt_scale.checkpoint.state import State, read_state
from dnt_scale.checkpoint.storage import CheckpointError
from dnt_scale.checkpoint.write import Saver

__all__ = [
    "CheckpointError",
    "Saver",
    "State",
    "check_files",
    "newest",
    "read_state",
    "read_tensors",
]
