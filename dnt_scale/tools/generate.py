"""Sample text from a trained language model."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from data_prep.shards import Manifest
from data_prep.tokenizer import Tokenizer
from dnt_scale.config import ConfigError, DataConfig, DataSection, ModelConfig, RunConfig
from dnt_scale.data.sources import Source
from dnt_scale.data.token_sets import any_set
from dnt_scale.data.tokens import TokenSource
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.model.dnt import DNT
from dnt_scale.tools.inference import found_source, load_run


def language_run(
    run_dir: Path, run: RunConfig, data: Path | None
) -> tuple[TokenSource, ModelConfig]:
    """Return the text that a run reads, of a mixture one set, and the section of its language
    model.

    Args:
        data: a set to read instead of the run's own.

    Raises:
        ValueError: no such set, or a run of another kind.
    """
    if type(run.model) is not ModelConfig:
        raise no_language_model(run_dir, run)
    source = found_source(run_dir, data, run.data, one_set)
    if not isinstance(source, TokenSource):
        raise no_language_model(run_dir, run)
    return source, run.model


def no_language_model(run_dir: Path, run: RunConfig) -> ConfigError:
    """Return what to raise where a run has no text to go on with."""
    return ConfigError(
        f"{run_dir}: model.kind is {run.model.kind}, which is no language model, and has no "
        "text to go on with; measure it with `dnt eval`"
    )


def tokenizer_file(source: TokenSource) -> tuple[Path, Manifest]:
    """Return where a source's tokenizer is, and the manifest that names it. Raises ConfigError
    where it is another one.
    """
    folder, manifest = source.sets[0].folder, source.sets[0].manifest
    file = folder / manifest.tokenizer.file
    if Tokenizer.load(file).sha256 != manifest.tokenizer.sha256:
        raise ConfigError(f"{file}: not the tokenizer that its manifest names; restore it")
    return file, manifest


def one_set(data: DataSection) -> Source:
    """Return one of the sets of a mixture, of which the tokenizer is all that is needed. Raises
    ValueError.
    """
    return TokenSource(data, any_set(data)) if isinstance(data, DataConfig) else data.open()


@torch.inference_mode()
def generate(
    run_dir: Path,
    prompt: str,
    ranks: Ranks,
    *,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    data: Path | None,
) -> Iterator[str]:
    """Yield the prompt and then the text as it is sampled, at most ``tokens`` tokens or to the end
    of document.

    Args:
        temperature: 0 takes the most likely token.
        top_k: sample from the k most likely tokens; 0: from all.
        data: where the tokenizer is, if the run's data has moved; of a mixture, one set is enough.
    """
    run, model, source = load_run(run_dir, data, ranks, one_set)
    if not isinstance(source, TokenSource) or not isinstance(model, DNT):
        raise no_language_model(run_dir, run)
    file, manifest = tokenizer_file(source)
    tokenizer = Tokenizer.load(file)
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
        context_1T = torch.tensor([ids[-model.config.context :]], device=ranks.device)
        logits_V = model(context_1T)[0, -1].float().cpu()
        # ids that only round the embedding up
        logits_V[manifest.tokenizer.vocab_size :] = -torch.inf
        ids.append(sample(logits_V, temperature, top_k, generator))


def sample(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token id from fp32 logits of shape (V,).

    Raises:
        ConfigError: the logits tell nothing.
    """
    if logits_V.isnan().any() or logits_V.max().isinf():
        raise spoilt()
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k:
        kth = logits_V.topk(min(top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -torch.inf)
    # so that the largest stays finite, and -inf what it is, whatever they are divided by
    divisor = min(max(temperature, 1e-30), 1e30)
    probabilities_V = torch.softmax((logits_V - logits_V.max()) / divisor, dim=0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def spoilt() -> ConfigError:
    """Return what to raise where a model's logits tell nothing."""
    return ConfigError(
        "the model's logits are not finite: its weights are spoilt; take an earlier checkpoint"
    )
