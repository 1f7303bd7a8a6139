"""Sample text from a trained language model: one text as it comes, or many beside each other.

A text that outgrows ``model.context`` goes on without its older half, see ``window_start``.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import psutil
import torch
from torch import Tensor

from data_prep.shards import Manifest
from data_prep.tokenizer import Tokenizer
from dnt_scale.checkpoint import State
from dnt_scale.config import ConfigError, DataConfig, DataSection, ModelConfig, RunConfig
from dnt_scale.data.sources import Source
from dnt_scale.data.token_sets import any_set
from dnt_scale.data.tokens import TokenSource
from dnt_scale.distributed.process_group import Ranks
from dnt_scale.model.cache import Cache
from dnt_scale.model.dnt import DNT
from dnt_scale.tools.inference import Trained, found_source, load_checkpoint
from dnt_scale.tools.prompts import Continuation
from dnt_scale.tools.sampling import Sampling, generator_for, sample

# places of texts that are read at once, padding included: more would take memory and save no time
FILL_TOKENS = 4096
PART_OF_A_CHARACTER = "\ufffd"  # how the tokenizer shows bytes of one of which more is to come


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


@dataclass(frozen=True)
class Asked:
    """What text is asked for.

    Attributes:
        tokens: of each text at most, beside those of its prompt.
        stops: texts at which it ends, and which are left out.
    """

    tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stops: tuple[str, ...] = ()


@dataclass
class Text:
    """A text that grows.

    Attributes:
        ids: the end-of-document token, the prompt, and what was sampled.
        given: how many of them are not sampled.
        written: what the sampled ones are, without a character of which more is to come.
        start: the first token that the cache has; None: it has none of this text.
        end: as of `Continuation`; empty while it grows.
    """

    index: int
    prompt: str
    ids: list[int]
    given: int
    generator: torch.Generator
    written: str = ""
    start: int | None = None
    end: str = ""

    @property
    def sampled(self) -> int:
        return len(self.ids) - self.given


class Piece(NamedTuple):
    """What is new of a text, and how many tokens were sampled so far."""

    text: str
    tokens: int


class Advance(NamedTuple):
    """Tokens that were sampled at once, one for each of several texts, and which of these ended."""

    tokens: int
    finished: list[Continuation]


def window_start(length: int, context: int) -> int:
    """Return the first of a text's ``length`` tokens that the model sees.

    Where positions count from, and so keys and values, depends on it: it stays where it is until
    the window is ``context`` long, then leaves half of it behind. It is the same whether tokens
    are the prompt's or were sampled.
    """
    kept = max(1, context // 2)
    stride = context + 1 - kept
    return -(-max(0, length - context) // stride) * stride


@dataclass(frozen=True)
class Writer:
    """A language model with its tokenizer, and what is asked of them."""

    model: DNT
    tokenizer: Tokenizer
    eos: int
    asked: Asked

    @torch.inference_mode()
    def stream(self, prompt: str) -> Iterator[Piece]:
        """Yield a prompt, and then what follows as it is sampled. Raises ConfigError."""
        text, shown = self._begun(0, prompt), 0
        yield Piece(self.tokenizer.decode(text.ids[1:]), 0)
        for _ in self._together(iter([text]), 1, self._capacity([prompt])):
            self._write(text)
            ready = len(text.written)
            if not text.end:
                ready -= held_back(text.written, self.asked.stops)
            yield Piece(text.written[shown:ready], text.sampled)
            shown = max(shown, ready)

    @torch.inference_mode()
    def each(
        self, prompts: Sequence[str], batch: int, leave_out: frozenset[int] = frozenset()
    ) -> Iterator[Advance]:
        """Go on with prompts, ``batch`` beside each other, each as if it were alone: another takes
        the place of one that is finished. Raises ConfigError.

        Args:
            leave_out: indices of prompts that are finished already.
        """
        left = [index for index in range(len(prompts)) if index not in leave_out]
        if not left:
            return
        texts = (self._begun(index, prompts[index]) for index in left)
        capacity = self._capacity([prompts[index] for index in left])
        for advanced in self._together(texts, min(batch, len(left)), capacity):
            ended = [text for text in advanced if text.end]
            yield Advance(
                len(advanced) if self.asked.tokens else 0,
                [Continuation(t.index, t.prompt, t.written, t.sampled, t.end) for t in ended],
            )

    def _begun(self, index: int, prompt: str) -> Text:
        ids = [self.eos, *self.tokenizer.encode(prompt)]
        generator = generator_for(self.asked.seed, index)
        return Text(index, prompt, ids, len(ids), generator)

    def _capacity(self, prompts: Sequence[str]) -> int:
        """Return how many tokens of a text the cache has to have room for; the last one that is
        sampled goes into none.
        """
        longest = max(len(self.tokenizer.encode(prompt)) for prompt in prompts)
        return min(self.model.config.context, 1 + longest + max(0, self.asked.tokens - 1))

    def _together(
        self, waiting: Iterator[Text], batch: int, capacity: int
    ) -> Iterator[Sequence[Text]]:
        """Sample a token of each text that grows, and yield these; those that have ended make room
        for others.
        """
        if not self.asked.tokens:
            for text in waiting:
                text.end = "length"
                yield [text]
            return
        cache = new_cache(self.model, batch, capacity)
        growing: list[Text] = []  # one in each row of the cache, from the first on
        while True:
            growing += itertools.islice(waiting, batch - len(growing))
            if not growing:
                return
            fill(self.model, cache, growing)
            logits_BV = self.model.next_logits(cache, [text.ids[-1] for text in growing])
            logits_BV = logits_BV.float().cpu()
            # ids that only round the embedding up
            logits_BV[:, self.tokenizer.vocab_size :] = -torch.inf
            for text, logits_V in zip(growing, logits_BV, strict=True):
                self._sample(text, logits_V)
            yield growing
            left = cache.close_up([bool(text.end) for text in growing])
            growing = [growing[row] for row in left]

    def _sample(self, text: Text, logits_V: Tensor) -> None:
        """Add a token to a text, and find out whether that ends it. Raises ConfigError."""
        asked = self.asked
        text.ids.append(sample(logits_V, asked.sampling, text.generator, text.ids[1:]))
        if text.ids[-1] == self.eos:
            text.end = "document"
        elif text.sampled == asked.tokens:
            text.end = "length"
        if asked.stops or text.end:
            self._write(text)

    def _write(self, text: Text) -> None:
        """Renew what is written; where it has a text to stop at, it ends before that."""
        given = self.tokenizer.decode(text.ids[1 : text.given])
        text.written = self.tokenizer.decode(text.ids[1:])[len(given) :]
        found = [at for stop in self.asked.stops if (at := text.written.find(stop)) >= 0]
        if found:
            text.written, text.end = text.written[: min(found)], "stop"
        text.written = text.written.rstrip(PART_OF_A_CHARACTER)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of one to stop at."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )


def new_cache(model: DNT, rows: int, capacity: int) -> Cache:
    """Return a cache. Raises ConfigError where memory has no room for it."""
    device = model.tok_emb.weight.device
    needed = rows * model.new_cache(1, capacity).layers.nbytes
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"keys and values of {rows:,} texts of {capacity:,} tokens take {needed / 1e9:.1f} GB, "
            f"but {free / 1e9:.1f} GB of memory are free; give a smaller --batch or fewer --tokens"
        )
    return model.new_cache(rows, capacity)


def fill(model: DNT, cache: Cache, texts: Sequence[Text]) -> None:
    """Put into each text's row of a cache its tokens but the last, where they are not there or
    where its window has moved.
    """
    group: dict[int, list[int]] = {}  # by row
    for row, text in enumerate(texts):
        start = window_start(len(text.ids), model.config.context)
        if start == text.start:
            continue
        text.start = start
        seen = text.ids[start:-1]
        longest = max(len(seen), *map(len, group.values())) if group else len(seen)
        if group and longest * (len(group) + 1) > FILL_TOKENS:
            model.fill(cache, [*group], [*group.values()])
            group = {}
        group[row] = seen
    if group:
        model.fill(cache, [*group], [*group.values()])


def load_writer(trained: Trained, ranks: Ranks, asked: Asked, data: Path | None) -> Writer:
    """Return what writes by a checkpoint of a run.

    Args:
        data: where the tokenizer is, if the run's data has moved; of a mixture, one set is enough.

    Raises:
        ValueError: as ``load_checkpoint`` does, or a run that has no language model.
    """
    model, source = load_checkpoint(trained, data, ranks, one_set)
    if not isinstance(source, TokenSource) or not isinstance(model, DNT):
        raise no_language_model(trained.folder, trained.run)
    file, manifest = tokenizer_file(source)
    return Writer(model, Tokenizer.load(file), manifest.eos_id, asked)


def made_with(state: State, prompts: Sequence[str], asked: Asked) -> dict[str, Any]:
    """Return what the texts of prompts depend on, for a file of them to tell: by the checkpoint of
    ``state``.
    """
    weights = hashlib.sha256(orjson.dumps(sorted(file.sha256 for file in state.files.values())))
    texts = hashlib.sha256(orjson.dumps(list(prompts)))
    return {
        "step": state.step,
        "weights": weights.hexdigest(),
        "prompts": texts.hexdigest(),
        "tokens": asked.tokens,
        "seed": asked.seed,
        "stops": asked.stops,
        **asdict(asked.sampling),
    }
