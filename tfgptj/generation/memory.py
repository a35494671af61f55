"""How much memory a generation needs, and how much there is: asked before anything is allocated."""

from __future__ import annotations

from pathlib import Path

from tfgptj.config import GPTJConfig
from tfgptj.errors import ResourceLimitError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def needed_memory(
    config: GPTJConfig, rows: int, prompt: int, room: int, itemsize: int, queries: int | None = None
) -> int:
    """Bytes that a generation takes beside the weights.

    The keys and values of all slots, twice, as a step that copies them has both; and the attention scores of what is
    read at once in one layer, twice, before and after the softmax.

    Args:
        config: of the model.
        rows: sequences at once (B).
        prompt: slots of the prompt (P).
        room: slots of the new tokens.
        itemsize: bytes of a number in the cache.
        queries: columns of the prompt that are read at once and look at all slots; None for the whole prompt, of which
            the tokens look at each other.

    >>> needed_memory(GPTJConfig(), rows=1, prompt=1024, room=1024, itemsize=2) // 2**20
    1920
    """
    cache = 2 * config.n_layer * rows * (prompt + room) * config.n_embd * itemsize
    scores = prompt**2 if queries is None else queries * (prompt + room)
    return 2 * cache + 2 * 4 * rows * config.n_head * scores


def beam_memory(config: GPTJConfig, rows: int, beams: int, prompt: int, room: int, kept: int) -> int:
    """Bytes that beams take beside keys and values: twice what a step reads and writes, and its scores.

    Which of the slots each beam sees, one byte each, its ids with their mask, and three tables of its new tokens; the
    new tokens and parents of all texts that may be kept; four tables of scores, and attention in one layer.

    Args:
        config: of the model.
        rows: prompts, those of guidance too.
        beams: of each prompt (K).
        prompt, room: slots of the prompt, and steps.
        kept: texts that may be kept in a step, for each beam.

    >>> beam_memory(GPTJConfig(), rows=1, beams=4, prompt=1024, room=1024, kept=3) // 2**20
    5
    """
    slots = prompt + beams * room
    tables = slots + 5 * (prompt + room) + 3 * 4 * room
    scores = 4 * 4 * config.vocab_size + 2 * 4 * config.n_head * slots
    return rows * beams * (2 * tables + 2 * 4 * kept * room + scores)


def contrastive_memory(config: GPTJConfig, rows: int, candidates: int, slots: int) -> int:
    """Bytes that contrastive search takes beside keys and values.

    The directions of all last hidden states, twice, as a step that copies them has both; and the attention scores of
    the candidates in one layer, twice.

    Args:
        config: of the model.
        rows: prompts, those of guidance too.
        candidates: of each prompt.
        slots: of a row.

    >>> contrastive_memory(GPTJConfig(), rows=1, candidates=4, slots=2048) // 2**20
    65
    """
    return 2 * 4 * rows * slots * (config.n_embd + config.n_head * candidates)


def available_memory() -> int | None:
    """Bytes that this process may still take, or None where the system does not say."""
    found = [_of_the_machine(), _of_the_group()]
    return min((amount for amount in found if amount is not None), default=None)


def check_memory(needed: int, available: int | None, rows: int, slots: int) -> None:
    """Raise if more memory is needed than there is.

    Args:
        needed: bytes.
        available: bytes, or None for no limit.
        rows, slots: of the generation, for the message.

    Raises:
        ResourceLimitError: with the numbers.
    """
    if available is not None and needed > available:
        raise ResourceLimitError(
            f"{rows} sequences of {slots} tokens need about {needed / 2**30:,.1f} GiB for keys, values and attention, "
            f"and {available / 2**30:,.1f} GiB are free: take fewer sequences at once, a shorter prompt, a lower "
            "max_new_tokens or a prefill_chunk_size, or load the model with dtype='bfloat16'"
        )


def _of_the_machine() -> int | None:
    if not MEMINFO.is_file():
        return None
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines() if ":" in line)
    value = fields.get("MemAvailable", "").split()
    return int(value[0]) * 1024 if value else None


def _of_the_group() -> int | None:
    """What the limit of a container leaves; files that are only cached can make room."""
    names = ("memory.max", "memory.current", "memory.stat")
    if not all((CGROUP / name).is_file() for name in names):
        return None
    limit, used, stat = ((CGROUP / name).read_text(encoding="ascii").strip() for name in names)
    if not limit.isdigit():
        return None
    cached = dict(line.split() for line in stat.splitlines()).get("inactive_file", "0")
    return int(limit) - int(used) + int(cached)
