"""A run's language model as the harness's model class: ``lm_eval.api.model.TemplateLM``.

The one file that imports the harness where it is imported; it is imported inside of functions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data_prep.tokenizer import Tokenizer
from dnt_scale.checkpoint.progress import Meter
from dnt_scale.config import ConfigError
from dnt_scale.model.dnt import DNT
from dnt_scale.tools.harness.scoring import continuations, log_likelihoods
from dnt_scale.tools.sampling import Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Pair = tuple[Any, list[int], list[int]]  # the harness's own key, context and continuation in ids
SAMPLING = {"temperature", "top_k", "do_sample"}


class RunModel(TemplateLM):
    """Answers the harness's requests. A text begins with the end-of-document token, as rows of
    training do, and as the tokenizer of an exported folder has it.

    Args:
        batch: rows that are computed at once.
        seed: of texts that a task wants sampled.
    """

    def __init__(self, model: DNT, tokenizer: Tokenizer, batch: int, seed: int = 0) -> None:
        super().__init__()
        self._model = model
        self._known = tokenizer
        self._batch = batch
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def eot_token_id(self) -> int:
        return self._known.eos_id

    @property
    def max_length(self) -> int:
        return self._model.config.context

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        ids = self._known.encode(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def loglikelihood(
        self, requests: list["Instance"], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self.max_length:
            raise ConfigError(
                f"a task has an answer of {longest} tokens, but model.context is "
                f"{self.max_length}; leave that task out, or take a run with a longer context"
            )
        with Meter("likelihoods", len(pairs), "requests") as meter:
            return log_likelihoods(self._model, pairs, self._batch, meter)

    def loglikelihood_rolling(
        self, requests: list["Instance"], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-likelihood of each whole text, in nats; of one longer than the context in
        windows, each token predicted once.
        """
        windows: list[Pair] = []
        counts = []
        for request in requests:
            (text,) = request.args
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(each)) for each in found]
            counts.append(len(windows) - before)
        each = iter(self._loglikelihood_tokens(windows))
        return [sum(next(each)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = True) -> list[str]:
        """Return the text that goes on with each context, up to the first of its stops. A context
        that leaves no room loses its beginning.
        """
        found = [""] * len(requests)
        with Meter("texts", len(requests), "requests") as meter:
            for settings, numbers in self._alike(requests):
                for at in range(0, len(numbers), self._batch):
                    some = numbers[at : at + self._batch]
                    contexts = [self.tok_encode(requests[number].args[0]) for number in some]
                    texts = self._texts(contexts, settings)
                    for number, text in zip(some, texts, strict=True):
                        found[number] = text
                    meter(len(some))
        return found

    def _alike(self, requests: list["Instance"]) -> list[tuple[dict[str, Any], list[int]]]:
        """Return the requests' numbers, longest first, by their settings."""
        groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
        order = sorted(range(len(requests)), key=lambda number: -len(requests[number].args[0]))
        for number in order:
            settings = requests[number].args[1]
            groups.setdefault(repr(settings), (settings, []))[1].append(number)
        return list(groups.values())

    def _texts(self, contexts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        wanted = generation(settings, self.max_length)
        stops: list[str] = wanted["until"]

        def over(ids: list[int]) -> bool:
            return ids[-1] == self.eot_token_id or any(
                stop in self._known.decode(ids) for stop in stops
            )

        found = continuations(
            self._model,
            [context[-(self.max_length - wanted["max_gen_toks"]) :] for context in contexts],
            over,
            tokens=wanted["max_gen_toks"],
            known=self._known.vocab_size,
            sampling=Sampling(temperature=wanted["temperature"], top_k=wanted.get("top_k", 0)),
            generator=self._generator,
        )
        texts = [self._known.decode(ids) for ids in found]
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts


def generation(settings: dict[str, Any], context: int) -> dict[str, Any]:
    """Return what a task wants of generated texts, with the harness's defaults.

    Raises:
        ConfigError: it leaves no room for a context, or is sampled in a way that we have not.
    """
    wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings))
    wanted["until"] = [
        stop for stop in handle_stop_sequences(wanted.get("until"), eos=None) if stop
    ]
    if wanted["max_gen_toks"] >= context:
        raise ConfigError(
            f"a task generates {wanted['max_gen_toks']} tokens (generation_kwargs.max_gen_toks), "
            f"but model.context is {context}, prompt included; leave that task out, or copy it "
            "with fewer"
        )
    more = wanted.keys() - {"until", "max_gen_toks"} - SAMPLING
    if wanted["do_sample"] and more:
        raise ConfigError(
            f"a task samples with generation_kwargs.{min(more)}; expected temperature and top_k "
            "alone; leave that task out, or copy it without"
        )
    return wanted
