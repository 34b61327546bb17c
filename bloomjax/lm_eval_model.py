"""Our model as one of lm-evaluation-harness, in this process: the same requests and rules as its `hf` model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from bloomjax.decoding_until import generate_until
from bloomjax.errors import BadInput
from bloomjax.scoring import Request, Scorer
from bloomjax.vocabulary import Vocabulary

_MAX_NEW_TOKENS = 256  # of tasks that do not say, as the harness's `hf` model has it


def language_model(
    scorer: Scorer, vocabulary: Vocabulary, *, prefix_token_id: int | None = None
) -> Any:
    """An lm_eval.api.model.LM. `prefix_token_id` stands before a text without context; <s> by default, as in `hf`."""
    from lm_eval.api.model import TemplateLM

    # Here, because the harness is imported by those only who use it.
    kind = type("BloomjaxLM", (_LanguageModel, TemplateLM), {})
    return kind(scorer, vocabulary, prefix_token_id)


class _LanguageModel:
    """What TemplateLM leaves open. It encodes pairs of context and continuation itself, and asks `tok_encode`."""

    loglikelihood: Callable[..., Any]
    cache_hook: Any

    def __init__(self, scorer: Scorer, vocabulary: Vocabulary, prefix_token_id: int | None):
        super().__init__()
        self._scorer, self._vocabulary = scorer, vocabulary
        self._prefix_token_id = prefix_token_id
        self._num_generated = 0  # batches: each samples with a seed of its own
        # The context of a question is asked for once with each of its endings.
        self._encode = functools.lru_cache(1 << 12)(lambda text: tuple(vocabulary.encode(text)))

    @property
    def eot_token_id(self) -> int:
        return self._vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token_id is None:
            return self._vocabulary.bos_id
        return self._prefix_token_id

    @property
    def max_length(self) -> int:
        return self._scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        return self._vocabulary.path.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list:
        del add_special_tokens, options  # BLOOM's tokenizer adds none
        return list(self._encode(string))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        is_causal: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        del options
        with _bar(len(requests), "scoring", disable_tqdm) as bar:
            scores = self._scorer.score(
                [Request(context, continuation) for _, context, continuation in requests],
                bar.update,
                is_causal=is_causal,
            )
        for (texts, *_), score in zip(requests, scores, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(score))
        return [(score.log_probability, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of `max_length` tokens that each predict what no other does; none has a prompt."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        found = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm, is_causal=True)
        for number, (log_probability, _) in zip(owners, scores, strict=True):
            found[number] += log_probability
        for request, log_probability in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, log_probability)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The text after each context, cut before the first of its stop strings."""
        from lm_eval.models.utils import normalize_gen_kwargs

        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        found = [""] * len(requests)
        with _bar(len(requests), "generating", disable_tqdm) as bar:
            for numbers in alike.values():
                given = requests[numbers[0]].args[1].items()
                given = {name: value for name, value in given if value is not None}  # None is off
                options: dict[str, Any] = {**normalize_gen_kwargs(given, _MAX_NEW_TOKENS)}
                for batch, prompts in self._prompts(requests, numbers, options["max_gen_toks"]):
                    for number, text in zip(batch, self._generate(prompts, options), strict=True):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return found

    def _prompts(self, requests: Any, numbers: list[int], num_new: int):
        """Batches of numbers and token ids, long prompts first, each cut from the left to leave room."""
        room = self.max_length - num_new
        if room < 1:
            raise BadInput(
                f"a task generates up to {num_new} tokens; the model has {self.max_length}, prompt included; "
                "--max_length changes that"
            )
        prompts = {n: self.tok_encode(requests[n].args[0])[-room:] for n in numbers}
        order = sorted(numbers, key=lambda n: -len(prompts[n]))
        while order:
            most = max(1, self._scorer.batch_tokens // (len(prompts[order[0]]) + num_new))
            batch, order = order[:most], order[most:]
            yield batch, [prompts[n] or [self.prefix_token_id] for n in batch]

    def _generate(self, prompts: list[list[int]], options: Any) -> list[str]:
        decode, eos_id = self._vocabulary.decode, self._vocabulary.eos_id
        stops = [stop for stop in options["until"] if stop]
        is_sampled = options["do_sample"]
        rows = generate_until(
            self._scorer.model, self._scorer.params, self._scorer.mesh, prompts,
            lambda ids: any(stop in decode(ids) for stop in stops),
            max_new_tokens=options["max_gen_toks"], eos_id=eos_id,
            temperature=options.get("temperature", 1.0) if is_sampled else 0.0,
            top_k=options.get("top_k", 0) if is_sampled else 0,
            top_p=options.get("top_p", 1.0) if is_sampled else 1.0,
            seed=self._num_generated, sees_whole_prompt=self._scorer.sees_whole_context,
        )  # fmt: skip
        self._num_generated += 1
        texts = [decode(row) for row in rows]
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts


def _bar(total: int, what: str, is_disabled: bool) -> tqdm:
    """Only where somebody watches."""
    return tqdm(total=total, desc=what, unit="request", disable=is_disabled or None)
