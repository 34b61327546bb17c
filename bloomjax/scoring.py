"""Log-likelihoods of many short texts on the sharded model: common prefixes once, few shapes, never all logits.

Texts that begin alike (the endings of one question) form a group: the prefix goes through the model once, each suffix
goes on from its cache. Logits are made of the scored positions only, a chunk at a time.

Dimension key: B groups, P prefix slots, C texts of a group, S suffix slots, N scored positions of a group,
V vocabulary, D emb_dim.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bloomjax import partitioning
from bloomjax.errors import BadInput
from bloomjax.model import Bloom
from bloomjax.prefix_cache import next_size, padded_length, prefill

# A prefix is kept apart if it is at least so long, and at least a quarter of the text.
_MIN_PREFIX_TOKENS = 8
_MAX_TEXTS_OF_GROUP = 16
_MIN_SUFFIX_SLOTS = 4
_MIN_SLOTS = 16
# A shape of its own only for as many batches; fewer are padded to the next larger shape instead of compiled.
_MIN_BATCHES_OF_SHAPE = 4
_LOGITS_BYTES = 1 << 28  # of one device at a time


class Request(NamedTuple):
    """Token ids; the context has at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Of a continuation: the sum of its log-probabilities, and whether each token was the likeliest."""

    log_probability: float
    is_greedy: bool


class Shape(NamedTuple):
    """Of what one program computes for a group; a P of 0 means no cache."""

    C: int
    S: int
    N: int
    P: int

    @property
    def num_tokens(self) -> int:
        return self.P + self.C * self.S

    def covers(self, other: "Shape") -> bool:
        return self.C >= other.C and self.S >= other.S and self.N >= other.N and self.P >= other.P


@dataclasses.dataclass(frozen=True)
class Text:
    """What the model reads of one request, cut from the left to its length, and the targets of its last positions."""

    number: int
    inputs: np.ndarray
    targets: np.ndarray

    @property
    def num_given(self) -> int:
        """Inputs before the first scored position."""
        return len(self.inputs) - len(self.targets)


@dataclasses.dataclass
class Group:
    """Texts with their first `prefix` inputs in common, none of them scored."""

    prefix: int
    texts: list[Text]

    @property
    def shape(self) -> Shape:
        longest = max(len(text.inputs) for text in self.texts) - self.prefix
        num_scored = sum(len(text.targets) for text in self.texts)
        if self.prefix == 0:
            slots = padded_length(max(longest, _MIN_SLOTS))
            return Shape(1, slots, min(next_size(num_scored), slots), 0)
        slots = next_size(max(longest, _MIN_SUFFIX_SLOTS))
        prefix = padded_length(max(self.prefix, _MIN_SLOTS))
        columns = next_size(len(self.texts))
        return Shape(columns, slots, min(next_size(num_scored), columns * slots), prefix)


def cut(requests: Sequence[Request], max_length: int) -> list[Text]:
    """What is read of each request; of one with more than `max_length` + 1 tokens the last ones.

    BadInput for a context or continuation without tokens, and a continuation longer than `max_length`.
    """
    texts = []
    for number, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            raise BadInput(f"request {number} has an empty context or continuation")
        if len(continuation) > max_length:
            raise BadInput(
                f"request {number} has a continuation of {len(continuation)} tokens, the model reads {max_length} "
                "(--max_length)"
            )
        tokens = np.asarray([*context, *continuation][-(max_length + 1) :], np.int32)
        texts.append(Text(number, tokens[:-1], np.asarray(continuation, np.int32)))
    return texts


def group_texts(texts: Sequence[Text]) -> list[Group]:
    """Groups texts with a long common prefix, each text in one group; neighbours in alphabetical order are looked at.

    A text joins a group of n texts with prefix p if their common prefix q saves more than the shorter prefix costs the
    others: q > (n - 1)(p - q).
    """
    groups: list[Group] = []
    for text in sorted(texts, key=lambda text: text.inputs.tolist()):
        if groups and len(groups[-1].texts) < _MAX_TEXTS_OF_GROUP:
            group = groups[-1]
            most = min(group.prefix, text.num_given)
            q = _common_prefix(group.texts[0].inputs[:most], text.inputs[:most])
            saves = q > (len(group.texts) - 1) * (group.prefix - q)
            if saves and q >= max(_MIN_PREFIX_TOKENS, len(text.inputs) / 4):
                group.prefix = q
                group.texts.append(text)
                continue
        groups.append(Group(text.num_given, [text]))
    for group in groups:
        if len(group.texts) == 1:
            group.prefix = 0
    return groups


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    differs = np.flatnonzero(a != b)
    return int(differs[0]) if len(differs) else len(a)


def batch_groups(
    groups: Sequence[Group], *, batch_tokens: int, row_multiple: int
) -> Iterator[tuple[Shape, int, list[Group]]]:
    """Shape, number of rows and groups of each batch; the rows are filled up to a multiple of `row_multiple`.

    The long ones come first, so what does not fit fails at once and a progress bar promises too little rather than too
    much. A shape that fewer than four batches would have is padded to the next larger one.
    """
    by_shape: dict[Shape, list[Group]] = collections.defaultdict(list)
    for group in groups:
        by_shape[group.shape].append(group)
    for shape in sorted(by_shape, key=lambda shape: shape.num_tokens):
        members = by_shape[shape]
        larger = [other for other in by_shape if other != shape and other.covers(shape)]
        if len(members) * shape.num_tokens < _MIN_BATCHES_OF_SHAPE * batch_tokens and larger:
            by_shape[min(larger, key=lambda other: other.num_tokens)] += by_shape.pop(shape)
    for shape in sorted(by_shape, key=lambda shape: -shape.num_tokens):
        members = by_shape[shape]
        num_batches = math.ceil(len(members) / max(1, batch_tokens // shape.num_tokens))
        num_rows = next_size(math.ceil(len(members) / num_batches))
        num_rows = math.ceil(num_rows / row_multiple) * row_multiple
        for first in range(0, len(members), num_rows):
            yield shape, num_rows, members[first : first + num_rows]


class Scorer:
    """Scores requests with one model on one mesh."""

    def __init__(
        self, model: Bloom, params: Any, mesh: Mesh, *, max_length: int, batch_tokens: int
    ):
        """`max_length` tokens are read of a request, at most; about `batch_tokens` are computed at a time.

        The layers are looped over, whatever the model says: there are many shapes, each is compiled. A text is one
        document, as in decoding. BadInput if the model has fewer positions.
        """
        model.config.positions.check_length(max_length)
        self.model = Bloom(
            dataclasses.replace(
                model.config, scan_layers=True, remat_policy="none", document_end_id=None
            )
        )
        self.params, self.mesh = params, mesh
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.shapes: set[tuple[Shape, int]] = set()  # compiled so far

    def score(
        self, requests: Sequence[Request], progress: Callable[[int], object] = lambda num: None
    ) -> list[Score]:
        """The score of each request; `progress` is told how many more are done. BadInput as in `cut`."""
        found: list[Score | None] = [None] * len(requests)
        waiting: collections.deque = collections.deque()  # the device works while the host reads

        def read():
            groups, outputs = waiting.popleft()
            for text, score in _read(groups, *map(np.asarray, outputs)):
                found[text.number] = score
            progress(sum(len(group.texts) for group in groups))

        groups = group_texts(cut(requests, self.max_length))
        shards = partitioning.num_batch_shards(self.mesh)
        with jax.set_mesh(self.mesh):
            for shape, num_rows, members in batch_groups(
                groups, batch_tokens=self.batch_tokens * shards, row_multiple=shards
            ):
                shape = self._fit(shape)
                self.shapes.add((shape, num_rows))
                arrays = [self._put(a) for a in fill(shape, num_rows, members)]
                waiting.append((members, _score_batch(self.model, self.params, *arrays)))
                if len(waiting) > 1:
                    read()
            while waiting:
                read()
        return [score for score in found if score is not None]

    def _fit(self, shape: Shape) -> Shape:
        """Lengths that the `tensor` axis divides, for the residual stream is split over it, and that the model has."""
        size = self.mesh.shape["tensor"]
        if shape.P == 0 and shape.S > self.max_length:
            shape = shape._replace(S=self.max_length, N=min(shape.N, self.max_length))
        S, P = (math.ceil(n / size) * size for n in (shape.S, shape.P))
        return shape._replace(S=S, P=P)

    def _put(self, a: np.ndarray) -> jax.Array:
        spec = PartitionSpec(partitioning.BATCH_AXES)
        return jax.device_put(a, NamedSharding(self.mesh, spec))


def fill(shape: Shape, num_rows: int, groups: Sequence[Group]) -> list[np.ndarray]:
    """Prefixes padded on the left [B, P] and where they are tokens; suffixes padded on the right [B, C, S]; for each
    scored token, one text of a group after the other, its position among the C * S and its id, [B, N]."""
    B, (C, S, N, P) = num_rows, shape
    prefix_BP, valid_BP = np.zeros((B, P), np.int32), np.zeros((B, P), bool)
    suffix_BCS = np.zeros((B, C, S), np.int32)
    position_BN, target_BN = np.zeros((B, N), np.int32), np.zeros((B, N), np.int32)
    for row, group in enumerate(groups):
        if group.prefix:
            prefix_BP[row, P - group.prefix :] = group.texts[0].inputs[: group.prefix]
            valid_BP[row, P - group.prefix :] = True
        first = 0
        for column, text in enumerate(group.texts):
            suffix, num = text.inputs[group.prefix :], len(text.targets)
            suffix_BCS[row, column, : len(suffix)] = suffix
            end = column * S + len(suffix)
            position_BN[row, first : first + num] = np.arange(end - num, end)
            target_BN[row, first : first + num] = text.targets
            first += num
    return [prefix_BP, valid_BP, suffix_BCS, position_BN, target_BN]


def _read(
    groups: Sequence[Group], logp_BN: np.ndarray, likeliest_BN: np.ndarray
) -> Iterator[tuple[Text, Score]]:
    for row, group in enumerate(groups):
        first = 0
        for text in group.texts:
            last = first + len(text.targets)
            logp = logp_BN[row, first:last].astype(np.float64).sum()
            is_greedy = (likeliest_BN[row, first:last] == text.targets).all()
            yield text, Score(float(logp), bool(is_greedy))
            first = last


@functools.partial(jax.jit, static_argnames=("model",))
def _score_batch(model, params, prefix_BP, valid_BP, suffix_BCS, position_BN, target_BN):
    """Log-probability of each target and the likeliest token in its place, float32 and int32 [B, N]."""
    B, C, S = suffix_BCS.shape
    P = prefix_BP.shape[1]
    if P == 0 and C == 1:
        x_BCSD = model.apply({"params": params}, suffix_BCS[:, 0])[:, None]
    else:
        k_valid_BS = jnp.pad(valid_BP, ((0, 0), (0, S)), constant_values=True)
        _, cache = prefill(model, params, prefix_BP, k_valid_BS)

        def go_on(suffix_BS):
            return model.apply(
                {"params": params, "cache": cache}, suffix_BS, start=P, k_valid_BS=k_valid_BS,
                mutable=["cache"],
            )[0]  # fmt: skip

        # Not repeated rows: of the cache of all layers one copy is enough, and one layer's is copied at a time.
        x_BCSD = jax.vmap(go_on, in_axes=1, out_axes=1)(suffix_BCS)
    x_BND = jnp.take_along_axis(
        x_BCSD.reshape(B, C * S, x_BCSD.shape[-1]), position_BN[..., None], axis=1
    )
    outputs = _score_tokens(model, params, x_BND, target_BN)
    return tuple(partitioning.constrain(a, PartitionSpec()) for a in outputs)


def _score_tokens(model, params, x_BND, target_BN):
    """The same of hidden states: as many tokens at a time as leave float32 logits in `_LOGITS_BYTES` of a device."""
    B, N, D = x_BND.shape
    mesh = jax.sharding.get_abstract_mesh()
    fits = _LOGITS_BYTES * max(1, mesh.size) // (4 * B * model.config.vocab_size)
    n = max(n for n in range(1, N + 1) if N % n == 0 and n <= max(1, fits))

    def chunk(inputs):
        x_BnD, target_Bn = inputs
        logits_BnV = model.apply({"params": params}, x_BnD, method="logits")
        gold_Bn = jnp.take_along_axis(logits_BnV, target_Bn[..., None], axis=2)[..., 0]
        logp_Bn = gold_Bn - jax.nn.logsumexp(logits_BnV, axis=-1)
        return logp_Bn, jnp.argmax(logits_BnV, axis=-1).astype(jnp.int32)

    if n == N:
        return chunk((x_BND, target_BN))
    chunks = x_BND.reshape(B, N // n, n, D), target_BN.reshape(B, N // n, n)
    outputs = jax.lax.map(chunk, tuple(jnp.moveaxis(a, 1, 0) for a in chunks))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(B, N) for a in outputs)
