"""What a person sees of a run on the screen: how it begins, its losses by language, samples of its text."""

from collections.abc import Sequence
from typing import Any

from clu import parameter_overview

from bloomjax import decoding, flops
from bloomjax.metrics import MetricsFile
from bloomjax.model import Bloom
from bloomjax.vocabulary import Vocabulary


def print_parameters(params: Any) -> None:
    """Shapes and sizes of all, in a table."""
    print(parameter_overview.get_parameter_overview(params, include_stats=False))


def print_step_size(
    num_devices: int,
    device_kind: str,
    num_processes: int,
    batch_size: int,
    num_tokens: int,
    count: flops.FlopCount,
) -> None:
    """What a step is: devices, tokens, FLOPs."""
    spread = f" in {num_processes} processes" if num_processes > 1 else ""
    print(
        f"{num_devices} x {device_kind}{spread}; batch {batch_size} samples = {num_tokens:,} tokens a step; "
        f"{count.causal:,.0f} FLOPs a token (causal), {count.megatron_model:,.0f} (Megatron), {count.six_n:,.0f} (6N)"
    )


def print_samples(prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Each prompt and how it goes on."""
    if texts:
        print("samples (temperature 0.8, top-p 0.9):")
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"  {prompt}|{' '.join(text.split())}")


def print_losses(metrics: MetricsFile) -> None:
    """Held-out loss by language, first and last, in columns."""
    found = metrics.first_and_last_with("loss_by_language")
    if not found:
        return
    first, last = found
    before, after = first["loss_by_language"], last["loss_by_language"]
    print(f"held-out loss in nats a token, step {first['step']} -> step {last['step']}:")
    cells = [
        f"{name:<16}{before.get(name, float('nan')):6.2f} -> {after[name]:5.2f}" for name in after
    ]
    print_columns(cells)
    then, now = first["validation_loss"], last["validation_loss"]
    print(f"all languages: {then:.3f} -> {now:.3f} ({1 - now / then:.0%} lower)")
    bits = [record.get("validation_bits_per_byte") for record in found]
    if None not in bits:  # records of earlier versions have none
        print(f"bits per byte, mean over languages: {bits[0]:.3f} -> {bits[1]:.3f}")


def print_columns(cells: Sequence[str]) -> None:
    """Three columns, read downwards."""
    rows = -(-len(cells) // 3)
    for row in range(rows):
        print("   ".join(cells[row::rows]))


def sample_texts(
    model: Bloom,
    params: Any,
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    max_length: int,
    sees_whole_prompt: bool = False,
) -> list[str]:
    """A continuation of each prompt; every host takes part, the parameters may be spread over all."""
    if not prompts:
        return []
    encoded = [vocabulary.encode(prompt) for prompt in prompts]
    num_new = max(1, max_length - max(map(len, encoded)))
    texts = decoding.generate(
        model,
        params,
        encoded,
        max_new_tokens=num_new,
        eos_id=vocabulary.eos_id,
        temperature=0.8,
        top_p=0.9,
        sees_whole_prompt=sees_whole_prompt,
    )
    return [vocabulary.decode(text) for text in texts]
