"""A server of forked processes that has training's imports already: seconds saved a process.

multiprocessing has one such server a process, with the imports of whoever asked first. In a worker
that had run data preparation's pools every rank imported torch and DeepSpeed by itself, five
seconds of processor time each; so ranks have a server of their own.
"""

from multiprocessing import context, forkserver, popen_forkserver
from multiprocessing.process import BaseProcess
from threading import Lock
from typing import Any

SERVER = forkserver.ForkServer()
SERVER.set_forkserver_preload(
    [
        "torch._dynamo",  # drawing weights on the meta device imports it
        "torch._inductor.compile_fx",  # and this one DeepSpeed's ZeRO does, with what follows
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "dnt_scale.engine.deepspeed",
        "dnt_scale.engine.fsdp",
        "dnt_scale.data.tokens",
        "dnt_scale.tools.generate",
        "dnt_scale.train.rank",
        "dnt_scale.cli.main",
        "dnt_scale.record.tracker",
        "dnt_scale.record.plots",
        "dnt_scale.train.progress",
        "testbed.warm",
    ]
)
_LAUNCH = Lock()


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: BaseProcess) -> None:
        with _LAUNCH:
            common = forkserver.connect_to_new_process
            forkserver.connect_to_new_process = SERVER.connect_to_new_process
            try:
                super()._launch(process_obj)  # type: ignore[misc]
            finally:
                forkserver.connect_to_new_process = common


class RankProcess(context.ForkServerProcess):
    """A process forked from the server."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        return _Popen(process_obj)
