"""The profile of a serve.yaml that fits a machine, or the arithmetic of why none does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packager.errors import UsageProblem
from packager.serving.cpu import Device
from packager.serving.machine import Machine
from packager.serving.needs import GIB, Needs, smallest_card
from packager.serving.serve_file import Profile, ServeFile

_KIND = {"cuda": "NVIDIA GPUs", "cpu": "a processor without GPUs"}
_ELSEWHERE = {
    "cuda": "Serve it where there is no GPU, with `moe-packager[serve-cpu]`.",
    "cpu": "Serve it where there are GPUs, with `moe-packager[serve]`.",
}


@dataclass(frozen=True)
class Load:
    """What is to be served: one request at a time of so many tokens."""

    tokens: int
    dequantized: bool = False
    """The weights are served in BF16."""
    utilization: float | None = None
    """Share of a GPU's memory that the engine is to take; None: the profile's."""

    def memory(self, needs: Needs) -> int:
        """Bytes on each GPU, or of main memory."""
        return needs.memory(self.tokens, dequantized=self.dequantized, utilization=self.utilization)


@dataclass(frozen=True)
class Choice:
    """A profile, and what a person is told of it."""

    name: str
    profile: Profile
    why: str
    """What it needs and what was found, in one line; empty: the file does not say what it needs."""


def gib(count: float) -> str:
    """Bytes in GiB, as drivers and engines print them."""
    return f"{count / GIB:.1f} GiB"


def choose_profile(
    found: ServeFile, machine: Machine, device: Device, load: Load, *, wanted: str | None = None
) -> Choice:
    """The default profile if it fits, else the one that fits on the fewest GPUs; `wanted`: that one, unasked.

    Raises:
        UsageProblem: no such profile, it is for another device, or none fits: what each needs and what was
            found.
    """
    if wanted is not None and wanted not in found.profiles:
        raise UsageProblem(f"the bundle has no profile {wanted!r}", f"It has: {', '.join(found.profiles)}.")
    if wanted is not None and found.profiles[wanted].device != device:
        raise UsageProblem(
            f"the profile {wanted} is for {_KIND[found.profiles[wanted].device]}; the engine here is for "
            f"{_KIND[device]}",
            "Take one for this machine, or add --print-command for the command alone.",
        )
    names = [name for name, one in found.profiles.items() if one.device == device and wanted in (None, name)]
    if not names:
        raise UsageProblem(
            f"no profile of this bundle is for {_KIND[device]}; it has: {', '.join(found.profiles)}",
            _ELSEWHERE[device],
        )
    # The default was measured; then fewer GPUs before more. Sorting keeps the file's order otherwise.
    names.sort(key=lambda name: (name != found.default_profile, found.profiles[name].tensor_parallel))
    problems = []
    for name in names:
        one = found.profiles[name]
        if one.needs is None:
            return Choice(name, one, "")
        problem = _problem(one.needs, machine, load)
        if problem is None or wanted is not None:
            said = problem or f"found {_first(one.needs, machine)}"
            return Choice(name, one, f"{_wants(one.needs, load)}; {said}")
        problems.append(f"  {name}: {_wants(one.needs, load)}; {problem}")
    raise UsageProblem(
        f"no profile of this bundle fits this machine at {load.tokens} tokens of context:\n"
        + "\n".join(problems),
        _remedy(found, machine, [found.profiles[name] for name in names], load),
    )


def _wants(needs: Needs, load: Load) -> str:
    amount = gib(load.memory(needs))
    if not needs.gpus:
        return f"needs {amount} of memory"
    return f"needs {amount} on {'one GPU' if needs.gpus == 1 else f'each of {needs.gpus} GPUs'}"


def _first(needs: Needs, machine: Machine) -> str:
    """The hardware that the engine would take."""
    if not needs.gpus:
        return f"{gib(machine.memory)} free" if machine.memory else "nothing that tells how much is free"
    names = dict.fromkeys(
        f"{gpu.name} ({'memory not told' if gpu.memory is None else gib(gpu.memory)})"
        for gpu in machine.gpus[: needs.gpus]
    )
    return f"{min(needs.gpus, len(machine.gpus))} x {', '.join(names)}"


def _problem(needs: Needs, machine: Machine, load: Load) -> str | None:
    """Why it does not fit; None: it does. Of the GPUs that it sees the engine takes the first."""
    wanted = load.memory(needs)
    if not needs.gpus:
        # A machine that does not tell is tried.
        return f"{gib(machine.memory)} is free" if 0 < machine.memory < wanted else None
    if not machine.gpus:
        return f"found none: {machine.trouble or 'no GPU'}"
    if len(machine.gpus) < needs.gpus:
        return f"found {_first(needs, machine)}"
    least = tuple(map(int, (needs.compute_capability or "0.0").split(".")))
    for gpu in machine.gpus[: needs.gpus]:
        which = f"GPU {gpu.index} ({gpu.name})"
        if gpu.compute_capability is not None and gpu.compute_capability < least:
            said = ".".join(map(str, gpu.compute_capability))
            return f"{which} has compute capability {said}, {needs.compute_capability} is needed"
        if gpu.memory is None:
            return f"{which} does not tell its memory"
        if gpu.memory < wanted:
            return f"{which} has {gib(gpu.memory)}"
        # vLLM 0.32 asks for its share of the whole GPU to be free, whatever the model needs.
        share = load.utilization or needs.memory_utilization
        if gpu.free is not None and gpu.free < share * gpu.memory:
            return (
                f"{which}: the engine takes {share:.0%} of {gib(gpu.memory)}, {gib(gpu.free)} is free "
                "(--gpu-memory-utilization takes less)"
            )
    return None


def _remedy(found: ServeFile, machine: Machine, profiles: Sequence[Profile], load: Load) -> str:
    """The longest shorter context that fits, and the smallest known hardware that holds this one."""
    needs = [one.needs for one in profiles if one.needs is not None]

    def fits(tokens: int) -> bool:
        shorter = Load(tokens, load.dequantized, load.utilization)
        return any(_problem(one, machine, shorter) is None for one in needs)

    advice = []
    lengths = {name: one.max_model_len for name, one in found.contexts.items()}
    shorter = [name for name, length in lengths.items() if length < load.tokens and fits(length)]
    if shorter:
        advice.append(f"--context {max(shorter, key=lambda name: lengths[name])} fits")
    cards = [smallest_card(one, load.tokens, utilization=load.utilization) for one in needs]
    known = sorted((card for card in cards if card is not None), key=lambda card: (card.memory, card.count))
    if known:
        advice.append(f"the smallest known hardware that does is {known[0].label} ({known[0].card.name})")
    elif all(not one.gpus for one in needs):
        missing = min(load.memory(one) for one in needs) - machine.memory
        advice.append(f"free {gib(missing)} more of memory")
    advice.append("--profile NAME tries one all the same")
    text = "; ".join(advice)
    return f"{text[0].upper() if not text.startswith('--') else text[0]}{text[1:]}."
