"""Log-likelihoods of many short texts on the sharded model: common prefixes once, few shapes, never all logits.

Texts that begin alike (the endings of one question) form a group: the prefix goes through the model once, each suffix
goes on from its cache. Logits are made of the scored positions only, a chunk at a time.

Dimension key: B groups, P prefix slots, C texts of a group, S suffix slots, N scored positions of a group,
G shards of the batch, T scored positions of a shard, n those of a chunk, V vocabulary, D emb_dim.
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
from bloomjax.attention import prefix_last_key
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
    def context(self) -> np.ndarray:
        """Inputs up to the one that predicts the first target."""
        return self.inputs[: len(self.inputs) - len(self.targets) + 1]


@dataclasses.dataclass
class Group:
    """Texts with their first `prefix` inputs in common, all of them context."""

    prefix: int
    texts: list[Text]

    @property
    def start(self) -> int:
        """Where suffixes begin: at the last token of the prefix, which may predict the first target."""
        return max(0, self.prefix - 1)

    @property
    def shape(self) -> Shape:
        longest = max(len(text.inputs) for text in self.texts) - self.start
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


def group_texts(texts: Sequence[Text], *, sees_whole_context: bool = False) -> list[Group]:
    """Groups texts with a long common prefix, each text in one group; neighbours in alphabetical order are looked at.

    A text joins a group of n texts with prefix p if their common prefix q saves more than the shorter prefix costs the
    others: q > (n - 1)(p - q). Where tokens of a context see all of it, only the whole can be shared.
    """
    groups: list[Group] = []
    for text in sorted(texts, key=lambda text: text.context.tolist()):
        if groups and len(groups[-1].texts) < _MAX_TEXTS_OF_GROUP:
            group = groups[-1]
            most = min(group.prefix, len(text.context))
            q = _common_prefix(group.texts[0].inputs[:most], text.inputs[:most])
            saves = q > (len(group.texts) - 1) * (group.prefix - q)
            if sees_whole_context:
                saves = q == group.prefix == len(text.context)
            if saves and q >= max(_MIN_PREFIX_TOKENS, len(text.inputs) / 4):
                group.prefix = q
                group.texts.append(text)
                continue
        groups.append(Group(len(text.context), [text]))
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
        self, model: Bloom, params: Any, mesh: Mesh, *, max_length: int, batch_tokens: int,
        sees_whole_context: bool = False,
    ):  # fmt: skip
        """`max_length` tokens are read of a request, at most; about `batch_tokens` are computed at a time on each
        device that splits the batch. With `sees_whole_context` tokens of a context see those after them, too.

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
        self.max_length = max_length
        self.batch_tokens = batch_tokens * partitioning.num_batch_shards(mesh)
        self.sees_whole_context = sees_whole_context
        self.shapes: set[tuple[Shape, int]] = set()  # compiled so far

    def score(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], object] = lambda num: None,
        *,
        is_causal: bool = False,
    ) -> list[Score]:
        """The score of each request; `progress` is told how many more are done. BadInput as in `cut`.

        `is_causal` for contexts that are the beginning of a text rather than a prompt: no token sees one after it.
        """
        sees_whole_context = self.sees_whole_context and not is_causal
        found: list[Score | None] = [None] * len(requests)
        waiting: collections.deque = collections.deque()  # the device works while the host reads

        def read():
            groups, outputs = waiting.popleft()
            for text, score in _read(groups, *map(np.asarray, outputs)):
                found[text.number] = score
            progress(sum(len(group.texts) for group in groups))

        texts = cut(requests, self.max_length)
        groups = group_texts(texts, sees_whole_context=sees_whole_context)
        shards = partitioning.num_batch_shards(self.mesh)
        with jax.set_mesh(self.mesh):
            for shape, num_rows, members in batch_groups(
                groups, batch_tokens=self.batch_tokens, row_multiple=shards
            ):
                shape = self._fit(shape)
                self.shapes.add((shape, num_rows))
                arrays = [self._put(a) for a in fill(shape, num_rows, members)]
                outputs = _score_batch(
                    self.model, self.params, *arrays, sees_whole_context=sees_whole_context
                )
                waiting.append((members, outputs))
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
            suffix, num = text.inputs[group.start :], len(text.targets)
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


@functools.partial(jax.jit, static_argnames=("model", "sees_whole_context"))
def _score_batch(
    model,
    params,
    prefix_BP,
    valid_BP,
    suffix_BCS,
    position_BN,
    target_BN,
    *,
    sees_whole_context=False,
):
    """Log-probability of each target and the likeliest token in its place, float32 and int32 [B, N]."""
    B, C, S = suffix_BCS.shape
    P = prefix_BP.shape[1]
    last_key_BS = None
    if (
        sees_whole_context
    ):  # it ends at the first scored position, with a prefix in each suffix at 0
        last_key_BS = prefix_last_key(position_BN[:, 0] + 1, S)
    if P == 0:  # then there is one text a group
        x_BCSD = model.apply({"params": params}, suffix_BCS[:, 0], last_key_BL=last_key_BS)[:, None]
    else:
        start = P - 1  # the prefix's last token is the suffix's first, and takes its slot again
        k_valid_BS = jnp.pad(valid_BP[:, :start], ((0, 0), (0, S)), constant_values=True)
        _, cache = prefill(model, params, prefix_BP, k_valid_BS, sees_whole_context)
        if last_key_BS is not None:
            last_key_BS += start

        def go_on(suffix_BS):
            return model.apply(
                {"params": params, "cache": cache}, suffix_BS, start=start, k_valid_BS=k_valid_BS,
                last_key_BL=last_key_BS, mutable=["cache"],
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
    B, N, _ = x_BND.shape
    mesh: Any = jax.sharding.get_abstract_mesh()
    G = partitioning.num_batch_shards(mesh)
    T = B * N // G
    fits = max(1, _LOGITS_BYTES // (4 * math.ceil(model.config.vocab_size / mesh.shape["tensor"])))
    num_chunks = math.ceil(T / fits)
    n = math.ceil(T / num_chunks)

    def chunks(a_BN):
        """[chunks, G, n, ...]: rows of a shard stay on it."""
        a_GT = a_BN.reshape(G, T, *a_BN.shape[2:])
        a_GT = jnp.pad(a_GT, [(0, 0), (0, num_chunks * n - T), *[(0, 0)] * (a_GT.ndim - 2)])
        return jnp.moveaxis(a_GT.reshape(G, num_chunks, n, *a_GT.shape[2:]), 1, 0)

    def score(chunk):
        x_GnD, target_Gn = chunk
        x_GnD = partitioning.constrain(x_GnD, PartitionSpec(partitioning.BATCH_AXES))
        logits_GnV = model.apply({"params": params}, x_GnD, method="logits")
        spec = PartitionSpec(partitioning.BATCH_AXES, None, "tensor")
        logits_GnV = partitioning.constrain(logits_GnV, spec)
        gold_Gn = jnp.take_along_axis(logits_GnV, target_Gn[..., None], axis=2)[..., 0]
        logp_Gn = gold_Gn - jax.nn.logsumexp(logits_GnV, axis=-1)
        return logp_Gn, jnp.argmax(logits_GnV, axis=-1).astype(jnp.int32)

    outputs = jax.lax.map(score, (chunks(x_BND), chunks(target_BN)))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(G, -1)[:, :T].reshape(B, N) for a in outputs)
