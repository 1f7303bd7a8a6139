"""The sharding recipe: what is kept, what is gathered, and who holds a copy."""

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnt_scale.config import RunConfig
from dnt_scale.distributed import process_group
from dnt_scale.distributed.errors import AgreedError
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.engine.parallelize import data_mesh, parallelize, prepare_blocks
from dnt_scale.model.dnt import DNT
from dnt_scale.model.init import init_weights
from dnt_scale.model.task import LossModule
from testbed.configs import composed
from testbed.run import call, tiny

LAYERS = 4
TOKENS = torch.randint(0, 512, (2, 65), generator=torch.Generator().manual_seed(0))


def chosen(*overrides: str) -> RunConfig:
    return composed(*tiny(Path("no-data"), Path("no-folder"), f"model.layers={LAYERS}", *overrides))


def prepared(*overrides: str) -> DNT:
    run = chosen(*overrides)
    model = DNT(run.model)
    init_weights(model, 1)
    prepare_blocks(model, run)
    return model


class Live(TorchDispatchMode):
    """Remembers every tensor that is made, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def kept_bytes(model: DNT) -> int:
    """What lives after forward and is there for backward: activations."""
    with Live() as live:
        loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
        kept = live.bytes()
    loss.backward()
    return kept


def gradients(model: DNT) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def test_checkpointing_keeps_less_and_changes_no_bit():
    models = {
        how: prepared(f"engine.activation_checkpointing={how}")
        for how in ("none", "selective", "2", "3", "full")
    }
    kept = {how: kept_bytes(model) for how, model in models.items()}
    a_block = (kept["none"] - kept["full"]) / LAYERS
    assert kept["none"] > 2 * kept["full"]
    assert kept["full"] < kept["selective"] < kept["none"]
    # blocks 0 and 2; 0 and 3
    for how in ("2", "3"):
        assert kept["none"] - kept[how] == pytest.approx(2 * a_block, rel=0.01)
    for model in models.values():
        assert [name for name, _ in model.named_parameters()] == [
            name for name, _ in models["none"].named_parameters()
        ]
        assert all(
            torch.equal(a, b)
            for a, b in zip(gradients(model), gradients(models["none"]), strict=True)
        )


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_selective_recomputes_no_product_and_no_attention():
    calls = {}
    for how in ("none", "selective", "full"):
        model = prepared(f"engine.activation_checkpointing={how}")
        with Calls() as counted:
            model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        calls[how] = counted.made
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for op, in_a_block in {"mm": 6, attention: 1, "gelu": 1}.items():
        more = {how: calls[how][op] - calls["none"][op] for how in ("selective", "full")}
        assert more == {"selective": LAYERS if op == "gelu" else 0, "full": LAYERS * in_a_block}, op
        assert calls["none"][op] >= LAYERS * in_a_block


@pytest.mark.parametrize("how", ["none", "selective"])
def test_blocks_share_one_compilation(how, monkeypatch):
    compiled = torch.compile
    # the graph is what counts, not the kernels that are made of it
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        torch, "compile", lambda function, **how: compiled(function, backend=backend, **how)
    )
    torch._dynamo.reset()
    model, plain = (
        prepared("engine.compile=true", f"engine.activation_checkpointing={how}"),
        prepared(),
    )
    losses = [one(TOKENS[:, :-1], TOKENS[:, 1:]) for one in (model, plain)]
    for loss in losses:
        loss.backward()
    assert backend.frame_count == 1
    torch.testing.assert_close(losses[0], losses[1])
    for one, other in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- on ranks -------------------------------------------------------------------------------------


def sharded(me: Ranks, *overrides: str) -> LossModule:
    run = chosen(*overrides)
    with torch.device("meta"):
        model = LossModule(DNT(run.model))
    parallelize(model, run, me)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().fill_(0.01)
    return model


def gathers(model: LossModule) -> tuple[list[int], list[int]]:
    """How many all-gathers there have been when each block computes, forward and backward."""
    forward: list[int] = []
    backward: list[int] = []
    with Calls() as calls:

        def note(where: list[int]) -> None:
            where.append(calls.made["_allgather_base_"])

        for block in model.task.blocks:
            block.ffn.register_forward_pre_hook(lambda *_: note(forward))
            block.ffn.register_full_backward_pre_hook(lambda *_: note(backward))
        model(TOKENS).backward()
    return forward, backward


def run_gathers() -> None:
    me = process_group.start("cpu")
    every = range(LAYERS)
    for ahead, reshard, tied in product((0, 1, 2), (True, False), (True, False)):
        model = sharded(
            me,
            f"engine.prefetch={ahead}",
            f"engine.reshard_after_forward={reshard}",
            f"model.tied_head={tied}",
        )
        forward, backward = gathers(model)
        # the embedding and the head come with the root, or are gathered once each
        first, units = (0, LAYERS) if tied else (1, LAYERS + 2)
        assert forward == [1 + min(units, first + i + 1 + ahead) for i in every]
        again = [min(LAYERS, i + 1 + ahead) if reshard else 0 for i in every]
        assert backward == [1 + units + more for more in again]
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    process_group.stop()


def whole_weights(model: LossModule) -> list[tuple[bool, bool, bool]]:
    """Whether embedding, position table and head are whole when each block computes, forward and
    then backward, with the head's own call between the two.
    """
    task, found = model.task, list[tuple[bool, bool, bool]]()

    def note(*_: object) -> None:
        weights = task.tok_emb.weight, task.pos_emb.weight, task.head.weight
        found.append(tuple(not isinstance(weight, DTensor) for weight in weights))

    for block in task.blocks:
        block.ffn.register_forward_pre_hook(note)
        block.ffn.register_full_backward_pre_hook(note)
    task.head.register_forward_pre_hook(note)
    model(TOKENS).backward()
    return found


def run_ends() -> None:
    me = process_group.start("cpu")
    for overrides in ([], ["engine=ddp"], ["engine.cpu_offload=true"]):
        for ahead in (0, 1, 2):
            untied = ["model.tied_head=false", f"engine.prefetch={ahead}", *overrides]
            model = sharded(me, *untied)
            block = (False, True, False)
            expected = [*LAYERS * [block], (False, True, True), *LAYERS * [block]]
            assert whole_weights(model) == expected, untied
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            names = [name for name, _ in model.task.named_parameters()]
            assert names == [name for name, _ in DNT(chosen(*untied).model).named_parameters()]
            assert all(parameter.grad is not None for parameter in model.parameters())
    process_group.stop()


def test_a_head_of_its_own_is_whole_for_its_call_and_the_embedding_before_the_blocks():
    call(run_ends, ranks=2).ok()


def test_blocks_are_gathered_as_far_ahead_as_asked():
    call(run_gathers, ranks=2).ok()


def run_meshes() -> None:
    me = process_group.start("cpu")
    shapes = {
        "engine=ddp": (4, 1),
        "engine=fsdp": (4,),
        "engine=hsdp": (1, 4),  # one host
        "engine=hsdp engine.replicas=2": (2, 2),
        "engine=hsdp engine.replicas=4": (4, 1),
    }
    for overrides, shape in shapes.items():
        assert data_mesh(chosen(*overrides.split()).engine, me).shape == shape
    with pytest.raises(AgreedError, match=r"engine\.replicas is 3, .* 4 ranks .* divisor of 4"):
        data_mesh(chosen("engine=hsdp", "engine.replicas=3").engine, me)
    import socket

    socket.gethostname = lambda: f"node{min(me.rank, 2)}"
    with pytest.raises(AgreedError, match=r"engine\.replicas is null, one a node of 3, .* 4 ranks"):
        data_mesh(chosen("engine=hsdp").engine, me)
    socket.gethostname = lambda: f"node{me.rank // 2}"
    assert data_mesh(chosen("engine=hsdp").engine, me).mesh.tolist() == [[0, 1], [2, 3]]
    process_group.stop()


def test_copies_of_the_model_on_the_ranks():
    call(run_meshes, ranks=4).ok()
