"""What a trained run is for in one process: load its newest checkpoint, sample text, measure its loss."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from data_prep.shards import MANIFEST
from data_prep.tokenizer import Tokenizer
from dnt_scale import checkpoint, config
from dnt_scale.checkpoint.tensor_shards import Box
from dnt_scale.config import ConfigError, DataConfig, RunConfig
from dnt_scale.data.sources import Sources, any_source, load_sources
from dnt_scale.data.stream import validation_batches
from dnt_scale.distributed import compute_dtype
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.model.dnt import DNT, IGNORED
from dnt_scale.record.files import warn


def load_run(
    run_dir: Path, data: Path | None, me: Ranks, sets: Callable[[DataConfig], Sources] = load_sources
) -> tuple[RunConfig, DNT, Sources]:
    """A run's configuration, its model with the newest weights (to be computed with at once), and what it reads.

    Args:
        data: a set to read instead of the run's own, made with the same tokenizer.
        sets: loads what is needed of those.

    Raises:
        ValueError: no run or no checkpoint there, a damaged one, no such set, or one with another tokenizer.
    """
    run = config.from_yaml(run_dir / "config.yaml")
    folder = run.checkpoints if run.checkpoint.dir else run_dir / "checkpoints"
    newest = checkpoint.newest(folder)
    if newest is None:
        raise ConfigError(f"{folder}: no complete checkpoint; train the run until it has saved one")
    state = checkpoint.read_state(newest)
    checkpoint.check_files(newest, state, me)
    sources = _found(run_dir, data, run.data, sets)
    manifest = sources[0].manifest
    if manifest.tokenizer.sha256 != state.tokenizer_sha256:
        raise ConfigError(
            f"{sources[0].folder}: made with another tokenizer (sha256 {manifest.tokenizer.sha256[:12]}) than "
            f"{newest} (sha256 {state.tokenizer_sha256[:12]}); prepare it with --tokenizer"
        )
    model = DNT(run.model, manifest.eos_id if run.data.document_mask else None)
    weights = [(f"model.{name}", tuple(p.shape), p.detach()) for name, p in model.named_parameters()]
    checkpoint.read_tensors(newest, [Box(name, shape, (0,) * len(shape), data) for name, shape, data in weights], me)
    dtype, line = compute_dtype.for_inference(run.train.dtype, me.device)
    if line:
        warn(line)
    return run, model.to(me.device, dtype), sources


def _found(run_dir: Path, data: Path | None, own: DataConfig, sets: Callable[[DataConfig], Sources]) -> Sources:
    """The set ``data``, else the run's own. Raises ValueError, which says what to do where the run's own have moved."""
    if data:
        return sets(DataConfig(path=data))
    try:
        return sets(own)
    except (ValueError, OSError) as error:
        gone = [str(path) for path in (own.path, *(entry.path for entry in own.mixture.values())) if not _is_set(path)]
        if not gone:
            raise
        how = "give its new place with --data" if own.path else "measure or take one set alone with --data"
        raise ConfigError(f"{error}; {run_dir} was trained on it: {how}") from None


def _is_set(path: Path | None) -> bool:
    return path is None or (path / MANIFEST).is_file()


@torch.inference_mode()
def evaluate(run_dir: Path, data: Path | None, rows: int | None, me: Ranks) -> tuple[list[float], Sources]:
    """Each set's mean loss in nats a token on ``rows`` (default: all) evenly spread validation rows, and the sets.

    Args:
        data: another set with the same tokenizer; default the run's own.
    """
    run, model, sources = load_run(run_dir, data, me)
    losses = []
    for source in sources:
        if "val" not in source.manifest.splits:
            field = "--data" if data else source.field
            raise ConfigError(
                f"{field}: {source.folder} has no validation split; prepare it with --val-fraction above 0"
            )
        total, tokens = 0.0, 0
        for batch in validation_batches(
            source,
            rows=rows or source.manifest.splits["val"].rows,
            micro_batch=run.train.micro_batch,
            rank=0,
            world_size=1,
        ):
            batch = batch.to(me.device)
            total += model(batch[:, :-1].clamp(min=0), batch[:, 1:]).item()
            tokens += int((batch[:, 1:] != IGNORED).sum())
        losses.append(total / tokens)
    return losses, sources


@torch.inference_mode()
def generate(
    run_dir: Path, prompt: str, me: Ranks, *, tokens: int, temperature: float, top_k: int, seed: int, data: Path | None
) -> Iterator[str]:
    """Yield the prompt and then the text as it is sampled, at most ``tokens`` tokens or to the end of document.

    Args:
        temperature: 0 takes the most likely token.
        top_k: sample from the k most likely tokens; 0: from all.
        data: where the tokenizer is, if the run's data has moved; of a mixture, one set is enough.
    """
    run, model, sources = load_run(run_dir, data, me, any_source)
    folder, manifest = sources[0].folder, sources[0].manifest
    tokenizer = Tokenizer.load(folder / manifest.tokenizer.file)
    if tokenizer.sha256 != manifest.tokenizer.sha256:
        raise ConfigError(f"{folder / manifest.tokenizer.file}: not the tokenizer that its manifest names; restore it")
    generator = torch.Generator().manual_seed(seed)
    ids = [manifest.eos_id, *tokenizer.encode(prompt)]
    shown = ""
    for left in range(tokens, -1, -1):
        text = tokenizer.decode(ids[1:])
        if not text.endswith("�"):  # the rest of a character may still be to come
            yield text[len(shown) :]
            shown = text
        if not left or (ids[-1] == manifest.eos_id and len(ids) > 1):
            break
        context_1T = torch.tensor([ids[-run.model.context :]], device=me.device)
        logits_V = model(context_1T)[0, -1].float().cpu()
        logits_V[manifest.tokenizer.vocab_size :] = -torch.inf  # ids that only round the embedding up
        ids.append(sample(logits_V, temperature, top_k, generator))


def sample(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token id from fp32 logits of shape (V,).

    Raises:
        ConfigError: the logits tell nothing.
    """
    if logits_V.isnan().any() or logits_V.max().isinf():
        raise ConfigError("the model's logits are not finite: its weights are spoilt; take an earlier checkpoint")
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k:
        kth = logits_V.topk(min(top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -torch.inf)
    # so that the largest stays finite, and -inf what it is, whatever they are divided by
    divisor = min(max(temperature, 1e-30), 1e30)
    probabilities_V = torch.softmax((logits_V - logits_V.max()) / divisor, dim=0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
